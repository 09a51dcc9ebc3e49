"""`autopar::grouped_mm`: rows sorted by group, each times the matrix of its group; the products of a mixture of experts.

    out[i] = x[i] @ w[g]        for ends[g - 1] <= i < ends[g]; rows after the last end give zeros

Rows and matrices may be blocks of the global ones: `row` is the global number of the first row here, `start` that of the first
matrix here; `ends` is always the global list. A row whose matrix is elsewhere gives zeros, so results of blocks of groups add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def _bounds(ends: Tensor, groups: int, rows: int, start: int, row: int) -> Tensor:
    """Local row numbers [groups + 1] at which the groups that are here begin and the last one ends."""
    local = (ends.long() - row).clamp(0, rows)
    return torch.cat([local.new_zeros(1), local])[start : start + groups + 1]


def _runs(bounds: Tensor) -> Iterator[tuple[int, slice]]:
    """(group, its rows) of groups that have rows. Waits for the device: the sizes are data."""
    edges = bounds.tolist()
    return ((g, slice(a, b)) for g, (a, b) in enumerate(itertools.pairwise(edges)) if b > a)


def _fused(x: Tensor, w: Tensor, ends: Tensor) -> bool:
    """Whether torch's own kernel takes these operands: all groups here, on a GPU, rows of whole 16 bytes."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or len(ends) != len(w):
        return False
    unit = 16 // x.element_size()
    return hasattr(torch.nn.functional, "grouped_mm") and x.shape[1] % unit == 0 and w.shape[2] % unit == 0


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor, start: int, row: int) -> Tensor:
    """x [s, k], w [e, k, n], integer ends [all groups] -> [s, n]."""
    bounds = _bounds(ends, len(w), len(x), start, row)
    if _fused(x, w, ends):
        out = torch.nn.functional.grouped_mm(x.contiguous(), w, offs=bounds[1:].int())
        return out.masked_fill_((torch.arange(len(x), device=x.device) >= bounds[-1]).unsqueeze(1), 0)
    out = x.new_zeros(len(x), w.shape[2])
    for group, rows in _runs(bounds):
        torch.mm(x[rows], w[group], out=out[rows])
    return out


def grouped_mm_backward(x: Tensor, grad: Tensor, ends: Tensor, groups: int, start: int, row: int) -> Tensor:
    """x [s, k], grad [s, n] -> the gradient of the matrices here, [groups, k, n]."""
    out = x.new_zeros(groups, x.shape[1], grad.shape[1])
    for group, rows in _runs(_bounds(ends, groups, len(x), start, row)):
        torch.mm(x[rows].t(), grad[rows], out=out[group])
    return out


@torch.library.custom_op("autopar::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor, start: int, row: int) -> Tensor:
    return grouped_mm(x, w, ends, start, row)


@_grouped_mm.register_fake
def _fake(x, w, ends, start, row):
    return x.new_empty((x.shape[0], w.shape[2]))


@torch.library.custom_op("autopar::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(x: Tensor, grad: Tensor, ends: Tensor, groups: int, start: int, row: int) -> Tensor:
    return grouped_mm_backward(x, grad, ends, groups, start, row)


@_grouped_mm_backward.register_fake
def _fake_backward(x, grad, ends, groups, start, row):
    return x.new_empty((groups, x.shape[1], grad.shape[1]))


def _setup(ctx, inputs, output):
    x, w, ends, ctx.start, ctx.row = inputs
    ctx.save_for_backward(x, w, ends)


def _backward(ctx, grad):
    x, w, ends = ctx.saved_tensors
    ops, (want_x, want_w, *_) = torch.ops.autopar, ctx.needs_input_grad
    dx = ops.grouped_mm.default(grad, w.transpose(1, 2), ends, ctx.start, ctx.row) if want_x else None
    dw = ops.grouped_mm_backward.default(x, grad, ends, len(w), ctx.start, ctx.row) if want_w else None
    return dx, dw, None, None, None


_grouped_mm.register_autograd(_backward, setup_context=_setup)

DIRECT = {torch.ops.autopar.grouped_mm.default: grouped_mm, torch.ops.autopar.grouped_mm_backward.default: grouped_mm_backward}
