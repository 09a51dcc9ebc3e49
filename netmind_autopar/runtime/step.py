"""One training step of the emitted code as a single autograd node; autograd never sees a collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ir.errors import AutoparError, InputError
from ..ir.spec import local_shape, shard
from .dtensors import as_dtensor, torch_placements
from .place import load

if TYPE_CHECKING:
    from .module import ParallelModule


class Step(torch.autograd.Function):
    """One training step of the emitted code as a single autograd node; autograd never sees a collective."""

    @staticmethod
    def forward(ctx: Any, pm: ParallelModule, *owners: Tensor) -> tuple[Tensor, ...]:
        roles, place = pm._roles, pm._place
        ctx.set_materialize_grads(False)
        locals_ = [t._local_tensor if isinstance(t, DTensor) else t for t in owners]
        ctx.pm = pm
        training = any(ctx.needs_input_grad)
        if not training and pm._infer is None:
            source = pm._executable.inference_source()
            pm._infer = load(source, place, "inference") if pm._turns is None else pm._in_turns(source, inference=True).infer
        if training and pm._turns:  # all of the step but the factor that only backward knows
            ones = [torch.ones((), dtype=spec.dtype, device=place.device) for _, spec in roles.tangents]
            values, ctx.gradients = pm._turns.step(locals_, ones)
            saved: Any = []
        else:
            values, saved = (pm._forward if training else pm._infer)(*locals_)  # type: ignore[misc]
        values, saved = list(values), list(saved)
        pm._keep_from_changing([locals_[k] for k in roles.changed], values, saved)
        if training:
            ctx.saved = saved
            ctx.owners = [t for item, t in zip(roles.leading, owners, strict=True) if item.role in ("param", "input")]
            ctx.versions = [(t, t._version) for t in (*ctx.owners, *saved) if isinstance(t, Tensor)]  # others wait elsewhere
        out: list[Tensor] = []
        for end, spec, value in zip(roles.results, roles.result_specs, values, strict=True):
            if end.role == "output" and spec.shape:
                value = as_dtensor(value, pm._mesh, torch_placements(spec), spec.shape)
            elif any(value is t for t in (*owners, *out)):  # each result is a tensor of its own: a loss may also be a new buffer
                value = value.clone()
            out.append(value)
        ctx.mark_non_differentiable(
            *[v for v, o in zip(out, roles.results, strict=True) if o.role == "mutation" or not v.is_floating_point()]
        )
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pm, roles = ctx.pm, ctx.pm._roles
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
        tangents = _tangents(pm, grads)
        given = [*tangents, *(t._local_tensor if isinstance(t, DTensor) else t for t in ctx.owners)]
        saved, ctx.saved, ctx.versions, ctx.owners = ctx.saved, None, None, ()
        if pm._turns:
            results, ctx.gradients = owned(ctx.gradients, given), ()
            torch._foreach_mul_(results, tangents[0])
        else:
            results = owned(pm._backward(saved, *tangents), given)
        out: list[Tensor | None] = [None] * len(roles.leading)
        arrived = {o.index for o, g in zip(roles.results, grads, strict=True) if o.role == "output" and g is not None}
        for slot, grad, behind in zip(roles.grad_slots, results, roles.reached, strict=True):
            if not behind & arrived:
                continue
            item, spec = roles.leading[slot], roles.leading_specs[slot]
            out[slot] = as_dtensor(grad, pm._mesh, torch_placements(spec), spec.shape) if item.role == "param" else grad
        return (None, *out)


def _tangents(pm: ParallelModule, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Local gradients of the differentiable outputs, zeros where none arrived. Raises InputError for any other output."""
    roles, place = pm._roles, pm._place
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
            grad = grad.redistribute(pm._mesh, torch_placements(spec)).to_local()
        elif spec.shape:
            grad = shard(grad, spec, place.sizes, place.coord)
        out.append(grad.contiguous())
    return out


def owned(grads: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that may be written into, as clipping and accumulation do: dense, and no memory shared with another or with `given`."""
    foreign = {t.untyped_storage().data_ptr() for t in given}
    taken: dict[int, list[tuple[int, int]]] = {}
    out: list[Tensor] = []
    for grad in grads:
        memory, start = grad.untyped_storage().data_ptr(), grad.storage_offset()
        pieces, end = taken.setdefault(memory, []), start + grad.numel()
        if not grad.is_contiguous() or memory in foreign or any(start < b and a < end for a, b in pieces):
            grad = grad.clone(memory_format=torch.contiguous_format)
        else:
            pieces.append((start, end))
        out.append(grad)
    return out
