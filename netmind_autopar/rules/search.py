"""Candidate letters of an op, found by running one small call of it on pieces.

Every operand is seen as its *parts* (a dim, or the factors of a dim that is opened up). A letter is a set of parts, at most
one of each operand, that are cut together: each output is then joined along one of its parts, or is the sum, maximum or minimum of
what the pieces gave. Which parts could belong together is read off by changing one slice of an input and looking where
outputs change; parts that reach no part of an output may be reduced. What comes out of here is a guess: `discover.py` proves it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .algebra import Rule, Term
from .call import Call
from .prove import difference, put_tensors
from .sketch import ALPHABET
from .small import tensors_of

Parts = tuple[tuple[int, ...], ...]  # of one operand: per dim the sizes of its parts, major first
REDUCE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
MAX_SETS = 256  # sets of parts tried for one reduction


@dataclass(frozen=True)
class Letter:
    """`ins`: input number → part. `outs`: per output a part to join along, a reduction's name, or None when it is no tensor.

    added: inputs that must be Partial when the letter is split. ints: integer arguments that follow its local size.
    """

    size: int
    ins: Mapping[int, int]
    outs: tuple[int | str | None, ...]
    added: frozenset[int] = frozenset()
    ints: tuple[str, ...] = ()

    @property
    def reduce(self) -> str:
        """What it is reduced with, "" when every output has it."""
        return next((o for o in self.outs if isinstance(o, str)), "")


@dataclass
class Search:
    """One small call with real tensors. `opened`: how dims of some sizes fall into parts. `ints`: integer arguments that may follow
    a size, `shape`: list arguments that are the shape of output 0."""

    call: Call
    opened: Mapping[int, tuple[int, ...]]
    ints: Mapping[str, int] = field(default_factory=dict)
    shape: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._affine: dict[int, bool] = {}
        self.whole = tensors_of(self.call.outputs)
        self.ins: list[Parts] = [self._open(t) for t in self.call.tensors]
        self.outs: list[Parts | None] = [None if t is None else self._open(t) for t in self.whole]

    def _open(self, t: torch.Tensor) -> Parts:
        return tuple(self.opened.get(int(n), (int(n),)) for n in t.shape)

    def letters(self) -> list[Letter]:
        """Letters that passed one cut each; those of outputs first, then reductions. No part is in two of them."""
        found: list[Letter] = []
        for members, ints in self._followers():
            if letter := self._fit(members, ints):
                found = self._with(found, letter)
        for members in self._reductions(found):
            if any(i < len(self.ins) and p in self._taken(found, i) for i, p in members.items()):
                continue
            for ints in self._int_choices(self._size(members)):
                if letter := self._fit(members, ints):
                    found = self._with(found, letter)
                    break
        return found

    def worth(self, letters: Sequence[Letter]) -> tuple[int, int]:
        """How many dims of operands some letter splits, and into how many pieces all letters could be cut."""
        places = {(i, p) for x in letters for i, p in x.ins.items()}
        places |= {(~j, q) for x in letters for j, q in enumerate(x.outs) if isinstance(q, int)}
        operands = [*enumerate(self.ins), *((~j, parts) for j, parts in enumerate(self.outs) if parts is not None)]
        covered = sum(any((i, p) in places for p in numbers) for i, parts in operands for numbers in _numbers(parts))
        return covered, math.prod(x.size for x in letters)

    def _with(self, found: list[Letter], new: Letter) -> list[Letter]:
        clash = any(
            any(i in old.ins and old.ins[i] == p for i, p in new.ins.items())
            or any(isinstance(a, int) and a == b for a, b in zip(old.outs, new.outs, strict=True))
            or set(old.ints) & set(new.ints)
            for old in found
        )
        return found if clash else [*found, new]

    @staticmethod
    def _taken(found: Iterable[Letter], i: int) -> set[int]:
        return {letter.ins[i] for letter in found if i in letter.ins}

    def _size(self, members: Mapping[int, int]) -> int:
        return next(flat(self.ins[i])[p] for i, p in members.items())

    def _int_choices(self, size: int) -> Iterator[tuple[str, ...]]:
        """No integer argument follows the letter, all that could, each alone."""
        names = tuple(name for name, n in self.ints.items() if n == size)
        yield ()
        if names:
            yield names
        if len(names) > 1:
            yield from ((name,) for name in names)

    def _followers(self) -> Iterator[tuple[dict[int, int], tuple[str, ...]]]:
        """Per part of an output the input parts whose slices reach the same slice of it alone, one of each input."""
        for j, parts in enumerate(self.outs):
            for q, n in enumerate(flat(parts or ())):
                if n < 2:
                    continue
                options = [[p for p in range(len(flat(ins))) if (j, q) in self.reach[i, p]] for i, ins in enumerate(self.ins)]
                silent = [i for i, ins in enumerate(self.ins) if not options[i] and n in flat(ins) and not self.loud[i]]
                for i in silent:  # no change of it is ever seen: it may follow, or not
                    options[i] = [p for p, size in enumerate(flat(self.ins[i])) if size == n]
                for choice in itertools.islice(_picks(options, silent), 32):
                    for ints in self._int_choices(n):
                        if choice or ints or self.shape:
                            yield choice, ints

    def _reductions(self, found: list[Letter]) -> Iterator[dict[int, int]]:
        """Sets of parts of equal size, at most one of each input, that no letter has; small sets first."""
        free = [[(p, n) for p, n in enumerate(flat(parts)) if n > 1 and p not in self._taken(found, i)] for i, parts in enumerate(self.ins)]
        for size in dict.fromkeys(n for parts in free for _, n in parts):
            options = [[None, *(p for p, n in parts if n == size)] for parts in free]
            sets = itertools.islice(itertools.product(*options), 4096)
            members = [{i: p for i, p in enumerate(chosen) if p is not None} for chosen in sets]
            yield from sorted((m for m in members if m), key=len)[:MAX_SETS]

    @functools.cached_property
    def reach(self) -> dict[tuple[int, int], set[tuple[int, int]]]:
        """(input, part) → the (output, part)s of which a slice changes only where the input's slice was changed."""
        out: dict[tuple[int, int], set[tuple[int, int]]] = {}
        self.loud = [False] * len(self.ins)
        for i, parts in enumerate(self.ins):
            for p, n in enumerate(flat(parts)):
                out[i, p] = self._reach_of(i, p, n) if n > 1 else set()
        return out

    def _reach_of(self, i: int, p: int, n: int) -> set[tuple[int, int]]:
        left: dict[int, set[int]] = {}  # per output that changed at all
        for t in sorted({0, n // 2, n - 1}):
            changed = self._run({i: self._disturbed(i, p, t)}) or []
            for j, (new, old) in enumerate(zip(changed, self.whole, strict=False)):
                if new is None or old is None or new.shape != old.shape:
                    continue
                differs = ((new != old) & ~((new != new) & (old != old))).reshape(flat(self.outs[j] or ()))
                if bool(differs.any()):
                    self.loud[i] = True
                    here = {q for q, m in enumerate(differs.shape) if m == n and _only(differs, q, t)}
                    left[j] = left.get(j, here) & here
        return {(j, q) for j, parts in left.items() for q in parts}

    def _disturbed(self, i: int, p: int, t: int) -> torch.Tensor:
        """Input i with slice t of part p moved by an irregular amount."""
        x = self.call.tensors[i].clone()
        piece = x.view(flat(self.ins[i])).narrow(p, t, 1)
        if x.dtype == torch.bool:
            piece.logical_not_()
        elif x.dtype.is_floating_point or x.dtype.is_complex:
            wave = torch.arange(piece.numel(), device="cpu").to(x.real.dtype if x.dtype.is_complex else x.dtype)
            piece.add_((wave * 0.37 + 0.71).sin().reshape(piece.shape).to(x.dtype))
        else:
            top = int(x.max())
            piece.copy_((piece + 1) % (top + 1))
        return x

    def _run(self, new: Mapping[int, torch.Tensor], ints: Mapping[str, int] | None = None, shape: Sequence[int] | None = None):
        """The op with some tensors and arguments replaced; None when it refuses."""
        call = self.call
        args, kwargs = put_tensors(call.args, call.kwargs, [new.get(i, t) for i, t in enumerate(call.tensors)])
        values: dict[str, object] = {**(ints or {}), **({name: list(shape) for name in self.shape} if shape is not None else {})}
        for name, value in values.items():
            place = call.place(name)
            if isinstance(place, int):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs[place] = value
        try:
            return tensors_of(call.target(*args, **kwargs))
        except RuntimeError:
            return None

    def _fit(self, members: Mapping[int, int], ints: tuple[str, ...]) -> Letter | None:
        """The letter of these parts, if one uneven cut of the call can be put together again."""
        size = self._size(members) if members else next((self.ints[name] for name in ints), 0)
        if not members and not ints:  # a letter that only the shape argument has
            size = next((n for n in flat(self.outs[0] or ()) if n > 1), 0)
        if size < 2:
            return None
        at = (size + 2) // 2 if size > 2 else 1
        added: tuple[frozenset[int], ...] = (frozenset(),)
        where = [q for q, n in enumerate(flat(self.outs[0] or ())) if n == size] if self.shape else []
        for target in (*where, None):  # the part of the shape argument that follows
            results = [self._piece(members, ints, lo, hi, target, {}) for lo, hi in ((0, at), (at, size))]
            if any(r is None for r in results):
                continue
            outs = self._joined(results, size)
            if outs is None:
                added = self._added_choices(members)
            if outs is not None:
                return Letter(size, dict(members), outs, frozenset(), ints)
            for some in added:
                halves = self._decomposed(some)
                results = [self._piece(members, ints, lo, hi, target, h) for (lo, hi), h in zip(((0, at), (at, size)), halves, strict=True)]
                if all(r is not None for r in results) and (outs := self._joined(results, size)):
                    return Letter(size, dict(members), outs, some, ints)
        return None

    def _added_choices(self, members: Mapping[int, int]) -> tuple[frozenset[int], ...]:
        """Inputs that may be added terms: the op is affine in them."""
        some = [i for i in range(len(self.ins)) if i not in members and self.affine(i)]
        return tuple(dict.fromkeys([*(frozenset([i]) for i in some), frozenset(some)] if some else []))

    def _piece(self, members, ints, lo: int, hi: int, target: int | None, new: Mapping[int, torch.Tensor]):
        tensors = dict(new)
        for i, p in members.items():
            tensors[i] = cut(new.get(i, self.call.tensors[i]), self.ins[i], p, lo, hi)
        shape = None
        if self.shape and self.outs[0] is not None:
            shape = local(self.outs[0], target, hi - lo) if target is not None else [math.prod(d) for d in self.outs[0]]
        return self._run(tensors, dict.fromkeys(ints, hi - lo), shape)

    def _decomposed(self, some: Iterable[int]) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        generator = torch.Generator().manual_seed(5)
        first = {i: torch.randn(self.call.tensors[i].shape, generator=generator, dtype=self.call.tensors[i].dtype) for i in some}
        return first, {i: self.call.tensors[i] - t for i, t in first.items()}

    def _joined(self, results: Sequence[list[torch.Tensor | None]], size: int) -> tuple[int | str | None, ...] | None:
        """How each output comes out of the pieces' outputs; None when one does not, or when reductions differ."""
        options: list[list[int | str | None]] = []
        for j, (expected, parts) in enumerate(zip(self.whole, self.outs, strict=True)):
            a, b = results[0][j], results[1][j]
            if expected is None or parts is None:
                options.append([None])
                continue
            assert a is not None and b is not None
            joined = {q: _concat(a, b, parts, q) for q, n in enumerate(flat(parts)) if n == size}
            ways: list[int | str | None] = [q for q, x in joined.items() if x is not None and not difference(x, expected)]
            if not ways and a.shape == expected.shape and expected.dtype != torch.bool:
                ways = [name for name, combine in REDUCE.items() if _reducible(name, expected) and not difference(combine(a, b), expected)]
            options.append(ways)
        for reduce in REDUCE:
            chosen = [next((w for w in ways if not isinstance(w, str) or w == reduce), "") for ways in options]
            if "" not in chosen:
                return tuple(chosen)
        return None

    def affine(self, i: int) -> bool:
        """f(a + b) = f(a) + f(b) - f(0) in input i alone."""
        if i not in self._affine:
            self._affine[i] = self._additive([i], homogeneous=False)
        return self._affine[i]

    def linear(self, some: Sequence[int]) -> bool:
        """f(a + b) = f(a) + f(b) in these inputs together, at many scales, and element by element where one number is huge."""
        return all(self._additive(some, scale=s) for s in (1.0, 1e-8, 1e-3, 1e4, 1e9)) and self._additive(some, peak=1e12)

    def _additive(self, some: Sequence[int], *, scale: float = 1.0, homogeneous: bool = True, peak: float = 0.0) -> bool:
        floats = [*(self.call.tensors[i] for i in some), *(t for t in self.whole if t is not None)]
        if not all(t.dtype.is_floating_point or t.dtype.is_complex for t in floats):
            return False
        a, b = self._decomposed(some)
        for i in some if peak else ():
            b[i] = b[i].clone()
            b[i].view(-1)[-1] = peak
        terms = [{i: t * scale for i, t in part.items()} for part in (a, b, {i: a[i] + b[i] for i in some}, {i: 0 * a[i] for i in some})]
        results = [self._run(t) for t in terms]
        if any(r is None for r in results):
            return False
        for x, y, both, zero in zip(*results, strict=True):  # type: ignore[arg-type]
            if x is not None and difference(x + y - zero, both):
                return False
            if x is not None and peak and bool(((x + y - both).abs() > 1e-3 * (x.abs() + y.abs())).any()):
                return False
            if x is not None and homogeneous and bool((zero != 0).any()):
                return False
        return True


def _picks(options: Sequence[Sequence[int]], optional: Iterable[int]) -> Iterator[dict[int, int]]:
    """One part of each input that has any; inputs in `optional` may also stay whole."""
    loose = set(optional)
    lists = [[None, *ways] if i in loose or not ways else list(ways) for i, ways in enumerate(options)]
    for choice in itertools.product(*lists):
        yield {i: p for i, p in enumerate(choice) if p is not None}


def _numbers(parts: Parts) -> Iterator[range]:
    """Per dim the numbers of its parts."""
    at = 0
    for dim in parts:
        yield range(at, at + len(dim))
        at += len(dim)


def _only(mask: torch.Tensor, dim: int, t: int) -> bool:
    """True when nothing is set outside of slice t."""
    return not bool(mask.narrow(dim, 0, t).any()) and not bool(mask.narrow(dim, t + 1, mask.shape[dim] - t - 1).any())


def flat(parts: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(n for dim in parts for n in dim)


def local(parts: Parts, part: int, size: int) -> list[int]:
    """The shape of dims when one part has another size."""
    numbers = iter(range(len(flat(parts))))
    return [math.prod(size if next(numbers) == part else n for n in dim) for dim in parts]


def cut(x: torch.Tensor, parts: Parts, part: int, lo: int, hi: int) -> torch.Tensor:
    """The piece [lo, hi) of one part."""
    return x.reshape(flat(parts)).narrow(part, lo, hi - lo).reshape(local(parts, part, hi - lo)).contiguous()


def _concat(a: torch.Tensor, b: torch.Tensor, parts: Parts, part: int) -> torch.Tensor | None:
    """Two pieces joined along one part; None when their shapes are others."""
    size = flat(parts)[part]
    at = (size + 2) // 2 if size > 2 else 1
    pieces = []
    for t, n in ((a, at), (b, size - at)):
        if list(t.shape) != local(parts, part, n):
            return None
        pieces.append(t.reshape([n if q == part else m for q, m in enumerate(flat(parts))]))
    return torch.cat(pieces, part).reshape([math.prod(d) for d in parts])


def _reducible(name: str, t: torch.Tensor) -> bool:
    return name == "sum" or not t.dtype.is_complex


def rule_from(search: Search, letters: Sequence[Letter], marks: Sequence[str]) -> tuple[Rule, dict[int, str]]:
    """The rule of these letters with everything else fixed, and the name of each letter by its number."""
    names: dict[int, str] = {}
    sizes: dict[str, int] = {}
    fixed: set[str] = set()

    def named(n: int, letter: int | None) -> str:
        if letter is not None and letter in names:
            return names[letter]
        name = next(x for x in (*ALPHABET, *(f"x{k}" for k in range(len(sizes) + 1))) if x not in sizes)
        sizes[name] = n
        if letter is None:
            fixed.add(name)
        else:
            names[letter] = name
        return name

    def term(parts: Parts, owner: Mapping[int, int], mark: str) -> Term:
        at, dims = 0, []
        for dim in parts:
            letters_of = [(n, owner.get(at + k)) for k, n in enumerate(dim)]
            at += len(dim)
            if all(letter is None for _, letter in letters_of):  # opened for nothing
                letters_of = [(math.prod(dim), None)]
            dims.append(tuple(named(n, letter) for n, letter in letters_of if n > 1))
        return Term(tuple(dims), mark)

    of_input = [{x.ins[i]: k for k, x in enumerate(letters) if i in x.ins} for i in range(len(search.ins))]
    of_output = [{o: k for k, x in enumerate(letters) if isinstance(o := x.outs[j], int)} for j in range(len(search.outs))]
    ins = tuple(term(parts, of_input[i], marks[i]) for i, parts in enumerate(search.ins))
    outs = tuple(None if parts is None else term(parts, of_output[j], "") for j, parts in enumerate(search.outs))
    reduce = next((letter.reduce for letter in letters if letter.reduce), "sum")
    return Rule(ins, outs, sizes, frozenset(fixed), reduce), names
