"""LAMB on a flat shard, in the two halves between which its norms are summed over devices:

    autopar::lamb_direction_(p, grad, m, v, scale?, beta1, beta2, eps, decay, step) -> (u, sums)     m and v move on in place
    autopar::lamb_apply_(p, u, sums, copy?, lr)                                                      p moves, copy takes it in its dtype

    g = scale grad    m ← β₁ m + (1 - β₁) g    v ← β₂ v + (1 - β₂) g²
    u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps) + λ p        sums = (Σ p², Σ u²)
    p ← p - lr r u        r = √(Σ p² / Σ u²), 1 where either is 0

(You et al., arXiv:1904.00962, algorithm 2.) One parameter a call: a ratio belongs to one. sums are float32 [2] of this shard (float64 for
float64); for a split parameter add them over its devices before `lamb_apply_`. Roofline in float32 with a 16-bit gradient: 30 bytes a
parameter and 12, the second pass 2 more for the copy. Partial sums have a fixed order: the bits are the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import floating, refuse, shaped, show, wide
from .language import jit, tl
from .launch import Config, choose, launch, programs, register, usable

# ---- eager reference ----------------------------------------------------------------------------------------------------------


def reference_direction(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor | None, beta1: float, beta2: float, eps: float, decay: float, step: int
) -> tuple[Tensor, Tensor]:
    dtype = wide(p.dtype)
    g, w = grad.to(dtype), p.to(dtype)
    g = g if scale is None else g * scale.to(dtype)
    new_m, new_v = m.to(dtype).lerp(g, 1 - beta1), v.to(dtype).mul(beta2).addcmul(g, g, value=1 - beta2)
    u = (new_m / (1 - beta1**step)) / ((new_v / (1 - beta2**step)).sqrt() + eps) + decay * w
    m.copy_(new_m)
    v.copy_(new_v)
    return u, torch.stack([w.square().sum(), u.square().sum()])


def reference_apply(p: Tensor, u: Tensor, sums: Tensor, copy: Tensor | None, lr: float) -> None:
    new = p.to(u.dtype) - u * (lr * _ratio(sums))
    p.copy_(new)
    if copy is not None:
        copy.copy_(new)


def _ratio(sums: Tensor) -> Tensor:
    return torch.where((sums > 0).all(), (sums[0] / sums[1]).sqrt(), 1.0)


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def _direction(
    p, grad, m, v, scale, u, sums, n, tiles, rest1, beta2, rest2, first, second, eps, decay,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first = 1 / (1 - β₁ᵗ), second = 1 / √(1 - β₂ᵗ); sums [programs, 2]."""
    of_p = tl.zeros((BLOCK,), tl.float32)
    of_u = tl.zeros((BLOCK,), tl.float32)
    factor = 1.0
    if SCALE:
        factor = tl.load(scale).to(tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = (tl.zeros((BLOCK,), tl.int64) + tile) * BLOCK + tl.arange(0, BLOCK)
        seen = at < n
        g = tl.load(grad + at, mask=seen, other=0.0).to(tl.float32) * factor
        a = tl.load(m + at, mask=seen, other=0.0).to(tl.float32)
        b = tl.load(v + at, mask=seen, other=0.0).to(tl.float32)
        w = tl.load(p + at, mask=seen, other=0.0).to(tl.float32)
        a += (g - a) * rest1
        b = b * beta2 + g * g * rest2
        d = tl.where(seen, a * first / (tl.sqrt(b) * second + eps) + decay * w, 0.0)
        tl.store(m + at, a, mask=seen)
        tl.store(v + at, b, mask=seen)
        tl.store(u + at, d, mask=seen)
        of_p += w * w
        of_u += d * d
    row = tl.program_id(0)
    tl.store(sums + row * 2, tl.sum(of_p, 0))
    tl.store(sums + row * 2 + 1, tl.sum(of_u, 0))


@jit
def _apply(p, u, rate, copy, n, COPY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = at < n
    scale = tl.load(rate).to(tl.float32)
    w = tl.load(p + at, mask=seen, other=0.0).to(tl.float32) - tl.load(u + at, mask=seen, other=0.0) * scale
    tl.store(p + at, w, mask=seen)
    if COPY:
        tl.store(copy + at, w, mask=seen)


_TABLE = (Config(1024, 1, 4), Config(2048, 1, 8))
DIRECTION = register("lamb.direction", _direction, _TABLE)
APPLY = register("lamb.apply", _apply, _TABLE)


def lamb_direction_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor | None, beta1: float, beta2: float, eps: float, decay: float, step: int
) -> tuple[Tensor, Tensor]:
    _check(p, grad, m, v, scale, beta1, beta2, step)
    given = (p, grad, m, v)
    if not usable(*given, scale) or not all(t.is_contiguous() for t in given):
        return reference_direction(p, grad, m, v, scale, beta1, beta2, eps, decay, step)
    config = choose(DIRECTION, p.numel(), p) or DIRECTION.configs[0]
    tiles = -(-p.numel() // config.block)
    parts = programs(p, tiles, 8)
    u = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    sums = torch.empty((parts, 2), dtype=torch.float32, device=p.device)
    numbers = (1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, decay)
    tensors = (p, grad, m, v, p if scale is None else scale, u, sums)
    launch(DIRECTION, config, parts, *tensors, p.numel(), tiles, *map(float, numbers), SCALE=scale is not None)
    return u, sums.sum(0)


def lamb_apply_(p: Tensor, u: Tensor, sums: Tensor, copy: Tensor | None, lr: float) -> None:
    _check_apply(p, u, sums, copy)
    if not usable(p, copy) or u.dtype != torch.float32 or not all(t.is_contiguous() for t in (p, u, copy) if t is not None):
        return reference_apply(p, u, sums, copy, lr)
    config = choose(APPLY, p.numel(), p) or APPLY.configs[0]
    rate = (lr * _ratio(sums)).reshape(1)
    grid = -(-p.numel() // config.block)
    launch(APPLY, config, grid, p, u, rate, p if copy is None else copy, p.numel(), COPY=copy is not None)
    return None


def _check(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor | None, beta1: float, beta2: float, step: int) -> None:
    op = "lamb_direction_"
    floating(op, p=p, grad=grad, m=m, v=v, scale=scale)
    shaped(op, tuple(p.shape), grad=grad, m=m, v=v)
    if scale is not None and scale.dim():
        raise refuse(op, f"scale is {show(scale)}", "it is one number for all gradients")
    if step < 1 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise refuse(op, f"step {step}, betas {beta1} and {beta2}", "steps count from 1, betas are at least 0 and below 1")


def _check_apply(p: Tensor, u: Tensor, sums: Tensor, copy: Tensor | None) -> None:
    floating("lamb_apply_", p=p, u=u, sums=sums, copy=copy)
    shaped("lamb_apply_", tuple(p.shape), u=u, copy=copy)
    shaped("lamb_apply_", (2,), sums=sums)


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::lamb_direction_", mutates_args=("m", "v"))
def _lamb_direction(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor | None, beta1: float, beta2: float, eps: float, decay: float, step: int
) -> tuple[Tensor, Tensor]:
    return lamb_direction_(p, grad, m, v, scale, beta1, beta2, eps, decay, step)


@torch.library.custom_op("autopar::lamb_apply_", mutates_args=("p", "copy"))
def _lamb_apply(p: Tensor, u: Tensor, sums: Tensor, copy: Tensor | None, lr: float) -> None:
    lamb_apply_(p, u, sums, copy, lr)


@_lamb_direction.register_fake
def _(p, grad, m, v, scale, beta1, beta2, eps, decay, step):
    _check(p, grad, m, v, scale, beta1, beta2, step)
    return p.new_empty(p.shape, dtype=wide(p.dtype)), p.new_empty(2, dtype=wide(p.dtype))


@_lamb_apply.register_fake
def _(p, u, sums, copy, lr):
    _check_apply(p, u, sums, copy)


_own = torch.ops.autopar
DIRECT = {_own.lamb_direction_.default: lamb_direction_, _own.lamb_apply_.default: lamb_apply_}
