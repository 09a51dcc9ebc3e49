"""RMSNorm and LayerNorm over the last dim, with or without a residual added before: Triton kernels and eager references.

    t = x + residual (rounded to their dtype)      y = (t - mean) rstd (offset + weight) + bias
    rstd = 1 / sqrt(mean of (t - mean)² + eps)     RMSNorm: mean = 0 and no bias; offset is 1 for Gemma's form, else 0

With g = dy (offset + weight) and h = (t - mean) rstd, for rows of n elements (Ba et al., arXiv:1607.06450; Zhang and Sennrich,
arXiv:1910.07467):

    dt = (g - h Σ(g h)/n - Σg/n) rstd + d(sum)     dweight = Σ_rows dy h     dbias = Σ_rows dy     (RMSNorm: no Σg/n, no dbias)

Roofline, bytes per element of x in 16 bit, weights and statistics aside (about 8 flops per element forward, 14 backward: bound by memory
on every device of today):

    forward  4 (x in, y out)                                 with residual  8 (x, residual in; sum, y out)
    backward 6 (dy, x in; dx out)                            with residual  8 (d(sum) in too)
    rows that do not fit in registers: forward and dx read their row twice, of which the second time comes from L2; dweight has a kernel of
    its own, 4 more

Statistics and sums are float32. Weight gradients are deterministic: every program adds up its rows in a fixed order, and one sum
adds the programs; their number depends on the device's multiprocessors alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import wide
from .language import jit, tl

WIDEST = 1 << 24  # a row's count is exact in float32


# ---- eager reference ----------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd) in plain PyTorch; statistics [...] in `wide`; without residual the sum is x itself."""
    total = x if residual is None else x + residual
    dtype, n = wide(x.dtype), x.shape[-1]
    v = total.to(dtype)
    scale = None if weight is None else weight.to(dtype) + offset if offset else weight.to(dtype)
    if center:
        y, mean, rstd = torch.ops.aten.native_layer_norm(v.contiguous(), [n], scale, None if bias is None else bias.to(dtype), eps)
        return y.to(x.dtype), total, mean.reshape(x.shape[:-1]), rstd.reshape(x.shape[:-1])
    rstd = v.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = v * rstd
    y = y if scale is None else y.mul_(scale)
    rstd = rstd.squeeze(-1)
    return y.to(x.dtype), total, torch.zeros_like(rstd) if n else rstd, rstd


