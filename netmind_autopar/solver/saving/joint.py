"""Sharding and what is kept for backward, decided together under one limit.

1. fit         at the cheapest sharding: what to make again so that it fits, and what memory is then worth      mix.fit
2. price       at such prices, whatever waits for backward may be made again: the cheapest sharding now          price.priced
3. repeat      with that sharding, at several shares of the price; keep the cheapest plan and the best bound
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..presolve import Kept, reduce
from ..problem import Choice, Problem, seconds
from ..search import quick
from .cut import Cut
from .mix import Fit, fit, least
from .place import Places, parkable_bytes, places, stowable, stowed_places
from .polish import polish, squeezed
from .price import priced, shares
from .tape import Names, Run, Saved, Tape

SHARES = (0.6, 0.3, 0.8)  # of the price of memory under the best plan so far, at which shardings are tried one after the other
FEW = 128  # shardings that are all looked at
SQUEEZE = 1_500  # ops of tapes that are run for a sharding under which nothing fits
BEST, POLISH = 16, 300_000  # plans that are polished, and ops of tapes that are run for it
FIRST = (0.02, 0.3, 3.0, 30.0)  # first prices when nothing is known: the step's seconds per peak, times this
DEAR = 0.1  # above the bound: a plan that only waits for what lies elsewhere, for longer than this, counts as none that fits
HALVES, LEAST = 2, 1e-3  # steps that look for a lower price that will do; shares of a price that are not worth looking at


@dataclass(frozen=True)
class Joint:
    """A sharding and what is saved under it. seconds and peak as the tape counts them; no plan within the limit takes less than `bound`.
    places: optimizer state that waits elsewhere. disk: of the values that wait for backward elsewhere, those on disk. stowed: parameters
    that wait elsewhere themselves.

    When nothing fits, `fits` is False and the plan is the one with the least peak that was found."""

    choice: Choice
    saved: Saved
    seconds: float
    peak: int
    bound: float
    fits: bool
    prices: Mapping[int, float]
    waits_s: float = 0.0
    places: Places = field(default_factory=dict)
    disk: Names = field(default_factory=dict)
    stowed: Places = field(default_factory=dict)


class _Search:
    def __init__(self, problem: Problem, allowed: Kept | None, limit: int, bound: float, gap: float, deadline: float) -> None:
        self.problem, self.allowed, self.limit = problem, allowed, limit
        self.bound, self.gap, self.deadline = bound, gap, deadline
        self.tried: dict[Choice, tuple[Cut, Fit | None]] = {}
        self.best: tuple[float, Choice, Fit] | None = None

    def offer(self, choice: Choice) -> tuple[Cut, Fit | None]:
        """How this sharding fits, if it does."""
        if choice not in self.tried:
            cut = Cut(Tape(self.problem, choice))
            found = fit(cut.tape, cut, self.limit)
            self.tried[choice] = cut, found
            if found is not None and (self.best is None or found.run.seconds < self.best[0]):
                self.best = found.run.seconds, choice, found
        return self.tried[choice]

    def squeeze(self, choice: Choice) -> None:
        """A way found by small changes alone, where one fits."""
        cut, _ = self.tried[choice]
        tries = max(SQUEEZE // max(len(cut.tape.ops), 1), 4)
        tape = cut.tape.within(self.limit) if self.problem.host_bytes_s > 0 else cut.tape
        saved, run = squeezed(tape, self.limit, tries)
        if run.peak <= self.limit:
            found = Fit(saved, run, {}, None, tape)
            self.tried[choice] = cut, found
            if self.best is None or run.seconds < self.best[0]:
                self.best = run.seconds, choice, found

    def step(self, cut: Cut, prices: Mapping[int, float], found: Fit | None) -> Choice | None:
        """The sharding that is cheapest at these prices."""
        host = found.answer.host if found and found.answer else (0.0, 0.0)
        most = self.best[0] if self.best else 0.0
        relaxed, constant = priced(cut, prices, shares(cut, found.answer if found else None), self.limit, host, most)
        near = self.best[1] if self.best and found else None
        answer = quick(relaxed, self.allowed, self.deadline, shift=constant, near=near)
        if self.best is not None or not any(host):  # else nothing is known about how much transfers hide
            self.bound = max(self.bound, answer.bound + constant)
        return answer.choice

    def closed(self) -> bool:
        done = self.best is not None and self.best[0] - self.bound <= self.gap * self.best[0]
        return done or time.monotonic() > self.deadline


def solve_joint(problem: Problem, first: Choice, limit: int, *, allowed: Kept | None, bound: float, gap: float, time_limit: float) -> Joint:
    """The cheapest plan found within `limit` bytes, started from the sharding `first`, the cheapest without a limit.

    bound: seconds that no plan beats, proven without the limit. time_limit: wall-clock seconds.
    """
    search = _Search(problem, allowed, limit, bound, gap, time.monotonic() + time_limit)
    if not _holds(search, first):
        _fall(search, search.offer(first)[0])
    _try_all(search)
    for share in SHARES:
        if search.best is None or search.closed():
            break
        best_s, choice, found = search.best
        cut = search.offer(choice)[0]
        if sum(found.prices.values()) * limit < gap * best_s:  # memory is worth nothing under this sharding
            break
        other = search.step(cut, {m: price * share for m, price in found.prices.items()}, found)
        if other is not None:
            search.offer(other)
    return _result(search)


def _try_all(search: _Search) -> None:
    """So few shardings that each is looked at."""
    kept = reduce(search.problem, search.allowed)
    if math.prod(map(len, kept)) <= FEW:
        for choice in itertools.product(*kept):
            if math.isfinite(seconds(search.problem, choice)) and search.offer(choice)[1] is None:
                search.squeeze(choice)


def _polish(search: _Search) -> None:
    """Small changes to the best plans, as many as are worth their time."""
    fits = [(found.run.seconds, choice, cut, found) for choice, (cut, found) in search.tried.items() if found is not None]
    for _, choice, cut, found in sorted(fits, key=lambda way: way[:2])[:BEST]:
        tries = max(POLISH // (len(fits[:BEST]) * max(len(cut.tape.ops), 1)), 4)
        saved, run = polish(found.tape, found.saved, found.run, search.limit, tries)
        if search.best is None or run.seconds < search.best[0]:
            search.best = run.seconds, choice, replace(found, saved=saved, run=run)


def _fall(search: _Search, cut: Cut) -> None:
    """Nothing fits at the cheapest sharding: make memory dearer until a sharding is found under which something does, then less dear."""
    bare = _emptied(cut)[0]
    run = bare.tape.run()  # no number here depends on the limit: what a refusal says is needed is then found
    moment, unit = int(bare.base.argmax()), run.seconds / max(run.peak, 1)
    low = high = 0.0
    for factor in FIRST:
        choice = search.step(cut, {moment: unit * factor}, None)
        if choice is None:
            return
        if _holds(search, choice):
            high = factor
            break
        low = factor
        if time.monotonic() > search.deadline:
            return
    for _ in range(HALVES if high else 0):
        middle = math.sqrt(max(low, high * LEAST) * high)
        choice = search.step(cut, {moment: unit * middle}, None)
        if choice is not None and _holds(search, choice):
            high = middle
        else:
            low = middle


def _holds(search: _Search, choice: Choice) -> bool:
    """Something fits under this sharding, and not only because nearly everything waits elsewhere."""
    found = search.offer(choice)[1]
    return found is not None and (search.problem.host_bytes_s <= 0 or found.run.seconds <= search.bound * (1 + DEAR))


def _result(search: _Search) -> Joint:
    if search.best is not None:
        _polish(search)
        best_s, choice, found = search.best
        bound = min(search.bound, best_s)
        run = found.run
        where = run.places, found.tape.disk, found.tape.stowed
        return Joint(choice, found.saved, best_s, run.peak, bound, True, found.prices, run.waits_s, *where)
    ways: list[tuple[Saved, Run, Choice, Places, Places]] = []
    for choice, (cut, _) in search.tried.items():
        bare, state = _emptied(cut)
        ways += [(*least(cut.tape, cut), choice, {}, {}), *([(*least(bare.tape, bare), choice, state, {})] if state else [])]
        if all_ := stowed_places(cut.problem, choice, dict.fromkeys(stowable(cut.problem, choice), 1.0)):
            there = Cut(cut.tape.stow(all_))
            ways.append((*least(there.tape, there), choice, {}, all_))
    saved, run, choice, state, stowed = min(ways, key=lambda way: way[1].peak)
    if run.peak <= search.limit:
        return Joint(choice, saved, run.seconds, run.peak, min(search.bound, run.seconds), True, {}, run.waits_s, state, {}, stowed)
    return Joint(choice, saved, math.inf, run.peak, search.bound, False, {}, 0.0, state, {}, stowed)


def _emptied(cut: Cut) -> tuple[Cut, Places]:
    """With all optimizer state elsewhere that may be; and that."""
    problem, choice = cut.problem, cut.tape.choice
    state = places(problem, choice, parkable_bytes(problem, choice))
    return (cut.placed(state), state) if state else (cut, state)
