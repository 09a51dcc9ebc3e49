"""Measured seconds as curves: data points, and straight lines between them on logarithmic scales.

Below the first point the seconds are the first point's: what is left is the price of starting. Above the last they grow in
proportion. A curve never falls, so that splitting work never makes a piece dearer than the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ..ir.mesh import Curve, Device

Amount = TypeVar("Amount", float, np.ndarray)
Points = tuple[tuple[float, float], ...]

# Not seconds: how many times slower than its curve a matmul is that has few rows, few columns, or a short inner dim, by that size. The
# worst of the three counts.
THIN = ("thin.rows", "thin.columns", "thin.inner")


def interpolate(points: Points, amount: Amount) -> Amount:
    """Seconds of `amount` of work: bytes or floating-point operations, whatever the points count."""
    table = np.array(points)
    last = float(table[-1, 0])
    inside = np.clip(amount, float(table[0, 0]), last)
    seconds = np.exp(np.interp(np.log(inside), np.log(table[:, 0]), np.log(table[:, 1])))
    out = seconds * np.maximum(np.asarray(amount, dtype=float) / last, 1.0)
    return out if isinstance(amount, np.ndarray) else float(out)  # type: ignore[return-value]


def find(curves: Sequence[Curve], kinds: Sequence[str], dtype: str) -> Curve | None:
    """The curve of the first of `kinds` that was measured: in this dtype, else in float32."""
    known = {(c.kind, c.dtype): c for c in curves}
    return next((known[key] for key in [*((k, dtype) for k in kinds), *((k, "float32") for k in kinds)] if key in known), None)


def op_seconds(
    device: Device, kinds: Sequence[str], dtype: str, flops: np.ndarray | None, moved: np.ndarray, dims: Sequence[np.ndarray]
) -> np.ndarray | None:
    """Seconds of one op from the device's curves, or None where neither the op nor its class was measured.

    kinds: the op's name, its class. flops: None for ops that are counted in bytes. moved: bytes. dims: a matmul's rows, columns and inner
    dim, or nothing.
    """
    curve = find(device.curves, kinds, dtype)
    if curve is None:
        return None
    if flops is None:
        return interpolate(curve.points, moved)
    rate = 1.0 if curve.dtype == dtype else device.flops(curve.dtype) / device.flops(dtype)
    out = interpolate(curve.points, flops) * rate
    if dims:
        out = out * slower([find(device.curves, (kind,), dtype) for kind in THIN], dims)
    passed = find(device.curves, ("elementwise",), dtype)  # no op is faster than one that only reads and writes the same bytes
    return np.maximum(out, interpolate(passed.points, moved) if passed else moved / device.memory_bandwidth_bytes_s + device.launch_s)


def slower(thin: Sequence[Curve | None], dims: Sequence[Amount]) -> Amount:
    """How many times slower a matmul of these rows, columns and inner dim is than its curve; see THIN."""
    worst: Amount = np.ones_like(dims[0], dtype=float)
    for curve, size in zip(thin, dims, strict=True):
        if curve is not None:
            table = np.array(curve.points)
            worst = np.maximum(worst, np.exp(np.interp(np.log(np.maximum(size, 1)), np.log(table[:, 0]), np.log(table[:, 1]))))
    return worst


def at_size(points: Points, measured: int, size: int, messages: int, latency_s: float) -> Points:
    """A collective's curve for a group of `size`, from that of `measured` devices: `messages` more per device at `latency_s` each."""
    more = messages * (size - measured) * latency_s
    return tuple((amount, max(seconds + more, latency_s)) for amount, seconds in points)


def make(kind: str, dtype: str, points: Points) -> Curve:
    """A curve whose seconds do not fall: each at least those before it."""
    rising: list[tuple[float, float]] = []
    for amount, seconds in sorted(points):
        least = rising[-1][1] if rising else 0.0
        if not rising or amount > rising[-1][0]:
            rising.append((float(amount), max(float(seconds), least)))
    return Curve(kind, dtype, tuple(rising))
