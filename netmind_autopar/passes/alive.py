"""Bytes alive at every op of a lowered program, counted as the planner counts them.

A value lives from the op that makes it to its last use, a view holds what it is a part of, and a move needs what
`costs/room.py` says while it runs. Parameters, buffers, inputs and the caller's tangents live all the time and are left out.
The emitted order counts: all of forward, then all of backward, then what follows the last micro-batch. A *slot* is the position of
an op in it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from ..costs.compute import FREE, short_name
from ..costs.room import move_room
from ..costs.space import KINDS
from ..ir.program import Program, is_getitem, source, tensor_args
from ..ir.spec import Partial, Placement, Replicate, Spec, local_bytes, local_shape, parse_spec
from ..runtime.collectives import BUCKETS, MOVES, Stage, stage
from ..runtime.offload import offload, release, reload, settle
from .defer import FINISH

if TYPE_CHECKING:
    from .pipeline import Lowering

Storage = tuple[fx.Node, int]  # output `index` of the op that took the memory


@dataclass(frozen=True)
class Room:
    """What a move or bucket takes, in bytes: `peak` while it packs and unpacks, `flying` in between, `left` in what it gives.

    holds: what it sends is its input's own memory.
    """

    peak: int
    flying: int
    left: int
    holds: bool


@dataclass
class Alive:
    """order: the ops by slot; bounds: where the phases begin, and the end; memory[k]: bytes while op k runs.

    owner: whose memory a value is, None for what always lives; last: the slot of a storage's last use; size: its bytes.
    """

    order: list[fx.Node]
    bounds: tuple[int, ...]
    memory: np.ndarray
    slot: dict[fx.Node, int]
    room: dict[fx.Node, Room]
    owner: dict[Storage, Storage | None] = field(default_factory=dict)
    last: dict[Storage, int] = field(default_factory=dict)
    size: dict[Storage, int] = field(default_factory=dict)
    known: dict[tuple, Room] = field(default_factory=dict)

    def phase(self, slot: int) -> tuple[int, int]:
        """The first slot of the phase in which `slot` lies, and the one after its last."""
        i = min(bisect_right(self.bounds, slot), len(self.bounds) - 1)
        return self.bounds[i - 1], self.bounds[i]

    def add(self, begin: int, end: int, size: int) -> None:
        """Count `size` bytes more at the slots begin … end-1."""
        self.memory[begin:end] += size


def alive(program: Program, context: Lowering) -> Alive:
    """Count a lowered program. Its collectives run where they stand."""
    calls = [n for n in program.graph.nodes if n.op in ("call_function", "get_attr")]
    phases = [[n for n in calls if n.meta["phase"] == phase] for phase in ("forward", "backward", FINISH)]
    order = [n for phase in phases for n in phase]
    slot = {node: k for k, node in enumerate(order)}
    bounds = (0, *(b for b in dict.fromkeys(itertools.accumulate(map(len, phases))) if b))
    work = Alive(order, bounds, np.zeros(len(order) + 1, np.int64), slot, {})
    for k, node in enumerate(order):
        _count(work, program, context, node, k)
    _ends(work, program)
    for storage, size in work.size.items():
        work.add(slot[storage[0]], work.last[storage] + 1, size)
    for node, room in work.room.items():
        work.add(slot[node], slot[node] + 1, room.peak - room.left)
    return work


def owner_of(work: Alive, node: fx.Node) -> Storage | None:
    """Whose memory a value is; None for what lives all the time."""
    return work.owner.get(source(node))


def _count(work: Alive, program: Program, context: Lowering, node: fx.Node, k: int) -> None:
    args = tensor_args(node)
    if is_getitem(node):
        return
    for arg in args:
        owner = owner_of(work, arg)
        if owner is not None:
            work.last[owner] = max(work.last[owner], k)
    if node.op == "get_attr":
        work.owner[node, 0] = None
    elif node.target in MOVES or node.target in BUCKETS:
        room = work.room[node] = _move_bytes(work, node, context)
        sizes = (room.left,) if node.target in MOVES else tuple(local_bytes(parse_spec(s), context.sizes) for s in node.meta["specs"])
        for i, size in enumerate(sizes):
            _take(work, (node, i), size, k)
        if node.target in MOVES and not room.left:  # a mask on the first device: the input itself
            work.owner[node, 0] = owner_of(work, args[0])
    elif short_name(node) in FREE or node.target in (offload, release, reload, settle):
        base = owner_of(work, args[0]) if args and node.target not in (release, settle) else None
        outputs = len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else 1
        work.owner.update({(node, i): base for i in range(outputs)})
        if node.target is torch.ops.aten.reshape.default:  # it may have to copy: counted where it is moved, as the planner counts none
            size = sum(local_bytes(s, context.sizes) for s in (program.specs[node.name],) if isinstance(s, Spec))
            work.room[node] = Room(size, 0, size, False)
        if node.target is release:
            away = owner_of(work, args[0])
            work.last.update({away: max(work.last[away], k)} if away else {})
    else:
        specs = program.specs[node.name]
        for i, spec in enumerate(specs if isinstance(specs, tuple) else (specs,)):
            if spec is not None:
                _take(work, (node, i), local_bytes(spec, context.sizes), k)


def _take(work: Alive, storage: Storage, size: int, k: int) -> None:
    work.owner[storage], work.last[storage], work.size[storage] = storage, k, size


def _ends(work: Alive, program: Program) -> None:
    """The caller holds results and gradients to the end of the step; a buffer's new value is copied after forward."""
    ends = tensor_args(next(n for n in program.graph.nodes if n.op == "output"))
    for node, out in zip(ends, program.outputs, strict=True):
        owner = owner_of(work, node)
        if owner is not None:
            until = work.bounds[1] if out.role == "mutation" else len(work.order)
            work.last[owner] = max(work.last[owner], until)


