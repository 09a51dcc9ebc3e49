"""The ops of our own against eager torch: values, gradients, and that blocks of a tensor agree with the whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from netmind_autopar.kernels import DIRECT
from netmind_autopar.kernels.counter import keep_mask

ops = torch.ops.autopar
TINY = 1e-12


def close(a: Tensor, b: Tensor, tolerance: float = TINY) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert not a.numel() or float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


def heads(b: int, h: int, s: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, s, h, d, dtype=dtype).transpose(1, 2).requires_grad_()


def a_mask(kind: str, s: int, t: int) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.rand(2, 1, s, t) > 0.3
    seen[..., 0] = True
    if kind == "bool":
        return seen
    if kind == "bool 2d":
        return seen[0, 0]
    return torch.randn(2, 4, s, t, dtype=torch.float64).masked_fill(~seen, -float("inf"))


# Causal and a mask at once is what eager refuses, so there is nothing to compare with.
@pytest.mark.parametrize(("mask", "causal"), [("none", False), ("bool", False), ("bool 2d", False), ("added", False), ("none", True)])
@pytest.mark.parametrize(("kv_heads", "s", "t", "e"), [(4, 6, 6, 8), (2, 6, 6, 8), (1, 5, 7, 8), (4, 6, 6, 5), (4, 1, 9, 8)])
def test_attention(mask: str, kv_heads: int, s: int, t: int, e: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = heads(2, 4, s, 8), heads(2, kv_heads, t, 8), heads(2, kv_heads, t, e)
    given = a_mask(mask, s, t)
    args = (q, k, v, given, None, causal, 0.3, 0.0, 0, 0, 0, 4, 0, s)
    out, lse = ops.attention(*args)
    expected = F.scaled_dot_product_attention(q, k, v, given, 0.0, causal, scale=0.3, enable_gqa=kv_heads != 4)
    close(out, expected)
    assert lse.shape == (2, 4, s) and not lse.requires_grad
    grad = torch.randn_like(out)
    for mine, eager in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        close(mine, eager)
    if t != 7 and (mask != "added" or s == 1):  # a sample: it is slow
        return
    torch.library.opcheck(ops.attention.default, args)
    detached = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(ops.attention_backward.default, (*detached, *args[3:]))


def test_attention_in_bfloat16_and_float32() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        q, k, v = (heads(2, 4, 16, 8, dtype) for _ in range(3))
        out, lse = ops.attention(q, k, v, None, None, True, 0.3, 0.0, 0, 0, 0, 4, 0, 16)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        close(out, expected, tolerance)
        assert lse.dtype == torch.float32
        for mine, eager in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
            close(mine, eager, 2 * tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_row_that_sees_nothing_is_zero(p: float) -> None:
    torch.manual_seed(0)
    q, k, v = (heads(2, 4, 6, 8) for _ in range(3))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    out, lse = ops.attention(q, k, v, mask, torch.tensor(1), False, 0.3, p, 0, 0, 0, 4, 0, 6)
    assert out.isfinite().all() and lse.isfinite().all() and (out[0, :, 2] == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and (grads[0][0, :, 2] == 0).all()


def test_attention_dropout_is_its_own_derivative() -> None:
    torch.manual_seed(0)
    q, k, v = heads(2, 4, 5, 3), heads(2, 2, 6, 3), heads(2, 2, 6, 3)
    seed = torch.tensor(7)

    def run(*x: Tensor) -> Tensor:
        return ops.attention(*x, None, seed, True, 0.5, 0.4, 3, 0, 0, 4, 0, 5)[0]

    assert torch.autograd.gradcheck(run, (q, k, v))
    torch.library.opcheck(ops.attention.default, (q, k, v, None, seed, True, 0.5, 0.4, 3, 0, 0, 4, 0, 5))


def test_attention_dropout_of_blocks() -> None:
    """Split over batch and heads, each block draws what the whole draws there; key heads split with their query heads."""
    torch.manual_seed(0)
    q, k, v = heads(4, 6, 5, 3).detach(), heads(4, 3, 5, 3).detach(), heads(4, 3, 5, 3).detach()
    seed = torch.tensor(11)
    whole, _ = ops.attention(q, k, v, None, seed, True, 0.5, 0.5, 2, 0, 0, 6, 0, 5)
    for b, h in itertools.product(range(0, 4, 2), range(3)):
        part = (slice(b, b + 2), slice(2 * h, 2 * h + 2)), (slice(b, b + 2), slice(h, h + 1))
        block, _ = ops.attention(q[part[0]], k[part[1]], v[part[1]], None, seed, True, 0.5, 0.5, 2, b, 2 * h, 6, 0, 5)
        close(block, whole[part[0]])
    plain, _ = ops.attention(q, k, v, None, None, True, 0.5, 0.0, 0, 0, 0, 6, 0, 5)
    assert not torch.allclose(whole, plain)


def test_attention_with_a_learned_mask_is_refused() -> None:
    q, k, v = (heads(1, 2, 3, 4) for _ in range(3))
    with pytest.raises(NotImplementedError):
        ops.attention(q, k, v, torch.zeros(3, 3, dtype=torch.float64, requires_grad=True), None, False, 0.5, 0.0, 0, 0, 0, 2, 0, 3)


def test_dropout_values_and_backward() -> None:
    x = torch.randn(64, 33, dtype=torch.float64, requires_grad=True)
    args = (x, torch.tensor(5), 0.25, 4, [64, 33], [0, 0], [64, 33])
    y = ops.dropout(*args)
    kept = y != 0
    close(y, x.detach() * kept / 0.75)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    close(grad, kept.double() / 0.75)
    assert torch.equal(y, ops.dropout(*args))
    torch.library.opcheck(ops.dropout.default, args)
    assert (ops.dropout(x, torch.tensor(5), 1.0, 4, [64, 33], [0, 0], [64, 33]) == 0).all()


def bits(seed: int, salt: int, p: float, n: int) -> Tensor:
    return keep_mask(torch.tensor(seed), salt, p, [n], [0], [n]).double()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_share_and_independence(p: float) -> None:
    """Mean within 4 standard deviations; no correlation between neighbours, rows, salts and seeds beyond 4 of theirs."""
    n = 1 << 20
    bound = 4 / n**0.5
    first = bits(3, 0, p, n)
    assert abs(first.mean() - (1 - p)) < bound * (p * (1 - p)) ** 0.5
    z = (first - first.mean()) / first.std()
    for lag in (1, 2, 3, 64, 768, 1024, 4096):
        assert abs((z * z.roll(lag)).mean()) < bound, lag
    for other in (bits(3, 1, p, n), bits(4, 0, p, n), bits(3 + (1 << 32), 0, p, n), bits(0, 3, p, n)):
        assert abs((z * (other - other.mean()) / other.std()).mean()) < bound
    blocks = first.view(-1, 64).mean(1)  # the spread of block means tells clumping
    assert float(blocks.std() / (p * (1 - p) / 64) ** 0.5) == pytest.approx(1, abs=0.03)


def test_blocks_draw_what_the_whole_draws() -> None:
    seed, parts = torch.tensor(9), (6, 5, 8, 3)
    whole = keep_mask(seed, 2, 0.4, parts, (0,) * 4, parts)
    blocks = [((2, 0, 0, 0), (3, 5, 8, 3)), ((0, 1, 4, 0), (6, 2, 4, 3)), ((5, 4, 7, 2), (1, 1, 1, 1)), ((0, 0, 0, 1), (6, 5, 8, 2))]
    for starts, lengths in blocks:
        block = keep_mask(seed, 2, 0.4, parts, starts, lengths)
        assert torch.equal(block, whole[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))])
    assert torch.equal(keep_mask(seed, 2, 0.4, (720,), (0,), (720,)), whole.view(-1))  # the parts do not matter, the position does
    assert keep_mask(seed, 2, 0.4, (), (), ()).shape == (1,)
    assert keep_mask(seed, 2, 0.4, (4, 3), (0, 0), (0, 3)).shape == (0, 3)


def test_beyond_four_billion_elements() -> None:
    """Rows that cross 2^32 draw the same whether they are asked for alone or with their neighbours."""
    seed, parts = torch.tensor(9), (1 << 20, 8000)
    row = (1 << 32) // 8000
    block = keep_mask(seed, 0, 0.5, parts, (row - 2, 0), (4, 8000))
    for i in range(4):
        assert torch.equal(block[i], keep_mask(seed, 0, 0.5, parts, (row - 2 + i, 0), (1, 8000))[0])
    late = keep_mask(seed, 0, 0.5, parts, (row + 2, 0), (1, 8000)).double()
    early = keep_mask(seed, 0, 0.5, parts, (2, 0), (1, 8000)).double()
    assert abs(float(((late - 0.5) * (early - 0.5)).mean()) * 4) < 4 / 8000**0.5


@pytest.mark.parametrize("padding", [-1, 3])
def test_embedding(padding: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 11, (3, 5))
    out = ops.embedding(table, index, 0, padding)
    expected = F.embedding(index, table, None if padding < 0 else padding)
    close(out, expected)
    grad = torch.randn_like(out)
    close(torch.autograd.grad(out, table, grad)[0], torch.autograd.grad(expected, table, grad)[0])
    torch.library.opcheck(ops.embedding.default, (table, index, 0, padding))
    torch.library.opcheck(ops.embedding_backward.default, (grad, index, 11, 0, padding))
    parts = [(0, 4), (4, 4), (8, 3)]
    close(sum(ops.embedding(table[s : s + n], index, s, padding) for s, n in parts), expected)
    whole = ops.embedding_backward(grad, index, 11, 0, padding)
    close(torch.cat([ops.embedding_backward(grad, index, n, s, padding) for s, n in parts]), whole)


def test_nll_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, -100, 2, 2, -100, 1])
    logp = torch.log_softmax(logits, 1)
    total, count = ops.nll_loss(logp, target, -100)
    assert count == 5
    close(total / count, F.cross_entropy(logits, target))
    mine = torch.autograd.grad(total / count, logits, retain_graph=True)[0]
    close(mine, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0])
    torch.library.opcheck(ops.nll_loss.default, (logp.detach().requires_grad_(), target, -100))
    torch.library.opcheck(ops.nll_loss_backward.default, (torch.tensor(2.0), target, 5, -100))
    assert ops.nll_loss(logp, torch.full((7,), -100), -100)[1] == 0


def test_grouped_mm() -> None:
    """Against one product per group; in blocks of groups and of rows; an empty group, and a row that is in none."""
    torch.manual_seed(0)
    x, w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([3, 3, 7, 8])
    expected = torch.cat([x[:3] @ w[0], x[3:7] @ w[2], x[7:8] @ w[3], torch.zeros(1, 5)])
    close(ops.grouped_mm(x, w, ends, 0, 0), expected)
    grad = torch.randn(9, 5, dtype=torch.float64)
    mine = torch.autograd.grad(ops.grouped_mm(x, w, ends.int(), 0, 0), (x, w), grad)
    for one, other in zip(mine, torch.autograd.grad(expected, (x, w), grad), strict=True):
        close(one, other)
    for cut in range(1, 4):
        close(ops.grouped_mm(x, w[:cut], ends, 0, 0) + ops.grouped_mm(x, w[cut:], ends, cut, 0), expected)
        close(ops.grouped_mm_backward(x, grad, ends, 4 - cut, cut, 0), mine[1][cut:])
    for cut in range(1, 9):
        close(torch.cat([ops.grouped_mm(x[:cut], w, ends, 0, 0), ops.grouped_mm(x[cut:], w, ends, 0, cut)]), expected)
        halves = ((slice(None, cut), 0), (slice(cut, None), cut))
        close(sum(ops.grouped_mm_backward(x[s], grad[s], ends, 4, 0, row) for s, row in halves), mine[1])
    torch.library.opcheck(ops.grouped_mm.default, (x, w, ends, 0, 0))
    torch.library.opcheck(ops.grouped_mm_backward.default, (x.detach(), grad, ends, 2, 1, 0))


def test_direct_is_the_op() -> None:
    """What callers may use in place of the dispatcher computes the same, and every op of the namespace is there."""
    names = """attention attention_backward dropout embedding embedding_backward grouped_mm grouped_mm_backward nll_loss
        nll_loss_backward sum_exp pick cross_entropy_backward uniform normal exponential randint"""
    assert {op._schema.name.split("::")[1] for op in DIRECT} >= set(names.split())
    x: dict[str, tuple[Any, ...]] = {
        "dropout": (torch.randn(4, 4), torch.tensor(1), 0.5, 0, [4, 4], [0, 0], [4, 4]),
        "embedding": (torch.randn(5, 2), torch.tensor([0, 4, 7]), 1, -1),
    }
    for op, function in DIRECT.items():
        name = op._schema.name.split("::")[1]
        if name in x:
            assert torch.equal(op(*x[name]), function(*x[name]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_of_turned_operands(dtype: torch.dtype) -> None:
    """The CPU's fused kernel reads its operands as if the last dim were dense."""
    torch.manual_seed(0)
    dense = [torch.randn(2, 3, 5, 5, dtype=dtype) for _ in range(4)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in dense]
    assert all(x.stride(-1) != 1 for x in turned)
    rest = (None, None, False, 0.4, 0.0, 0, 0, 0, 3, 0, 5)
    results = []
    for q, k, v, grad in (dense, turned):
        out, lse = DIRECT[ops.attention.default](q, k, v, *rest)
        given = out if q is dense[0] else out.transpose(2, 3).contiguous().transpose(2, 3)
        results.append((out, *DIRECT[ops.attention_backward.default](grad, q, k, v, given, lse, *rest)))
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("s", "t", "kv_heads"), [(7, 7, 2), (7, 4, 4), (5, 9, 1), (6, 6, 4)])
def test_attention_of_blocks_of_rows(s: int, t: int, kv_heads: int, causal: bool, p: float) -> None:
    """Blocks of query rows give the rows of the whole; their dq are its rows, and their dk and dv add up to it."""
    torch.manual_seed(0)
    q, k, v = heads(2, 4, s, 8).detach(), heads(2, kv_heads, t, 8).detach(), heads(2, kv_heads, t, 8).detach()
    grad, seed = torch.randn(2, 4, s, 8, dtype=torch.float64), torch.tensor(3) if p else None
    rest = (None, seed, causal, 0.3, p, 5, 0, 0, 4)
    out, lse = ops.attention(q, k, v, *rest, 0, s)
    grads = ops.attention_backward(grad, q, k, v, out, lse, *rest, 0, s)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for start, end in ((0, 3), (3, 4), (4, s)):
        rows = (slice(None), slice(None), slice(start, end))
        part, part_lse = ops.attention(q[rows], k, v, *rest, start, s)
        close(part, out[rows])
        close(part_lse, lse[rows])
        dq, *more = ops.attention_backward(grad[rows], q[rows], k, v, part, part_lse, *rest, start, s)
        close(dq, grads[0][rows])
        dk, dv = dk + more[0], dv + more[1]
    close(dk, grads[1])
    close(dv, grads[2])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_keys_that_no_row_sees_are_not_read(p: float) -> None:
    torch.manual_seed(0)
    q, k, v = heads(1, 2, 4, 8).detach(), heads(1, 2, 12, 8).detach(), heads(1, 2, 12, 8).detach()
    k[:, :, 8:], v[:, :, 8:] = float("nan"), float("nan")
    rest = (None, torch.tensor(1), True, 0.3, p, 0, 0, 0, 2, 4, 12)
    out, lse = ops.attention(q, k, v, *rest)
    dq, dk, dv = ops.attention_backward(torch.ones_like(out), q, k, v, out, lse, *rest)
    assert all(x.isfinite().all() for x in (out, lse, dq, dk, dv))
    assert (dk[:, :, 8:] == 0).all() and (dv[:, :, 8:] == 0).all() and bool((dk[:, :, 7] != 0).all())


