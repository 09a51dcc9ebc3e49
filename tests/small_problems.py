"""Small random problems of sharding with recomputation and regathering, solved by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from netmind_autopar.solver.problem import BACKWARD, FORWARD, Choice, Consumer, Node, Problem, Value
from netmind_autopar.solver.saving.joint import solve_joint
from netmind_autopar.solver.saving.tape import Saved, Tape
from netmind_autopar.solver.search import solve_problem


def random_problem(seed: int, ops: int = 3, layers: int = 2, host: bool = False) -> Problem:
    """A chain of `ops` forward ops per layer with an op of backward each, which takes what its forward op took and made.

    host: ops have parameters, whose optimizer state may wait in host memory."""
    draw = np.random.default_rng(seed)
    total = ops * layers
    end = 2 * total - 1
    forward = [[2 * (layer * ops + i) + 1 for layer in range(layers)] for i in range(ops)]
    backward = [[2 * (2 * total - 1 - (layer * ops + i)) + 1 for layer in range(layers)] for i in range(ops)]
    nodes = []
    for phase, moments in ((FORWARD, forward), (BACKWARD, backward)):
        for i in range(ops):
            seconds = draw.integers(2, 20, 2) * 1e-3 * layers
            when = tuple(sorted(moments[i]))
            nodes.append(Node(f"op{i}" + "@b" * phase, ("a", "b"), seconds, np.zeros(2, np.int64), when, False, phase == FORWARD))
    values = []
    for i in range(ops):
        made = np.array(forward[i])
        takers = [(i, BACKWARD, [backward[i][layer] for layer in range(layers)])] if draw.random() < 0.7 else []
        if i + 1 < ops:
            takers.append((i + 1, FORWARD, [forward[i + 1][layer] for layer in range(layers)]))
            takers.append((i + 1, BACKWARD, [backward[i + 1][layer] for layer in range(layers)]))
        if not takers:
            continue
        takers.sort(key=lambda taker: taker[1])
        used = np.array([[when[layer] - 1 for _, _, when in takers] for layer in range(layers)])
        seconds = np.array([[0.0, draw.integers(1, 9)], [draw.integers(1, 9), 0.0]]) * 1e-3
        consumers = tuple(Consumer(j + ops * phase, draw.permutation(2), phase) for j, phase, _ in takers)
        size = draw.integers(5, 40, 2)
        values.append(
            Value(
                f"op{i}",
                i,
                np.array([0, 1]),
                consumers,
                seconds,
                np.eye(2, dtype=bool),
                np.ones(2, bool),
                size,
                size[::-1].copy(),
                made,
                used,
                used + 1,
                rank=tuple(range(layers)),
                partial=np.zeros(2, bool),
            )
        )
    for i in range(ops):  # gradients flow back
        made = np.array(backward[i])
        if i == 0:
            continue
        used = np.array([[backward[i - 1][layer] - 1] for layer in range(layers)])
        size = draw.integers(5, 20, 2)
        consumer = Consumer(ops + i - 1, np.array([0, 1]), BACKWARD)
        seconds = np.array([[0.0, 2e-3], [2e-3, 0.0]])
        same = np.eye(2, dtype=bool)
        args = (f"g{i}", ops + i, np.array([0, 1]), (consumer,), seconds, same, np.ones(2, bool), size, size, made, used, used + 1)
        values.append(Value(*args, rank=tuple(range(layers)), partial=np.zeros(2, bool)))
    made = Problem(tuple(nodes), tuple(values), 4 * total + 2, 0, None, end)
    return with_state(made, draw, ops, np.array(forward)) if host else made


def with_state(problem: Problem, draw: np.random.Generator, ops: int, moments: np.ndarray) -> Problem:
    """With a class of parameters per op: its layout costs memory, and seconds where it is not the one the op wants."""
    nodes, values = list(problem.nodes), list(problem.values)
    layers = moments.shape[1]
    for i in range(ops):
        size = draw.integers(2, 12, 2)
        nodes.append(Node(f"w{i}", ("a", "b"), np.zeros(2), 3 * size * layers, state=2 * size, here=layers))
        used, zeros = moments[i][:, None] - 1, np.zeros(2, np.int64)
        seconds = np.array([[0.0, draw.integers(1, 9)], [draw.integers(1, 9), 0.0]]) * 1e-3
        taker = Consumer(i, draw.permutation(2), FORWARD)
        args = (f"w{i}", len(nodes) - 1, np.array([0, 1]), (taker,), seconds, np.eye(2, dtype=bool), np.ones(2, bool), zeros, zeros)
        more = {"rank": tuple(range(layers)), "partial": np.zeros(2, bool)}
        values.append(Value(*args, np.zeros(layers, np.int64), used, used + 1, **more))
    rate, bucket = float(draw.uniform(2e3, 3e4)), int(draw.integers(5, 60))
    return replace(problem, nodes=tuple(nodes), values=tuple(values), host_bytes_s=rate, bucket_bytes=bucket)


def everything(problem: Problem) -> list[tuple[float, int]]:
    """(seconds, peak) of every choice and every way to save memory, layer by layer."""
    layers = len(problem.nodes[0].moments)
    nodes = [n for n, node in enumerate(problem.nodes) if node.again]
    names = sorted({v.name for v in problem.values if v.consumers and v.produced.max() <= problem.forward_end})
    subsets = [frozenset(s) for k in range(layers + 1) for s in itertools.combinations(range(layers), k)]
    out = []
    for choice in itertools.product(*(range(len(node.labels)) for node in problem.nodes)):
        tape = Tape(problem, choice)
        for again in itertools.product(subsets, repeat=len(nodes)):
            for gathered in itertools.product((frozenset(), frozenset(range(layers))), repeat=len(names)):
                saved = Saved(dict(zip(nodes, again, strict=True)), dict(zip(names, gathered, strict=True)))
                run = tape.run(saved)
                out += [(run.seconds + s, int((run.memory - freed).max())) for s, freed in parkings(tape, len(run.memory))]
    return out


def parkings(tape: Tape, events: int) -> Iterator[tuple[float, np.ndarray]]:
    """Every way to have optimizer state wait in host memory: seconds, and bytes freed at every event of a run, the optimizer's last."""
    problem = tape.problem
    found = [(int(n.state[k]), n.here) for n, k in zip(problem.nodes, tape.choice, strict=True) if n.state is not None]
    sums = {}
    for counts in itertools.product(*(range(here + 1) for _, here in found)):
        total = sum(count * size for count, (size, _) in zip(counts, found, strict=True))
        largest = max((size for count, (size, _) in zip(counts, found, strict=True) if count), default=0)
        sums[total] = min(sums.get(total, largest), largest)
    for total, largest in sums.items():
        freed = np.full(events, total)
        freed[-1] -= min(total, max(problem.bucket_bytes, largest))
        yield (2 * total / problem.host_bytes_s if total else 0.0), freed


