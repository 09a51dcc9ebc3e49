"""From shares to layers: the first k layers do what a dearer price of memory asks for, the others what a cheaper one does.

The linear program of cut.py says what memory is worth. At prices a little below and a little above that, its solutions are whole:
two ways to treat a layer, one that fits if all layers took it and one that does not. The first layers take the first: what they
keep would wait the longest. How many must is found by running the tape, so whatever the program does not see (what an op that runs
again needs meanwhile) is counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..problem import stowed_bytes
from .cut import Answer, Cut, Way
from .place import host_bytes, on_disk, places, room_left, stowable, stowed_places
from .tape import Run, Saved, Tape

ROWS = 8  # rounds of adding crowded moments
HALVES, CLOSE = 7, 5e-3  # steps, and relative distance, at which the search for the least peak ends
TRIES = 6  # rounds of asking for less because a run needed more than the program saw
EDGE = 1e-3  # the cheaper way's price is lower by this share,
MORE = (1.0, 1.3, 2.0, 0.0)  # times as many parameters elsewhere as the linear program says, until it fits; 0: all
DEARER = (1 + EDGE, 1.1, 1.5, 3.0, 10.0)  # the dearer way's price is this times the right one


@dataclass(frozen=True)
class Fit:
    """What to do so that a choice fits, what that costs, and what memory is worth: seconds per byte at crowded moments.

    tape: that the run is of, with what it says about where things wait."""

    saved: Saved
    run: Run
    prices: Mapping[int, float]
    answer: Answer | None
    tape: Tape


def promised(cut: Cut, limit: int) -> Answer | None:
    """The cheapest shares of layers by all that is possible here. Of many layers about what a way to stay within `limit` bytes takes."""
    host = cut.problem.host_bytes_s > 0
    return crowd(cut, limit, host=host, park=host)


def fit(tape: Tape, cut: Cut, limit: int, answer: Answer | None = None) -> Fit | None:
    """The cheapest found way to stay within `limit` bytes; None when there is none. answer: what `promised` gives, where it is known."""
    host = tape.problem.host_bytes_s > 0
    answer = answer or promised(cut, limit)
    ways = [_fit(tape, cut, limit, None if host else answer)]
    if host:
        ways = [_parked(way, tape.within(limit)) for way in ways if way is not None]
        ways.append(_elsewhere(cut, answer, limit) if answer else None)
        if answer and answer.parked:  # none made again that could be parked for
            ways.append(_elsewhere(cut, replace(answer, parked=math.inf), limit))
        if answer and answer.offload and answer.parked and (other := crowd(cut, limit, park=True)):
            ways.append(_elsewhere(cut, other, limit))
        if any(way is not None and way.tape.disk for way in ways):
            other = crowd(cut, limit, host=True, park=True, room=cut.problem.host_limit_bytes)
            ways.append(_elsewhere(cut, other, limit) if other else None)
        ways.append(_stowing(cut, limit))
    return min((way for way in ways if way is not None), key=lambda way: way.run.seconds, default=None)


def _elsewhere(cut: Cut, answer: Answer, limit: int) -> Fit | None:
    """The way in which as much waits elsewhere as the linear program says; None when that does not fit."""
    tape, names = cut.tape, _sent(cut, answer)
    state = places(tape.problem, tape.choice, answer.parked)
    disk, room = on_disk(tape, names, host_bytes(tape.problem, tape.choice, state))
    there = cut.placed(state, disk)
    found = _fit(there.tape, Cut(there.tape, names) if names else there, limit)
    return _parked(replace(found, prices=answer.prices, answer=answer), tape.within(limit, disk, room)) if found else None


def _stowing(cut: Cut, limit: int) -> Fit | None:
    """The way in which parameters wait elsewhere too, as many as the linear program says or, where that does not fit, more; None when none
    need to, or nothing fits."""
    may = stowable(cut.problem, cut.tape.choice)
    if not may:
        return None
    answer = crowd(cut, limit, host=True, park=True, stow=True, room=cut.problem.host_limit_bytes)
    if answer is not None and not answer.stowed:
        return None
    for more in MORE if answer is not None else MORE[-1:]:
        shares = {n: min(share * more, 1.0) for n, share in answer.stowed.items()} if answer and more else dict.fromkeys(may, 1.0)
        tape = cut.tape.stow(stowed_places(cut.problem, cut.tape.choice, shares))
        names, parked = (_sent(cut, answer), answer.parked) if answer else ({}, math.inf)
        room = room_left(tape.problem, tape.choice)
        state = places(tape.problem, tape.choice, parked, room)
        taken = host_bytes(tape.problem, tape.choice, state) + stowed_bytes(tape.problem, tape.choice)[0]
        disk, left = on_disk(tape, names, taken)
        left = None if left is None else max(left - stowed_bytes(tape.problem, tape.choice)[0], 0)
        there = Cut(tape.placed(state, disk), names)
        found = _fit(there.tape, there, limit)
        if found is not None:
            found = replace(found, prices=answer.prices, answer=answer) if answer else found
            return _parked(found, tape.within(limit, disk, left))
    return None


def _parked(found: Fit, tape: Tape) -> Fit:
    """With no more optimizer state elsewhere than memory asks for."""
    return replace(found, run=tape.run(found.saved), tape=tape)


def _sent(cut: Cut, answer: Answer) -> dict[str, frozenset[int]]:
    """The tensors that wait elsewhere: of every thing its share, the first layers first, which wait the longest."""
    out: dict[str, set[int]] = {}
    for i, share in answer.offload.items():
        thing = cut.things[i]
        first = sorted(cut.tape.rank[t] for t in thing.items)[: int(share * len(thing.items) + 1e-6)]
        out.setdefault(cut.problem.values[thing.value].name, set()).update(first)
    return {name: frozenset(ranks) for name, ranks in sorted(out.items()) if ranks}


def _fit(tape: Tape, cut: Cut, limit: int, answer: Answer | None = None) -> Fit | None:
    found, first = _approach(tape, cut, limit, answer)
    return Fit(*found, first.prices, first, tape) if found is not None and first is not None else None


def _approach(tape: Tape, cut: Cut, limit: int, answer: Answer | None = None) -> tuple[tuple[Saved, Run] | None, Answer | None]:
    """Ask for less and less until a run of the tape fits. Also the first answer of the linear program, which may be given."""
    asked = limit
    first: Answer | None = None
    for _ in range(TRIES):
        answer = answer or crowd(cut, asked)
        if answer is None:
            break
        first = first or answer
        found, over = _between(tape, cut, answer, limit)
        if found is not None:
            return found, first
        asked, answer = asked - max(int(1.1 * over), limit // 500), None
    return None, first


def least(tape: Tape, cut: Cut) -> tuple[Saved, Run]:
    """The way with the least peak that was found, whatever it costs. It does not depend on any limit."""
    if cut.least is None:
        top = tape.run()
        price = 1e3 * (top.seconds + 1e-12) / max(top.peak, 1)
        crowded = {int(cut.base.argmax()), min(max(cut.end + 1, 0), cut.problem.moments - 1), top.peak_moment}
        answer = cut.solve(prices=dict.fromkeys(crowded, price))
        assert answer is not None
        saved = blend(cut, cut.way(answer), cut.way(answer), 0)
        ways = saved, Saved(offload=cut.offload)
        best = min(((way, tape.run(way)) for way in ways), key=lambda pair: pair[1].peak)
        low, high = int(cut.base.max()), best[1].peak
        for _ in range(HALVES):
            if high - low <= CLOSE * high:
                break
            middle = (low + high) // 2
            found, _ = _approach(tape, cut, middle)
            if found is None:
                low = middle
            else:
                best, high = found, found[1].peak
        cut.least = best
    return cut.least


def _between(tape: Tape, cut: Cut, answer: Answer, limit: int) -> tuple[tuple[Saved, Run] | None, int]:
    """Mix the two ways around the right prices; the one that saves more is sought among ever dearer prices."""
    less = _way(cut, answer, 1 - EDGE)
    over, seen = 0, None
    for side in DEARER:
        more = _way(cut, answer, side)
        if more in (seen, less):
            continue
        seen = more
        found, over = _layers(tape, cut, less, more, limit)
        if found is not None:
            return found, 0
        less = more
    if seen is None:
        found, over = _layers(tape, cut, less, less, limit)
    return (found if seen is None else None), over


def crowd(cut: Cut, limit: int, *, host: bool = False, park: bool = False, room: int | None = None, stow: bool = False) -> Answer | None:
    """The linear program with the rows of all moments that matter."""
    sizes = np.array([thing.bytes for thing in cut.things], np.int64)
    rows = [int(cut.base.argmax())]
    start = cut.base + sizes @ (cut.gap * np.array([thing.needed for thing in cut.things])[:, None]) if len(sizes) else cut.base
    rows += [m for m in (int(start.argmax()),) if m not in rows]
    answer: Answer | None = None
    for _ in range(ROWS):
        answer = cut.solve(limit=limit, rows=rows, host=host, park=park, room=room, stow=stow)
        if answer is None:
            return None
        profile = cut.base + (sizes * answer.kept) @ cut.gap if len(sizes) else cut.base
        profile = profile - answer.parked - sum(share * cut.freed()[n] for n, share in answer.stowed.items())
        profile[-1] += min(answer.parked, cut.problem.bucket_bytes)
        worst = int(profile.argmax())
        if profile[worst] <= limit * (1 + 1e-6) or worst in rows:
            break
        rows.append(worst)
    return answer


def _way(cut: Cut, answer: Answer, side: float) -> Way:
    """What is best at `side` times the prices."""
    found = cut.solve(prices={m: price * side for m, price in answer.prices.items()})
    assert found is not None, "without rows there is always a solution"
    return cut.way(found)


def _layers(tape: Tape, cut: Cut, less: Way, more: Way, limit: int) -> tuple[tuple[Saved, Run] | None, int]:
    """The fewest layers that must save more. Otherwise None and by how many bytes the best misses."""
    low, high = 0, cut.layers + 1
    runs: dict[int, tuple[Saved, Run]] = {}

    def at(k: int) -> Run:
        if k not in runs:
            saved = blend(cut, less, more, k)
            runs[k] = saved, tape.run(saved)
        return runs[k][1]

    if at(high).peak > limit:
        return None, min(run.peak for _, run in runs.values()) - limit
    while low < high:  # the peak falls about evenly with k: look where the line between what is known meets the limit
        middle = (low + high) // 2
        if low - 1 in runs and len(runs) % 3:
            above, below = at(low - 1).peak, at(high).peak
            middle = low - 1 + math.ceil((high - low + 1) * (above - limit) / max(above - below, 1))
            middle = min(max(middle, low), high - 1)
        if at(middle).peak <= limit:
            high = middle
        else:
            low = middle + 1
    at(high)
    return runs[high], 0


def blend(cut: Cut, less: Way, more: Way, k: int) -> Saved:
    """The first k layers save more; at k = layers + 1 what is outside of all layers does too."""

    def chosen(layer: int) -> bool:
        return 0 <= layer < k or k > cut.layers

    recompute: dict[int, set[int]] = {}
    for j in sorted(less.parts | more.parts):
        part = cut.parts[j]
        ranks = {op.rank for op in part.ops if j in less.parts or chosen(cut.layer(op))}
        recompute.setdefault(part.node, set()).update(ranks)
    regather: dict[str, set[int]] = {}
    for i in sorted(less.copies | more.copies):
        thing = cut.things[i]
        items = {cut.tape.rank[t] for t in thing.items if i in less.copies or chosen(cut.layer_of(thing, t))}
        regather.setdefault(cut.problem.values[thing.value].name, set()).update(items)
    return Saved(
        {n: frozenset(c) for n, c in recompute.items() if c}, {n: frozenset(c) for n, c in sorted(regather.items()) if c}, cut.offload
    )
