"""Between a plan's layouts and torch's own DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard

from ..ir.spec import Partial, Shard, Spec


def torch_placements(spec: Spec) -> list[Any]:
    """The placements of a plain Spec in torch's own terms."""
    table = {Shard: lambda p: TorchShard(p.dim), Partial: lambda p: TorchPartial(p.op)}
    return [table.get(type(p), lambda _: TorchReplicate())(p) for p in spec.placements]


def as_dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: Sequence[int]) -> DTensor:
    """A DTensor around a local tensor, without communication. It lies where the local tensor does, if that is the device's host there."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    elsewhere = local.device.type not in (mesh.device_type, "meta")  # `from_local` would bring it
    inner = local.new_empty(local.shape, device="meta") if elsewhere else local.detach()
    made = DTensor.from_local(inner, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return DTensor(local.detach(), made._spec, requires_grad=False) if elsewhere else made


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
