"""Patterns of ops: what to look for in a forward graph, written as the expression that it computes.

    Tensor_("x")              any tensor; a name that stands twice is the same tensor twice
    Number("eps")             a number among a call's arguments
    Call("rsqrt", p, …)       a call of aten::rsqrt whose first tensors are p, …; every argument that is not named has its default
    Cast(p)                   p, or p converted to another floating dtype
    Either(p, q)              one of them
    Named("sum", p)           p, whose value is known by a name
    Item(p, 0)                the first of p's results
    Shared(p)                 p, which something else may read too: a view, or a conversion of what goes in

A pattern is matched from its last op backwards. Sums and products are tried in both orders. What changes nothing (a conversion to the
dtype that is there, a dropout of nothing, a division by one, an alias) is looked through wherever it stands.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

COMMUTE = frozenset({"aten::add", "aten::mul"})
IGNORED = frozenset({"cudnn_enable", "cudnn_enabled", "memory_format", "layout", "device", "pin_memory", "non_blocking", "copy"})
CASTS = frozenset({"aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half", "aten::bfloat16", "aten::double"})
_SAME = frozenset({"aten::alias", "aten::lift_fresh", "aten::contiguous", "aten::clone"})


@dataclass(frozen=True)
class Found:
    """What a match has bound so far. named: name → node, or None for an argument left out.

    inside: the nodes that it computes with; shared: those of `Shared`.
    """

    named: Mapping[str, Any] = field(default_factory=dict)
    inside: frozenset[fx.Node] = frozenset()
    shared: frozenset[fx.Node] = frozenset()

    def bound(self, name: str, value: Any) -> Found | None:
        if name in self.named:
            have = self.named[name]
            alike = have is value if isinstance(value, fx.Node) or isinstance(have, fx.Node) else have == value
            return self if alike else None
        return replace(self, named={**self.named, name: value})

    def having(self, node: fx.Node) -> Found:
        return replace(self, inside=self.inside | {node})


class Pattern:
    """`match(value, found)` gives every way in which a value of the graph is this expression."""

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        raise NotImplementedError


@dataclass(frozen=True)
class Tensor_(Pattern):
    """Any tensor. optional: or None. raw: exactly the node that is there, not what it is a copy of."""

    name: str
    optional: bool = False

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        if value is None and self.optional:
            new = found.bound(self.name, None)
        elif isinstance(value, fx.Node):
            new = found.bound(self.name, below(value))
        else:
            new = None
        if new is not None:
            yield new


@dataclass(frozen=True)
class Number(Pattern):
    """A number (or text, list, None) among the arguments."""

    name: str

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        new = None if isinstance(value, fx.Node) else found.bound(self.name, value)
        if new is not None:
            yield new


@dataclass(frozen=True)
class Cast(Pattern):
    inner: Pattern

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        yield from self.inner.match(value, found)
        node = below(value)
        if isinstance(node, fx.Node) and is_cast(node):
            leaf = isinstance(self.inner, Tensor_)
            having = replace(found, shared=found.shared | {node}) if leaf else found.having(node)
            yield from Cast(self.inner).match(node.args[0], having)


@dataclass(frozen=True)
class Either(Pattern):
    choices: tuple[Pattern, ...]

    def __init__(self, *choices: Pattern) -> None:
        object.__setattr__(self, "choices", choices)

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        for choice in self.choices:
            yield from choice.match(value, found)


@dataclass(frozen=True)
class Named(Pattern):
    name: str
    inner: Pattern

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        node = below(value)
        for one in self.inner.match(node, found):
            new = one.bound(self.name, node)
            if new is not None:
                yield new


@dataclass(frozen=True)
class Shared(Pattern):
    inner: Pattern

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        for one in self.inner.match(value, found):
            yield replace(one, inside=found.inside, shared=one.shared | (one.inside - found.inside))


@dataclass(frozen=True)
class Item(Pattern):
    inner: Pattern
    index: int

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        node = below(value)
        if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == self.index:
            yield from self.inner.match(node.args[0], found.having(node))


@dataclass(frozen=True)
class Call(Pattern):
    """A call of the op `name` (the namespace aten, unless it says another). rest: arguments by name, patterns or what they must equal."""

    name: str
    args: tuple[Any, ...]
    rest: Mapping[str, Any]

    def __init__(self, name: str, *args: Any, **rest: Any) -> None:
        object.__setattr__(self, "name", name if "::" in name else f"aten::{name}")
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "rest", rest)

    def match(self, value: Any, found: Found) -> Iterator[Found]:
        node = below(value)
        if not isinstance(node, fx.Node) or op_of(node) != self.name:
            return
        given = arguments(node)
        names = list(given)
        orders = [self.args]
        if self.name in COMMUTE and len(self.args) == 2:
            orders.append(self.args[::-1])
        for order in orders:
            wanted = {**dict(zip(names, order, strict=False)), **self.rest}
            if all(name in wanted or name in IGNORED or given[name] == default(node, name) for name in names) and set(wanted) <= set(names):
                yield from _all([(wanted[n], given[n]) for n in names if n in wanted], found.having(node))


def _all(pairs: list[tuple[Any, Any]], found: Found) -> Iterator[Found]:
    if not pairs:
        yield found
        return
    (wanted, value), *rest = pairs
    if isinstance(wanted, Pattern):
        for one in wanted.match(value, found):
            yield from _all(rest, one)
    elif isinstance(wanted, (list, tuple)) and any(isinstance(w, Pattern) for w in wanted):
        if isinstance(value, (list, tuple)) and len(value) == len(wanted):
            yield from _all([*zip(wanted, value, strict=True), *rest], found)
    elif not isinstance(value, fx.Node) and _equal(wanted, value):
        yield from _all(rest, found)


def _equal(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(wanted) == list(value)
    return bool(wanted == value) and (wanted is None) == (value is None)


# ---- nodes --------------------------------------------------------------------------------------------------------------------


def op_of(node: fx.Node) -> str:
    """`aten::add` of any of its overloads; "" for what is no op."""
    return node.target._schema.name if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) else ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an op by the names of its schema, defaults filled in."""
    out = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        have = node.args[i] if i < len(node.args) and not argument.kwarg_only else node.kwargs.get(argument.name, _NONE)
        out[argument.name] = argument.default_value if have is _NONE else have
    return out