def _move_bytes(work: Alive, node: fx.Node, context: Lowering) -> Room:
    """What a move or bucket takes on the first device, which has the largest pieces."""
    if node.target in BUCKETS:
        total = sum(local_bytes(parse_spec(s), context.sizes) for s in node.meta["specs"])
        return Room(total, total, total, False)
    kind, axis, before, after = node.args[1:]
    given = tensor_args(node)[0]
    lies = _order(given.meta["val"]) if given.target not in MOVES else None
    key = (kind, axis, before, after, lies)
    if key not in work.known:
        spec = parse_spec(str(before))
        need = _need(context, str(kind), int(axis), spec, parse_spec(str(after)))  # type: ignore[call-overload]
        step = stage(*key[:4], context.sizes, (0,) * len(context.sizes))  # type: ignore[arg-type]
        work.known[key] = _tried(step, spec, lies, need, context.sizes)
    return work.known[key]


def _order(like: Tensor) -> tuple[int, ...] | None:
    """The dims of a tensor as they lie in memory, outermost first; None when that is their own order."""
    if like.is_contiguous():
        return None
    return tuple(sorted(range(like.dim()), key=lambda d: (-like.stride(d), d)))


def _tried(step: Stage, before: Spec, lies: tuple[int, ...] | None, need: int, sizes: tuple[int, ...]) -> Room:
    """The room of one move, by running it on tensors without data."""
    x = torch.empty_permuted(local_shape(before, sizes), lies or tuple(range(len(before.shape))), dtype=before.dtype, device="meta")
    packed = step.pack(x)
    own = packed.untyped_storage() is not x.untyped_storage()
    if step.wire is None:
        return Room(need, 0, packed.untyped_storage().nbytes() if own else 0, False)
    n = sizes[step.axis]
    count = {"all_gather": packed.numel() * n, "reduce_scatter": packed.numel() // n, "all_to_all": sum(step.receive)}
    carried = packed.new_empty(packed.shape if step.wire == "all_reduce" else (count[step.wire],))
    left = step.unpack(carried).untyped_storage().nbytes()
    reads = step.wire != "all_reduce"  # which reduces in a copy
    fills, packs = carried.untyped_storage().nbytes(), packed.untyped_storage().nbytes() * own
    return Room(max(need, fills + packs, left), fills + packs * reads, left, reads and not own)


def _need(context: Lowering, kind: str, axis: int, before: Spec, after: Spec) -> int:
    """Bytes besides its input at the worst moment of one move."""
    ends = [local_bytes(spec, context.sizes) for spec in (before, after)]
    op = next((p.op for p in (*before.placements, *after.placements) if isinstance(p, Partial)), "sum")
    space, _ = context.conversions.space(before.dims, before.dtype, op)
    states = [space.index.get(_used(spec, context.sizes)) for spec in (before, after)]
    if kind not in KINDS or context.sizes[axis] == 1 or None in states:
        return 2 * max(ends)
    i, j = (np.array([state], np.int64) for state in states)
    need, _ = move_room(space, space.steps(i, j, np.array([axis]), np.array([KINDS.index(kind)])))
    return int(need[0])


def _used(spec: Spec, sizes: Sequence[int]) -> tuple[Placement, ...]:
    """The placements, with whole tensors along axes of one device."""
    return tuple(p if n > 1 else Replicate() for p, n in zip(spec.placements, sizes, strict=True))
