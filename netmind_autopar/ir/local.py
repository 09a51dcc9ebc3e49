"""Arguments of a lowered graph that differ from rank to rank: held as a formula, bound when a device loads the graph.

Local("shape", "f32[7,16] S(0)")              the local shape: [4, 16] on one device, [3, 16] on the next
Local("start", "f32[(7 16)] S(0.0)", (0,))    where the local piece of part 0 begins
Local("turn")                                 which micro-batch it is: 0, 1, …

The first placement of a spec that has one more than the mesh has axes is that of the micro-batches, which are the outermost split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from .spec import Shard, is_even, local_parts, local_shape, parse_spec, part_start

ONE = (1, 0)  # (how many micro-batches, which): all is run at once


@dataclass(frozen=True)
class Local:
    """what: "shape" (over dims), "parts" (global sizes), "lengths", "starts" (over parts), "size" or "start" (of the product of `parts`).

    A size or start is multiplied by `times`, and repeated into a list of `repeat` elements when that is not 0.
    """

    what: str
    spec: str = ""
    parts: tuple[int, ...] = ()
    times: int = 1
    repeat: int = 0

    def at(self, sizes: tuple[int, ...], coord: tuple[int, ...], turn: tuple[int, int] = ONE) -> Any:
        """The value on the device at `coord` of a mesh with these axis sizes; turn: (number of micro-batches, this one)."""
        if self.what == "turn":
            return turn[1]
        spec = parse_spec(self.spec)
        if len(spec.placements) == len(sizes) + 1:
            sizes, coord = (turn[0], *sizes), (turn[1], *coord)
        if self.what == "parts":
            return list(spec.parts)
        if self.what == "shape":
            return list(local_shape(spec, sizes, coord))
        if self.what == "lengths":
            return list(local_parts(spec, sizes, coord))
        if self.what == "starts":
            return [part_start(spec, sizes, coord, i) for i in range(len(spec.parts))]
        if self.what == "size":
            lengths = local_parts(spec, sizes, coord)
            value = math.prod(lengths[i] for i in self.parts) * self.times
        else:
            value = math.prod(part_start(spec, sizes, coord, i) for i in self.parts) * self.times
        return [value] * self.repeat if self.repeat else value

    def folded(self, sizes: tuple[int, ...]) -> Any:
        """The value itself when all devices agree on it, else this formula."""
        spec = parse_spec(self.spec)
        split = any(isinstance(p, Shard) for p in spec.placements)
        varies = split if self.what.startswith("start") else self.what != "parts" and not is_even(spec, sizes)
        return self if varies else self.at(sizes, (0,) * len(sizes))


def resolve(args: Any, sizes: tuple[int, ...], coord: tuple[int, ...], turn: tuple[int, int] = ONE) -> Any:
    """Replace every `Local` in nested arguments by its value at `coord`."""
    return fx.node.map_aggregate(args, lambda a: a.at(sizes, coord, turn) if isinstance(a, Local) else a)
