"""Calls that prove the element-wise rows of the rule table, generated from the ops' schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case_kit import B, Case, F, I, P, overload

from netmind_autopar.rules.table import TABLE

POSITIVE = [
    "acosh",
    "log",
    "log10",
    "log1p",
    "log2",
    "logit",
    "lgamma",
    "digamma",
    "rsqrt",
    "sqrt",
    "erfinv",
    "pow.Scalar",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "xlogy.Tensor",
]
INTEGER = [
    "bitwise_and.Tensor",
    "bitwise_or.Tensor",
    "bitwise_xor.Tensor",
    "bitwise_and.Scalar",
    "bitwise_or.Scalar",
    "bitwise_xor.Scalar",
    "bitwise_not",
    "bitwise_left_shift.Tensor",
    "bitwise_right_shift.Tensor",
    "bitwise_and.Scalar_Tensor",
    "bitwise_or.Scalar_Tensor",
    "bitwise_xor.Scalar_Tensor",
    "bitwise_left_shift.Tensor_Scalar",
    "bitwise_left_shift.Scalar_Tensor",
    "bitwise_right_shift.Tensor_Scalar",
    "bitwise_right_shift.Scalar_Tensor",
    "__lshift__.Tensor",
    "__lshift__.Scalar",
    "__rshift__.Tensor",
    "__rshift__.Scalar",
    "gcd",
    "lcm",
]
COMPLEX = ["_conj", "conj_physical", "_conj_physical", "angle"]
LOGICAL = ["logical_and", "logical_or", "logical_xor", "logical_not"]
COMPARED = ["eq", "ne", "lt", "le", "gt", "ge"]
PLAIN_ONLY = [
    "gelu_backward",
    "silu_backward",
    "tanh_backward",
    "sigmoid_backward",
    "threshold_backward",
    "hardtanh_backward",
    "hardswish_backward",
    "copy",
    "fill.Tensor",
    "hardsigmoid_backward",
    "leaky_relu_backward",
    "elu_backward",
    "softplus_backward",
    "mish_backward",
    "lerp.Scalar",
    "where.self",
    "masked_fill.Scalar",
]
SPECIAL = ("aten.elu_backward.default",)  # numbers stand between its tensors
NUMBERS: dict[str, dict[str, Any]] = {
    "hardtanh_backward": {"min_val": -1.0, "max_val": 1.0},
    "leaky_relu_backward": {"negative_slope": 0.1, "self_is_result": False},
    "clamp_min": {"min": 0.2},
    "clamp_max": {"max": 0.2},
    "div.Tensor_mode": {"rounding_mode": "floor"},
    "div.Scalar_mode": {"rounding_mode": "trunc", "other": 0.3},
    "masked_fill.Scalar": {"value": 0.5},
    "threshold_backward": {"threshold": 0.0},
    "new_empty": {"size": [4, 6]},
    "clamp": {"min": -0.5, "max": 0.5},
    "full_like": {"fill_value": 3.5},
    "bitwise_and.Scalar": {"other": 3},
    "bitwise_or.Scalar": {"other": 3},
    "bitwise_xor.Scalar": {"other": 3},
    **{name: {"other": 2} for name in ("__lshift__.Scalar", "__rshift__.Scalar")},
    **{f"bitwise_{side}_shift.Tensor_Scalar": {"other": 2} for side in ("left", "right")},
    **{f"bitwise_{name}.Scalar_Tensor": {"self": 5} for name in ("and", "or", "xor", "left_shift", "right_shift")},
    "clamp.Tensor": {"min": P(6), "max": P(6) + 1},
}


def _tensor(short: str, argument: str, shape: tuple[int, ...]) -> torch.Tensor:
    if argument in ("condition", "mask"):
        return B(*shape)
    if short in POSITIVE:
        return P(*shape) + (1.0 if short == "acosh" else 0.0)
    if short in INTEGER:
        return I(8, *shape)
    if short in COMPLEX:
        return torch.complex(F(*shape), F(*shape))
    if short in LOGICAL:
        return B(*shape)
    if short.split(".")[0] in COMPARED:
        return I(3, *shape).double()
    if short in ("asin", "acos", "atanh", "polar"):
        return P(*shape)
    return F() if argument == "value" else F(*shape)


def elementwise() -> Iterator[Case]:
    for name, row in TABLE.items():
        if not row.startswith("pointwise") or not name.startswith("aten.") or name in SPECIAL:
            continue
        short = name.removeprefix("aten.").removesuffix(".default")
        arguments = overload(name)._schema.arguments
        tensors = [a.name for a in arguments if "Tensor" in str(a.type) and not a.has_default_value()]
        shapes = [[(4, 6)] * 5, [(5, 7)] * 5]
        if len(tensors) > 1 and short not in PLAIN_ONLY:
            shapes += [[(5, 4, 6), (6,), (4, 1)], [(7, 1), (7, 5), (5,)]]
        for some in shapes:
            args, kwargs = [], {}
            for argument in arguments:
                given = NUMBERS.get(short, {}).get(argument.name)
                if argument.name in tensors:
                    value = _tensor(short, argument.name, some[tensors.index(argument.name)])
                elif given is not None and not (isinstance(given, torch.Tensor) and some[0][-1] != 6):
                    value = given
                elif argument.has_default_value():
                    continue
                else:
                    value = {"int": 1, "List[int]": [4], "bool": False, "float": 0.7}.get(str(argument.type), 0.7)
                if argument.kwarg_only or (argument.name in NUMBERS.get(short, {}) and argument.name != "self"):
                    kwargs[argument.name] = value
                else:
                    args.append(value)
            if short == "clamp.Tensor" and not kwargs:
                kwargs = {"min": P(7)}
            yield name, tuple(args), kwargs
