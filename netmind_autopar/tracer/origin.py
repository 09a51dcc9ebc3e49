"""Where things come from: the user's own line and module, from stack traces and tracebacks."""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

_OURS, _TORCH, _PYTHON = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent), str(Path(linecache.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s+(?!File ")([^\n]*))?')


def is_foreign(path: str) -> bool:
    """True for code of the user's or of a library, False for torch, Python itself and this package."""
    return not path.startswith((_OURS, _TORCH, "<")) and (not path.startswith(_PYTHON) or "-packages" in path)


@functools.lru_cache(maxsize=65536)
def where(stack_trace: str | None) -> str | None:
    """The innermost line outside torch and this package: "model.py:41  x = self.fc(x)"; None when there is none."""
    for path, line, text in reversed(_FRAME.findall(stack_trace or "")):
        if is_foreign(path):
            return f"{Path(path).name}:{line}  {text.strip()}".rstrip()
    return None


def where_raised(trace: TracebackType | None) -> str:
    """The same for an exception's traceback; "" when there is no such line."""
    found = ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if is_foreign(path):
            found = _line(path, trace.tb_lineno)
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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return line_in(frame) if frame is not None else ""


def line_in(frame: FrameType) -> str:
    return _line(frame.f_code.co_filename, frame.f_lineno)


def line_of(function: Any, text: str = "def ") -> str:
    """The first line of a function's source that holds `text`, else the one where it begins; "" when it has no source in Python."""
    function = inspect.unwrap(function)
    try:
        lines, start = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return ""
    first = next((i for i, line in enumerate(lines) if text in line), next((i for i, line in enumerate(lines) if "def " in line), 0))
    return _line(inspect.getsourcefile(function) or "", start + first)


def _line(path: str, line: int) -> str:
    return f"{Path(path).name}:{line}  {linecache.getline(path, line).strip()}".rstrip()
