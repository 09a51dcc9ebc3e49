"""Regions of an emitted file as compiled functions.

The emitted file gives every region to `Place.region`. It is compiled when it is first called, for the shapes, dtypes and strides that it is
called with: a plan fixes shapes and dtypes, and a tensor that comes with other strides later (a user's, a gradient's) is copied to those.
A region that cannot be compiled runs as it is written, with one notice that says why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..health.progress import HERE

# Compiles a function of a list of tensors, for tensors like these; what it gives empties the list that it is called with.
Compiler = Callable[[Callable[[list[Tensor]], Any], Sequence[Tensor]], Callable[[list[Tensor]], Sequence[Tensor]]]
_log = logging.getLogger("netmind_autopar")
_one_at_a_time = threading.Lock()  # ranks that are threads: compilers keep state of their own


@dataclass
class CompiledRegion:
    """What became of a region. state: "waits" for its first call, "compiled" or "as written", then `why` says what stood against it."""

    name: str
    ops: int
    state: str = "waits"
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        took = f" in {self.seconds:.1f} s" if self.state == "compiled" else ""
        return f"{self.name}: {self.ops} ops, {self.state}{took}{': ' + self.why if self.why else ''}"


class Regions:
    """All regions of a module on this device, of all its graphs, and the compiler."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.rows: list[CompiledRegion] = []

    def __deepcopy__(self, memo: Any) -> Regions:
        return self

    def region(self, function: Callable[[list[Tensor]], Any], ops: int) -> _Region:
        """A region of an emitted file, not compiled yet."""
        row = CompiledRegion(function.__name__, ops)
        self.rows.append(row)
        return _Region(function, self.compiler, row)


class _Region:
    """Callable with a list of tensors, which it empties."""

    def __init__(self, function: Callable[[list[Tensor]], Any], compiler: Compiler, row: CompiledRegion) -> None:
        self.function, self.compiler, self.row = function, compiler, row
        self.run: Callable[[list[Tensor]], Any] | None = None
        self.strides: list[tuple[int, ...]] = []

    def __call__(self, args: list[Tensor]) -> Any:
        if self.run is None:
            with _one_at_a_time:
                self._compile(args)
        for i in [i for i, stride in enumerate(self.strides) if args[i].stride() != stride]:
            args[i] = torch.empty_strided(args[i].shape, self.strides[i], dtype=args[i].dtype, device=args[i].device).copy_(args[i])
        return self.run(args)  # type: ignore[misc]

    def _compile(self, args: list[Tensor]) -> None:
        start = time.perf_counter()
        try:
            with HERE.doing(f"compiling {self.row.name}"):  # the other ranks compile, too, and wait for one another
                made = self.compiler(self.function, args)
        except Exception as error:  # of the compiler, or of tracing: the region itself still runs
            self.row.state, self.row.why = (
                "as written",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
            )
            _log.warning("%s is not compiled and runs as it is written: %s", self.row.name, self.row.why)
            self.run = self.function
            self.strides = [t.stride() for t in args]
            return
        self.row.state, self.row.seconds = "compiled", time.perf_counter() - start
        self.strides, self.run = [t.stride() for t in args], made
