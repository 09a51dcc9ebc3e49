"""Fold repeated blocks: nodes that do the same in every layer form a class and are decided once.

A class is known by where its nodes stand: the module path with layer numbers starred, the op, the phase, and the how-manieth
node of that kind it is within its module. Only nodes with the same call (op, shapes, dtypes, other arguments) and the same rule
share a class, so merging is always legal; it only restricts the plan. A number in a module path is a layer number when the module
there has modules below it: the blocks of a transformer, not the layers of a plain `nn.Sequential`.

Names, the keys of `Plan.choices`:

    transformer.h.*.attn.c_attn.addmm         the forward op of that module
    transformer.h.*.attn.c_attn.mm@backward   an op of its backward; a second one is mm.1@backward
    transformer.h.*.attn.c_attn.weight        a parameter
    output.logits                             a result of the program, and the gradient that arrives there
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, is_getitem, op_name, tensor_args, values
from ..rules.algebra import Rule

IGNORED = {"salt"}  # arguments that differ from call to call without changing what the op does


def classes(program: Program, rules: Mapping[str, Rule] | None = None) -> dict[str, str]:
    """The class of every placeholder, constant and op; `getitem` nodes belong to their producer and have none."""
    ends = program.placeholders()
    stars = _Stars(program)
    ordinals: dict[tuple, int] = {}
    bases: dict[tuple, str] = {}
    taken: dict[str, dict[object, str]] = {}
    out: dict[str, str] = {}
    signs = _Signs(program)
    for node in program.graph.nodes:
        if node.op == "output" or is_getitem(node):
            continue
        if "again" in node.meta:  # runs again in backward what its original did in forward
            out[node.name] = out[node.meta["again"]]
            continue
        sign = signs.of(node, rules.get(node.name) if rules else None)
        if node.op == "placeholder":
            base = _end_name(ends[node.name].role, ends[node.name].name, stars)
        elif node.op == "get_attr":
            base = f"constant.{node.name}"
        else:
            base = _op_class(node, sign, stars, ordinals, bases)
        known = taken.setdefault(base, {})
        if sign not in known:
            known[sign] = base if not known else f"{base}~{len(known)}"
        out[node.name] = known[sign]
    return out


class _Stars:
    """Module paths with their layer numbers replaced by stars."""

    def __init__(self, program: Program) -> None:
        paths = {node.meta.get("module") or "" for node in program.graph.nodes}
        self.blocks: set[str] = set()  # every prefix of a path that ends in a number and has modules below it
        for path in paths:
            parts = path.split(".")
            self.blocks |= {".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()}
        self.known: dict[str, str] = {}

    def of(self, path: str) -> str:
        if path not in self.known:
            parts = path.split(".")
            numbers = [part.isdigit() and ".".join(parts[: i + 1]) in self.blocks for i, part in enumerate(parts)]
            self.known[path] = ".".join("*" if number else part for part, number in zip(parts, numbers, strict=True))
        return self.known[path]


def _end_name(role: str, name: str, stars: _Stars) -> str:
    if role in ("param", "buffer"):
        owner, dot, leaf = name.rpartition(".")
        return stars.of(owner) + dot + leaf
    return {"input": f"input.{name}", "tangent": f"output.{name}"}.get(role, role)


def _op_class(node: fx.Node, sign: _Sign, stars: _Stars, ordinals: dict[tuple, int], known: dict[tuple, str]) -> str:
    module, phase = node.meta.get("module") or "", node.meta.get("phase", "forward")
    key = (module, phase, sign)
    ordinal = ordinals[key] = ordinals.get(key, -1) + 1
    where = stars.of(module)
    name = (where, phase, sign, ordinal)
    if name not in known:
        op = sign.facts[0].split(".")
        title = ".".join(filter(None, (where, op[1] if len(op) > 2 else op[0])))
        known[name] = title + (f".{ordinal}" if ordinal else "") + ("@backward" if phase == "backward" else "")
    return known[name]


@dataclass(frozen=True, eq=False)
class _Sign:
    """A signature, the same object for the same one."""

    facts: tuple


class _Signs:
    """The signatures of a program's nodes. Nodes that take and make the very same fake tensors need no second look."""

    def __init__(self, program: Program) -> None:
        self.taken = program.taken
        self.quick: dict[tuple, _Sign] = {}
        self.known: dict[tuple, _Sign] = {}
        self.varies: dict[int, bool] = {}

    def of(self, node: fx.Node, rule: Rule | None) -> _Sign:
        key: tuple = (node.op, id(rule), id(node.meta["val"]))
        if node.op == "call_function":
            taken, target = self.taken(node), id(node.target)
            if target not in self.varies:
                self.varies[target] = _varies(node.target)
            rest = _other_args(node) if self.varies[target] else taken.rest
            key = (target, rest, id(rule), id(node.meta["val"]), *[id(arg.meta["val"]) for arg in taken.nodes])
        if key not in self.quick:
            facts = signature(node, rule)
            self.quick[key] = self.known.setdefault(facts, _Sign(facts))
        return self.quick[key]


def signature(node: fx.Node, rule: Rule | None = None) -> tuple:
    """What two nodes must share to be planned alike. Hashable, and the same in every process."""
    ins = tuple(_tensor(arg.meta["val"]) for arg in tensor_args(node))
    outs = tuple(_tensor(v) for v in values(node))
    kind = op_name(node) if node.op == "call_function" else node.op
    law = (str(rule), tuple(rule.sizes.items()), rule.known) if rule else ()
    return (kind, ins, outs, _other_args(node), law)


def _tensor(value: Any) -> tuple | None:
    if isinstance(value, (tuple, list)):
        return tuple(_tensor(v) for v in value)
    return (tuple(int(n) for n in value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else None


def _other_args(node: fx.Node) -> str:
    def hide(n: fx.Node) -> str:
        return "_"

    if node.op != "call_function":
        return ""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), hide)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        ignored = _ignored(node.target)
        args = tuple("" if i in ignored else a for i, a in enumerate(args)) if ignored else args
        kwargs = {k: v for k, v in kwargs.items() if k not in IGNORED}
    return repr((tuple(args), sorted(kwargs.items())))


def _varies(op: Any) -> bool:
    """Whether some of an op's arguments are ignored."""
    return getattr(op, "_schema", None) is not None and bool(_ignored(op))


@functools.cache
def _ignored(op: torch._ops.OpOverload) -> frozenset[int]:
    """The positions of an op's ignored arguments."""
    return frozenset(i for i, argument in enumerate(op._schema.arguments) if argument.name in IGNORED)
