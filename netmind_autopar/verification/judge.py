"""How far apart two tensors are, and how far apart they may be."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.mesh import coordinates
from ..ir.spec import Partial, Replicate, Spec, shard
from ..runtime.collectives import groups_along

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TOLERANCE |= {torch.complex128: 1e-9, torch.complex64: 1e-4}
VANISHING = 0.1  # times the tolerance: a gradient below this share of the step's largest is rounding noise, and judged against it
_REDUCE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error by which results of this dtype may differ; integers must be equal."""
    return TOLERANCE.get(dtype, 0.0)


def relative_error(want: Tensor, have: Tensor, largest: float = 0.0) -> float:
    """max |want − have| / max |want|; a `want` that vanishes beside `largest` is judged against that. Not a number fails."""
    if want.shape != have.shape or want.dtype != have.dtype:
        return float("inf")
    if not want.numel() or torch.equal(want, have):
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return float("inf")
    scale = magnitude(want)
    if scale < VANISHING * tolerance(want.dtype) * largest:
        scale = largest
    difference = distance(want, have)
    return difference / scale if scale else difference


def distance(want: Tensor, have: Tensor) -> float:
    """max |want − have|; infinities of the same sign in the same place do not differ."""
    difference = (want - have).abs()
    if not bool(torch.isfinite(want).all()):
        difference = torch.where(want == have, torch.zeros_like(difference), difference)
    return float(difference.max()) if difference.numel() else 0.0


def magnitude(tensor: Tensor) -> float:
    """The largest finite absolute value."""
    if not tensor.numel() or tensor.dtype == torch.bool:
        return 0.0
    size = tensor.abs()
    return float(size.max()) if bool(torch.isfinite(size).all()) else float(torch.nan_to_num(size, 0.0, 0.0, 0.0).max())


def wholes(parts: Sequence[Tensor], spec: Spec, sizes: tuple[int, ...]) -> tuple[list[Tensor], Spec]:
    """Local tensors of all ranks with their terms combined, and the spec they then have: every rank can be judged by itself."""
    parts = list(parts)
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Partial):
            for members in groups_along(axis, sizes):
                total = functools.reduce(_REDUCE[placement.op], [parts[r] for r in members])
                for r in members:
                    parts[r] = total
    return parts, spec.with_placements(Replicate() if isinstance(p, Partial) else p for p in spec.placements)


def rank_errors(want: Tensor, parts: Sequence[Tensor], spec: Spec, sizes: tuple[int, ...], largest: float = 0.0) -> list[float]:
    """One relative error per rank: its piece against the piece of `want` that it ought to hold, on the scale of all of `want`."""
    parts, spec = wholes(parts, spec, sizes)
    if want.shape != spec.shape:
        return [float("inf")] * len(parts)
    scale = max(magnitude(want), largest if magnitude(want) < VANISHING * tolerance(want.dtype) * largest else 0.0)
    out = []
    for part, coord in zip(parts, coordinates(sizes), strict=True):
        piece = shard(want, spec, sizes, coord)
        error = relative_error(piece, part)
        if 0 < error < float("inf"):
            error = distance(piece, part) / scale if scale else distance(piece, part)
        out.append(error)
    return out


def worst(errors: Sequence[float]) -> float:
    """The largest error; one that is not a number is the worst of all."""
    return next((e for e in errors if e != e), max(errors, default=0.0))
