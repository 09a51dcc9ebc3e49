"""Small changes to a way of saving memory that fits: keep one more thing, or exchange one for another, while that is faster and fits.

A unit is one instance of a node that may run again or one value that may be converted again. Units are tried in the order of the
seconds that they are about; every trial is a run of the tape, and `tries` limits them, so that it costs the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

from .tape import NONE, Run, Saved, Tape

Unit = tuple[str, int | str, int]  # "recompute" and a node, or "regather" and a value's name; the position of the instance


def polish(tape: Tape, saved: Saved, run: Run, limit: int, tries: int) -> tuple[Saved, Run]:
    """The better way, and its run; the given ones when there is none."""
    left = [tries]
    improved = True
    while improved and left[0] > 0:
        improved = False
        for change in _changes(tape, saved):
            if left[0] <= 0:
                break
            left[0] -= 1
            other = toggled(saved, change)
            found = tape.run(other)
            if found.peak <= limit and found.seconds < run.seconds * (1 - 1e-9):
                saved, run, improved = other, found, True
                break
    return saved, run


def _changes(tape: Tape, saved: Saved) -> Iterator[tuple[Unit, ...]]:
    """First to give one up, then to exchange one for another, then two for one."""
    every = units(tape)
    on = [unit for unit in every if is_on(saved, unit)]
    off = [unit for unit in reversed(every) if not is_on(saved, unit)]
    yield from ((unit,) for unit in on)
    yield from ((a, b) for a in on for b in off)
    yield from ((a, b, c) for a in on for i, b in enumerate(off) for c in off[i + 1 :])


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
