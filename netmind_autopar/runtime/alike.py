"""Values that must be equal on several ranks, compared now and then: the batch, the loss, and parameters where devices hold the same piece.

Nothing of this is noticed by itself: replicas that drift apart (a rank that reads other data, broken memory, a parameter that is written
into on one rank) train on without an error. A fingerprint is the sum of a tensor's bits: one pass over memory, one number per tensor.
That a value is nan on all ranks is no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..ir.errors import DivergedRankError, InputError
from .agree import exchange

if TYPE_CHECKING:
    from .module import ParallelModule

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAN = "nan"
MEETING = "the comparison of values (check_every)"


def compare_every(pm: ParallelModule, steps: int) -> None:
    """Compare behind every so many forward calls that train; never with 0. Raises InputError for a number that is none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"check_every={steps!r} is no number of steps", try_="check_every=100, or 0 for never")
    if steps and dist.is_initialized() and dist.get_world_size() > 1:
        pm.register_forward_hook(_Every(steps), with_kwargs=True)


class _Every:
    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, pm: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if pm.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls % self.steps == 0:
                compare(pm, (args, kwargs), result)


@torch.no_grad()
def compare(pm: ParallelModule, batch: Any, result: Any) -> None:
    """Raises DivergedRankError on every rank when anything differs that must not. Call it on all ranks alike."""
    mine: dict[str, tuple[str, Tensor]] = {}
    if pm.plan.inputs == "global":
        mine |= {f"tensor {i} of the batch": ("", t) for i, t in enumerate(_plain(batch))}
    mine |= {f"result {i}": ("", t) for i, t in enumerate(_plain(result)) if not t.dim()}
    mine |= {name: (_piece(p), _local(p)) for name, p in pm.named_parameters()}
    mine |= {name: ("", b) for name, b in pm.named_buffers()}
    prints = fingerprints([t for _, t in mine.values()])
    given = {name: (piece, found) for (name, (piece, _)), found in zip(mine.items(), prints, strict=True)}
    all_of = exchange(MEETING, given)
    for name in given:
        by_piece: dict[str, tuple[int, Any]] = {}
        for rank, of in enumerate(all_of):
            piece, found = of.get(name, ("", None))
            first, want = by_piece.setdefault(piece, (rank, found))
            if found != want:
                raise _diverged(name, rank, first, all_of)


def fingerprints(tensors: list[Tensor]) -> list[Any]:
    """Of each tensor the sum of its bits as integers, or "nan" when it holds one."""
    found: list[Any] = [0] * len(tensors)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, t in enumerate(tensors):
        flat = t.detach().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        bits = flat.contiguous().view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
        odd = flat.isnan().any() if flat.is_floating_point() else torch.zeros((), dtype=torch.bool, device=flat.device)
        by_device.setdefault(flat.device, []).append((i, torch.stack([bits, odd.to(torch.int64)])))
    for pairs in by_device.values():  # one way to the host for each device
        for (i, _), (bits, odd) in zip(pairs, torch.stack([t for _, t in pairs]).tolist(), strict=True):
            found[i] = NAN if odd else bits
    return found


def _diverged(name: str, rank: int, first: int, all_of: list[Mapping[str, Any]]) -> DivergedRankError:
    differ = sum(len({str(of[n][1]) for of in (all_of[rank], all_of[first])}) > 1 for n in all_of[rank] if n in all_of[first])
    return DivergedRankError(
        f"{name} is not the same on rank {rank} as on rank {first}",
        where=f"{differ} of {len(all_of[rank])} values that were compared differ between these two",
        why="both must hold the same: a rank read other data, or changed a value by itself",
        try_="give all ranks the same batch (or inputs='local'), and change parameters on all ranks alike",
        rank=rank,
        collective=MEETING,
    )


def _plain(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor) and not isinstance(t, DTensor)]


def _local(p: Tensor) -> Tensor:
    return p._local_tensor if isinstance(p, DTensor) else p


def _piece(p: Tensor) -> str:
    """Which piece of a parameter lies here: the coordinates along the axes that split it."""
    if not isinstance(p, DTensor):
        return ""
    coord = p.device_mesh.get_coordinate() or []
    return str([at for at, placement in zip(coord, p.placements, strict=True) if not isinstance(placement, Replicate)])
