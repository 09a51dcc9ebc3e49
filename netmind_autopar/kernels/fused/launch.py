"""How Triton kernels are chosen and launched: a table of configurations per kernel, heuristics, and what was tuned on a device.

A kernel's table is ordered: the first configuration that fits a row's width is the heuristic. A tuned file may name another one *of the
table*, never one outside it: the table is what the compile gate has seen (`benchmarks/kernels.py --compile-gate`).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ir import flags
from .language import INTERPRETED, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # others take the eager reference
OLDEST = (8, 0)  # compute capability: the first with bfloat16


@dataclass(frozen=True, order=True)
class Config:
    """One way to launch a kernel.

    block: elements of a row per step, a power of two (all of a row where the kernel keeps rows in registers).
    rows:  rows of a tile. warps: of a program, 32 threads each. stages: of the software pipeline of its loop.
    only:  for elements of so many bytes; 0: of any size.
    """

    block: int
    rows: int = 1
    warps: int = 4
    stages: int = 1
    only: int = 0


@dataclass(frozen=True, eq=False)
class Kernel:
    """A Triton kernel, its configurations in order of preference, and where its rows are whole in registers."""

    name: str
    fn: Any
    configs: tuple[Config, ...]
    whole: bool = False

    def fitting(self, width: int, itemsize: int) -> list[Config]:
        """What can run rows of so many elements of so many bytes. Whole rows: the smallest block that holds one; else all."""
        known = [c for c in self.configs if c.only in (0, itemsize)]
        if not self.whole:
            return known
        block = min((c.block for c in known if c.block >= width), default=0)
        return [c for c in known if c.block == block]


@dataclass
class Launch:
    """One launch as it was asked for: what `recording` collects."""

    kernel: Kernel
    config: Config
    grid: int
    args: tuple[Any, ...]
    flags: dict[str, Any]


@dataclass
class _State:
    recorded: list[Launch] | None = None
    forced: dict[str, Config] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


KERNELS: dict[str, Kernel] = {}
_STATE = _State()


def register(name: str, fn: Any, configs: tuple[Config, ...], *, whole: bool = False) -> Kernel:
    """Enter a kernel into the table."""
    KERNELS[name] = Kernel(name, fn, configs, whole)
    return KERNELS[name]


def notice(text: str) -> None:
    """Tell the user once in this process."""
    if text not in _SAID:
        _SAID.add(text)
        warnings.warn(text, stacklevel=3)


_SAID: set[str] = set()


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def usable(*tensors: Tensor | None) -> bool:
    """True when a Triton kernel may run on these floating-point tensors; the eager reference takes all else.

    All on one CUDA device (on the CPU under the interpreter), of a dtype the kernels know, none of them empty.
    """
    given = [t for t in tensors if t is not None]
    first = given[0]
    kind = first.device.type
    if any(t.dtype not in DTYPES or not t.numel() for t in given) or flags.plain_kernels():
        return False
    if kind == "meta":
        return _STATE.recorded is not None
    if kind != "cuda":
        return INTERPRETED and kind == "cpu"
    if triton is None:
        notice("Triton is not installed: fused kernels run as plain PyTorch, correct but slower (pip install triton)")
        return False
    if _capability(first.device.index) < OLDEST:
        notice(f"{torch.cuda.get_device_name(first.device)} is older than the fused kernels know: they run as plain PyTorch")
        return False
    return True


def choose(kernel: Kernel, width: int, like: Tensor) -> Config | None:
    """The configuration for rows of this width and dtype: forced, tuned, or the first that fits. None when no whole row fits."""
    fitting = kernel.fitting(width, like.dtype.itemsize)
    forced = _STATE.forced.get(kernel.name)
    if forced is not None:
        return forced if forced in fitting else None
    if like.device.type == "cuda" and fitting:
        from .tuned import tuned_config  # it reads the table

        found = tuned_config(kernel, width, like)
        if found is not None:
            return found
    return fitting[0] if fitting else None


def programs(like: Tensor, tiles: int, each: int = 1) -> int:
    """How many programs share `tiles` pieces of work: `each` per multiprocessor at most. Partial sums are that many."""
    if like.device.type == "cuda":
        count = torch.cuda.get_device_properties(like.device).multi_processor_count
    else:
        count = 4 if INTERPRETED else 132
    return max(1, min(tiles, count * each))


def launch(kernel: Kernel, config: Config, grid: int, *args: Any, **flags_: Any) -> None:
    """Run `grid` programs of a kernel; constants of its table are passed as BLOCK and, where it has them, ROWS."""
    names = kernel.fn.arg_names
    flags_ = {**flags_, **{k: v for k, v in (("BLOCK", config.block), ("ROWS", config.rows)) if k in names}}
    if _STATE.recorded is not None:
        _STATE.recorded.append(Launch(kernel, config, grid, args, flags_))
        return
    _STATE.counts[kernel.name] = _STATE.counts.get(kernel.name, 0) + 1
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel.fn[(grid,)](*args, **flags_, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)


@contextlib.contextmanager
def recording(config: dict[str, Config] | None = None) -> Iterator[list[Launch]]:
    """Collect launches on meta tensors instead of running them, with these configurations forced: what the compile gate compiles."""
    before = (_STATE.recorded, _STATE.forced)
    _STATE.recorded, _STATE.forced = [], dict(config or {})
    try:
        yield _STATE.recorded
    finally:
        _STATE.recorded, _STATE.forced = before


@contextlib.contextmanager
def forcing(config: dict[str, Config]) -> Iterator[None]:
    """Launch these kernels with these configurations: to measure them, and to prove every one of the table."""
    before, _STATE.forced = _STATE.forced, dict(config)
    try:
        yield
    finally:
        _STATE.forced = before


def counts() -> dict[str, int]:
    """How often this process has launched each kernel."""
    return dict(_STATE.counts)
