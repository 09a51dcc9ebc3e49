"""Norms of tensors that are split over devices: local sums of powers, each piece counted once, and one all-reduce per mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..ir.errors import AutoparError
from .agree import collective

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


def local_of(t: Any) -> Tensor:
    """This device's piece of a DTensor; a plain tensor itself."""
    return t._local_tensor if isinstance(t, DTensor) else t


def sums_over_meshes(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Σ x² over the whole of each x, 0-dim, float32 or float64. pairs: (a tensor that says how x lies, x or its local piece)."""
    out = [_square(local_of(x)) for _, x in pairs]
    for mesh, members in _by_mesh([like for like, _ in pairs]).items():
        here = [out[i].double() if counts_here(pairs[i][0]) else out[i].new_zeros((), dtype=torch.float64) for i in members]
        parts = torch.stack(here)
        for i, total in zip(members, reduced(parts, mesh, SUM).unbind(), strict=True):
            out[i] = total.to(out[i].dtype)
    return out


def _square(x: Tensor) -> Tensor:
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.linalg.vector_norm(wide).square()


def counts_here(like: Any) -> bool:
    """Whether this device's piece is the one that counts, of the equal ones along axes over which a tensor is whole."""
    coord = like.device_mesh.get_coordinate()
    return all(at == 0 for at, placement in zip(coord, like.placements, strict=True) if isinstance(placement, Replicate))


def _by_mesh(tensors: Iterable[Tensor]) -> dict[DeviceMesh, list[int]]:
    found: dict[DeviceMesh, list[int]] = {}
    for i, t in enumerate(tensors):
        if isinstance(t, DTensor):
            found.setdefault(t.device_mesh, []).append(i)
    return found


def reduced(x: Tensor, mesh: DeviceMesh, op: Any) -> Tensor:
    """x reduced over all devices of a mesh: in one collective where these are all processes, else axis by axis."""
    if mesh.size() == dist.get_world_size():
        if mesh.size() > 1:
            collective("a norm over all devices", lambda: dist.all_reduce(x, op=op))
        return x
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            collective(f"a norm over axis {axis}", functools.partial(dist.all_reduce, x, op=op, group=mesh.get_group(axis)))
    return x


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of all elements of all gradients, as if one device had them; the same bits on every device."""
    if not gradients:
        return torch.zeros(())
    device = local_of(gradients[0]).device
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    total = torch.zeros((), dtype=wide, device=device)
    infinite = math.isinf(norm_type)
    parts: dict[DeviceMesh | None, list[Tensor]] = {}
    for g in gradients:
        mesh = g.device_mesh if isinstance(g, DTensor) else None
        here = parts.setdefault(mesh, [])
        if (mesh is None or counts_here(g)) and local_of(g).numel():
            here.append(local_of(g))
    for mesh, here in parts.items():
        norms = torch._foreach_norm(here, norm_type) if here else []
        stacked = torch.stack([n.to(device, wide) for n in norms]) if norms else torch.zeros(1, dtype=wide, device=device)
        part = stacked.max() if infinite else stacked.pow(norm_type).sum()
        part = part if mesh is None else reduced(part, mesh, MAX if infinite else SUM)
        total = torch.maximum(total, part) if infinite else total + part
    return total if infinite else total.pow(1.0 / norm_type)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients so that their norm together is at most `max_norm`; the norm before. As torch.nn.utils.clip_grad_norm_."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients, float(norm_type))
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise AutoparError(f"the norm of the gradients is {float(norm)}", try_="look for what overflowed, or error_if_nonfinite=False")
    scale = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in gradients:
        by_dtype.setdefault(g.dtype, []).append(local_of(g))
    for dtype, locals_ in by_dtype.items():
        torch._foreach_mul_(locals_, scale.to(dtype))
    written(gradients)
    return norm


def written(tensors: Iterable[Tensor]) -> None:
    """Note that the local pieces of these DTensors were written into: who checks versions sees it."""
    torch.autograd.graph.increment_version([t for t in tensors if isinstance(t, DTensor)])
