"""The sharding algebra: one line says every way in which an op can be split.

    mm         "m k, k n -> m n"       a letter is a dim that can be split; one that vanishes leaves the output Partial
    addmm      "+n, m k, k n -> m n"   '+': an added term; it must be Partial when the output is and it lacks the letter
    t          "+a b -> b a"           every input '+': the op is linear, Partial inputs give Partial outputs
    mul        "*a, a -> a"            '*': linear in this input alone, the others whole: Partial in, Partial out
    _softmax   "a b! -> a b!"          '!': never split
    view       "+b s d -> (b s) d"     a group: both letters of a flattened dim can be split
    amax       "a b -> a ; max"        reduced with max instead of sum
    ones       " -> a b"               a letter that only an output has: every device makes its own piece
    layer_norm "b d!, d!, d! -> b d!, b 1, b 1"    1: a dim of size one;  _: an operand that is no tensor

A *strategy* is one symbol per mesh axis: a letter, "-" (nothing is split), "+" (Partial flows through), or "*0", "*1" …
(Partial flows through that input). Placements, local shapes and collectives follow from it; nothing else is ever said about
an op's parallelism.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..ir.spec import Partial, Placement, Replicate, Shard, Spec, cuts, is_valid

NONE = "-"
LINEAR = "+"


@dataclass(frozen=True)
class Term:
    """One operand: per tensor dim the letters that make it up, major first (no letter: a dim of size 1)."""

    dims: tuple[tuple[str, ...], ...]
    mark: str = ""  # "", "+" or "*"

    def find(self, letter: str) -> Shard | None:
        for d, letters in enumerate(self.dims):
            if letter in letters:
                return Shard(d, letters.index(letter))
        return None

    def __str__(self) -> str:
        def dim(letters: tuple[str, ...]) -> str:
            return letters[0] if len(letters) == 1 else f"({' '.join(letters)})" if letters else "1"

        return self.mark + " ".join(dim(d) for d in self.dims)


@dataclass(frozen=True)
class Rule:
    """A pattern bound to one call: every letter has a size.

    inputs:  one Term per tensor argument, in the order of `ir.program.tensor_args`.
    outputs: one Term per output; None for an output that is switched off or is no tensor.
    fixed:   letters that are never split.
    reduce:  what a vanished letter is reduced with.
    adjust:  how the call's non-tensor arguments follow the local shapes: pairs (argument position or keyword, what), where
             what is "shape", "parts", "starts" or "lengths" (of the local output 0), "size:a*b*3" (local sizes of letters and
             numbers, multiplied), "start:a*3" (where the local piece of a letter begins, times a number) or "list:size:a;start:b"
             (a list, element by element).
    """

    inputs: tuple[Term, ...]
    outputs: tuple[Term | None, ...]
    sizes: Mapping[str, int]
    fixed: frozenset[str] = frozenset()
    reduce: str = "sum"
    adjust: tuple[tuple[int | str, str], ...] = ()
    known: bool = True  # False: there was no rule for this op; it runs whole on every device
    why: str = ""  # of an unknown one: why none was found

    @functools.cached_property
    def letters(self) -> tuple[str, ...]:
        """Letters that can be split, in order of appearance."""
        terms = [*self.inputs, *(t for t in self.outputs if t)]
        seen = dict.fromkeys(letter for t in terms for dim in t.dims for letter in dim)
        return tuple(letter for letter in seen if letter not in self.fixed and self.sizes[letter] > 1)

    @functools.cached_property
    def run_letters(self) -> frozenset[str]:
        """Letters whose local piece must be one run of the dim: an argument says where it begins."""
        whats = (what for _, adjusted in self.adjust for what in adjusted.removeprefix("list:").split(";"))
        return frozenset(x for what in whats if what.startswith("start:") for x in what[6:].split("*")) & frozenset(self.sizes)

    @functools.cached_property
    def symbols(self) -> tuple[str, ...]:
        """Every choice one mesh axis has for this op."""
        flows: list[str] = []
        if self.reduce == "sum" and self.inputs and all(t.mark == "+" for t in self.inputs):
            flows.append(LINEAR)
        flows += [f"*{i}" for i, t in enumerate(self.inputs) if t.mark == "*"]
        return (NONE, *self.letters, *flows)

    def __str__(self) -> str:
        left = ", ".join(str(t) for t in self.inputs)
        right = ", ".join("_" if t is None else str(t) for t in self.outputs)
        text = f"{left} -> {right}"
        for letter in sorted(self.fixed, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.]){re.escape(letter)}(?![\w.!])", letter + "!", text)
        return text + (f" ; {self.reduce}" if self.reduce != "sum" else "")


Strategy = tuple[str, ...]


def _input_placement(rule: Rule, i: int, symbol: str) -> Placement:
    term = rule.inputs[i]
    if symbol == NONE:
        return Replicate()
    if symbol == LINEAR:
        return Partial("sum")
    if symbol.startswith("*"):
        return Partial("sum") if int(symbol[1:]) == i else Replicate()
    if found := term.find(symbol):
        return found
    if term.mark == "+" and vanishes(rule, symbol):
        return Partial("sum")
    return Replicate()


def _output_placement(rule: Rule, i: int, symbol: str) -> Placement:
    term = rule.outputs[i]
    if symbol == NONE or term is None:
        return Replicate()
    if symbol == LINEAR or symbol.startswith("*"):
        return Partial("sum")
    return term.find(symbol) or Partial(rule.reduce)


def vanishes(rule: Rule, letter: str) -> bool:
    """True when some output lacks the letter, so that splitting it leaves that output Partial."""
    return any(t is not None and t.find(letter) is None for t in rule.outputs)


def input_placements(rule: Rule, i: int) -> tuple[Placement, ...]:
    """What each symbol of the rule means for input i."""
    return tuple(_input_placement(rule, i, symbol) for symbol in rule.symbols)


def output_placements(rule: Rule, i: int) -> tuple[Placement, ...]:
    """What each symbol of the rule means for output i."""
    return tuple(_output_placement(rule, i, symbol) for symbol in rule.symbols)


def term_dims(rule: Rule, term: Term) -> tuple[tuple[int, ...], ...]:
    """The sizes of the parts of every dim."""
    return tuple(tuple(rule.sizes[letter] for letter in dim) or (1,) for dim in term.dims)


def term_spec(rule: Rule, term: Term, dtype: torch.dtype, placements: Sequence[Placement]) -> Spec:
    return Spec(term_dims(rule, term), dtype, tuple(placements))


def input_specs(rule: Rule, strategy: Strategy, dtypes: Sequence[torch.dtype]) -> tuple[Spec, ...]:
    """The Spec each tensor argument must have."""
    return tuple(
        term_spec(rule, term, dtype, [_input_placement(rule, i, s) for s in strategy])
        for i, (term, dtype) in enumerate(zip(rule.inputs, dtypes, strict=True))
    )


def output_specs(rule: Rule, strategy: Strategy, dtypes: Sequence[torch.dtype | None]) -> tuple[Spec | None, ...]:
    """The Spec each output then has; None for outputs that are no tensors."""
    return tuple(
        None if term is None or dtype is None else term_spec(rule, term, dtype, [_output_placement(rule, i, s) for s in strategy])
        for i, (term, dtype) in enumerate(zip(rule.outputs, dtypes, strict=True))
    )


def letter_spec(rule: Rule, strategy: Strategy) -> Spec:
    """All letters of the rule as one tensor, split as the strategy says: local sizes of letters are read off it."""
    letters = tuple(rule.sizes)
    where = {letter: Shard(0, i) for i, letter in enumerate(letters)}
    placements = [where.get(s, Replicate()) for s in strategy]
    return Spec((tuple(rule.sizes[letter] for letter in letters) or (1,),), torch.float32, tuple(placements))


def strategies(rule: Rule, sizes: tuple[int, ...]) -> tuple[Strategy, ...]:
    """Every strategy that leaves no device without elements, in a fixed order. An axis of size 1 splits nothing."""
    symbols = rule.symbols
    return tuple(tuple(symbols[c] for c in row) for row in strategy_codes(rule, sizes).tolist())


def strategy_codes(rule: Rule, sizes: tuple[int, ...]) -> np.ndarray:
    """`strategies` as positions in `rule.symbols`, of shape (strategies, axes). What is legal is what `is_legal` says."""
    symbols = rule.symbols
    counts = [len(symbols) if n > 1 else 1 for n in sizes]
    codes = np.indices(counts, dtype=np.int16).reshape(len(sizes), math.prod(counts)).T
    fine = np.ones(len(codes), dtype=bool)
    for position, symbol in enumerate(symbols):
        if symbol in rule.sizes:
            subset = ((codes == position) << np.arange(len(sizes))).sum(axis=1)
            fine &= np.array(cuts(rule.sizes[symbol], sizes)[1])[subset]
    if rule.reduce != "sum":
        vanishing, flowing = (
            np.array([s != NONE and test(s) for s in symbols]) for test in (lambda s: vanishes(rule, s), lambda s: s[0] in "+*")
        )
        fine &= ~(vanishing[codes].any(axis=1) & flowing[codes].any(axis=1))
    return codes[fine]


def is_legal(rule: Rule, strategy: Strategy, sizes: tuple[int, ...]) -> bool:
    """True when every symbol belongs to the rule, no device is left without elements and reductions can be combined."""
    if len(strategy) != len(sizes) or any(s not in rule.symbols for s in strategy):
        return False
    if rule.reduce != "sum" and any(s not in (NONE,) and vanishes(rule, s) for s in strategy) and any(s[0] in "+*" for s in strategy):
        return False
    return is_valid(letter_spec(rule, strategy), sizes)


_TOKEN = re.compile(r"\(|\)|\.\.\.|[A-Za-z_]\w*!?|1|[+*]")


def parse(pattern: str) -> tuple[tuple[Term, ...], tuple[Term | None, ...], frozenset[str], str]:
    """Read a pattern into (inputs, outputs, fixed letters, reduction). Raises ValueError on bad text."""
    body, _, reduce = pattern.partition(";")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise ValueError(f"no '->' in the rule {pattern!r}")
    fixed: set[str] = set()
    inputs = tuple(_term(t, fixed, pattern) for t in left.split(",")) if left.strip() else ()
    outputs = tuple(_term(t, fixed, pattern) for t in right.split(","))
    reduce = reduce.strip() or "sum"
    if reduce not in ("sum", "max", "min"):
        raise ValueError(f"unknown reduction {reduce!r} in the rule {pattern!r}")
    return tuple(t for t in inputs if t is not None), outputs, frozenset(fixed), reduce


def _term(text: str, fixed: set[str], pattern: str) -> Term | None:
    text = text.strip()
    if text == "_":
        return None
    mark = text[0] if text[:1] in ("+", "*") else ""
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    body = text[len(mark) :]
    if _TOKEN.sub("", body).strip():
        raise ValueError(f"cannot read {text!r} in the rule {pattern!r}")
    for token in _TOKEN.findall(body):
        if token == "(":
            group = []
        elif token == ")":
            dims.append(tuple(group or ()))
            group = None
        elif token == "1":
            dims.append(())
        else:
            letter = token.rstrip("!")
            if token.endswith("!"):
                fixed.add(letter)
            if group is None:
                dims.append((letter,))
            else:
                group.append(letter)
    return Term(tuple(dims), mark)


def bind(
    pattern: str,
    inputs: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int] | None],
    *,
    sizes: Mapping[str, int] | None = None,
    adjust: tuple[tuple[int | str, str], ...] = (),
) -> Rule:
    """A Rule from a pattern and the shapes of one call.

    `...` stands for as many dims as the shapes have, broadcast in all terms. `sizes` gives what shapes cannot tell: the
    letters of groups, all but one of each. Raises ValueError when pattern and shapes disagree.
    """
    ins, outs, fixed, reduce = parse(pattern)
    if not ins and len(inputs) == 1:
        ins = (Term(()),)  # nothing before the arrow: no input, or one without dims
    shapes = [*inputs, *outputs]
    terms: list[Term | None] = [*ins, *outs]
    if len(terms) != len(shapes):
        raise ValueError(f"the rule {pattern!r} has {len(ins)} inputs and {len(outs)} outputs, the call {len(inputs)} and {len(outputs)}")
    terms = _expanded(terms, shapes, pattern)
    known = dict(sizes or {})
    dims: list[tuple[tuple[str, ...], int]] = []
    for term, shape in zip(terms, shapes, strict=True):
        if term is None or shape is None:
            continue
        if len(term.dims) != len(shape):
            raise ValueError(f"the rule {pattern!r} does not fit the shape {tuple(shape)}")
        dims += [(dim, int(n)) for dim, n in zip(term.dims, shape, strict=True)]
    order = dict.fromkeys(letter for dim, _ in dims for letter in dim)
    _learn(dims, known, pattern)
    return Rule(
        tuple(t for t in terms[: len(ins)] if t), tuple(terms[len(ins) :]), {k: known[k] for k in order}, fixed & set(order), reduce, adjust
    )


def _expanded(terms: Sequence[Term | None], shapes: Sequence[Sequence[int] | None], pattern: str) -> list[Term | None]:
    """The terms with letters d0, d1, … for `...`, right-aligned; a dim of size 1 that others have larger gets none."""
    spans: list[tuple[int, ...] | None] = []
    for term, shape in zip(terms, shapes, strict=True):
        at = term.dims.index(("...",)) if term is not None and ("...",) in term.dims else -1
        found = None if at < 0 or shape is None or term is None else tuple(shape[at : at + len(shape) - len(term.dims) + 1])
        spans.append(found)
    try:
        lead = torch.broadcast_shapes(*(s for s in spans if s is not None))
    except RuntimeError:
        raise ValueError(f"dims of the rule {pattern!r} cannot be broadcast: {spans}") from None
    out: list[Term | None] = []
    for term, shape, span in zip(terms, shapes, spans, strict=True):
        if term is None or shape is None:
            out.append(None)
        elif span is None:
            out.append(term)
        else:
            at, skip = term.dims.index(("...",)), len(lead) - len(span)
            extra = tuple((f"d{skip + i}",) if n == lead[skip + i] else () for i, n in enumerate(span))
            out.append(Term(term.dims[:at] + extra + term.dims[at + 1 :], term.mark))
    return out


def _learn(dims: Sequence[tuple[tuple[str, ...], int]], known: dict[str, int], pattern: str) -> None:
    """Sizes of letters from the sizes of dims: first the letters that stand alone, then what is left over in groups."""
    waiting, before = list(dims), -1
    while waiting and len(waiting) != before:
        before, rest = len(waiting), []
        for dim, n in waiting:
            unknown = {letter for letter in dim if letter not in known}
            product = math.prod(known[letter] for letter in dim if letter in known)
            if len(unknown) == 1 and product and n % product == 0:
                known[unknown.pop()] = n // product
            elif unknown or product != n:
                rest.append((dim, n))
        waiting = rest
    for dim, n in waiting:
        raise ValueError(f"the dim ({' '.join(dim)}) of the rule {pattern!r} does not fit the size {n}")
