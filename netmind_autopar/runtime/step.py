"""One training step of the emitted code as a single autograd node; autograd never sees a collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ir.errors import AutoparError, InputError
from ..ir.spec import local_shape, shard
from .dtensors import as_dtensor, owned, torch_placements
from .stowed import beside

if TYPE_CHECKING:
    from .graph import Graph
    from .module import ParallelModule


class Step(torch.autograd.Function):
    """One training step of the emitted code as a single autograd node; autograd never sees a collective."""

    @staticmethod
    def forward(ctx: Any, pm: ParallelModule, graph: Graph, *owners: Tensor) -> tuple[Tensor, ...]:
        roles, place = graph.roles, graph.place
        ctx.set_materialize_grads(False)
        locals_ = graph.locals(owners)
        ctx.pm, ctx.graph, ctx.held_back = pm, graph, pm._waiting.depth > 0  # where forward runs decides, as with DDP
        training = any(ctx.needs_input_grad)
        ctx.kind = kind = pm._waiting.kind(graph) if training else "inference"
        saved: list[Any] = []
        if not training:
            values = graph.infer(locals_)
        elif graph.executable.turns > 1:  # all of the step but the factor that only backward knows
            ones = [torch.ones((), dtype=spec.dtype, device=place.device) for _, spec in roles.tangents]
            run = graph.bind(kind).step if kind == "whole" else graph.bind(kind).sums
            made, ctx.sums = run(locals_, ones)
            values = list(made)
        else:
            values, saved = map(list, graph.bind(kind)[0](*locals_))
        graph.keep_from_changing(kind, [locals_[k] for k in roles.changed], values, saved)
        if training:
            ctx.saved = saved
            ctx.owners = [t for item, t in zip(roles.leading, owners, strict=True) if item.role in ("param", "input")]
            ctx.versions = [(t, t._version) for t in (*ctx.owners, *saved) if isinstance(t, Tensor)]  # others wait elsewhere
        out: list[Tensor] = []
        for end, spec, value in zip(roles.results, roles.result_specs, values, strict=True):
            if end.role == "output" and spec.shape:
                value = as_dtensor(value, graph.mesh, torch_placements(spec), spec.shape)
            elif any(value is t for t in (*owners, *out)):  # each result is a tensor of its own: a loss may also be a new buffer
                value = value.clone()
            out.append(value)
        ctx.mark_non_differentiable(
            *[v for v, o in zip(out, roles.results, strict=True) if o.role == "mutation" or not v.is_floating_point()]
        )
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graph, roles = ctx.graph, ctx.graph.roles
        if ctx.saved is None:
            raise AutoparError(
                "backward was called twice on one forward",
                why="what forward saved is freed as backward uses it",
                try_="run the forward again, or add the losses up and call backward once",
            )
        if any(t._version != version for t, version in ctx.versions):
            raise AutoparError(
                "a parameter, an input or an output was changed in place between forward and backward",
                why="backward needs the values that forward had",
                try_="call optimizer.step() after backward(), and write loss = loss / n instead of loss /= n",
            )
        tangents = _tangents(graph, grads)
        given = [*tangents, *(t._local_tensor if isinstance(t, DTensor) else t for t in ctx.owners)]
        saved, ctx.saved, ctx.versions, ctx.owners = ctx.saved, None, None, ()
        arrived = {o.index for o, g in zip(roles.results, grads, strict=True) if o.role == "output" and g is not None}
        results, reached = _gradients(ctx, saved, tangents, arrived)
        out: list[Tensor | None] = [None] * len(roles.leading)
        complete = [(slot, r) for slot, r in zip(roles.grad_slots, reached, strict=True) if r is not None]
        for (slot, there), grad in zip(complete, owned(results, given), strict=True):
            if there:
                item, made = roles.leading[slot], graph.gradient(slot, grad)
                out[slot] = beside(ctx.pm.get_parameter(item.name), made) if item.role == "param" else made
        return (None, None, *out)


def _gradients(ctx: Any, saved: list[Any], tangents: list[Tensor], arrived: set[int]) -> tuple[Sequence[Tensor], list[bool | None]]:
    """The gradients that are complete, local; and for each of all gradients whether something reaches it, None where it waits."""
    graph, waiting = ctx.graph, ctx.pm._waiting
    sums: list[Tensor] = list(getattr(ctx, "sums", ()))
    ctx.sums = ()
    if sums:
        torch._foreach_mul_(sums, tangents[0])
    if ctx.kind == "whole":
        results = sums if graph.executable.turns > 1 else graph.bind("whole")[1](saved, *tangents)
        reached: list[bool | None] = [bool(behind & arrived) for behind in graph.roles.reached]
    elif ctx.kind == "closing":
        results, reached = waiting.close(graph, saved, tangents, arrived)
    else:
        results, reached = waiting.keep(ctx.pm, graph, saved, tangents, arrived, sums, last=not ctx.held_back)
    if not ctx.held_back:
        waiting.reduce(ctx.pm)
    return results, reached


def _tangents(graph: Graph, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Local gradients of the differentiable outputs, zeros where none arrived. Raises InputError for any other output."""
    roles, place = graph.roles, graph.place
    arrived = {o.index: g for o, g in zip(roles.results, grads, strict=True) if o.role == "output" and g is not None}
    planned = {item.index for item, _ in roles.tangents}
    for o in roles.results:
        if o.role == "output" and o.index in arrived and o.index not in planned:
            names = [*(r.name for r in roles.results if r.role == "output" and r.index in planned), o.name]
            raise InputError(
                f"a gradient arrived at the output {o.name!r}, for which no backward was planned",
                why="backward is planned for the loss alone unless asked otherwise",
                try_=f"autoparallelize(..., differentiable={tuple(names)!r})",
            )
    out: list[Tensor] = []
    for item, spec in roles.tangents:
        grad = arrived.get(item.index)
        if grad is None:
            grad = torch.zeros(local_shape(spec, place.sizes, place.coord), dtype=spec.dtype, device=place.device)
        elif isinstance(grad, DTensor):
            grad = grad.redistribute(graph.mesh, torch_placements(spec)).to_local()
        elif spec.shape:
            grad = shard(grad, spec, place.sizes, place.coord)
        out.append(grad.contiguous())
    return out
