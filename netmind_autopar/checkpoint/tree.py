"""Nested Python values as JSON and back: what schedulers, generators of random numbers and data loaders say of themselves.

JSON has no tuples, no bytes and no infinity: such a value is an object whose one key `"$..."` says what it is. Tensors that are large or
distributed are named in the JSON and stored beside it; others are in it. Only the kinds of values listed here are written and read:
nothing in the text can name a class or a function.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ir.errors import DamagedError, InputError
from ..runtime.parked import Parked
from ..runtime.tensorfile import DTYPE_NAMES, DTYPES, nbytes

INLINE_BYTES = 1 << 16
ARRAYS = "biufc"  # kinds of numpy arrays: booleans, integers, floats, complex numbers
MAX_DEPTH = 60  # JSON that is read is bounded too: ir/jsontext.py


@dataclass
class Encoder:
    """Turns values into what JSON can say, and collects the tensors that are stored beside it, by name.

    inline: whether a plain tensor goes into the text.
    """

    inline: Callable[[Tensor], bool] = lambda t: t.numel() * t.element_size() <= INLINE_BYTES
    stored: dict[str, Tensor | Parked] = field(default_factory=dict)

    def encode(self, value: Any, path: str, depth: int = 0) -> Any:
        """`value` for JSON. path: what errors and stored tensors are called. Raises InputError for a kind of value that has no place."""
        if depth > MAX_DEPTH:
            raise InputError(f"{path} is nested too deep to be saved", try_="save a flatter structure")
        if value is None or type(value) in (bool, str, int):
            return value
        if isinstance(value, float):  # numpy's float64 too
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if type(value) in (list, tuple, set, frozenset, torch.Size):
            members = sorted(value, key=repr) if isinstance(value, set | frozenset) else value  # alike on every rank
            items = [self.encode(v, f"{path}/{i}", depth + 1) for i, v in enumerate(members)]
            kind = "list" if type(value) is list else "set" if isinstance(value, set | frozenset) else "tuple"
            return items if kind == "list" else {f"${kind}": items}
        if isinstance(value, Mapping):
            return self._mapping(value, path, depth)
        if isinstance(value, Tensor | Parked):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in ARRAYS:
            raw = np.ascontiguousarray(value)
            return {"$array": [raw.dtype.str, list(value.shape), base64.b64encode(raw.tobytes()).decode()]}
        if isinstance(value, bytes | bytearray):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
            return {"$dtype": DTYPE_NAMES[value]}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        if isinstance(value, int):
            return int(value)
        raise InputError(
            f"{path} holds an object of {type(value).__module__}.{type(value).__qualname__}",
            why="a checkpoint holds numbers, texts, bytes, tensors, arrays, and lists, tuples, sets and dicts of them: nothing pickled",
            try_="save what describes it, or give it state_dict() and load_state_dict()",
        )

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:
        plain = all(isinstance(k, str) and not k.startswith("$") for k in value) and not isinstance(value, Counter)
        if plain:
            return {k: self.encode(v, f"{path}/{k}", depth + 1) for k, v in value.items()}
        pairs = [
            [self.encode(k, f"{path}/key {i}", depth + 1), self.encode(v, f"{path}/{k}", depth + 1)]
            for i, (k, v) in enumerate(value.items())
        ]
        return {"$counter" if isinstance(value, Counter) else "$dict": pairs}

    def _tensor(self, value: Tensor | Parked, path: str) -> Any:
        dtype = value.dtype
        if dtype not in DTYPE_NAMES or (isinstance(value, Tensor) and value.layout != torch.strided):
            raise InputError(f"{path} is a tensor of {dtype}, which has no place in a checkpoint", try_="convert it, or leave it out")
        if isinstance(value, Parked | DTensor) or not self.inline(value):
            name, n = path, 1
            while name in self.stored:  # keys with a slash may spell one path twice
                name, n = f"{path}~{n}", n + 1
            self.stored[name] = value
            return {"$stored": name}
        raw = value.detach().to("cpu").contiguous()
        data = raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b""
        return {"$tensor": [DTYPE_NAMES[dtype], list(raw.shape), base64.b64encode(data).decode()]}


def decode(value: Any, stored: Mapping[str, Tensor], where: str) -> Any:
    """The inverse of `encode`. stored: the tensors that are named. Raises DamagedError for anything else."""
    try:
        return _decode(value, stored)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as e:
        raise DamagedError(f"{where} holds a value that cannot be read", where=where, why=f"{type(e).__name__}: {str(e)[:120]}") from None


def _decode(value: Any, stored: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, stored) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if not kind.startswith("$"):
        return {k: _decode(v, stored) for k, v in value.items()}
    if len(value) != 1 or kind not in _READERS:
        raise ValueError(f"{kind!r} is no kind of value")
    return _READERS[kind](value[kind], stored)


def _tensor(given: Any, stored: Mapping[str, Tensor]) -> Tensor:
    dtype, shape, data = DTYPES[given[0]], tuple(given[1]), bytearray(base64.b64decode(given[2], validate=True))
    if any(type(n) is not int or n < 0 for n in shape) or nbytes(dtype, shape) != len(data):
        raise ValueError(f"{len(data)} bytes are no tensor of shape {shape}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape).clone() if data else torch.empty(shape, dtype=dtype)


def _array(given: Any, stored: Mapping[str, Tensor]) -> Any:
    dtype, data = np.dtype(str(given[0])), base64.b64decode(given[2], validate=True)
    if dtype.kind not in ARRAYS:
        raise ValueError(f"{given[0]!r} is no kind of array")
    found = np.frombuffer(data, dtype=dtype).reshape(tuple(given[1])).copy()
    return found if found.shape else found[()]


def _dict(given: Any, stored: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {_decode(k, stored): _decode(v, stored) for k, v in given}


_READERS: Mapping[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$float": lambda given, stored: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[given],
    "$tuple": lambda given, stored: tuple(_decode(v, stored) for v in given),
    "$set": lambda given, stored: {_decode(v, stored) for v in given},
    "$dict": _dict,
    "$counter": lambda given, stored: Counter(_dict(given, stored)),
    "$tensor": _tensor,
    "$stored": lambda given, stored: stored[given],
    "$array": _array,
    "$bytes": lambda given, stored: base64.b64decode(given, validate=True),
    "$dtype": lambda given, stored: DTYPES[given],
    "$device": lambda given, stored: torch.device(given),
}
