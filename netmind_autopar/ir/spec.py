"""How a tensor lies on a mesh.

A `Spec` is a global shape, a dtype and one placement per mesh axis, with the meaning of `torch.distributed.tensor`. One
thing is finer than there: a tensor dim may be seen as a product of *parts*, major first. A flattened (batch, sequence)
dim is `(8 16)`, and `S(0.1)` splits its sequence part: each device then holds a strided block of the flattened dim. It
is what lets a split survive `view`.

Several axes may split the same part; the split nests in axis order, the first axis outermost. Each split follows
`torch.chunk`: pieces of ceil(size / n), the last ones shorter.

    f32[8,(12 64)] S(1.0) R     12 heads split over the first axis, replicated over the second
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Replicate:
    """Every device along the axis holds the whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Shard:
    """Devices along the axis hold consecutive pieces of part `part` of tensor dim `dim`."""

    dim: int
    part: int = 0

    def __str__(self) -> str:
        return f"S({self.dim}.{self.part})"


@dataclass(frozen=True)
class Partial:
    """Every device along the axis holds a term; the tensor is their `op` ("sum", "max" or "min")."""

    op: str = "sum"

    def __str__(self) -> str:
        return f"P({self.op})"


Placement = Replicate | Shard | Partial

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b8": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """`dims[d]` lists the sizes of the parts of tensor dim d, major first; `placements` has one entry per mesh axis."""

    dims: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...]

    def __hash__(self) -> int:  # specs are the keys of every table of the planner: hashed once
        found = self.__dict__.get("_hash")
        if found is None:
            found = hash((self.dims, self.dtype, self.placements))
            object.__setattr__(self, "_hash", found)
        return found

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(parts) for parts in self.dims)

    @functools.cached_property
    def parts(self) -> tuple[int, ...]:
        """All part sizes in order: the shape of the tensor when every dim is opened up."""
        return tuple(itertools.chain.from_iterable(self.dims))

    def index(self, placement: Shard) -> int:
        """Position of the split part in `parts`."""
        return sum(len(parts) for parts in self.dims[: placement.dim]) + placement.part

    def with_placements(self, placements: Iterable[Placement]) -> Spec:
        return replace(self, placements=tuple(placements))

    @property
    def replicated(self) -> Spec:
        return self.with_placements(Replicate() for _ in self.placements)

    @property
    def is_plain(self) -> bool:
        """True when every dim is one part, as torch's own DTensor has it."""
        return all(len(parts) == 1 for parts in self.dims)

    @property
    def has_partial(self) -> bool:
        return any(isinstance(p, Partial) for p in self.placements)

    def __str__(self) -> str:
        sizes = ",".join(str(p[0]) if len(p) == 1 else "(" + " ".join(map(str, p)) + ")" for p in self.dims)
        shown = [f"S({p.dim})" if isinstance(p, Shard) and len(self.dims[p.dim]) == 1 else str(p) for p in self.placements]
        return " ".join([f"{DTYPE_NAMES[self.dtype]}[{sizes}]", *shown])


def plain(shape: Sequence[int], dtype: torch.dtype, placements: Iterable[Placement]) -> Spec:
    """A Spec whose dims are one part each."""
    return Spec(tuple((int(n),) for n in shape), dtype, tuple(placements))


@functools.lru_cache(maxsize=65536)
def parse_spec(text: str) -> Spec:
    """The inverse of `str(spec)`. Raises ValueError on other text."""
    found = re.fullmatch(r"(\w+)\[([^\]]*)\]((?: \S+)*)", text)
    if not found or found[1] not in DTYPES:
        raise ValueError(f"not a spec: {text!r}")
    dims = tuple(tuple(int(n) for n in d.strip("()").split()) for d in found[2].split(",")) if found[2] else ()
    return Spec(dims, DTYPES[found[1]], tuple(parse_placement(p) for p in found[3].split()))


def parse_placement(text: str) -> Placement:
    """`R`, `S(1)`, `S(1.0)`, `P(sum)` → placement. Raises ValueError on other text."""
    if text == "R":
        return Replicate()
    if found := re.fullmatch(r"S\((\d+)(?:\.(\d+))?\)", text):
        return Shard(int(found[1]), int(found[2] or 0))
    if found := re.fullmatch(r"P\((sum|max|min)\)", text):
        return Partial(found[1])
    raise ValueError(f"not a placement: {text!r}")


