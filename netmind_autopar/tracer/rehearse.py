"""Run a model once on fake tensors, and write down every op and what backward does: cheap, and enough to see what repeats.

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

from . import clone, gradients, torch_private
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


def rehearse(model: nn.Module, path: str, call: Call, selection: Selection, split: Split, mode: Any, memo: Memo) -> Rehearsal:
    """`model` is fake and used up; `path` names its list of blocks, which must be called one after the other, in order.

    `memo` belongs to `mode`. Rehearsals are compared with each other only if they share both.
    """
    out = Rehearsal(selection)
    book = _Book(out.steps, split, memo)
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
    with mode, torch_private.recorder(book.run), _Calls(book), torch_private.saving_hooks(book.interfere):
        result = model(*args, **kwargs)
    kept = selection.take(result)
    every = [tensor for _, tensor in flatten(result)[1]]
    out.backward = len(out.steps)
    for path_, i in zip(selection.paths, selection.kept, strict=True):
        out.leaves.append((path_, *book.made_by(every[i])))
    carrying = [(name, t) for name, t in zip(selection.paths, kept, strict=True) if t.requires_grad]
    out.tangents = [name for name, _ in carrying]
    if not carrying:
        return out
    roots = [t for _, t in carrying]
    nodes = gradients.reached(roots)
    if not book.interferes and gradients.is_plain(nodes):
        gradients.backward_steps(out.steps, book.times, roots, nodes, book.leaf)
        return out
    wanted = [t for t in (*model.parameters(), *tensors) if t.requires_grad]
    with mode:
        ones = [torch.ones_like(t) for _, t in carrying]
    for (name, _), one in zip(carrying, ones, strict=True):
        book.name(one, f"tangent {name}")
    with mode, torch_private.recorder(book.run):
        torch.autograd.grad(roots, wanted, ones, allow_unused=True)
    return out


def _enter(out: Rehearsal, ends: list[int], number: int) -> None:
    if number != len(out.starts) or len(ends) != number:
        raise NoPeriod("the blocks are not called one after the other")
    out.starts.append(len(out.steps))


class Memo:
    """What ops have returned, by op, arguments and the facts of tensors: each is worked out once for any number of blocks.

    Only for ops of torch's own that write nothing, and whose results hold no known values: asked again, they would make the same fakes.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple, int] = {}  # facts of a tensor -> a number for them
        self.made: dict[tuple, _Made] = {}
        self.repeatable: dict[Any, bool] = {}

    def facts(self, tensor: torch.Tensor) -> int:
        """Equal for tensors that are alike; -1 for those that are more than their facts."""
        if not torch_private.is_plain(tensor):
            return -1
        key = (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), tensor.dtype)
        return self.numbers.setdefault(key, len(self.numbers))

    def may_repeat(self, op: Any) -> bool:
        known = self.repeatable.get(op)
        if known is None:
            plain = isinstance(op, torch._ops.OpOverload) and op.namespace in ("aten", "prims") and not op._schema.is_mutable
            known = self.repeatable[op] = plain and not _VARYING & set(op.tags)
        return known

    def keep(self, key: tuple, given: list[torch.Tensor], result: Any) -> _Made | None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len({id(r) for r in (*given, *results)}) != len({id(t) for t in given}) + len(results) or not all(
            isinstance(r, torch.Tensor) and self.facts(r) >= 0 for r in results
        ):
            return None
        container = type(result) if isinstance(result, (tuple, list)) else None
        kinds = tuple((torch_private.Kin(r), self.facts(r)) for r in results)
        made = self.made[key] = _Made(container, kinds, len(self.made))
        return made


_VARYING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}


@dataclass(frozen=True)
class _Made:
    """The result of a call: (kin, facts) of each tensor, in a tuple or list or alone, and a number of its own."""

    container: Any
    kinds: tuple[tuple[torch_private.Kin, int], ...]
    number: int

    def again(self) -> Any:
        with torch_private.unseen():
            results = [kin.make() for kin, _ in self.kinds]
        return results[0] if self.container is None else self.container(results)


