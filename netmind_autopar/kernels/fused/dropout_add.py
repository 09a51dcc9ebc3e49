"""Dropout by counters, alone or with a residual added: `autopar::dropout_add` and the kernel of `autopar::dropout`.

    y = x keep / (1 - p) + residual

What an element draws depends on the seed, the salt and its index in the *global* tensor: kernel and `kernels/counter.py` draw the same
bits, so that a mask is bitwise the same on any mesh, in forward, backward and on any device. The generator is that of
`counter.py`: two splitmix64 for a program's keys, four rounds of a 32-bit finalizer for an element (about 16 integer operations).

Roofline, bytes per element in 16 bit: dropout 4, with residual 6; backward 4 (the gradient of the residual is the gradient itself).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import alike, floating, refuse, together, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable

_GOLDEN = 0x9E3779B97F4A7C15

# ---- kernel -------------------------------------------------------------------------------------------------------------------


@jit
def _splitmix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _rounds(x, key):
    """31 uniform bits of each element."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ key
    x = (x ^ (x >> 15)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x & 0x7FFFFFFF


@jit
def _drop(
    x, residual, seed, y, n, middle, offset, outer_step, middle_step, salted, threshold, scale,
    ADD: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one run of n elements that follow one another in the global tensor too. FAR: indices beyond 32 bits."""
    blocks = tl.cdiv(n, BLOCK)
    run = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    first = offset + (run // middle) * outer_step + (run % middle) * middle_step
    index = (first + col).to(tl.uint64)
    base = _splitmix64((tl.load(seed) ^ salted).to(tl.uint64))
    if FAR:
        keys = _splitmix64(base ^ (index >> 32))
    else:
        keys = _splitmix64(base)
    bits = _rounds(index.to(tl.uint32) ^ keys.to(tl.uint32), (keys >> 32).to(tl.uint32))
    keep = (bits.to(tl.int32) >= threshold).to(tl.float32)
    v = tl.load(x + run * n + col, mask=seen, other=0.0).to(tl.float32) * keep * scale
    if ADD:
        v += tl.load(residual + run * n + col, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + run * n + col, v, mask=seen)


DROP = register("dropout_add", _drop, (Config(1024, 1, 4), Config(2048, 1, 4), Config(2048, 1, 8)))


def runs(parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> tuple[int, list[tuple[int, int]]] | None:
    """The block as runs: its first global index, and (length, step in the global tensor) of three nested loops, major first.

    Neighbouring parts that are whole melt into one, parts of which one element is here into the first index. None when more
    than three are left.
    """
    loops: list[tuple[int, int]] = []
    first, step = 0, 1
    for size, start, length in zip(reversed(parts), reversed(starts), reversed(lengths), strict=True):
        first += start * step
        if length > 1 and loops and loops[-1][0] * loops[-1][1] == step:
            loops[-1] = (loops[-1][0] * length, loops[-1][1])
        elif length > 1:
            loops.append((length, step))
        step *= size
    if loops and loops[0][1] != 1:
        loops.insert(0, (1, 1))  # one element of the last part is here: runs of one element
    loops += [(1, 0)] * (3 - len(loops))
    return (first, loops[::-1]) if len(loops) == 3 else None


def drop(
    x: Tensor,
    residual: Tensor | None,
    seed: Tensor,
    p: float,
    salt: int,
    parts: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
) -> Tensor | None:
    """The kernel's result; None where it does not know the tensors or the block."""
    if not usable(x, residual) or seed.device != x.device or math.prod(lengths) != x.numel():
        return None
    found = runs(parts, starts, lengths)
    if found is None:
        return None
    first, ((_, outer_step), (middle, middle_step), (n, _)) = found
    last = first + sum((length - 1) * step for length, step in found[1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = choose(DROP, n, x) or DROP.configs[0]
    salted = (salt * _GOLDEN) & (2**64 - 1)
    numbers = (n, middle, first, outer_step, middle_step, salted - 2**64 if salted >> 63 else salted)
    chance = (min(round(p * 2**31), 2**31 - 1), 1.0 / (1.0 - p) if p < 1.0 else 0.0)
    more = x if residual is None else residual.contiguous()
    grid = x.numel() // n * -(-n // config.block)
    launch(
        DROP, config, grid, x.contiguous(), more, seed.to(torch.int64), y, *numbers, *chance, ADD=residual is not None, FAR=last >= 1 << 32
    )
    return y


# ---- the op -------------------------------------------------------------------------------------------------------------------


def dropout_add(
    x: Tensor, residual: Tensor, seed: Tensor, p: float, salt: int, parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """dropout(x) + residual, rounded once."""
    _check(x, residual, seed, p, lengths)
    found = drop(x, residual, seed, p, salt, parts, starts, lengths)
    if found is not None:
        return found
    from ..counter import keep_mask

    keep = keep_mask(seed, salt, p, parts, starts, lengths).view(x.shape)
    dropped = torch.mul(x.to(wide(x.dtype)), keep).mul_(1.0 / (1.0 - p) if p < 1.0 else 0.0)
    return dropped.add_(residual).to(x.dtype).contiguous()


def _check(x: Tensor, residual: Tensor, seed: Tensor, p: float, lengths: Sequence[int]) -> None:
    floating("dropout_add", x=x, residual=residual)
    alike("dropout_add", x=x, residual=residual)
    together("dropout_add", x=x, seed=seed)
    if not 0 <= p <= 1:
        raise refuse("dropout_add", f"p is {p}", "it is the chance that an element is dropped, 0 to 1")
    if seed.dim() or seed.dtype != torch.int64:
        raise refuse("dropout_add", f"seed is {seed.dtype} {list(seed.shape)}", "it must be one int64")
    if math.prod(lengths) != x.numel():
        raise refuse("dropout_add", f"lengths {list(lengths)} for {x.numel()} elements", "the block must hold what x holds")


@torch.library.custom_op("autopar::dropout_add", mutates_args=())
def _dropout_add(
    x: Tensor, residual: Tensor, seed: Tensor, p: float, salt: int, parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    return dropout_add(x, residual, seed, p, salt, parts, starts, lengths)


@_dropout_add.register_fake
def _(x, residual, seed, p, salt, parts, starts, lengths):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, _, seed, *ctx.rest = inputs
    ctx.save_for_backward(seed)


def _derive(ctx, grad):
    dx = torch.ops.autopar.dropout.default(grad, ctx.saved_tensors[0], *ctx.rest)
    return dx, grad, None, None, None, None, None, None


_dropout_add.register_autograd(_derive, setup_context=_setup)

DIRECT = {torch.ops.autopar.dropout_add.default: dropout_add}
