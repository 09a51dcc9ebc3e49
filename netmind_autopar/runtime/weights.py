"""Weights in safetensors files, as Hugging Face lays them out: read in slices, so that no device holds more than its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ..ir.errors import CheckpointError, DamagedError, InputError
from ..ir.jsontext import read_json
from .tensorfile import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")


class Weights:
    """The tensors of a folder: of its index, or of `model.safetensors`, or of all safetensors files in it. Or of one file.

    prefix: the name of the base model inside; names in the files may have it where the model has not, and the other way round.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        self.path, self._prefix = Path(path).expanduser(), prefix
        self._files = dict(self._opened())

    def _opened(self) -> Iterable[tuple[str, TensorFile]]:
        names, seen = None, set[str]()
        if self.path.is_file():
            files = [self.path]
        elif (self.path / INDEX).is_file():
            names = _index(self.path / INDEX)
            files = [self.path / name for name in sorted(set(names.values()))]
        elif (self.path / SINGLE).is_file():
            files = [self.path / SINGLE]
        else:
            files = sorted(p for p in self.path.glob("*.safetensors") if _NAME.fullmatch(p.name)) if self.path.is_dir() else []
        if not files:
            raise CheckpointError(
                f"there are no weights in {self.path}",
                why=f"neither {INDEX} nor a safetensors file is there",
                try_="name the folder of a model",
            )
        for path in files:
            file = TensorFile(path, links=True)  # Hugging Face's cache is made of links
            for name in file.entries:
                if names is None or names.get(name) == path.name:
                    yield name, file
            seen |= file.entries.keys()
        if names and names.keys() - seen:
            missing = min(names.keys() - seen)
            raise DamagedError(f"{INDEX} names {missing!r}, which no file has", where=str(self.path), try_="fetch the files again")

    def find(self, names: Sequence[str]) -> str | None:
        """The name in the files of a tensor that the model knows under these names; None when it is not there."""
        stem = self._prefix + "."
        for name in names:
            for other in (name, stem + name, name.removeprefix(stem)):
                if other in self._files:
                    return other
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].entries[name].shape

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a tensor."""
        return self._files[name].read(name, offsets, sizes)

    def check(self, name: str, known_as: str, shape: Sequence[int]) -> None:
        """Raises InputError unless the tensor has this shape."""
        if self.shape(name) != tuple(shape):
            raise InputError(
                f"{known_as!r} has the shape {tuple(shape)}, in the files {self.shape(name)}",
                where=str(self._files[name].path),
                try_="build the model from the configuration that lies beside the weights",
            )


def _index(path: Path) -> dict[str, str]:
    """Which file holds which tensor. Raises DamagedError for what is no such table, and for files elsewhere."""
    try:
        found = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DamagedError(f"{path.name} cannot be read", where=str(path), why=str(e)[:200], try_="fetch it again") from None
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise DamagedError(f"{path.name} holds no weight_map", where=str(path), try_="fetch it again")
    for name in table.values():
        if not _NAME.fullmatch(name):
            raise DamagedError(f"{path.name} names the file {name!r}", where=str(path), why="weights lie beside their index, nowhere else")
    return table
