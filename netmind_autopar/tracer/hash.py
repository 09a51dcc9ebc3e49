"""A program's identity: equal for the same computation, whatever it was captured on and wherever its source lies."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, op_name, values


def graph_hash(program: Program) -> str:
    """16 hex digits over structure, ops, arguments, shapes, dtypes, and the roles and names of inputs and outputs.

    Node names, source lines, module paths and devices do not enter; the values of constants do.
    """
    if program.micro:
        return program.micro.graph_hash
    numbers: dict[fx.Node, int] = {}
    lines: list[str] = []
    calls: dict[tuple, _Line] = {}
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
            lines.append(_json(["in", end.role, end.name, end.index, shapes]))
        elif node.op == "get_attr":
            lines.append(_json(["const", _digest(program.constants[node.target]), shapes]))
        else:
            taken = program.taken(node)
            key = (id(node.target), taken.rest, val)
            if key not in calls:
                calls[key] = _line(node, shapes)
            lines.append(calls[key].of([numbers[n] for n in taken.nodes]))
    names = {node.name: number for node, number in numbers.items()}
    lines += [_json(["out", names[o.node], o.role, o.name, o.index]) for o in program.outputs]
    lines.append(_json(["tied", sorted(program.tied.items())]))
    return hashlib.sha256(f"[{','.join(lines)}]".encode()).hexdigest()[:16]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@dataclass(frozen=True)
class _Slot:
    """Where the number of the `position`-th node that a call takes belongs."""

    position: int


@dataclass(frozen=True)
class _Line:
    """A call as JSON, cut where numbers of nodes belong; which belongs where."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]

    def of(self, numbers: list[int]) -> str:
        out = [self.pieces[0]]
        for at, piece in zip(self.order, self.pieces[1:], strict=True):
            out += (str(numbers[at]), piece)
        return "".join(out)


def _line(node: fx.Node, shapes: list[Any]) -> _Line:
    slots: list[_Slot] = []
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: slots.append(_Slot(len(slots))) or slots[-1])  # type: ignore
    pieces = re.split(r'"\\u0000(\d+)"', _json([op_name(node), _plain(args), _plain(dict(kwargs)), shapes]))
    return _Line(tuple(pieces[::2]), tuple(map(int, pieces[1::2])))


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(repr((str(tensor.dtype), tuple(tensor.shape), tensor.detach().cpu().tolist())).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """An argument as JSON: a slot for each node, devices left out."""
    kind = type(value)
    if kind is _Slot:
        return {"n": f"\0{value.position}"}
    if kind is int or kind is bool or kind is str or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items()) if k != "device"}
    if isinstance(value, (int, str)):
        return value
    return repr(value) if isinstance(value, float) else str(value)
