"""Which gradients must not be summed over devices before they are cast: a policy of precision says in which dtype they are."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.program import Program, source, tensor_args, values

_aten = torch.ops.aten
# What lies between the product that makes a gradient and the parameter it is for: linear, and as right on terms as on their sum.
_NAMES = "_to_copy view _unsafe_view reshape t transpose permute expand unsqueeze squeeze clone add neg slice_backward"
_ON_THE_WAY = {getattr(_aten, name) for name in _NAMES.split()}


def cast_first(program: Program) -> frozenset[tuple[str, int]]:
    """Values of fewer bits, as (producer, output index), that become gradients of parameters: with `reduce="float32"` their terms are
    cast before they are summed, so that only rounding of each device's own part is left."""
    if program.precision is None or program.precision.reduce != "float32":
        return frozenset()
    nodes = {node.name: node for node in program.graph.nodes}
    stack = [nodes[o.node] for o in program.outputs if o.role == "grad" and o.index < 0]
    seen: set[fx.Node] = set()
    found = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        producer, index = source(node)
        value = values(producer)[index]
        if value is not None and value.dtype is program.precision.dtype:
            found.add((producer.name, index))
        if isinstance(producer.target, torch._ops.OpOverload) and producer.target.overloadpacket in _ON_THE_WAY:
            stack += tensor_args(producer)
    return frozenset(found)
