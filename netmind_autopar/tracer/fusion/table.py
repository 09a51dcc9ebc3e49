"""What is fused: `TABLE`, one line for each kind of site. docs/fusion.md explains it to users.

A `Fusion` has patterns (pattern.py); `make`, which reads every literal of a match again and gives the op that computes the same, or why
there is none; and `sign`, an expression that only such sites have: where it is left over, a site was nearly matched and is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ... import kernels  # noqa: F401 - registers the namespace
from ..draws import dropout_add
from .pattern import Call, Cast, Either, Found, Item, Named, Number, Pattern, Shared, Tensor_, value_of

_own = torch.ops.autopar
ROOT = ""


@dataclass(frozen=True)
class Match:
    """A pattern found at `root`. wants: whether the gradient of a node is asked for."""

    root: fx.Node
    found: Found
    wants: Callable[[fx.Node], bool]

    def __getitem__(self, name: str) -> Any:
        return self.found.named.get(name)

    def tensor(self, name: str) -> Tensor:
        value = value_of(self[name])
        assert value is not None
        return value

    @property
    def result(self) -> Tensor:
        value = value_of(self.root)
        assert value is not None
        return value


@dataclass(frozen=True)
class Made:
    """The op in place of a match. outputs: the position of each result among the op's by name, ROOT for the match's; -1: the only one."""

    op: Any
    args: tuple[Any, ...]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class Fusion:
    name: str
    patterns: tuple[Pattern, ...]
    make: Callable[[Match], Made | str]  # "": no site at all, and nothing to report
    sign: Pattern | None = None


def _like_x(m: Match, *same: str) -> str:
    """Why the result, or one of these operands, is not like x; "" when all are. Nothing on the way may be narrower than x."""
    x = m.tensor("x")
    if not x.dtype.is_floating_point or not x.dim() or not x.numel():
        return f"x is {x.dtype} {list(x.shape)}"
    for name, value in (("the result", m.result), *((name, m.tensor(name)) for name in same)):
        if value.shape != x.shape or value.dtype != x.dtype:
            return f"{name} is {_show(value)}, x {_show(x)}"
    for node in m.found.inside | m.found.shared:
        value = value_of(node)
        if value is not None and value.dtype.is_floating_point and torch.finfo(value.dtype).eps > torch.finfo(x.dtype).eps:
            return f"it is computed in {_show(value)}, which is less than x has"
    return ""


def _show(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _vectors(m: Match, n: int, *names: str) -> str:
    """Why one of these is no vector of n numbers; "" when all are, or are left out."""
    for name in names:
        if m[name] is not None and tuple(m.tensor(name).shape) != (n,):
            return f"{name} is {_show(m.tensor(name))}, not one number for each of {n}"
        if m[name] is not None and not m.tensor(name).dtype.is_floating_point:
            return f"{name} is {_show(m.tensor(name))}"
    return ""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- norms --------------------------------------------------------------------------------------------------------------------


def _rms(x: Pattern) -> Pattern:
    """x / sqrt(mean(x²) + eps), in the ways it is written."""
    square = Either(Call("pow", x, exponent=2), Call("square", x), Call("mul", x, x))
    added = Call("add", Call("mean", Cast(square), dim=Number("dim"), keepdim=True), other=Number("eps"))
    return Either(
        Call("mul", x, Either(Call("rsqrt", added), Call("pow", added, exponent=-0.5), Call("reciprocal", Call("sqrt", added)))),
        Call("div", x, Call("sqrt", added)),
    )


_WIDE_X = Cast(Tensor_("x"))
_NORMED = Cast(_rms(_WIDE_X))
_WEIGHT = Cast(Tensor_("weight"))
RMS = (Cast(Call("mul", _NORMED, Call("add", _WEIGHT, other=Number("offset")))), Cast(Call("mul", _NORMED, _WEIGHT)), _NORMED)
RMS_CALL = Call("rms_norm", Tensor_("x"), normalized_shape=Number("shape"), weight=Tensor_("weight", optional=True), eps=Number("eps"))


def _rms_norm(m: Match) -> Made | str:
    x = m.tensor("x")
    if not _over_last(m):
        return "it is over other dims than the last"
    eps = torch.finfo(x.dtype).eps if m["eps"] is None and x.dtype.itemsize >= 4 else m["eps"]
    if not _number(eps):
        return "eps is left to torch, which takes another one on every device"
    offset = 0.0 if m["offset"] is None else m["offset"]
    if not _number(offset):
        return f"an offset of {offset}"
    if why := _like_x(m) or _vectors(m, x.shape[-1], "weight"):
        return why
    return Made(_own.rms_norm.default, (m["x"], m["weight"], float(eps), float(offset)), {ROOT: 0})


def _over_last(m: Match) -> bool:
    x = m.tensor("x")
    if m["shape"] is not None:
        return list(m["shape"]) == [x.shape[-1]]
    dims = m["dim"] if isinstance(m["dim"], (list, tuple)) else [m["dim"]]
    return len(dims) == 1 and isinstance(dims[0], int) and dims[0] % x.dim() == x.dim() - 1


LAYER = Call(
    "layer_norm", Tensor_("x"), normalized_shape=Number("shape"),
    weight=Tensor_("weight", optional=True), bias=Tensor_("bias", optional=True), eps=Number("eps"),
)  # fmt: skip


def _layer_norm(m: Match) -> Made | str:
    if not _over_last(m):
        return "it is over more than the last dim"
    if why := _like_x(m) or _vectors(m, m.tensor("x").shape[-1], "weight", "bias"):
        return why
    return Made(_own.layer_norm.default, (m["x"], m["weight"], m["bias"], float(m["eps"])), {ROOT: 0})


_SUM = Named("sum", Call("add", Tensor_("x"), Tensor_("residual")))
ADD_RMS = Item(Call("autopar::rms_norm", _SUM, weight=Tensor_("weight", optional=True), eps=Number("eps"), offset=Number("offset")), 0)
ADD_LAYER = Item(
    Call(
        "autopar::layer_norm", _SUM, weight=Tensor_("weight", optional=True), bias=Tensor_("bias", optional=True), eps=Number("eps")
    ),
    0,
)  # fmt: skip


def _add_rms_norm(m: Match) -> Made | str:
    if _like_x(m, "residual"):
        return ""
    args = (m["x"], m["residual"], m["weight"], m["eps"], m["offset"])
    return Made(_own.add_rms_norm.default, args, {ROOT: 0, "sum": 1})


def _add_layer_norm(m: Match) -> Made | str:
    if _like_x(m, "residual"):
        return ""
    args = (m["x"], m["residual"], m["weight"], m["bias"], m["eps"])
    return Made(_own.add_layer_norm.default, args, {ROOT: 0, "sum": 1})


GROUP = Call(
    "silu",
    Call("group_norm", Tensor_("x"), num_groups=Number("groups"), weight=Tensor_("weight", optional=True),
         bias=Tensor_("bias", optional=True), eps=Number("eps")),
)  # fmt: skip


def _group_norm_silu(m: Match) -> Made | str:
    if why := _like_x(m) or _vectors(m, m.tensor("x").shape[1], "weight", "bias"):
        return why
    return Made(_own.group_norm_silu.default, (m["x"], m["weight"], m["bias"], m["groups"], float(m["eps"])), {ROOT: 0})


# ---- activations, attention, dropout ------------------------------------------------------------------------------------------

_GATE = Cast(Tensor_("x"))
_ACT = Cast(Either(Call("silu", _GATE), Call("gelu", _GATE, approximate=Number("approximate")), Call("mul", _GATE, Call("sigmoid", _GATE))))
GATED = Cast(Call("mul", _ACT, Cast(Tensor_("up"))))
KINDS = {None: "silu", "none": "gelu", "tanh": "gelu_tanh"}


def _gated(m: Match) -> Made | str:
    if m["approximate"] not in KINDS:
        return f"gelu approximated by {m['approximate']}"
    if m["up"] is m["x"]:
        return "the activation is multiplied with its own argument"
    if why := _like_x(m, "up"):
        return why
    return Made(_own.gated.default, (m["x"], m["up"], KINDS[m["approximate"]]), {ROOT: -1})


def _angle(name: str) -> Pattern:
    return Either(Shared(Call("unsqueeze", Tensor_(name), dim=Number("heads"))), Tensor_(name))


_X = Tensor_("x")
_SLICES = (
    Call("slice", _X, dim=Number("d"), start=Number("middle"), end=Number("end")),
    Call("slice", _X, dim=Number("d"), start=0, end=Number("middle")),
)
_CHUNKS = tuple(Item(Call("chunk", _X, chunks=2, dim=Number("d")), i) for i in (1, 0))
_SPLITS = tuple(Item(Call("split", _X, split_size=Number("middle"), dim=Number("d")), i) for i in (1, 0))
_TURNED = Either(*(Call("cat", [Call("neg", second), first], dim=Number("d2")) for second, first in (_SLICES, _CHUNKS, _SPLITS)))
ROPE = Call("add", Call("mul", _X, _angle("cos")), Call("mul", _TURNED, _angle("sin")))


def _rope(m: Match) -> Made | str:
    x = m.tensor("x")
    if x.dim() != 4:
        return f"x has {x.dim()} dims, not batch, heads, positions and head size"
    b, _, s, d = x.shape
    if d % 2 or any(m[name] is not None and m[name] % 4 != 3 for name in ("d", "d2")):
        return "it does not turn the halves of the last dim"
    if (m["middle"] is not None and m["middle"] != d // 2) or (m["end"] is not None and m["end"] < d):
        return f"it is cut at {m['middle']} and {m['end']}, not into halves of {d}"
    shapes = [(s, d)] if m["heads"] is None else [(1, s, d), (b, s, d)]
    for name in ("cos", "sin"):
        angles = m.tensor(name)
        if tuple(angles.shape) not in shapes or (m["heads"] is not None and m["heads"] not in (1, -3)):
            return f"{name} is {_show(angles)} for an x of {list(x.shape)}"
        if not angles.dtype.is_floating_point or m.wants(m[name]):
            return f"the gradient of {name} is wanted"
    if m.tensor("cos").shape != m.tensor("sin").shape:
        return "cos and sin have two shapes"
    if why := _like_x(m):
        return why
    return Made(_own.rope.default, (m["x"], m["cos"], m["sin"], False), {ROOT: -1})


_SCORES = Cast(
    Either(Call("mul", Cast(Tensor_("x")), other=Number("scale")), Call("div", Cast(Tensor_("x")), other=Number("divisor")), Tensor_("x"))
)
_MASKED = Either(
    Call("add", _SCORES, Cast(Tensor_("mask"))), Call("masked_fill", _SCORES, Tensor_("hidden"), value=Number("filled")), _SCORES
)
SOFTMAX = Cast(Call("softmax", Cast(_MASKED), dim=Number("dim"), dtype=Number("dtype")))


def _softmax(m: Match) -> Made | str:
    x = m.tensor("x")
    scale = m["scale"] if m["scale"] is not None else 1.0 if m["divisor"] is None else 1.0 / m["divisor"] if m["divisor"] else math.nan
    if m["mask"] is None and m["hidden"] is None and scale == 1.0:
        return ""  # torch's own softmax is one kernel
    if not isinstance(m["dim"], int) or m["dim"] % x.dim() != x.dim() - 1:
        return "it is over another dim than the last"
    if not _number(scale):
        return f"a scale of {scale}"
    if x.dim() > 4:
        return f"x has {x.dim()} dims, at most four"
    if why := _like_x(m):
        return why
    if m["hidden"] is not None:
        return "its mask is filled in" if m["filled"] == -math.inf else f"masked elements are filled with {m['filled']}, not minus infinity"
    mask = m["mask"]
    if mask is not None:
        value = m.tensor("mask")
        if not value.dtype.is_floating_point or torch.broadcast_shapes(value.shape, x.shape) != x.shape:
            return f"the mask is {_show(value)} for an x of {list(x.shape)}"
        if m.wants(mask):
            return "the gradient of the mask is wanted"
    return Made(_own.masked_softmax.default, (m["x"], mask, float(scale)), {ROOT: -1})


DROPPED = Call("add", Call("dropout", Tensor_("x"), p=Number("p"), train=True), Tensor_("residual"))


def _dropout_add(m: Match) -> Made | str:
    if why := _like_x(m, "residual"):
        return why
    return Made(dropout_add, (m["x"], m["residual"], float(m["p"])), {ROOT: -1})


# A sum with a norm comes last: the norm is an op by then, and a sum that dropout took is gone.
TABLE: tuple[Fusion, ...] = (
    Fusion(
        "rms_norm",
        (*RMS, RMS_CALL),
        _rms_norm,
        Either(
            Call("rsqrt", Call("add", Call("mean", Tensor_("_"), dim=Number("dim"), keepdim=True), other=Number("eps"))), Cast(RMS_CALL)
        ),
    ),
    Fusion("layer_norm", (LAYER,), _layer_norm, LAYER),
    Fusion("group_norm_silu", (GROUP,), _group_norm_silu, GROUP),
    Fusion("gated", (GATED,), _gated, GATED),
    Fusion("rope", (ROPE,), _rope, Either(*(Call("cat", [Call("neg", Tensor_("a")), Tensor_("b")], dim=Number("d")) for _ in "1"))),
    Fusion("masked_softmax", (SOFTMAX,), _softmax, Call("softmax", Cast(_MASKED), dim=Number("dim"), dtype=Number("dtype"))),
    Fusion("dropout_add", (DROPPED,), _dropout_add, DROPPED),
    Fusion("add_rms_norm", (ADD_RMS,), _add_rms_norm),
    Fusion("add_layer_norm", (ADD_LAYER,), _add_layer_norm),
)
