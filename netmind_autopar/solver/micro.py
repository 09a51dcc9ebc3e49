"""Micro-batches: a step as `count` smaller ones that one device runs one after the other, with gradients added up.

They are one more mesh axis, the outermost, along which nothing can travel: a value is whole in every micro-batch (Replicate), a piece
of the whole (Shard) or a term of it (Partial), by the same rules as along any other axis. What is whole may be cut, and counted in
the first one alone; the way back does not exist within a step, since the other micro-batches are not there. Where the cheapest such
choice shares out the work, every micro-batch computes its part of exactly the step that the whole batch makes: means over all
tokens, and random numbers, which belong to elements of the whole batch.

Results are joined: a loss is a sum of terms, as gradients are; others lie behind one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..costs.comm import Conversions
from ..ir.errors import InputError
from ..ir.local import Local
from ..ir.mesh import Axis, Device, Mesh
from ..ir.program import Draft, Micro, Output, Program, is_getitem, op_name, source, tensor_args, values
from ..ir.spec import Partial, Replicate, Shard, Spec, layout, local_shape
from ..rules.algebra import NONE, Rule, Term, input_specs, output_specs
from ..rules.localize import localize_args
from ..tracer.hash import graph_hash
from .build import Built, build
from .conversions import end_rules, value_of
from .presolve import Kept
from .search import solve_problem

# Only orders of magnitude matter here, and no cluster's numbers may: which device loads a plan must not change what it means.
DEVICE = Device("any", (("float32", 1e8),), 1 << 62, 1e6, 1e6, 0.0)  # so slow that the work counts and not its start
WORTH = 0.5  # of what n micro-batches could save at best in work per micro-batch, how much they must
SOLVER_S = 60.0

Symbols = dict[str, str]


@dataclass(frozen=True)
class Refusal:
    """Why a program has no such micro-batches, and the line at which it shows."""

    why: str
    where: str = ""


class _Strided(Exception):
    """What a micro-batch needs of a given tensor is no run of it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.why)
        self.refusal = refusal


def micro_batches(program: Program, rules: Mapping[str, Rule], count: int) -> tuple[Program, dict[str, Rule]] | Refusal:
    """One of `count` micro-batches as a program of its own, with the rules of its ops."""
    if refusal := _unfit(program):
        return refusal
    found = _symbols(program, rules, count)
    if isinstance(found, Refusal):
        return found
    work = _Cut(program, rules, found, count)
    joins = work.joins()
    if isinstance(joins, Refusal):
        return joins
    try:
        cut = work.run()
    except _Strided as e:
        return e.refusal
    return replace(cut, micro=Micro(count, joins, graph_hash(program))), work.made


def in_turns(program: Program, rules: Mapping[str, Rule], count: int) -> tuple[Program, Mapping[str, Rule]]:
    """`micro_batches` of a plan; the program itself when it runs at once. Raises InputError where there are none."""
    if program.turns == count:
        return program, rules
    found = micro_batches(program, rules, count)
    if isinstance(found, Refusal):
        raise InputError(
            f"the step cannot be run as {count} micro-batches", where=found.where, why=found.why, try_="micro_batches=1, or another number"
        )
    return found


def _unfit(program: Program) -> Refusal | None:
    """What no choice of splits can mend."""
    tangents = [i for i in program.inputs if i.role == "tangent"]
    if program.mode != "training" or not tangents:
        return Refusal("there is no backward whose gradients could be added up")
    loss = program.node(tangents[0].node)
    if len(tangents) > 1 or value_of(loss).dim():
        return Refusal("backward must start from one number, the loss: it runs within the forward call, before its gradient is known")
    owner = next((o for o in program.outputs if o.role == "grad" and o.index >= 0), None)
    if owner is not None:
        return Refusal(f"the input {owner.name!r} gets a gradient, and it lies across the micro-batches")
    for node in program.graph.nodes:
        if "val" in node.meta and any(v is not None and v.dtype == torch.float16 for v in values(node)):
            return Refusal(
                "gradients in float16 need the scale of the loss, which is known only after forward", node.meta.get("where") or ""
            )
    return None