def test_a_causal_block_makes_no_mask_and_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from netmind_autopar.kernels import attention as kernel

    calls: list[tuple[int, bool, bool]] = []
    fused = kernel._fused

    def counted(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        calls.append((k.shape[2], causal, bias is None))
        return fused(name, q, k, v, bias, causal, scale)

    monkeypatch.setattr(kernel, "_fused", counted)
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 12, 8)
    kernel.attention(q, k, k, None, None, True, 0.3, 0.0, 0, 0, 0, 2, 4, 12)
    assert calls == [(4, False, True), (4, True, True)]


def test_merged_blocks_in_low_precision() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        q, k, v = (heads(2, 4, 16, 8, dtype).detach() for _ in range(3))
        truth = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, scale=0.3)
        part, lse = ops.attention(q[:, :, 8:], k, v, None, None, True, 0.3, 0.0, 0, 0, 0, 4, 8, 16)
        assert part.dtype == dtype and lse.dtype == torch.float32
        close(part.double(), truth[:, :, 8:], tolerance)


def test_a_masked_causal_block() -> None:
    """A mask and causal at once: eager refuses it, the op does not."""
    torch.manual_seed(0)
    q, k, v = (heads(2, 4, 6, 8).detach() for _ in range(3))
    mask = a_mask("bool", 6, 6)
    both = mask & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, both, scale=0.3)
    for start, end in ((0, 3), (3, 6)):
        part, _ = ops.attention(q[:, :, start:end], k, v, mask[:, :, start:end], None, True, 0.3, 0.0, 0, 0, 0, 4, start, 6)
        close(part, expected[:, :, start:end])


