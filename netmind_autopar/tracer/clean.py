"""From the joint graph as torch traces it to the one everybody reads: no bookkeeping, concrete sizes, readable names.

`simplify` copies the graph once and drops or folds on the way; `finish` removes what nobody needs, fills in where each node
comes from and names it after the user's modules.
"""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import torch_private

_aten = torch.ops.aten

# Functional programs have no aliases to track: these are their first argument.
ALIASES = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
    _aten.lift.default,
    _aten.detach_.default,
    _aten.view_as.default,
}
# No-ops when shape, dtype and strides stay.
COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default}
# Checks that were made at capture.
CHECKS = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_async.msg,
    _aten._assert_async.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range_for_size.default,
    _aten.sym_constrain_range.default,
}
VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten._reshape_alias.default}
# Cheap, pure and memory-free: the same one twice in a module is made once.
SHARED = {
    _aten.view.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.slice.Tensor,
    operator.getitem,
}
# What uninitialised memory holds differs from run to run and from device to device: zeros instead.
EMPTY = {
    _aten.empty.memory_format: _aten.zeros.default,
    _aten.empty_like.default: _aten.zeros_like.default,
    _aten.new_empty.default: _aten.new_zeros.default,
}
DROPPED_KEYWORDS = ("device", "layout", "pin_memory")


class Simplifier:
    """Copies nodes into `graph`; `env` maps the old ones to the new ones."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.seen: dict[Any, fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        if node.op == "call_function":
            if node.target not in CHECKS:
                self.env[node] = self._call(node)
        else:
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)

    def _call(self, node: fx.Node) -> fx.Node:
        target, val = node.target, node.meta.get("val")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        kwargs = {k: v for k, v in kwargs.items() if k not in DROPPED_KEYWORDS}
        if target in EMPTY:
            target, kwargs = EMPTY[target], {k: v for k, v in kwargs.items() if k != "memory_format"}
        if target in ALIASES or (target in COPIES and _same(args[0].meta["val"], val)):
            return args[0]
        if target in VIEWS:
            target, args = _aten.view.default, (_below(args[0], _aten.view.default), list(val.shape))
        elif target is _aten.expand.default:
            args = (args[0], list(val.shape))
        if target in (_aten.view.default, _aten.expand.default) and args[0].meta["val"].shape == val.shape:
            return args[0]
        if folded := FOLDS.get(target, lambda *_: None)(args, val):
            return folded
        if target is _aten.cat.default:
            args = (_nonempty(args[0]), *args[1:])
            if len(args[0]) == 1:
                return args[0][0]
        if target is _aten.slice.Tensor:
            args = _concrete_slice(args)
        key = (target, _key(args), _key(kwargs), node.meta["module"]) if target in SHARED else None
        if key in self.seen:
            return self.seen[key]
        new = self.graph.create_node("call_function", target, args, kwargs)
        new.meta.update({k: node.meta[k] for k in ("val", "where", "module", "phase")})
        if key:
            self.seen[key] = new
        return new


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def _below(node: fx.Node, target: Any) -> fx.Node:
    """A view of a view is a view of what lies below both."""
    while node.op == "call_function" and node.target is target:
        node = node.args[0]
    return node


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _t(args: tuple, val: torch.Tensor) -> fx.Node | None:
    return args[0].args[0] if _is(args[0], _aten.t.default) else None


def _transpose(args: tuple, val: torch.Tensor) -> fx.Node | None:
    """Swapping the same two dims back."""
    rank = val.dim()
    if _is(args[0], _aten.transpose.int) and {d % rank for d in args[1:]} == {d % rank for d in args[0].args[1:]}:
        return args[0].args[0]
    return None


def _permute(args: tuple, val: torch.Tensor) -> fx.Node | None:
    if _is(args[0], _aten.permute.default) and [args[0].args[1][d] for d in args[1]] == list(range(val.dim())):
        return args[0].args[0]
    return None


def _slice(args: tuple, val: torch.Tensor) -> fx.Node | None:
    """A slice of everything."""
    whole = args[0].meta["val"].shape == val.shape and (len(args) < 5 or args[4] == 1)
    return args[0] if whole else None


def _copy(args: tuple, val: torch.Tensor) -> fx.Node | None:
    """The functional form of `a.copy_(b)` where b is like a already."""
    have = args[1].meta["val"]
    return args[1] if have.shape == val.shape and have.dtype == val.dtype else None


FOLDS: dict[Any, Callable[[tuple, torch.Tensor], fx.Node | None]] = {
    _aten.t.default: _t,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.slice.Tensor: _slice,
    _aten.copy.default: _copy,
}


def _concrete_slice(args: tuple) -> tuple:
    """(x, dim, start, end, step) with 0 <= start <= end <= size."""
    x, dim, start, end, step = [*args, None, None, None, None][:5]
    size = x.meta["val"].shape[dim or 0]
    first, last, _ = slice(start, end, step).indices(size)
    return (x, dim or 0, first, max(first, last), *((step,) if step not in (None, 1) else ()))


def _nonempty(parts: list[fx.Node]) -> list[fx.Node]:
    return [p for p in parts if p.meta["val"].numel()] or parts[:1]


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    return (type(value).__name__, value)


def simplify(old: fx.Graph) -> fx.Graph:
    """A copy without alias bookkeeping, checks, empty operands and views of views; sizes concrete, devices gone.

    Ops that make tensors (`arange`, `full`) say no device: whoever runs the graph does.
    """
    work = Simplifier()
    for node in old.nodes:
        work.copy(node)
    drop_dead(work.graph)
    return work.graph


def drop_dead(graph: fx.Graph) -> None:
    """Erase computations that reach no output; placeholders stay."""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def set_phases(graph: fx.Graph, results: list[fx.Node]) -> None:
    """What the user's outputs and the new buffers need is forward; of the rest, what torch says or a tangent reaches is backward."""
    stack, forward = [n for n in results if n.op == "call_function"], set()
    while stack:
        node = stack.pop()
        if node not in forward:
            forward.add(node)
            stack += [n for n in node.all_input_nodes if n.op == "call_function"]
    for node in graph.nodes:
        if node in forward:
            node.meta["phase"] = "forward"
        elif any(n.meta.get("phase") == "backward" for n in node.all_input_nodes):
            node.meta["phase"] = "backward"


