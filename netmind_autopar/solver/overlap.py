"""The choice by the step's time when collectives travel beside compute.

The sum of all work is what an integer program can minimise and bound. On the timeline (sketch.py) most of a step's collectives may be
hidden, and which depends on all the others; so the sum's best plan is where the search begins, not where it ends:

    1. sketch    the plan in hand on the timeline: which share of each collective, and of each op, lies on the critical path
    2. reprice   that share is its price from now on, the derivative of the step's time; conversions of parameters and gradients that
                 no sketch has seen yet are taken to be hidden for the most part (OPTIMISM), those of activations not at all
    3. solve     the relaxation at these prices (bound.py), decoded, and descended from the best plan so far
    4. repeat    a few times; the shortest sketch among the plans that fit the memory wins, ties by the sum

What is proven about the sum stays so. Of the timeline is proven that no stream, compute among them, can have less work than a plan must
give it: `least_beside_s`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..costs.comm import Conversions
from .bound import Local, Relaxed
from .build import Built
from .memory import Moments, crowded
from .presolve import Kept, cells, merged, reduce
from .problem import Choice, Problem, evaluate, profile, wanted
from .problem import seconds as sum_of
from .sketch import Sketch, Sketcher

OPTIMISM = (0.2, 0.5)  # what the unseen conversions of parameters and gradients are taken to cost, of their seconds
ROUNDS = 2  # of repricing with each
SWEEPS = 4  # of the relaxation in a round
LEARN = 0.5  # of a new share, against what was known
LEAST = 0.03  # of its seconds, that a hidden thing costs: or plans would waste what costs nothing
CLOSE = 5e-3  # relative: nearer to the bound nothing is looked for
WORTH = 1e-3  # relative: what a plan must win to be taken instead of the one with the least sum; sketches are about as exact
PRICE = 0.2  # seconds of a step per bytes of its limit: what memory costs at first where a plan has too much,
DEARER = 3.0  # and by how much more when it has too much again
FULL = 0.98  # of the limit: where memory is worth something
MOST_CELLS = 200_000  # pairs of states that rounds after the first look at


@dataclass(frozen=True)
class Beside:
    """A choice and its sketch. bound_s: seconds per micro-batch that no timeline is shorter than."""

    choice: Choice
    sketch: Sketch
    bound_s: float = 0.0


def least_beside_s(problem: Problem, allowed: Kept | None = None) -> float:
    """Seconds per micro-batch that no step takes less than: those of every op under its cheapest strategy, for they share a stream.

    problem: without anything that runs twice.
    """
    kept = allowed or [range(len(node.labels)) for node in problem.nodes]
    return sum(min((float(node.seconds[k]) for k in ks), default=0.0) for node, ks in zip(problem.nodes, kept, strict=True))


def choose(
    built: Built,
    first: Choice,
    conversions: Conversions,
    limit: int,
    *,
    allowed: Kept | None = None,
    offload: Sequence[str] = (),
    byte_s: float = 0.0,
    bound_s: float = 0.0,
    deadline: float = math.inf,
) -> Beside:
    """The choice with the shortest timeline that was found within `limit` bytes; `first` unless another one wins.

    byte_s: what a byte of memory is worth at first. bound_s: from `least_beside_s`. deadline: of the monotonic clock.
    """
    search = _Search(Sketcher(built, conversions, offload), limit, first, allowed, byte_s)
    start = search.best[0]
    if all(search.kept) and any(len(ks) > 1 for ks in search.kept):
        for optimism in OPTIMISM:
            if search.best[0] <= built.problem.turns * bound_s * (1 + CLOSE) or time.monotonic() > deadline:
                break
            search.run(optimism, ROUNDS)
    taken = search.best[2] if search.best[0] < start * (1 - WORTH) else first
    sketch = search.sketches[taken]
    assert sketch is not None
    return Beside(taken, sketch, bound_s)


class _Search:
    """Plans seen so far. best: its timeline, its sum, its choice."""

    def __init__(self, sketcher: Sketcher, limit: int, first: Choice, allowed: Kept | None, byte_s: float) -> None:
        self.sketcher, self.limit, self.problem = sketcher, limit, merged(replace(sketcher.problem, limit_bytes=None))
        self.kept = reduce(self.problem, allowed)
        self.moments = Moments(self.problem)
        self.sketches: dict[Choice, Sketch | None] = {}
        self.prices: dict[int, float] = {}
        self.best = (math.inf, math.inf, first)
        self.offer(first)
        self.soft = hideable(sketcher.built)
        if byte_s:
            most = crowded(self.memory(first), int(FULL * limit), set())
            self.prices = {m: byte_s / len(most) for m in most}

    def offer(self, choice: Choice) -> Sketch | None:
        """The sketch of a choice that fits, None of one that does not."""
        if choice not in self.sketches:
            total, peak, _ = evaluate(self.problem, choice)
            fits = math.isfinite(total) and (peak <= self.limit or not self.sketches)
            found = self.sketches[choice] = self.sketcher.sketch(choice) if fits else None
            if found is not None:
                self.best = min(self.best, (found.step_s, total, choice))
            elif math.isfinite(total):
                self._dearer(choice)
        return self.sketches[choice]

    def _dearer(self, choice: Choice) -> None:
        """Memory costs more at the moments at which this choice has too much."""
        unit = PRICE * self.best[1] / max(self.limit, 1)
        for m in crowded(self.memory(choice), self.limit, set()):
            self.prices[m] = DEARER * self.prices[m] if m in self.prices else unit

    def memory(self, choice: Choice) -> np.ndarray:
        return profile(self.problem, choice)

    def _narrow(self, excess: Sequence[np.ndarray]) -> None:
        """Later rounds look at the strategies that cost the least more, as many as they have time for."""
        if cells(self.problem, self.kept) <= MOST_CELLS:
            return
        low, high = 0.0, max(float(e.max()) for e in excess)
        for _ in range(12):
            middle = (low + high) / 2
            kept = self._below(excess, middle)
            low, high = (middle, high) if cells(self.problem, kept) <= MOST_CELLS else (low, middle)
        self.kept = self._below(excess, low)

    def _below(self, excess: Sequence[np.ndarray], most: float) -> Kept:
        seen = [choice for choice, sketch in self.sketches.items() if sketch is not None]
        own = [{choice[i] for choice in seen} for i in range(len(self.kept))]
        pairs = zip(self.kept, excess, own, strict=True)
        return tuple(tuple(k for k, e in zip(ks, over, strict=True) if e <= most or k in mine) for ks, over, mine in pairs)

    def run(self, optimism: float, rounds: int) -> None:
        """Some rounds of repricing, from the best plan so far."""
        hidden = max((a.hideable for a in self.sketcher.conversions.mesh.axes), default=1.0)
        weights = _Weights(self.problem, self.soft, 1 - hidden * (1 - optimism))
        now = self.best[2]
        for _ in range(rounds):
            sketch = self.sketches[now]
            assert sketch is not None
            weights.learn(now, sketch)
            priced = weights.priced()
            relaxed = Relaxed(priced, self.kept, self.moments)
            relaxed.reprice(self.prices, self.limit)
            for _ in range(SWEEPS):
                relaxed.rebalance()
                decoded, excess = relaxed.sweep()
            local = Local(priced, self.kept, self.prices, self.moments)
            tried = [c for c in (local.descend(decoded), local.descend(self.best[2])) if self.offer(c) is not None and c != now]
            self._narrow(excess)
            if not tried:
                continue
            now = min(tried, key=lambda c: (self.sketches[c].step_s, sum_of(self.problem, c), c))  # type: ignore[union-attr]


class _Weights:
    """The present price of everything, as a share of its seconds: per value and pair of states, and per node."""

    def __init__(self, problem: Problem, soft: np.ndarray, optimism: float) -> None:
        self.problem = problem
        self.pairs = [np.full(v.seconds.shape, optimism if s else 1.0) for v, s in zip(problem.values, soft, strict=True)]
        self.seen = [np.zeros(v.seconds.shape, bool) for v in problem.values]
        self.nodes = np.ones(len(problem.nodes))

    def learn(self, choice: Choice, sketch: Sketch) -> None:
        """What the sketch says about the conversions and ops of a choice."""
        for v, value in enumerate(self.problem.values):
            share = float(sketch.value_critical[v])
            if math.isnan(share):
                continue
            p, targets = wanted(value, choice)
            for q, _ in targets:
                if not value.same[p, q]:
                    keep = 1 - LEARN if self.seen[v][p, q] else 0.0
                    self.pairs[v][p, q] = keep * self.pairs[v][p, q] + (1 - keep) * share
                    self.seen[v][p, q] = True
        known = np.isfinite(sketch.node_critical)
        self.nodes = np.where(known, (1 - LEARN) * self.nodes + LEARN * sketch.node_critical, self.nodes)

    def priced(self) -> Problem:
        """The problem at these prices."""
        nodes = tuple(
            replace(node, seconds=node.seconds * max(float(w), LEAST)) for node, w in zip(self.problem.nodes, self.nodes, strict=True)
        )
        values = tuple(
            replace(value, seconds=value.seconds * np.maximum(w, LEAST)) for value, w in zip(self.problem.values, self.pairs, strict=True)
        )
        return replace(self.problem, nodes=nodes, values=values)


def hideable(built: Built) -> np.ndarray:
    """Per value whether nothing but the step's beginning or end asks for it: a parameter, a view of one, a gradient."""
    problem = built.problem
    taken: dict[int, int] = {}  # what a view is a view of
    for v, value in enumerate(problem.values):
        for consumer in value.consumers:
            if problem.nodes[consumer.node].view:
                taken.setdefault(consumer.node, v)

    def given(v: int) -> bool:
        n = problem.values[v].node
        if built.kinds[n].role in ("param", "buffer", "constant"):
            return True
        return problem.nodes[n].view and n in taken and taken[n] != v and given(taken[n])

    return np.array([value.kind == "gradient" or given(v) for v, value in enumerate(problem.values)], bool)