def solved(problem: Problem, limit: int) -> tuple[float, float]:
    """(seconds, bound) of the solver within a limit; infinite seconds when it finds nothing."""
    free = solve_problem(problem)
    assert free.choice is not None
    choice: Choice = free.choice
    if (run := Tape(problem, choice).run()).peak <= limit:
        return run.seconds, free.bound
    found = solve_joint(problem, choice, limit, allowed=None, bound=free.bound, gap=1e-6, time_limit=30.0)
    return found.seconds, found.bound


def compare(problems: int, first: int = 0, **options: Any) -> tuple[int, float, int]:
    """(how many are as good as the best of all, the worst relative excess, how many were looked at). Raises when a bound is wrong."""
    equal, worst, checked = 0, 0.0, 0
    for seed in range(first, first + problems):
        problem = random_problem(seed, **options)
        every = everything(problem)
        peaks = sorted({peak for _, peak in every})
        top = Tape(problem, solve_problem(problem).choice).run().peak  # type: ignore[arg-type]
        limit = int(peaks[0] + np.random.default_rng(seed).uniform(0.0, 1.0) * max(top - peaks[0], 0))
        best = min(seconds for seconds, peak in every if peak <= limit)
        seconds, bound = solved(problem, limit)
        assert bound <= min(best, seconds) * (1 + 1e-9), (seed, bound, best)
        checked += 1
        equal += seconds <= best * (1 + 1e-9)
        worst = max(worst, seconds / best - 1 if seconds < math.inf else math.inf)
    return equal, worst, checked
