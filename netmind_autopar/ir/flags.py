"""Every environment variable that is read, in one place.

AUTOPAR_DEBUG   0–4: 1 shows tracebacks and the plan, 2 costs, 3 what each pass changed, 4 the emitted code.
AUTOPAR_DUMP    a folder: graphs, plans and emitted code are written there.
AUTOPAR_CACHE   a folder for rules that were found; ~/.cache/netmind-autopar when unset, none when "off".
AUTOPAR_OFFLOAD    a folder on a disk, for tensors that a plan keeps there during a step; the system's temporary folder when unset.
AUTOPAR_DISCOVER   0: ops without a rule are never run to find one.
AUTOPAR_KERNELS    0: fused ops run as plain PyTorch on every device, never as Triton kernels.
AUTOPAR_TUNED      a file of launch configurations that were measured on this device; one in the cache folder when unset.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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


def cache_folder() -> Path | None:
    """The user's folder for what need not be computed again; None for no cache."""
    given = os.environ.get("AUTOPAR_CACHE")
    if given is not None:
        return None if given.strip().lower() in ("", "0", "off", "none") else Path(given).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/netmind-autopar").expanduser()
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(base or "~/.cache").expanduser() / "netmind-autopar"


def offload_folder() -> Path | None:
    """Where tensors wait on disk; None for the system's temporary folder."""
    given = os.environ.get("AUTOPAR_OFFLOAD", "").strip()
    return Path(given).expanduser() if given else None


def discovers() -> bool:
    """False when ops without a rule must not be run to find one."""
    return os.environ.get("AUTOPAR_DISCOVER", "1").strip().lower() not in ("0", "off", "no", "false")


def plain_kernels() -> bool:
    """True when fused ops must not run as Triton kernels."""
    return os.environ.get("AUTOPAR_KERNELS", "1").strip().lower() in ("0", "off", "no", "false")


def tuned_file() -> Path | None:
    """The file of launch configurations that the user names; None for the one in the cache folder, if there is one."""
    given = os.environ.get("AUTOPAR_TUNED", "").strip()
    return Path(given).expanduser() if given else None


def dump(name: str, text: Callable[[], str]) -> None:
    """Write a text to the file `name` in the folder AUTOPAR_DUMP, when that is set; only then it is made."""
    folder = os.environ.get("AUTOPAR_DUMP")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text(text(), encoding="utf-8")
