"""Large problems by columns: messages say which strategies matter, and a linear program over those prices memory exactly.

Every strategy's excess is what the bound rises by if it is taken, at least (its reduced cost). The strategies of least excess, with
those that the last linear program used, are the next linear program's; the duals of its rows of memory are the next prices, under
which sweeps find the next excesses, until the linear program gains nothing (Desrosiers and Lübbecke, "A primer in column generation",
2005). Whole choices come from integer programs over the few strategies that the linear programs mix.

At the end plans are drawn that would be good if every node's memory were priced a little differently; together they offer strategies
of other usage, with the neighbours' strategies that go with them, of which an integer program picks those that fill the memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from .. import milp
from .exact import UNITS, Keep, Program, Relaxed, pairs, settle
from .field import Field
from .messages import Messages
from .trees import improve

WIDE = 40_000  # pairs that one linear program takes
NARROW = 4_000  # pairs that an integer program takes between two linear programs
BROAD = 30_000  # pairs that one takes at the end
SETTLED = 40_000  # pairs that one takes to its proven end
NODES = 10  # how often an integer program may branch that is not to prove anything
ROUNDS, SWEEPS = 60, 60  # rounds at most, sweeps in each
STALLED, FAILED = 2, 4  # linear programs, integer programs that gain nothing one after the other, which end the search
DRAWN = 10  # plans drawn for one integer program
GAIN = 1e-5  # relative: what is less is no gain
CLOSE = 1e-4  # relative gap: plans this close to the bound are not worth drawing more
ROUNDING = 1e-10  # relative, of sums of many numbers


class Search:
    """best, cost: the best choice that fits so far; bound: no choice that fits costs less."""

    def __init__(self, field: Field, deadline: float, gap: float, seed: int) -> None:
        self.field, self.deadline, self.gap = field, deadline, gap
        self.random = np.random.default_rng(seed)
        self.messages = Messages(field)
        self.size = np.diff(field.offset)
        self.node_of = np.repeat(np.arange(field.n), self.size)
        self.best: list[int] | None = None
        self.cost, self.bound, self.status = math.inf, -math.inf, milp.UNKNOWN
        self.excess = np.zeros(field.size)
        self.possible = np.ones(field.size, bool)  # False: in no choice better than the best one
        self.used = np.zeros(field.size, bool)  # by the last linear program
        self.prices: dict[int, float] = {}
        self.moments: set[int] = set()
        self.seeds: list[list[int]] = []
        self.settled, self.lowest = SETTLED, math.inf
        tables = (t[np.isfinite(t)].max(initial=0.0) for t in field.problem.tables)
        self.worst = 2.0 * (abs(field.fixed) + float(np.abs(field.costs).sum()) + float(sum(map(abs, tables))))  # no choice costs more

    def go(self) -> None:
        self.begin()
        still, failed, pool = 0, 0, np.zeros(self.field.size, bool)
        for step in range(ROUNDS):
            if still < STALLED or step % 4 == 0:
                before, relaxed = self.lowest, self.relax()
                still = 0 if relaxed and before - relaxed.cost > GAIN * abs(relaxed.cost) else still + 1
                pool |= self.used
            self.sweeps(SWEEPS)
            if self.done() or self.close():
                return
            if still and self.within_gap(CLOSE):
                break
            if still:
                failed = 0 if self.polish(pool, wide=failed > 0) else failed + 1
                if failed >= FAILED and still >= STALLED:
                    break
        self.prove()

    def prove(self) -> None:
        """Sweeps alone while they raise the bound; a half of the time that is left at most."""
        half, before = 0.5 * (time.monotonic() + self.deadline), -math.inf
        while self.bound - before > GAIN * abs(self.bound) and time.monotonic() < half:
            before = self.bound
            self.sweeps(SWEEPS)
            if self.done() or self.close():
                return

    def done(self) -> bool:
        if self.best is None and self.bound > self.worst:
            self.status = milp.INFEASIBLE
            return True
        return self.within_gap(self.gap) or time.monotonic() > self.deadline

    def within_gap(self, gap: float) -> bool:
        return self.best is not None and self.cost - self.bound <= gap * abs(self.cost)

    def begin(self) -> None:
        """Two ends to start from: what is cheapest, and what needs little memory where much is used."""
        self.sweeps(40)
        field, decoded = self.field, self.messages.decode()
        cheap = self.descend(decoded, field.costs, 6)
        self.seeds = [cheap]
        self.penalty = 10.0 * max(abs(field.cost(cheap) if math.isfinite(field.cost(cheap)) else self.bound), 1.0)
        if float(field.profile(field.chosen(cheap)).max(initial=0.0)) <= field.limit:
            return
        weight, lean = np.where(field.base >= 0.5 * float(field.base.max()), 1.0, 0.0), cheap
        for _ in range(4):
            prices = weight * (10.0 * self.penalty / max(field.limit, 1.0) / float(weight.sum()))
            lean = self.descend(lean, field.costs + field.memory_costs(dict(enumerate(prices))), 3)
            profile = field.profile(field.chosen(lean))
            self.seeds.append(lean)
            self.moments |= set(field.peaks(profile, most=4))
            if float(profile.max()) <= field.limit:
                break
            weight = weight * np.exp(4.0 * np.clip(profile / max(field.limit, 1.0) - 1.0, -0.5, 0.5))

    def sweeps(self, n: int) -> None:
        """Messages n times there and back: a better bound, every strategy's excess, and what is possible by them."""
        for _ in range(n):
            before, now = self.messages.bound, self.messages.sweep()
            self.bound = max(self.bound, now - ROUNDING * abs(now))
            self.possible &= before - ROUNDING * abs(before) + self.messages.excess < self.cost
            if time.monotonic() > self.deadline:
                break
        self.excess = self.messages.excess.copy()

    def descend(self, choice: Sequence[int], costs: np.ndarray, moves: int) -> list[int]:
        """Forest moves under `costs`, one per strategy, flat; every plan on the way is offered."""
        own, now = self.field.split(costs), list(choice)
        for _ in range(moves):
            now = improve(self.field, now, own, self.random.permutation(self.field.n).tolist())
            self.offer(now)
            if time.monotonic() > self.deadline:
                break
        return now

    def offer(self, choice: Sequence[int]) -> None:
        cost = self.field.cost(choice)
        if cost < self.cost and float(self.field.profile(self.field.chosen(choice)).max(initial=0.0)) <= self.field.limit:
            self.cost, self.best = cost, list(choice)

    def of(self, plans: Sequence[Sequence[int]]) -> np.ndarray:
        """Which strategies the plans take, and the best one, flat."""
        out = np.zeros(self.field.size, bool)
        for plan in (*plans, *([self.best] if self.best else [])):
            out[self.field.offset[:-1] + np.asarray(plan)] = True
        return out

    def within(self, must: np.ndarray, order: np.ndarray, most: int) -> Keep:
        """The strategies `must`, and those that come first in `order`, as many as make at most `most` pairs together with them."""
        values = np.unique(order[np.isfinite(order)])
        low, high = -1, len(values) - 1
        while low < high:
            middle = (low + high + 1) // 2
            sizes = np.bincount(self.node_of, must | (order <= values[middle]), self.field.n).astype(np.int64)
            low, high = (middle, high) if pairs(self.field, sizes) <= most else (low, middle - 1)
        mask = must | (order <= values[low]) if low >= 0 else must
        return [np.flatnonzero(mask[a:b]) for a, b in zip(self.field.offset, self.field.offset[1:], strict=False)]

    def program(self, keep: Keep) -> Program:
        program = Program(self.messages, keep, self.penalty)
        for m in sorted(self.moments):
            program.row(m)
        return program

    def relax(self) -> Relaxed | None:
        """One linear program: new prices; then an integer program over what it uses. None: there was no time for it."""
        decoded = self.descend(self.messages.decode(), self.field.costs + self.messages.memory, 3)
        excess = np.where(self.possible, self.excess, math.inf)
        program = self.program(self.within(self.used | self.of([*self.seeds, decoded]), excess, WIDE))
        relaxed = program.relax(self.deadline)
        while relaxed and relaxed.over > 1e-6 and self.penalty < 1e6 * max(abs(relaxed.cost), 1.0):
            self.penalty *= 10.0
            program.live.price(program.slack, self.penalty / UNITS / program.scale)
            relaxed = program.relax(self.deadline) or relaxed
        if relaxed is None:
            return None
        self.moments, self.prices = set(relaxed.prices), relaxed.prices
        self.used = relaxed.flat > 1e-7
        if relaxed.over <= 1e-6 and self.lowest - relaxed.cost < 0.01 * abs(relaxed.cost):
            self.seeds = []  # from here on the last linear program's own strategies are enough
        self.lowest = min(self.lowest, relaxed.cost)
        base = np.zeros(self.field.size, bool)
        base[self.field.offset[:-1] + [int(part.argmax()) for part in self.field.split(relaxed.flat)]] = True
        self.whole(self.within(base, np.where(self.used, 1.0 - relaxed.flat, math.inf), NARROW))
        self.messages.reprice(self.prices)
        return relaxed

    def whole(self, keep: Keep) -> None:
        """An integer program over `keep`, not to its end."""
        left = (self.cost - self.bound) / abs(self.cost) if math.isfinite(self.cost) and self.cost else 1.0
        start = self.best if self.best and all(k in some for k, some in zip(self.best, keep, strict=True)) else None
        found = self.program(keep).whole(self.deadline, gap=max(self.gap, 0.02 * left), nodes=NODES, start=start)
        if found.choice is not None:
            self.offer(found.choice)

    def close(self) -> bool:
        """When little is left that could be better than the best choice: settle it. True: there is no more to be done."""
        sizes = np.bincount(self.node_of, self.possible, self.field.n).astype(np.int64)
        if sizes.all():
            left = pairs(self.field, sizes)
            if left > self.settled:
                return False
            keep = [np.flatnonzero(self.possible[a:b]) for a, b in zip(self.field.offset, self.field.offset[1:], strict=False)]
            until = time.monotonic() + 0.6 * (self.deadline - time.monotonic())
            found = settle(self.messages, keep, self.moments, until, gap=self.gap, cost=self.cost)
            if found.choice is not None:
                self.offer(found.choice)
            self.bound = max(self.bound, min(found.bound, self.cost))
            self.settled = left // 2
            if found.status not in (milp.OPTIMAL, milp.INFEASIBLE):
                return self.done()
        else:  # every choice that is left costs at least as much
            self.bound = self.cost
        if self.best is None:
            self.status = milp.INFEASIBLE
        return True

    def polish(self, pool: np.ndarray, wide: bool) -> bool:
        """Plans for memory that is priced otherwise at every node, and an integer program over what all of them take: better now?

        pool: what they take, flat, which this adds to. wide: where there is room, other strategies of little excess too.
        """
        field, before = self.field, self.cost
        start = self.best if self.best else self.messages.decode()
        for _ in range(DRAWN):
            spread = 10.0 ** self.random.uniform(-1.5, 0.6)
            factor = (1.0 + spread * self.random.standard_normal(field.n)) * math.exp(self.random.normal(0.0, 0.1))
            drawn = self.descend(start, field.costs + self.messages.memory * np.repeat(factor, self.size), 3)
            pool |= self.of([drawn])
        excess, must = np.where(self.possible, self.excess, math.inf), self.used | self.of([])
        keep = self.within(must, np.where(pool, excess, math.inf), BROAD)
        if wide:
            must[np.concatenate([field.offset[i] + some for i, some in enumerate(keep)])] = True
            keep = self.within(must, excess, BROAD)
        self.whole(keep)
        return self.cost < before - GAIN * abs(before)
