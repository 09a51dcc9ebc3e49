"""Where a thread is, read from its stack from outside: the user's line, the op of the emitted file, what torch is doing there."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

EMITTED = "<netmind-autopar"
COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/torch/_functorch/", "/torch/export/", "/torch/_export/", "/triton/")
COLLECTIVES = ("/torch/distributed/distributed_c10d.py", "/torch/distributed/_functional_collectives.py")
_OURS = str(Path(__file__).parents[1])
_STDLIB = sysconfig.get_paths()["stdlib"]


@dataclass(frozen=True)
class Place:
    """where: the innermost line of the user's own. op: of the emitted file, with the line of the model. compiling: inside a compiler.
    collective: of torch.distributed, called by other code than ours."""

    where: str = ""
    op: str = ""
    compiling: bool = False
    collective: str = ""


def place_of(thread: int) -> Place:
    """What the thread with this identifier is doing now; unlike a debugger it does not stop it."""
    frame = sys._current_frames().get(thread)
    return _place([(f, f.f_lineno) for f in _outwards(frame)])


def place_in(trace: TracebackType | None) -> Place:
    """Where an error was raised."""
    found: list[tuple[FrameType, int]] = []
    while trace is not None:
        found.insert(0, (trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return _place(found)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frames: list[tuple[FrameType, int]]) -> Place:
    """From frames, innermost first."""
    where = op = collective = ""
    compiling = False
    for frame, line in frames:
        file = frame.f_code.co_filename.replace("\\", "/")
        if file.startswith(EMITTED):
            op = op or _op(file, line)
        elif not where and _of_user(file):
            text = linecache.getline(frame.f_code.co_filename, line).strip()
            where = f"{Path(file).name}:{line}" + (f"  {text[:80]}" if text else f" in {frame.f_code.co_name}")
        compiling |= any(part in file for part in COMPILERS)
        if file.endswith(COLLECTIVES) and not where and not op:
            collective = frame.f_code.co_name  # the outermost of them is what was called
    return Place(where, op, compiling, collective.strip("_"))


def _op(file: str, line: int) -> str:
    """`y_3 = all_reduce_0(y_2)  # f32[8, 4], R   model.py:41` → `all_reduce_0, model.py:41`."""
    code, _, comment = linecache.getline(file, line).partition("#")
    called = code.partition("=")[2].partition("(")[0].strip()
    where = comment.strip().split("   ")[-1]
    return ", ".join(t for t in (called, where) if t)


def _of_user(file: str) -> bool:
    library = "/site-packages/" in file or "/dist-packages/" in file or file.startswith((_OURS, _STDLIB))
    return not library and not file.startswith("<")
