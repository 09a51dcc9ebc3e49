"""Which ops may write what they make into the memory of an operand that nobody needs any more.

An elementwise op whose operand is read here for the last time takes its memory instead of new memory, and an all-reduce reduces what it is
given where it lies. Values are the same in every bit; fewer bytes are touched for the first time, which is what large tensors cost on
a CPU, and no peak grows.

Memory is written again only if it was made by an op of this program that gives new memory (by its schema; an op of another library
is not trusted), whole and in the layout of the result, and if no view of it, no collective that still reads it, no result and
nothing that the caller keeps is left. Compiled regions do the same themselves and are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..ir.program import is_getitem, source, tensor_args
from ..runtime.collectives import LOCAL_KINDS, MOVES, STARTS, wait

Storage = tuple[fx.Node, int]  # output `index` of the op that took the memory
_SHARES = {torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh.default}  # whose schema does not say so


@dataclass
class Reuse:
    """instead: the op that runs in the place of an op, and the name of its argument that is also its result (None: its first).

    over: the operand that is written. within: all-reduces that reduce in their operand's memory.
    """

    instead: dict[fx.Node, tuple[torch._ops.OpOverload, str | None]] = field(default_factory=dict)
    over: dict[fx.Node, fx.Node] = field(default_factory=dict)
    within: set[fx.Node] = field(default_factory=set)


def reuse(order: Sequence[fx.Node], pinned: Collection[fx.Node]) -> Reuse:
    """What can be written in place of a lowered program whose ops run in this order. pinned: values that the caller gets or keeps."""
    owners, fresh = _owners(order)
    slot = {node: k for k, node in enumerate(order)}
    last: dict[Storage, int] = {}
    flights: dict[Storage, dict[fx.Node, int]] = {}  # started collectives that read a storage, and where they are waited for
    for k, node in enumerate(order):
        for arg in tensor_args(node):
            for storage in owners.get(arg, ()):
                last[storage] = k
                if node.target in STARTS:
                    flights.setdefault(storage, {})[node] = max(slot[u] for u in node.users)
    for node in pinned:
        last.update(dict.fromkeys(owners.get(node, ()), len(order)))
    found = Reuse()
    for k, node in enumerate(order):
        dying = []
        for arg in dict.fromkeys(tensor_args(node)):
            own = owners.get(arg, frozenset())
            shared = any(owners.get(b, frozenset()) & own for b in tensor_args(node) if b is not arg)
            flies = any(begun is not node and end > k for s in own for begun, end in flights.get(s, {}).items())
            if len(own) == 1 and own <= fresh and not shared and not flies and all(last[s] == k for s in own):
                dying.append(arg)
        if node.target in MOVES and node.args[1] == "all_reduce" and dying:
            found.within.add(node)
        elif _is_elementwise(node):
            _find(node, [a for a in dying if _alike(a, node, owners)], found)
    return found


def _owners(order: Sequence[fx.Node]) -> tuple[dict[fx.Node, frozenset[Storage]], set[Storage]]:
    """Of every value the memory that it may lie in, nothing for what lives all the time; and memory that may be written again.

    What is written over another value's memory has memory of its own here: the other value is over by then.
    """
    owners: dict[fx.Node, frozenset[Storage]] = {}
    fresh: set[Storage] = set()
    for node in order:
        nothing: frozenset[Storage] = frozenset()
        taken = nothing.union(*(owners.get(a, nothing) for a in tensor_args(node)))
        travels = node.target is wait or (node.target in MOVES and node.args[1] not in LOCAL_KINDS)
        if is_getitem(node):
            base, index = source(node)
            owners[node] = frozenset({(base, index)}) if (base, index) in fresh else taken
        elif _gives_new(node):
            fresh |= {(node, i) for i in range(len(node.target._schema.returns))}  # type: ignore[union-attr]
            owners[node] = frozenset({(node, 0)})
        elif travels and isinstance(node.meta["val"], Tensor):
            fresh.add((node, 0))
            owners[node] = frozenset({(node, 0)})
        elif _is_view(node) or node.op == "get_attr":
            owners[node] = taken
        else:
            owners[node] = taken | {(node, 0)}  # of its operands' memory or not: nothing is written over it
    return owners, fresh


def _gives_new(node: fx.Node) -> bool:
    """An op of PyTorch's own whose outputs are new memory, each its own."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or op in _SHARES or op._schema.is_mutable:
        return False
    return all(r.alias_info is None and isinstance(r.type, torch.TensorType) for r in op._schema.returns)


def _is_view(node: fx.Node) -> bool:
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" and not op._schema.is_mutable


def _alike(arg: fx.Node, node: fx.Node, owners: dict[fx.Node, frozenset[Storage]]) -> bool:
    """Whether an operand is all of its memory, and lies there as the result would."""
    a, out = arg.meta["val"], node.meta["val"]
    ((made, index),) = owners[arg]
    val = made.meta["val"]
    whole = val[index] if isinstance(val, (tuple, list)) else val
    same = a.dtype == out.dtype and a.shape == out.shape and a.stride() == out.stride()
    return same and whole.dtype == a.dtype and whole.numel() == a.numel()


def _is_elementwise(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or not isinstance(node.meta["val"], Tensor):
        return False
    return torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags and _gives_new(node)


def _find(node: fx.Node, dying: Sequence[fx.Node], found: Reuse) -> None:
    """The variant of an elementwise op that writes over one of these operands."""
    for arg in dying:
        first = bool(node.args) and node.args[0] is arg
        variant = (_inplace(node.target) if first else None) or _out(node.target)
        if variant:
            found.instead[node], found.over[node] = variant, arg
            return


def _inplace(op: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, None] | None:
    """`mul_.Tensor` of `mul.Tensor`."""
    packet = getattr(torch.ops.aten, f"{op._schema.name.removeprefix('aten::')}_", None)
    if packet is None or op._overloadname not in packet.overloads():
        return None
    found = getattr(packet, op._overloadname)
    return (found, None) if _takes(found) == _takes(op) and torch.Tag.generated not in found.tags else None


def _out(op: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, str] | None:
    """`tanh_backward.grad_input` of `tanh_backward`: writes into an argument of that name. Those that only copy are no gain."""
    packet = op.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        outs = [a.name for a in found._schema.arguments if a.is_out]
        if len(outs) == 1 and _takes(found) == _takes(op) and torch.Tag.generated not in found.tags:
            return found, outs[0]
    return None


def _takes(op: torch._ops.OpOverload) -> list[tuple[str, str]]:
    """Names and types of what an op takes, but for where it writes."""
    return [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
