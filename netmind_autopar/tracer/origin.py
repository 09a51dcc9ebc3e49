"""Where things come from: the user's own line and module, from stack traces and tracebacks."""

from __future__ import annotations

import functools
import linecache
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_OURS, _TORCH = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s+(?!File ")([^\n]*))?')


def _foreign(path: str) -> bool:
    return not path.startswith((_OURS, _TORCH, "<"))


@functools.lru_cache(maxsize=65536)
def where(stack_trace: str | None) -> str | None:
    """The innermost line outside torch and this package: "model.py:41  x = self.fc(x)"; None when there is none."""
    for path, line, text in reversed(_FRAME.findall(stack_trace or "")):
        if _foreign(path):
            return f"{Path(path).name}:{line}  {text.strip()}".rstrip()
    return None


def where_raised(trace: TracebackType | None) -> str:
    """The same for an exception's traceback; "" when there is no such line."""
    found = ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if _foreign(path):
            found = f"{Path(path).name}:{trace.tb_lineno}  {linecache.getline(path, trace.tb_lineno).strip()}".rstrip()
        trace = trace.tb_next
    return found


def module_path(stack: dict[str, Any] | None, prefix: str) -> str | None:
    """The innermost module of an `nn_module_stack`, its wrapper's `prefix` taken off; None when nothing is known."""
    if not stack:
        return None
    path = re.sub(r"@\d+", "", next(reversed(stack.values()))[0])
    return path[len(prefix) + 1 :] if path.startswith(prefix + ".") else ""


def where_called() -> str:
    """The innermost line outside torch and this package among those that are being executed; "" when there is none."""
    frame = sys._getframe(1)
    while frame is not None and not _foreign(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(path).name}:{line}  {linecache.getline(path, line).strip()}".rstrip()
