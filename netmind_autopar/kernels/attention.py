"""`autopar::attention`: one op for attention on every device, with its own backward, so that the graph is the same everywhere.

Where the device has a fused kernel for the call, it is used; otherwise the mathematics, written out:

    s_ij = scale q_i·k_j + mask_ij      lse_i = log Σ_j exp s_ij      p_ij = exp(s_ij - lse_i)      o_i = Σ_j m_ij p_ij v_j
    dv_j = Σ_i m_ij p_ij do_i           dp_ij = m_ij do_i·v_j         ds_ij = p_ij (dp_ij - do_i·o_i)

with m_ij = kept_ij / (1 - p), or 1 without dropout (Dao et al., FlashAttention, arXiv:2205.14135, appendix B).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .counter import keep_mask

_aten = torch.ops.aten
_CPU_FUSED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUDA_FUSED = (torch.float32, torch.bfloat16, torch.float16)


def _tokens_first(x: Tensor) -> Tensor:
    """[b, h, s, d] laid out in memory as [b, s, h, d]: what a model's heads are viewed from and flattened to, without a copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as added numbers of q's dtype, with four dims."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -float("inf"))
    mask = mask.to(q.dtype)
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _columns(bias: Tensor | None, first: int, end: int) -> Tensor | None:
    """The mask of a run of keys."""
    return bias if bias is None or bias.shape[3] == 1 else bias[..., first:end]


