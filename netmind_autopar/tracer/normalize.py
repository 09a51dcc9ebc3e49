"""Rewrites on the forward graph, before autograd: `TABLE` maps an op to a function that says the same in other ops.

Two reasons to be in the table. The op's ATen form differs by device or has no usable backward: it becomes an op of the namespace
`autopar`, which brings its own. Or it hides a global quantity (a count, a batch statistic), which would be wrong on a part
of the batch: it becomes sums and divisions by what is the global count. `DECOMPOSITIONS` does the second for ops that
torch's own composite ops call.

A function is called in place of the op while autograd is being traced, with the op's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels  # noqa: F401 - registers the namespace
from ..ir.errors import CaptureError
from . import draws, images, linalg, positions, recurrent
from .draws import dropped
from .losses import cross_entropy, fuse, logsumexp, nll_loss, reduced

_aten = torch.ops.aten
_own = torch.ops.autopar


class Random:
    """Where a program's random numbers come from: one seed, and a running number for every op that draws."""

    def __init__(self) -> None:
        self.seed: Tensor | None = None
        self.count = 0

    def bind(self, seed: Tensor) -> None:
        """Called as the first thing of every trace, with the traced seed."""
        self.seed = seed

    def salt(self, many: int = 1) -> int:
        self.count += many
        return self.count - many


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    random: Random,
    salt: int,
) -> Tensor:
    """`scaled_dot_product_attention`. A mask that wants a gradient (a learned bias) is computed in the open."""
    shape = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    if q.dim() < 3:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        out = attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, random=random, salt=salt)
        return out.squeeze(0)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    heads = q.shape[-3]
    if not enable_gqa:
        heads = max(x.shape[-3] for x in (q, k, v))
        q, k, v = (_expand(x, (*shape, heads)) for x in (q, k, v))
    else:
        q, k, v = (_expand(x, (*shape, x.shape[-3])) for x in (q, k, v))
        v = v.repeat_interleave(k.shape[-3] // v.shape[-3], -3) if v.shape[-3] < k.shape[-3] else v
    lead = q.shape[:-3]
    if len(lead) != 1:
        n = math.prod(lead)
        q, k, v = (x.reshape(n, *x.shape[-3:]) for x in (q, k, v))
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).reshape(n, *attn_mask.shape[-3:])
    if attn_mask is not None and attn_mask.requires_grad:
        out = _open_attention(q, k, v, attn_mask, dropout_p, scale, random, salt)
    else:
        seed, salt = (random.seed, salt) if dropout_p > 0 else (None, 0)
        out = _own.attention.default(q, k, v, attn_mask, seed, is_causal, scale, float(dropout_p), salt, 0, 0, heads, 0, q.shape[2])[0]
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[-3:])


def _expand(x: Tensor, lead: Sequence[int]) -> Tensor:
    return x if tuple(x.shape[:-2]) == tuple(lead) else x.expand(*lead, *x.shape[-2:])


def _open_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float, scale: float, random: Random, salt: int) -> Tensor:
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * scale + mask, -1)
    return torch.matmul(dropped(weights, p, random, salt) if p > 0 else weights, v)


def embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Tensor:
    """A sparse gradient is made dense: its values are the same."""
    if scale_grad_by_freq:
        return _aten.embedding.default(weight, indices, padding_idx, True, False)
    return _own.embedding.default(weight, indices, 0, padding_idx)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Statistics as sums over everything but dim 1; running statistics follow exactly, the variance unbiased.

    bfloat16 and float16 are normalised in float32, as the fused kernels do.
    """
    wide = x.float() if x.dtype.itemsize < 4 else x
    if not training and mean is not None and var is not None:
        shape = _per_channel(x)
        factor = torch.rsqrt(var + eps)
        out = (wide - mean.view(shape)) * (factor if weight is None else factor * weight).view(shape)
        return (out if bias is None else out + bias.view(shape)).to(x.dtype)
    out, batch_mean, batch_var = _BatchNorm.apply(wide, weight, bias, eps)
    if training and mean is not None and var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            mean.copy_(mean * (1 - momentum) + batch_mean * momentum)
            var.copy_(var * (1 - momentum) + batch_var * (momentum * count / max(count - 1, 1)))
    return out.to(x.dtype)


def _per_channel(x: Tensor) -> list[int]:
    return [1, x.shape[1], *(1 for _ in range(x.dim() - 2))]


class _BatchNorm(torch.autograd.Function):
    """y = c r w + b with c = x - mean, r = 1 / sqrt(var + eps); returns (y, mean, var).

    Its gradients written out, for autograd would make twice as many passes over the batch (Ioffe and Szegedy,
    arXiv:1502.03167, section 3):  db = sum g,  dw = r sum g c,  dx = w r (g - sum g / n - c r^2 sum g c / n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        dims, shape = [d for d in range(x.dim()) if d != 1], _per_channel(x)
        count = x.numel() // x.shape[1]
        mean = x.sum(dims) / count
        centered = x - mean.view(shape)
        var = (centered * centered).sum(dims) / count
        inverse = torch.rsqrt(var + eps)
        factor = inverse if weight is None else inverse * weight
        out = centered * factor.view(shape)
        ctx.save_for_backward(centered, inverse, factor)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return (out if bias is None else out + bias.view(shape)), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        centered, inverse, factor = ctx.saved_tensors
        dims, shape = [d for d in range(grad.dim()) if d != 1], _per_channel(grad)
        count = grad.numel() // grad.shape[1]
        total, moment = grad.sum(dims), (grad * centered).sum(dims)
        slope = moment * inverse * inverse / count
        dx = (grad - (total / count).view(shape) - centered * slope.view(shape)) * factor.view(shape)
        dw, db = (None if d is None else t.to(d) for t, d in zip((moment * inverse, total), ctx.dtypes, strict=True))
        return dx, dw, db, None


def grouped_mm(
    x: Tensor, w: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Rows by group times a matrix per group. torch's own op takes some dtypes and sizes only, and others per device."""
    if offs is None or bias is not None or x.dim() != 2 or w.dim() != 3:
        return _aten._grouped_mm.default(x, w, offs, bias, out_dtype)
    out = _own.grouped_mm.default(x, w, offs, 0, 0)
    return out if out_dtype is None else out.to(out_dtype)


# op -> what to call instead. Functions that take `random` and `salt` draw random numbers.
TABLE: dict[Any, Callable[..., Any]] = {
    _aten.scaled_dot_product_attention.default: attention,
    _aten.embedding.default: embedding,
    _aten.cross_entropy_loss.default: cross_entropy,
    _aten.nll_loss_nd.default: nll_loss,
    _aten.nll_loss.default: nll_loss,
    _aten.nll_loss2d.default: nll_loss,
    _aten.logsumexp.default: logsumexp,
    _aten.batch_norm.default: batch_norm,
    _aten._grouped_mm.default: grouped_mm,
    **linalg.TABLE,
    **positions.TABLE,
    _aten.mse_loss.default: reduced(_aten.mse_loss.default, 2),
    _aten.l1_loss.default: reduced(_aten.l1_loss.default, 2),
    _aten.smooth_l1_loss.default: reduced(_aten.smooth_l1_loss.default, 2),
    _aten.huber_loss.default: reduced(_aten.huber_loss.default, 2),
    _aten.soft_margin_loss.default: reduced(_aten.soft_margin_loss.default, 2),
    _aten.kl_div.default: reduced(_aten.kl_div.default, 2),
    _aten.binary_cross_entropy.default: reduced(_aten.binary_cross_entropy.default, 3),
    **draws.TABLE,
    **recurrent.TABLE,
}
# Ops of other libraries, which need not be there.
BY_NAME: dict[str, Callable[..., Any]] = {"transformers.grouped_mm_fallback.default": grouped_mm}
_DRAWS = {attention, *draws.TABLE.values(), *recurrent.TABLE.values()}


def refuse_random(node: fx.Node, line: str | None) -> None:
    """CaptureError when an op draws random numbers by itself."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise CaptureError(
            f"{node.target} draws random numbers in a way that depends on the device",
            where=line or "",
            why="every device would draw other numbers than one device does",
            try_="draw them outside the model and pass them in, or use torch.nn.functional.dropout",
        )


def number_draws(module: fx.GraphModule, random: Random) -> None:
    """Give every op that draws its running number, before anything is rewritten: numbers do not depend on what is."""
    for graph_module in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and (TABLE.get(node.target) or BY_NAME.get(str(node.target))) in _DRAWS:
                draws.check(node, node.meta.get("stack_trace") or "")
                node.meta["salt"] = random.salt(draws.width(node))


def normalize(module: fx.GraphModule, seed: fx.Node, random: Random) -> None:
    """Apply `TABLE` to the exported graph and to the graphs inside it (regions with other autocast or grad settings).

    `number_draws` came before.
    """
    for graph_module in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            fuse(node)
            if own := TABLE.get(node.target) or BY_NAME.get(str(node.target)):
                if own in _DRAWS:
                    node.kwargs = {**node.kwargs, "random": random, "salt": node.meta.pop("salt")}
                if own in positions.PREPARE:
                    positions.PREPARE[own](node)
                node.target = own
            else:
                refuse_random(node, node.meta.get("stack_trace"))
        if graph_module is not module:  # run from its graph, as the outer one is: its generated code knows nothing of this
            graph_module.forward = fx.Interpreter(graph_module).run
    with module.graph.inserting_after(seed):
        module.graph.call_function(random.bind, (seed,))


def _mean(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    out = dtype or x.dtype
    wide = torch.float32 if out in (torch.bfloat16, torch.float16) else out
    dims = list(range(x.dim())) if not dims else list(dims)
    count = math.prod(x.shape[d] for d in dims)
    total = x.sum(dims, keepdim, dtype=wide if wide != x.dtype else None)
    mean = total / count if count else total / 0.0
    return mean if mean.dtype == out else mean.to(out)


def _var(x: Tensor, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dims, correction=correction, keepdim=keepdim)[0]


def _var_mean(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if not dims else [d % x.dim() for d in dims]
    wide = x.float() if x.dtype.itemsize < 4 else x
    count = math.prod(x.shape[d] for d in dims)
    mean = wide.sum(dims, True) / count
    centered = wide - mean
    left = max(count - (1 if correction is None else correction), 0)
    squares = (centered * centered).sum(dims, keepdim)
    var = squares / left if left else squares / 0.0
    return var.to(x.dtype), (mean if keepdim else mean.squeeze(dims)).to(x.dtype)


def _std(x: Tensor, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var(x, dims, correction=correction, keepdim=keepdim).sqrt()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.mean.default: lambda x, *, dtype=None: _mean(x, dtype=dtype),
    _aten.mean.dim: _mean,
    _aten.var.correction: _var,
    _aten.var_mean.correction: _var_mean,
    _aten.std.correction: _std,
    **linalg.DECOMPOSITIONS,
    **images.DECOMPOSITIONS,
    **positions.DECOMPOSITIONS,
}
