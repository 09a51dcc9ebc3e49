"""Rules that were found, on disk: one small JSON file per call, in a folder of the user's.

A file is written whole or not at all, and read only if it is exactly what this version writes: a damaged or foreign file counts as
none and is written anew. A folder that cannot be written means no cache, never an error. Processes may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from ..ir import flags
from ..ir.jsontext import read_json
from .discover import Found

FORMAT, VERSION = "netmind-autopar-rule", 3  # the version changes with the search: what an older one found is not asked
MAX_BYTES = 1 << 20


def load(key: dict[str, Any]) -> Found | None:
    """What was found for this call, None when nothing usable is there."""
    path = _path(key)
    if path is None:
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        data = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION) or data.get("key") != key:
        return None
    return read(data.get("found"))


def store(key: dict[str, Any], found: Found) -> None:
    """Remember what was found. A folder that cannot be written is left alone."""
    path = _path(key)
    if path is None:
        return
    data = {"format": FORMAT, "version": VERSION, "key": key, "found": plain(found)}
    staged = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, staged = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            f.write(json.dumps(data, indent=1, sort_keys=True) + "\n")
        os.replace(staged, path)
    except OSError:
        if staged:
            with contextlib.suppress(OSError):
                os.unlink(staged)


def _path(key: dict[str, Any]) -> Path | None:
    folder = flags.cache_folder()
    if folder is None:
        return None
    name = re.sub(r"[^\w.]", "_", str(key.get("op", "op")))[:60]
    return folder / "rules" / f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def plain(found: Found) -> dict[str, Any]:
    """As JSON."""
    return {"pattern": found.pattern, "sizes": [list(x) for x in found.sizes], "adjust": [list(x) for x in found.adjust], "why": found.why}


def read(data: Any) -> Found | None:
    """The inverse of `plain`; None for anything else."""
    if not isinstance(data, dict) or set(data) != {"pattern", "sizes", "adjust", "why"}:
        return None
    pattern, sizes, adjust, why = data["pattern"], data["sizes"], data["adjust"], data["why"]
    pairs = isinstance(sizes, list) and isinstance(adjust, list) and all(isinstance(x, list) and len(x) == 2 for x in (*sizes, *adjust))
    if not pairs or not isinstance(pattern, str) or not isinstance(why, str):
        return None
    if not all(isinstance(a, str) and type(n) is int for a, n in sizes) or not all(
        isinstance(a, str) and isinstance(b, str) for a, b in adjust
    ):
        return None
    return Found(pattern, tuple((a, n) for a, n in sizes), tuple((a, b) for a, b in adjust), why)
