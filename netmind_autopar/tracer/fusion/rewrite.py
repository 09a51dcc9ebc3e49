"""The fusion pass: finds sites of `table.TABLE` in an exported forward graph and puts fused ops in their place, before autograd.

So every fused op brings its own backward. A site is fused only where nothing else reads what it computes on the way, nothing that it
touches is written in place, and no autocast region surrounds it. What has the sign of a site and is none is reported, with the reason.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...ir.planrows import Fused
from ...ir.program import Program, Unfused, op_name
from ..origin import where
from .pattern import Found, changes_nothing, op_of, value_of
from .table import ROOT, TABLE, Fusion, Made, Match

_CHECKS = ("aten::_assert_tensor_metadata", "aten::_assert_async", "aten::sym_constrain_range")
OTHERWISE = "its ops are in no form that is known"


def fuse_graph(module: fx.GraphModule) -> tuple[Unfused, ...]:
    """Fuse the sites of an exported module and of the modules inside it, in place; what was nearly one."""
    left: Counter[tuple[str, str, str]] = Counter()
    for graph_module, frozen, autocast in _regions(module):
        work = _Fusing(graph_module, frozen)
        if not autocast:
            work.run()
        left.update(work.left("an autocast region decides the dtypes" if autocast else ""))
        graph_module.recompile()
    return tuple(Unfused(*key, count) for key, count in left.items())


def fused_rows(program: Program) -> tuple[Fused, ...]:
    """What was fused in a program's forward, by op, and what nearly was."""
    if not program.fused:
        return ()
    ops = {f"autopar.{fusion.name}.default": fusion.name for fusion in TABLE}
    forward = (op_name(n) for n in program.graph.nodes if n.op == "call_function" and n.meta["phase"] == "forward")
    found = Counter(ops[name] for name in forward if name in ops)
    rows = [Fused(name=name, count=count) for name, count in sorted(found.items())]
    return (*rows, *(Fused(name=u.fusion, count=u.count, where=u.where, why=u.why) for u in program.unfused))


def _regions(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, bool, bool]]:
    """(module, whether no gradient is wanted in it, whether autocast is on), the outer one first."""
    inner: dict[str, tuple[bool, bool]] = {}
    for node in module.graph.nodes:
        kind = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        for arg in node.all_input_nodes if kind.startswith("wrap_with") else ():
            if arg.op == "get_attr" and isinstance(getattr(module, str(arg.target), None), fx.GraphModule):
                inner[str(arg.target)] = (kind == "wrap_with_set_grad_enabled" and node.args[0] is False, "autocast" in kind)
    yield module, False, False
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            frozen, autocast = inner.get(name, (False, True))
            for deeper, f, a in _regions(child):
                yield deeper, f or frozen, a or autocast


