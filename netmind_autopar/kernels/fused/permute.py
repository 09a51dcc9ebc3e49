"""Rows to their experts and back: `autopar::permute_rows(x, order, times) -> y` and `autopar::unpermute_rows(y, place, weight?) -> x`.

    permute     y_i = x_{order_i // times}                        x [t, n], order [t times]: slot i of the experts has copy order_i
    unpermute   x_t = Σ_j weight_tj y_{place_{t times + j}}       place [t times] is the inverse of order; weight [t, times] or ones

Both read rows by index and write every row once: no atomic additions, and sums in a fixed order, so the bits are the same in every run. The
gradient of `permute` is `unpermute` without weights of the inverse; that of `unpermute` is a weighted `permute`, and for the weights a
dot of two rows each. Roofline, bytes per element in 16 bit: permute 2 + 2 / times read and written, unpermute 2 + 2 / times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import as_rows, floating, refuse, show, together, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable

# ---- eager reference ----------------------------------------------------------------------------------------------------------


def reference(x: Tensor, order: Tensor, times: int) -> Tensor:
    return x.index_select(0, order // times)


def reference_back(y: Tensor, place: Tensor, weight: Tensor | None, times: int) -> Tensor:
    rows = y.index_select(0, place).reshape(-1, times, y.shape[1]).to(wide(y.dtype))
    return (rows if weight is None else rows * weight.to(rows.dtype).unsqueeze(-1)).sum(1).to(y.dtype)


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def _permute(x, order, y, n, x_row, times, BLOCK: tl.constexpr):
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    place = tl.load(order + row) // times
    tl.store(y + row * n + col, tl.load(x + place * x_row + col, mask=seen), mask=seen)


@jit
def _unpermute(y, place, weight, x, n, y_row, times, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(times):
        at = tl.load(place + row * times + j)
        v = tl.load(y + at * y_row + col, mask=seen, other=0.0).to(tl.float32)
        if WEIGHT:
            v *= tl.load(weight + row * times + j).to(tl.float32)
        total += v
    tl.store(x + row * n + col, total, mask=seen)


_TABLE = (Config(1024, 1, 4), Config(2048, 1, 4), Config(2048, 1, 8))
PERMUTE = register("permute", _permute, _TABLE)
UNPERMUTE = register("unpermute", _unpermute, _TABLE)


def permute(x: Tensor, order: Tensor, times: int) -> Tensor:
    _check("permute", x, order, x.shape[0] * times if x.dim() == 2 else -1, times)
    if not usable(x):
        return reference(x, order, times)
    flat, n = as_rows(x), x.shape[1]
    y = torch.empty((order.numel(), n), dtype=x.dtype, device=x.device)
    config = choose(PERMUTE, n, x) or PERMUTE.configs[0]
    launch(PERMUTE, config, order.numel() * -(-n // config.block), flat, order.contiguous(), y, n, flat.stride(0), times)
    return y


def unpermute(y: Tensor, place: Tensor, weight: Tensor | None, times: int) -> Tensor:
    _check("unpermute", y, place, y.shape[0] if y.dim() == 2 else -1, times)
    _check_weight(y, weight, times)
    if not usable(y, weight):
        return reference_back(y, place, weight, times)
    flat, n = as_rows(y), y.shape[1]
    x = torch.empty((y.shape[0] // times, n), dtype=y.dtype, device=y.device)
    config = choose(UNPERMUTE, n, y) or UNPERMUTE.configs[0]
    w = x if weight is None else weight.contiguous()
    grid = x.shape[0] * -(-n // config.block)
    launch(UNPERMUTE, config, grid, flat, place.contiguous(), w, x, n, flat.stride(0), times, WEIGHT=weight is not None)
    return x


def _check(op: str, x: Tensor, order: Tensor, count: int, times: int) -> None:
    floating(op, x=x)
    together(op, x=x, order=order)
    if x.dim() != 2 or times < 1 or (op == "unpermute" and x.shape[0] % times):
        raise refuse(op, f"x is {show(x)}, {times} copies a row", "it takes [rows, n], the copies of a row a whole number")
    if order.dtype != torch.int64 or tuple(order.shape) != (count,):
        raise refuse(op, f"the order is {show(order)}", f"it needs one int64 for each of {count} copies")


def _check_weight(y: Tensor, weight: Tensor | None, times: int) -> None:
    if weight is None:
        return
    floating("unpermute", y=y, weight=weight)
    if tuple(weight.shape) != (y.shape[0] // times, times):
        raise refuse(
            "unpermute", f"weight is {show(weight)}", f"it needs one number for each of {times} copies of {y.shape[0] // times} rows"
        )


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::permute_rows", mutates_args=())
def _permute_op(x: Tensor, order: Tensor, times: int) -> Tensor:
    return permute(x, order, times)


@torch.library.custom_op("autopar::unpermute_rows", mutates_args=())
def _unpermute_op(y: Tensor, place: Tensor, weight: Tensor | None, times: int) -> Tensor:
    return unpermute(y, place, weight, times)


@_permute_op.register_fake
def _(x, order, times):
    _check("permute", x, order, x.shape[0] * times if x.dim() == 2 else -1, times)
    return x.new_empty((x.shape[0] * times, x.shape[1]))


@_unpermute_op.register_fake
def _(y, place, weight, times):
    _check("unpermute", y, place, y.shape[0] if y.dim() == 2 else -1, times)
    _check_weight(y, weight, times)
    return y.new_empty((y.shape[0] // times, y.shape[1]))


def inverse(order: Tensor) -> Tensor:
    """Where each copy went."""
    return torch.argsort(order)


def _setup(ctx, inputs, output):
    _, order, ctx.times = inputs
    ctx.save_for_backward(order)


def _derive(ctx, grad):
    (order,) = ctx.saved_tensors
    return _own.unpermute_rows.default(grad, inverse(order), None, ctx.times), None, None


def _setup_back(ctx, inputs, output):
    y, place, weight, ctx.times = inputs
    ctx.save_for_backward(y if weight is not None else None, place, weight)


def _derive_back(ctx, grad):
    y, place, weight = ctx.saved_tensors
    back = inverse(place)
    dy, dweight = _own.permute_rows.default(grad, back, ctx.times), None
    if weight is not None:
        rows = y.index_select(0, place).reshape(*weight.shape, -1).to(wide(y.dtype))
        dweight = (rows * grad.to(rows.dtype).unsqueeze(1)).sum(-1).to(weight.dtype)
        dy = (dy.to(rows.dtype) * weight.reshape(-1).index_select(0, back).to(rows.dtype).unsqueeze(1)).to(y.dtype)
    return dy, None, dweight, None


_permute_op.register_autograd(_derive, setup_context=_setup)
_unpermute_op.register_autograd(_derive_back, setup_context=_setup_back)

_own = torch.ops.autopar
DIRECT = {_own.permute_rows.default: permute, _own.unpermute_rows.default: unpermute}
