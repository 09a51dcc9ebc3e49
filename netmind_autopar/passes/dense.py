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
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        ("native_group_norm", "default"),
        ("native_group_norm_backward", "default"),
        ("native_layer_norm_backward", "default"),
        ("_weight_norm_interface", "default"),
        ("_weight_norm_interface_backward", "default"),
        ("adaptive_max_pool3d_backward", "default"),
        ("fractional_max_pool2d_backward", "default"),
        ("fractional_max_pool3d_backward", "default"),
        ("linalg_matrix_exp", "default"),
        ("_pdist_forward", "default"),
        ("view_as_complex", "default"),
        ("view", "dtype"),
    )
}
FAMILIES = {"aten", "prims", "autopar"}  # ops of other libraries may read anything as if it were dense: eager mostly gives them so


def wants_dense(node: fx.Node) -> bool:
    return node.target in DENSE_ONLY or getattr(node.target, "namespace", "aten") not in FAMILIES


def make_dense(program: Program, context: Lowering) -> Program:
    """Put `contiguous` before every operand of the ops that want it: it copies only what is not dense already."""
    if not any(wants_dense(node) for node in program.graph.nodes):
        return program
    with program.edit() as new:
        for node in list(new.graph.nodes):
            if wants_dense(node):
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
