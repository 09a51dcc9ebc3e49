"""Cut the part of a program around its first difference out, as a `Case`: as little as still fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..ir.program import is_getitem, op_name, source, tensor_args
from ..ir.spec import Spec, parse_spec
from ..rules.algebra import Rule
from ..rules.bind import bind_program
from ..runtime import simulate
from ..runtime.collectives import BUCKETS, MOVES, sender, wait
from ..solver.solve import choices_to_strategies
from .case import Case, Given, Ref, Step, Wanted
from .locate import Difference, origin_of

if TYPE_CHECKING:
    from .check import Failure

DEPTHS = (1, 2, 4, 8, 16)


def cut_out(failure: Failure) -> Case | None:
    """The smallest of some regions around the first difference that fails by itself; None when none does."""
    cutter = _Cutter(failure)
    for case in cutter.regions():
        found = attempt(case)
        if found is not None:
            return case
    return None


def attempt(case: Case) -> Difference | None:
    """The difference of a case; None also for one that cannot be run."""
    try:
        return case.difference()
    except Exception:
        return None


class _Cutter:
    def __init__(self, failure: Failure) -> None:
        self.failure, self.found = failure, failure.difference
        self.program, self.lowered = failure.program, failure.lowered
        self.rules = bind_program(failure.base)
        self.strategies = choices_to_strategies(failure.base, self.rules, failure.plan)
        self.truth: dict[str, Any] = dict(failure.state)
        with torch.no_grad():
            simulate.reference(self.program, dict(failure.state), lambda node, value: self.truth.__setitem__(node.name, value))
        self.nodes = {n.name: n for n in self.program.graph.nodes}
        self.origin = self.nodes[self.found.origin]

    def regions(self) -> Iterator[Case]:
        """From the op alone to wide surroundings."""
        is_op = self.origin.op == "call_function"
        if is_op:
            yield self._case({self.origin}, [self._own(self.origin, self.found.index)])
        ends = [*self._conversions(), *self._ends()]
        if ends:
            yield self._case(set(), ends)
        if self._is_bucketed():
            yield self._bucket()
        takers = {u for u in self._takers(self.origin) if u.op == "call_function"}
        if takers:
            around = {self.origin} | takers if is_op else takers
            yield self._case(around, [self._own(t, i) for t in sorted(takers, key=lambda n: n.name) for i in self._indices(t)])
        for depth in DEPTHS if is_op else ():
            yield self._case(self._ancestors(depth), [self._own(self.origin, self.found.index), *ends])

    def _own(self, node: fx.Node, index: int) -> Wanted:
        return Wanted(node.name, index, str(self._spec(node, index)))

    def _spec(self, node: fx.Node, index: int) -> Spec:
        spec = self.lowered.specs.get(node.name) or self.lowered.specs[f"{node.name}_again"]  # one that runs in backward alone
        found = spec[index] if isinstance(spec, tuple) else spec
        assert found is not None
        return replace(found, dtype=self._value(node, index).dtype)

    def _value(self, node: fx.Node, index: int) -> Tensor:
        value = self.truth[node.name]
        return value[index] if isinstance(value, (tuple, list)) else value

    def _indices(self, node: fx.Node) -> list[int]:
        value = self.truth[node.name]
        return [i for i, v in enumerate(value) if isinstance(v, Tensor)] if isinstance(value, (tuple, list)) else [0]

    def _conversions(self) -> list[Wanted]:
        """The layouts to which the value is converted somewhere."""
        out = {}
        for node in self.lowered.graph.nodes:
            users = [t for u in node.users for t in (u.users if u.target is wait else (u,))]
            last = node.target in MOVES and any(u.target not in MOVES for u in users)
            if last and origin_of(node, self.truth) == (self.found.origin, self.found.index):
                spec = replace(parse_spec(node.args[4]), dtype=self._value(self.origin, self.found.index).dtype)
                out[str(spec)] = Wanted(self.found.origin, self.found.index, str(spec))
        return list(out.values())

    def _ends(self) -> list[Wanted]:
        """The layouts in which the value is handed out."""
        out = []
        for end, spec in zip(self.program.outputs, self.lowered.expects["output"], strict=True):
            if source(self.nodes[end.node]) == (self.origin, self.found.index):
                spec = replace(spec, dtype=self._value(self.origin, self.found.index).dtype)
                out.append(Wanted(self.found.origin, self.found.index, str(spec)))
        return out

    def _is_bucketed(self) -> bool:
        return any(n.target in BUCKETS for n in self.lowered.graph.nodes) and bool(self._ends())

    def _bucket(self) -> Case:
        """All gradients that travel in buckets, as they are before, and the parameters whose they are."""
        given: dict[str, Given] = {}
        wanted: list[Wanted] = []
        ends = next(n for n in self.lowered.graph.nodes if n.op == "output")
        for end, node in zip(self.program.outputs, tensor_args(ends), strict=True):
            if end.role != "grad" or sender(source(node)[0]).target not in BUCKETS:
                continue
            name, index = origin_of(node, self.truth)
            ref = self._give(given, self.nodes[name], index)
            owner = self.program.owner(end).node
            self._give(given, self.nodes[owner], 0)
            wanted.append(Wanted(ref.name, 0, str(self._spec(self.nodes[owner], 0)), owner))
        return self._assembled(given, (), tuple(wanted))

    def _takers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if is_getitem(user):
                yield from self._takers(user)
            elif user.op == "call_function":
                yield user

    def _ancestors(self, depth: int) -> set[fx.Node]:
        found, edge = {self.origin}, {self.origin}
        for _ in range(depth):
            edge = {source(a)[0] for n in edge for a in tensor_args(n) if source(a)[0].op == "call_function"} - found
            found |= edge
        return found

    def _give(self, given: dict[str, Given], node: fx.Node, index: int) -> Ref:
        name = f"{node.name}_{index}" if isinstance(self.truth[node.name], (tuple, list)) else node.name
        where = str(node.meta.get("where") or "")
        given.setdefault(name, Given(name, str(self._spec(node, index)), values=self._value(node, index).detach(), where=where))
        return Ref(name)

    def _case(self, region: set[fx.Node], wanted: Iterable[Wanted]) -> Case:
        given: dict[str, Given] = {}
        steps = []
        for node in self.program.graph.nodes:
            if node in region:
                args, kwargs = (fx.node.map_arg(a, lambda n: self._ref(n, region, given)) for a in (node.args, node.kwargs))
                cuts = cuts_of(self.rules[node.name])
                split = " ".join(self.strategies[node.name])
                where, phase = (str(node.meta.get(k) or "") for k in ("where", "phase"))
                steps.append(Step(node.name, op_name(node), _plain(args), _plain(kwargs), split, cuts, where, phase or "forward"))
        ends = []
        for end in wanted:
            if self.nodes[end.name] in region:
                ends.append(end)
            else:
                ends.append(replace(end, name=self._give(given, self.nodes[end.name], end.index).name, index=0))
        return self._assembled(given, tuple(steps), tuple(ends))

    def _ref(self, node: fx.Node, region: set[fx.Node], given: dict[str, Given]) -> Any:
        producer, index = source(node)
        if producer in region:
            return Ref(producer.name, index if isinstance(self.truth[producer.name], (tuple, list)) else None)
        return self._give(given, producer, index)

    def _assembled(self, given: Mapping[str, Given], steps: tuple[Step, ...], wanted: tuple[Wanted, ...]) -> Case:
        plan = self.failure.plan
        links = tuple((a.bandwidth_bytes_s, a.latency_s) for a in plan.mesh)
        mesh = ",".join(f"{a.name}={a.size}" for a in plan.mesh)
        return Case(mesh, tuple(given.values()), steps, wanted, links, plan.random_costs)


def cuts_of(rule: Rule) -> dict[str, tuple[int, ...]]:
    """The cuts that refined a rule's letters: right strides inside each, ascending (see `rules/bind.py`)."""
    pieces: dict[str, list[int]] = {}
    for letter, size in rule.sizes.items():
        base, dot, number = letter.rpartition(".")
        if dot and number.isdigit():
            pieces.setdefault(base, []).append(size)
    out: dict[str, tuple[int, ...]] = {}
    for base, sizes in pieces.items():
        stride, strides = 1, []
        for size in reversed(sizes[1:]):
            stride *= size
            strides.append(stride)
        out[base] = tuple(strides)
    return out


def _plain(value: Any) -> Any:
    """fx's immutable containers as plain ones."""
    if isinstance(value, Ref):
        return value
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(v) for v in value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
