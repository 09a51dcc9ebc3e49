"""A small pencil for rules that are computed from a call: letters with sizes, terms, and the finished Rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .algebra import Rule, Term, vanishes
from .call import Call

Dim = tuple[str, ...]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Sketch:
    """Collects letters for one call. A dim is a tuple of letters, major first; a dim of size 1 has none."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.sizes: dict[str, int] = {}
        self.fixed: set[str] = set()
        self.adjust: list[tuple[int | str, str]] = []

    def letter(self, size: int, *, fixed: bool = False, name: str = "") -> Dim:
        """A new letter as a dim of its own; no letter for size 1."""
        if size == 1:
            return ()
        if not name or name in self.sizes:
            used = len(self.sizes)
            name = next(n for n in (*ALPHABET[used:], *(f"x{i}" for i in range(used + 1))) if n not in self.sizes)
        self.sizes[name] = int(size)
        if fixed:
            self.fixed.add(name)
        return (name,)

    def dims(self, shape: Sequence[int], fixed: Iterable[int] = (), names: str = "") -> list[Dim]:
        """New letters for every dim of a shape; those at the positions `fixed` are never split."""
        still = {d % len(shape) for d in fixed} if shape else set()
        named = names.split() or [""] * len(shape)
        return [self.letter(n, fixed=i in still, name=named[i]) for i, n in enumerate(shape)]

    def follow(self, argument: str, what: str) -> None:
        """The argument follows the local shapes; see `Rule.adjust`."""
        self.adjust.append((self.call.place(argument), what))

    def rule(
        self, inputs: Sequence[Sequence[Dim]], outputs: Sequence[Sequence[Dim] | None], marks: str | Sequence[str] = "", reduce: str = "sum"
    ) -> Rule:
        """The finished rule. `marks` is one mark for all inputs or a list with one each ("_": none)."""
        each = [marks] * len(inputs) if isinstance(marks, str) else list(marks)
        terms = [Term(tuple(dims), _mark(mark)) for dims, mark in zip(inputs, each, strict=True)]
        outs = tuple(None if dims is None else Term(tuple(dims)) for dims in outputs)
        return linear_checked(self.call, Rule(tuple(terms), outs, dict(self.sizes), frozenset(self.fixed), reduce, tuple(self.adjust)))


def _mark(mark: str) -> str:
    return mark if mark in ("+", "*") else ""


def linear_checked(call: Call, rule: Rule) -> Rule:
    """Marks in their one normal form: none where numbers are not floating point (terms of a bool or a rounded number do not
    add up), and '+' instead of '*' for a sole input. A letter that needed such a mark is then fixed."""
    marks, fixed = [t.mark for t in rule.inputs], rule.fixed
    if not any(marks):
        return rule
    marked = [t for t, m in zip(call.tensors, marks, strict=True) if m]
    if not all(t.dtype.is_floating_point or t.dtype.is_complex for t in (*marked, *(o for o in call.outputs if o is not None))):
        added = [t for t in rule.inputs if t.mark == "+"]
        fixed |= {x for x in rule.sizes if vanishes(rule, x) and any(t.find(x) is None for t in added)}
        marks = [""] * len(marks)
    elif marks == ["*"]:
        marks = ["+"]
    inputs = tuple(Term(t.dims, m) for t, m in zip(rule.inputs, marks, strict=True))
    return replace(rule, inputs=inputs, fixed=fixed)


def aligned(shape: Sequence[int], full: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The dims of an operand that is broadcast, right-aligned, to a result of dims `full` and shape `sizes`."""
    skip = len(full) - len(shape)
    return [full[skip + i] if n == sizes[skip + i] else () for i, n in enumerate(shape)]
