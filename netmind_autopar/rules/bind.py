"""Rules for a whole program, their letters refined where the program itself shows that a dim is a product.

A *cut* of a dim is a right stride at which it may be opened up: `(b s) e` with b = 8, s = 16 cuts its dim of 128 at 16. Cuts
are learnt where a rule groups letters (views, splits, attention), and flow along values and through rules: a letter shared by
dims carries the cuts of one to the others. The cuts of a dim form a chain, each dividing the next; one that does not fit is
dropped. Then a letter with cuts becomes several, major first: `m` → `m.0 m.1`.

Cuts stop where no split could pass either: at fixed letters, and at letters whose piece must be one run (`start:`).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.program import Program, Taken, is_getitem, op_name, source, taken_by
from .algebra import Rule, Term
from .table import TABLE, rule_for, signature

Cuts = tuple[int, ...]  # right strides inside a dim, ascending, each dividing the next
_Value = tuple[int, int]  # (node number, output index)
_Place = tuple[_Value, int]  # a dim of a value
_NONE: dict[str, Cuts] = {}


def bind_program(program: Program) -> dict[str, Rule]:
    """The refined rule of every `call_function` node except getitem, by node name."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and not is_getitem(n)]
    return bind_nodes(nodes, program.taken)


def unlisted(program: Program) -> list[fx.Node]:
    """One node per distinct call of an op that no table lists, in graph order."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and not is_getitem(n) and op_name(n) not in TABLE]
    return list({signature(n): n for n in reversed(nodes)}.values())[::-1]


def learnt_rules(program: Program) -> tuple[tuple[str, str], ...]:
    """(op, rule) of every op that no table lists and whose rule was found, or given by hand."""
    rules = [(op_name(node), rule_for(node)) for node in unlisted(program)]
    return tuple(dict.fromkeys((op, str(rule)) for op, rule in rules if rule.known))


def bind_nodes(nodes: Sequence[fx.Node], taken: Callable[[fx.Node], Taken] = taken_by) -> dict[str, Rule]:
    """As `bind_program`, for the nodes given (in graph order)."""
    cache: dict[tuple, Rule] = {}
    quick: dict[tuple, Rule] = {}  # nodes of repeated blocks share their fake tensors
    seen: dict[int, Any] = {}
    rules: list[Rule] = []
    takes: list[tuple[fx.Node, ...]] = []
    for node in nodes:
        given = taken(node)
        takes.append(given.nodes)
        key = (id(node.target), given.rest, id(node.meta["val"]), *[id(arg.meta["val"]) for arg in given.nodes])
        if key not in quick:
            facts = signature(node, seen)
            if facts not in cache:
                cache[facts] = rule_for(node)
            quick[key] = cache[facts]
        rules.append(quick[key])
    refined: dict[tuple[int, int], Rule] = {}
    out: dict[str, Rule] = {}
    cuts = _Flow(nodes, rules, takes).run()
    for node, rule, found in zip(nodes, rules, cuts, strict=True):
        pair = (id(rule), id(found))
        if pair not in refined:
            refined[pair] = refine(rule, found)
        out[node.name] = refined[pair]
    return out


@dataclass(frozen=True)
class _Row:
    """One dim of one term: which operand it is of, and its open letters with their strides and sizes."""

    slot: int  # input number, or ~output number
    dim: int
    letters: tuple[tuple[str, int, int], ...]  # (letter, stride, size), the letters through which cuts flow
    bounds: Cuts  # strides at the inner boundaries of the dim's letters


def _rows(rule: Rule) -> tuple[_Row, ...]:
    stiff = rule.fixed | rule.run_letters
    rows: list[_Row] = []
    slots = [*enumerate(rule.inputs), *((~i, t) for i, t in enumerate(rule.outputs) if t is not None)]
    for slot, term in slots:
        for d, dim in enumerate(term.dims):
            stride, letters, bounds = 1, [], []
            for letter in reversed(dim):
                size = rule.sizes[letter]
                if letter not in stiff and size > 1:
                    letters.append((letter, stride, size))
                stride *= max(size, 1)
                bounds.append(stride)
            if letters or len(dim) > 1:
                rows.append(_Row(slot, d, tuple(letters), tuple(sorted({b for b in bounds[:-1] if 1 < b < stride}))))
    return tuple(rows)


def _with(chain: Cuts, cut: int) -> Cuts:
    """The chain with one more cut, or as it was when they do not nest."""
    if cut in chain or any(cut % c and c % cut for c in chain):
        return chain
    return tuple(sorted((*chain, cut)))


class _Flow:
    """The fixed point: cuts per (value, dim) and per (node, letter), a queue of nodes to look at again."""

    def __init__(self, nodes: Sequence[fx.Node], rules: Sequence[Rule], takes: Sequence[tuple[fx.Node, ...]]) -> None:
        number: dict[fx.Node, int] = {node: i for i, node in enumerate(nodes)}
        rows = {id(rule): _rows(rule) for rule in {id(rule): rule for rule in rules}.values()}
        self.rows = [rows[id(rule)] for rule in rules]
        self.places: list[tuple[_Place, ...]] = []  # of each row of a node
        self.same: list[tuple[int, ...]] = []  # the first row with the same place, where a node takes a value twice
        self.users: dict[_Value, list[int]] = {}
        outside: dict[fx.Node, int] = {}
        for i, given in enumerate(takes):
            found: list[_Value] = []
            for arg in given:
                origin, index = source(arg)
                value = (number[origin] if origin in number else outside.setdefault(origin, ~len(outside)), index)
                found.append(value)
                self.users.setdefault(value, []).append(i)
            places = tuple([(found[row.slot] if row.slot >= 0 else (i, ~row.slot), row.dim) for row in self.rows[i]])
            self.places.append(places)
            self.same.append(tuple(map(places.index, places)) if len(set(places)) < len(places) else ())
        self.values: dict[_Place, Cuts] = {}
        self.letters: list[dict[str, Cuts]] = [_NONE for _ in nodes]  # never changed, only replaced, and shared
        self.met: dict[tuple, tuple[list[Cuts], dict[str, Cuts]]] = {}

    def run(self) -> list[dict[str, Cuts]]:
        queue = deque(range(len(self.rows)))
        waiting = set(queue)
        while queue:
            i = queue.popleft()
            waiting.discard(i)
            for touched in self._visit(i):
                if touched not in waiting:
                    waiting.add(touched)
                    queue.append(touched)
        return self.letters

    def _visit(self, i: int) -> list[int]:
        """Move cuts between the dims around one node until they agree; the nodes whose values changed."""
        rows, places, letters, same = self.rows[i], self.places[i], self.letters[i], self.same[i]
        before = [self.values.get(place, ()) for place in places]
        key = (id(rows), id(letters), same, *before)  # nodes of repeated blocks meet the same
        if key not in self.met:
            self.met[key] = _met(rows, before, letters, same)
        after, self.letters[i] = self.met[key]
        changed: list[int] = []
        for place, old, new in zip(places, before, after, strict=True):
            if new != old:
                self.values[place] = new
                value = place[0]
                changed += [*([value[0]] if value[0] >= 0 else []), *self.users.get(value, ())]
        return changed


def _met(rows: tuple[_Row, ...], before: list[Cuts], letters: dict[str, Cuts], same: tuple[int, ...]) -> tuple[list[Cuts], dict[str, Cuts]]:
    """The cuts of each row's dim and of the letters when the dims around one node have told each other theirs."""
    letters = dict(letters)
    for row, cuts in zip(rows, before, strict=True):
        for cut in cuts:
            for letter, stride, size in row.letters:
                inner, rest = divmod(cut, stride)
                if rest == 0 and 1 < inner < size and size % inner == 0:
                    letters[letter] = _with(letters.get(letter, ()), inner)
    after = list(before)
    for j, row in enumerate(rows):
        first = same[j] if same else j
        for cut in row.bounds:
            after[first] = _with(after[first], cut)
        for letter, stride, _ in row.letters:
            for cut in letters.get(letter, ()):
                after[first] = _with(after[first], cut * stride)
    return [after[j] for j in same] if same else after, letters


