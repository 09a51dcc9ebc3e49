"""A Program from the joint graph as torch traces it: its ends named, its nodes cleaned, placed and named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.errors import CaptureError
from ..ir.program import Input, Output, Program, Signature, Unfused
from . import clean
from .normalize import refuse_random
from .signature import Call, Selection


@dataclass
class Traced:
    """The joint graph with the meaning of its ends, see `joint.Joint`. The first input is the seed."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    ins: list[tuple]
    outs: list[tuple]
    fused: bool = False
    unfused: tuple[Unfused, ...] = ()


def assemble(traced: Traced, prefix: str, call: Call, selection: Selection, tied: dict[str, str], mode: str = "training") -> Program:
    """Name the ends, clean the graph, write `val`, `where`, `module` and `phase` on every node."""
    nodes = list(traced.graph.nodes)
    for node in nodes:
        node.meta.update(_origin(node))
        if node.op == "get_attr":
            node.meta["val"] = traced.constants[node.target]
    names = _Names(prefix, [path for path, _ in call.leaves], selection.paths, mode)
    results = [(node, names.output(end)) for node, end in zip(nodes[-1].args[0], traced.outs, strict=True) if isinstance(node, fx.Node)]
    results.sort(key=lambda pair: ("output", "mutation", "grad").index(pair[1][0]))
    nodes[-1].args = (tuple(node for node, _ in results),)
    ends = {n.name: names.input(end) for n, end in zip((n for n in nodes if n.op == "placeholder"), traced.ins, strict=True)}
    seed = next(n for n in nodes if n.op == "placeholder" and ends[n.name][0] == "seed")

    graph = clean.simplify(traced.graph)
    clean.set_phases(graph, [node for node, (role, *_) in zip(_results(graph), (end for _, end in results), strict=True) if role != "grad"])
    clean.fill_origins(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name == seed.name and not node.users:
            graph.erase_node(node)
    for node in graph.nodes:  # what normalize could not see: ops that torch's own composite ops call
        refuse_random(node, node.meta.get("where"))
    titles = {n: title(*ends[n.name]) for n in graph.nodes if n.op == "placeholder"}
    old = [n for n in graph.nodes if n.op == "placeholder"]
    graph = clean.rename(graph, titles)
    new = [n for n in graph.nodes if n.op == "placeholder"]
    inputs = tuple(Input(n.name, *ends[o.name]) for n, o in zip(new, old, strict=True))
    outputs = tuple(Output(n.name, *end) for n, (_, end) in zip(_results(graph), results, strict=True))
    constants = {n.target: traced.constants[n.target] for n in graph.nodes if n.op == "get_attr"}
    signature = Signature(call.pack, selection.unpack, call.arguments)
    return Program(graph, inputs, outputs, signature, constants, tied, mode=mode, fused=traced.fused, unfused=traced.unfused)


def _results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    return next(n for n in reversed(graph.nodes) if n.op == "output").args[0]


def _origin(node: fx.Node) -> dict[str, Any]:
    """Line, module and phase; None where torch does not say."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    backward = node.meta.get("partitioner_tag") == "is_backward" or bool(node.meta.get("autograd_backward"))
    line = (node.meta.get("stack_trace") or "").partition("Gradient addition node")[0]
    return {
        "where": line if line and "\n" not in line else None,
        "module": next(iter(stack.values()))[0] if stack else None,
        "phase": "backward" if backward else "forward",
    }


def title(role: str, name: str, index: int) -> str:
    """The name of a placeholder's node, before it is made unique."""
    return clean.identifier(f"tangent_{name}" if role == "tangent" else name)


@dataclass
class _Names:
    """Turns torch's ends into (role, name, index)."""

    prefix: str
    leaves: list[str]
    outputs: tuple[str, ...]
    mode: str

    def input(self, end: tuple) -> tuple[str, str, int]:
        kind, what = end
        if kind in ("param", "buffer"):
            return kind, self._qualified(what), -1
        if kind == "input":
            return ("seed", "seed", -1) if what == 0 else ("input", self.leaves[what - 1], what - 1)
        if kind == "tangent" and isinstance(what, int):
            return "tangent", self.outputs[what], what
        raise CaptureError(
            f"the traced graph takes something unexpected: {end}",
            why="a differentiable result of the model is no output of it",
            try_="clone the outputs of the model, and do not let it write into its inputs or parameters",
        )

    def output(self, end: tuple) -> tuple[str, str, int]:
        if end[0] == "output":
            return "output", self.outputs[end[1]], end[1]
        if end[0] == "mutation" and end[1] == "buffer":
            return "mutation", self._qualified(end[2]), -1
        if end[0] == "grad":
            return "grad", *self.input(end[1:])[1:]
        if end[:2] == ("mutation", "input") and self.mode == "inference" and end[2]:
            return "mutation", *self.input(end[1:])[1:]
        what = self.leaves[end[2] - 1] if end[1] == "input" else self._qualified(end[2]) if end[1] == "param" else str(end)
        raise CaptureError(
            "the model writes into what it was given",
            where=what,
            why="inputs and parameters are shared between devices",
            try_='clone the tensor before writing into it, or register it as a buffer; a cache may be written into with mode="inference"',
        )

    def _qualified(self, name: str) -> str:
        return name.removeprefix(self.prefix + ".")
