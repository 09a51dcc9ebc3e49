"""Launches of the norm kernels: configurations, which kernel takes which width, tensors made for them. See `norm.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import norm
from .checks import as_rows
from .launch import Config, choose, launch, programs, register

FORWARD = register(
    "norm.forward",
    norm._forward,
    (
        Config(64, 32, 4), Config(128, 16, 4), Config(256, 8, 4), Config(512, 4, 4), Config(1024, 2, 4), Config(1024, 1, 4),
        Config(2048, 1, 4), Config(2048, 2, 8), Config(4096, 1, 8), Config(4096, 1, 4), Config(8192, 1, 16), Config(8192, 1, 8),
        Config(16384, 1, 32), Config(16384, 1, 16),
    ),
    whole=True,
)  # fmt: skip
BACKWARD = register(
    "norm.backward",
    norm._backward,
    (
        Config(64, 16, 4), Config(128, 8, 4), Config(256, 4, 4), Config(512, 4, 4), Config(1024, 2, 4), Config(1024, 1, 4),
        Config(2048, 1, 4), Config(2048, 1, 8), Config(4096, 1, 8), Config(4096, 1, 16),
        Config(8192, 1, 16, only=2), Config(8192, 1, 32, only=4),
    ),
    whole=True,
)  # fmt: skip
FORWARD_WIDE = register("norm.forward_wide", norm._forward_wide, (Config(8192, 1, 16), Config(4096, 1, 8)))
BACKWARD_WIDE = register("norm.backward_wide", norm._backward_wide, (Config(4096, 1, 16), Config(4096, 1, 8)))
WEIGHTS_WIDE = register("norm.weights_wide", norm._weights_wide, (Config(256, 16, 4), Config(512, 8, 4)))


def fits(x: Tensor) -> bool:
    """Rows that a kernel can run."""
    return 0 < x.shape[-1] <= norm.WIDEST


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `norm.reference`."""
    flat = as_rows(x)
    more = flat if residual is None else as_rows(residual)
    rows, n = flat.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    given = (
        flat, more, y if weight is None else weight.contiguous(), y if bias is None else bias.contiguous(), y, total, mean, rstd,
        rows, n, flat.stride(0), more.stride(0), eps, offset,
    )  # fmt: skip
    flags = {"ADD": residual is not None, "WEIGHT": weight is not None, "BIAS": bias is not None, "CENTER": center}
    if config := choose(FORWARD, n, x):
        launch(FORWARD, config, -(-rows // config.rows), *given, **flags)
    else:
        launch(FORWARD_WIDE, _always(choose(FORWARD_WIDE, n, x)), rows, *given, **flags)
    return y, x if residual is None else total, mean, rstd


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm.reference_backward`; dweight and dbias are empty where there is no weight and no bias."""
    g, v = as_rows(grad), as_rows(x)
    s = g if grad_sum is None else as_rows(grad_sum)
    rows, n = v.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = rstd.contiguous()
    m = r if mean is None else mean.contiguous()
    w = dx if weight is None else weight.contiguous()
    strides = (g.stride(0), s.stride(0), v.stride(0))
    add, center, with_weight = grad_sum is not None, mean is not None, weight is not None
    sums = {"WEIGHT": with_weight, "BIAS": with_bias, "CENTER": center}
    if config := choose(BACKWARD, n, x):
        tiles = -(-rows // config.rows)
        parts = programs(x, tiles, max(1, 16 // config.warps))
        dw, db = _partials(parts, n, with_weight, with_bias, x)
        launch(BACKWARD, config, parts, g, s, v, w, m, r, dx, dw, db, rows, n, *strides, tiles, offset, ADD=add, **sums)
        return dx, dw.sum(0), db.sum(0)
    config = _always(choose(BACKWARD_WIDE, n, x))
    flags = {"ADD": add, "WEIGHT": with_weight, "CENTER": center}
    launch(BACKWARD_WIDE, config, rows, g, s, v, w, m, r, dx, n, *strides, offset, **flags)
    if not with_weight and not with_bias:
        return dx, *_partials(1, n, False, False, x)
    config = _always(choose(WEIGHTS_WIDE, n, x))
    tiles, blocks = -(-rows // config.rows), -(-n // config.block)
    parts = max(1, programs(x, tiles * blocks, 8) // blocks)
    dw, db = _partials(parts, n, with_weight, with_bias, x)
    launch(WEIGHTS_WIDE, config, parts * blocks, g, v, m, r, dw, db, rows, n, strides[0], strides[2], tiles, **sums)
    return dx, dw.sum(0), db.sum(0)


def _partials(parts: int, n: int, weight: bool, bias: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [parts, n] for each that is wanted, [0, n] for the other."""
    dw, db = (torch.empty((parts if wanted else 0, n), dtype=torch.float32, device=like.device) for wanted in (weight, bias))
    return dw, db


def _always(config: Config | None) -> Config:
    """Kernels that go through a row in steps take every width."""
    assert config is not None
    return config
