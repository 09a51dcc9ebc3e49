"""Two real processes for a test file that is its own worker: `python FILE FOLDER RANK` writes what it found into FOLDER/found.RANK."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def found_by_two(file: str, folder: Path, **env: str) -> list[Any]:
    """What both ranks wrote; AssertionError with the end of its output when one wrote nothing."""
    command, env = [sys.executable, file, str(folder)], {**os.environ, "OMP_NUM_THREADS": "1", **env}
    started = [subprocess.Popen([*command, str(r)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in (0, 1)]
    logs = [p.communicate(timeout=600)[0] for p in started]
    for rank, log in enumerate(logs):
        assert (folder / f"found.{rank}").exists(), log[-3000:]
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in (0, 1)]
