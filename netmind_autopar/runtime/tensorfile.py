"""Files of tensors in the safetensors format: written one tensor after the other, read in slices.

Eight bytes say how long the header is; the header is JSON, {name: {dtype, shape, data_offsets}}; then come the bytes of the tensors,
without gaps. There is nothing in such a file that could be executed, and every number in the header is checked before it is used.
Layout: https://huggingface.co/docs/safetensors, read and written here without that library.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..ir.errors import CheckpointError, DamagedError
from ..ir.jsontext import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "C128": torch.complex128,  # ours alone: checkpoints have it, files for others do not
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # as in the library itself
_PIECE = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `begin` and `end` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


class TensorFile:
    """A file that is read. Slices come from a memory map: only the pages that they lie on are read."""

    def __init__(self, path: Path, *, links: bool = False) -> None:
        """links: whether the path may be a link."""
        self.path = path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
        except FileNotFoundError:
            raise _damaged(path, "it is missing") from None
        except OSError as e:
            raise CheckpointError(f"cannot open {path.name}", where=str(path), why=str(e)) from None
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise _damaged(path, "it is no ordinary file")
            self.entries, self.metadata, self._start = _read_header(path, fd, about.st_size)
            self._map = mmap.mmap(fd, about.st_size, access=mmap.ACCESS_COPY)  # a private copy of what is written to: nothing is
        except OSError as e:
            raise CheckpointError(f"cannot read {path.name}", where=str(path), why=str(e)) from None
        finally:
            os.close(fd)

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """A tensor, or the box of it that begins at `offsets`; fresh memory on the CPU. Raises DamagedError for what is not there."""
        entry = self.entries.get(name)
        if entry is None:
            raise _damaged(self.path, f"it has no tensor {name!r}")
        offsets, sizes = offsets or (0,) * len(entry.shape), entry.shape if sizes is None else sizes
        fits = len(offsets) == len(sizes) == len(entry.shape)
        if not fits or any(o < 0 or n < 0 or o + n > whole for o, n, whole in zip(offsets, sizes, entry.shape, strict=True)):
            raise _damaged(
                self.path, f"the tensor {name!r} has the shape {entry.shape}, and {tuple(sizes)} at {tuple(offsets)} is not in it"
            )
        if not math.prod(sizes):
            return torch.empty(tuple(sizes), dtype=entry.dtype)
        begin = self._start + entry.begin
        if begin % entry.dtype.itemsize:  # a foreign file may pack bytes before floats
            raw = bytearray(self._map[begin : self._start + entry.end])
            whole = torch.frombuffer(raw, dtype=entry.dtype)
        else:
            whole = torch.frombuffer(self._map, dtype=entry.dtype, count=math.prod(entry.shape), offset=begin)
        box = whole.view(entry.shape)
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            box = box.narrow(dim, offset, size)
        out = box.clone(memory_format=torch.contiguous_format)
        if hasattr(self._map, "madvise"):  # what was read is not kept in memory a second time
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, self._start + entry.end - page)
        return out


def _read_header(path: Path, fd: int, size: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The tensors, the free text and where the bytes begin. Every byte of the file is accounted for."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little") if size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(path, f"{size} bytes hold no header" if size >= 8 else "it is cut off before the header")
    try:
        found = read_json(os.pread(fd, length, 8).decode("utf-8"))
    except ValueError as e:
        raise _damaged(path, f"its header is no JSON: {str(e)[:120]}") from None
    if not isinstance(found, dict):
        raise _damaged(path, "its header is no table of tensors")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "the texts in its header are no texts")
    entries = {name: _entry(path, name, about) for name, about in found.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != at:
            raise _damaged(path, f"the bytes of {name!r} do not follow those of the tensor before it")
        at = entry.end
    if 8 + length + at != size:
        raise _damaged(path, f"it should have {8 + length + at} bytes and has {size}")
    return entries, metadata, 8 + length


def _entry(path: Path, name: str, about: object) -> Entry:
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header does not describe {name!r}")
    shape, offsets = about["shape"], about["data_offsets"]
    if not isinstance(about["dtype"], str) or about["dtype"] not in DTYPES:
        raise _damaged(path, f"the tensor {name!r} has the unknown dtype {about['dtype']!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"shape or place of {name!r} are no numbers")
    entry = Entry(DTYPES[about["dtype"]], tuple(shape), offsets[0], offsets[1])
    if entry.end - entry.begin != nbytes(entry.dtype, entry.shape):
        raise _damaged(path, f"the tensor {name!r} of shape {entry.shape} does not take {entry.end - entry.begin} bytes")
    return entry


def _naturals(x: object) -> bool:
    return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)


def _damaged(path: Path, why: str) -> DamagedError:
    return DamagedError(f"{path.name} is damaged: {why}", where=str(path), try_="take an older checkpoint, or fetch the file again")


class TensorWriter:
    """A file that is written: the header at once, then the tensors in that order, one at a time; hashed on the way, on disk at `close`."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        self.order = ordered(tensors)
        for name in self.order:
            dtype, shape = tensors[name]
            end = at + nbytes(dtype, shape)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors lie as their dtypes want it
        self._left = list(self.order)
        self._file = HashedFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of `order`, on whatever device."""
        assert self._left[:1] == [name], f"{name!r} is not the next tensor"
        del self._left[0]
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            self._file.write(memoryview(flat.numpy()))

    def close(self) -> tuple[int, str]:
        """Bytes and SHA-256 of the file, which is on disk now."""
        assert not self._left, f"{self._left[0]!r} was never written"
        return self._file.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.give_up()


def ordered(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    """The names in the order in which tensors lie in a file: wide dtypes first, so that every one is aligned."""
    return sorted(tensors, key=lambda name: -tensors[name][0].itemsize)


class HashedFile:
    """A new file that counts and hashes what is written into it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        self._hash, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hash.update(piece)
            self._bytes += len(piece)
            while len(piece):
                piece = piece[os.write(self._fd, piece) :]

    def close(self) -> tuple[int, str]:
        """Bytes and SHA-256; the file is on disk when this returns."""
        os.fsync(self._fd)
        self.give_up()
        return self._bytes, self._hash.hexdigest()

    def give_up(self) -> None:
        """Close the file as it is. A second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def write_text(path: Path, text: str) -> tuple[int, str]:
    """A new file with this text, on disk when this returns: its bytes and SHA-256."""
    file = HashedFile(path)
    try:
        file.write(text.encode())
        return file.close()
    finally:
        file.give_up()


def sync_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder last."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
