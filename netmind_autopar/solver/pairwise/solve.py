"""The best choice that can be found in the time given, with a bound that is proven.

Contract; if what is left is small, one integer program settles it. Otherwise two things take turns: message passing under prices of
memory, which gives bounds and plans that forests then improve; and the integer program over the strategies that good plans use, whose
relaxation prices memory exactly and whose plan combines the best of all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import milp
from .contract import contract
from .exact import Keep, pairs, run
from .field import Field, Prices
from .instance import Instance, evaluate
from .messages import Messages
from .trees import improve

SMALL = 150_000  # pairs that one integer program takes at once
POOL = 24  # plans whose strategies the restricted program may use


@dataclass(frozen=True)
class Answer:
    """choice: None when none was found (`status` says whether there is none). bound: no choice that fits costs less."""

    choice: list[int] | None
    cost: float
    peak: float
    bound: float
    status: str  # "optimal", "feasible", "infeasible", "unknown"
    seconds: float

    @property
    def gap(self) -> float:
        return (self.cost - self.bound) / abs(self.cost) if self.cost and math.isfinite(self.cost) else 0.0


def solve(instance: Instance, *, time_limit: float = 60.0, gap: float = 1e-6, seed: int = 0) -> Answer:
    """time_limit: wall-clock seconds from this call on. gap: relative, at which the search stops. The seed decides all randomness."""
    start = time.monotonic()
    deadline = start + time_limit
    problem = contract(instance)
    if not problem.feasible:
        return Answer(None, math.inf, math.inf, math.inf, milp.INFEASIBLE, time.monotonic() - start)
    field = Field(problem)
    everything = [np.arange(len(c)) for c in problem.costs]
    choice: list[int] | None = None
    if pairs(field, everything) <= SMALL:
        found = run(field, everything, (), deadline, gap=gap)
        choice, bound, status = found.choice, found.bound, found.status
        if choice is None and status != milp.INFEASIBLE:
            search = _Search(field, deadline, gap, seed)
            search.go()
            choice, bound, status = search.best, max(bound, search.bound), milp.UNKNOWN
    else:
        search = _Search(field, deadline, gap, seed)
        search.go()
        choice, bound, status = search.best, search.bound, milp.UNKNOWN
    seconds = time.monotonic() - start
    if choice is None:
        return Answer(None, math.inf, math.inf, bound, status, seconds)
    whole = problem.expand(choice)
    cost, peak = evaluate(instance, whole)
    bound = min(bound, cost)
    closed = cost - bound <= gap * abs(cost) + 1e-9
    return Answer(whole, cost, peak, bound, milp.OPTIMAL if closed else milp.FEASIBLE, seconds)


class _Search:
    def __init__(self, field: Field, deadline: float, gap: float, seed: int) -> None:
        self.field, self.deadline, self.gap = field, deadline, gap
        self.random = np.random.default_rng(seed)
        self.messages = Messages(field)
        self.best: list[int] | None = None
        self.cost, self.bound = math.inf, -math.inf
        self.pool: list[tuple[float, list[int]]] = []
        self.moments: set[int] = set()

    def go(self) -> None:
        now = self.descend(self.sweeps(12), {})
        prices: dict[int, float] = {}
        for round_ in range(1000):
            now, prices = self.price(now, prices, steps=8 if round_ == 0 else 3)
            exact = self.combine()
            if exact:
                prices = exact
            if self.best is not None:
                now = self.descend(self.best, prices)
            if self.done():
                break

    def done(self) -> bool:
        closed = self.cost - self.bound <= self.gap * abs(self.cost)
        return closed or time.monotonic() > self.deadline

    def sweeps(self, n: int) -> list[int]:
        for _ in range(n):
            choice = self.messages.sweep()
            if time.monotonic() > self.deadline:
                break
        self.bound = max(self.bound, self.messages.bound())
        return choice

    def price(self, now: list[int], prices: Prices, steps: int) -> tuple[list[int], dict[int, float]]:
        """Move the prices of memory with what plans under them use, and improve the plan as they change."""
        prices = dict(prices)
        for step in range(steps):
            self.move(prices, self.field.profile(self.field.chosen(now)), 2.0 / (1.0 + 0.4 * step))
            self.messages.reprice(prices)
            decoded = self.sweeps(4)
            now = self.descend(min((now, decoded), key=lambda c: self.priced(c)), prices)
            if self.done():
                break
        return now, prices

    def priced(self, choice: Sequence[int]) -> float:
        """Cost with memory at the present prices."""
        return self.field.cost(choice) + float(self.messages.memory @ self.field.chosen(choice))

    def descend(self, choice: list[int], prices: Prices, moves: int = 4) -> list[int]:
        """Forest moves under `prices`; every plan on the way is offered."""
        own = self.field.split(self.field.costs + self.field.memory_costs(prices))
        n, now = self.field.n, choice
        for move in range(moves):
            keys = self.random.permutation(n) if move % 2 == 0 else np.arange(n) + self.random.normal(0.0, 50.0, n)
            now = improve(self.field, now, own, [int(i) for i in np.argsort(keys, kind="stable")])
            self.offer(now)
            if time.monotonic() > self.deadline:
                break
        return now

    def offer(self, choice: list[int]) -> None:
        cost = self.field.cost(choice)
        if not math.isfinite(cost):
            return
        peak = float(self.field.profile(self.field.chosen(choice)).max())
        self.pool.append((cost * max(1.0, peak / self.field.limit) ** 2, choice))
        self.pool = sorted(self.pool, key=lambda item: item[0])[:POOL]
        if peak <= self.field.limit and cost < self.cost:
            self.cost, self.best = cost, list(choice)

    def move(self, prices: dict[int, float], profile: np.ndarray, step: float) -> None:
        """Dearer where the plan has too much, cheaper where it has too little; new peaks get a price."""
        limit = self.field.limit
        unit = abs(self.pool[0][0]) / max(limit, 1.0) if self.pool else 1.0
        first = not prices
        for m in prices:
            prices[m] *= math.exp(step * float(np.clip(8.0 * (profile[m] - limit) / max(limit, 1.0), -1.0, 1.0)))
        for m in self.field.peaks(profile, set(prices), most=4):
            prices[m] = 0.2 * unit if first else max(0.02 * unit, float(np.median(list(prices.values()))))

    def combine(self) -> dict[int, float]:
        """The integer program over the strategies of the plans in the pool. Returns exact prices of memory among them."""
        keep = self.shared()
        left = self.deadline - time.monotonic()
        found = run(self.field, keep, self.moments, time.monotonic() + max(1.0, 0.4 * left), gap=max(self.gap, 1e-4))
        self.moments |= set(found.moments)
        if found.choice is not None:
            self.offer(found.choice)
        return found.prices

    def shared(self) -> Keep:
        """Per node the strategies that plans of the pool take, of as many plans as the integer program can bear."""
        plans = [choice for _, choice in self.pool] + ([self.best] if self.best else [])
        for most in range(len(plans), 0, -1):
            chosen = plans[:most] if self.best is None else [self.best, *plans[: most - 1]]
            keep = [np.unique([c[i] for c in chosen]) for i in range(self.field.n)]
            if pairs(self.field, keep) <= SMALL:
                return keep
        return keep
