"""Which differentiable outputs each gradient depends on: a parameter that only another loss uses has no gradient, as in eager mode."""

from __future__ import annotations

from torch import fx

from ..ir.program import Program, is_getitem, tensor_args
from .collectives import BUCKETS, sender


def reached(program: Program) -> tuple[frozenset[int], ...]:
    """For each result of role "grad", in order, the positions of the outputs whose gradient enters into it.

    A gradient that none enters (of a parameter whose part in every output is constant) depends on all: it is zero, not missing.
    """
    tangents = {i.node: i.index for i in program.inputs if i.role == "tangent"}
    behind: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            behind[node] = frozenset({tangents[node.name]} if node.name in tangents else ())
        elif is_getitem(node) and sender(node.args[0]).target in BUCKETS:  # what travels together is still told apart
            behind[node] = behind[sender(node.args[0]).args[0][node.args[1]]]
        else:
            behind[node] = frozenset().union(*(behind[n] for n in node.all_input_nodes))
    ends = tensor_args(next(n for n in program.graph.nodes if n.op == "output"))
    every = frozenset(tangents.values())
    return tuple(behind[end] or every for end, out in zip(ends, program.outputs, strict=True) if out.role == "grad")