def refine(rule: Rule, cuts: dict[str, Cuts]) -> Rule:
    """The rule with every letter that has cuts replaced by several, major first."""
    return _refined(_Key(rule), tuple(sorted(cuts.items()))) if any(cuts.values()) else rule


class _Key:
    """A rule as a dictionary key, by identity."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __hash__(self) -> int:
        return id(self.rule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.rule is self.rule


@functools.lru_cache(maxsize=4096)
def _refined(key: _Key, cuts: tuple[tuple[str, Cuts], ...]) -> Rule:
    rule, sizes, pieces = key.rule, {}, {}
    chains = dict(cuts)
    for letter, size in rule.sizes.items():
        edges = [size, *reversed(chains.get(letter, ())), 1]
        pieces[letter] = tuple(f"{letter}.{i}" for i in range(len(edges) - 1)) if len(edges) > 2 else (letter,)
        sizes.update(
            {name: high // low for name, high, low in zip(pieces[letter], edges, edges[1:], strict=False)}
            if len(edges) > 2
            else {letter: size}
        )

    def term(old: Term) -> Term:
        return Term(tuple(tuple(name for letter in dim for name in pieces[letter]) for dim in old.dims), old.mark)

    def what(old: str) -> str:
        if old.startswith("list:"):
            return "list:" + ";".join(what(w) for w in old[5:].split(";"))
        kind, colon, product = old.partition(":")
        return kind + colon + "*".join(name for word in product.split("*") for name in pieces.get(word, (word,)))

    return Rule(
        tuple(term(t) for t in rule.inputs),
        tuple(None if t is None else term(t) for t in rule.outputs),
        sizes,
        frozenset(name for letter in rule.fixed for name in pieces[letter]),
        rule.reduce,
        tuple((place, what(w)) for place, w in rule.adjust),
        rule.known,
    )
