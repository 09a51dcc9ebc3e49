"""Run a model once on fake tensors, forward and backward, and write down every op: cheap, and enough to see what repeats.

Nothing is compiled or traced: the functions that the model calls, then the ops that eager mode runs for them, with what they take.
The model's own code decides what happens with each block, so that a loop that treats one of them differently is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import clone, torch_private
from .period import NoPeriod, Step
from .signature import Call, Selection, flatten

Split = Callable[[str], tuple[str, int | None]]  # a name without its block's number, and the number

_LARGE = 1 << 16  # elements; the values of larger constants are not looked at


@dataclass
class Rehearsal:
    """The steps; where each block begins and where backward begins; kept outputs as (path, step, position in its result)."""

    selection: Selection
    steps: list[Step] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    backward: int = 0
    leaves: list[tuple[str, int, int]] = field(default_factory=list)
    tangents: list[str] = field(default_factory=list)


def rehearse(model: nn.Module, path: str, call: Call, selection: Selection, split: Split, mode: Any) -> Rehearsal:
    """`model` is fake and used up; `path` names its list of blocks, which must be called one after the other, in order."""
    out = Rehearsal(selection)
    book = _Book(out.steps, split)
    ends: list[int] = []
    for i, block in enumerate(model.get_submodule(path).children()):
        block.register_forward_pre_hook(lambda *_, i=i: _enter(out, ends, i))
        block.register_forward_hook(lambda *_, i=i: ends.append(i))
    tensors = [clone.fake_like(tensor, mode) for _, tensor in call.leaves]
    for (name, _), tensor in zip(call.leaves, tensors, strict=True):
        book.name(tensor, f"input {name}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        book.name(tensor, name)
    args, kwargs = call.arguments(list(tensors))
    with mode, torch_private.recorder(book.record), _Calls(book):
        result = model(*args, **kwargs)
    kept = selection.take(result)
    every = [tensor for _, tensor in flatten(result)[1]]
    out.backward = len(out.steps)
    for path_, i in zip(selection.paths, selection.kept, strict=True):
        out.leaves.append((path_, *book.made_by(every[i])))
    carrying = [(name, t) for name, t in zip(selection.paths, kept, strict=True) if t.requires_grad]
    out.tangents = [name for name, _ in carrying]
    wanted = [t for t in (*model.parameters(), *tensors) if t.requires_grad]
    if not carrying:
        return out
    with mode:
        ones = [torch.ones_like(t) for _, t in carrying]
    for (name, _), one in zip(carrying, ones, strict=True):
        book.name(one, f"tangent {name}")
    with mode, torch_private.recorder(book.record):
        torch.autograd.grad([t for _, t in carrying], wanted, ones, allow_unused=True)
    return out


def _enter(out: Rehearsal, ends: list[int], number: int) -> None:
    if number != len(out.starts) or len(ends) != number:
        raise NoPeriod("the blocks are not called one after the other")
    out.starts.append(len(out.steps))


class _Book:
    """Knows each tensor by the step that made it last."""

    def __init__(self, steps: list[Step], split: Split) -> None:
        self.steps, self.split = steps, split
        self.names: dict[int, tuple[str, int | None]] = {}
        self.made: dict[int, tuple[int, int]] = {}
        self.alive: list[Any] = []

    def name(self, tensor: torch.Tensor, name: str) -> None:
        self.names[id(tensor)] = self.split(name)
        self.alive.append(tensor)

    def made_by(self, tensor: torch.Tensor) -> tuple[int, int]:
        if id(tensor) not in self.made:
            raise NoPeriod("an output that no op made")
        return self.made[id(tensor)]

    def record(self, op: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        refs: list[int] = []
        blocks: list[int] = []
        content = (op, self._plain(args, refs, blocks), self._plain(kwargs, refs, blocks))
        results = result if isinstance(result, (tuple, list)) else (result,)
        facts = tuple((tuple(r.shape), r.dtype, r.stride()) if isinstance(r, torch.Tensor) else frozen(r) for r in results)
        for i, r in enumerate(results):
            if isinstance(r, torch.Tensor):
                self.made[id(r)] = (len(self.steps), i)
                self.alive.append(r)
            elif isinstance(r, (tuple, list)):
                raise NoPeriod(f"{op} returns tensors within tensors")
        self.steps.append(Step((content, facts, torch.is_grad_enabled()), tuple(refs), tuple(blocks)))

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """A function of torch's public interface, before it falls apart into ops: without its tensors, which the ops show."""
        name = getattr(function, "__name__", "")
        if name not in ("__get__", "__set__"):  # shape, dtype and the like
            self.steps.append(Step(("call", name, _constants(args), _constants(kwargs))))

    def _plain(self, value: Any, refs: list[int], blocks: list[int]) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(self._plain(v, refs, blocks) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._plain(v, refs, blocks)) for k, v in sorted(value.items()))
        if not isinstance(value, torch.Tensor):
            return frozen(value)
        if id(value) in self.made:
            step, position = self.made[id(value)]
            refs.append(step)
            return ("made", position)
        if id(value) in self.names:
            name, block = self.names[id(value)]
            blocks += [] if block is None else [block]
            return ("named", name, block is not None)
        return ("value", digest(torch_private.constant(value)))


class _Calls(TorchFunctionMode):
    def __init__(self, book: _Book) -> None:
        super().__init__()
        self.book = book

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.book.call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _constants(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_constants(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _constants(v)) for k, v in sorted(value.items()))
    return "tensor" if isinstance(value, torch.Tensor) else frozen(value)


def digest(tensor: torch.Tensor | None) -> Any:
    """A constant by dtype, shape and values; NoPeriod when it has none that can be looked at."""
    if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() > _LARGE:
        raise NoPeriod("a tensor of unknown origin")
    with torch_private.no_modes():
        return (tensor.dtype, tuple(tensor.shape), hashlib.sha256(repr(tensor.detach().tolist()).encode()).hexdigest())


def frozen(value: Any) -> Any:
    """An argument as something that compares by type and value: 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(frozen(v) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, frozen(v)) for k, v in sorted(value.items())))
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, str(value)) if not isinstance(value, (int, str)) else (type(value).__name__, value)
