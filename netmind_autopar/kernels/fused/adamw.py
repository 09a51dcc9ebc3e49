"""AdamW on a flat shard, in place: `autopar::adamw_`, with the scale of clipping and the cast of the new parameters folded in.

    g = scale grad                             m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²
    p = (1 - lr λ) p - lr/(1 - β₁ᵗ) m / (√v / √(1 - β₂ᵗ) + eps)             copy = p in its own dtype

(Loshchilov and Hutter, arXiv:1711.05101, as torch.optim.AdamW computes it; t counts steps from 1.) Elements are independent, so a shard is
stepped as the whole is. Roofline: with p, m, v in float32, grad and copy in 16 bit, 28 bytes a parameter: 14 read, 14 written.

It writes into its arguments and therefore stands in no captured program; it needs no rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import floating, refuse, shaped, show, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable


def reference(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, scale: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    dtype = wide(p.dtype)
    g = grad.to(dtype) if scale is None else grad.to(dtype) * scale.to(dtype)
    new_m = m.to(dtype).lerp(g, 1 - beta1)
    new_v = v.to(dtype).mul(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = new_v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    new_p = p.to(dtype).mul(1 - lr * decay).addcdiv_(new_m, denominator, value=-lr / (1 - beta1**step))
    for old, new in ((p, new_p), (m, new_m), (v, new_v), (copy, new_p)):
        if old is not None:
            old.copy_(new)


@jit
def _step(
    p, grad, m, v, copy, scale, n, kept, beta1, rest1, beta2, rest2, rate, correction, eps,
    SCALE: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """kept = 1 - lr λ, rest = 1 - β, rate = lr / (1 - β₁ᵗ), correction = 1 / √(1 - β₂ᵗ)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = at < n
    g = tl.load(grad + at, mask=seen, other=0.0).to(tl.float32)
    if SCALE:
        g *= tl.load(scale).to(tl.float32)
    a = tl.load(m + at, mask=seen, other=0.0).to(tl.float32)
    b = tl.load(v + at, mask=seen, other=0.0).to(tl.float32)
    a += (g - a) * rest1
    b = b * beta2 + g * g * rest2
    w = tl.load(p + at, mask=seen, other=0.0).to(tl.float32) * kept
    w -= rate * (a / (tl.sqrt(b) * correction + eps))
    tl.store(p + at, w, mask=seen)
    tl.store(m + at, a, mask=seen)
    tl.store(v + at, b, mask=seen)
    if COPY:
        tl.store(copy + at, w, mask=seen)


STEP = register("adamw", _step, (Config(1024, 1, 4), Config(2048, 1, 8), Config(2048, 1, 4)))


def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, scale: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    _check(p, grad, m, v, copy, scale, beta1, beta2, step)
    given = (p, grad, m, v, copy)
    if not usable(*given, scale) or not all(t.is_contiguous() for t in given if t is not None):
        return reference(p, grad, m, v, copy, scale, lr, beta1, beta2, eps, decay, step)
    config = choose(STEP, p.numel(), p) or STEP.configs[0]
    numbers = (1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps)
    tensors = (p, grad, m, v, p if copy is None else copy, p if scale is None else scale)
    launch(
        STEP,
        config,
        -(-p.numel() // config.block),
        *tensors,
        p.numel(),
        *map(float, numbers),
        SCALE=scale is not None,
        COPY=copy is not None,
    )
    return None


def _check(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, scale: Tensor | None, beta1: float, beta2: float, step: int
) -> None:
    floating("adamw_", p=p, grad=grad, m=m, v=v, copy=copy, scale=scale)
    shaped("adamw_", tuple(p.shape), grad=grad, m=m, v=v, copy=copy)
    if scale is not None and scale.dim():
        raise refuse("adamw_", f"scale is {show(scale)}", "it is one number for all gradients")
    if step < 1:
        raise refuse("adamw_", f"step {step}", "steps count from 1")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise refuse("adamw_", f"betas {beta1} and {beta2}", "each must be at least 0 and below 1")


@torch.library.custom_op("autopar::adamw_", mutates_args=("p", "m", "v", "copy"))
def _adamw(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, scale: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    adamw_(p, grad, m, v, copy, scale, lr, beta1, beta2, eps, decay, step)


@_adamw.register_fake
def _(p, grad, m, v, copy, scale, lr, beta1, beta2, eps, decay, step):
    _check(p, grad, m, v, copy, scale, beta1, beta2, step)


DIRECT = {torch.ops.autopar.adamw_.default: adamw_}
