"""Tensors on disk: memory-mapped files without a name, whose physical memory can be given back at any time.

What was read or written through a mapping stays in the process's resident memory until the kernel wants it. `copy` moves a piece at
a time and gives each back, and `drop` gives back all of a tensor, so that what waits on disk takes no memory: its bytes are then in
the kernel's page cache, which is not the process's and which the kernel empties as it needs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ir import flags
from ..ir.errors import OffloadError

PIECE_BYTES = 1 << 21  # copied at a time
_BLOCK = bytes(1 << 20)
_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address


class Laid(Protocol):
    """How a local tensor lies in memory."""

    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...]
    bytes: int


def on_disk(like: Laid) -> Tensor:
    """Room for a tensor on disk, mapped into memory. All of it is reserved at once: writing into a map of a full disk would be a crash."""
    size = max(like.bytes, 1)
    folder = flags.offload_folder()
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="netmind-autopar-", buffering=0) as file:
            _reserve(file, size)
            mapped = mmap.mmap(file.fileno(), size)
    except (OSError, ValueError) as e:
        raise OffloadError(
            f"cannot keep {size} bytes of a tensor on disk",
            where=str(folder or tempfile.gettempdir()),
            why=str(e),
            try_="free some space, name another folder in AUTOPAR_OFFLOAD, or plan with less memory on disk",
        ) from None
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    _maps[whole.untyped_storage().data_ptr()] = mapped
    return whole[: like.bytes].view(like.dtype).as_strided(like.shape, like.strides)


def _reserve(file: Any, size: int) -> None:
    """Make a file `size` bytes long on the disk. Raises OSError when there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(_BLOCK)):
        file.write(_BLOCK[: size - start])
    file.flush()


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor lies in one of these files."""
    return x.device.type == "cpu" and x.untyped_storage().data_ptr() in _maps


def drop(x: Tensor, start: int = 0, size: int | None = None) -> None:
    """Give back the physical memory of a tensor's file, or of `size` bytes from `start` of it; other tensors are left alone."""
    mapped = _maps.get(x.untyped_storage().data_ptr()) if x.device.type == "cpu" else None
    if mapped is None or not hasattr(mapped, "madvise"):
        return
    page = start // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, page, len(mapped) - page if size is None else start - page + size)


@torch.no_grad()
def copy(target: Tensor, source: Tensor) -> None:
    """target.copy_(source) with no more than a piece of what lies on disk in memory."""
    there = [x for x in (target, source) if is_mapped(x)]
    if not there or not _alike(target, source):
        target.copy_(source)
        for x in there:
            drop(x)
        return
    size, item = target.numel(), target.element_size()
    flat = [x.as_strided((size,), (1,)) for x in (target, source)]
    step = PIECE_BYTES // item
    for at in range(0, size, step):
        end = min(at + step, size)
        flat[0][at:end].copy_(flat[1][at:end])
        for x in there:
            first = x.storage_offset() * item
            drop(x, first + at * item, (end - at) * item)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Both are dense and lie alike, so that one can be copied as a run of numbers."""
    same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return same and 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) == a.numel()
