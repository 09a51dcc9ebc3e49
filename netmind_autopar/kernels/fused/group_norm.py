"""GroupNorm and SiLU in one: `autopar::group_norm_silu(x, weight?, bias?, groups, eps) -> (y, mean, rstd)`, and its backward.

    h = (x - mean) rstd    z = h weight + bias    y = z σ(z)        mean and rstd over the m elements of a sample's group

x [n, c, …], weight and bias [c], mean and rstd [n, groups] (Wu and He, arXiv:1803.08494). With u = dy σ(z) (1 + z (1 - σ(z))):

    dweight_c = Σ u h    dbias_c = Σ u    dx = rstd (u weight - (Σ_group u weight + h Σ_group u weight h) / m)

One program has a sample's group and goes through it in tiles of channels × positions: for the mean, for the squares about it, for y;
backward for the sums, then for dx. Roofline, bytes per element in 16 bit: forward 4, backward 6, where a group stays in L2 between its
passes (it has m elements: 0.3 MB for 10 channels of 128 × 128); about 12 and 25 flops. Weight gradients are the same bits in every run:
a program writes its own sums, one sum adds the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import alike, floating, refuse, shaped, show, vector, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable

# ---- eager reference ----------------------------------------------------------------------------------------------------------


def _per_channel(t: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).view(1, -1, *(1 for _ in x.shape[2:]))


def _normed(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    n, groups = mean.shape
    flat = x.to(mean.dtype).reshape(n, groups, -1)
    return ((flat - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).reshape(x.shape)


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(x.dtype)
    flat = x.to(dtype).reshape(x.shape[0], groups, -1)
    var, mean = torch.var_mean(flat, -1, correction=0)
    rstd = (var + eps).rsqrt()
    z = _normed(x, mean, rstd)
    w, b = (_per_channel(t, x, dtype) for t in (weight, bias))
    z = z if w is None else z * w
    z = z if b is None else z + b
    return (z * torch.sigmoid(z)).to(x.dtype).contiguous(), mean, rstd


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight [c], dbias [c]), the last two in `wide`."""
    dtype = wide(x.dtype)
    h = _normed(x, mean, rstd)
    w, b = (_per_channel(t, x, dtype) for t in (weight, bias))
    z = h if w is None else h * w
    z = z if b is None else z + b
    s = torch.sigmoid(z)
    u = grad.to(dtype) * s * (1 + z * (1 - s))
    over = [d for d in range(x.dim()) if d != 1]
    dweight, dbias = (u * h).sum(over), u.sum(over)
    v, hs = (t.reshape(*mean.shape, -1) for t in (u if w is None else u * w, h))
    dx = (v - v.mean(-1, keepdim=True) - hs * (v * hs).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return dx.reshape(x.shape).to(x.dtype).contiguous(), dweight, dbias


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def _forward(
    x, weight, bias, y, mean, rstd, groups, channels, size, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`channels` of a group, `size` positions."""
    row = tl.program_id(0).to(tl.int64)
    first = (row % groups) * channels
    base = row * channels * size
    count = channels * size
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for top in range(0, channels, ROWS):
        ch = (top + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        for left in range(0, size, BLOCK):
            col = (left + tl.arange(0, BLOCK))[None, :]
            total += tl.load(x + base + ch * size + col, mask=(ch < channels) & (col < size), other=0.0).to(tl.float32)
    m = tl.sum(tl.sum(total, 1), 0) / count
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for top in range(0, channels, ROWS):
        ch = (top + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        for left in range(0, size, BLOCK):
            col = (left + tl.arange(0, BLOCK))[None, :]
            seen = (ch < channels) & (col < size)
            v = tl.load(x + base + ch * size + col, mask=seen, other=0.0).to(tl.float32)
            v = tl.where(seen, v - m, 0.0)
            squares += v * v
    r = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / count + eps)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)
    for top in range(0, channels, ROWS):
        at = top + tl.arange(0, ROWS)
        ch = at.to(tl.int64)[:, None]
        scale = tl.full((ROWS,), 1.0, tl.float32)
        shift = tl.zeros((ROWS,), tl.float32)
        if WEIGHT:
            scale = tl.load(weight + first + at, mask=at < channels, other=0.0).to(tl.float32)
        if BIAS:
            shift = tl.load(bias + first + at, mask=at < channels, other=0.0).to(tl.float32)
        for left in range(0, size, BLOCK):
            col = (left + tl.arange(0, BLOCK))[None, :]
            seen = (ch < channels) & (col < size)
            v = tl.load(x + base + ch * size + col, mask=seen, other=0.0).to(tl.float32)
            z = (v - m) * r * scale[:, None] + shift[:, None]
            e = tl.exp(-tl.abs(z))
            tl.store(y + base + ch * size + col, z * (tl.where(z < 0, e, 1.0) / (1.0 + e)), mask=seen)


@jit
def _slope(z):
    """The derivative of z σ(z)."""
    e = tl.exp(-tl.abs(z))
    s = tl.where(z < 0, e, 1.0) / (1.0 + e)
    return s + z * (e / ((1.0 + e) * (1.0 + e)))


@jit
def _backward(
    grad, x, weight, bias, mean, rstd, dx, dweight, dbias, groups, channels, size,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias: [n, c], each program its own."""
    row = tl.program_id(0).to(tl.int64)
    first = (row % groups) * channels
    base = row * channels * size
    m, r = tl.load(mean + row), tl.load(rstd + row)
    sums = tl.zeros((ROWS,), tl.float32)
    moments = tl.zeros((ROWS,), tl.float32)
    for top in range(0, channels, ROWS):
        at = top + tl.arange(0, ROWS)
        ch = at.to(tl.int64)[:, None]
        scale = tl.full((ROWS,), 1.0, tl.float32)
        shift = tl.zeros((ROWS,), tl.float32)
        if WEIGHT:
            scale = tl.load(weight + first + at, mask=at < channels, other=0.0).to(tl.float32)
        if BIAS:
            shift = tl.load(bias + first + at, mask=at < channels, other=0.0).to(tl.float32)
        of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
        of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
        for left in range(0, size, BLOCK):
            col = (left + tl.arange(0, BLOCK))[None, :]
            seen = (ch < channels) & (col < size)
            h = (tl.load(x + base + ch * size + col, mask=seen, other=0.0).to(tl.float32) - m) * r
            d = tl.load(grad + base + ch * size + col, mask=seen, other=0.0).to(tl.float32)
            u = d * _slope(h * scale[:, None] + shift[:, None])
            of_weight += u * h
            of_bias += u
        dw, db = tl.sum(of_weight, 1), tl.sum(of_bias, 1)
        tl.store(dweight + row * channels + at, dw, mask=at < channels)
        tl.store(dbias + row * channels + at, db, mask=at < channels)
        sums += db * scale
        moments += dw * scale
    count = channels * size
    level, tilt = tl.sum(sums, 0) / count, tl.sum(moments, 0) / count
    for top in range(0, channels, ROWS):
        at = top + tl.arange(0, ROWS)
        ch = at.to(tl.int64)[:, None]
        scale = tl.full((ROWS,), 1.0, tl.float32)
        shift = tl.zeros((ROWS,), tl.float32)
        if WEIGHT:
            scale = tl.load(weight + first + at, mask=at < channels, other=0.0).to(tl.float32)
        if BIAS:
            shift = tl.load(bias + first + at, mask=at < channels, other=0.0).to(tl.float32)
        for left in range(0, size, BLOCK):
            col = (left + tl.arange(0, BLOCK))[None, :]
            seen = (ch < channels) & (col < size)
            h = (tl.load(x + base + ch * size + col, mask=seen, other=0.0).to(tl.float32) - m) * r
            d = tl.load(grad + base + ch * size + col, mask=seen, other=0.0).to(tl.float32)
            u = d * _slope(h * scale[:, None] + shift[:, None]) * scale[:, None]
            tl.store(dx + base + ch * size + col, (u - level - h * tilt) * r, mask=seen)


_TABLE = (Config(64, 16, 4), Config(256, 8, 4), Config(1024, 2, 4), Config(1024, 2, 8, only=2), Config(1024, 1, 4))
FORWARD = register("group_norm_silu.forward", _forward, _TABLE, whole=True)
BACKWARD = register("group_norm_silu.backward", _backward, _TABLE, whole=True)


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int]:
    return groups, x.shape[1] // groups, x[0, 0].numel()


def group_norm_silu(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check("group_norm_silu", x, weight, bias, groups)
    if not usable(x, weight, bias):
        return reference(x, weight, bias, groups, eps)
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device) for _ in range(2))
    w, b = (y if t is None else t.contiguous() for t in (weight, bias))
    sizes = _sizes(x, groups)
    config = choose(FORWARD, sizes[2], x) or FORWARD.configs[2]
    flags = {"WEIGHT": weight is not None, "BIAS": bias is not None}
    launch(FORWARD, config, x.shape[0] * groups, x, w, b, y, mean, rstd, *sizes, float(eps), **flags)
    return y, mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); a gradient of what is not there is empty."""
    _check_backward(grad, x, weight, bias, mean, rstd)
    if usable(grad, x, weight, bias):
        grad, x = grad.contiguous(), x.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2)]
        w, b = (dx if t is None else t.contiguous() for t in (weight, bias))
        sizes = _sizes(x, mean.shape[1])
        config = choose(BACKWARD, sizes[2], x) or BACKWARD.configs[2]
        flags = {"WEIGHT": weight is not None, "BIAS": bias is not None}
        launch(BACKWARD, config, mean.numel(), grad, x, w, b, mean.contiguous(), rstd.contiguous(), dx, *sums, *sizes, **flags)
        dweight, dbias = (t.sum(0) for t in sums)
    else:
        dx, dweight, dbias = reference_backward(grad, x, weight, bias, mean, rstd)
    empty = x.new_empty(0)
    return dx, empty if weight is None else dweight.to(weight.dtype), empty.clone() if bias is None else dbias.to(bias.dtype)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> None:
    floating(op, x=x, weight=weight, bias=bias)
    if x.dim() < 2 or not x.numel():
        raise refuse(op, f"x is {show(x)}", "it takes [samples, channels, ...], with elements")
    if groups < 1 or x.shape[1] % groups:
        raise refuse(op, f"{groups} groups of {x.shape[1]} channels", "channels must divide evenly into groups")
    vector(op, x.shape[1], weight=weight, bias=bias)


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> None:
    op = "group_norm_silu_backward"
    _check(op, x, weight, bias, mean.shape[1] if mean.dim() == 2 else 0)
    alike(op, x=x, grad=grad)
    shaped(op, (x.shape[0], mean.shape[1]), mean=mean, rstd=rstd)


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::group_norm_silu", mutates_args=())
def _group_norm_silu(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu(x, weight, bias, groups, eps)


@torch.library.custom_op("autopar::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_backward(grad, x, weight, bias, mean, rstd)


@_group_norm_silu.register_fake
def _(x, weight, bias, groups, eps):
    _check("group_norm_silu", x, weight, bias, groups)
    return x.new_empty(x.shape), *(x.new_empty((x.shape[0], groups), dtype=wide(x.dtype)) for _ in range(2))


@_group_norm_silu_backward.register_fake
def _(grad, x, weight, bias, mean, rstd):
    _check_backward(grad, x, weight, bias, mean, rstd)
    return x.new_empty(x.shape), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _derive(ctx, grad, *_):
    if grad is None:
        return None, None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _own.group_norm_silu_backward.default(grad, x, weight, bias, mean, rstd)
    return dx, None if weight is None else dweight, None if bias is None else dbias, None, None


_group_norm_silu.register_autograd(_derive, setup_context=_setup)

_own = torch.ops.autopar
DIRECT = {_own.group_norm_silu.default: group_norm_silu, _own.group_norm_silu_backward.default: group_norm_silu_backward}
