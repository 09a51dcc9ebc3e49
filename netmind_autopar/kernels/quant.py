"""Numbers in blocks of 8 bits with one scale a block, for collectives that send a quarter of float32's bytes.

A tensor is read as one row, cut into blocks of `block` elements, the last one filled up with zeros. With a = max |x| over a block:

    int8   scale s = a / 127,  q = round(x / s), ties to even      |x - s q| <= s / 2              = a / 254
    fp8    scale s = a / 448,  q = x / s in float8_e4m3fn          |x - s q| <= max(|x| / 17, s / 1024)   <= a / 17

(e4m3 has 3 bits of mantissa, u = 2^-4: relative rounding u / (1 + u) = 1 / 17; its least step is 2^-9, so that below the normal
numbers half a step is 2^-10 s.) Both hold up to float32's own rounding of the quotient and the product, which `error_bound` adds as
2^-22 a. A block of zeros has scale 0 and comes back as zeros. A block whose a is below 2^-100 is taken as zeros, since its quotients
would not be exact; its error is a. An infinity, a nan or a number beyond 2^126 leaves no scale: its block comes back as nan, whole, so
that an overflow is seen, by a loss scaler too, and nobody mistakes it for a number.

Sums of n quantised terms are taken in float32, in the order of the devices, the same on each:

    reduce-scatter   every device sends n - 1 pieces of its tensor quantised, and adds up what it gets:     sum of the terms' bounds
    all-reduce       the same, and the sum is quantised once more and gathered, so that all hold the same bits:
                     the sum of the terms' bounds, and the bound of the sum

plus float32's rounding of n - 1 additions, (n - 1) 2^-24 times the sum of the terms' |a|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "fp8"]
BLOCK = 256
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LEAST, _MOST = 2.0**-100, 2.0**126  # below the one a block is zeros, above the other it is nan
_ROUNDING = 2.0**-22  # of a quotient and a product in float32, relative to the block's largest


def quantize_blocks(x: Tensor, block: int = BLOCK, kind: Kind = "int8") -> tuple[Tensor, Tensor]:
    """x of any shape, float32 or fewer bits -> (q [blocks, block] in int8 or float8_e4m3fn, scale [blocks] float32)."""
    rows = _blocks(x.to(torch.float32), block)
    largest = rows.abs().amax(1)  # nan where there is one
    usable = (largest >= _LEAST) & (largest <= _MOST)
    scale = torch.where(usable, largest / LARGEST[kind], torch.where(largest < _LEAST, 0.0, torch.nan))
    # a quotient may round to a little more than the largest number, which float8 would make nan
    quotient = torch.where(usable[:, None], rows / scale[:, None], 0.0).clamp(-LARGEST[kind], LARGEST[kind])
    return (quotient.round() if kind == "int8" else quotient).to(DTYPES[kind]), scale


def dequantize(q: Tensor, scale: Tensor, shape: Sequence[int]) -> Tensor:
    """What `quantize_blocks` made of a tensor of this shape, in float32."""
    size = torch.Size(shape).numel()
    return (q.to(torch.float32) * scale[:, None]).reshape(-1)[:size].reshape(tuple(shape))


def dequantize_sum(q: Tensor, scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Of n tensors of one shape the sum in float32, added up in order: q [n, blocks, block], scale [n, blocks]."""
    total = dequantize(q[0], scale[0], shape)
    for i in range(1, len(q)):
        total = total + dequantize(q[i], scale[i], shape)
    return total


def error_bound(x: Tensor, block: int = BLOCK, kind: Kind = "int8") -> Tensor:
    """The most by which each element of x may change; nan in a block that comes back as nan. float64, the shape of x."""
    wide = x.to(torch.float64)
    largest = _blocks(wide, block).abs().amax(1, keepdim=True).expand(-1, block).reshape(-1)[: x.numel()].reshape(x.shape)
    largest = torch.where(largest <= _MOST, largest, torch.nan)
    step = largest / LARGEST[kind]
    half = step / 2 if kind == "int8" else torch.maximum(wide.abs() / 17, step / 1024)
    return torch.where(largest < _LEAST, largest, half + _ROUNDING * largest)


def sum_bound(terms: Sequence[Tensor], block: int = BLOCK, kind: Kind = "int8", *, gathered: bool = False) -> Tensor:
    """The most by which each element of the compressed sum may differ from the exact one; gathered: as all-reduce, quantised twice."""
    added = sum(t.to(torch.float64).abs() for t in terms)
    within = sum(error_bound(t, block, kind) for t in terms)
    bound = within + (len(terms) - 1) * 2.0**-24 * (added + within)
    if not gathered:
        return bound
    total = sum(t.to(torch.float64) for t in terms)
    return bound + error_bound(total.abs() + bound, block, kind)


def compressed_sum(terms: Sequence[Tensor], block: int = BLOCK, kind: Kind = "int8", *, gathered: bool = False) -> Tensor:
    """What every device holds after a compressed reduction of `terms`, one a device; the reference that the collectives must equal."""
    pairs = [quantize_blocks(t, block, kind) for t in terms]
    total = dequantize_sum(torch.stack([q for q, _ in pairs]), torch.stack([s for _, s in pairs]), terms[0].shape)
    return dequantize(*quantize_blocks(total, block, kind), total.shape) if gathered else total


def compressed_bytes(elements: int, block: int = BLOCK) -> int:
    """Bytes of a quantised tensor: one an element, whole blocks, and four a scale."""
    blocks = -(-elements // block)
    return blocks * (block + 4)


def _blocks(x: Tensor, block: int) -> Tensor:
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).reshape(-1, block)
