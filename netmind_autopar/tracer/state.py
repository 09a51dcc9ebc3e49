"""State that a model keeps in Python from one call to the next, which a graph does not have: found, and refused where it matters.

Attributes that forward changes are harmless as long as it does not compute with them: a second trace, of the model as the first
one left it, must give the same program. A tensor kept without looking at any input or parameter is a cache: it is computed again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..ir.errors import CaptureError
from ..ir.program import Program
from .hash import graph_hash
from .masks import constant_value
from .origin import is_foreign, line_in, line_of

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_HIDDEN = ("_parameters", "_buffers", "_modules")


class Rebound:
    """Buffers that forward replaces, `self.queue = torch.cat(...)`: the new value is written into the old tensor, as a graph can."""

    def __init__(self, model: nn.Module) -> None:
        self.before = [
            (path, module, name, tensor) for path, module in model.named_modules() for name, tensor in vars(module)["_buffers"].items()
        ]

    def settle(self) -> None:
        """To be called after forward, while it is traced. Raises CaptureError for a new value that does not fit the old tensor."""
        for path, module, name, old in self.before:
            new = module._buffers.get(name)
            if new is old:
                continue
            if old is None or new is None or new.shape != old.shape or new.dtype != old.dtype:
                was, now = ("None" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (old, new))
                raise CaptureError(
                    f"forward replaces the buffer {f'{path}.{name}'.lstrip('.')} by one of another form",
                    where=line_of(type(module).forward, f".{name}"),
                    why=f"it was {was} and becomes {now}: the next call would be another program",
                    try_="a buffer of fixed shape and dtype, such as a ring that is full from the start",
                )
            with torch.no_grad():
                old.copy_(new.detach())
            module._buffers[name] = old


class Watch:
    """The plain attributes of every module of `model` before and after a trace."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._attributes()
        self.names = self._tensors()
        self.after: dict[tuple[str, str], Any] | None = None
        self.caches: set[str] = set()

    def _attributes(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """(module, attribute) -> (a picture of the value, the value itself)."""
        return {
            (path, key): (_picture(value, ()), value)
            for path, module in self.model.named_modules()
            for key, value in vars(module).items()
            if key not in _HIDDEN and not key.startswith("_forward") and not key.startswith("_backward")
        }

    def _tensors(self) -> list[str]:
        return [name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())]

    def _line(self, path: str, key: str) -> str:
        """The line of the module's forward that names the attribute, or where forward begins."""
        return line_of(type(self.model.get_submodule(path)).forward, f".{key}")

    def changed(self) -> list[tuple[str, str]]:
        now = self._attributes()
        return [key for key in {**self.before, **now} if self.before.get(key, (None,))[0] != now.get(key, (None,))[0]]

    def note(self) -> None:
        """To be called when forward has run for the first time: export, when it ends, puts attributes back by itself."""
        if self.after is not None:
            return
        self.after = {(path, key): vars(self.model.get_submodule(path)).get(key) for path, key in self.changed()}
        for (path, _), value in self.after.items():
            if isinstance(value, torch.Tensor) and constant_value(value) is not None:
                self.caches.add(path)

    def check(self, again: Callable[[], Program], program: Program) -> None:
        """CaptureError when the program depends on what changed. `again` traces the model as the first call left it."""
        if made := [name for name in self._tensors() if name not in self.names]:
            raise CaptureError(
                f"forward makes the parameter or buffer {made[0]}",
                where=self._line(*made[0].rpartition(".")[::2]),
                why="it does not exist yet when the model is planned, and no optimizer knows it",
                try_="make it in __init__",
            )
        changed = [key for key in self.after or {} if key[0] not in self.caches]
        if not changed:
            return
        for (path, key), (_, value) in self.before.items():
            vars(self.model.get_submodule(path))[key] = value
        for path, key in changed:
            vars(self.model.get_submodule(path))[key] = (self.after or {})[path, key]
        path, key = changed[0]
        try:
            same = graph_hash(again()) == graph_hash(program)
        except Exception:
            same = False
        if not same:
            raise CaptureError(
                f"{f'{path}.{key}' if path else key} changes from call to call, and forward computes with it",
                where=self._line(path, key),
                why="a plain attribute is a constant of the graph; the second call would compute something else than the first",
                try_=f'keep it in a buffer, self.register_buffer("{key}", torch.zeros(...)), and update it with tensor operations',
            )


def _picture(value: Any, above: tuple[int, ...]) -> Any:
    """Something that is equal as long as nothing that forward could compute with has changed."""
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value if value == value else "nan")
    if id(value) in above or len(above) > 6:
        return "again"
    above += (id(value),)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = value if isinstance(value, (list, tuple)) else sorted(value, key=repr)
        return (type(value).__name__, tuple(_picture(v, above) for v in items))
    if isinstance(value, dict):
        return tuple((_picture(k, above), _picture(v, above)) for k, v in value.items())
    if isinstance(value, (torch.Tensor, nn.Module, type)) or callable(value):
        return id(value)
    return (id(value), _picture(dict(getattr(value, "__dict__", {})), above))


class Dice:
    """Notices when forward draws random numbers of Python's or numpy's."""

    def __init__(self) -> None:
        self.before = self._states()

    @staticmethod
    def _states() -> dict[str, Any]:
        numpy = sys.modules.get("numpy")
        found: dict[str, Any] = {"random": hash(random.getstate())}
        if numpy is not None:
            _, keys, *rest = numpy.random.get_state()
            found["numpy.random"] = (keys.tobytes(), *rest)
        return found

    def drawn(self) -> list[str]:
        return [name for name, state in self._states().items() if state != self.before.get(name, state)]

    def check(self, forward: Callable[[], Any]) -> None:
        """CaptureError when states have moved; `forward` is run again to find the line."""
        if drawn := self.drawn():
            raise CaptureError(
                f"forward draws random numbers from {drawn[0]}",
                where=_line_that_draws(forward),
                why="the number drawn while tracing would be the same in every step, and on one device only",
                try_="use torch's random functions, or draw outside of the model and pass the number as an input",
            )


def _line_that_draws(forward: Callable[[], Any]) -> str:
    """The line after which the states have moved on, found by going through `forward` line by line."""
    dice = Dice()
    found: list[str] = []
    last = [""]

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if not is_foreign(frame.f_code.co_filename) or found:
            return None
        if dice.drawn():
            found.append(last[0])
            return None
        last[0] = line_in(frame)
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        forward()
    except Exception:  # it has run once: whatever happens now is of no interest
        pass
    finally:
        sys.settrace(before)
    return found[0] if found else last[0] if dice.drawn() else ""
