"""What the rule of an op without a row depends on: the call, and the op's own source, so that an edited kernel is searched again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .call import Call

BUILT_IN = {"aten", "prims", "prim", "quantized", "profiler"}  # change with torch's version alone
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "triton", "netmind_autopar"}
MAX_MODULES = 300
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def call_key(call: Call) -> dict[str, Any]:
    """The call as JSON: op, schema, shapes and dtypes, all other arguments, the version of torch."""

    def show(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return [list(map(int, value.shape)), str(value.dtype)]
        if isinstance(value, (list, tuple)):
            return {"list": [show(v) for v in value]}
        return repr(value)

    return {
        "op": call.op,
        "schema": str(call.target._schema),
        "args": [show(a) for a in call.args],
        "kwargs": {k: show(v) for k, v in sorted(call.kwargs.items())},
        "results": [None if t is None else show(t) for t in call.outputs],
        "torch": torch.__version__,
    }


def source_digest(target: Any) -> str | None:
    """A digest of the Python code behind an op, "" for ops of torch itself; None when the code cannot be had.

    Hashed are the files of the kernel's module and of every module it can see that is the user's own, and the plain values
    that the kernels and the functions they call take from closures and module globals.
    """
    functions = kernels_of(target)
    if not functions:
        return "" if target.namespace in BUILT_IN else None
    digest = hashlib.sha256()
    for path in _files(functions):
        content = _content(path)
        if content is None:
            return None
        digest.update(content)
    for line in _values(functions):
        if line is None:
            return None
        digest.update(line.encode())
    return digest.hexdigest()[:24]


def kernels_of(target: Any) -> list[types.FunctionType]:
    """The Python functions that compute a `torch.library.custom_op`."""
    known = getattr(getattr(torch, "_library", None), "custom_ops", None)
    made = dict(getattr(known, "OPDEFS", {})).get(target._schema.name)
    given = [getattr(made, "_init_fn", None), *getattr(made, "_backend_fns", {}).values()] if made is not None else []
    return list({id(f): f for f in map(inspect.unwrap, filter(inspect.isfunction, given)) if _is_users(f)}.values())


def _is_users(function: types.FunctionType) -> bool:
    return function.__module__.split(".")[0] not in {"torch"}


def _files(functions: Iterable[types.FunctionType]) -> list[Path | None]:
    """Source files of the kernels' modules and of the user's modules these can see, in a fixed order; None for one without a file."""
    waiting = list(dict.fromkeys(f.__module__ for f in functions))
    roots = {name.split(".")[0] for name in waiting}
    found: dict[str, Path | None] = {name: None for name in waiting if name not in sys.modules}
    while waiting and len(found) < MAX_MODULES:
        name = waiting.pop(0)
        module = sys.modules.get(name)
        if name in found or module is None:
            continue
        path = getattr(module, "__file__", None)
        root = name.split(".")[0]
        if root not in roots and (root in FOREIGN or path is None or "site-packages" in path or "dist-packages" in path):
            continue
        found[name] = Path(path) if path else None
        for value in list(vars(module).values()):
            other = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(other, str) and other not in found:
                waiting.append(other)
    return [found[name] for name in sorted(found)]


def _content(path: Path | None) -> bytes | None:
    try:
        stat = path.stat()  # type: ignore[union-attr]
        return _hashed(str(path), stat.st_mtime_ns, stat.st_size)
    except (OSError, AttributeError):
        return None


@functools.lru_cache(maxsize=1024)
def _hashed(path: str, changed: int, size: int) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _values(functions: Iterable[types.FunctionType]) -> Iterator[str | None]:
    """Plain values that functions, and the user's functions they name, take from outside; None for a captured object that is not plain."""
    waiting, seen = list(functions), set()
    while waiting:
        function = waiting.pop(0)
        if id(function) in seen or len(seen) > MAX_MODULES:
            continue
        seen.add(id(function))
        cells = [(name, cell.cell_contents) for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)]
        names = [(name, function.__globals__[name]) for name in function.__code__.co_names if name in function.__globals__]
        for name, value in [*cells, *names, ("defaults", function.__defaults__)]:
            if inspect.isfunction(value):
                if value.__module__.split(".")[0] not in FOREIGN:
                    waiting.append(value)
            elif _is_simple(value):
                yield f"{function.__qualname__} {name}={value!r};"
            elif (name, value) in cells:
                yield None


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return isinstance(value, _SIMPLE)
