"""`autopar::uniform`, `normal`, `exponential`, `randint`: random tensors whose elements depend on the seed, the op's salt and
the element's position in the *global* tensor alone. A piece of the tensor is the same numbers, bit for bit, wherever it is made.

    (seed, a, b, salt, dtype, shape, parts, starts, lengths) -> tensor of `shape`

`parts` are the part sizes of the global tensor, major first; the piece is `lengths` of them from `starts` on, `shape` its own shape.
a and b are low and high, mean and standard deviation, rate (and nothing), or low and high.

Bit for bit also needs a logarithm and a sine that do not depend on where in memory an element stands, as those of vector libraries
do: they are made of additions, products, one division and a square root here, which IEEE 754 rounds in one way. Everything is
computed in float64 from 31 bits (uniform float32 takes 24 of them), for float64 results from 62, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .counter import block, words

_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def _high(bits: Sequence[Tensor], digits: int) -> Tensor:
    """The first `digits` of the bits as a number in [0, 1): float64."""
    if len(bits) == 1:
        return (bits[0] >> (31 - digits)).to(torch.float64).mul_(2.0**-digits)
    whole = (bits[0].to(torch.int64) << 31) | bits[1]
    return (whole >> (62 - digits)).to(torch.float64).mul_(2.0**-digits)


def _open(bits: Sequence[Tensor]) -> Tensor:
    """A number in (0, 1), never 0 and never 1: the middle of its interval. float64, exact."""
    digits = 31 if len(bits) == 1 else 52
    return _high(bits, digits).add_(2.0 ** -(digits + 1))


def _log(u: Tensor) -> Tensor:
    """ln u for u in (0, 1]: u = m 2^e with m in [0.7, 1.4], ln m = 2 artanh s with s = (m - 1) / (m + 1), |s| < 0.172."""
    m, e = torch.frexp(u)
    small = m < math.sqrt(0.5)
    m, e = torch.where(small, m * 2, m), e.to(torch.float64) - small.to(torch.float64)
    s = (m - 1).div_(m + 1)
    z = s * s
    out = torch.full_like(z, 1 / 21)
    for k in range(19, 0, -2):
        out.mul_(z).add_(1 / k)
    return out.mul_(s).mul_(2).add_(e * math.log(2))


def _cos_turns(t: Tensor) -> Tensor:
    """cos(2 pi t) for t in [0, 1): minus the sine of a quarter turn less |t - 1/2|, by its series, whose 12th term is below 2e-18."""
    a = (0.25 - (t - 0.5).abs()).mul_(2 * math.pi)
    z = a * a
    out = torch.full_like(z, -1.0 / math.factorial(21))
    for k in range(19, 0, -2):
        out.mul_(z).add_((-1.0) ** ((k + 1) // 2) / math.factorial(k))
    return out.mul_(a)


def _uniform(bits: Sequence[Tensor], low: float, high: float, dtype: torch.dtype) -> Tensor:
    out = _high(bits, _DIGITS[dtype]).mul_(high - low).add_(low).to(dtype)
    return torch.where(out < high, out, torch.tensor(low, dtype=dtype, device=out.device)) if high > low else out


def _normal(bits: Sequence[Tensor], mean: float, std: float, dtype: torch.dtype) -> Tensor:
    """Box and Muller (Annals of Mathematical Statistics 29, 1958), one of the two numbers."""
    half = len(bits) // 2
    radius = _log(_open(bits[:half])).mul_(-2).sqrt_()
    return radius.mul_(_cos_turns(_high(bits[half:], 31 if half == 1 else 53))).mul_(std).add_(mean).to(dtype)


def _exponential(bits: Sequence[Tensor], rate: float, _: float, dtype: torch.dtype) -> Tensor:
    return _log(_open(bits)).div_(-rate).to(dtype)


def _randint(bits: Sequence[Tensor], low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Off from uniform by less than (high - low) / 2^62."""
    return ((bits[0].to(torch.int64) << 31) | bits[1]).remainder_(high - low).add_(low).to(dtype)


# name -> (function of bits, lanes of 31 bits, type of a and b); float64 takes twice the lanes
_KINDS: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "uniform": (_uniform, 1, "float"),
    "normal": (_normal, 2, "float"),
    "exponential": (_exponential, 1, "float"),
    "randint": (_randint, 2, "int"),
}


def _drawer(name: str) -> Callable[..., Tensor]:
    function, lanes, kind = _KINDS[name]

    def draw(
        seed: Tensor,
        a: Any,
        b: Any,
        salt: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        parts: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> Tensor:
        parts, starts, lengths = block(parts, starts, lengths)
        out = torch.empty(lengths, dtype=dtype, device=seed.device)
        flat = out.view(-1, lengths[-1]) if out.numel() else out
        many = lanes * 2 if dtype == torch.float64 and kind == "float" else lanes
        for rows, bits in words(seed, salt, many, parts, starts, lengths):
            flat[rows] = function(bits, a, b, dtype)
        return out.view(tuple(shape))

    draw.__name__ = name
    return draw


def _register(name: str) -> tuple[Any, Callable[..., Tensor]]:
    draw, kind = _drawer(name), _KINDS[name][2]
    place = "int[] shape, int[] parts, int[] starts, int[] lengths"
    schema = f"(Tensor seed, {kind} a, {kind} b, int salt, ScalarType dtype, {place}) -> Tensor"
    op = torch.library.custom_op(f"autopar::{name}", draw, mutates_args=(), schema=schema)
    op.register_fake(lambda seed, a, b, salt, dtype, shape, parts, starts, lengths: seed.new_empty(shape, dtype=dtype))
    return getattr(torch.ops.autopar, name).default, draw


DIRECT = dict(_register(name) for name in _KINDS)
