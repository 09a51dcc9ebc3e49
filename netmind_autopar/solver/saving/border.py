"""The layer at the border: where the layers that save more end, a whole layer is one step too much, or one too few.

The linear program of cut.py once more, with the layers in groups that are decided apart: those before the border, the two at it, each by
itself, and those after it. Its variables are whole numbers now, so it has to fill what is left of the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .. import milp
from .cut import Cut, Part, Way
from .linear import Program
from .mix import blend, crowd
from .tape import Op, Run, Saved, Tape

TRIES = 4  # rounds of asking for less because a run needed more than the program saw
STEP = 2000  # at least this share of the limit less
NODES, GAP = 300, 1e-3  # branches, and relative gap, at which a program is given up


class Apart(Cut):
    """As `Cut`, with `labels[i]` the group of layer i: groups are decided apart."""

    def __init__(self, tape: Tape, labels: Sequence[int], given: Cut) -> None:
        self.labels = labels
        super().__init__(tape, given.offload)

    def _parts(self) -> None:
        super()._parts()
        groups: dict[tuple[int, int], list[Op]] = {}
        for op in self.forward:
            if op.moment in self.part:
                layer = self.layer(op)
                groups.setdefault((self.part[op.moment], self.labels[layer] if layer >= 0 else -1), []).append(op)
        self.parts = [Part(ops[0].node, ops) for ops in groups.values()]
        self.part = {op.moment: j for j, part in enumerate(self.parts) for op in part.ops}


def border(tape: Tape, saved: Saved, run: Run, limit: int) -> tuple[Saved, Run]:
    """A better way that differs at the border, and its run; the given ones when there is none."""
    cut = Cut(tape, saved.offload)
    if cut.layers < 2:
        return saved, run
    apart, rows, asked = Apart(tape, labels(cut, saved), cut), {run.peak_moment}, limit
    for _ in range(TRIES):
        way = whole(apart, asked, sorted(rows))
        if way is None:
            break
        other = blend(apart, way, way, 0)
        after = tape.run(other)
        if after.peak <= limit:
            return (other, after) if after.seconds < run.seconds else (saved, run)
        if after.peak_moment in rows:
            asked -= max(after.peak - limit, limit // STEP)
        rows.add(after.peak_moment)
    return saved, run


def labels(cut: Cut, saved: Saved) -> list[int]:
    """The group of every layer: 0 before the border, 1 and 2 at it, 3 after it."""
    ends = Counter(len(ranks) for ranks in saved.recompute.values() if 0 < len(ranks) < cut.layers)
    first = max(ends, key=lambda n: (ends[n], n), default=0) - 1  # the last layer that most of them run again in
    return [0 if i < first else min(i - first + 1, 3) for i in range(cut.layers)]


def whole(cut: Cut, limit: int, rows: Iterable[int]) -> Way | None:
    """The cheapest way whose tensors stay within `limit` bytes at these moments, as far as the program sees."""
    answer = crowd(cut, limit)
    if answer is None:
        return None
    work = Program(cut, {}, False)
    for moment in sorted({*rows, *answer.prices}):
        work.memory(moment, limit)
    found = milp.solve(work.model, time_limit=60.0, gap=GAP, nodes=NODES)
    if found.values is None:
        return None
    recompute = {j: 1.0 for j, v in work.r.items() if found.values[v] > 0.5}
    again = {i: 1.0 for i, v in work.c.items() if found.values[v] > 0.5}
    return cut.way(replace(answer, recompute=recompute, again=again))
