"""Running a plan that was made for inference: forward alone, no autograd, and inputs that the model writes into.

What the model writes into an input (a cache of keys and values) is written into the caller's tensor, as in eager mode: into
a DTensor without communication when it lies as the plan has it, into a plain tensor after gathering. Where the model returns that
input, a DTensor comes back as the very tensor that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ir.errors import InputError
from ..ir.program import Output
from ..ir.spec import Spec, local_shape, shard
from .dtensors import as_dtensor, torch_placements

if TYPE_CHECKING:
    from .graph import Graph
    from .module import ParallelModule


def run(pm: ParallelModule, graph: Graph, given: Sequence[Any]) -> list[Any]:
    """The output leaves of one call with these tensors; buffers and written inputs are brought up to date."""
    roles = graph.roles
    with torch.no_grad():
        tensors = pm._user_inputs(graph, given)
        owners = [pm._tensor_of(item, tensors) for item in roles.leading]
        locals_ = graph.locals(owners)
        values = graph.infer(locals_)
        graph.keep_from_changing("inference", [locals_[k] for k in roles.changed], values, [])
        leaves: list[Any] = [None] * roles.leaves
        written = {o.node: given[o.index] for o in roles.results if o.role == "mutation" and o.index >= 0}
        fresh = [_result(graph, o, s, v, locals_) for o, s, v in zip(roles.results, roles.result_specs, values, strict=True)]
        for out, spec, value in zip(roles.results, roles.result_specs, fresh, strict=True):
            if out.role == "output":
                target = written.get(out.node)
                leaves[out.index] = target if isinstance(target, DTensor) and not pm._gather else value
            elif out.index < 0:
                pm.get_buffer(out.name).copy_(value)
            else:
                _write(graph, given[out.index], spec, value)
    if torch.is_grad_enabled() and any(p.requires_grad for p in pm.parameters()):
        leaves = _refusing(leaves, roles.results, written)
    return leaves


def _result(graph: Graph, out: Output, spec: Spec, value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """A result as a tensor of its own; outputs of one dim or more as the plan leaves them."""
    memory = value.untyped_storage().data_ptr()
    if out.role == "output" and any(memory == t.untyped_storage().data_ptr() for t in inputs if t.numel()):
        value = value.clone()
    return as_dtensor(value, graph.mesh, torch_placements(spec), spec.shape) if out.role == "output" and spec.shape else value


def _write(graph: Graph, target: Tensor, spec: Spec, value: Tensor) -> None:
    """The new value of an input into the caller's tensor; `value` lies as the plan has the input."""
    if isinstance(target, DTensor):
        new = as_dtensor(value, graph.mesh, torch_placements(spec), spec.shape)
        target._local_tensor.copy_(new.redistribute(graph.mesh, target.placements)._local_tensor)
    else:
        target.copy_(value)


def shard_inputs(graph: Graph, given: Sequence[Tensor]) -> list[DTensor]:
    """The tensors of a call, whole on every device, as DTensors that lie as the plan has them."""
    out = []
    place = graph.place
    for item, spec, value in zip(graph.roles.users, graph.roles.user_specs, given, strict=True):
        if isinstance(value, DTensor):
            out.append(value.redistribute(graph.mesh, torch_placements(spec)))
            continue
        if tuple(value.shape) != spec.shape:
            raise InputError(
                f"the input {item.name!r} has the shape {tuple(value.shape)}, the plan was made for {spec.shape}",
                why="whole tensors are given here, the same on every device",
                try_="pass the global tensor",
            )
        local = shard(value.to(place.device), spec, place.sizes, place.coord).clone()
        assert tuple(local.shape) == local_shape(spec, place.sizes, place.coord)
        out.append(as_dtensor(local, graph.mesh, torch_placements(spec), spec.shape))
    return out


class _Refuse(torch.autograd.Function):
    """Results that say what is wrong when backward reaches them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(v.view_as(v) for v in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise InputError(
            "backward was called on a result of a plan for inference",
            why="forward alone was captured and nothing was kept for a backward",
            try_='autoparallelize(..., mode="training"), or run inference under torch.no_grad()',
        )


def _refusing(leaves: list[Any], results: Sequence[Output], written: dict[str, Tensor]) -> list[Any]:
    """With autograd on, float results carry a gradient function as eager's do; this one explains itself."""
    chosen = [o.index for o in results if o.role == "output" and o.node not in written and leaves[o.index].is_floating_point()]
    if chosen:
        anchor = torch.zeros((), requires_grad=True)
        for index, value in zip(chosen, _Refuse.apply(anchor, *(leaves[i] for i in chosen)), strict=True):
            leaves[index] = value
    return leaves
