"""Tensors that wait for backward in host memory or on disk.

    away = offload(x, "host")     starts the copy out
    away = release(away)          the copy is complete; the device's memory is given back
    away = prefetch(away)         takes memory on the device and starts the copy back
    y = reload(away)              x again: same numbers, dtype and, where x was dense, strides

A parameter that waits elsewhere stays there, and is copied in where it is used; its gradient goes there for good:

    y = reload(fetch(w, "disk"))                                a copy of w on the device
    g = settle(release(offload(g, "disk", True)))               g, elsewhere and contiguous

On CUDA copies run on streams of their own, one for each direction, from and to pinned memory; the compute stream waits for them,
the host does not. Elsewhere a thread for each direction copies. What goes to disk lies in a memory-mapped file without a name: its
space is free again as soon as nothing refers to it, however the process ends.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import GraphError
from .mapped import copy
from .mapped import on_disk as _file

TIERS = ("host", "disk")


class Away:
    """A tensor between `offload` and `reload`. `there` is its memory on the device, while it has some."""

    def __init__(self, x: Tensor, tier: str, strides: tuple[int, ...] | None = None) -> None:
        self.device, self.tier = x.device, tier
        self.shape, self.dtype, self.strides = x.shape, x.dtype, _strides(x) if strides is None else strides
        self.bytes = x.numel() * x.element_size()
        self.there: Tensor | None = x.detach()
        self.host: Tensor | None = None
        self.file: Tensor | None = None
        self.job: Future[None] | None = None
        self.event: torch.cuda.Event | None = None

    def __del__(self) -> None:
        if self.event is not None and self.there is not None and not self.event.query():  # dropped on the way, after an error
            self.there.record_stream(_stream(self.device, "out"))
            self.there.record_stream(_stream(self.device, "in"))

    def wait(self) -> None:
        """Wait for the thread that copies, where there is one. Raises OffloadError as it did."""
        if self.job is not None:
            job, self.job = self.job, None
            try:
                job.result()
            finally:
                del job  # an error refers to this frame, and would keep all that is on its way

    def empty(self, **options: Any) -> Tensor:
        """Memory for x."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, **options)


def offload(x: Tensor, tier: str, last: bool = False) -> Away:
    """Start to copy x out of its device. tier: "host" or "disk". last: it stays there, and is contiguous."""
    away = Away(x, tier, _contiguous(x.shape) if last else None)
    if x.is_cuda:
        out = _stream(x.device, "out")
        out.wait_stream(torch.cuda.current_stream(x.device))
        away.host = away.empty(device="cpu", pin_memory=True)
        with torch.cuda.stream(out):
            away.host.copy_(away.there, non_blocking=True)
            away.event = out.record_event()
        if tier == "disk":
            away.job = _worker("out", os.getpid()).submit(_host_to_file, away)
    elif not x.is_meta:
        away.job = _worker("out", os.getpid()).submit(_device_to_memory, away)
    return away


def release(away: Away) -> Away:
    """Wait until x is out and give its memory back. Raises OffloadError when the disk is full or cannot be written."""
    if away.event is not None:
        torch.cuda.current_stream(away.device).wait_event(away.event)
    else:
        away.wait()
    away.there = None
    return away


def prefetch(away: Away) -> Away:
    """Take memory on the device and start to copy x back. Raises OffloadError as `release` does."""
    away.wait()
    away.there = away.empty(device=away.device)
    if away.device.type == "cuda":
        back = _stream(away.device, "in")
        back.wait_stream(torch.cuda.current_stream(away.device))
        if away.tier == "disk":
            away.job = _worker("in", os.getpid()).submit(_file_to_device, away)
        else:
            _host_to_device(away)
    elif away.device.type != "meta":
        away.job = _worker("in", os.getpid()).submit(_memory_to_device, away)
    return away


def reload(away: Away) -> Tensor:
    """Wait until x is back. The copy elsewhere is dropped."""
    away.wait()
    if away.event is not None:
        torch.cuda.current_stream(away.device).wait_event(away.event)
    x, away.there, away.host, away.file, away.event = away.there, None, None, None, None
    if x is None:
        raise GraphError("a tensor was taken back twice, or before it was asked for")
    return x


def fetch(x: Tensor, tier: str, device: torch.device | None = None) -> Away:
    """Take memory on the device and start to copy x there, which waits elsewhere and stays there too. device: x's own when None."""
    away = Away(x, tier)
    away.device, away.there = device or x.device, None
    if tier == "disk" and away.device.type == "cuda":
        away.file = x.detach()
    else:
        away.host = x.detach()
    return prefetch(away)


def settle(away: Away) -> Tensor:
    """Wait until x is out: the tensor elsewhere."""
    away.wait()
    if away.event is not None:
        away.event.synchronize()
    x, away.host, away.file, away.event = away.file if away.host is None else away.host, None, None, None
    return away.empty(device="meta") if x is None else x


MARKS = (offload, release, prefetch, reload, fetch, settle)  # what the lowered program calls


@torch.no_grad()
def _device_to_memory(away: Away) -> None:
    """The copy out where the device is the CPU."""
    assert away.there is not None
    target = _file(away) if away.tier == "disk" else away.empty(device="cpu")
    copy(target, away.there)
    away.host = target


@torch.no_grad()
def _memory_to_device(away: Away) -> None:
    assert away.there is not None and away.host is not None
    copy(away.there, away.host)


@torch.no_grad()
def _host_to_file(away: Away) -> None:
    """From pinned memory to disk, when the copy from the device has arrived."""
    assert away.host is not None and away.event is not None
    target = _file(away)
    away.event.synchronize()
    copy(target, away.host)
    away.file, away.host = target, None


@torch.no_grad()
def _file_to_device(away: Away) -> None:
    assert away.file is not None
    away.host = away.empty(device="cpu", pin_memory=True)
    copy(away.host, away.file)
    with torch.cuda.device(away.device):
        _host_to_device(away)


@torch.no_grad()
def _host_to_device(away: Away) -> None:
    assert away.there is not None and away.host is not None
    back = _stream(away.device, "in")
    with torch.cuda.stream(back):
        away.there.copy_(away.host, non_blocking=True)
        away.event = back.record_event()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those of x when its elements lie side by side in some order, else those of a contiguous tensor."""
    dense, room = list(x.stride()), 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size != 1 and stride != room:
            dense, room = [], 1
            break
        room *= size
    if dense or not x.dim():
        return tuple(dense)
    return _contiguous(x.shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    out: list[int] = []
    room = 1
    for size in reversed(shape):
        out.insert(0, room)
        room *= max(size, 1)
    return tuple(out)


@functools.cache
def _worker(direction: str, process: int) -> ThreadPoolExecutor:
    """The thread that copies in one direction; another one in a process that was forked."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"autopar-{direction}-{process}")


@functools.cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
