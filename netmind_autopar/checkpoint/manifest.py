"""What makes a folder a checkpoint: its manifest, and the names that a checkpoint and its files may have.

000012-step-3000/            the twelfth checkpoint of the run: what counts as newest is the order of writing
    manifest.json            every other file with its size and SHA-256; written last, hashes itself
    tensors.json             of every tensor shape, dtype, and the pieces: where each begins and in which file it lies
    rank-00003.safetensors   the pieces that one rank wrote
    state.json               what is not a tensor; state-00003.json where that differs on a rank
    plan.json                the plan that ran, for the reader
.000013-step-3250.x7k2.partial/     being written: becomes a checkpoint by being renamed
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ir.errors import CheckpointError, DamagedError
from ..ir.jsontext import read_json
from ..runtime.tensorfile import DTYPES

MANIFEST, TENSORS, STATE, PLAN = "manifest.json", "tensors.json", "state.json", "plan.json"
FOLDER = re.compile(r"(?P<serial>\d{6,18})-step-(?P<step>\d{1,18})")
LEFTOVER = re.compile(r"\.(\d{6,18})-step-(\d{1,18})\.[0-9a-z]+\.(partial|deleted)")
_FILE = r"^[a-z0-9][a-z0-9_.-]{0,100}$"  # no separators, nothing hidden, no way out of the folder
_PIECE_BYTES = 1 << 22

Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
FileName = Annotated[str, Field(pattern=_FILE)]
Sizes = tuple[Natural, ...]
P = TypeVar("P", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class FileRecord(_Part):
    """A file as it was written."""

    bytes: Natural
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Part):
    """`sha256` is that of the manifest itself without that field. plan, graph: hashes; None for a model without a plan."""

    format: Literal["netmind-autopar-checkpoint"] = "netmind-autopar-checkpoint"
    version: Literal[1] = 1
    serial: Natural
    step: Natural
    ranks: Annotated[int, Field(ge=1)]
    mesh: dict[str, Annotated[int, Field(ge=1)]] = {}
    plan: str | None = None
    graph: str | None = None
    torch: str = ""
    files: dict[FileName, FileRecord]
    sha256: str = ""

    @property
    def folder(self) -> str:
        return folder_name(self.serial, self.step)

    def dumps(self) -> str:
        """The file's text, with the hash filled in."""
        return _text(self.model_copy(update={"sha256": self._own_hash()}))

    def _own_hash(self) -> str:
        return hashlib.sha256(_text(self.model_copy(update={"sha256": ""})).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a folder. Raises DamagedError that says what is wrong with it."""
        text = read_text(folder, MANIFEST)
        found = _parsed(cls, text, folder / MANIFEST)
        if found.sha256 != found._own_hash() or found.dumps() != text:
            raise damaged(folder / MANIFEST, "its own SHA-256 is not the one that it names")
        if found.folder != folder.name:
            raise damaged(folder / MANIFEST, f"it belongs to {found.folder}")
        return found


class Chunk(_Part):
    """A piece of a tensor: the box at `offsets`, stored under `key` in `file`."""

    offsets: Sizes
    sizes: Sizes
    file: FileName
    key: str


class TensorRecord(_Part):
    dtype: Annotated[str, Field(pattern="^(" + "|".join(DTYPES) + ")$")]
    shape: Sizes
    chunks: tuple[Chunk, ...]


class Index(_Part):
    """Where every tensor lies."""

    tensors: dict[str, TensorRecord]

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Index:
        """Raises DamagedError unless the pieces fill every tensor and lie in files of the checkpoint."""
        found = _parsed(cls, read_text(folder, TENSORS, manifest.files[TENSORS].bytes), folder / TENSORS)
        for name, tensor in found.tensors.items():
            filled = 0
            for chunk in tensor.chunks:
                box = list(zip(chunk.offsets, chunk.sizes, tensor.shape, strict=False))
                if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape) or any(o + n > whole for o, n, whole in box):
                    raise damaged(folder / TENSORS, f"a piece of {name!r} lies outside of it")
                if chunk.file not in manifest.files:
                    raise damaged(folder / TENSORS, f"a piece of {name!r} lies in {chunk.file}, which the manifest does not have")
                filled += _product(chunk.sizes)
            if filled != _product(tensor.shape) or len({c.offsets for c in tensor.chunks if _product(c.sizes)}) != sum(
                1 for c in tensor.chunks if _product(c.sizes)
            ):
                raise damaged(folder / TENSORS, f"the pieces of {name!r} do not make it whole")
        return found


@dataclass(frozen=True)
class Found:
    """A folder that is named like a checkpoint."""

    serial: int
    step: int
    path: Path


def folder_name(serial: int, step: int) -> str:
    return f"{serial:06d}-step-{step}"


def listed(folder: Path) -> list[Found]:
    """The checkpoints in a folder, the last one written first. Links, and whatever is named otherwise, are not among them."""
    try:
        with os.scandir(folder) as entries:
            found = [(FOLDER.fullmatch(e.name), e) for e in entries if e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise CheckpointError(f"cannot look into {folder}", why=str(e), try_="name a folder that can be read") from None
    known = [
        Found(int(m["serial"]), int(m["step"]), folder / e.name)
        for m, e in found
        if m and e.name == folder_name(int(m["serial"]), int(m["step"]))
    ]
    return sorted(known, key=lambda f: f.serial, reverse=True)


def read_text(folder: Path, name: str, limit: int = 1 << 28) -> str:
    """A text file of a checkpoint; no links, no more than `limit` bytes. Raises DamagedError."""
    path = folder / name
    try:
        with os.fdopen(_opened(path), "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise damaged(path, f"it has more than {limit} bytes")
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except OSError as e:
        raise damaged(path, f"it cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise damaged(path, "it is no text") from None


def problems(folder: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) of the files in a checkpoint; share (i, n): of every n-th file from the i-th on."""
    missing = [name for name in (TENSORS, STATE) if name not in manifest.files]
    yield from ((name, "the manifest does not have it") for name in missing)
    for name in sorted(manifest.files)[share[0] :: share[1]]:
        wrong = _problem(folder / name, manifest.files[name])
        if wrong:
            yield name, wrong


def _problem(path: Path, record: FileRecord) -> str:
    try:
        with os.fdopen(_opened(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                return f"it has {size} bytes instead of {record.bytes}" + (": it is cut off" if size < record.bytes else "")
            digest = hashlib.sha256()
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except FileNotFoundError:
        return "it is missing"
    except OSError as e:
        return f"it cannot be read: {e.strerror}"
    return "" if digest.hexdigest() == record.sha256 else "its bytes are not those that were written (SHA-256 differs)"


def damaged(path: Path, what: str) -> DamagedError:
    """The error for a file that is not what was written."""
    return DamagedError(f"{path.name} is damaged: {what}", where=str(path), try_="load an older checkpoint")


def _opened(path: Path) -> int:
    """A descriptor of an ordinary file: no link, no pipe that would never end."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no ordinary file")
    return fd


def _parsed(kind: type[P], text: str, path: Path) -> P:
    try:
        read_json(text)  # no key twice
        return kind.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as e:
        raise damaged(path, f"it is no JSON: {str(e)[:120]}") from None


def _product(sizes: Sizes) -> int:
    out = 1
    for n in sizes:
        out *= n
    return out


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n"