def _symbols(program: Program, rules: Mapping[str, Rule], count: int) -> Symbols | Refusal:
    """Per op what it splits into micro-batches: the choice that leaves each the least work."""
    grads = {source(program.node(o.node)) for o in program.outputs if o.role == "grad"}
    ends = tuple(replace(i, role="input") if i.role == "tangent" else i for i in program.inputs)
    program = replace(program, inputs=ends, outputs=tuple(o for o in program.outputs if o.role == "mutation"))
    mesh = Mesh((Axis("turn", count, in_turn=True),), DEVICE)
    built = build(program, rules, mesh, Conversions(mesh), states=0)
    found = solve_problem(built.problem, allowed=_allowed(built, count, grads), time_limit=SOLVER_S)
    if found.choice is None or not math.isfinite(found.seconds):
        return Refusal("no split of the batch lets its parts be computed one after the other")
    pairs = [(kind, node, k) for kind, node, k in zip(built.kinds, built.problem.nodes, found.choice, strict=True) if kind.members]
    whole = sum(float(node.seconds[0]) for _, node, _ in pairs)
    saved = {kind.members[0]: float(node.seconds[0] - node.seconds[k]) for kind, node, k in pairs}
    if sum(saved.values()) < WORTH * whole * (1 - 1 / count):
        kind, _, _ = max((p for p in pairs if saved[p[0].members[0]] <= 0), key=lambda p: float(p[1].seconds[0]))
        first = built.nodes[kind.members[0]]
        return Refusal(f"{op_name(first)} and others need the whole batch at once", first.meta.get("where") or "")
    return {member: kind.strategies[k][0] for kind, _, k in pairs for member in kind.members}


def _allowed(built: Built, count: int, grads: set[tuple[fx.Node, int]]) -> Kept:
    """The strategies that split nothing unevenly, no gradient, and of what is given to a step (parameters, inputs, constants) nothing."""
    made = {(node.name, index) for node, index in grads}
    out = []
    for kind in built.kinds:
        whole = [i for i in range(len(kind.rule.outputs)) if any((member, i) in made for member in kind.members)]
        fine = []
        for k, (symbol,) in enumerate(kind.strategies):
            even = kind.role == "op" and kind.rule.sizes.get(symbol, count) % count == 0
            pieces = any(isinstance(kind.gives[k][i].placements[0], Shard) for i in whole)
            if symbol == NONE or (even and not pieces):
                fine.append(k)
        out.append(tuple(fine))
    return tuple(out)


