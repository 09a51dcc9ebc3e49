"""Small random problems of sharding with recomputation and regathering, solved by trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np

from netmind_autopar.solver.problem import BACKWARD, FORWARD, Choice, Consumer, Node, Problem, Value
from netmind_autopar.solver.saving.joint import solve_joint
from netmind_autopar.solver.saving.tape import Saved, Tape
from netmind_autopar.solver.search import solve_problem


def random_problem(seed: int, ops: int = 3, layers: int = 2) -> Problem:
    """A chain of `ops` forward ops per layer with an op of backward each, which takes what its forward op took and made."""
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
    return Problem(tuple(nodes), tuple(values), 4 * total + 1, 0, None, end)


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
                out.append((run.seconds, run.peak))
    return out


def solved(problem: Problem, limit: int) -> tuple[float, float]:
    """(seconds, bound) of the solver within a limit; infinite seconds when it finds nothing."""
    free = solve_problem(problem)
    assert free.choice is not None
    choice: Choice = free.choice
    if (run := Tape(problem, choice).run()).peak <= limit:
        return run.seconds, free.bound
    found = solve_joint(problem, choice, limit, allowed=None, bound=free.bound, gap=1e-6, time_limit=30.0)
    return found.seconds, found.bound


def compare(problems: int, first: int = 0) -> tuple[int, float, int]:
    """(how many are as good as the best of all, the worst relative excess, how many were looked at). Raises when a bound is wrong."""
    equal, worst, checked = 0, 0.0, 0
    for seed in range(first, first + problems):
        problem = random_problem(seed)
        every = everything(problem)
        peaks = sorted({peak for _, peak in every})
        top = Tape(problem, solve_problem(problem).choice).run().peak  # type: ignore[arg-type]
        limit = int(peaks[0] + np.random.default_rng(seed).uniform(0.0, 1.0) * max(top - peaks[0], 0))
        best = min(seconds for seconds, peak in every if peak <= limit)
        seconds, bound = solved(problem, limit)
        assert bound <= best * (1 + 1e-9), (seed, bound, best)
        checked += 1
        equal += seconds <= best * (1 + 1e-9)
        worst = max(worst, seconds / best - 1 if seconds < math.inf else math.inf)
    return equal, worst, checked
