"""The values of the relaxation of price.py: what forward sees of a value, what backward sees of it, and what both pay together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..problem import Value


def times(seconds: np.ndarray, share: float) -> np.ndarray:
    """A share of the seconds of conversions; what cannot be converted stays so."""
    return np.where(np.isfinite(seconds), share * np.where(np.isfinite(seconds), seconds, 0.0), np.inf)


def silent(value: Value, seconds: np.ndarray) -> Value:
    """Conversions of both phases, without memory."""
    return replace(
        value,
        seconds=seconds,
        shared=np.ones(len(value.bytes), bool),
        bytes=np.zeros_like(value.bytes),
        copy_bytes=np.zeros_like(value.copy_bytes),
        room=None,
    )


def early(value: Value, takers: Sequence[int], seconds: np.ndarray, end: int) -> Value:
    """What forward sees of a value: it lives until forward, whose last moment is `end`, is done with it."""
    held, used = value.held[:, takers], value.used[:, takers]
    return replace(
        value,
        consumers=tuple(value.consumers[t] for t in takers),
        seconds=seconds,
        shared=np.zeros(len(value.bytes), bool),
        used=used,
        held=np.where(held <= end + 1, held, used + 1),
    )


def late(value: Value, takers: Sequence[int], seconds: np.ndarray) -> Value:
    """What backward sees of a value: it lives from its first use there."""
    used = value.used[:, takers]
    return replace(
        value,
        consumers=tuple(value.consumers[t] for t in takers),
        seconds=seconds,
        shared=np.zeros(len(value.bytes), bool),
        produced=used.min(axis=1),
        used=used,
        held=value.held[:, takers],
    )
