"""`autopar::attention`: one op for attention on every device, with its own backward, so that the graph is the same everywhere.

Where the device has a fused kernel for the call, it is used; otherwise the mathematics, written out:

    s_ij = scale q_i·k_j + mask_ij      lse_i = log Σ_j exp s_ij      p_ij = exp(s_ij - lse_i)      o_i = Σ_j m_ij p_ij v_j
    dv_j = Σ_i m_ij p_ij do_i           dp_ij = m_ij do_i·v_j         ds_ij = p_ij (dp_ij - do_i·o_i)

with m_ij = kept_ij / (1 - p), or 1 without dropout (Dao et al., FlashAttention, arXiv:2205.14135, appendix B).
"""

from __future__ import annotations

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


def _additive(mask: Tensor | None, q: Tensor, t: int) -> Tensor | None:
    """The mask as added numbers of q's dtype, with four dims."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -float("inf"))
    mask = mask.to(q.dtype)
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _rows(x: Tensor) -> Tensor:
    """x with its last dim dense: the fused kernels do not look at that dim's stride and would read other memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _fold(grad: Tensor, times: int) -> Tensor:
    """Sum the gradients of the `times` query heads that share one key head."""
    return grad if times == 1 else grad.unflatten(1, (-1, times)).sum(2)


def _kernel(q: Tensor, v: Tensor, mask: Tensor | None, p: float) -> str:
    """Which implementation serves the call. Depends on device, dtype and shape only, so that forward and backward agree."""
    if p > 0 or q.shape[-1] != v.shape[-1] or not q.numel() or not v.numel():
        return "math"
    if q.device.type == "cpu":
        return "cpu" if q.dtype in _CPU_FUSED else "math"
    if q.device.type == "cuda" and q.dtype in _CUDA_FUSED and mask is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        return "efficient" if q.dtype == torch.float32 else "flash"
    return "math"


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
) -> tuple[Tensor, Tensor]:
    """q [b, hq, s, d], k [b, hk, t, d], v [b, hk, t, e] -> (out [b, hq, s, e], lse [b, hq, s]); hq a multiple of hk.

    mask: bool (True: may look) or added numbers, broadcastable to [b, hq, s, t]. causal: position i sees positions 0..i.
    p > 0 drops weight (b_start + b, h_start + h, i, j) of `heads` global heads by counting, see `counter`. lse is float32
    (float64 for float64); a row that sees nothing gives zeros. Memory layout of out and lse: [b, s, hq, ...].
    """
    times = q.shape[1] // k.shape[1]
    kernel = _kernel(q, v, mask, p)
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias, k, v = _additive(mask, q, k.shape[2]), _repeat(k, times), _repeat(v, times)
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    elif kernel == "flash":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    elif kernel == "efficient":
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        lse = lse[:, :, : q.shape[2]]
    else:
        weights, largest = _weights(q, k, bias, causal, scale)
        lse = _lse(weights, largest)
        out = torch.matmul(_drop(weights, seed, p, salt, b_start, h_start, heads), v.to(weights.dtype)).to(q.dtype)
    return _tokens_first(out), lse.transpose(1, 2).contiguous().transpose(1, 2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of their shapes; memory layout [b, s, h, d]. Arguments as in `attention`."""
    times = q.shape[1] // k.shape[1]
    kernel = _kernel(q, v, mask, p)
    grad, q, k, v, out = _rows(grad), _rows(q), _rows(k), _rows(v), _rows(out)
    bias, k, v = _additive(mask, q, k.shape[2]), _repeat(k, times), _repeat(v, times)
    if kernel == "cpu":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif kernel == "flash":
        none = torch.empty(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
        )
    elif kernel == "efficient":
        none = torch.empty((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, _pad_lse(lse), none, none, 0.0, [True, True, True, False], causal, scale=scale
        )
    else:
        dq, dk, dv = _math_backward(grad, q, k, v, out, bias, seed, causal, scale, p, salt, b_start, h_start, heads)
    return _tokens_first(dq), _tokens_first(_fold(dk, times)), _tokens_first(_fold(dv, times))


def _pad_lse(lse: Tensor) -> Tensor:
    """The memory-efficient kernel wants rows padded to a multiple of 32."""
    return torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax weights [b, h, s, t], at least in float32, and the largest score of each row [b, h, s]."""
    wide = _lse_dtype(q.dtype)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)).mul_(scale)
    if bias is not None:
        scores += bias
    if causal:
        s, t = scores.shape[2:]
        scores.masked_fill_(torch.ones(s, t, dtype=torch.bool, device=q.device).triu_(1), -float("inf"))
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


def _drop(x: Tensor, seed: Tensor | None, p: float, salt: int, b_start: int, h_start: int, heads: int) -> Tensor:
    """Weights kept by counting over the global (batch, head, i, j). The batch's global size is not needed."""
    if p == 0:
        return x
    b, h, s, t = x.shape
    keep = keep_mask(seed, salt, p, (b_start + b, heads, s, t), (b_start, h_start, 0, 0), (b, h, s, t))
    return (x * keep).mul_(1.0 / (1.0 - p) if p < 1 else 0.0)


def _math_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    salt: int,
    b_start: int,
    h_start: int,
    heads: int,
) -> tuple[Tensor, ...]:
    weights, _ = _weights(q, k, bias, causal, scale)
    place = (seed, p, salt, b_start, h_start, heads)
    wide = weights.dtype
    grad_w, q_w, k_w = grad.to(wide), q.to(wide), k.to(wide)
    dv = torch.matmul(_drop(weights, *place).transpose(2, 3), grad_w)
    dp = _drop(torch.matmul(grad_w, v.to(wide).transpose(2, 3)), *place)
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
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, mask, seed, causal, scale, p, salt, b_start, h_start, heads)


def _empty(b: int, h: int, s: int, d: int, like: Tensor) -> Tensor:
    return like.new_empty((b, s, h, d)).transpose(1, 2)


@_attention.register_fake
def _fake(q, k, v, mask, seed, causal, scale, p, salt, b_start, h_start, heads):
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
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad, q, k, v, out, lse, mask, seed, causal, scale, p, salt, b_start, h_start, heads)


@_attention_backward.register_fake
def _fake_backward(grad, q, k, v, out, lse, mask, seed, causal, scale, p, salt, b_start, h_start, heads):
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
