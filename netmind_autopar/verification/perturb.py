"""Values that hide nothing: seeded noise on what a fresh model and lazy sample inputs hold.

A norm's weight of exactly one, a bias of exactly zero, a LoRA's zero matrix, a batch of equal tokens or labels of which none is
ignored: with these many a wrong program gives the right numbers. So `verify` compares at a point nearby, where every element
is its own. What must stay valid stays so: numbers keep their sign, those between 0 and 1 stay there, indices stay in the range that the
captured program looks up, booleans and 0/1 masks are left alone.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Program, is_getitem, op_name

AMOUNT = 0.1
_HUGE = 1e4  # larger numbers are masks ("minus infinity"), not values
_WORDS = """view _unsafe_view reshape slice select permute t transpose unsqueeze squeeze expand clone constant_pad_nd split
    split_with_sizes chunk unbind contiguous _to_copy cat stack flip repeat"""
_MOVERS = frozenset(_WORDS.split())
# Where an index or a label arrives: the operand whose dim (or the argument that) says how many there are.
_ROWS = {"autopar.embedding": (0, 0), "autopar.embedding_backward": (2, None), "aten.embedding": (0, 0)}
_CLASSES = {
    "autopar.pick": (0, 1),
    "autopar.cross_entropy_backward": (1, 1),
    "autopar.nll_loss": (0, 1),
    "autopar.nll_loss_backward": (2, None),
}


def noisy(value: Tensor, amount: float, seed: int, name: str, *, mask_like: bool = False) -> Tensor:
    """`value` with noise of relative size `amount`, the same for the same seed and name. Other than floats come back as they are.

    mask_like: numbers that are all 0 or 1 may be a mask, and stay.
    """
    if not (value.is_floating_point() and value.numel()) or amount == 0:
        return value
    finite = torch.isfinite(value) & (value.abs() < _HUGE)
    zero_one = bool(((value == 0) | (value == 1)).all())
    if not bool(finite.any()) or (mask_like and zero_one):
        return value
    wide = torch.where(finite, value, torch.zeros_like(value)).double()
    draw = torch.randn(value.shape, generator=_generator(seed, name), dtype=torch.float64).clamp(-2.0, 2.0)
    size = wide[wide != 0].square().mean().sqrt() if bool(wide.any()) else torch.tensor(_zero_scale(value.shape), dtype=torch.float64)
    moved = wide * (1 + amount * draw) + torch.where(wide == 0, amount * size * draw, 0.0)
    return torch.where(finite, moved.to(value.dtype), value)


def noisy_input(value: Tensor, amount: float, seed: int, name: str) -> Tensor:
    """As `noisy`, for a float tensor of the user's: a 0/1 mask stays, and what lies between 0 and 1 stays between."""
    if not value.is_floating_point() or not value.numel():
        return value
    low, high = float(value.min()), float(value.max())
    if low != high and bool(((value == 0) | (value == 1)).all()):
        return value
    out = noisy(value, amount, seed, name)
    if low >= 0:
        out = out.abs()
    if low >= 0 and high <= 1:
        out = torch.where(out > 1, 2 - out, out)
    return out


def varied_indices(value: Tensor, program: Program, node: str, seed: int, name: str) -> Tensor:
    """Integers that the program only looks up or takes as labels, made telling: never all equal, and with some labels ignored."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.numel() < 2:
        return value
    rows, labels, ignored, other = _meaning(program.node(node))
    generator = _generator(seed, name)
    same = bool((value == value.reshape(-1)[0]).all())
    limit = min(rows + labels, default=0)
    if same and limit > 1:
        value = torch.randint(0, limit, value.shape, generator=generator, dtype=value.dtype)
    if labels and not rows and not other and len(set(ignored)) == 1 and value.numel() >= 4:
        value = value.clone(memory_format=torch.contiguous_format)
        value[_corner(value.shape)] = ignored[0]
    return value


def _meaning(node: fx.Node) -> tuple[list[int], list[int], list[int], bool]:
    """(rows of the tables it indexes, classes of the losses it labels, their ignored labels, whether it is used otherwise too)."""
    rows: list[int] = []
    labels: list[int] = []
    ignored: list[int] = []
    other, seen, queue = False, set(), [node]
    while queue:
        current = queue.pop()
        for user in current.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            name = op_name(user).rsplit(".", 1)[0]
            if name in _ROWS:
                rows.append(_count(user, *_ROWS[name]))
            elif name in _CLASSES:
                labels.append(_count(user, *_CLASSES[name]))
                ignored += [int(user.args[-1])] if "nll" in name else []  # type: ignore[arg-type]
            elif name in ("aten.eq", "aten.ne") and isinstance(user.args[1], int) and user.args[1] < 0:
                ignored.append(user.args[1])
            elif is_getitem(user) or name.removeprefix("aten.") in _MOVERS:
                queue.append(user)
            else:
                other = True
    return rows, labels, ignored, other


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A block near one corner: whatever dim is split, its pieces get unlike numbers of elements. A shift by one keeps some of it."""
    starts = [0] * (len(shape) - 1) + [1 if shape[-1] > 2 else 0]
    return tuple(slice(start, start + max(1, n // 4)) for start, n in zip(starts, shape, strict=True))


def _count(user: fx.Node, position: int, dim: int | None) -> int:
    value: Any = user.args[position]
    return int(value) if dim is None else int(value.meta["val"].shape[dim])


def _zero_scale(shape: tuple[int, ...]) -> float:
    """Noise for a tensor of zeros: a matrix gets what keeps its result of the size of its input."""
    return min(1.0, 5.0 / max(math.prod(shape[1:]), 1) ** 0.5)


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
