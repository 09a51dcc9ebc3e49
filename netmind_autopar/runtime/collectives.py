"""Moves between placements: what each device packs, sends and unpacks.

A move changes the placement along one mesh axis. It has three steps: `pack` brings the local tensor into the shape that travels,
a *wire* carries it, `unpack` brings the result into the local tensor of the new spec. Pack and unpack are pure functions of
(specs, mesh, coordinate) and are shared by the real wire (`ProcessWire`, process groups) and the lockstep simulator, so
that what is verified in one process is what runs on many.

    all_gather      S → R      pieces of the split part travel to everyone along the axis
    reduce_scatter  P → S      every device keeps its piece of the reduced tensor
    all_reduce      P → R
    all_to_all      S → S'     another part is split instead
    slice           R → S      local
    mask            R → P      local: every coordinate but 0 holds zeros
    recast          local: same data, dims seen as other parts

Uneven pieces are padded to the largest for all-gather and reduce-scatter, and travel as they are in all-to-all.

A collective may be started in one place and waited for in another, so that it travels while other ops run: `start` packs and
sends, `wait` unpacks what arrived. In between stands a `Started`, which nothing but `wait` may take.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..health.progress import HERE, mark_of
from ..health.watch import explained
from ..ir.errors import GraphError
from ..ir.spec import Partial, Shard, Spec, chunk, local_parts, local_shape, parse_spec

LOCAL_KINDS = ("slice", "mask", "recast")
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", *LOCAL_KINDS)


def move(x: Tensor, kind: str, axis: int, before: str, after: str) -> Tensor:
    """Graph marker of one move: mesh axis by position, specs as text. Bound to a device by `stage`, never called as it is."""
    raise GraphError(f"the move {kind} over axis {axis} was not bound to a device", why=f"{before} → {after}")


def bucket(tensors: Sequence[Tensor], axis: int, op: str) -> tuple[Tensor, ...]:
    """Graph marker of one all-reduce for several tensors. Bound by `bucket_stage`, never called as it is."""
    raise GraphError(f"the bucket over axis {axis} was not bound to a device")


def start(x: Tensor, kind: str, axis: int, before: str, after: str) -> Started:
    """Graph marker: a move that is on its way from here on. Never called as it is."""
    raise GraphError(f"the move {kind} over axis {axis} was not bound to a device", why=f"{before} → {after}")


def start_bucket(tensors: Sequence[Tensor], axis: int, op: str) -> Started:
    """Graph marker: a bucket that is on its way from here on. Never called as it is."""
    raise GraphError(f"the bucket over axis {axis} was not bound to a device")


def wait(started: Started) -> Any:
    """Graph marker: what a started move or bucket gives, once it is there. Never called as it is."""
    raise GraphError("a wait was not bound to a device")


MOVES, BUCKETS, STARTS = (move, start), (bucket, start_bucket), (start, start_bucket)


def sender(node: Any) -> Any:
    """The node that started what a `wait` node waits for; any other node itself."""
    return node.args[0] if node.target is wait else node


class Started:
    """A collective on its way. `wait` gives what it makes, once."""

    def __init__(self, arrive: Callable[[], Any]) -> None:
        self._arrive: Callable[[], Any] | None = arrive

    def wait(self) -> Any:
        """Wait until it is there. Raises GraphError the second time."""
        if self._arrive is None:
            raise GraphError("a collective was waited for twice")
        arrive, self._arrive = self._arrive, None
        return arrive()


class Wire(Protocol):
    """Carries packed tensors: `send` starts, `arrive` waits for what `send` returned and gives what came."""

    def send(self, step: Stage, packed: Tensor) -> Any: ...

    def arrive(self, sent: Any) -> Tensor: ...


class Collective:
    """A move or bucket bound to one device: called, it runs at once; `start` lets other ops run meanwhile."""

    def __init__(self, wire: Wire, step: Stage, unpack: Callable[[Tensor], Any]) -> None:
        self.wire, self.step, self.unpack = wire, step, unpack

    def __call__(self, x: Any) -> Any:
        return self.unpack(self.wire.arrive(self.wire.send(self.step, self.step.pack(x))))

    def start(self, x: Any) -> Started:
        """Pack and send; whatever `x` was may be let go of."""
        sent = [self.wire.send(self.step, self.step.pack(x))]
        return Started(lambda: self.unpack(self.wire.arrive(sent.pop())))  # what was read is let go of before it is unpacked


@dataclass(frozen=True)
class Stage:
    """A move bound to one device. `wire` is None for a local move, else what carries the packed tensor along dim 0.

    fresh: what `pack` gives is a tensor of its own, which may be reduced in place. name: for errors, the same on every device."""

    pack: Callable[..., Tensor]
    unpack: Callable[[Tensor], Tensor]
    wire: str | None = None
    axis: int = -1
    op: str = "sum"
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()
    fresh: bool = False
    name: str = ""

    @functools.cached_property
    def mark(self) -> int:
        """The name as a number."""
        return mark_of(self.name or f"{self.wire} over axis {self.axis}")


@functools.lru_cache(maxsize=65536)
def stage(kind: str, axis: int, before: str, after: str, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    """Bind a move to the device at `coord`. Raises GraphError when the specs are not those of the move."""
    a, b = parse_spec(before), parse_spec(after)
    if kind not in KINDS or a.shape != b.shape:
        raise GraphError(f"not a move: {kind}", why=f"{before} → {after}")
    return _BUILDERS[kind](a, b, axis, sizes, coord)


def _gather(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    part, have, want = _split_part(a, axis), local_parts(a, sizes, coord), local_parts(b, sizes, coord)
    n, whole = sizes[axis], want[_split_part(a, axis)]
    piece, shape = -(-whole // n), local_shape(b, sizes, coord)
    padded = (*have[:part], piece, *have[part + 1 :])
    lead = math.prod(have[:part])

    def pack(x: Tensor) -> Tensor:
        x = x.reshape(have)
        return _pad(x, part, piece).contiguous().reshape(-1)

    def unpack(y: Tensor) -> Tensor:
        if lead == 1 and piece * n == whole:
            return y.reshape(shape)
        y = y.reshape(n, *padded).movedim(0, part).flatten(part, part + 1)
        return y.narrow(part, 0, whole).contiguous().reshape(shape)  # pieces of one element would leave a turned view

    return Stage(pack, unpack, "all_gather", axis)


def _reduce_scatter(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    part, have, want = _split_part(b, axis), local_parts(a, sizes, coord), local_parts(b, sizes, coord)
    n, whole = sizes[axis], have[_split_part(b, axis)]
    piece, shape = -(-whole // n), local_shape(b, sizes, coord)
    padded = (*have[:part], piece, *have[part + 1 :])

    def pack(x: Tensor) -> Tensor:
        x = _pad(x.reshape(have), part, piece * n)
        return x.unflatten(part, (n, piece)).movedim(part, 0).contiguous().reshape(-1)

    def unpack(y: Tensor) -> Tensor:
        return y.reshape(padded).narrow(part, 0, want[part]).contiguous().reshape(shape)

    return Stage(pack, unpack, "reduce_scatter", axis, _op(a, axis))


def _all_reduce(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    shape = local_shape(b, sizes, coord)
    return Stage(lambda x: x.contiguous(), lambda y: y.reshape(shape), "all_reduce", axis, _op(a, axis))


def _all_to_all(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    old, new, n = _split_part(a, axis), _split_part(b, axis), sizes[axis]
    have, want = local_parts(a, sizes, coord), local_parts(b, sizes, coord)
    shape = local_shape(b, sizes, coord)
    outgoing = [(*have[:new], chunk(have[new], n, i)[1], *have[new + 1 :]) for i in range(n)]
    incoming = [(*want[:old], chunk(want[old], n, i)[1], *want[old + 1 :]) for i in range(n)]
    send, receive = tuple(map(math.prod, outgoing)), tuple(map(math.prod, incoming))

    def pack(x: Tensor) -> Tensor:
        pieces = x.reshape(have).split([s[new] for s in outgoing], dim=new)
        return torch.cat([p.reshape(-1) for p in pieces])

    def unpack(y: Tensor) -> Tensor:
        pieces = [p.reshape(s) for p, s in zip(y.split(list(receive)), incoming, strict=True)]
        return torch.cat(pieces, dim=old).reshape(shape)

    return Stage(pack, unpack, "all_to_all", axis, send=send, receive=receive)


def _slice(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    part, have, shape = _split_part(b, axis), local_parts(a, sizes, coord), local_shape(b, sizes, coord)
    start, length = chunk(have[part], sizes[axis], coord[axis])

    def pack(x: Tensor) -> Tensor:  # a copy, so that views of it work and the whole tensor is not kept alive by its piece
        return x.reshape(have).narrow(part, start, length).clone(memory_format=torch.contiguous_format).reshape(shape)

    return Stage(pack, _same)


def _mask(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    return Stage(torch.zeros_like if coord[axis] else _same, _same)


def _recast(a: Spec, b: Spec, axis: int, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Stage:
    if local_shape(a, sizes, coord) != local_shape(b, sizes, coord):
        raise GraphError("a recast changes the data", why=f"{a} → {b}")
    return Stage(_same, _same)


_BUILDERS = {
    "all_gather": _gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "slice": _slice,
    "mask": _mask,
    "recast": _recast,
}


def bucket_stage(shapes: tuple[tuple[int, ...], ...], axis: int, op: str) -> tuple[Stage, Callable[[Tensor], tuple[Tensor, ...]]]:
    """One all-reduce for tensors of these local shapes: the stage, and how its result falls apart again."""
    counts = [math.prod(s) for s in shapes]

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def unbundle(y: Tensor) -> tuple[Tensor, ...]:
        return tuple(piece.view(s) for piece, s in zip(y.split(counts), shapes, strict=True))

    return Stage(pack, _same, "all_reduce", axis, op, fresh=True), unbundle


def sent_bytes(wire: str, packed: Tensor, n: int, send: tuple[int, ...] = (), own: int = 0) -> int:
    """Bytes one device sends along an axis of size n, ring algorithms: what the cost model prices."""
    size = packed.numel() * packed.element_size()
    if wire == "all_gather":
        return size * (n - 1)
    if wire == "all_reduce":
        return 2 * size * (n - 1) // n
    if wire == "all_to_all":
        return size - send[own] * packed.element_size()
    return size * (n - 1) // n


class ProcessWire:
    """Carries packed tensors over `torch.distributed`, one process group per mesh axis. `sent` counts bytes by (wire, axis).

    What a collective reads is kept alive until it is waited for. On CUDA it runs on a stream of its own that begins after what the
    current stream was given so far. On a CPU one collective of a group travels at a time: several small all-gathers at once corrupt the
    memory of gloo's threads (seen with PyTorch 2.13, tests/test_collectives.py).
    """

    def __init__(self, groups: Sequence[str], sizes: tuple[int, ...], coord: tuple[int, ...]) -> None:
        self.groups, self.sizes, self.coord = tuple(groups), sizes, coord
        self.sent: dict[tuple[str, int], int] = {}
        self._travels: dict[int, weakref.ref[Tensor]] = {}  # by axis what the last collective fills

    def send(self, step: Stage, packed: Tensor) -> tuple[Tensor, Tensor, Stage]:
        """Start the collective of one stage. Returns the tensor that it fills, a new one or the packed one when that is fresh, the
        packed one, which it reads, and the stage. Raises RankError when another rank is in trouble."""
        HERE.enter(step.name, step.mark)
        try:
            return self._begun(step, packed)
        except RuntimeError as e:
            raise explained(e, step.name) from None

    def _begun(self, step: Stage, packed: Tensor) -> tuple[Tensor, Tensor, Stage]:
        wire, n, group = step.wire, self.sizes[step.axis], self.groups[step.axis]
        key = (str(wire), step.axis)
        self.sent[key] = self.sent.get(key, 0) + sent_bytes(str(wire), packed, n, step.send, self.coord[step.axis])
        x = packed.view(torch.uint8) if packed.dtype == torch.bool else packed
        ops = torch.ops._c10d_functional
        if x.device.type == "cpu":
            self._settle(step)
        if wire == "all_gather":
            y = ops.all_gather_into_tensor(x, n, group)
        elif wire == "reduce_scatter":
            y = ops.reduce_scatter_tensor(x, step.op, n, group)
        elif wire == "all_to_all":
            y = ops.all_to_all_single(x, list(step.receive), list(step.send), group)
        else:
            y = (ops.all_reduce_ if step.fresh else ops.all_reduce)(x, step.op, group)
        self._travels[step.axis] = weakref.ref(y)
        return y, packed, step

    def _settle(self, step: Stage) -> None:
        """Wait for what still travels along the axis; whoever started it may wait again."""
        last = self._travels.pop(step.axis, None)
        y = None if last is None else last()
        if y is not None:
            HERE.waiting = step.name
            torch.ops._c10d_functional.wait_tensor(y)
            HERE.waiting = ""

    def arrive(self, sent: tuple[Tensor, Tensor, Stage]) -> Tensor:
        """Wait for what `send` started: the host on a CPU, the current stream on CUDA. Raises RankError as `send` does."""
        y, packed, step = sent
        HERE.waiting = step.name
        try:
            y = torch.ops._c10d_functional.wait_tensor(y)
        except RuntimeError as e:
            raise explained(e, step.name) from None
        finally:
            HERE.waiting = ""
        return y.view(torch.bool) if packed.dtype == torch.bool else y


def lockstep(steps: Sequence[Stage], packed: Sequence[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    """What `ProcessWire` would bring to every rank: all ranks' packed tensors in, all results out, in rank order."""
    out: list[Tensor] = list(packed)
    for members in groups_along(steps[0].axis, sizes):
        for r, result in zip(members, exchanged([steps[r] for r in members], [packed[r] for r in members]), strict=True):
            out[r] = result
    return out


