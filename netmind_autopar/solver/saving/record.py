"""What is done to save memory, the ops of a tape, and what a run of it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .place import Places

Counts = Mapping[int, frozenset[int]]
Names = Mapping[str, frozenset[int]]
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Saved:
    """What is done to save memory. Empty: every tensor that backward needs is kept."""

    recompute: Counts = field(default_factory=dict)
    regather: Names = field(default_factory=dict)
    offload: Names = field(default_factory=dict)


@dataclass
class Op:
    """One op at one moment. takes, makes: tensor numbers. final: the moment until which a result of the program is held, -1 for ops."""

    moment: int
    node: int
    rank: int
    seconds: float
    view: bool
    takes: list[int] = field(default_factory=list)
    makes: list[int] = field(default_factory=list)
    final: int = -1
    owner: tuple[int, int] = (-1, -1)  # of a gradient: its parameter's node, and position


@dataclass(frozen=True)
class Run:
    """What a run of the tape counts: seconds of everything, of what runs a second time, of waiting for transfers; bytes at every event.

    The last event is the optimizer's step. places: the optimizer state that waits elsewhere so that the run fits (`Tape.within`)."""

    seconds: float
    again_s: float
    waits_s: float
    memory: np.ndarray
    moments: np.ndarray
    places: Places = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return int(self.memory.max(initial=0))

    @property
    def peak_moment(self) -> int:
        return int(self.moments[int(self.memory.argmax())]) if len(self.memory) else 0

    def profile(self, moments: int) -> np.ndarray:
        """Most bytes at each of the moments 0 … moments-1; where nothing happens, as at the moment before."""
        out = np.full(moments, -1, np.int64)
        np.maximum.at(out, np.minimum(self.moments, moments - 1), self.memory)
        last = np.maximum.accumulate(np.where(out >= 0, np.arange(moments), 0))
        return np.maximum(out[last], 0)