_NONE = object()


def default(node: fx.Node, name: str) -> Any:
    """An argument's default; for one that has none, something that nothing equals."""
    argument = next(a for a in node.target._schema.arguments if a.name == name)  # type: ignore[union-attr]
    return argument.default_value if argument.has_default_value() else _NONE


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node gives, fake; None for several or none."""
    found = node.meta.get("val")
    return found if isinstance(found, torch.Tensor) else None


def is_cast(node: fx.Node) -> bool:
    """A conversion between floating dtypes that changes nothing else."""
    if op_of(node) not in CASTS or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    was, now = value_of(node.args[0]), value_of(node)
    return was is not None and now is not None and was.dtype.is_floating_point and now.dtype.is_floating_point and was.device == now.device


def changes_nothing(node: fx.Node) -> bool:
    """The node gives its first argument again: same numbers, shape and dtype, and a gradient that passes as it is."""
    name = op_of(node)
    if not name or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    was, now = value_of(node.args[0]), value_of(node)
    if was is None or now is None or was.dtype != now.dtype or was.shape != now.shape:
        return False
    if name in _SAME or name in CASTS:
        return True
    given = arguments(node)
    if name == "aten::dropout":
        return given["p"] == 0 or not given["train"]
    return (
        name in ("aten::mul", "aten::div")
        and not isinstance(given["other"], fx.Node)
        and given["other"] == 1
        and "rounding_mode" not in given
    )


def below(value: Any) -> Any:
    """What lies under nodes that change nothing."""
    while isinstance(value, fx.Node) and changes_nothing(value):
        value = value.args[0]
    return value
