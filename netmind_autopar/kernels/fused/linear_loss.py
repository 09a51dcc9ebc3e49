"""Projection and cross-entropy in chunks of rows: `autopar::linear_cross_entropy(x, weight, target, ignore_index, smoothing, chunk)`.

    loss_i, lse_i of the logits x weight^T, of which no more than `chunk` rows exist at a time

x [n, d], weight [c, d], target [n] -> (loss [n] in float32, lse [n] in float64). Backward makes each chunk's logits again
(Liger-Kernel, Hsu et al., arXiv:2410.10989, section 3, makes their gradient in forward and keeps that instead):

    z = x_k weight^T    dz = `cross_entropy_backward`    dx_k = dz weight    dweight += dz^T x_k, added up in float32

It saves x, weight and [n] numbers: 2 c bytes a row less in 16 bit than with the logits, and their gradient as much again; it costs 2 n c d
flops more. Matrix products are cuBLAS's, the rest the kernels of `cross_entropy.py`: 2 bytes per logit forward, 4 backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import loss
from .checks import floating, refuse, show, wide
from .cross_entropy_ops import _check as check_labels
from .cross_entropy_ops import cross_entropy


def _chunks(n: int, chunk: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk, n)) for i in range(0, n, chunk))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, smoothing: float, chunk: int
) -> tuple[Tensor, Tensor]:
    _check(x, weight, target, chunk)
    parts = [cross_entropy(x[rows] @ weight.T, target[rows], ignore_index, smoothing) for rows in _chunks(x.shape[0], chunk)]
    if not parts:
        return x.new_empty(0, dtype=wide(x.dtype)), x.new_empty(0, dtype=torch.float64)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, hard: float, even: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """grad [n], 0 where the label is ignored -> (dx, dweight)."""
    _check(x, weight, target, chunk)
    dx, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros(weight.shape, dtype=wide(x.dtype), device=x.device)
    for rows in _chunks(x.shape[0], chunk):
        logits = x[rows] @ weight.T
        dz = loss.cross_entropy_backward(grad[rows].contiguous(), logits, target[rows], lse[rows], 0, hard, even)
        dx[rows] = dz @ weight
        total += dz.T @ x[rows]
    return dx, total.to(weight.dtype)


def _check(x: Tensor, weight: Tensor, target: Tensor, chunk: int) -> None:
    op = "linear_cross_entropy"
    floating(op, x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype or not weight.shape[0]:
        raise refuse(op, f"x is {show(x)}, weight {show(weight)}", "it takes [rows, d] and [classes, d] of one dtype")
    check_labels(op, weight[:1, :1].expand(x.shape[0], 1), target)
    if chunk < 1:
        raise refuse(op, f"chunks of {chunk} rows", "a chunk has at least one row")


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, smoothing: float, chunk: int
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(x, weight, target, ignore_index, smoothing, chunk)


@torch.library.custom_op("autopar::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, hard: float, even: float, chunk: int
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy_backward(grad, x, weight, target, lse, hard, even, chunk)


@_linear_cross_entropy.register_fake
def _(x, weight, target, ignore_index, smoothing, chunk):
    _check(x, weight, target, chunk)
    return x.new_empty(x.shape[:1], dtype=wide(x.dtype)), x.new_empty(x.shape[:1], dtype=torch.float64)


@_linear_cross_entropy_backward.register_fake
def _(grad, x, weight, target, lse, hard, even, chunk):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, target, ctx.ignore_index, ctx.smoothing, ctx.chunk = inputs
    ctx.save_for_backward(x, weight, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derive(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None, None
    x, weight, target, lse = ctx.saved_tensors
    grad = grad.masked_fill(target == ctx.ignore_index, 0)
    hard, even = 1.0 - ctx.smoothing, ctx.smoothing / weight.shape[0]
    dx, dweight = _own.linear_cross_entropy_backward.default(grad, x, weight, target, lse, hard, even, ctx.chunk)
    return dx, dweight, None, None, None, None


_linear_cross_entropy.register_autograd(_derive, setup_context=_setup)

_own = torch.ops.autopar
DIRECT = {
    _own.linear_cross_entropy.default: linear_cross_entropy,
    _own.linear_cross_entropy_backward.default: linear_cross_entropy_backward,
}
