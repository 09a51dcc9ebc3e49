"""Losses before autograd: rewritten so that a split batch, or split classes, give the loss of all of them.

Functions that `normalize.TABLE` calls in place of ATen's losses, with the same arguments; and `fuse`, which looks at a node first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels  # noqa: F401 - registers the namespace

_aten = torch.ops.aten
_own = torch.ops.autopar


def fuse(node: fx.Node) -> None:
    """`nll_loss(log_softmax(x))`, written apart, is a cross-entropy: it saves no second tensor of logits, and its classes split.

    Only where nothing else uses the log-softmax, which is then dead.
    """
    if node.target not in (_aten.nll_loss_nd.default, _aten.nll_loss.default, _aten.nll_loss2d.default) or node.kwargs:
        return
    logp = node.args[0]
    if (
        isinstance(logp, fx.Node)
        and logp.target is _aten.log_softmax.int
        and len(logp.users) == 1
        and len(logp.args) == 2
        and not logp.kwargs
    ):
        node.target, node.args = _log_softmax_nll, (*logp.args, *node.args[1:])


def _log_softmax_nll(x: Tensor, dim: int, target: Tensor, *rest: Any) -> Tensor:
    """The dim of the classes is known only now."""
    if dim % x.dim() == min(1, x.dim() - 1):
        return cross_entropy(x, target, *rest)
    return nll_loss(torch.log_softmax(x, dim), target, *rest)


def logsumexp(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Over one dim of floating point: from pieces that split it. Anything else stays one op."""
    if len(dims) != 1 or not x.is_floating_point() or not x.dim() or not x.numel():
        return _aten.logsumexp.default(x, dims, keepdim)
    dim = dims[0] % x.dim()
    out = _LogSumExp.apply(x.movedim(dim, -1) if dim != x.dim() - 1 else x)
    return out.unsqueeze(dim) if keepdim else out


class _LogSumExp(torch.autograd.Function):
    """Over the last dim; torch's own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        largest = x.amax(-1)
        largest = largest.masked_fill(largest.isinf(), 0)  # a row of infinities alone has no other difference to them than nan
        total = _own.sum_exp.default(x.reshape(-1, x.shape[-1]), largest.reshape(-1)).reshape(largest.shape)
        out = (total.log() + largest).to(x.dtype)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        return grad.unsqueeze(-1) * (x - out.unsqueeze(-1)).exp()


def _classes_last(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """x [c], [n, c] or [n, c, ...] and its class indices -> [m, c], [m]."""
    if x.dim() > 2:
        x = x.movedim(1, -1)
    return x.reshape(-1, x.shape[-1]), target.reshape(-1)


def nll_loss(logp: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100) -> Tensor:
    shape = target.shape
    logp, target = _classes_last(logp, target)
    if weight is None and reduction != 0:
        total, count = _own.nll_loss.default(logp, target, ignore_index)
        return total / count if reduction == 1 else total
    used = target != ignore_index
    index = target.masked_fill(~used, 0)
    picked = -logp.gather(1, index.unsqueeze(1)).squeeze(1) * used
    if weight is not None:
        weights = weight.gather(0, index) * used
        picked = picked * weights
        return picked.reshape(shape) if reduction == 0 else picked.sum() / weights.sum() if reduction == 1 else picked.sum()
    return picked.reshape(shape)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    wide: bool = False,
) -> Tensor:
    """Classes by index: `_CrossEntropy`; both weighted and smoothed: log-softmax and `nll_loss`. By probability: products.

    wide: float32 of logits in fewer bits, as under autocast.
    """
    wide = x.dtype.itemsize < 4 and (wide or torch.is_autocast_enabled(x.device.type))
    if not target.is_floating_point() and (weight is None or label_smoothing == 0):
        return _hard_cross_entropy(x, target, weight, reduction, ignore_index, label_smoothing, wide)
    x = x.float() if wide else x
    logp = torch.log_softmax(x, 0 if x.dim() == 1 else 1)
    if target.is_floating_point():
        return _soft_cross_entropy(logp, target, weight, reduction, label_smoothing)
    assert weight is not None
    classes, (flat, index) = logp.shape[0 if x.dim() == 1 else 1], _classes_last(logp, target)
    used = index != ignore_index
    smooth = -(flat * weight).sum(1) * used
    hard = nll_loss(flat, index, weight, 0, ignore_index)
    loss = hard * (1 - label_smoothing) + smooth * (label_smoothing / classes)
    if reduction == 0:
        return loss.reshape(target.shape)
    counts = weight.gather(0, index.masked_fill(~used, 0)) * used
    return loss.sum() / counts.sum() if reduction == 1 else loss.sum()


def _hard_cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float, wide: bool
) -> Tensor:
    """Of rows that are summed in float32 at least; `wide` keeps that dtype, as `nll_loss` under autocast does."""
    dtype = torch.float32 if wide else x.dtype
    shape = target.shape
    x, target = _classes_last(x, target)
    loss = _CrossEntropy.apply(x, target, ignore_index, label_smoothing)
    used = target != ignore_index
    counts = used
    if weight is not None:
        counts = weight.detach().to(loss.dtype).gather(0, target.masked_fill(~used, 0)) * used
        loss = loss * counts
    if reduction == 0:
        return loss.reshape(shape).to(dtype)
    return (loss.sum() / counts.sum() if reduction == 1 else loss.sum()).to(dtype)


class _CrossEntropy(torch.autograd.Function):
    """x [n, c], target [n] -> the loss of every row [n], 0 where it is ignored; see `kernels.loss` for the pieces.

    Written as pieces whose rules split the classes: of two numbers a row travels between devices where logits did. Saves the
    logits and [n] numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> Tensor:
        largest = x.amax(1)
        lse = _own.sum_exp.default(x, largest).log() + largest
        ctx.save_for_backward(x, target, lse)
        ctx.ignore_index, ctx.hard, ctx.even = ignore_index, 1.0 - smoothing, smoothing / x.shape[1]
        picked = _own.pick.default(x, target, 0, x.shape[1], ignore_index)
        loss = lse - picked if smoothing == 0 else lse - picked * ctx.hard - x.sum(1, dtype=lse.dtype) * ctx.even
        return loss.masked_fill(target == ignore_index, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, lse = ctx.saved_tensors
        grad = grad.masked_fill(target == ctx.ignore_index, 0)
        return _own.cross_entropy_backward.default(grad, x, target, lse, 0, ctx.hard, ctx.even), None, None, None


def _soft_cross_entropy(logp: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float) -> Tensor:
    dim = 0 if logp.dim() == 1 else 1
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / logp.shape[dim]
    if weight is not None:
        logp = logp * weight.reshape([-1 if d == dim else 1 for d in range(logp.dim())])
    loss = -(logp * target).sum(dim)
    if reduction == 0:
        return loss
    return loss.sum() / max(1, loss.numel()) if reduction == 1 else loss.sum()


def reduced(op: Any, position: int) -> Callable[..., Tensor]:
    """An op with a `reduction` argument: element by element, then a sum and a division by the global count."""

    def run(*args: Any, **options: Any) -> Tensor:
        reduction = args[position] if len(args) > position else options.get("reduction", 1)
        if len(args) > position:
            out = op(*args[:position], 0, *args[position + 1 :], **options)
        else:  # what stands before it may have been left out too
            out = op(*args, **{**options, "reduction": 0})
        if reduction == 0:
            return out
        return out.sum() / max(1, out.numel()) if reduction == 1 else out.sum()

    return run
