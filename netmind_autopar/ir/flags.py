"""Every environment variable that is read, in one place.

AUTOPAR_DEBUG   0–4: 1 shows tracebacks and the plan, 2 costs, 3 what each pass changed, 4 the emitted code.
AUTOPAR_DUMP    a folder: graphs, plans and emitted code are written there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def debug_level() -> int:
    """The level in AUTOPAR_DEBUG, 0 when unset or not a number."""
    try:
        return int(os.environ.get("AUTOPAR_DEBUG", "0"))
    except ValueError:
        return 0


def debug(level: int, text: str) -> None:
    """Write `text` to stderr when AUTOPAR_DEBUG is at least `level`."""
    if debug_level() >= level:
        print(text, file=sys.stderr, flush=True)


def dump(name: str, text: str) -> None:
    """Write `text` to the file `name` in the folder AUTOPAR_DUMP, when that is set."""
    folder = os.environ.get("AUTOPAR_DUMP")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text(text, encoding="utf-8")