@pytest.mark.parametrize("name", ["flash", "efficient"])
@pytest.mark.parametrize(("start", "s", "t"), [(0, 6, 6), (4, 3, 9), (6, 2, 8), (0, 3, 7)])
def test_how_the_kernels_of_a_gpu_are_called(name: str, start: int, s: int, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with their conventions: flash aligns the last row with the last key, the memory-efficient one the first with the first."""
    from netmind_autopar.kernels import attention as kernel

    def weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        scores = q @ k.transpose(2, 3) * scale
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2] if name == "flash" else 0)
        return scores.masked_fill(~seen, -float("inf")) if causal else scores

    def forward(_: str, q: Tensor, k: Tensor, v: Tensor, bias: None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = weights(q, k, causal, scale)
        return scores.softmax(3) @ v, scores.logsumexp(3)

    def backward(_: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None, causal: bool, scale: float):
        shares = (weights(q, k, causal, scale) - lse.unsqueeze(3)).exp()
        ds = shares * (grad @ v.transpose(2, 3) - (grad * out).sum(3, keepdim=True)) * scale
        return ds @ k, ds.transpose(2, 3) @ q, shares.transpose(2, 3) @ grad

    torch.manual_seed(0)
    q, k, v = heads(2, 4, s, 8).detach(), heads(2, 2, t, 8).detach(), heads(2, 2, t, 8).detach()
    rest = (None, None, True, 0.3, 0.0, 0, 0, 0, 4, start, t)
    out, lse = kernel.attention(q, k, v, *rest)
    grad = torch.randn_like(out)
    expected = (out, lse, *kernel.attention_backward(grad, q, k, v, out, lse, *rest))
    monkeypatch.setattr(kernel, "_kernel", lambda *_: name)
    monkeypatch.setattr(kernel, "_fused", forward)
    monkeypatch.setattr(kernel, "_fused_backward", backward)
    out, lse = kernel.attention(q, k, v, *rest)
    for mine, cpu in zip((out, lse, *kernel.attention_backward(grad, q, k, v, out, lse, *rest)), expected, strict=True):
        close(mine, cpu)
