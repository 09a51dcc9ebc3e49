"""The ops of `cross_entropy.py` and their eager references:

    autopar::cross_entropy(x[n, c], target[n], ignore_index, smoothing) -> (loss[n], lse[n])
    autopar::vocab_stats(x[n, c], target[n], start, classes, ignore_index) -> [1, 3, n]     (m, s, t) of a block of classes
    autopar::vocab_combine(stats[k, 3, n]) -> (lse[n], picked[n])

in float32 (float64 for float64), lse always in float64. The backward of all of them is `autopar::cross_entropy_backward` (kernels/loss.py),
whose Triton kernel is here too. A loss over a split vocabulary is `vocab_stats` on every device, one all-gather of 12 bytes a row and
device, and `vocab_combine`; `vocab_stats` has no derivative of its own. An ignored label costs nothing and has the loss 0; one that is no
class raises IndexError on CPU and gives nan elsewhere, as `autopar::pick` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import loss
from . import cross_entropy as kernels
from .checks import floating, refuse, show, together, wide
from .launch import usable

LABELS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _check(op: str, x: Tensor, target: Tensor) -> None:
    floating(op, x=x)
    together(op, x=x, target=target)
    if x.dim() != 2 or not x.shape[1]:
        raise refuse(op, f"x is {show(x)}", "it takes [rows, classes], at least one class")
    if tuple(target.shape) != (x.shape[0],) or target.dtype not in LABELS:
        raise refuse(op, f"target is {show(target)}", f"it needs one class index for each of {x.shape[0]} rows")


def cross_entropy(x: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, Tensor]:
    _check("cross_entropy", x, target)
    if usable(x):
        return kernels.forward(x, target, ignore_index, smoothing)
    hard, even = 1.0 - smoothing, smoothing / x.shape[1]
    largest = x.amax(1).to(wide(x.dtype))
    lse = loss.sum_exp(x, largest).double().log_() + largest
    value = lse - hard * loss.pick(x, target, 0, x.shape[1], ignore_index)
    if even:
        value -= even * x.sum(1, dtype=torch.float64)
    return value.masked_fill_(target == ignore_index, 0).to(wide(x.dtype)), lse


def vocab_stats(x: Tensor, target: Tensor, start: int, classes: int, ignore_index: int) -> Tensor:
    _check("vocab_stats", x, target)
    if start < 0 or start + x.shape[1] > classes:
        raise refuse("vocab_stats", f"classes {start} to {start + x.shape[1]} of {classes}", "the block must lie within all classes")
    if usable(x):
        return kernels.stats(x, target, start, classes, ignore_index)
    largest = x.amax(1).to(wide(x.dtype))
    safe = largest.masked_fill(largest == -float("inf"), 0)
    return torch.stack([largest, loss.sum_exp(x, safe), loss.pick(x, target, start, classes, ignore_index)]).unsqueeze(0)


def vocab_combine(stats: Tensor) -> tuple[Tensor, Tensor]:
    _check_stats(stats)
    if usable(stats):
        return kernels.combine(stats)
    largest, total, picked = stats[:, 0].double(), stats[:, 1], stats[:, 2]
    m = largest.amax(0)
    return (total * (largest - m).exp()).sum(0).log_() + m, picked.sum(0)


def _check_stats(stats: Tensor) -> None:
    if stats.dim() != 3 or stats.shape[1] != 3 or not stats.shape[0] or stats.dtype not in (torch.float32, torch.float64):
        raise refuse(
            "vocab_combine", f"stats is {show(stats)}", "it takes what vocab_stats gives, of every block of classes: [blocks, 3, rows]"
        )


@torch.library.custom_op("autopar::cross_entropy", mutates_args=())
def _cross_entropy(x: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, Tensor]:
    return cross_entropy(x, target, ignore_index, smoothing)


@torch.library.custom_op("autopar::vocab_stats", mutates_args=())
def _vocab_stats(x: Tensor, target: Tensor, start: int, classes: int, ignore_index: int) -> Tensor:
    return vocab_stats(x, target, start, classes, ignore_index)


@torch.library.custom_op("autopar::vocab_combine", mutates_args=())
def _vocab_combine(stats: Tensor) -> tuple[Tensor, Tensor]:
    return vocab_combine(stats)


@_cross_entropy.register_fake
def _(x, target, ignore_index, smoothing):
    _check("cross_entropy", x, target)
    return x.new_empty(x.shape[:1], dtype=wide(x.dtype)), x.new_empty(x.shape[:1], dtype=torch.float64)


@_vocab_stats.register_fake
def _(x, target, start, classes, ignore_index):
    _check("vocab_stats", x, target)
    return x.new_empty((1, 3, x.shape[0]), dtype=wide(x.dtype))


@_vocab_combine.register_fake
def _(stats):
    _check_stats(stats)
    return stats.new_empty(stats.shape[2:], dtype=torch.float64), stats.new_empty(stats.shape[2:])


def _setup(ctx, inputs, output):
    x, target, ctx.ignore_index, ctx.smoothing = inputs
    ctx.save_for_backward(x, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derive(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    x, target, lse = ctx.saved_tensors
    grad = grad.masked_fill(target == ctx.ignore_index, 0)
    hard, even = 1.0 - ctx.smoothing, ctx.smoothing / x.shape[1]
    return _own.cross_entropy_backward.default(grad, x, target, lse, 0, hard, even), None, None, None


_cross_entropy.register_autograd(_derive, setup_context=_setup)

_own = torch.ops.autopar
DIRECT = {_own.cross_entropy.default: cross_entropy, _own.vocab_stats.default: vocab_stats, _own.vocab_combine.default: vocab_combine}