def fill_origins(graph: fx.Graph) -> None:
    """Nodes that autograd adds by itself (sums of gradients) belong where their result is used, else where it comes from."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    for field in ("module", "where"):
        for order, neighbours in ((reversed(nodes), lambda n: list(n.users)), (nodes, lambda n: n.all_input_nodes)):
            for node in order:
                if node.meta[field] is None:
                    found = [m.meta.get(field) for m in neighbours(node) if m.op == "call_function"]
                    node.meta[field] = next((f for f in found if f), None)
        for node in nodes:
            node.meta[field] = node.meta[field] or ""


def identifier(text: str) -> str:
    """A name that is legal in Python and that `fx` leaves alone."""
    name = re.sub(r"\W+", "_", text).strip("_") or "x"
    if name[0].isdigit():
        name = "m" + name
    return name + "_" if name in _RESERVED else name


_RESERVED = {*keyword.kwlist, *dir(builtins), "inf", "nan", "NoneType", "torch", "device"}


def rename(old: fx.Graph, ends: dict[fx.Node, str]) -> fx.Graph:
    """The same graph with names from module and op, `transformer_h_0_attn_c_attn_addmm`, `..._bw` in backward, each unique.

    `ends` names the placeholders.
    """
    writer = Writer()
    env: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "output":
            writer.graph.output(args[0])
            continue
        name = writer.unique(ends.get(node) or node_title(node.op, node.target, args, node.meta))
        target = name if node.op == "placeholder" else node.target
        env[node] = writer.add(node.op, target, args, kwargs, name, node.meta)
    return writer.graph


def node_title(op: str, target: Any, args: tuple, meta: dict[str, Any]) -> str:
    """The name of a node that is no placeholder, before it is made unique."""
    if op == "get_attr":
        return identifier(target)
    if target is operator.getitem:
        return identifier(f"{args[0].name}_out{args[1]}")
    word = target._schema.name.split("::")[1].strip("_") if isinstance(target, torch._ops.OpOverload) else target.__name__
    if meta["phase"] == "backward":
        word = re.sub(r"_backward(_data)?$", "", word) + "_bw"
    return identifier(f"{meta['module'].replace('.', '_')}_{word}" if meta["module"] else word)


class Writer:
    """A graph being written, every name once."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.used: set[str] = set()

    def unique(self, name: str) -> str:
        candidate, i = name, 1
        while candidate in self.used:
            i += 1
            candidate = f"{name}_v{i}"
        self.used.add(candidate)
        return candidate

    def add(self, op: str, target: Any, args: tuple, kwargs: dict[str, Any], name: str, meta: dict[str, Any]) -> fx.Node:
        node = torch_private.new_node(self.graph, op, target, args, kwargs, name)
        node.meta.update(meta)
        return node