def _rows(x: Tensor) -> Tensor:
    """x with its last dim dense: the fused kernels do not look at that dim's stride and would read other memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _fold(grad: Tensor, times: int) -> Tensor:
    """Sum the gradients of the `times` query heads that share one key head."""
    return grad if times == 1 else grad.unflatten(1, (-1, times)).sum(2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, p: float, s_start: int) -> str:
    """Which implementation serves the call. Depends on device, dtype, shape and place only, so that forward and backward agree."""
    if p > 0 or q.shape[-1] != v.shape[-1] or not q.numel() or not v.numel() or (mask is not None and causal and s_start):
        return "math"
    if q.device.type == "cpu":
        return "cpu" if q.dtype in _CPU_FUSED else "math"
    if q.device.type == "cuda" and q.dtype in _CUDA_FUSED and mask is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        kernel = "efficient" if q.dtype == torch.float32 else "flash"
        # the flash kernel aligns the last row with the last key it is given: right only where no row stands after the last key
        return "math" if kernel == "flash" and causal and s_start + q.shape[2] > k.shape[2] else kernel
    return "math"


def _parts(kernel: str, causal: bool, s_start: int, s: int, t: int) -> tuple[tuple[int, int, bool], ...]:
    """Runs of keys (first, end, causal) that rows s_start .. s_start + s see: those before the rows whole, their own from the
    diagonal on. Keys that no row sees are in none. The flash kernel and the written-out mathematics take both in one."""
    if not causal:
        return ((0, t, False),)
    before, end = min(s_start, t), min(s_start + s, t)
    if kernel in ("flash", "math") or before == 0:
        return ((0, end, True),)
    return ((0, before, False), (before, end, True)) if before < end else ((0, end, False),)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    salt: int,
    b_start: int,
    h_start: int,
    heads: int,
    s_start: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """q [b, hq, s, d], k [b, hk, t, d], v [b, hk, t, e] -> (out [b, hq, s, e], lse [b, hq, s]); hq a multiple of hk.

    mask: bool (True: may look) or added numbers, broadcastable to [b, hq, s, t]. q holds the rows [s_start, s_start + s) of `rows`
    global ones; causal: global row i sees keys 0..i. p > 0 drops weight (b_start + b, h_start + h, s_start + i, j) of `heads` global
    heads by counting, see `counter`. lse is float32 (float64 for float64); a row that sees nothing gives zeros. Memory layout of out
    and lse: [b, s, hq, ...].
    """
    times, (s, t) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    kernel = _kernel(q, k, v, mask, causal, p, s_start)
    q, k, v, bias = _rows(q), _rows(k), _rows(v), _additive(mask, q)
    results = []
    for first, end, diagonal in _parts(kernel, causal, s_start, s, t):
        k_part, v_part, seen = _repeat(k[:, :, first:end], times), _repeat(v[:, :, first:end], times), _columns(bias, first, end)
        if kernel == "math":
            weights, largest = _weights(q, k_part, seen, diagonal, s_start, scale)
            dropped = _drop(weights, seed, p, salt, (b_start, h_start, s_start, first), (heads, rows, t))
            results.append((torch.matmul(dropped, v_part.to(weights.dtype)).to(q.dtype), _lse(weights, largest)))
        else:
            results.append(_fused(kernel, q, k_part, v_part, seen, diagonal, scale))
    out, lse = results[0] if len(results) == 1 else _merge(results)
    return _tokens_first(out), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _fused(kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse[:, :, : q.shape[2]]


def _merge(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint runs of keys, as attention to both: each weighs exp(its lse - the common one)."""
    (first, first_lse), (second, second_lse) = results
    lse = torch.logaddexp(first_lse, second_lse)
    out = first * (first_lse - lse).exp_().unsqueeze(3)
    return out.addcmul_(second, (second_lse - lse).exp_().unsqueeze(3)).to(first.dtype), lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    salt: int,
    b_start: int,
    h_start: int,
    heads: int,
    s_start: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of their shapes; memory layout [b, s, h, d]. Arguments as in `attention`.

    With the common lse and out, the mathematics of every run of keys is that of the whole: dq adds up, dk and dv are joined.
    """
    times, (s, t) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    kernel = _kernel(q, k, v, mask, causal, p, s_start)
    grad, q, k, v, out, bias = _rows(grad), _rows(q), _rows(k), _rows(v), _rows(out), _additive(mask, q)
    results = []
    for first, end, diagonal in _parts(kernel, causal, s_start, s, t):
        k_part, v_part, seen = _repeat(k[:, :, first:end], times), _repeat(v[:, :, first:end], times), _columns(bias, first, end)
        if kernel == "math":
            weights, _ = _weights(q, k_part, seen, diagonal, s_start, scale)
            drop = functools.partial(_drop, seed=seed, p=p, salt=salt, starts=(b_start, h_start, s_start, first), sizes=(heads, rows, t))
            results.append(_math_backward(grad, q, k_part, v_part, out, weights, drop, scale))
        else:
            results.append(_fused_backward(kernel, grad, q, k_part, v_part, out, lse, seen, diagonal, scale))
    dq = results[0][0] if len(results) == 1 else results[0][0] + results[1][0]
    dk, dv = (_join([_fold(r[i], times) for r in results], t) for i in (1, 2))
    return _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)


def _fused_backward(
    kernel: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    if kernel == "flash":
        none = torch.empty(2, dtype=torch.uint64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
        )
    none = torch.empty((), dtype=torch.int64, device=q.device)
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, _pad_lse(lse), none, none, 0.0, [True, True, True, False], causal, scale=scale
    )[:3]


def _join(parts: list[Tensor], t: int) -> Tensor:
    """Gradients of runs of keys as one of all t keys; those that no row sees get zeros."""
    b, h, _, d = parts[0].shape
    rest = t - sum(part.shape[2] for part in parts)
    parts = [*parts, parts[0].new_zeros((b, h, rest, d))] if rest else parts
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _pad_lse(lse: Tensor) -> Tensor:
    """The memory-efficient kernel wants rows padded to a multiple of 32."""
    return torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, s_start: int, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax weights [b, h, s, t], at least in float32, and the largest score of each row [b, h, s]."""
    wide = _lse_dtype(q.dtype)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)).mul_(scale)
    if bias is not None:
        scores += bias
    if causal:
        s, t = scores.shape[2:]
        scores.masked_fill_(torch.ones(s, t, dtype=torch.bool, device=q.device).triu_(1 + s_start), -float("inf"))
    if not scores.shape[3]:
        return scores, scores.new_zeros(scores.shape[:3])
    weights = torch.softmax(scores, dim=3) if bias is None else _aten._safe_softmax(scores, 3)  # a row that sees nothing gives zeros
    return weights, scores.amax(dim=3)