def divided(rule: Rule, symbol: str, count: int) -> Rule:
    """The rule of a micro-batch."""
    return _resized(rule, symbol, lambda n: n // count)


def undivided(rule: Rule, symbol: str, count: int) -> Rule:
    """The inverse of `divided`."""
    return _resized(rule, symbol, lambda n: n * count)


def _resized(rule: Rule, symbol: str, change) -> Rule:
    return replace(rule, sizes={letter: change(n) if letter == symbol else n for letter, n in rule.sizes.items()})


class _Cut:
    """The program of one micro-batch."""

    def __init__(self, program: Program, rules: Mapping[str, Rule], symbols: Symbols, count: int) -> None:
        self.program, self.rules, self.symbols, self.count = program, rules, symbols, count
        self.made: dict[str, Rule] = {}
        ends = end_rules(program)
        self.specs: dict[tuple[str, int], Spec] = {}  # with the placement along the micro-batches alone
        for node in program.graph.nodes:
            if node.op == "output" or is_getitem(node):
                continue
            rule, dtypes = rules.get(node.name) or ends[node.name], [None if v is None else v.dtype for v in values(node)]
            found = output_specs(rule, (symbols.get(node.name, NONE),), dtypes)
            self.specs |= {(node.name, i): spec for i, spec in enumerate(found) if spec is not None}
        self.fakes: dict[tuple, torch.Tensor] = {}
        self.smaller: dict[tuple[int, str], Rule] = {}
        self.taken: dict[tuple, fx.Node] = {}

    def joins(self) -> tuple[str, ...] | Refusal:
        """How every result of the step comes from those of the micro-batches."""
        out = []
        for item in self.program.outputs:
            node = self.program.node(item.node)
            found = self._join(item, self._spec(node))
            if found is None:
                what = f"the gradient of {item.name!r}" if item.role == "grad" else f"the result {item.name!r}"
                return Refusal(f"{what} does not come together from micro-batches", node.meta.get("where") or "")
            out.append(found)
        return tuple(out)

    def _join(self, item: Output, spec: Spec) -> str | None:
        (placement,) = spec.placements
        if isinstance(placement, Replicate):
            return "same"
        if isinstance(placement, Partial):
            return "sum" if placement.op == "sum" and item.role != "mutation" else None
        major = all(n == 1 for n in spec.dims[placement.dim][: placement.part])
        return f"cat:{placement.dim}" if item.role == "output" and major else None

    def _spec(self, node: fx.Node) -> Spec:
        producer, index = source(node)
        return self.specs[producer.name, index]

    def run(self) -> Program:
        with self.program.edit() as draft:
            for node in list(draft.graph.nodes):
                if node.op == "call_function" and is_getitem(node):
                    spec = self._spec(node)
                    node.meta = {**node.meta, "val": self._fake(node.meta["val"], spec), "turn": spec}
                elif node.op == "call_function":
                    self._op(draft, node)
        return draft.program

    def _op(self, draft: Draft, node: fx.Node) -> None:
        rule, symbol = self.rules[node.name], self.symbols[node.name]
        wants = input_specs(rule, (symbol,), [value_of(arg).dtype for arg in self._args_of(node)])
        self._take(draft, node, wants)
        specs = tuple(self.specs.get((node.name, i)) for i in range(len(values(node))))
        node.meta = {**node.meta, "turn": specs if isinstance(node.meta["val"], (tuple, list)) else specs[0]}
        self.made[node.name] = rule
        if symbol not in rule.sizes:
            return
        key = (id(rule), symbol)
        if key not in self.smaller:
            self.smaller[key] = divided(rule, symbol, self.count)
        self.made[node.name] = self.smaller[key]
        spec = self.specs.get((node.name, 0))
        if rule.adjust:
            node.args, node.kwargs = localize_args(node.args, node.kwargs, rule, (symbol,), spec, (self.count,), (0,))
        val = node.meta["val"]
        many = isinstance(val, (tuple, list))
        new = tuple(None if v is None else self._fake(v, self.specs[node.name, i]) for i, v in enumerate(values(node)))
        node.meta = {**node.meta, "micro": symbol, "val": new if many else new[0]}

    def _args_of(self, node: fx.Node) -> list[fx.Node]:
        return tensor_args(self.program_nodes[node.name])

    @property
    def program_nodes(self) -> dict[str, fx.Node]:
        if not hasattr(self, "_nodes"):
            self._nodes = {node.name: node for node in self.program.graph.nodes}
        return self._nodes

    def _take(self, draft: Draft, node: fx.Node, wants: Sequence[Spec]) -> None:
        """Arguments that are there for the whole batch, cut to what the micro-batch needs of them."""
        sizes, at = (self.count,), itertools.count()

        def swap(arg: fx.Node) -> fx.Node:
            have, want = self._spec(arg), wants[next(at)]
            if layout(have, sizes) == layout(want, sizes):
                return arg
            key = (arg, layout(want, sizes), node.meta["phase"])
            if key not in self.taken:
                self.taken[key] = self._part(draft, node, arg, want)
            return self.taken[key]

        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), swap)

    def _part(self, draft: Draft, taker: fx.Node, arg: fx.Node, want: Spec) -> fx.Node:
        (placement,) = want.placements
        letters = [f"d{i}" for i in range(len(want.shape))]
        sizes = {letter: int(n) for letter, n in zip(letters, want.shape, strict=True)}
        turn = Local("turn")
        if isinstance(placement, Shard):
            if any(n > 1 for n in want.dims[placement.dim][: placement.part]):
                raise _Strided(Refusal(f"a micro-batch would take every so-manieth element of {arg.name}", taker.meta.get("where") or ""))
            at = placement.dim
            op, args, name = torch.ops.autopar.turn_part.default, (arg, at, turn, self.count), f"{arg.name}_part"
            fixed, gives = frozenset({letters[at], "part"}), [*letters[:at], "part", *letters[at + 1 :]]
            sizes["part"] = sizes[letters[at]] // self.count
        else:
            op, args, name = torch.ops.autopar.first_turn.default, (arg, turn), f"{arg.name}_first"
            fixed, gives = frozenset(), letters
        with draft.graph.inserting_before(taker):
            made = draft.graph.create_node("call_function", op, args, name=name)
        made.meta = {key: taker.meta.get(key) or "" for key in ("where", "module", "phase")}
        made.meta |= {"val": self._fake(arg.meta["val"], want), "turn": want}
        terms = tuple(Term(tuple((x,) for x in names), mark) for names, mark in ((letters, "+"), (gives, "")))
        self.made[made.name] = Rule(terms[:1], terms[1:], sizes, fixed)
        return made

    def _fake(self, value: torch.Tensor, spec: Spec) -> torch.Tensor:
        """A fake tensor of the micro-batch's size, laid out as the whole one."""
        if not isinstance(spec.placements[0], Shard):
            return value
        shape, at = local_shape(spec, (self.count,)), spec.placements[0].dim
        key = (tuple(value.shape), value.stride(), value.dtype, shape)
        if key not in self.fakes:
            inner = value.stride()[at]
            strides = [s // self.count if s > inner and s % self.count == 0 else s for s in value.stride()]
            self.fakes[key] = value.new_empty_strided(shape, strides)
        return self.fakes[key]
