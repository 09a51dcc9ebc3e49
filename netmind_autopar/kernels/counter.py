"""Random bits by counting: what is drawn for an element depends on the seed, the op's salt and the element's position in the
*global* tensor, never on how the tensor is split, in what order blocks are computed, or how often.

The generator is a keyed 32-bit finalizer (the multiply-xorshift rounds of splitmix64 and "lowbias32", Chris Wellons,
https://nullprogram.com/blog/2018/07/31/). Two 32-bit keys come from a full splitmix64 of (seed, salt, high half of the
index); the low half of the index is mixed with them. All arithmetic is torch integer arithmetic, which wraps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 1 << 20  # elements hashed per step: the int32 temporaries then stay in cache


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift(x: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    """Logical right shift: torch's `>>` copies the sign."""
    return (x >> n) & ((1 << (bits - n)) - 1)


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """One splitmix64 step on int64 bit patterns."""
    x = x + _signed(_GOLDEN, 64)
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def _keys(seed: torch.Tensor, salt: int, high: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 keys for every high half of an index."""
    h = splitmix64(splitmix64(seed.to(torch.int64) ^ _signed(salt * _GOLDEN, 64)) ^ high)
    return h.to(torch.int32), (h >> 32).to(torch.int32)


def _mix(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Two rounds on int32 bit patterns, in place, `key` entering between them; 31 uniform bits come out, 0 ≤ x < 2^31."""
    for n, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= (x >> n).bitwise_and_((1 << (32 - n)) - 1)
        x *= _signed(factor, 32)
    x ^= key
    for n, factor in ((15, 0x21F0AAAD), (15, 0x735A2D97)):
        x ^= (x >> n).bitwise_and_((1 << (32 - n)) - 1)
        x *= _signed(factor, 32)
    return x.bitwise_and_(0x7FFFFFFF)


def _bases(parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Global linear index of the first element of every run of the last part: int64 [product of lengths but the last]."""
    base = torch.zeros((), dtype=torch.int64, device=device)
    stride = math.prod(parts)
    for n, start, length in zip(parts[:-1], starts[:-1], lengths[:-1], strict=True):
        stride //= n
        base = base.unsqueeze(-1) + torch.arange(start, start + length, device=device) * stride
        base = base.reshape(-1)
    return base.reshape(-1) + starts[-1]


def words(
    seed: torch.Tensor, salt: int, lanes: int, parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Random bits of a block of the global tensor, some rows at a time: the rows, and `lanes` int32 tensors [rows, last length] of
    31 uniform bits. Lanes of one element, elements of one lane and salts are independent of one another.

    seed: int64, 0-dim. `parts` are the global sizes (major first), the block is `lengths` elements from `starts` on in each; all three
    have one entry or more. Rows are the elements of all parts but the last.
    """
    n = lengths[-1]
    if not math.prod(lengths):
        return
    rows = _bases(parts, starts, lengths, seed.device)
    last = sum((start + length - 1) * math.prod(parts[d + 1 :]) for d, (start, length) in enumerate(zip(starts, lengths, strict=True)))
    step = max(1, _BLOCK // n) if seed.device.type == "cpu" else len(rows)
    column = torch.arange(n, dtype=torch.int64, device=seed.device)
    low_column = column.to(torch.int32)
    keys = [_keys(seed, salt, lane << 32) for lane in range(lanes)]
    for i in range(0, len(rows), step):
        block, found = rows[i : i + step, None], []
        for lane, (low, key) in enumerate(keys):
            if last < 1 << 32:
                x = (block.to(torch.int32) ^ 0) + low_column
                x ^= low
            else:
                index = block + column
                low, key = _keys(seed, salt, (index >> 32) + (lane << 32))
                x = index.to(torch.int32) ^ low
            found.append(_mix(x, key))
        yield slice(i, i + step), found


def block(parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The same block with at least one part, as `words` takes it."""
    return tuple(parts) or (1,), tuple(starts) or (0,), tuple(lengths) or (1,)


def keep_mask(seed: torch.Tensor, salt: int, p: float, parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """True where an element is kept, with probability 1 - p: bool, of shape `lengths`.

    seed: int64, 0-dim. `parts` are the global sizes (major first), the block is `lengths` elements from `starts` on in each.
    """
    parts, starts, lengths = block(parts, starts, lengths)
    out = torch.empty(lengths, dtype=torch.bool, device=seed.device)
    threshold = min(round(p * 2**31), 2**31 - 1)
    flat = out.view(-1, lengths[-1]) if out.numel() else out
    for rows, (bits,) in words(seed, salt, 1, parts, starts, lengths):
        torch.ge(bits, threshold, out=flat[rows])
    return out
