"""Rules of the fused ops (kernels/fused)."""

from __future__ import annotations

import torch

from .algebra import Rule
from .call import Call
from .sketch import Dim, Sketch, aligned

ROWS = {
    **dict.fromkeys((f"autopar.{name}.default" for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")), "fused_norm"),
    "autopar.rms_norm_backward.default": "fused_norm_backward",
    "autopar.layer_norm_backward.default": "fused_norm_backward",
    "autopar.group_norm_silu.default": "group_norm_silu",
    "autopar.group_norm_silu_backward.default": "group_norm_silu",
    "autopar.gated.default": "..., *... -> ...",
    "autopar.gated_backward.default": "*..., ..., ... -> ..., ...",
    "autopar.rope.default": "rotary",
    "autopar.masked_softmax.default": "masked_softmax",
    "autopar.masked_softmax_backward.default": "*... t!, ... t! -> ... t!",
    "autopar.dropout_add.default": "..., ..., -> ... | parts=parts starts=starts lengths=lengths",
    "autopar.cross_entropy.default": "n c!, n -> n, n",
    "autopar.linear_cross_entropy.default": "n d!, c! d!, n -> n, n",
    "autopar.linear_cross_entropy_backward.default": "n, n d!, c! d!, n, n -> n d!, c! d!",
    "autopar.permute_rows.default": "t! n, m! -> m! n",
    "autopar.unpermute_rows.default": "unpermute",
    "autopar.vocab_stats.default": "n c!, n -> 1 t! n",
    "autopar.vocab_combine.default": "k! t! n -> n, n",
}


def _rows(sketch: Sketch, x: torch.Tensor) -> tuple[list[Dim], list[Dim], Dim]:
    """(dims of x, of a number per row, of its last dim, which is never split)."""
    lead, last = sketch.dims(x.shape[:-1]), sketch.letter(x.shape[-1], fixed=True)
    return [*lead, last], lead, last


def fused_norm(call: Call) -> Rule:
    """Rows are independent; statistics are one number a row. The sum of x and residual is an output like y."""
    sketch = Sketch(call)
    rows, lead, last = _rows(sketch, call["x"])
    inputs = [rows if t.dim() == call["x"].dim() and (t.dim() > 1 or name in ("x", "residual")) else [last] for name, t in _given(call)]
    whole = 2 if "residual" in {name for name, _ in _given(call)} else 1
    return sketch.rule(inputs, [rows] * whole + [lead] * (len(call.results) - whole))


def fused_norm_backward(call: Call) -> Rule:
    """Weights' gradients are summed over rows. Linear in grad, unless a second gradient is added."""
    sketch = Sketch(call)
    rows, lead, last = _rows(sketch, call["x"])
    kinds: dict[str, list[Dim]] = {
        "grad": rows, "grad_sum": rows, "x": rows, "weight": [last], "bias": [last], "mean": lead, "rstd": lead,
    }  # fmt: skip
    names = [name for name, _ in _given(call)]
    alone = "grad_sum" not in names
    none = [("z",)]
    outputs: list[list[Dim]] = [rows]
    for result in call.results[1:]:
        if result == (0,):
            sketch.sizes["z"] = 0
            sketch.fixed.add("z")
        outputs.append(none if result == (0,) else [last])
    return sketch.rule([kinds[name] for name in names], outputs, ["*" if alone and name == "grad" else "_" for name in names])


def group_norm_silu(call: Call) -> Rule:
    """Samples and groups split; channels of a group and positions do not. Linear in grad; weights' gradients are summed over samples."""
    sketch = Sketch(call)
    forward = call.op == "autopar.group_norm_silu.default"
    x, groups = call["x"], call["groups"] if forward else call["mean"].shape[1]
    n, g = sketch.letter(x.shape[0], name="n"), sketch.letter(groups, name="g")
    c = sketch.letter(x.shape[1] // groups, fixed=True, name="c")
    channels = (*g, *c)
    rows: list[Dim] = [n, channels, *(sketch.letter(size, fixed=True) for size in x.shape[2:])]
    stats: list[Dim] = [n, g]
    kinds = {"grad": rows, "x": rows, "weight": [channels], "bias": [channels], "mean": stats, "rstd": stats}
    names = [name for name, _ in _given(call)]
    if forward:
        sketch.follow("groups", "size:" + "*".join(g or ("1",)))
        return sketch.rule([kinds[name] for name in names], [rows, stats, stats])
    outputs: list[list[Dim]] = [rows]
    for result in call.results[1:]:
        if result == (0,):
            sketch.sizes["z"] = 0
            sketch.fixed.add("z")
        outputs.append([("z",)] if result == (0,) else [channels])
    return sketch.rule([kinds[name] for name in names], outputs, ["*" if name == "grad" else "_" for name in names])


def rotary(call: Call) -> Rule:
    """Batch, heads and positions split, with cos and sin along; a row does not. Linear in x."""
    sketch = Sketch(call)
    b, h, s = sketch.dims(call["x"].shape[:3], names="b h s")
    d, r = sketch.letter(call["x"].shape[3], fixed=True, name="d"), sketch.letter(call["cos"].shape[-1], fixed=True, name="r")
    angle = [b if call["cos"].shape[0] > 1 else (), s, r][-call["cos"].dim() :]
    return sketch.rule([[b, h, s, d], angle, angle], [[b, h, s, d]], ["*", "_", "_"])


def masked_softmax(call: Call) -> Rule:
    """Rows are independent; a mask is cut along the dims in which it is not broadcast."""
    sketch = Sketch(call)
    full = sketch.dims(call["x"].shape, [-1])
    return sketch.rule([aligned(t.shape, full, call["x"].shape) for t in call.tensors], [full])


def unpermute(call: Call) -> Rule:
    """Copies may come from any row: only columns split. Linear in y."""
    sketch = Sketch(call)
    m, t = (sketch.letter(n, fixed=True) for n in (call["y"].shape[0], (call.results[0] or (0,))[0]))
    n = sketch.letter(call["y"].shape[1])
    weight = [[t, sketch.letter(call["times"], fixed=True)]] if call["weight"] is not None else []
    return sketch.rule([[m, n], [m], *weight], [[t, n]], ["*", *["_"] * (1 + len(weight))])


def _given(call: Call) -> list[tuple[str, torch.Tensor]]:
    """The call's tensors by name."""
    return [(a.name, call[a.name]) for a in call.target._schema.arguments if isinstance(call[a.name], torch.Tensor)]
