"""The steps in which a folder of files becomes a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import InputError
from ..ir.jsontext import read_json
from ..runtime.tensorfile import sync_folder, write_text
from .manifest import LEFTOVER, MANIFEST, PLAN, STATE, TENSORS, FileRecord, Index, Manifest, damaged, folder_name, listed, read_text
from .state import Collected
from .storage import Taking

Written = dict[str, tuple[int, str]]  # file -> bytes, SHA-256


def open_folder(folder: Path, step: int, token: str) -> Path:
    """A new folder to write into, beside the checkpoints. What saves that were killed have left there is removed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        for left in [e for e in entries if LEFTOVER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]:
            shutil.rmtree(left.path, ignore_errors=True)
    serial = 1 + max((found.serial for found in listed(folder)), default=0)
    staged = folder / f".{folder_name(serial, step)}.{token}.partial"
    staged.mkdir()
    return staged


def write_rank(staged: Path, rank: int, mine: Collected, taking: Taking) -> Written:
    """This rank's tensors and sections, on disk. Raises OSError."""
    written = taking.write(staged)
    if rank == 0 or mine.sections:
        name = _state_file(rank)
        written[name] = write_text(staged / name, json.dumps(mine.sections, allow_nan=False) + "\n")
    return written


def complete(staged: Path, step: int, files: list[Written], index: Index | None, ranks: int, about: Mapping[str, Any]) -> str:
    """Write the table of tensors, the plan, and last the manifest; then give the folder its name, which is returned. Raises OSError."""
    assert index is not None
    written = {name: facts for of_rank in files for name, facts in of_rank.items()}
    written[TENSORS] = write_text(staged / TENSORS, index.model_dump_json() + "\n")
    if "text" in about:
        written[PLAN] = write_text(staged / PLAN, about["text"])
    serial = int(staged.name[1:].split("-", 1)[0])
    manifest = Manifest(
        serial=serial,
        step=step,
        ranks=ranks,
        mesh=about.get("mesh", {}),
        plan=about.get("plan"),
        graph=about.get("graph"),
        torch=str(torch.__version__),
        files={name: FileRecord(bytes=n, sha256=digest) for name, (n, digest) in written.items()},
    )
    sync_folder(staged)
    write_text(staged / MANIFEST, manifest.dumps())
    sync_folder(staged)
    os.rename(staged, staged.parent / manifest.folder)
    sync_folder(staged.parent)
    return manifest.folder


def remove(path: Path) -> None:
    """Delete a folder; it stops being a checkpoint at once. What cannot be deleted is left for the next save."""
    with suppress(OSError):
        if not path.name.startswith("."):
            gone = path.parent / f".{path.name}.0.deleted"
            os.rename(path, gone)
            path = gone
        shutil.rmtree(path, ignore_errors=True)


def read_sections(folder: Path, manifest: Manifest, rank: int, ranks: int) -> dict[str, Any]:
    """The sections of JSON for one of `ranks` ranks: those that all shared, and its own.

    On another number of ranks, a rank beyond those that saved takes the generators of rank `rank % saved`. Raises DamagedError, and
    InputError where something else than the generators differed from rank to rank.
    """
    sections = _sections(folder, manifest, 0)
    own = [r for r in range(1, manifest.ranks) if _state_file(r) in manifest.files]
    if ranks == manifest.ranks:
        return sections | (_sections(folder, manifest, rank) if rank in own else {})
    for other in own:
        differs = set(_sections(folder, manifest, other)) - {"rng"}
        if differs:
            raise InputError(
                f"{sorted(differs)[0]!r} differed from rank to rank when {manifest.ranks} ranks saved it, and {ranks} load it",
                where=str(folder),
                why="what belongs to a rank has no meaning on another number of them",
                try_="load on as many ranks, or save what is the same on all: how many samples all of them have seen",
            )
    source = rank % manifest.ranks
    return sections | (_sections(folder, manifest, source) if source in own else {})


def _state_file(rank: int) -> str:
    return STATE if rank == 0 else f"state-{rank:05d}.json"


def _sections(folder: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    name = _state_file(rank)
    try:
        found = read_json(read_text(folder, name, manifest.files[name].bytes))
    except ValueError as e:
        raise damaged(folder / name, f"it is no JSON: {str(e)[:120]}") from None
    if not isinstance(found, dict):
        raise damaged(folder / name, "it is no table of sections")
    return found
