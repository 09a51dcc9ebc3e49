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
from .cut import Answer, Cut
from .mix import Fit, fit, least, promised
from .place import Places, parkable_bytes, places, stowable, stowed_places
from .polish import polish, squeezed
from .price import priced
from .shares import shares
from .tape import Names, Run, Saved, Tape

SHARES = (0.6, 0.3, 1.0)  # of the price of memory under the best plan so far, at which shardings are tried one after the other
FEW = 128  # shardings that are all looked at
SQUEEZE = 1_500  # ops of tapes that are run for a sharding under which nothing fits
BEST, POLISH = 16, 400_000  # plans that are polished, and ops of tapes that are run for it
FIRST = (0.02, 0.3, 3.0, 30.0)  # first prices when nothing is known: the step's seconds per peak, times this
DEAR = 0.1  # above the bound: a plan that only waits for what lies elsewhere, for longer than this, counts as none that fits
ALIKE = 0.03  # relative: prices nearer to each other say the same
MANY = 2_000  # ops of a tape from which on the linear program's shares of layers are close to what whole layers take
HALVES, LEAST = 3, 1e-3  # steps that look for a lower price that will do; shares of a price that are not worth looking at


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


class Search:
    """The shardings seen so far, each with what is saved under it.

    bound: seconds that no plan beats, proven without the limit. time_limit: wall-clock seconds, of all calls together."""

    def __init__(self, problem: Problem, limit: int, *, allowed: Kept | None, bound: float, gap: float, time_limit: float) -> None:
        deadline = time.monotonic() + time_limit
        self.problem, self.allowed, self.limit = problem, allowed, limit
        self.short: dict[Choice, int] = {}
        self.bound, self.gap, self.deadline = bound, gap, deadline
        self.tried: dict[Choice, tuple[Cut, Fit | None]] = {}
        self.answers: dict[Choice, Answer | None] = {}
        self.stepped: list[Mapping[int, float]] = []
        self.best: tuple[float, Choice, Fit] | None = None

    def room(self, choice: Choice) -> int:
        """The bytes that the tape may count under this sharding."""
        return self.limit - self.short.get(choice, 0)

    def offer(self, choice: Choice) -> tuple[Cut, Fit | None]:
        """How this sharding fits, if it does and may become the best."""
        if choice not in self.tried:
            cut = Cut(Tape(self.problem, choice))
            answer = self.answers[choice] = promised(cut, self.room(choice))
            hopeless = len(cut.tape.ops) >= MANY and answer is not None and cut.seconds + answer.seconds > self.most_s
            found = None if hopeless else fit(cut.tape, cut, self.room(choice), answer)
            self.tried[choice] = cut, found
            if found is not None and (self.best is None or found.run.seconds < self.best[0]):
                self.best = found.run.seconds, choice, found
        return self.tried[choice]

    @property
    def most_s(self) -> float:
        """Seconds beyond which a plan is of no use while another is in hand, or may be found."""
        if self.best is not None:
            return self.best[0]
        return self.bound * (1 + DEAR) if self.problem.host_bytes_s > 0 else math.inf

    def squeeze(self, choice: Choice) -> None:
        """A way found by small changes alone, where one fits."""
        cut, _ = self.tried[choice]
        tries = max(SQUEEZE // max(len(cut.tape.ops), 1), 4)
        tape = cut.tape.within(self.room(choice)) if self.problem.host_bytes_s > 0 else cut.tape
        saved, run = squeezed(tape, self.room(choice), tries)
        if run.peak <= self.room(choice):
            found = Fit(saved, run, {}, None, tape)
            self.tried[choice] = cut, found
            if self.best is None or run.seconds < self.best[0]:
                self.best = run.seconds, choice, found

    def step(self, cut: Cut, prices: Mapping[int, float], answer: Answer | None) -> Choice | None:
        """The sharding that is cheapest at these prices."""
        host = answer.host if answer else (0.0, 0.0)
        relaxed, constant = priced(cut, prices, shares(cut, answer), self.limit, host)
        self.stepped.append(prices)
        near = self.best[1] if self.best and answer else None
        found = quick(relaxed, self.allowed, self.deadline, shift=constant, near=near)
        self.bound = max(self.bound, found.bound + constant)
        return found.choice

    def knows(self, prices: Mapping[int, float]) -> bool:
        """Whether about these prices were looked at."""
        return any(old.keys() == prices.keys() and all(abs(old[m] - prices[m]) <= ALIKE * prices[m] for m in old) for old in self.stepped)

    def closed(self) -> bool:
        done = self.best is not None and self.best[0] - self.bound <= self.gap * self.best[0]
        return done or time.monotonic() > self.deadline

    def solve(self, first: Choice) -> Joint:
        """The cheapest plan found, started from the sharding `first`, the cheapest without a limit."""
        if not _holds(self, first):
            _fall(self, self.offer(first)[0])
        _try_all(self)
        for share in SHARES:
            if self.best is None or self.closed():
                break
            best_s, choice, found = self.best
            cut = self.offer(choice)[0]
            if sum(found.prices.values()) * self.limit < self.gap * best_s:  # memory is worth nothing under this sharding
                break
            prices = {m: price * share for m, price in found.prices.items()}
            if self.knows(prices):
                continue
            answer = found.answer if self.problem.host_bytes_s > 0 else cut.solve(prices=prices)
            other = self.step(cut, prices, answer)
            if other is not None:
                self.offer(other)
        return _result(self)

    def less(self, choice: Choice, short: int) -> Joint:
        """The cheapest plan found when the tape counts so many bytes too little under this sharding. All else that is known stays."""
        self.short[choice] = short
        del self.tried[choice]
        fits = [(found.run.seconds, other, found) for other, (_, found) in self.tried.items() if found is not None]
        self.best = min(fits, key=lambda way: way[:2], default=None)
        cut, found = self.offer(choice)
        if found is None and len(cut.tape.ops) < MANY:
            self.squeeze(choice)
        if self.best is None:
            _fall(self, cut)
        return _result(self)


def solve_joint(problem: Problem, first: Choice, limit: int, *, allowed: Kept | None, bound: float, gap: float, time_limit: float) -> Joint:
    """The cheapest plan found within `limit` bytes, see `Search`."""
    return Search(problem, limit, allowed=allowed, bound=bound, gap=gap, time_limit=time_limit).solve(first)


def _try_all(search: Search) -> None:
    """So few shardings that each is looked at."""
    kept = reduce(search.problem, search.allowed)
    if math.prod(map(len, kept)) <= FEW:
        for choice in itertools.product(*kept):
            if math.isfinite(seconds(search.problem, choice)) and search.offer(choice)[1] is None:
                search.squeeze(choice)


def _polish(search: Search) -> None:
    """Small changes to the plans that may become the best, as many as are worth their time: more for those that promise more."""
    fits = [(_promised(cut, found), choice, cut, found) for choice, (cut, found) in search.tried.items() if found is not None]
    left = POLISH
    for k, (hoped, choice, cut, found) in enumerate(sorted(fits, key=lambda way: way[:2])[:BEST]):
        if search.best is not None and hoped >= search.best[0] and len(cut.tape.ops) >= MANY:
            break
        share = left if k == len(fits) - 1 else left // 2
        tries = max(share // max(len(cut.tape.ops), 1), 4)
        saved, run = polish(found.tape, found.saved, found.run, search.room(choice), tries)
        left = max(left - share, POLISH // BEST)
        if search.best is None or run.seconds < search.best[0]:
            search.best = run.seconds, choice, replace(found, saved=saved, run=run)


def _promised(cut: Cut, found: Fit) -> float:
    """Seconds of a plan under this sharding if layers could be mixed in any shares; of the plan that was found where that is unknown."""
    if found.answer is None:
        return found.run.seconds
    return min(cut.seconds + found.answer.seconds, found.run.seconds)


def _fall(search: Search, cut: Cut) -> None:
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


def _holds(search: Search, choice: Choice) -> bool:
    """Something fits under this sharding, and not only because nearly everything waits elsewhere."""
    found = search.offer(choice)[1]
    return found is not None and (search.problem.host_bytes_s <= 0 or found.run.seconds <= search.bound * (1 + DEAR))


def _result(search: Search) -> Joint:
    if search.best is None:
        _take_any(search)
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
    saved, run, choice, state, stowed = min(ways, key=lambda way: way[1].peak + search.short.get(way[2], 0))
    if run.peak <= search.room(choice):
        return Joint(choice, saved, run.seconds, run.peak, min(search.bound, run.seconds), True, {}, run.waits_s, state, {}, stowed)
    return Joint(choice, saved, math.inf, run.peak, search.bound, False, {}, 0.0, state, {}, stowed)


def _take_any(search: Search) -> None:
    """Ways that were too dear while there was hope for others."""
    for choice, (cut, _) in search.tried.items():
        answer = search.answers[choice]
        found = fit(cut.tape, cut, search.room(choice), answer) if search.problem.host_bytes_s > 0 else None
        if found is not None and (search.best is None or found.run.seconds < search.best[0]):
            search.best = found.run.seconds, choice, found


def _emptied(cut: Cut) -> tuple[Cut, Places]:
    """With all optimizer state elsewhere that may be; and that."""
    problem, choice = cut.problem, cut.tape.choice
    state = places(problem, choice, parkable_bytes(problem, choice))
    return (cut.placed(state), state) if state else (cut, state)
