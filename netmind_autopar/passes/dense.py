"""Hand operands to the ops that read memory as if it were dense.

These ATen ops take any strides and compute something else, or fail, when an operand is not contiguous. Eager makes it so before it
calls them, and a capture sees whether that takes a copy; on a device the strides follow from the plan, so it must be done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..ir.program import Draft, Program, tensor_args
from ..ir.spec import Spec

if TYPE_CHECKING:
    from .pipeline import Lowering

_aten = torch.ops.aten
DENSE_ONLY = {
    _aten.native_group_norm.default,
    _aten.native_group_norm_backward.default,
    _aten.native_layer_norm_backward.default,
    _aten.view_as_complex.default,
    _aten.view.dtype,
}


def make_dense(program: Program, context: Lowering) -> Program:
    """Put `contiguous` before every operand of the ops in `DENSE_ONLY`: it copies only what is not dense already."""
    if not any(node.target in DENSE_ONLY for node in program.graph.nodes):
        return program
    with program.edit() as new:
        for node in list(new.graph.nodes):
            if node.target in DENSE_ONLY:
                _dense_operands(new, node)
    return new.program


def _dense_operands(new: Draft, node: fx.Node) -> None:
    made: dict[fx.Node, fx.Node] = {}
    for arg, spec in zip(tensor_args(node), new.expects[node.name], strict=True):
        if arg not in made and arg.meta["val"].dim():
            made[arg] = _dense(new, node, arg, spec)
    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))


def _dense(new: Draft, node: fx.Node, arg: fx.Node, spec: Spec) -> fx.Node:
    with new.graph.inserting_before(node):
        out = new.graph.create_node("call_function", _aten.contiguous.default, (arg,), name=f"{arg.name}_dense")
    out.meta = {"val": arg.meta["val"], **{key: node.meta.get(key) or "" for key in ("where", "module", "phase")}}
    new.specs[out.name], new.expects[out.name] = spec, (spec,)
    return out
