"""A distributed module's weights as files for everybody: safetensors in the layout of Hugging Face, and the configuration beside them."""

from __future__ import annotations

import copy
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ir.errors import CheckpointError, InputError
from .agree import from_rank_zero
from .tensorfile import DTYPE_NAMES, TensorWriter, nbytes, ordered, sync_folder, write_text
from .weights import INDEX, SINGLE


@dataclass(frozen=True)
class Configuration:
    """What lies beside the weights: objects that can write themselves into a folder."""

    writers: tuple[Any, ...]

    def write(self, folder: Path) -> None:
        for one in self.writers:
            one.save_pretrained(str(folder))


def configuration(model: nn.Module) -> Configuration:
    """The configuration of a Hugging Face model, and its settings for generation; of another model nothing."""
    found = []
    for name in ("config", "generation_config"):
        one = getattr(model, name, None)
        if callable(getattr(one, "save_pretrained", None)):
            one = copy.deepcopy(one)
            if name == "config":
                one.architectures = [type(model).__name__]
            found.append(one)
    return Configuration(tuple(found))


def save_pretrained(module: nn.Module, folder: str | os.PathLike[str], config: Configuration, max_shard_bytes: int) -> None:
    """Every parameter and persistent buffer of a module once, in files of at most `max_shard_bytes` (a larger tensor has one of its own).

    Files are written beside and renamed, the index last. One tensor is whole at a time. Raises CheckpointError on every rank.
    """
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes={max_shard_bytes} holds nothing", try_="leave it out: 5 GiB")
    tensors = dict(_kept(module))
    shards = _shards({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, max_shard_bytes)
    target, token = Path(folder).absolute(), secrets.token_hex(4)
    failed = _guarded(lambda: target.mkdir(parents=True, exist_ok=True))
    for file, names in shards.items():
        failed = _write(target / f".{file}.{token}.partial", {name: tensors[name] for name in names}, failed)

    def finish() -> str:
        _raised(failed, target)
        try:
            _publish(target, token, shards, {name: nbytes(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, config)
        except OSError as e:
            _raised(e, target)
        return ""

    try:
        from_rank_zero(finish)
    finally:
        for file in shards:
            with suppress(OSError):
                (target / f".{file}.{token}.partial").unlink(missing_ok=True)


def _kept(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state_dict has, each tensor once, under its first name."""
    hidden = {f"{prefix}.{name}".lstrip(".") for prefix, m in module.named_modules() for name in m._non_persistent_buffers_set}
    for name, tensor in [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n not in hidden)]:
        if tensor.dtype not in DTYPE_NAMES or tensor.dtype == torch.complex128:
            raise InputError(f"{name!r} is of {tensor.dtype}, which safetensors files do not have", try_="convert it to another dtype")
        yield name, tensor.detach()


def _shards(about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> dict[str, list[str]]:
    """Files and the tensors in each, as few as fill up in order."""
    runs: list[list[str]] = [[]]
    room = limit
    for name, (dtype, shape) in about.items():
        size = nbytes(dtype, shape)
        if runs[-1] and size > room:
            runs.append([])
            room = limit
        runs[-1].append(name)
        room -= size
    if len(runs) == 1:
        return {SINGLE: runs[0]}
    return {f"model-{i:05d}-of-{len(runs):05d}.safetensors": names for i, names in enumerate(runs, 1)}


def _write(path: Path, tensors: Mapping[str, Tensor], failed: Exception | None) -> Exception | None:
    """Gather the tensors one by one, on all ranks; rank 0 writes. Returns what went wrong on this rank, now or before."""
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    about = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    file: TensorWriter | None = None
    if writes and failed is None:
        try:
            file = TensorWriter(path, about, {"format": "pt"})
        except OSError as e:
            failed = e
    for name in ordered(about):
        tensor = tensors[name]
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if file is not None and failed is None:
            failed = _guarded(lambda file=file, name=name, whole=whole: file.write(name, whole))  # type: ignore[misc]
        del whole
    if file is not None:
        with file:
            failed = failed or _guarded(file.close)
    return failed


def _publish(target: Path, token: str, shards: Mapping[str, list[str]], sizes: Mapping[str, int], config: Configuration) -> None:
    """Rank 0: the files get their names; then the index; files of an earlier export that the new one does not have go."""
    for file in shards:
        os.replace(target / f".{file}.{token}.partial", target / file)
    if len(shards) > 1:
        table = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {n: file for file, names in shards.items() for n in names}}
        staged = target / f".{INDEX}.{token}.partial"
        write_text(staged, json.dumps(table, indent=2, sort_keys=True) + "\n")
        os.replace(staged, target / INDEX)
    else:
        (target / INDEX).unlink(missing_ok=True)
    for old in [*target.glob("model-*-of-*.safetensors"), target / SINGLE]:
        if old.name not in shards:
            old.unlink(missing_ok=True)
    config.write(target)
    sync_folder(target)


def _guarded(act: Callable[[], object]) -> Exception | None:
    try:
        act()
    except OSError as e:
        return e
    return None


def _raised(failed: Exception | None, target: Path) -> str:
    if failed is not None:
        why = getattr(failed, "strerror", None) or str(failed)
        raise CheckpointError("cannot write the weights", where=str(target), why=why, try_="free some space, or name another folder")
    return ""