class _Book:
    """Runs ops, writes them down, and knows each tensor by the step that made it last."""

    def __init__(self, steps: list[Step], split: Split, memo: Memo) -> None:
        self.steps, self.split, self.memo = steps, split, memo
        self.names: dict[int, tuple[str, bool]] = {}
        self.blocks: dict[int, int] = {}
        self.made: dict[int, tuple[int, int]] = {}
        self.facts: dict[int, int] = {}
        self.alive: list[Any] = []
        self.times: list[int] = []  # how many nodes autograd had made at each step
        self.interferes = False  # Python takes part in backward

    def name(self, tensor: torch.Tensor, name: str) -> None:
        rest, block = self.split(name)
        self.names[id(tensor)] = (rest, block is not None)
        if block is not None:
            self.blocks[id(tensor)] = block
        self.alive.append(tensor)

    def made_by(self, tensor: torch.Tensor) -> tuple[int, int]:
        if id(tensor) not in self.made:
            raise NoPeriod("an output that no op made")
        return self.made[id(tensor)]

    def run(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of an op: of running it, or like that of the same call before."""
        given: list[torch.Tensor] = []
        form = (_form(args, given), _form(kwargs, given) if kwargs else ())
        key = self._key(op, form, given)
        origins, refs, blocks = self._origins(given)
        made = self.memo.made.get(key) if key is not None else None
        if made is not None:
            result = made.again()
        else:
            result = op(*args, **kwargs)
            made = self.memo.keep(key, given, result) if key is not None else None
        if made is not None:
            content: tuple = (made.number, origins)
            for r, (_, facts) in zip((result,) if made.container is None else result, made.kinds, strict=True):
                self.facts[id(r)] = facts
        else:
            content = (op, form, origins, _result_facts(op, result), torch.is_grad_enabled())
            for tensor in given:
                self.facts.pop(id(tensor), None)  # the op may have changed them
        self._note(content, refs, blocks, result)
        return result

    def _key(self, op: Any, form: tuple, given: list[torch.Tensor]) -> tuple | None:
        """What the facts of the result depend on; None when they may depend on more."""
        if not self.memo.may_repeat(op):
            return None
        numbers: list[int | bool] = []
        for tensor in given:
            number = self.facts.get(id(tensor))
            if number is None:
                if id(tensor) not in self.made and id(tensor) not in self.names:
                    return None
                number = self.facts[id(tensor)] = self.memo.facts(tensor)
            if number < 0:
                return None
            numbers += (number, tensor.requires_grad)
        return (id(op), form, tuple(numbers), torch.is_grad_enabled(), torch.get_default_dtype())

    def _origins(self, given: list[torch.Tensor]) -> tuple[tuple, tuple[int, ...], tuple[int, ...]]:
        """Where each tensor comes from: a position in a step's result, a name or a value; the steps, and the blocks, that are named."""
        origins: list[Any] = []
        refs: list[int] = []
        blocks: list[int] = []
        for tensor in given:
            known = id(tensor)
            if known in self.made:
                step, position = self.made[known]
                refs.append(step)
                origins.append(position)
            elif known in self.names:
                origins.append(self.names[known])
                if known in self.blocks:
                    blocks.append(self.blocks[known])
            else:
                origins.append(("value", digest(torch_private.constant(tensor))))
        return tuple(origins), tuple(refs), tuple(blocks)

    def _note(self, content: tuple, refs: tuple[int, ...], blocks: tuple[int, ...], result: Any) -> None:
        for i, r in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(r, torch.Tensor):
                self.made[id(r)] = (len(self.steps), i)
                self.alive.append(r)
        self.steps.append(Step(content, refs, blocks))
        self.times.append(torch_private.nodes_made())

    def interfere(self) -> None:
        self.interferes = True

    def leaf(self, tensor: torch.Tensor) -> tuple[str, int | None]:
        if id(tensor) not in self.names:
            raise NoPeriod("a gradient of something that has no name")
        return self.names[id(tensor)][0], self.blocks.get(id(tensor))

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """A function of torch's public interface, before it falls apart into ops: without its tensors, which the ops show."""
        name = getattr(function, "__name__", "")
        if name not in ("__get__", "__set__"):  # shape, dtype and the like
            self.steps.append(Step(("call", name, _form(args, []), _form(kwargs, []))))
            self.times.append(torch_private.nodes_made())
            self.interferes |= name in _HOOKS
        elif getattr(getattr(function, "__self__", None), "__name__", "") == "grad_fn":
            self.interferes = True


_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


def _result_facts(op: Any, result: Any) -> tuple:
    facts: list[Any] = []
    for r in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(r, (tuple, list)):
            raise NoPeriod(f"{op} returns tensors within tensors")
        facts.append((tuple(r.shape), r.dtype, r.stride()) if isinstance(r, torch.Tensor) else frozen(r))
    return tuple(facts)


class _Calls(TorchFunctionMode):
    def __init__(self, book: _Book) -> None:
        super().__init__()
        self.book = book

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.book.call(func, args, kwargs)
        return func(*args, **kwargs)


def digest(tensor: torch.Tensor | None) -> Any:
    """A constant by dtype, shape and values; NoPeriod when it has none that can be looked at."""
    if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() > _LARGE:
        raise NoPeriod("a tensor of unknown origin")
    with torch_private.no_modes():
        return (tensor.dtype, tuple(tensor.shape), hashlib.sha256(repr(tensor.detach().tolist()).encode()).hexdigest())


def frozen(value: Any) -> Any:
    """An argument as something that compares by type and value: 1, 1.0 and True differ, and 0.0 and -0.0."""
    return _form(value, [])


def _form(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The same; tensors are taken out, in order."""
    kind = type(value)
    if kind is int or kind is str or value is None:
        return value
    if kind is tuple or kind is list or isinstance(value, (tuple, list)):
        return (kind, *[_form(v, tensors) for v in value])
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return torch.Tensor
    if kind is float:
        return (kind, value.hex())
    if isinstance(value, dict):
        return (dict, *[(k, _form(v, tensors)) for k, v in sorted(value.items())])
    return (kind, value) if kind in _PLAIN else (kind, value if isinstance(value, str) else str(value))


_PLAIN = (bool, torch.dtype, torch.device, torch.layout, torch.memory_format)
