"""What the fused ops ask of their tensors; everything else is an `InputError` that says which tensor, never a wrong number."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.errors import InputError


def show(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"


def refuse(op: str, what: str, why: str, try_: str = "") -> InputError:
    return InputError(f"autopar::{op}: {what}", why=why, try_=try_)


def floating(op: str, **tensors: Tensor | None) -> None:
    """Real floating point, all on one device."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given:
        if not t.dtype.is_floating_point:
            raise refuse(op, f"{name} is {show(t)}", "it computes with real floating point", f"pass {name}.float()")
    together(op, **tensors)


def together(op: str, **tensors: Tensor | None) -> None:
    """All on one device."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given[1:]:
        if t.device != given[0][1].device:
            first = given[0][0]
            raise refuse(op, f"{name} is on {t.device}, {first} on {given[0][1].device}", "a kernel runs on one device")


def alike(op: str, **tensors: Tensor | None) -> None:
    """One shape and dtype."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    name, first = given[0]
    for other, t in given[1:]:
        if t.shape != first.shape or t.dtype != first.dtype:
            raise refuse(op, f"{other} is {show(t)}, {name} {show(first)}", "both must have one shape and dtype")


def vector(op: str, n: int, **tensors: Tensor | None) -> None:
    """One number for every element of the last dim."""
    for name, t in tensors.items():
        if t is not None and tuple(t.shape) != (n,):
            raise refuse(op, f"{name} is {show(t)}", f"it needs one number for each of the {n} elements of a row")


def shaped(op: str, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and tuple(t.shape) != tuple(shape):
            raise refuse(op, f"{name} is {show(t)}", f"it must have the shape {list(shape)}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n] with adjacent elements of a row: a view where strides allow, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
