"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """part: heading. level: "wrong" makes the exit code 1, "note" is worth knowing. do: what to do about it."""

    part: str
    name: str
    value: str
    level: Level = "ok"
    do: str = ""