def exchanged(steps: Sequence[Stage], xs: Sequence[Tensor]) -> list[Tensor]:
    """What one group's collective brings to each of its members, from what each has packed; in group order."""
    n, wire = len(xs), steps[0].wire
    if wire == "all_gather":
        results = [torch.cat(list(xs))] * n
    elif wire == "all_to_all":
        pieces = [x.split(list(step.send)) for x, step in zip(xs, steps, strict=True)]
        results = [torch.cat([pieces[j][i] for j in range(n)]) for i in range(n)]
    else:
        reduce = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[steps[0].op]
        total = functools.reduce(reduce, xs)
        results = list(total.chunk(n)) if wire == "reduce_scatter" else [total] * n
    return [result.clone() for result in results]


@functools.lru_cache(maxsize=256)
def groups_along(axis: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The ranks of every process group along an axis, each in axis order."""
    strides = [math.prod(sizes[a + 1 :]) for a in range(len(sizes))]
    others = [range(n) if a != axis else range(1) for a, n in enumerate(sizes)]
    starts = [sum(i * s for i, s in zip(c, strides, strict=True)) for c in itertools.product(*others)]
    return tuple(tuple(start + i * strides[axis] for i in range(sizes[axis])) for start in starts)


def _same(x: Tensor) -> Tensor:
    return x


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def _split_part(spec: Spec, axis: int) -> int:
    placement = spec.placements[axis]
    if not isinstance(placement, Shard):
        raise GraphError("a move's spec is not split where it should be", why=f"{spec}, axis {axis}")
    return spec.index(placement)


def _op(spec: Spec, axis: int) -> str:
    placement = spec.placements[axis]
    if not isinstance(placement, Partial):
        raise GraphError("a reduction of a tensor that is not Partial", why=f"{spec}, axis {axis}")
    return placement.op
