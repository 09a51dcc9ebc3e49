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

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, is_getitem, op_name, tensor_args, values
from ..rules.algebra import Rule

IGNORED = {"salt"}  # arguments that differ from call to call without changing what the op does


def classes(program: Program, rules: Mapping[str, Rule] | None = None) -> dict[str, str]:
    """The class of every placeholder, constant and op; `getitem` nodes belong to their producer and have none."""
    ends = program.placeholders()
    blocks = _blocks(node.meta.get("module") or "" for node in program.graph.nodes)
    ordinals: dict[tuple, int] = {}
    taken: dict[str, dict[object, str]] = {}
    out: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "output" or is_getitem(node):
            continue
        if "again" in node.meta:  # runs again in backward what its original did in forward
            out[node.name] = out[node.meta["again"]]
            continue
        sign = signature(node, rules.get(node.name) if rules else None)
        if node.op == "placeholder":
            base = _end_name(ends[node.name].role, ends[node.name].name, blocks)
        elif node.op == "get_attr":
            base = f"constant.{node.name}"
        else:
            base = _op_class(node, sign, blocks, ordinals)
        known = taken.setdefault(base, {})
        out[node.name] = known.setdefault(sign, base if not known else f"{base}~{len(known)}")
    return out


def _blocks(paths: Any) -> set[str]:
    """Every prefix of a module path that ends in a number and has modules below it."""
    found: set[str] = set()
    for path in set(paths):
        parts = path.split(".")
        found |= {".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()}
    return found


def starred(path: str, blocks: set[str]) -> str:
    """A module path with its layer numbers replaced by stars."""
    parts = path.split(".")
    return ".".join("*" if part.isdigit() and ".".join(parts[: i + 1]) in blocks else part for i, part in enumerate(parts))


def _end_name(role: str, name: str, blocks: set[str]) -> str:
    if role in ("param", "buffer"):
        owner, dot, leaf = name.rpartition(".")
        return starred(owner, blocks) + dot + leaf
    return {"input": f"input.{name}", "tangent": f"output.{name}"}.get(role, role)


def _op_class(node: fx.Node, sign: object, blocks: set[str], ordinals: dict[tuple, int]) -> str:
    module, phase = node.meta.get("module") or "", node.meta.get("phase", "forward")
    key = (module, phase, sign)
    ordinal = ordinals[key] = ordinals.get(key, -1) + 1
    op = op_name(node).split(".")
    name = ".".join(filter(None, (starred(module, blocks), op[1] if len(op) > 2 else op[0])))
    return name + (f".{ordinal}" if ordinal else "") + ("@backward" if phase == "backward" else "")


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
        names = [argument.name for argument in schema.arguments]
        args = tuple("" if i < len(names) and names[i] in IGNORED else a for i, a in enumerate(args))
        kwargs = {k: v for k, v in kwargs.items() if k not in IGNORED}
    return repr((tuple(args), sorted(kwargs.items())))
