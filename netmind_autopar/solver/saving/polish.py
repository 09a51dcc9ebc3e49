"""Small changes to a way of saving memory that fits: what is kept instead of run again, and the other way round, while that is faster.

A unit is one instance of a node that may run again or one value that may be converted again. Layers are alike, so of every node two
units are enough: the last layer that runs it again, which need not, and the first one that does not, which might. Each is switched by
itself, by a run of the tape; what that changes in seconds, and in bytes at every moment, says which two or three together may be faster
and fit. A run of the tape decides. Where there are few units, all changes are tried. `tries` limits the runs, so that it costs the same
on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .border import border
from .tape import NONE, Run, Saved, Tape

Unit = tuple[str, int | str, int]  # "recompute" and a node, or "regather" and a value's name; the position of the instance
CHECKED = 8  # changes per round that are run before a round is given up
FEW = 40  # units of which all changes are tried
ALL = 300  # and so many of them at most
BORDER, BOTH = 15, 400  # runs that must be left for the integer program of border.py, and for starting without it too
FASTER = 1e-9  # relative seconds that count


@dataclass(frozen=True)
class _Moves:
    """Units and what switching each does. bytes: [units, moments], of the moments at which three of them could exceed the limit."""

    units: list[Unit]
    seconds: np.ndarray
    bytes: np.ndarray
    slack: np.ndarray


def polish(tape: Tape, saved: Saved, run: Run, limit: int, tries: int) -> tuple[Saved, Run]:
    """The better way, and its run; the given ones when there is none."""
    starts = [(saved, run)]
    if tries >= BORDER and (found := border(tape, saved, run, limit))[1].seconds < run.seconds:
        starts = [found, *starts] if tries >= BOTH else [found]
    return min((_switched(tape, *start, limit, tries) for start in starts), key=lambda way: way[1].seconds)


def _switched(tape: Tape, saved: Saved, run: Run, limit: int, tries: int) -> tuple[Saved, Run]:
    every = units(tape)
    while tries > 0:
        found = moves(tape, saved, run, limit, candidates(every, saved)[: max(tries // 2, 1)])
        changes = [tuple(found.units[i] for i in change) for change in ranked(found)[:CHECKED]]
        if len(every) <= FEW:
            changes += itertools.islice(_changes(every, saved), ALL)
        tries -= len(found.units)
        better = None
        for change in changes[: max(tries, 0)]:
            tries -= 1
            other = toggled(saved, change)
            after = tape.run(other)
            if after.peak <= limit and after.seconds < run.seconds * (1 - FASTER):
                better = other, after
                break
        if better is None:
            break
        saved, run = better
    return saved, run


def _changes(every: list[Unit], saved: Saved) -> Iterator[tuple[Unit, ...]]:
    """First to give one up, then to exchange one for another, then two for one and one for two."""
    on = [unit for unit in every if is_on(saved, unit)]
    off = [unit for unit in reversed(every) if not is_on(saved, unit)]
    yield from ((unit,) for unit in on)
    yield from ((a, b) for a in on for b in off)
    yield from ((a, b, c) for a, b in itertools.combinations(on, 2) for c in off)
    yield from ((a, b, c) for a in on for b, c in itertools.combinations(off, 2))


def squeezed(tape: Tape, limit: int, tries: int) -> tuple[Saved, Run]:
    """From all that can be made again: changes of one unit or two that bring the peak down, until it is within the limit or none does."""
    every, improved = units(tape), True
    saved = toggled(Saved(), tuple(every))
    run = tape.run(saved)
    while improved and run.peak > limit:
        improved = False
        for change in itertools.chain(((unit,) for unit in every), itertools.combinations(every, 2)):
            tries -= 1
            if tries < 0:
                return saved, run
            other = toggled(saved, change)
            after = tape.run(other)
            if after.peak < run.peak:
                saved, run, improved = other, after, True
                break
    return saved, run


def candidates(every: list[Unit], saved: Saved) -> list[Unit]:
    """Of every node or value the last unit that is on and the first that is off, the dearest first."""
    on: dict[tuple[str, int | str], Unit] = {}
    off: dict[tuple[str, int | str], Unit] = {}
    for unit in every:
        key, side = unit[:2], on if is_on(saved, unit) else off
        if key not in side or (unit[2] > side[key][2]) == (side is on):
            side[key] = unit
    keys = dict.fromkeys(unit[:2] for unit in every)
    return [side[key] for key in keys for side in (on, off) if key in side]


def moves(tape: Tape, saved: Saved, run: Run, limit: int, among: list[Unit]) -> _Moves:
    """What switching each unit by itself does."""
    moments = tape.problem.moments
    before = run.profile(moments)
    runs = [tape.run(toggled(saved, (unit,))) for unit in among]
    changes = np.array([after.profile(moments) - before for after in runs], np.int64).reshape(len(among), moments)
    slack = limit - before
    tight = 3 * changes.max(axis=0, initial=0) > slack
    return _Moves(among, np.array([after.seconds - run.seconds for after in runs]), changes[:, tight], slack[tight])


def ranked(found: _Moves) -> list[tuple[int, ...]]:
    """Changes of one, two or three units of different nodes that should be faster and fit, the fastest first."""
    out = [(seconds, change) for change, seconds in _combined(found)]
    return [change for _, change in sorted(out)]


def _combined(found: _Moves) -> Iterator[tuple[tuple[int, ...], float]]:
    seconds, count = found.seconds, len(found.units)
    gains = [i for i in range(count) if seconds[i] < 0]
    keys = [unit[:2] for unit in found.units]
    for i in gains:
        left = found.slack - found.bytes[i]
        if (left >= 0).all():
            yield (i,), float(seconds[i])
        for j in range(count):
            if j == i or keys[j] == keys[i] or seconds[i] + seconds[j] >= 0 or (seconds[j] < 0 and j < i):
                continue
            rest = left - found.bytes[j]
            if (rest >= 0).all():
                yield (i, j), float(seconds[i] + seconds[j])
                continue
            third = np.flatnonzero((found.bytes <= rest).all(axis=1) & (seconds >= 0) & (seconds[i] + seconds[j] + seconds < 0))
            for k in third.tolist():
                if k > j and keys[k] not in (keys[i], keys[j]):
                    yield (i, j, k), float(seconds[i] + seconds[j] + seconds[k])


def units(tape: Tape) -> list[Unit]:
    """Everything that can be made again, the dearest first."""
    found: dict[Unit, float] = {}
    end = tape.problem.forward_end
    for op in tape.ops:
        if op.final < 0 and op.moment <= end and tape.problem.nodes[op.node].again and not op.view:
            found["recompute", op.node, op.rank] = op.seconds
    for t, source in enumerate(tape.source):
        if source >= 0 and tape.again[t]:
            unit: Unit = ("regather", tape.problem.values[tape.value[t]].name, tape.rank[t])
            found[unit] = max(found.get(unit, 0.0), tape.seconds[t])
    return sorted(found, key=lambda unit: (-found[unit], str(unit)))


def is_on(saved: Saved, unit: Unit) -> bool:
    kind, what, rank = unit
    return rank in (saved.recompute.get(what, NONE) if kind == "recompute" else saved.regather.get(what, NONE))  # type: ignore[arg-type]


def toggled(saved: Saved, change: tuple[Unit, ...]) -> Saved:
    """With each unit of the change switched."""
    recompute, regather = dict(saved.recompute), dict(saved.regather)
    for kind, what, rank in change:
        table = recompute if kind == "recompute" else regather
        table[what] = table.get(what, NONE) ^ {rank}  # type: ignore[index,arg-type]
    return Saved({n: r for n, r in recompute.items() if r}, {n: r for n, r in regather.items() if r}, saved.offload)
