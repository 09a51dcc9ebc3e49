"""The rule of an op that no table lists, found by running it: guessed on a small call, proven on others.

A guess (`search.py`) is kept only as far as `prove.py` finds it exact: on two small sets of sizes, one that 2 and 3 devices share evenly
and one that they do not, for every kind of numbers in `small.KINDS`, on meshes (2), (3) and (2, 2); then on larger sizes; then with
each letter as long as it is in the program. A letter or a mark that fails once is dropped. Whatever is left out is whole on every
device, which is always right.

The search is a function of the call alone: seeds are fixed, nothing depends on time but giving up.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .algebra import LINEAR, NONE, Rule, Term, bind, strategies, vanishes
from .call import Call
from .prove import Failure, prove
from .search import Letter, Search, rule_from
from .small import EVEN, KINDS, LARGER, ODD, Guarded, Maker, NotFound, alike, elements, integers_of, makers, resized, sizes_of, tensors_of

FEW = ("normal", "spike")
SMALL_ELEMENTS, TRUE_ELEMENTS, TRUE_SIZE = 1 << 17, 1 << 18, 1 << 16
MAX_OPERANDS = 24


@dataclass(frozen=True)
class Found:
    """What a search gave. `pattern`: a rule of `algebra.py`, "" when there is none; `why` then says why.

    sizes: letters that no dim has to itself, with their size. adjust: (argument name, what), as in `Rule.adjust`.
    lasting: it is the op's doing, so it may be remembered. draws: the op draws random numbers.
    """

    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    adjust: tuple[tuple[str, str], ...] = ()
    why: str = ""
    lasting: bool = True
    draws: bool = False

    def rule(self, call: Call, small: dict[int, int] | None = None) -> Rule:
        """Bound to one call. Raises ValueError when they do not fit."""
        sizes = {name: (small or {}).get(n, n) for name, n in self.sizes}
        adjust = tuple((call.place(name), what) for name, what in self.adjust)
        return bind(self.pattern, call.shapes, call.results, sizes=sizes, adjust=adjust)


def discover(call: Call) -> Found:
    """The rule of one call (fake tensors, the program's sizes). Never raises: what cannot be found is said in `why`."""
    try:
        with _aside():
            return _discover(call)
    except NotFound as reason:
        return Found(why=reason.why, lasting=reason.lasting, draws=reason.draws)
    except FAILURES as error:
        return Found(why=f"it fails on small calls: {_first_line(error)}", lasting=False)


def confirmed(found: Found, call: Call) -> bool:
    """A quick second look at a rule that was found earlier, by an op that may have changed since."""
    trials = [(ODD, ("twins", "spike"), (3,)), (EVEN, ("negative",), (2,))]
    try:
        with _aside():
            bench = Bench(call)
            return not any(_failures(bench, found, [(bench.maker(pool), kinds, (mesh,)) for pool, kinds, mesh in trials]))
    except (NotFound, *FAILURES):
        return False


def counterexample(found: Found, call: Call) -> tuple[str, bool]:
    """Why a rule given by hand is refused, "" when it is not; False when that is no counterexample: no trial could be run."""
    try:
        with _aside():
            bench = Bench(call, found)
            first = next(iter(_failures(bench, found, _trials(bench))), None)
            return (f"{first[1]}, for shapes {', '.join(map(str, first[0].shapes))}", True) if first else ("", True)
    except NotFound as reason:
        return reason.why, False
    except FAILURES as error:
        return f"it fails on small calls: {_first_line(error)}", False


FAILURES = (RuntimeError, ValueError, IndexError, TypeError)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """No autograd, the CPU as default device, and the random state as it was afterwards."""
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        yield


def _failures(bench: Bench, found: Found, trials: Iterable[Trial]) -> Iterator[tuple[Call, Failure]]:
    for small, kinds, meshes in trials:
        for kind in kinds:
            if (call := bench.real(small, kind)) is not None:
                for mesh in meshes:
                    for failure in bench.failing(found.rule(call, small), call, mesh, kind):
                        yield call, failure


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Bench:
    """Small calls of one op: the first way of choosing sizes, and the widest floating-point numbers, that the op accepts."""

    def __init__(self, call: Call, found: Found | None = None) -> None:
        """found: a rule that the small calls must fit."""
        self.call, self.op, self.found = call, Guarded(call.target), found
        if not call.tensors or len(call.tensors) + len(call.outputs) > MAX_OPERANDS or any(0 in s for s in call.shapes):
            raise NotFound("a call without tensors, with very many, or with empty ones")
        self.maker, self.dtype, self.first = self._choose()

    def _choose(self) -> tuple[Maker, torch.dtype | None, Call]:
        why = "no small sizes were found for it"
        for maker, dtype, kind in itertools.product(makers(self.call), (torch.float64, torch.float32, None), ("normal", "positive")):
            small = maker(EVEN)
            if elements(self.call, small) > SMALL_ELEMENTS:
                continue
            try:
                first = resized(self.call, small, kind, 0, dtype, self.op)
            except RuntimeError as error:
                why = f"it does not run on small CPU tensors: {_first_line(error)}"
                continue
            same_form = [None if t is None else t.dim() for t in first.outputs] == [
                None if t is None else t.dim() for t in self.call.outputs
            ]
            if not same_form:
                why = "its fake (register_fake) gives other outputs than the op itself"
            elif self.found is not None and not _fits(self.found, first, small):
                why = "its rule does not fit small calls"
            elif dtype != torch.float64 or not _is_single(first):
                return maker, dtype, first
        raise NotFound(why, lasting=False)

    def real(self, small: dict[int, int], kind: str) -> Call | None:
        """The call with real tensors, None when the op refuses such numbers or sizes."""
        try:
            return resized(self.call, small, kind, 11 + KINDS.index(kind), self.dtype, self.op)
        except RuntimeError:
            return None

    def failing(self, rule: Rule, call: Call, mesh: tuple[int, ...], kind: str) -> list[Failure]:
        """Strategies of the rule that are not exact for this call. Infinite numbers times random terms need not add up."""
        tried = [s for s in strategies(rule, mesh) if any(x != NONE for x in s)]
        if kind == "infinite":
            tried = [s for s in tried if not any(x[0] == "*" for x in s)]
        return prove(rule, call, mesh, tried, closely=len(mesh) == 1)


def _fits(found: Found, call: Call, small: dict[int, int]) -> bool:
    try:
        return bool(found.rule(call, small))
    except ValueError:
        return False


def _ranks(call: Call) -> list[int | None]:
    return [None if t is None else t.dim() for t in call.outputs]


def _is_single(call: Call) -> bool:
    """True when an op that is given double precision computes in single."""
    outs = [t for t in call.outputs if t is not None and t.dtype == torch.float64]
    return bool(outs) and any(bool((t != t.round()).any()) for t in outs) and all(bool((t.float().double() == t).all()) for t in outs)


def _discover(call: Call) -> Found:
    bench = Bench(call)
    small = bench.maker(EVEN)
    search, letters, openings = _best_search(bench, small)
    guess = _guess(search, letters, openings)
    if not guess.rule(bench.first, small).symbols[1:]:
        raise NotFound("no split of it gives the same numbers")
    found = _proven(bench, guess)
    if not alike(tensors_of(bench.op(*bench.first.args, **bench.first.kwargs)), bench.first.outputs):
        raise NotFound("two runs on the same arguments differ")
    if len(found.rule(call).symbols) == 1:
        raise NotFound("no split of it gives the same numbers in all trials")
    return found


@dataclass(frozen=True)
class Opened:
    """How dims of one small size fall into two factors: `true` is the true size of the factor at `place`, 0 major, 1 minor."""

    parts: tuple[int, int]
    true: int
    place: int


Openings = dict[int, Opened]  # by small size


def _best_search(bench: Bench, small: dict[int, int]) -> tuple[Search, list[Letter], Openings]:
    """The search that splits most dims: with plain dims, then with dims opened up, where that lets one more dim be split."""
    call = bench.call
    ints = {name: small[v] for name, v in integers_of(call).items() if v in small}
    shape = tuple(a.name for a in call.target._schema.arguments if _is_shape(call, call[a.name]))

    def run(openings: Openings) -> tuple[tuple[int, int], Search, list[Letter], Openings]:
        search = Search(bench.first, {n: o.parts for n, o in openings.items()}, ints, shape)
        letters = search.letters()
        return search.worth(letters), search, letters, openings

    best = run({})
    for true, place in itertools.product(dict.fromkeys([*integers_of(call).values(), *sizes_of(call)]), (0, 1)):
        more = best[3] | _openings(bench, small, true, place)
        if more != best[3] and (other := run(more))[0] > best[0]:
            for n in more.keys() - best[3].keys():  # those that are needed
                less = {k: v for k, v in other[3].items() if k != n}
                other = again if (again := run(less))[0] >= other[0] else other
            best = other
    return best[1:]


def _is_shape(call: Call, value: object) -> bool:
    """True for a list argument that is the shape of output 0."""
    return isinstance(value, (list, tuple)) and bool(value) and bool(call.results) and [*value] == [*(call.results[0] or ())]


def _openings(bench: Bench, small: dict[int, int], true: int, place: int) -> Openings:
    """Every small size that the small form of `true` divides, where the true sizes divide too."""
    n = small.get(true, true)
    fits = {m for t, m in _dims(bench) if 1 < true < t and t % true == 0 and 1 < n < m and m % n == 0}
    return {m: Opened((n, m // n) if place == 0 else (m // n, n), true, place) for m in sorted(fits)}


def _dims(bench: Bench) -> list[tuple[int, int]]:
    """(true size, small size) of every dim of every operand."""
    true = [*bench.call.tensors, *bench.call.outputs]
    real = [*bench.first.tensors, *bench.first.outputs]
    return list(dict.fromkeys((int(n), int(m)) for a, b in zip(true, real, strict=True) if a is not None and b is not None
                              for n, m in zip(a.shape, b.shape, strict=True)))  # fmt: skip


def _guess(search: Search, letters: list[Letter], openings: Openings) -> Found:
    """Letters that agree on reductions and added terms, and marks of linear inputs."""
    reduce = max(("sum", "max", "min"), key=lambda r: sum(x.reduce == r for x in letters))
    letters = [x for x in letters if x.reduce in ("", reduce)]
    plus = frozenset(i for x in letters for i in x.added)
    letters = [x for x in letters if not x.reduce or x.added == plus - x.ins.keys()]
    count = len(search.ins)
    marks = ["+" if i in plus else "" for i in range(count)]
    if search.linear(range(count)):
        marks = ["+"] * count
    elif count > 1:
        marks = [m or ("*" if search.linear([i]) else "") for i, m in enumerate(marks)]
    rule, names = rule_from(search, letters, marks)
    sizes: dict[str, int] = {}
    for dim in (d for t in (*rule.inputs, *rule.outputs) if t is not None for d in t.dims if len(d) == 2):
        opened = openings[math.prod(rule.sizes[x] for x in dim)]
        sizes.setdefault(dim[opened.place], opened.true)
    adjust = [(name, f"size:{names[k]}") for k, x in enumerate(letters) for name in x.ints] + [(name, "shape") for name in search.shape]
    return Found(str(rule), tuple(sizes.items()), tuple(adjust))


Trial = tuple[dict[int, int], Sequence[str], Sequence[tuple[int, ...]]]  # sizes, kinds of numbers, meshes


def _trials(bench: Bench) -> Iterator[Trial]:
    """Small sizes, kinds of numbers and meshes that a rule must stand."""
    call = bench.call
    for pool, mesh, other in ((EVEN, (2,), (3,)), (ODD, (3,), (2,))):
        yield bench.maker(pool), KINDS, (mesh,)
        yield bench.maker(pool), FEW, (other,)
        yield bench.maker(pool), FEW[:1], ((2, 2),)
    larger = bench.maker(LARGER)
    if elements(call, larger) <= TRUE_ELEMENTS:
        yield larger, FEW, ((2,),)
    small, true = bench.maker(EVEN), {n: n for n in sizes_of(call)}
    if elements(call, true) <= TRUE_ELEMENTS:
        yield true, FEW[:1], ((2,),)
        return
    for size in true:
        one = {**small, size: size}
        if small.get(size) != size and size <= TRUE_SIZE and elements(call, one) <= TRUE_ELEMENTS:
            yield one, FEW[:1], ((2,),)


def _proven(bench: Bench, found: Found) -> Found:
    """What is left of a guess after all trials."""
    for small, kinds, meshes in _trials(bench):
        for kind in kinds:
            call = bench.real(small, kind)
            for mesh in meshes if call is not None else ():
                assert call is not None
                rule = found.rule(call, small)
                if failing := bench.failing(rule, call, mesh, kind):
                    found = replace(found, pattern=str(_without(rule, [f.strategy for f in failing])))
    return found


def _without(rule: Rule, failing: Sequence[Sequence[str]]) -> Rule:
    """The rule without the symbols that failing strategies have in common, those that fail alone first."""
    left = [set(s) - {NONE} for s in failing]
    while left:
        alone = {x for s in left if len(s) == 1 for x in s}
        symbol = max(alone or {x for s in left for x in s}, key=lambda x: (sum(x in s for s in left), rule.symbols.index(x)))
        rule = _dropped(rule, symbol)
        left = [s for s in left if s <= set(rule.symbols)]
    return rule


def _dropped(rule: Rule, symbol: str) -> Rule:
    """The rule without one symbol. Without "+" the letters that need added terms go too."""
    if symbol.startswith("*"):
        return replace(rule, inputs=tuple(Term(t.dims, "" if f"*{i}" == symbol else t.mark) for i, t in enumerate(rule.inputs)))
    if symbol != LINEAR:
        return replace(rule, fixed=rule.fixed | {symbol})
    needing = {x for x in rule.letters if vanishes(rule, x) and any(t.find(x) is None for t in rule.inputs)}
    return replace(rule, inputs=tuple(Term(t.dims) for t in rule.inputs), fixed=rule.fixed | needing)
