"""When a value that waits for backward elsewhere leaves the device and when it is back: at the borders of blocks.

The ops of a phase are cut into stretches, one per repeated block, where the first op of the block stands; a phase with fewer than
two blocks is cut every `RUN` ops. A copy out has the rest of its stretch and the next one to arrive; a copy back starts one
stretch before the one that needs it. So each has at least one block's compute to hide behind.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from torch import fx

RUN = 32  # ops


def borders(order: Sequence[fx.Node]) -> list[int]:
    """Where the stretches of one phase begin, ascending, the first at 0. order: the ops of the captured program in that phase."""
    first: dict[str, int] = {}
    for i, node in enumerate(order):
        block = _block(node.meta.get("module") or "")
        if block:
            first.setdefault(block, i)
    starts = sorted(first.values()) if len(first) > 1 else list(range(0, len(order), RUN))
    return starts if starts[:1] == [0] else [0, *starts]


def gone(starts: Sequence[int], made: int, last_use: int) -> int:
    """The op before which the device's memory is given back (the number of ops, or more: at the end). Positions within forward.

    made: the op that makes the value. last_use: the last op of forward that takes it, `made` when none does.
    """
    after_next = bisect_right(starts, made) + 1
    arrived = starts[after_next] if after_next < len(starts) else _END
    return max(arrived, last_use + 1)


def back(starts: Sequence[int], first_use: int) -> int:
    """The op before which the copy back starts and takes memory. Positions within backward. first_use: the first op that takes it."""
    return starts[max(bisect_right(starts, first_use) - 2, 0)]


_END = 1 << 60


def _block(module: str) -> str:
    """The path up to the first number that has modules below it: "model.layers.3"; "" when there is none."""
    parts = module.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()), "")
