"""Cross-entropy by class index in one pass over the logits, of all classes or of the block of them that is here: Triton kernels.

For a row x of the classes [start, start + c), one pass keeps the maximum so far m and the sum s of exp(x - m), rescaled when m grows
(Milakov and Gimelshein, arXiv:1805.02867), and takes the label's logit t, 0 where the label is in another block. m, s, t are 12 bytes
a row: all that blocks of classes need of each other. Gathered from k blocks (`combine`):

    m = max_k m_k      lse = m + log Σ_k s_k exp(m_k - m)      t = Σ_k t_k      loss = lse - (1 - ε) t - (ε/classes) Σ x

(label smoothing ε: of whole rows alone). Backward computes the probabilities again from x and lse, which are all that is kept:

    dx = dloss (exp(x - lse) - (1 - ε) [label] - ε/classes)

lse is float64: rounded to float32, an lse of 12 would make every probability of its row wrong by 5e-7. No logit is computed in float64.

Roofline, bytes per logit in 16 bit: forward 2, backward 4. One exponential a logit each way, the special-function units of an H200
(16 a clock and multiprocessor) do 4.2 T/s of them, the memory brings 2.1 T logits/s: bound by memory.

Rows of -inf alone give nan, as eager does; a block of classes that are all -inf gives m = -inf, s = 0 and counts for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import as_rows
from .language import jit, tl
from .launch import Config, choose, launch, register


@jit
def _forward(
    x, target, first, second, third, c, x_row, t_row, start, classes, ignore, smoothing,
    FINAL: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. FINAL: (loss, lse) of whole rows; else (m, s, t) of a block of classes."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    base = x + row * x_row
    minus = float("-inf")
    m, shift = minus, 0.0
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, c, BLOCK):
        col = at + lane
        v = tl.load(base + col, mask=col < c, other=minus).to(tl.float32)
        new = tl.maximum(m, tl.max(v, 0))
        safe = tl.where(new == minus, 0.0, new)
        total = total * tl.exp(m - safe) + tl.exp(v - safe)
        m = new
        if SMOOTH:
            shift = tl.where(at == 0, safe, shift)
            plain += tl.where(col < c, v - shift, 0.0)
    s = tl.sum(total, 0)
    y = tl.load(target + row * t_row).to(tl.int64)
    local = y - start
    inside = (local >= 0) & (local < c) & (y != ignore)
    t = tl.load(base + tl.where(inside, local, 0), mask=inside, other=0.0).to(tl.float32)
    t = tl.where(((y < 0) | (y >= classes)) & (y != ignore), float("nan"), t)
    if FINAL:
        logs = tl.where(m == minus, float("nan"), tl.log(s.to(tl.float64)))
        loss = logs.to(tl.float32) + (m - t)
        if SMOOTH:  # ε of the label's distance to m is taken back for ε of the mean distance
            loss -= smoothing * ((m - t) - ((m - shift) - tl.sum(plain, 0) / c))
        tl.store(first + row, tl.where(y == ignore, 0.0, loss))
        tl.store(second + row, m.to(tl.float64) + logs)
    else:
        tl.store(first + row, m)
        tl.store(second + row, s)
        tl.store(third + row, t)


@jit
def _backward(grad, x, target, lse, dx, c, x_row, t_row, start, hard, even, BLOCK: tl.constexpr):
    """One block of one row."""
    blocks = tl.cdiv(c, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    seen = col < c
    v = tl.load(x + row * x_row + col, mask=seen, other=0.0).to(tl.float32)
    label = tl.load(target + row * t_row).to(tl.int64) - start
    exact = tl.load(lse + row)
    near = exact.to(tl.float32)
    p = tl.exp((v - near) - (exact - near).to(tl.float32)) - even
    p = tl.where(col.to(tl.int64) == label, p - hard, p)
    g = tl.load(grad + row).to(tl.float32)
    tl.store(dx + row * c + col, p * g, mask=seen)


@jit
def _combine(stats, lse, picked, n, k, BLOCK: tl.constexpr):
    """stats [k, 3, n] of k blocks of classes; three numbers of a row, so float64 costs nothing."""
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    m = tl.full((BLOCK,), float("-inf"), tl.float64)
    s = tl.zeros((BLOCK,), tl.float64)
    t = tl.zeros((BLOCK,), tl.float32)
    for i in range(k):
        at = stats + (3 * n) * i + col
        other = tl.load(at, mask=seen, other=0.0).to(tl.float64)
        new = tl.maximum(m, other)
        safe = tl.where(new == float("-inf"), 0.0, new)
        s = s * tl.exp(m - safe) + tl.load(at + n, mask=seen, other=1.0).to(tl.float64) * tl.exp(other - safe)
        t += tl.load(at + 2 * n, mask=seen, other=0.0)
        m = new
    tl.store(lse + col, tl.where(m == float("-inf"), float("nan"), m + tl.log(s)), mask=seen)
    tl.store(picked + col, t, mask=seen)


FORWARD = register(
    "cross_entropy.forward", _forward, (Config(4096, 1, 8, 2), Config(8192, 1, 16, 2), Config(4096, 1, 4, 2), Config(2048, 1, 4, 3))
)
BACKWARD = register("cross_entropy.backward", _backward, (Config(2048, 1, 4), Config(4096, 1, 8), Config(1024, 1, 4)))
COMBINE = register("cross_entropy.combine", _combine, (Config(256, 1, 2),))


def forward(x: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """x [n, c] of all classes, target [n] -> (loss float32, lse float64), [n].

    The loss is 0 where the label is ignored, nan where it is no class.
    """
    x, n, c = as_rows(x), *x.shape
    loss, lse = (torch.empty(n, dtype=dtype, device=x.device) for dtype in (torch.float32, torch.float64))
    _run(x, target, loss, lse, loss, 0, c, ignore_index, smoothing, FINAL=True, SMOOTH=smoothing != 0)
    return loss, lse


def stats(x: Tensor, target: Tensor, start: int, classes: int, ignore_index: int) -> Tensor:
    """x [n, c] of the classes [start, start + c) -> m, s, t: float32 [1, 3, n]."""
    x, n, _ = as_rows(x), *x.shape
    out = torch.empty((1, 3, n), dtype=torch.float32, device=x.device)
    _run(x, target, *out[0].unbind(), start, classes, ignore_index, 0.0, FINAL=False, SMOOTH=False)
    return out


def _run(x, target, first, second, third, start, classes, ignore_index, smoothing, **flags):
    config = choose(FORWARD, x.shape[1], x) or FORWARD.configs[0]
    numbers = (x.shape[1], x.stride(0), target.stride(0), start, classes, ignore_index, float(smoothing))
    launch(FORWARD, config, x.shape[0], x, target, first, second, third, *numbers, **flags)


def backward(grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, start: int, hard: float, even: float) -> Tensor:
    """As `kernels.loss.cross_entropy_backward`."""
    flat, (n, c) = as_rows(x), x.shape
    dx = torch.empty((n, c), dtype=x.dtype, device=x.device)
    config = choose(BACKWARD, c, x) or BACKWARD.configs[0]
    numbers = (c, flat.stride(0), target.stride(0), start, float(hard), float(even))
    launch(BACKWARD, config, n * -(-c // config.block), grad.contiguous(), flat, target, lse.contiguous(), dx, *numbers)
    return dx


def combine(stats_: Tensor) -> tuple[Tensor, Tensor]:
    """[k, 3, n] -> (lse float64, picked float32), [n]."""
    k, _, n = stats_.shape
    lse, picked = (torch.empty(n, dtype=dtype, device=stats_.device) for dtype in (torch.float64, torch.float32))
    config = COMBINE.configs[0]
    launch(COMBINE, config, -(-n // config.block), stats_.contiguous(), lse, picked, n, k)
    return lse, picked