def chunk(size: int, n: int, i: int) -> tuple[int, int]:
    """(start, length) of piece i when `size` is cut as `torch.chunk(n)` cuts it."""
    step = -(-size // n)
    start = min(i * step, size)
    return start, min(step, size - start)


def splits(size: int, n: int) -> bool:
    """True when cutting `size` n ways leaves no piece empty."""
    return n <= size and (n - 1) * -(-size // n) < size


@functools.lru_cache(maxsize=65536)
def cuts(size: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """What each subset of a mesh's axes makes of a part, one split after the other (bit a of the position: axis a splits it): the
    first device's length, and whether no piece is empty."""
    lengths, pieces = [size], [frozenset({size})]
    for subset in range(1, 1 << len(sizes)):
        axis = subset.bit_length() - 1
        before, n = pieces[subset ^ 1 << axis], sizes[axis]
        lengths.append(chunk(lengths[subset ^ 1 << axis], n, 0)[1])
        whole = bool(before) and all(splits(piece, n) for piece in before)
        pieces.append(frozenset(chunk(piece, n, j)[1] for piece in before for j in (0, n - 1)) if whole else frozenset())
    return tuple(lengths), tuple(bool(p) for p in pieces)


def local_parts(spec: Spec, sizes: tuple[int, ...], coord: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Part sizes held by the device at `coord`, or by the first device (the largest) when coord is None."""
    out = list(spec.parts)
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard):
            i = spec.index(placement)
            out[i] = chunk(out[i], sizes[axis], coord[axis] if coord else 0)[1]
    return tuple(out)


def local_shape(spec: Spec, sizes: tuple[int, ...], coord: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Shape held by the device at `coord`, or by the first device (the largest) when coord is None."""
    parts = iter(local_parts(spec, sizes, coord))
    return tuple(math.prod(itertools.islice(parts, len(d))) for d in spec.dims)


def local_bytes(spec: Spec, sizes: tuple[int, ...]) -> int:
    """Bytes that the fullest device holds."""
    return math.prod(local_parts(spec, sizes)) * spec.dtype.itemsize


def part_start(spec: Spec, sizes: tuple[int, ...], coord: tuple[int, ...], part: int) -> int:
    """Where the piece at `coord` begins in the part with this position in `spec.parts`."""
    start, length = 0, spec.parts[part]
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard) and spec.index(placement) == part:
            offset, length = chunk(length, sizes[axis], coord[axis])
            start += offset
    return start


def is_even(spec: Spec, sizes: tuple[int, ...]) -> bool:
    """True when all devices hold the same shape."""
    left = list(spec.parts)
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard):
            i = spec.index(placement)
            if left[i] % sizes[axis]:
                return False
            left[i] //= sizes[axis]
    return True


def is_valid(spec: Spec, sizes: tuple[int, ...]) -> bool:
    """True when no device is left without elements."""
    left: dict[int, set[int]] = {}
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard):
            i = spec.index(placement)
            pieces = left.get(i, {spec.parts[i]})
            if not all(splits(n, sizes[axis]) for n in pieces):
                return False
            left[i] = {chunk(n, sizes[axis], j)[1] for n in pieces for j in (0, sizes[axis] - 1)}
    return True


Layout = tuple[tuple[str, int, int, int] | str, ...]


@functools.lru_cache(maxsize=262144)
def layout(spec: Spec, sizes: tuple[int, ...]) -> Layout:
    """What each device holds, whatever the dims are called: equal layouts of one tensor mean equal local data.

    A split is (dim, blocks, chunk, length): the dim is `blocks` runs of `length` elements, each cut into pieces of `chunk`.
    """
    out: list[tuple[str, int, int, int] | str] = []
    left = list(spec.parts)
    for axis, placement in enumerate(spec.placements):
        if not isinstance(placement, Shard) or sizes[axis] == 1:
            out.append("R" if not isinstance(placement, Partial) or sizes[axis] == 1 else str(placement))
            continue
        i, parts = spec.index(placement), spec.dims[placement.dim]
        blocks, inner = math.prod(parts[: placement.part]), math.prod(parts[placement.part + 1 :])
        piece = -(-left[i] // sizes[axis])
        out.append((str(placement.dim), blocks, piece * inner, left[i] * inner))
        left[i] = piece
    return tuple(out)


def same_layout(a: Spec, b: Spec, sizes: tuple[int, ...]) -> bool:
    """True when tensors with these specs hold the same numbers on every device."""
    if a.placements == b.placements and a.dims == b.dims:
        return True
    return a.shape == b.shape and layout(a, sizes) == layout(b, sizes)


def shard(tensor: torch.Tensor, spec: Spec, sizes: tuple[int, ...], coord: tuple[int, ...]) -> torch.Tensor:
    """The local tensor of the device at `coord`. A Partial sum gives all to coordinate 0 and zeros to the others."""
    out = tensor.reshape(spec.parts)
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard):
            i = spec.index(placement)
            out = out.narrow(i, *chunk(out.shape[i], sizes[axis], coord[axis]))
        elif placement == Partial("sum") and coord[axis]:
            out = torch.zeros_like(out)
    return out.reshape(local_shape(spec, sizes, coord))


def unshard(locals_: Sequence[torch.Tensor], spec: Spec, sizes: tuple[int, ...]) -> torch.Tensor:
    """The global tensor from the local tensors of all ranks, in rank order."""
    tensors = list(locals_)
    coords = list(itertools.product(*(range(n) for n in sizes)))
    tensors = [t.reshape(local_parts(spec, sizes, c)) for t, c in zip(tensors, coords, strict=True)]
    for axis in reversed(range(len(sizes))):
        n, placement = sizes[axis], spec.placements[axis]
        groups = [tensors[i : i + n] for i in range(0, len(tensors), n)]
        tensors = [_join(group, placement, spec) for group in groups]
    return tensors[0].reshape(spec.shape)


def _join(group: list[torch.Tensor], placement: Placement, spec: Spec) -> torch.Tensor:
    if isinstance(placement, Replicate):
        return group[0]
    if isinstance(placement, Shard):
        return torch.cat(group, dim=spec.index(placement))
    reduce = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[placement.op]
    return functools.reduce(reduce, group)
