"""A device mesh: named axes with their links, and the device that sits at every point."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import MeshError


@dataclass(frozen=True)
class Curve:
    """Measured seconds of one kind of work. `points`: (amount, seconds), both ascending; between them the scales are logarithmic."""

    kind: str
    dtype: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """One mesh axis. `bandwidth_bytes_s` is what one device can send along it; `latency_s` is paid per message.

    curves: where measured, seconds of whole collectives by the bytes that one device sends; they are used instead.
    hideable: the part of a collective beside which a device can compute; for the rest it is busy itself, as where the cores that compute
    also send.
    in_turn: not devices, but parts of the work that one device does one after the other: nothing can travel along such an axis.
    link: the physical link that carries it; what travels along axes of one link at the same time shares its bandwidth. "": its own.
    within: of an axis that leaves the node, how many devices of a group are on the same node, consecutive along the axis; 0 of one that
    does not; inner_bandwidth_bytes_s, inner_latency_s: of the link between those.
    """

    name: str
    size: int
    bandwidth_bytes_s: float = 1e11
    latency_s: float = 1e-5
    curves: tuple[Curve, ...] = ()
    hideable: float = 1.0
    in_turn: bool = False
    link: str = ""
    within: int = 0
    inner_bandwidth_bytes_s: float = 0.0
    inner_latency_s: float = 0.0

    def measured(self, kind: str) -> tuple[tuple[float, float], ...]:
        """The points of a collective's curve; empty when it was not measured."""
        return next((c.points for c in self.curves if c.kind == kind), ())


@dataclass(frozen=True)
class Device:
    """One device. `peak_flops` holds (dtype name, FLOP/s) pairs; unlisted dtypes run at the float32 rate.

    host_memory_bytes, disk_bandwidth_bytes_s: its share of its node's memory (None: no limit) and disks.
    curves: where measured, seconds of ops and classes of ops; they are used instead of rates and efficiencies.
    fragmentation: bytes that the allocator loses, as a part of those of the tensors alive at the peak.
    """

    name: str
    peak_flops: tuple[tuple[str, float], ...]
    memory_bytes: int
    memory_bandwidth_bytes_s: float
    host_bandwidth_bytes_s: float
    launch_s: float = 5e-6
    curves: tuple[Curve, ...] = ()
    host_memory_bytes: int | None = None
    disk_bandwidth_bytes_s: float = 1e9
    fragmentation: float = 0.0

    def flops(self, dtype: str) -> float:
        rates = dict(self.peak_flops)
        return rates.get(dtype, rates["float32"])


@dataclass(frozen=True)
class Mesh:
    """Axes outermost first, as `torch.distributed.DeviceMesh` lists them; ranks of the last axis are neighbours."""

    axes: tuple[Axis, ...]
    device: Device
    cluster: str = "custom"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return ",".join(f"{axis.name}={axis.size}" for axis in self.axes)


def check_rising(points: Sequence[Sequence[float]], *, falling: bool = False) -> None:
    """Raises ValueError unless amounts and seconds are positive, the amounts ascend and the seconds do not fall (they may if `falling`)."""
    if not all(x > 0 and s > 0 for x, s in points):
        raise ValueError("a point that is not positive")
    for (x, s), (y, t) in itertools.pairwise(points):
        if x >= y or (s > t and not falling):
            raise ValueError("amounts must ascend, and seconds must not fall")


def coordinates(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The coordinate of every rank, in rank order."""
    return itertools.product(*(range(n) for n in sizes))


def coordinate(rank: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The coordinate of one rank."""
    out: list[int] = []
    for n in reversed(sizes):
        rank, i = divmod(rank, n)
        out.append(i)
    return tuple(reversed(out))


def parse_axes(text: str) -> tuple[tuple[str, int], ...]:
    """`"dp=2,tp=4"` → `(("dp", 2), ("tp", 4))`. Raises MeshError on anything else."""
    axes: list[tuple[str, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(\d+)\s*", part)
        if not found or int(found[2]) < 1:
            raise MeshError(
                f"cannot read the mesh {text!r}",
                where=f"the part {part.strip()!r}",
                why="a mesh is a list of name=size, each size 1 or more",
                try_='"dp=2,tp=4"',
            )
        if found[1] in dict(axes):
            raise MeshError(f"mesh axis {found[1]!r} is named twice", where=repr(text), try_="give each axis a name of its own")
        axes.append((found[1], int(found[2])))
    return tuple(axes)
