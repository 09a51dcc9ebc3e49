"""What repeats in a sequence of steps, forward and backward, as the number of blocks grows.

A step says what it does (`content`), on the results of which steps (`refs`), which blocks it names (`blocks`, numbers) and which
running numbers it uses (`counts`: the salts of dropout). With four blocks, cut where the forward of blocks 1, 2 and 3 begins and
where the backward of blocks 2, 1 and 0 begins, a sequence is

    head | forward 1 | forward 2 | middle | backward 2 | backward 1 | tail

(block 0 is in head and tail, block 3 in the middle). It has a period when the two forwards do the same relative to where they
stand, and the two backwards too; then `Pattern.expand` writes down the sequence of any number of blocks. A step of block k may
take what block k, k - 1 or k + 1 made and what is made once; anything else has no period here, and NoPeriod says so.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class NoPeriod(Exception):
    """The blocks are not repetitions of each other, or not in a way that is known here."""


class Step(NamedTuple):
    content: Hashable
    refs: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where something stands: in "head", "middle" or "tail" at `at`, or at `at` in "forward" or "backward" of a copy.

    `copy` counts from 1; from the end it is 0 (the last), and `init` is the place that takes over where there is no such copy.
    """

    part: str
    at: int
    copy: int = 0
    init: Place | None = None