class _Fusing:
    """One graph being rewritten."""

    def __init__(self, module: fx.GraphModule, frozen: bool) -> None:
        self.module, self.graph, self.frozen = module, module.graph, frozen
        for node in list(self.graph.nodes):
            if op_of(node) in _CHECKS and not node.users:
                self.graph.erase_node(node)
        self.written = self._written()
        self.wanting: dict[fx.Node, bool] = {}
        self.reasons: dict[tuple[str, fx.Node], str] = {}

    def run(self) -> None:
        for fusion in TABLE:
            for root in reversed(list(self.graph.nodes)):
                if root.op == "call_function" and root.users and not changes_nothing(root):
                    self._try(fusion, root)

    def _try(self, fusion: Fusion, root: fx.Node) -> None:
        for pattern in fusion.patterns:
            for found in pattern.match(root, Found()):
                if value_of(root) is None:
                    continue
                match = Match(root, found, self.wants)
                made = fusion.make(match)
                why = made if isinstance(made, str) else self._obstacle(match, made)
                if isinstance(made, Made) and not why:
                    self._replace(match, made)
                    return
                if why:
                    for node in (root, *found.inside):
                        self.reasons.setdefault((fusion.name, node), why)

    def _obstacle(self, match: Match, made: Made) -> str:
        """Why a match must stay as it is; "" when nothing stands in the way."""
        results = {match.root, *(match[name] for name in made.outputs if name != ROOT)}
        for node in match.found.inside - results:
            if not self._users(node) <= match.found.inside | {match.root}:
                return f"something else reads what {op_of(node).replace('aten::', '')} gives"
        for node in (*match.found.inside, *match.found.shared, match.root, *_tensors(match)):
            if self._root(node) in self.written:
                return "a tensor of it is written in place"
        first = self._place(match, made)
        if first is not match.root:
            before = self._before(first)
            if any(node is not first and node not in before for node in _nodes(made.args)):
                return "an operand is computed after the sum"
        return ""

    def _place(self, match: Match, made: Made) -> fx.Node:
        """The result that is read first: the fused op stands there."""
        others = [match[name] for name in made.outputs if name != ROOT]
        return others[0] if others else match.root

    def _before(self, node: fx.Node) -> set[fx.Node]:
        out: set[fx.Node] = set()
        for other in self.graph.nodes:
            if other is node:
                return out
            out.add(other)
        return out

    def _replace(self, match: Match, made: Made) -> None:
        place = self._place(match, made)
        with self.graph.inserting_before(place):
            fused = self.graph.call_function(made.op, made.args)
            self._origin(fused, match.root, None)
            for name, position in made.outputs.items():
                old = match.root if name == ROOT else match[name]
                new = fused
                if position >= 0:
                    new = self.graph.call_function(operator.getitem, (fused, position))
                self._origin(new, match.root, old.meta.get("val"))
                old.replace_all_uses_with(new, delete_user_cb=lambda user, fused=fused: user is not fused)
        for drawn in (n for n in match.found.inside if "salt" in n.meta):
            fused.meta["salt"] = drawn.meta["salt"]
        for node in (match.root, *match.found.inside, *match.found.shared):
            self._drop(node)

    def _origin(self, node: fx.Node, like: fx.Node, val: Any) -> None:
        node.meta = {k: like.meta[k] for k in ("stack_trace", "nn_module_stack") if k in like.meta}
        if val is not None:
            node.meta["val"] = val

    def _drop(self, node: fx.Node) -> None:
        """Erase what nobody reads any more, and what only that read."""
        if node.users or node.op != "call_function" or node._erased:
            return
        taken = node.all_input_nodes
        self.graph.erase_node(node)
        for other in taken:
            if (op_of(other) or other.target is operator.getitem) and not _writes(other):
                self._drop(other)

    def _users(self, node: fx.Node) -> set[fx.Node]:
        """Who reads a node, through nodes that change nothing."""
        out: set[fx.Node] = set()
        for user in node.users:
            out |= self._users(user) if changes_nothing(user) else {user}
        return out

    def _root(self, node: fx.Node) -> fx.Node:
        """The node whose memory this one may share."""
        while node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            shares = node.target is operator.getitem or changes_nothing(node)
            shares = shares or (schema is not None and any(r.alias_info is not None for r in schema.returns))
            if not (shares and node.args and isinstance(node.args[0], fx.Node)):
                break
            node = node.args[0]
        return node

    def _written(self) -> set[fx.Node]:
        """The roots of all tensors that an op writes into; what goes into a region that writes counts whole."""
        out: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            if _writes(node):
                out |= {self._root(a) for a in node.all_input_nodes[:1]}
            elif any(_region_writes(self.module, a) for a in node.all_input_nodes):
                out |= {self._root(a) for a in node.all_input_nodes}
        return out

    def wants(self, node: fx.Node) -> bool:
        """Whether a gradient of the node's value may be asked for."""
        if self.frozen:
            return False
        if node not in self.wanting:
            self.wanting[node] = False
            self.wanting[node] = self._wants(node)
        return self.wanting[node]

    def _wants(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not (value.dtype.is_floating_point or value.dtype.is_complex):
            return False
        if node.op == "get_attr":
            found = operator.attrgetter(str(node.target))(self.module)
            return bool(getattr(found, "requires_grad", False))
        if node.op == "placeholder":
            return not isinstance(value, torch.Tensor) or value.requires_grad
        name = getattr(node.target, "__name__", "")
        if op_of(node).startswith("aten::detach") or (name == "wrap_with_set_grad_enabled" and node.args[0] is False):
            return False
        return any(self.wants(a) for a in node.all_input_nodes)

    def left(self, always: str) -> Iterator[tuple[str, str, str]]:
        """(fusion, the user's line, why) of every site that is still there."""
        for fusion in TABLE:
            for node in self.graph.nodes:
                if fusion.sign is None or node.op != "call_function" or changes_nothing(node):
                    continue
                found = next(fusion.sign.match(node, Found()), None)
                if found is None:
                    continue
                why = always or self.reasons.get((fusion.name, node)) or self._silent(fusion, node, found)
                if why:
                    yield fusion.name, where(node.meta.get("stack_trace")) or "", why

    def _silent(self, fusion: Fusion, node: fx.Node, found: Found) -> str:
        """The reason for a sign without a match; "" when `make` says that there is no site."""
        if not any(p is fusion.sign for p in fusion.patterns) and not found.named.keys() >= {"x"}:
            return OTHERWISE
        return "" if value_of(node) is not None and fusion.make(Match(node, found, self.wants)) == "" else OTHERWISE


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _region_writes(module: fx.GraphModule, node: fx.Node) -> bool:
    inner = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return isinstance(inner, fx.GraphModule) and any(_writes(n) for n in inner.graph.nodes if n.op == "call_function")


def _tensors(match: Match) -> list[fx.Node]:
    return [v for v in match.found.named.values() if isinstance(v, fx.Node)]


def _nodes(args: Any) -> list[fx.Node]:
    out: list[fx.Node] = []
    fx.node.map_arg(args, lambda n: out.append(n) or n)
    return out