def reference_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight [n], dbias [n]), the last two in `wide`; mean is None for RMSNorm, dbias then means nothing."""
    dtype, n = wide(x.dtype), x.shape[-1]
    g, v = grad.to(dtype), x.to(dtype)
    h = (v if mean is None else v - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    rows = tuple(range(x.dim() - 1))
    dweight, dbias = (g * h).sum(rows) if rows else g * h, g.sum(rows) if rows else g
    scaled = g if weight is None else g * (weight.to(dtype) + offset)
    dx = scaled - h * ((scaled * h).sum(-1, keepdim=True) / n)
    if mean is not None:
        dx = dx - scaled.sum(-1, keepdim=True) / n
    dx = dx * rstd.unsqueeze(-1)
    return (dx if grad_sum is None else dx + grad_sum).to(x.dtype), dweight, dbias


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def _forward(
    x, residual, weight, bias, y, total, mean, rstd, rows, n, x_row, r_row, eps, offset,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of which each lies whole in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    here, there = row[:, None], col[None, :]
    seen = (here < rows) & (there < n)
    v = tl.load(x + here * x_row + there, mask=seen, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + here * r_row + there, mask=seen, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + here * n + there, rounded, mask=seen)
        v = rounded.to(tl.float32)
    if CENTER:
        m = tl.sum(v, 1) / n
        v = tl.where(seen, v - m[:, None], 0.0)
        rest = tl.sum(v, 1) / n  # what rounding left of the mean
        tl.store(mean + row, m + rest, mask=row < rows)
        v = tl.where(seen, v - rest[:, None], 0.0)
    r = tl.rsqrt(tl.sum(v * v, 1) / n + eps)
    tl.store(rstd + row, r, mask=row < rows)
    v *= r[:, None]
    if WEIGHT:
        v *= (tl.load(weight + col, mask=col < n, other=0.0).to(tl.float32) + offset)[None, :]
    if BIAS:
        v += tl.load(bias + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + here * n + there, v, mask=seen)


@jit
def _forward_wide(
    x, residual, weight, bias, y, total, mean, rstd, rows, n, x_row, r_row, eps, offset,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row in two passes. Means and squares of blocks are merged as Chan, Golub and LeVeque do (1979), so nothing cancels."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    m, squares = 0.0, 0.0
    for start in range(0, n, BLOCK):
        col = start + lane
        seen = col < n
        v = tl.load(x + row * x_row + col, mask=seen, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(residual + row * r_row + col, mask=seen, other=0.0).to(tl.float32)
            rounded = v.to(total.dtype.element_ty)
            tl.store(total + row * n + col, rounded, mask=seen)
            v = rounded.to(tl.float32)
        if CENTER:
            count = tl.minimum(n - start, BLOCK).to(tl.float32)
            block_mean = tl.sum(v, 0) / count
            v = tl.where(seen, v - block_mean, 0.0)
            delta, all_of = block_mean - m, start + count
            m += delta * (count / all_of)
            squares += tl.sum(v * v, 0) + delta * delta * (start * (count / all_of))
        else:
            squares += tl.sum(v * v, 0)
    r = tl.rsqrt(squares / n + eps)
    if CENTER:
        tl.store(mean + row, m)
    tl.store(rstd + row, r)
    for start in range(0, n, BLOCK):
        col = start + lane
        seen = col < n
        v = tl.load(x + row * x_row + col, mask=seen, other=0.0).to(tl.float32)
        if ADD:  # again from its terms: no thread reads what another one wrote
            v += tl.load(residual + row * r_row + col, mask=seen, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty).to(tl.float32)
        v = (v - m) * r
        if WEIGHT:
            v *= tl.load(weight + col, mask=seen, other=0.0).to(tl.float32) + offset
        if BIAS:
            v += tl.load(bias + col, mask=seen, other=0.0).to(tl.float32)
        tl.store(y + row * n + col, v, mask=seen)


@jit
def _backward(
    grad, grad_sum, x, weight, mean, rstd, dx, dweight, dbias, rows, n, g_row, s_row, x_row, tiles, offset,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every tiles-th tile of rows; sums of the program's rows go to its own row of dweight and dbias."""
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    there = col[None, :]
    scale = tl.full((1, BLOCK), 1.0, tl.float32)
    if WEIGHT:
        scale = (tl.load(weight + col, mask=col < n, other=0.0).to(tl.float32) + offset)[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(pid, tiles, tl.num_programs(0)):
        row = tl.full((ROWS,), tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row[:, None]
        seen = (here < rows) & (there < n)
        g = tl.load(grad + here * g_row + there, mask=seen, other=0.0).to(tl.float32)
        h = tl.load(x + here * x_row + there, mask=seen, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if CENTER:
            h = tl.where(seen, h - tl.load(mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
        h *= r
        if WEIGHT:
            dw += g * h
        if BIAS:
            db += g
        g *= scale
        d = g - h * (tl.sum(g * h, 1) / n)[:, None]
        if CENTER:
            d -= (tl.sum(g, 1) / n)[:, None]
        d *= r
        if ADD:
            d += tl.load(grad_sum + here * s_row + there, mask=seen, other=0.0).to(tl.float32)
        tl.store(dx + here * n + there, d, mask=seen)
    at = pid.to(tl.int64) * n + col
    if WEIGHT:
        tl.store(dweight + at, tl.sum(dw, 0), mask=col < n)
    if BIAS:
        tl.store(dbias + at, tl.sum(db, 0), mask=col < n)


@jit
def _backward_wide(
    grad, grad_sum, x, weight, mean, rstd, dx, n, g_row, s_row, x_row, offset,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row in two passes."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    r = tl.load(rstd + row)
    m = 0.0
    if CENTER:
        m = tl.load(mean + row)
    with_h = tl.zeros((BLOCK,), tl.float32)
    alone = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        col = start + lane
        seen = col < n
        g = tl.load(grad + row * g_row + col, mask=seen, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= tl.load(weight + col, mask=seen, other=0.0).to(tl.float32) + offset
        with_h += g * ((tl.load(x + row * x_row + col, mask=seen, other=0.0).to(tl.float32) - m) * r)
        alone += g
    projected = tl.sum(with_h, 0) / n
    shift = 0.0
    if CENTER:
        shift = tl.sum(alone, 0) / n
    for start in range(0, n, BLOCK):
        col = start + lane
        seen = col < n
        g = tl.load(grad + row * g_row + col, mask=seen, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= tl.load(weight + col, mask=seen, other=0.0).to(tl.float32) + offset
        h = (tl.load(x + row * x_row + col, mask=seen, other=0.0).to(tl.float32) - m) * r
        d = (g - h * projected - shift) * r
        if ADD:
            d += tl.load(grad_sum + row * s_row + col, mask=seen, other=0.0).to(tl.float32)
        tl.store(dx + row * n + col, d, mask=seen)


@jit
def _weights_wide(
    grad, x, mean, rstd, dweight, dbias, rows, n, g_row, x_row, tiles,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of every k-th tile of rows, into row `part` of dweight and dbias; program (part, block of columns)."""
    blocks = tl.cdiv(n, BLOCK)
    part, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = col[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(part, tiles, parts):
        row = tl.full((ROWS,), tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row[:, None]
        seen = (here < rows) & (there < n)
        g = tl.load(grad + here * g_row + there, mask=seen, other=0.0).to(tl.float32)
        if WEIGHT:
            h = tl.load(x + here * x_row + there, mask=seen, other=0.0).to(tl.float32)
            if CENTER:
                h -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            dw += g * (h * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None])
        if BIAS:
            db += g
    at = part.to(tl.int64) * n + col
    if WEIGHT:
        tl.store(dweight + at, tl.sum(dw, 0), mask=col < n)
    if BIAS:
        tl.store(dbias + at, tl.sum(db, 0), mask=col < n)