class Pattern:
    """The period of the steps of four blocks. `cuts`: where head, forward 1, forward 2, middle, backward 2, backward 1 end."""

    def __init__(self, steps: Sequence[Step], cuts: tuple[int, int, int, int, int, int]) -> None:
        if not 0 <= cuts[0] < cuts[1] < cuts[2] <= cuts[3] < cuts[4] < cuts[5] <= len(steps):
            raise NoPeriod(f"the blocks do not follow each other: {cuts}")
        self.steps, self.cuts = steps, cuts
        self.forward, self.backward = cuts[1] - cuts[0], cuts[4] - cuts[3]
        if cuts[2] - cuts[1] != self.forward or cuts[5] - cuts[4] != self.backward:
            raise NoPeriod("blocks 1 and 2 take different numbers of steps")
        self.stride: int | None = None
        self.rules = {
            "forward": [self._pair(cuts[0] + i, cuts[1] + i) for i in range(self.forward)],
            "backward": [self._pair(cuts[4] + i, cuts[3] + i) for i in range(self.backward)],
        }

    def locate(self, index: int) -> Place:
        """The place of a step of the four blocks."""
        return self.located(index, 2)

    def located(self, index: int, copies: int) -> Place:
        """The place of a step where there are `copies` blocks between the first and the last."""
        head, middle = self.cuts[0], self.cuts[3] - self.cuts[2]
        if index < head:
            return Place("head", index)
        index -= head
        if index < copies * self.forward:
            return Place("forward", index % self.forward, 1 + index // self.forward)
        index -= copies * self.forward
        if index < middle:
            return Place("middle", index)
        index -= middle
        if index < copies * self.backward:
            return Place("backward", index % self.backward, copies - index // self.backward)
        return Place("tail", index - copies * self.backward)

    def index(self, place: Place, copies: int) -> int:
        """The inverse of `located`."""
        head, middle = self.cuts[0], self.cuts[3] - self.cuts[2]
        if place.part == "head":
            return place.at
        if place.part == "middle":
            return head + copies * self.forward + place.at
        after = head + copies * self.forward + middle
        if place.part == "tail":
            return after + copies * self.backward + place.at
        copy = place.copy or copies
        if place.part == "forward":
            return head + (copy - 1) * self.forward + place.at
        return after + (copies - copy) * self.backward + place.at

    def repeated(self, first: int, second: int) -> Place:
        """The place, relative to a copy, of what stands at `first` for copy 1 and at `second` for copy 2. `copy` is an offset."""
        a, b = self.locate(first), self.locate(second)
        if a == b and a.copy == 0:
            return a
        if a.copy == 1 and b.copy == 2 and (a.part, a.at) == (b.part, b.at):
            return Place(a.part, a.at, 0)
        if b.copy == 1 and a.part == {"forward": "head", "backward": "tail"}[b.part]:
            return Place(b.part, b.at, -1, a)
        if a.copy == 2 and b.part == "middle":
            return Place(a.part, a.at, 1, b)
        raise NoPeriod(f"blocks 1 and 2 take different things: {a}, {b}")

    def of_copy(self, place: Place, copy: int, copies: int) -> int:
        """The index of a `repeated` place for one copy."""
        if place.part not in ("forward", "backward"):
            return self.index(place, copies)
        if 1 <= copy + place.copy <= copies:
            return self.index(Place(place.part, place.at, copy + place.copy), copies)
        assert place.init is not None
        return self.index(place.init, copies)

    def end(self, index: int, part: str) -> Place:
        """The place of what something in head, middle or tail takes: made once, or by the copy beside it."""
        place = self.locate(index)
        if place.copy == 0:
            return place
        if part == "middle" and place.copy == 2:
            return Place(place.part, place.at, 0)
        if part == "tail" and place.copy == 1:
            return place
        raise NoPeriod(f"outside of the blocks, something depends on one of them: {place}")

    def _pair(self, first: int, second: int) -> tuple[Place, ...]:
        a, b = self.steps[first], self.steps[second]
        if a.content != b.content or len(a.refs) != len(b.refs) or len(a.counts) != len(b.counts):
            raise NoPeriod(f"blocks 1 and 2 do different things: {a.content} and {b.content}")
        if any(y - x != 1 for x, y in zip(a.blocks, b.blocks, strict=True)):
            raise NoPeriod(f"blocks 1 and 2 name blocks {a.blocks} and {b.blocks}")
        for x, y in zip(a.counts, b.counts, strict=True):
            if self.stride not in (None, y - x):
                raise NoPeriod("numbers do not count on alike")
            self.stride = y - x
        return tuple(self.repeated(x, y) for x, y in zip(a.refs, b.refs, strict=True))

    def expand(self, copies: int) -> list[tuple[Step, int]]:
        """The steps where there are `copies` blocks between the first and the last, each with its model among the four blocks' steps."""
        head, _, two, middle, second, tail = self.cuts
        more, stride = copies - 2, self.stride or 0
        out = [self._single(i, "head", 0, 0, copies) for i in range(head)]
        forward, backward = ([self._lines(rule, copies) for rule in self.rules[part]] for part in ("forward", "backward"))
        for copy in range(1, copies + 1):
            out += [self._copy(head + i, line, copy, stride, copies) for i, line in enumerate(forward)]
        out += [self._single(i, "middle", more, more * stride, copies) for i in range(two, middle)]
        for copy in range(copies, 0, -1):
            out += [self._copy(second + i, line, copy, stride, copies) for i, line in enumerate(backward)]
        return out + [self._single(i, "tail", 0, 0, copies) for i in range(tail, len(self.steps))]

    def _lines(self, rule: tuple[Place, ...], copies: int) -> tuple[tuple[Place, int, int], ...]:
        """Each place with a and b such that its index is a + b copy, for copies that have one on either side."""
        found = []
        for place in rule:
            slope = {"forward": self.forward, "backward": -self.backward}.get(place.part, 0)
            start = self.index(Place(place.part, place.at, 1), copies) if slope else self.index(place, copies)
            found.append((place, start + slope * (place.copy - 1), slope))
        return tuple(found)

    def _copy(self, index: int, lines: tuple[tuple[Place, int, int], ...], copy: int, stride: int, copies: int) -> tuple[Step, int]:
        content, _, blocks, counts = self.steps[index]
        if 1 < copy < copies:
            refs = tuple([a + b * copy for _, a, b in lines])
        else:
            refs = tuple([self.of_copy(place, copy, copies) for place, _, _ in lines])
        blocks = tuple([b + copy - 1 for b in blocks]) if blocks else ()
        counts = tuple([c + (copy - 1) * stride for c in counts]) if counts else ()
        return Step(content, refs, blocks, counts), index

    def _single(self, index: int, part: str, blocks: int, counts: int, copies: int) -> tuple[Step, int]:
        step = self.steps[index]
        refs = tuple(self.index(self.end(ref, part), copies) for ref in step.refs)
        return Step(step.content, refs, tuple(b + blocks for b in step.blocks), tuple(c + counts for c in step.counts)), index


def cut(steps: Sequence[Step], starts: Sequence[int], backward: int) -> tuple[int, int, int, int, int, int]:
    """`Pattern`'s cuts for four blocks, whose forwards begin at `starts`; the backward of everything begins at `backward`.

    The backward of a block begins with the first step that takes what its forward made, or that names the block.
    """
    if len(starts) != 4:
        raise NoPeriod(f"{len(starts)} of 4 blocks are called")
    if backward == len(steps):  # inference
        return starts[1], starts[2], starts[3], backward, backward, backward
    found: dict[int, int] = {}
    for i in range(backward, len(steps)):
        for block in (0, 1, 2):
            near = any(starts[block] <= ref < starts[block + 1] for ref in steps[i].refs)
            if block not in found and (near or block in steps[i].blocks):
                found[block] = i
    if len(found) < 3:
        raise NoPeriod("a block has no backward")
    return starts[1], starts[2], starts[3], found[2], found[1], found[0]
