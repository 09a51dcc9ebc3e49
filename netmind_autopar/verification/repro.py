"""A small case as one Python file that needs torch and this package alone."""

from __future__ import annotations

import base64
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import InputError
from .case import Case, Given, Ref
from .cut import attempt
from .shrink import Shrunk

FEW = 64  # elements that are written out


def write(shrunk: Shrunk | None, path: str | os.PathLike[str]) -> None:
    """Write the script. Raises InputError when there is no case, or the file cannot be written."""
    if shrunk is None or shrunk.case is None:
        raise InputError(
            "the failure has no small case",
            why="the lowered program is not what the plan lowers to, or it fails only as a whole",
            try_="look at `first_difference`",
        )
    try:
        Path(path).write_text(text(shrunk), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}", why=str(error), try_="name a folder that exists and can be written") from None


def text(shrunk: Shrunk) -> str:
    """The script's source. The same case gives the same text."""
    assert shrunk.case is not None
    case = economical(shrunk.case)
    found = attempt(case) or shrunk.difference
    lines = [
        '"""What one device computes and the ranks of a mesh do not. Exit code 1 while that is so, 0 once it is not.',
        "",
        f"    {found}",
        "",
        "The splits below are part of this file; rules, local arguments and collectives are made by the installed netmind_autopar.",
        '"""',
        "",
        "from math import inf, nan  # noqa: F401",
        "",
        "import torch  # noqa: F401",
        "",
        "from netmind_autopar.verification.case import Case, Given, Ref, Step, Wanted  # noqa: F401",
        "",
    ]
    if shrunk.plan is not None:
        lines += ["# Choices of the plan with which the whole model fails on this mesh; every other class is whole on every device:"]
        lines += [f"#   {name}: {shrunk.plan.choices.get(name, '-')}" for name in shrunk.classes] or ["#   none"]
        lines.append("")
    lines += ["CASE = Case("]
    lines += [f"    {name}={literal(getattr(case, name))}," for name in ("mesh", "links", "random_costs")]
    for name in ("given", "steps", "wanted"):
        lines += [f"    {name}=(", *(f"        {_call(item)}," for item in getattr(case, name)), "    ),"]
    return "\n".join([*lines, ")", "", 'if __name__ == "__main__":', "    CASE.run()", ""])


def economical(case: Case) -> Case:
    """The case with its values as numbers where they are few, drawn from a seed where it still fails, else packed."""
    for i, given in enumerate(case.given):
        value = given.tensor()
        if value.numel() <= FEW and not value.is_complex():
            options = [replace(given, values=value.tolist())]
        else:
            options = [_drawn(given, value, i + 1), _packed(given, value)]
        for option in options[:-1]:
            other = replace(case, given=(*case.given[:i], option, *case.given[i + 1 :]))
            if attempt(other) is not None:
                options = [option]
                break
        case = replace(case, given=(*case.given[:i], options[-1], *case.given[i + 1 :]))
    return case


def _drawn(given: Given, value: Tensor, seed: int) -> Given:
    wide = value.double() if not value.is_complex() else value.real.double()
    wide = wide[torch.isfinite(wide)]
    if not wide.numel():
        return given
    low, high, mean, spread = (_short(float(x)) for x in (wide.min(), wide.max(), wide.mean(), wide.std(correction=0)))
    return replace(given, values=None, seed=seed, mean=mean, spread=spread, low=low, high=high)


def _short(x: float) -> float:
    return float(f"{x:.6g}") if x != int(x) else x


def _packed(given: Given, value: Tensor) -> Given:
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return replace(given, values=None, packed=base64.b85encode(zlib.compress(raw, 9)).decode())


def _call(item: Any) -> str:
    """A dataclass as the call that makes it, defaults left out."""
    parts = []
    for name, field in type(item).__dataclass_fields__.items():
        value = getattr(item, name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if not (value is default or (type(value) is type(default) and value == default)):
            parts.append(f"{name}={literal(value)}")
    return f"{type(item).__name__}({', '.join(parts)})"


def literal(value: Any) -> str:
    """A value as source text that gives it back."""
    if isinstance(value, Ref):
        return f"Ref({value.name!r})" if value.index is None else f"Ref({value.name!r}, {value.index})"
    if isinstance(value, tuple):
        return "(" + "".join(f"{literal(v)}, " for v in value).rstrip() + ")" if value else "()"
    if isinstance(value, list):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)):
        return repr(value)
    raise InputError(f"an argument of type {type(value).__name__} cannot be written down", why=repr(value)[:100])
