"""A scatter plot of predicted against measured times as a PNG, without a plotting library: both axes logarithmic, one colour per group.

Grey lines are powers of ten and the diagonal; dashes beside it are ±20%.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIZE, EDGE, DOT = 640, 16, 3
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))


def scatter(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> np.ndarray:
    """Pixels, [SIZE, SIZE, 3]. A group: (measured, predicted); measured is the horizontal axis."""
    every = np.concatenate([np.asarray(v, dtype=float) for pair in groups for v in pair])
    low, high = np.log10(every.min()) - 0.1, np.log10(every.max()) + 0.1
    scale = (SIZE - 2 * EDGE) / (high - low)

    def at(value: float) -> int:
        return round(EDGE + (np.log10(value) - low) * scale)

    out = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    for decade in range(int(np.ceil(low)), int(np.floor(high)) + 1):
        k = at(10.0**decade)
        out[:, k] = out[SIZE - 1 - k, :] = 225
    for k in range(EDGE, SIZE - EDGE):
        out[SIZE - 1 - k, k] = 120
        for side in (1.2, 1 / 1.2):
            y = round(k + np.log10(side) * scale)
            if EDGE <= y < SIZE - EDGE and k // 6 % 2:
                out[SIZE - 1 - y, k] = 160
    for (measured, predicted), colour in zip(groups, COLOURS * (1 + len(groups) // len(COLOURS)), strict=False):
        for m, p in zip(measured, predicted, strict=True):
            x, y = at(m), SIZE - 1 - at(p)
            out[max(0, y - DOT // 2) : y + DOT // 2 + 1, max(0, x - DOT // 2) : x + DOT // 2 + 1] = colour
    return out


def write_png(pixels: np.ndarray, path: str | Path) -> None:
    """An 8-bit RGB file (PNG specification, ISO/IEC 15948)."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b""))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
