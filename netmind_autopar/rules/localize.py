"""The non-tensor arguments of a call on one device: what `Rule.adjust` says, computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.local import Local
from ..ir.spec import Spec
from .algebra import Rule, Strategy, letter_spec


def localize_args(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rule: Rule,
    strategy: Strategy,
    out_spec: Spec | None,
    sizes: tuple[int, ...],
    coord: tuple[int, ...] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's (args, kwargs) with every adjusted argument as the device at `coord` needs it; tensors (or nodes) untouched.

    `out_spec` is the Spec of output 0 under the strategy, or None when there is no such output. `sizes` is the mesh. Without
    `coord` an argument that differs between devices becomes an `ir.local.Local`, to be bound on each.
    """
    new_args, new_kwargs = list(args), dict(kwargs)
    for place, what in rule.adjust:
        old = new_args[place] if isinstance(place, int) else new_kwargs.get(place)
        if what.startswith("list:"):
            each = [_value(w, 0, rule, strategy, out_spec) for w in what[5:].split(";")]
            value: Any = [_bound(v, sizes, coord) for v in each]
        else:
            value = _bound(_value(what, old, rule, strategy, out_spec), sizes, coord)
        if isinstance(place, int):
            new_args[place] = value
        else:
            new_kwargs[place] = value
    return tuple(new_args), new_kwargs


def _bound(value: Local | list[int], sizes: tuple[int, ...], coord: tuple[int, ...] | None) -> Any:
    if not isinstance(value, Local):
        return value
    return value.folded(sizes) if coord is None else value.at(sizes, coord)


def _value(what: str, old: Any, rule: Rule, strategy: Strategy, out_spec: Spec | None) -> Local | list[int]:
    """One adjusted argument.

    "shape", "parts", "starts", "lengths" describe output 0. "size:a*b*3" is a product of local letter sizes and numbers (for a
    list argument: that number for every element); "start:a*3" is where the local piece of a letter begins, times numbers.
    """
    kind, _, product = what.partition(":")
    if kind in ("size", "start"):
        words = product.split("*")
        order = list(rule.sizes)
        parts = tuple(order.index(word) for word in words if not word.isdigit())
        times = math.prod(int(word) for word in words if word.isdigit())
        return Local(kind, str(letter_spec(rule, strategy)), parts, times, len(old) if isinstance(old, (list, tuple)) else 0)
    if out_spec is None:
        raise ValueError(f"the argument {what!r} follows output 0, which is switched off")
    return list(out_spec.parts) if what == "parts" else Local(what, str(out_spec))
