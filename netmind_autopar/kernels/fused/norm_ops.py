"""The ops of `norm.py`:

    autopar::rms_norm(x, weight?, eps, offset) -> (y, rstd)
    autopar::layer_norm(x, weight?, bias?, eps) -> (y, mean, rstd)
    autopar::add_rms_norm(x, residual, weight?, eps, offset) -> (y, sum, rstd)
    autopar::add_layer_norm(x, residual, weight?, bias?, eps) -> (y, sum, mean, rstd)
    autopar::rms_norm_backward(grad, grad_sum?, x, weight?, rstd, offset) -> (dx, dweight)
    autopar::layer_norm_backward(grad, grad_sum?, x, weight?, bias?, mean, rstd) -> (dx, dweight, dbias)

x, residual, y, sum [..., n] of one dtype; weight, bias [n]; statistics [...] in float32 (float64 for float64), for backward alone.
`x` of a backward is what was normalised: the sum, where there was a residual; dx is then the gradient of both, grad_sum included. A
gradient of a weight that is not there is empty. Widths beyond 2^24 and dtypes the kernels do not know take the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import norm, norm_launch
from .checks import alike, floating, refuse, shaped, vector, wide
from .launch import usable

Maybe = Tensor | None


def _check(op: str, x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe) -> None:
    floating(op, x=x, residual=residual, weight=weight, bias=bias)
    if not x.dim() or not x.shape[-1]:
        raise refuse(op, f"x has the shape {list(x.shape)}", "it normalises over the elements of the last dim, and there are none")
    alike(op, x=x, residual=residual)
    vector(op, x.shape[-1], weight=weight, bias=bias)


def _forward(
    op: str, x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe, eps: float, offset: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(op, x, residual, weight, bias)
    run = norm_launch.forward if usable(x, residual, weight, bias) and norm_launch.fits(x) else norm.reference
    return run(x, residual, weight, bias, eps, offset, center)


def rms_norm(x: Tensor, weight: Maybe, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = _forward("rms_norm", x, None, weight, None, eps, offset, False)
    return y, rstd


def layer_norm(x: Tensor, weight: Maybe, bias: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _forward("layer_norm", x, None, weight, bias, eps, 0.0, True)
    return y, mean, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Maybe, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = _forward("add_rms_norm", x, residual, weight, None, eps, offset, False)
    return y, total, rstd


def add_layer_norm(x: Tensor, residual: Tensor, weight: Maybe, bias: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward("add_layer_norm", x, residual, weight, bias, eps, 0.0, True)


def _backward(
    op: str, grad: Tensor, grad_sum: Maybe, x: Tensor, weight: Maybe, bias: Maybe, mean: Maybe, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(op, x, grad, weight, bias)
    alike(op, grad=grad, grad_sum=grad_sum)
    floating(op, x=x, grad_sum=grad_sum, mean=mean, rstd=rstd)
    shaped(op, tuple(x.shape[:-1]), mean=mean, rstd=rstd)
    if usable(grad, grad_sum, x, weight, bias) and norm_launch.fits(x):
        dx, dweight, dbias = norm_launch.backward(grad, grad_sum, x, weight, mean, rstd, offset, bias is not None)
    else:
        dx, dweight, dbias = norm.reference_backward(grad, grad_sum, x, weight, mean, rstd, offset)
    return dx, _like(dweight, weight, x), _like(dbias, bias, x)


def _like(grad: Tensor, parameter: Maybe, x: Tensor) -> Tensor:
    return x.new_empty(0) if parameter is None else grad.to(parameter.dtype)


def rms_norm_backward(grad: Tensor, grad_sum: Maybe, x: Tensor, weight: Maybe, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = _backward("rms_norm_backward", grad, grad_sum, x, weight, None, None, rstd, offset)
    return dx, dweight


def layer_norm_backward(
    grad: Tensor, grad_sum: Maybe, x: Tensor, weight: Maybe, bias: Maybe, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward("layer_norm_backward", grad, grad_sum, x, weight, bias, mean, rstd, 0.0)


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Maybe, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, eps, offset)


@torch.library.custom_op("autopar::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Maybe, bias: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps)


@torch.library.custom_op("autopar::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Maybe, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    return add_rms_norm(x, residual, weight, eps, offset)


@torch.library.custom_op("autopar::add_layer_norm", mutates_args=())
def _add_layer_norm(x: Tensor, residual: Tensor, weight: Maybe, bias: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return add_layer_norm(x, residual, weight, bias, eps)


@torch.library.custom_op("autopar::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, grad_sum: Maybe, x: Tensor, weight: Maybe, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    return rms_norm_backward(grad, grad_sum, x, weight, rstd, offset)


@torch.library.custom_op("autopar::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, grad_sum: Maybe, x: Tensor, weight: Maybe, bias: Maybe, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_backward(grad, grad_sum, x, weight, bias, mean, rstd)


def _made(x: Tensor, rows: int, statistics: int) -> tuple[Tensor, ...]:
    """`rows` tensors like x and as many statistics."""
    same = [x.new_empty(x.shape) for _ in range(rows)]
    return (*same, *(x.new_empty(x.shape[:-1], dtype=wide(x.dtype)) for _ in range(statistics)))


@_rms_norm.register_fake
def _(x, weight, eps, offset):
    _check("rms_norm", x, None, weight, None)
    return _made(x, 1, 1)


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    _check("layer_norm", x, None, weight, bias)
    return _made(x, 1, 2)


@_add_rms_norm.register_fake
def _(x, residual, weight, eps, offset):
    _check("add_rms_norm", x, residual, weight, None)
    return _made(x, 2, 1)


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, eps):
    _check("add_layer_norm", x, residual, weight, bias)
    return _made(x, 2, 2)


@_rms_norm_backward.register_fake
def _(grad, grad_sum, x, weight, rstd, offset):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


@_layer_norm_backward.register_fake
def _(grad, grad_sum, x, weight, bias, mean, rstd):
    return x.new_empty(x.shape), *(x.new_empty(0) if w is None else w.new_empty(w.shape) for w in (weight, bias))


def _setup_rms(ctx, inputs, output):
    x, weight, _, ctx.offset = inputs
    _keep(ctx, x, weight, None, output[1:])


def _setup_layer(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _keep(ctx, x, weight, bias, output[1:])


def _setup_add_rms(ctx, inputs, output):
    _, _, weight, _, ctx.offset = inputs
    _keep(ctx, output[1], weight, None, output[2:])


def _setup_add_layer(ctx, inputs, output):
    _, _, weight, bias, _ = inputs
    _keep(ctx, output[1], weight, bias, output[2:])


def _keep(ctx, x, weight, bias, statistics):
    ctx.save_for_backward(x, weight, bias, *statistics)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _grads(ctx, grad, grad_sum):
    """(dx, dweight, dbias), None where there is nothing to derive."""
    x, weight, bias, *statistics = ctx.saved_tensors
    if grad is None:
        return grad_sum, None, None
    if len(statistics) == 1:
        dx, dweight = _own.rms_norm_backward.default(grad, grad_sum, x, weight, *statistics, ctx.offset)
        dbias = None
    else:
        dx, dweight, dbias = _own.layer_norm_backward.default(grad, grad_sum, x, weight, bias, *statistics)
    return dx, None if weight is None else dweight, None if bias is None else dbias


def _derive_rms(ctx, grad, _):
    return *_grads(ctx, grad, None)[:2], None, None


def _derive_layer(ctx, grad, *_):
    return *_grads(ctx, grad, None), None


def _derive_add_rms(ctx, grad, grad_sum, _):
    dx, dweight, _ = _grads(ctx, grad, grad_sum)
    return dx, dx, dweight, None, None


def _derive_add_layer(ctx, grad, grad_sum, *_):
    dx, dweight, dbias = _grads(ctx, grad, grad_sum)
    return dx, dx, dweight, dbias, None


_rms_norm.register_autograd(_derive_rms, setup_context=_setup_rms)
_layer_norm.register_autograd(_derive_layer, setup_context=_setup_layer)
_add_rms_norm.register_autograd(_derive_add_rms, setup_context=_setup_add_rms)
_add_layer_norm.register_autograd(_derive_add_layer, setup_context=_setup_add_layer)

_own = torch.ops.autopar
DIRECT = {
    _own.rms_norm.default: rms_norm,
    _own.layer_norm.default: layer_norm,
    _own.add_rms_norm.default: add_rms_norm,
    _own.add_layer_norm.default: add_layer_norm,
    _own.rms_norm_backward.default: rms_norm_backward,
    _own.layer_norm_backward.default: layer_norm_backward,
}
