"""A program's identity: equal for the same computation, whatever it was captured on and wherever its source lies."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, op_name, values


def graph_hash(program: Program) -> str:
    """16 hex digits over structure, ops, arguments, shapes, dtypes, and the roles and names of inputs and outputs.

    Node names, source lines, module paths and devices do not enter; the values of constants do.
    """
    numbers: dict[fx.Node, int] = {}
    lines: list[Any] = []
    forms: dict[int, list[Any]] = {}  # nodes of repeated blocks share their fake tensors
    ends = program.placeholders()
    for i, node in enumerate(program.graph.nodes):
        numbers[node] = i
        if node.op == "output":
            continue
        val = id(node.meta["val"])
        if val not in forms:
            forms[val] = [[list(v.shape), str(v.dtype)] if v is not None else None for v in values(node)]
        shapes = forms[val]
        if node.op == "placeholder":
            end = ends[node.name]
            lines.append(["in", end.role, end.name, end.index, shapes])
        elif node.op == "get_attr":
            lines.append(["const", _digest(program.constants[node.target]), shapes])
        else:
            lines.append([op_name(node), _plain(node.args, numbers), _plain(dict(node.kwargs), numbers), shapes])
    names = {node.name: number for node, number in numbers.items()}
    lines += [["out", names[o.node], o.role, o.name, o.index] for o in program.outputs]
    lines.append(["tied", sorted(program.tied.items())])
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()[:16]


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(repr((str(tensor.dtype), tuple(tensor.shape), tensor.detach().cpu().tolist())).encode()).hexdigest()


def _plain(value: Any, numbers: dict[fx.Node, int]) -> Any:
    """An argument as JSON: nodes by number, devices left out."""
    kind = type(value)
    if kind is fx.Node:
        return {"n": numbers[value]}
    if kind is int or kind is bool or kind is str or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v, numbers) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, numbers) for k, v in sorted(value.items()) if k != "device"}
    if isinstance(value, (int, str)):
        return value
    return repr(value) if isinstance(value, float) else str(value)