def _lse(weights: Tensor, largest: Tensor) -> Tensor:
    """log Σ exp s from the weights: the largest score has weight exp(s - lse). Cheaper than a second pass of exp; 0 for empty rows."""
    if not weights.shape[3]:
        return largest
    share = weights.amax(dim=3)
    return torch.where(share > 0, largest - share.log(), 0.0)


def _drop(x: Tensor, seed: Tensor | None, p: float, salt: int, starts: tuple[int, int, int, int], sizes: tuple[int, int, int]) -> Tensor:
    """Weights kept by counting over the global (batch, head, i, j), of which x begins at `starts`; `sizes` are the global numbers of
    heads, rows and keys. The batch's global size is not needed."""
    if p == 0:
        return x
    keep = keep_mask(seed, salt, p, (starts[0] + x.shape[0], *sizes), starts, tuple(x.shape))
    return (x * keep).mul_(1.0 / (1.0 - p) if p < 1 else 0.0)


def _math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, weights: Tensor, drop: Callable[[Tensor], Tensor], scale: float
) -> tuple[Tensor, ...]:
    wide = weights.dtype
    grad_w, q_w, k_w = grad.to(wide), q.to(wide), k.to(wide)
    dv = torch.matmul(drop(weights).transpose(2, 3), grad_w)
    dp = drop(torch.matmul(grad_w, v.to(wide).transpose(2, 3)))
    ds = dp.sub_((grad_w * out.to(wide)).sum(3, keepdim=True)).mul_(weights).mul_(scale)
    return torch.matmul(ds, k_w).to(q.dtype), torch.matmul(ds.transpose(2, 3), q_w).to(k.dtype), dv.to(v.dtype)


@torch.library.custom_op("autopar::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    salt: int,
    b_start: int,
    h_start: int,
    heads: int,
    s_start: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, mask, seed, causal, scale, p, salt, b_start, h_start, heads, s_start, rows)


def _empty(b: int, h: int, s: int, d: int, like: Tensor) -> Tensor:
    return like.new_empty((b, s, h, d)).transpose(1, 2)


@_attention.register_fake
def _fake(q, k, v, mask, seed, causal, scale, p, salt, b_start, h_start, heads, s_start, rows):
    b, h, s, _ = q.shape
    lse = q.new_empty((b, s, h), dtype=_lse_dtype(q.dtype)).transpose(1, 2)
    return _empty(b, h, s, v.shape[3], q), lse


@torch.library.custom_op("autopar::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    salt: int,
    b_start: int,
    h_start: int,
    heads: int,
    s_start: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad, q, k, v, out, lse, mask, seed, causal, scale, p, salt, b_start, h_start, heads, s_start, rows)


@_attention_backward.register_fake
def _fake_backward(grad, q, k, v, out, lse, mask, seed, causal, scale, p, salt, b_start, h_start, heads, s_start, rows):
    return tuple(x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, mask, seed, *ctx.rest = inputs
    if mask is not None and mask.requires_grad:
        raise NotImplementedError("attention has no gradient for its mask")
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, mask, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    rest = (None,) * (2 + len(ctx.rest))
    if grad is None:
        return None, None, None, *rest
    q, k, v, out, lse, mask, seed = ctx.saved_tensors
    return *torch.ops.autopar.attention_backward.default(grad, q, k, v, out, lse, mask, seed, *ctx.rest), *rest


_attention.register_autograd(_backward, setup_context=_setup)

DIRECT = {torch.ops.autopar.attention.default: attention, torch.ops.autopar.attention_backward.default: attention_backward}
