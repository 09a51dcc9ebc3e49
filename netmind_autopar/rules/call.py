"""One call of an op, as the rules see it: arguments by name, shapes of tensors in and out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.program import op_name, values


@dataclass(frozen=True)
class Call:
    """`args` and `kwargs` as written, tensors (fake or real, global shapes) in place of nodes; `outputs`: what it returns."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[torch.Tensor | None, ...]

    @property
    def op(self) -> str:
        return str(self.target) if isinstance(self.target, torch._ops.OpOverload) else getattr(self.target, "__name__", str(self.target))

    @functools.cached_property
    def _bound(self) -> dict[str, Any]:
        return bound_arguments(self.target, self.args, self.kwargs)

    def __getitem__(self, name: str) -> Any:
        """The argument of this name, its default when it is not given."""
        return self._bound[name]

    def place(self, name: str) -> int | str:
        """Where the argument stands in the call: a position, or its keyword."""
        if name not in self.kwargs:
            for i, argument in enumerate(self.target._schema.arguments[: len(self.args)]):
                if argument.name == name:
                    return i
        return name

    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tensor arguments in the order of `ir.program.tensor_args`."""
        return tuple(tensors_in((self.args, dict(self.kwargs))))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(t.shape) for t in self.tensors]

    @property
    def results(self) -> list[tuple[int, ...] | None]:
        return [None if t is None else tuple(t.shape) for t in self.outputs]


def bound_arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the op's schema, defaults filled in."""
    out: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(args):
            out[argument.name] = args[i]
        elif argument.name in kwargs:
            out[argument.name] = kwargs[argument.name]
        else:
            out[argument.name] = argument.default_value if argument.has_default_value() else None
    return out


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def call_of(node: fx.Node) -> Call:
    """The call that a graph node makes."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    return Call(node.target, tuple(args), dict(kwargs), values(node))


def signature(node: fx.Node, seen: dict[int, Any] | None = None) -> tuple[Any, ...]:
    """What a rule depends on: op, shapes and dtypes of tensors, all other arguments. Hashable.

    seen: one dictionary for all nodes of a program, so that each of its tensors is looked at once.
    """
    seen = {} if seen is None else seen
    return (op_name(node), _frozen(node.args, seen), _frozen(node.kwargs, seen), _frozen(node.meta["val"], seen))


def _frozen(value: Any, seen: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is int or kind is bool or kind is float or kind is str:
        return (kind.__name__, value)
    if kind is fx.Node:
        value = value.meta["val"]
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, torch.Tensor):
        out = seen[id(value)] = (tuple(value.shape), value.dtype)
        return out
    if isinstance(value, (list, tuple)):
        return tuple([_frozen(v, seen) for v in value])
    if isinstance(value, Mapping):
        return tuple([(k, _frozen(v, seen)) for k, v in value.items()])
    return (kind.__name__, value) if isinstance(value, (bool, int, float, str)) else str(value)
