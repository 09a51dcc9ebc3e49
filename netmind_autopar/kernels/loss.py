"""The pieces of cross-entropy over classes of which only a block may be here. No piece makes a second tensor of [n, c] in forward.

    lse_i = m_i + log Σ_c exp(x_ic - m_i)        m_i = max_c x_ic
    loss_i = lse_i - hard x_i[y_i] - even Σ_c x_ic
    dx_ic = g_i (exp(x_ic - lse_i) - hard [c = y_i] - even)

with hard = 1 - ε and even = ε / classes for label smoothing ε (Szegedy et al., arXiv:1512.00567, section 7). Maximum, sum of exponentials
and picked logits of the blocks of classes add up (or are maximised) to those of all classes: `pick` is zero where the label is in
another block (Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3). All is computed in float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements worked on at once: a temporary that stays in cache, or is small beside the logits


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> Iterator[slice]:
    """Runs of rows."""
    step = max(1, _BLOCK.get(x.device.type, 1 << 26) // max(1, x.shape[1]))
    return (slice(i, i + step) for i in range(0, x.shape[0], step))


def sum_exp(x: Tensor, largest: Tensor) -> Tensor:
    """x [n, c], largest [n] -> Σ_c exp(x - largest): [n], float32 or float64."""
    out = torch.empty(x.shape[0], dtype=wide(x.dtype), device=x.device)
    largest = largest.to(out.dtype).unsqueeze(1)
    for rows in _blocks(x):
        torch.sum(torch.sub(x[rows], largest[rows]).exp_(), 1, out=out[rows])
    return out


def pick(x: Tensor, target: Tensor, start: int, classes: int, ignore_index: int) -> Tensor:
    """x [n, c] holds the classes [start, start + c) of `classes`, integer target [n] -> x[i, target[i]]: [n], float32 or float64.

    Zero where the label is `ignore_index` or not among them. A label that is no class at all: IndexError on CPU, as eager torch has
    it, and nan elsewhere, where looking would wait for the device.
    """
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type == "cpu" and bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")
    local = target - start if start else target
    outside = (local < 0) | (local >= x.shape[1]) | (target == ignore_index)
    picked = x.gather(1, local.masked_fill(outside, 0).unsqueeze(1)).squeeze(1)
    return picked.to(wide(x.dtype)).masked_fill_(outside, 0).masked_fill_(wrong, float("nan"))


def cross_entropy_backward(grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, start: int, hard: float, even: float) -> Tensor:
    """grad [n], x [n, c], target [n], lse [n] -> the gradient of x: [n, c] of its dtype; see the top of this file.

    An lse in float64 keeps what float32 would round.
    """
    from .fused import cross_entropy, launch  # they import this file

    if launch.usable(grad, x):
        return cross_entropy.backward(grad, x, target, lse, start, hard, even)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    exact, lse = lse.unsqueeze(1), lse.to(wide(x.dtype)).unsqueeze(1)
    rest = (exact - lse).to(lse.dtype) if exact.dtype != lse.dtype else None
    grad = grad.to(lse.dtype).unsqueeze(1)
    local = (target - start if start else target).unsqueeze(1)
    outside = (local < 0) | (local >= x.shape[1])
    local, taken = local.masked_fill(outside, 0), torch.full_like(lse, -hard).masked_fill_(outside, 0)
    for rows in _blocks(x):
        part = torch.sub(x[rows], lse[rows], out=out[rows] if out.dtype == lse.dtype else None)
        part = (part if rest is None else part.sub_(rest[rows])).exp_()
        part.scatter_add_(1, local[rows], taken[rows])
        if even:
            part -= even
        torch.mul(part, grad[rows], out=part)
        if part.dtype != out.dtype:
            out[rows] = part
    return out


@torch.library.custom_op("autopar::sum_exp", mutates_args=())
def _sum_exp(x: Tensor, largest: Tensor) -> Tensor:
    return sum_exp(x, largest)


@_sum_exp.register_fake
def _fake_sum_exp(x, largest):
    return x.new_empty(x.shape[:1], dtype=wide(x.dtype))


@torch.library.custom_op("autopar::pick", mutates_args=())
def _pick(x: Tensor, target: Tensor, start: int, classes: int, ignore_index: int) -> Tensor:
    return pick(x, target, start, classes, ignore_index)


@_pick.register_fake
def _fake_pick(x, target, start, classes, ignore_index):
    return x.new_empty(x.shape[:1], dtype=wide(x.dtype))


@torch.library.custom_op("autopar::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, start: int, hard: float, even: float) -> Tensor:
    return cross_entropy_backward(grad, x, target, lse, start, hard, even)


@_cross_entropy_backward.register_fake
def _fake_backward(grad, x, target, lse, start, hard, even):
    return x.new_empty(x.shape)


_own = torch.ops.autopar
DIRECT = {_own.sum_exp.default: sum_exp, _own.pick.default: pick, _own.cross_entropy_backward.default: cross_entropy_backward}
