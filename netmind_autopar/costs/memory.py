"""Peak memory of one device, by counting what is alive.

An interval (start, end, bytes, category) is alive at every moment m with start ≤ m ≤ end. Categories are the fields of
`ir.plan.Memory`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ..ir.errors import InputError
from ..ir.mesh import Device
from ..ir.plan import Memory

CATEGORIES = tuple(Memory.model_fields)

# Tensors of a parameter's size and dtype that a torch.optim optimizer keeps, with its default arguments unless the name says more.
OPTIMIZER_STATES = {
    "adamw": 2,
    "adam": 2,
    "adam-amsgrad": 3,
    "adamax": 2,
    "nadam": 2,
    "radam": 2,
    "lion": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
    "sgd-momentum": 1,
    "momentum": 1,
    "adadelta": 2,
    "rprop": 2,
    "muon": 1,
    "none": 0,
}

Interval = tuple[int, int, int, str]


def optimizer_states(name: str) -> int:
    """State tensors per parameter of the optimizer `name`. Raises InputError for an unknown one."""
    if name not in OPTIMIZER_STATES:
        raise InputError(
            f"unknown optimizer {name!r}",
            where="optimizer=",
            why="the memory of its state must be known",
            try_=f"one of {', '.join(OPTIMIZER_STATES)}: take one that keeps as many tensors per parameter",
        )
    return OPTIMIZER_STATES[name]


def lost(tensors: int, device: Device) -> int:
    """Bytes that the allocator loses when so many are in tensors."""
    return math.floor(tensors * device.fragmentation)


def room(limit: int, device: Device) -> int:
    """The most bytes of tensors that fit into `limit` with what the allocator loses: where every limit is taken from."""
    tensors = int(limit / (1.0 + device.fragmentation)) if device.fragmentation else limit
    while tensors + 1 + lost(tensors + 1, device) <= limit:
        tensors += 1
    while tensors + lost(tensors, device) > limit:
        tensors -= 1
    return tensors


def usage(intervals: Iterable[Interval], moments: int) -> np.ndarray:
    """Bytes alive, int64, shape (categories, moments)."""
    steps = np.zeros((len(CATEGORIES), moments + 1), dtype=np.int64)
    for start, end, size, category in intervals:
        first, after = min(max(start, 0), moments), min(max(end + 1, 0), moments)
        if after > first:
            row = CATEGORIES.index(category)
            steps[row, first] += size
            steps[row, after] -= size
    return np.cumsum(steps, axis=1)[:, :moments]


def peak(intervals: Iterable[Interval], moments: int) -> tuple[int, int, dict[str, int]]:
    """(bytes, moment, bytes by category) where most is alive; the first such moment. No moments: (0, 0, zeros)."""
    if moments < 1:
        return 0, 0, dict.fromkeys(CATEGORIES, 0)
    alive = usage(intervals, moments)
    total = alive.sum(axis=0)
    moment = int(total.argmax())
    return int(total[moment]), moment, {name: int(n) for name, n in zip(CATEGORIES, alive[:, moment], strict=True)}


def three_largest(intervals: Sequence[Interval], names: Sequence[str], moment: int) -> list[tuple[str, int]]:
    """(name, bytes) of the three largest tensors alive at `moment`; intervals of one name count together."""
    alive: dict[str, int] = {}
    for (start, end, size, _), name in zip(intervals, names, strict=True):
        if start <= moment <= end:
            alive[name] = alive.get(name, 0) + size
    return sorted(alive.items(), key=lambda item: (-item[1], item[0]))[:3]
