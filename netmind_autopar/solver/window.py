"""When a value that waits for backward elsewhere leaves the device and when it is back: at the borders of blocks.

The ops of a phase are cut into stretches, one per repeated block, where the first op of the block stands; a phase with fewer than
two blocks is cut every `RUN` ops. A copy out has the rest of its stretch and the next one to arrive; a copy back starts one
stretch before the one that needs it. So each has at least one block's compute to hide behind.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ..ir.stretches import RUN as RUN
from ..ir.stretches import back as back
from ..ir.stretches import borders as borders


def gone(starts: Sequence[int], made: int, last_use: int) -> int:
    """The op before which the device's memory is given back (the number of ops, or more: at the end). Positions within forward.

    made: the op that makes the value. last_use: the last op of forward that takes it, `made` when none does.
    """
    after_next = bisect_right(starts, made) + 1
    arrived = starts[after_next] if after_next < len(starts) else _END
    return max(arrived, last_use + 1)


_END = 1 << 60
