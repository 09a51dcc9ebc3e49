"""Launch configurations that were measured on one kind of device: a small JSON file, read strictly.

    {"format": 1, "device": "NVIDIA H200", "kernels": {"norm.forward": [
        {"width": 4096, "bytes": 2, "block": 4096, "rows": 1, "warps": 8, "stages": 1}]}}

An entry holds for rows of up to `width` elements of `bytes` bytes each, down to the next smaller entry. It must be one of the kernel's
table. The file of a device is the one AUTOPAR_TUNED names, else `kernels-<device>.json` in the cache folder. One that is damaged,
or of another device, is left alone with one notice.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from ...ir import flags
from ...ir.errors import ProfileError
from ...ir.jsontext import read_json
from .launch import KERNELS, Config, Kernel, notice

FORMAT = 1
FIELDS = ("width", "bytes", "block", "rows", "warps", "stages")
Tuned = dict[str, dict[tuple[int, int], Config]]  # kernel -> (bytes, width) -> configuration


def read_tuned(text: str, device: str, where: str = "") -> Tuned:
    """The file's configurations. Raises ProfileError for anything that is not exactly a tuned file of this device."""
    try:
        data = read_json(text)
    except ValueError as error:
        raise ProfileError("a tuned file is no JSON", where=where, why=str(error)) from None
    if not isinstance(data, dict) or set(data) != {"format", "device", "kernels"} or not isinstance(data["kernels"], dict):
        raise ProfileError("a tuned file holds format, device and kernels, nothing else", where=where)
    if data["format"] != FORMAT or isinstance(data["format"], bool):
        raise ProfileError(f"a tuned file of format {data['format']!r}", where=where, why=f"this version reads {FORMAT}")
    if data["device"] != device:
        raise ProfileError(f"a tuned file of {data['device']!r}", where=where, why=f"this device is {device!r}")
    return {name: _entries(name, entries, where) for name, entries in data["kernels"].items()}


def _entries(name: str, entries: object, where: str) -> dict[tuple[int, int], Config]:
    kernel = KERNELS.get(name)
    if kernel is None:
        raise ProfileError(f"a tuned file names the kernel {name!r}", where=where, why=f"there are {', '.join(sorted(KERNELS))}")
    out: dict[tuple[int, int], Config] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or set(entry) != set(FIELDS) or any(type(v) is not int or v < 1 for v in entry.values()):
            raise ProfileError(f"an entry of {name} is not {', '.join(FIELDS)}, all positive integers", where=where)
        named = tuple(entry[field] for field in FIELDS[2:])
        known = [c for c in kernel.fitting(entry["width"], entry["bytes"]) if (c.block, c.rows, c.warps, c.stages) == named]
        if not known:
            raise ProfileError(f"{name} has no configuration {named} for rows of {entry['width']}", where=where)
        if (entry["bytes"], entry["width"]) in out:
            raise ProfileError(f"{name} has two entries for width {entry['width']} and {entry['bytes']} bytes", where=where)
        out[entry["bytes"], entry["width"]] = known[0]
    return out


def write_tuned(path: Path, device: str, found: Tuned) -> None:
    """Write a file that `read_tuned` takes; an old one is replaced when the new one is whole."""
    kernels = {
        name: [
            {"width": width, "bytes": size, "block": c.block, "rows": c.rows, "warps": c.warps, "stages": c.stages}
            for (size, width), c in sorted(entries.items())
        ]
        for name, entries in sorted(found.items())
    }
    text = json.dumps({"format": FORMAT, "device": device, "kernels": kernels}, indent=1) + "\n"
    read_tuned(text, device, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def tuned_path(device: str) -> Path | None:
    """Where the tuned file of a device is looked for."""
    if given := flags.tuned_file():
        return given
    folder = flags.cache_folder()
    return folder / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', device).lower()}.json" if folder else None


@functools.cache
def tuned_for(device: str) -> Tuned:
    """What was tuned on this kind of device; nothing when there is no file, or it cannot be used."""
    path = tuned_path(device)
    try:
        return read_tuned(path.read_text(encoding="utf-8"), device, str(path)) if path is not None and path.exists() else {}
    except (ProfileError, OSError, UnicodeDecodeError) as error:
        notice(f"tuned launch configurations are left alone: {error}")
        return {}


def nearest(entries: dict[tuple[int, int], Config], width: int, size: int) -> Config | None:
    """The entry of the smallest width that is not below this one."""
    widths = [w for b, w in entries if b == size and w >= width]
    return entries[size, min(widths)] if widths else None


def tuned_config(kernel: Kernel, width: int, like: Tensor) -> Config | None:
    """What was tuned for rows of this width, if it fits them."""
    entries = tuned_for(torch.cuda.get_device_name(like.device)).get(kernel.name)
    config = nearest(entries, width, like.dtype.itemsize) if entries else None
    return config if config in kernel.fitting(width, like.dtype.itemsize) else None
