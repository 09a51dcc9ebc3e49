"""Softmax of scaled and masked rows: `autopar::masked_softmax(x, mask?, scale) -> y`, and its backward.

    y = softmax(scale x + mask)  over the last dim      dx = scale y (dy - Σ dy y)

x [..., n] of at most four dims; the mask broadcasts to x: numbers to add, or truth values (False: as if -inf were added). A row of -inf
alone is nan, as in eager. Roofline, bytes per element in 16 bit: forward 4 and the mask's own (read once per row that it serves, from L2
mostly), backward 6. About 6 flops per element. Computed in float32, rounded once. A row lies whole in registers; rows of more than
16,384 elements take the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import alike, as_rows, floating, refuse, show, together, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable

# ---- eager reference ----------------------------------------------------------------------------------------------------------


def reference(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    v = x.to(wide(x.dtype)) * scale
    if mask is not None:
        v = v.masked_fill_(~mask, -float("inf")) if mask.dtype == torch.bool else v.add_(mask)
    return torch.softmax(v, -1).to(x.dtype).contiguous()


def reference_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    dtype = wide(y.dtype)
    g, p = grad.to(dtype), y.to(dtype)
    return ((g - (g * p).sum(-1, keepdim=True)) * p * scale).to(y.dtype).contiguous()


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def _forward(
    x, mask, y, rows, n, x_row, heads, seq, m_b, m_h, m_s, scale,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MASK: 0 none, 1 numbers, 2 truth values."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here, there = row[:, None], tl.arange(0, BLOCK)[None, :]
    seen = (here < rows) & (there < n)
    v = tl.load(x + here * x_row + there, mask=seen, other=0.0).to(tl.float32) * scale
    if MASK:
        of_row = (row // (heads * seq)) * m_b + (row // seq % heads) * m_h + (row % seq) * m_s
        more = tl.load(mask + of_row[:, None] + there, mask=seen, other=0)
        if MASK == 1:
            v += more.to(tl.float32)
        else:
            v = tl.where(more != 0, v, float("-inf"))
    v = tl.where(there < n, v, float("-inf"))
    v = tl.exp(v - tl.max(v, 1)[:, None])
    v = v / tl.sum(v, 1)[:, None]
    tl.store(y + here * n + there, v, mask=seen)


@jit
def _backward(grad, y, dx, rows, n, g_row, y_row, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here, there = row[:, None], tl.arange(0, BLOCK)[None, :]
    seen = (here < rows) & (there < n)
    g = tl.load(grad + here * g_row + there, mask=seen, other=0.0).to(tl.float32)
    p = tl.load(y + here * y_row + there, mask=seen, other=0.0).to(tl.float32)
    d = (g - tl.sum(g * p, 1)[:, None]) * p * scale
    tl.store(dx + here * n + there, d, mask=seen)


_TABLE = (
    Config(64, 32, 4), Config(128, 16, 4), Config(256, 8, 4), Config(512, 4, 4), Config(1024, 2, 4), Config(2048, 1, 4),
    Config(4096, 1, 8), Config(4096, 1, 4), Config(8192, 1, 16), Config(8192, 1, 8), Config(16384, 1, 32), Config(16384, 1, 16),
)  # fmt: skip
FORWARD = register("softmax.forward", _forward, _TABLE, whole=True)
BACKWARD = register("softmax.backward", _backward, _TABLE, whole=True)


def masked_softmax(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    _check(x, mask)
    config = choose(FORWARD, x.shape[-1], x) if usable(x) else None
    if config is None:
        return reference(x, mask, scale)
    flat = as_rows(x)
    rows, n = flat.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    lead = (1,) * (4 - x.dim()) + tuple(x.shape)
    if mask is None:
        kind, given, strides = 0, flat, (0, 0, 0)
    else:
        kind = 2 if mask.dtype == torch.bool else 1
        given = mask.expand(*mask.shape[:-1], n) if mask.dim() else mask.expand(n)
        given = given if given.stride(-1) == 1 else given.contiguous()
        strides = given.expand(lead).stride()[:3]
        given = given.view(torch.uint8) if kind == 2 else given
    launch(FORWARD, config, -(-rows // config.rows), flat, given, y, rows, n, flat.stride(0), *lead[1:3], *strides, float(scale), MASK=kind)
    return y


def masked_softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    _check(y, None, "masked_softmax_backward")
    alike("masked_softmax_backward", y=y, grad=grad)
    config = choose(BACKWARD, y.shape[-1], y) if usable(grad, y) else None
    if config is None:
        return reference_backward(grad, y, scale)
    g, p = as_rows(grad), as_rows(y)
    rows, n = p.shape
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    launch(BACKWARD, config, -(-rows // config.rows), g, p, dx, rows, n, g.stride(0), p.stride(0), float(scale))
    return dx


def _check(x: Tensor, mask: Tensor | None, op: str = "masked_softmax") -> None:
    floating(op, x=x)
    together(op, x=x, mask=mask)
    if not 1 <= x.dim() <= 4 or not x.shape[-1]:
        raise refuse(op, f"x is {show(x)}", "it takes one to four dims, the last of them with elements", "flatten leading dims")
    if mask is None:
        return
    if not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise refuse(op, f"mask is {show(mask)}", "it holds numbers to add, or truth values", "pass mask.bool()")
    fits = mask.dim() <= x.dim() and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False))
    if not fits:
        raise refuse(op, f"mask is {show(mask)} for an x of {list(x.shape)}", "it must broadcast to x")


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::masked_softmax", mutates_args=())
def _masked_softmax(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return masked_softmax(x, mask, scale)


@torch.library.custom_op("autopar::masked_softmax_backward", mutates_args=())
def _masked_softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    return masked_softmax_backward(grad, y, scale)


@_masked_softmax.register_fake
def _(x, mask, scale):
    _check(x, mask)
    return x.new_empty(x.shape)


@_masked_softmax_backward.register_fake
def _(grad, y, scale):
    return y.new_empty(y.shape)


def _setup(ctx, inputs, output):
    _, _, ctx.scale = inputs
    if ctx.needs_input_grad[1]:
        raise refuse("masked_softmax", "the mask requires a gradient", "only x has one here", "add it to x, with scale 1")
    ctx.save_for_backward(output)


def _derive(ctx, grad):
    return torch.ops.autopar.masked_softmax_backward.default(grad, *ctx.saved_tensors, ctx.scale), None, None


_masked_softmax.register_autograd(_derive, setup_context=_setup)

_own = torch.ops.autopar
DIRECT = {_own.masked_softmax.default: masked_softmax, _own.masked_softmax_backward.default: masked_softmax_backward}
