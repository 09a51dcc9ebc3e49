"""The ops of a phase are cut into stretches: one per repeated block, where the first op of the block stands.

A phase with fewer than two blocks is cut every `RUN` ops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import fx

RUN = 32  # ops


def borders(order: Sequence[fx.Node]) -> list[int]:
    """Where the stretches of one phase begin, ascending, the first at 0. order: the ops of the captured program in that phase.

    A cast of a parameter stands ahead of its block (`tracer.precision.early`), and begins none.
    """
    first: dict[str, int] = {}
    for i, node in enumerate(order):
        block = _block(node.meta.get("module") or "")
        if block and block not in first and not casts_end(node):
            first[block] = i
    starts = sorted(first.values()) if len(first) > 1 else list(range(0, len(order), RUN))
    return starts if starts[:1] == [0] else [0, *starts]


def back(starts: Sequence[int], first_use: int) -> int:
    """The op one stretch before the stretch of `first_use`."""
    return starts[max(bisect_right(starts, first_use) - 2, 0)]


def casts_end(node: fx.Node) -> bool:
    """Whether an op casts what the program is given."""
    arg = node.args[0] if node.args else None
    return node.target is torch.ops.aten._to_copy.default and isinstance(arg, fx.Node) and arg.op == "placeholder"


def _block(module: str) -> str:
    """The path up to the first number that has modules below it: "model.layers.3"; "" when there is none."""
    parts = module.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()), "")
