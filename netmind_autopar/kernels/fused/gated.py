"""SwiGLU and GeGLU: `autopar::gated(gate, up, kind) -> act(gate) · up`, and its backward.

    silu       act(g) = g σ(g)                                  SwiGLU  (Shazeer, arXiv:2002.05202)
    gelu       act(g) = g Φ(g)                                  GeGLU, the error function
    gelu_tanh  act(g) = g σ(2 k (g + 0.044715 g³)), k = √(2/π)  GeGLU, the tanh form: (1 + tanh u)/2 = σ(2u)

    dgate = dy · up · act'(gate)      dup = dy · act(gate)

Roofline, bytes per element of gate in 16 bit: forward 6 (gate, up in; y out), backward 10 (dy, gate, up in; dgate, dup out). About 10 and
25 flops per element: bound by memory. Computed in float32, rounded once. gate and up may be the halves of one projection's output: rows
are strided, nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import alike, as_rows, floating, refuse, wide
from .language import jit, tl
from .launch import Config, choose, launch, register, usable

KINDS = ("silu", "gelu", "gelu_tanh")
_aten = torch.ops.aten

# ---- eager reference ----------------------------------------------------------------------------------------------------------


def reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    dtype = wide(gate.dtype)
    return _activate(gate.to(dtype), kind).mul_(up).to(gate.dtype)


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dtype = wide(gate.dtype)
    g, wide_gate = grad.to(dtype), gate.to(dtype)
    dup = _activate(wide_gate, kind).mul_(g).to(gate.dtype)
    g = g * up
    if kind == "silu":
        dgate = _aten.silu_backward(g, wide_gate)
    else:
        dgate = _aten.gelu_backward(g, wide_gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return dgate.to(gate.dtype).contiguous(), dup.contiguous()


def _activate(x: Tensor, kind: str) -> Tensor:
    """A new contiguous tensor."""
    x = x.contiguous()
    return _aten.silu(x) if kind == "silu" else _aten.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def _act(g, KIND: tl.constexpr):
    """(act(g), act'(g)); σ(u) σ(-u) = e/(1 + e)², e = exp(-|u|), loses nothing where σ is nearly one."""
    if KIND == 1:
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * s, s + g * (tl.exp(-0.5 * g * g) * 0.3989422804014327)
    u, slope = g, 1.0
    if KIND == 2:
        u = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    e = tl.exp(-tl.abs(u))
    s = tl.where(u < 0, e, 1.0) / (1.0 + e)
    return g * s, s + g * slope * (e / ((1.0 + e) * (1.0 + e)))


@jit
def _forward(gate, up, y, n, g_row, u_row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row."""
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    g = tl.load(gate + row * g_row + col, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(up + row * u_row + col, mask=seen, other=0.0).to(tl.float32)
    a, _ = _act(g, KIND)
    tl.store(y + row * n + col, a * u, mask=seen)


@jit
def _backward(grad, gate, up, dgate, dup, n, d_row, g_row, u_row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    d = tl.load(grad + row * d_row + col, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(gate + row * g_row + col, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(up + row * u_row + col, mask=seen, other=0.0).to(tl.float32)
    a, slope = _act(g, KIND)
    tl.store(dgate + row * n + col, d * u * slope, mask=seen)
    tl.store(dup + row * n + col, d * a, mask=seen)


FORWARD = register("gated.forward", _forward, (Config(1024, 1, 4), Config(2048, 1, 4), Config(2048, 1, 8), Config(4096, 1, 8)))
BACKWARD = register("gated.backward", _backward, (Config(1024, 1, 4), Config(2048, 1, 4), Config(2048, 1, 8)))


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Each as [rows, n]; one row where all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    return [as_rows(t) for t in tensors]


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    _check("gated", gate, kind, up=up)
    if not usable(gate, up):
        return reference(gate, up, kind)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = rows_of(gate, up)
    rows, n = g.shape
    config = choose(FORWARD, n, gate) or FORWARD.configs[0]
    launch(FORWARD, config, rows * -(-n // config.block), g, u, y, n, g.stride(0), u.stride(0), KIND=KINDS.index(kind))
    return y


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    _check("gated_backward", gate, kind, up=up, grad=grad)
    if not usable(grad, gate, up):
        return reference_backward(grad, gate, up, kind)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    d, g, u = rows_of(grad, gate, up)
    rows, n = g.shape
    config = choose(BACKWARD, n, gate) or BACKWARD.configs[0]
    strides = (d.stride(0), g.stride(0), u.stride(0))
    launch(BACKWARD, config, rows * -(-n // config.block), d, g, u, dgate, dup, n, *strides, KIND=KINDS.index(kind))
    return dgate, dup


def _check(op: str, gate: Tensor, kind: str, **more: Tensor) -> None:
    if kind not in KINDS:
        raise refuse(op, f"no activation {kind!r}", f"there are {', '.join(KINDS)}")
    floating(op, gate=gate, **more)
    alike(op, gate=gate, **more)
    if not gate.dim():
        raise refuse(op, "gate has no dims", "it works on rows", "unsqueeze it")


# ---- registration -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return gated(gate, up, kind)


@torch.library.custom_op("autopar::gated_backward", mutates_args=())
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return gated_backward(grad, gate, up, kind)


@_gated.register_fake
def _(gate, up, kind):
    _check("gated", gate, kind, up=up)
    return gate.new_empty(gate.shape)


@_gated_backward.register_fake
def _(grad, gate, up, kind):
    _check("gated_backward", gate, kind, up=up, grad=grad)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup(ctx, inputs, output):
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _derive(ctx, grad):
    return *torch.ops.autopar.gated_backward.default(grad, *ctx.saved_tensors, ctx.kind), None


_gated.register_autograd(_derive, setup_context=_setup)

DIRECT = {torch.ops.autopar.gated.default: gated, torch.ops.autopar.gated_backward.default: gated_backward}
