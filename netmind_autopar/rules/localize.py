"""The non-tensor arguments of a call on one device: what `Rule.adjust` says, computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.spec import Spec, local_parts, local_shape, part_start
from .algebra import Rule, Strategy, letter_spec


def localize_args(args: Sequence[Any], kwargs: Mapping[str, Any], rule: Rule, strategy: Strategy, out_spec: Spec | None,
                  sizes: tuple[int, ...], coord: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's (args, kwargs) with every adjusted argument as the device at `coord` needs it; tensors (or nodes) untouched.

    `out_spec` is the Spec of output 0 under the strategy, or None when there is no such output. `sizes` is the mesh.
    """
    new_args, new_kwargs = list(args), dict(kwargs)
    for place, what in rule.adjust:
        old = new_args[place] if isinstance(place, int) else new_kwargs.get(place)
        value = local_value(what, old, rule, strategy, out_spec, sizes, coord)
        if isinstance(place, int):
            new_args[place] = value
        else:
            new_kwargs[place] = value
    return tuple(new_args), new_kwargs


def local_value(what: str, old: Any, rule: Rule, strategy: Strategy, out_spec: Spec | None, sizes: tuple[int, ...],
                coord: tuple[int, ...]) -> Any:
    """One adjusted argument.

    "shape", "parts", "starts", "lengths" describe output 0. "size:a*b*3" is a product of local letter sizes and numbers (for a
    list argument: that number for every element); "start:a*3" is where the local piece of a letter begins, times numbers.
    """
    kind, _, product = what.partition(":")
    if kind in ("size", "start"):
        letters = letter_spec(rule, strategy)
        value = math.prod(_factor(word, kind, rule, letters, sizes, coord) for word in product.split("*"))
        return [value] * len(old) if isinstance(old, (list, tuple)) else value
    if out_spec is None:
        raise ValueError(f"the argument {what!r} follows output 0, which is switched off")
    if kind == "shape":
        return list(local_shape(out_spec, sizes, coord))
    if kind == "parts":
        return list(out_spec.parts)
    if kind == "lengths":
        return list(local_parts(out_spec, sizes, coord))
    if kind == "starts":
        return [part_start(out_spec, sizes, coord, i) for i in range(len(out_spec.parts))]
    raise ValueError(f"unknown adjustment {what!r}")


def _factor(word: str, kind: str, rule: Rule, letters: Spec, sizes: tuple[int, ...], coord: tuple[int, ...]) -> int:
    if word.isdigit():
        return int(word)
    part = list(rule.sizes).index(word)
    if kind == "start":
        return part_start(letters, sizes, coord, part)
    return local_parts(letters, sizes, coord)[part]
