"""Rotary embedding, half-split as Hugging Face has it: `autopar::rope(x, cos, sin, back) -> y`.

x [b, h, s, d]; cos and sin [s, r], [1, s, r] or [b, s, r], r even and at most d. With the first r elements of a row cut into halves x₁, x₂,
and cos and sin likewise (Su et al., arXiv:2104.09864):

    y₁ = x₁ cos₁ - x₂ sin₁      y₂ = x₂ cos₂ + x₁ sin₂      the other d - r elements pass

`back` is the transpose, which is the rotation by the negative angle where both halves of cos and of sin are alike, as they are in all
known models:

    x₁ = y₁ cos₁ + y₂ sin₂      x₂ = y₂ cos₂ - y₁ sin₁

It is linear in x, so its backward is itself with `back` turned over. One tensor a call: queries and keys whose heads are split
differently need no common rule. Roofline: 4 bytes per element of x in 16 bit, each way; cos and sin are read once per row and
serve all heads. y is laid out in memory as x is, so a transposed x stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import floating, refuse, show, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable

# ---- eager reference ----------------------------------------------------------------------------------------------------------


def reference(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    out = _like(x)
    r = cos.shape[-1]
    dtype = wide(x.dtype)
    a, b = x[..., :r].to(dtype).chunk(2, -1)
    (c1, c2), (s1, s2) = (_heads(t).to(dtype).chunk(2, -1) for t in (cos, sin))
    first = a * c1 + b * s2 if back else a * c1 - b * s1
    second = b * c2 - a * s1 if back else b * c2 + a * s2
    out[..., : r // 2] = first
    out[..., r // 2 : r] = second
    out[..., r:] = x[..., r:]
    return out


def _heads(t: Tensor) -> Tensor:
    """[s, r] or [b, s, r] with a dim for heads."""
    return t.unsqueeze(-3)


def _like(x: Tensor) -> Tensor:
    """A new tensor of x's shape and order of dims in memory, elements of a row adjacent."""
    return torch.empty_like(x) if x.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ---- kernel -------------------------------------------------------------------------------------------------------------------


@jit
def _rotate(
    x, cos, sin, y, heads, seq, d, half, x_b, x_h, x_s, y_b, y_h, y_s, c_b, c_s, s_b, s_s,
    BACK: tl.constexpr, PASS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one (b, s), ROWS at a time; BLOCK holds half of what turns."""
    b, s = (tl.program_id(0) // seq).to(tl.int64), (tl.program_id(0) % seq).to(tl.int64)
    col = tl.arange(0, BLOCK)
    turns = col < half
    at_c, at_s = cos + b * c_b + s * c_s + col, sin + b * s_b + s * s_s + col
    c1 = tl.load(at_c, mask=turns, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(at_c + half, mask=turns, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(at_s, mask=turns, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(at_s + half, mask=turns, other=0.0).to(tl.float32)[None, :]
    for start in range(0, heads, ROWS):
        head = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        here = x + b * x_b + s * x_s + head * x_h
        there = y + b * y_b + s * y_s + head * y_h
        seen = (head < heads) & turns[None, :]
        x1 = tl.load(here + col[None, :], mask=seen, other=0.0).to(tl.float32)
        x2 = tl.load(here + half + col[None, :], mask=seen, other=0.0).to(tl.float32)
        if BACK:
            y1 = x1 * c1 + x2 * s2
            y2 = x2 * c2 - x1 * s1
        else:
            y1 = x1 * c1 - x2 * s1
            y2 = x2 * c2 + x1 * s2
        tl.store(there + col[None, :], y1, mask=seen)
        tl.store(there + half + col[None, :], y2, mask=seen)
        if PASS:
            for skip in range(2 * half, d, BLOCK):
                rest = (skip + col)[None, :]
                seen = (head < heads) & (rest < d)
                tl.store(there + rest, tl.load(here + rest, mask=seen), mask=seen)


ROTATE = register(
    "rope",
    _rotate,
    (
        Config(16, 32, 2), Config(32, 32, 4), Config(64, 16, 4), Config(64, 32, 8), Config(128, 8, 4), Config(256, 4, 4),
    ),
    whole=True,
)  # fmt: skip


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    _check(x, cos, sin)
    half = cos.shape[-1] // 2
    config = choose(ROTATE, half, x) if usable(x, cos, sin) else None
    if config is None:
        return reference(x, cos, sin, back)
    y = _like(x)
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    b, h, s, d = x.shape
    strides = (t.stride(i) for t in (x, y) for i in range(3))
    angles = (step for t in (cos, sin) for step in (t.stride(0) if t.dim() == 3 and t.shape[0] > 1 else 0, t.stride(-2)))
    launch(ROTATE, config, b * s, x, cos, sin, y, h, s, d, half, *strides, *angles, BACK=back, PASS=2 * half < d)
    return y


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    floating("rope", x=x, cos=cos, sin=sin)
    if x.dim() != 4:
        raise refuse("rope", f"x is {show(x)}", "it takes [batch, heads, sequence, head size]")
    b, _, s, d = x.shape
    if cos.shape != sin.shape:
        raise refuse("rope", f"cos is {show(cos)}, sin {show(sin)}", "both must have one shape")
    lead, r = tuple(cos.shape[:-1]), cos.shape[-1] if cos.dim() else 0
    if lead not in ((s,), (1, s), (b, s)) or r % 2 or not 0 < r <= d:
        why = f"it must be [{s}, r], [1, {s}, r] or [{b}, {s}, r] with an even r of at most {d}"
        raise refuse("rope", f"cos is {show(cos)} for an x of {list(x.shape)}", why)


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return rope(x, cos, sin, back)


@_rope.register_fake
def _(x, cos, sin, back):
    _check(x, cos, sin)
    return _like(x)


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise refuse("rope", "cos or sin requires a gradient", "only x has one here", "detach them, or rotate with plain PyTorch")
    ctx.save_for_backward(cos, sin)


def _derive(ctx, grad):
    return torch.ops.autopar.rope.default(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_rope.register_autograd(_derive, setup_context=_setup)

DIRECT = {torch.ops.autopar.rope.default: rope}
