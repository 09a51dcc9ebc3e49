"""Quantised blocks: errors stay within the stated bound for any tensor, whatever its size, and sums are the same on every device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netmind_autopar.kernels import quant
from netmind_autopar.kernels.quant import (
    DTYPES,
    Kind,
    compressed_bytes,
    compressed_sum,
    dequantize,
    dequantize_sum,
    error_bound,
    quantize_blocks,
    sum_bound,
)

KINDS: tuple[Kind, ...] = ("int8", "fp8")


def tensor(shape: tuple[int, ...], seed: int, spread: float, kind: int) -> Tensor:
    """Numbers of very different sizes, zeros among them; of kind 1 whole stretches of zeros, of kind 2 all alike."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * torch.exp(spread * torch.randn(shape, generator=draw))
    if kind == 1:
        x = x.reshape(-1)
        x[: len(x) // 2] = 0
        x = x.reshape(shape)
    return torch.full(shape, 0.1) if kind == 2 else x


shapes = st.lists(st.integers(0, 19), min_size=0, max_size=3).map(tuple)
tensors = st.builds(tensor, shapes, st.integers(0, 10**6), st.floats(0, 20), st.integers(0, 2))


@given(tensors, st.sampled_from((1, 3, 32, 256)), st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_element_changes_by_more_than_the_bound(x: Tensor, block: int, kind: Kind) -> None:
    q, scale = quantize_blocks(x, block, kind)
    assert q.dtype == DTYPES[kind] and q.shape == (len(scale), block) and scale.dtype == torch.float32
    assert q.numel() + 4 * scale.numel() == compressed_bytes(x.numel(), block)
    back = dequantize(q, scale, x.shape)
    error = (back.double() - x.double()).abs()
    assert bool((error <= error_bound(x, block, kind)).all())
    assert bool((back[x == 0] == 0).all())


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), shapes, st.sampled_from(KINDS), st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_no_sum_differs_by_more_than_the_bound(seeds: list[int], shape: tuple[int, ...], kind: Kind, gathered: bool) -> None:
    terms = [tensor(shape, seed, 3.0, 0) for seed in seeds]
    exact = torch.zeros(shape, dtype=torch.float64)
    for term in terms:
        exact = exact + term.double()
    found = compressed_sum(terms, 32, kind, gathered=gathered)
    assert bool(((found.double() - exact).abs() <= sum_bound(terms, 32, kind, gathered=gathered)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_not_idle(kind: Kind) -> None:
    """An element comes near it, and it is what the page says: a / 254, and a / 17 at most."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_blocks(x, 256, kind)
    share = (dequantize(q, scale, x.shape).double() - x.double()).abs() / error_bound(x, 256, kind)
    assert 0.95 < float(share.max()) <= 1.0
    largest = x.reshape(-1, 256).abs().amax(1).double().repeat_interleave(256)
    assert bool((error_bound(x, 256, kind) <= largest * {"int8": 1 / 253, "fp8": 1 / 16.9}[kind]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_rounding_is_seen(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: numbers are cut off instead of rounded (int8), or the scale is that of other numbers (fp8)."""
    if kind == "int8":
        monkeypatch.setattr(Tensor, "round", Tensor.trunc)
    else:
        monkeypatch.setitem(quant.LARGEST, "fp8", 600.0)  # beyond what the dtype holds
    x = torch.linspace(-1, 1, 512)
    error = (dequantize(*quantize_blocks(x, 256, kind), x.shape).double() - x.double()).abs()
    assert not bool((error <= error_bound(x, 256, kind)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3.4e38])
def test_an_overflow_stays_one(kind: Kind, bad: float) -> None:
    x = torch.ones(600)
    x[300] = bad
    back = dequantize(*quantize_blocks(x, 256, kind), x.shape)
    assert bool(back[256:512].isnan().all()) and bool((back[:256] == 1).all()) and bool((back[512:] == 1).all())
    assert bool(error_bound(x, 256, kind)[256:512].isnan().all())
    assert bool(compressed_sum([torch.ones(600), x], 256, kind, gathered=True)[256:512].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_half_precision_blocks(kind: Kind) -> None:
    tiny = torch.full((10,), 1e-38)
    assert bool((dequantize(*quantize_blocks(tiny, 4, kind), tiny.shape) == 0).all())
    assert bool((tiny.double() <= error_bound(tiny, 4, kind)).all())
    half = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    q, scale = quantize_blocks(half, 32, kind)
    wide_q, wide_scale = quantize_blocks(half.float(), 32, kind)
    assert torch.equal(q.view(torch.uint8), wide_q.view(torch.uint8)) and torch.equal(scale, wide_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_sum_as_the_whole(kind: Kind) -> None:
    """Devices that add up pieces, cut at blocks, and gather them hold what the reference says, bit for bit."""
    terms = [tensor((1024,), seed, 2.0, 0) for seed in range(4)]
    pairs = [quantize_blocks(t, 256, kind) for t in terms]
    pieces = []
    for device in range(4):
        q, scale = (torch.stack([pair[i][device : device + 1] for pair in pairs]) for i in (0, 1))
        pieces.append(dequantize_sum(q, scale, (256,)))
    assert torch.equal(torch.cat(pieces), compressed_sum(terms, 256, kind))
    again = [dequantize(*quantize_blocks(piece, 256, kind), (256,)) for piece in pieces]
    assert torch.equal(torch.cat(again), compressed_sum(terms, 256, kind, gathered=True))
