"""A failing computation small enough to be a page of Python: a few ops with their splits, values at its ends, a mesh.

    Case(
        mesh="a=2",
        given=(Given("x", "f64[4,6] S(1)", values=[...]),),
        steps=(Step("softmax", "aten._softmax.default", (Ref("x"), -1, False), split="b"),),
        wanted=(Wanted("softmax", 0, "f64[4,6] S(1)"),),
    )

The layouts of what is given and wanted are part of the case; rules, local arguments and collectives are not: they are made by this
package as it is now. So the same file fails while a bug is there and passes once it is gone.
"""

from __future__ import annotations

import base64
import math
import operator
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx

from ..costs.comm import Conversions
from ..ir.errors import InputError, PlanError
from ..ir.mesh import parse_axes
from ..ir.plan import Plan, PlanAxis
from ..ir.program import Input, Output, Program, Signature
from ..ir.spec import Shard, Spec, parse_spec
from ..passes.pipeline import Lowering, run_passes
from ..rules.algebra import Rule, Strategy, Term, is_legal
from ..rules.bind import refine
from ..rules.table import rule_for
from ..solver.conversions import plain_rule
from .locate import Difference, first_difference

_NO_CALL = Signature(*(lambda *_: [] for _ in fields(Signature)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ref:
    """Output `index` of a step, or what is given under this name."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class Given:
    """A global tensor and how it lies, and `where`: the user's line that makes it.

    values: nested lists, or the tensor. packed: its bytes, zlib, base85. Else it is drawn from `seed`, with this `mean` and `spread`
    within [low, high]; integers and booleans are drawn evenly from there.
    """

    name: str
    layout: str
    values: Any = None
    packed: str = ""
    seed: int = 0
    mean: float = 0.0
    spread: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    where: str = ""

    def tensor(self) -> Tensor:
        """The global value."""
        spec = parse_spec(self.layout)
        if isinstance(self.values, Tensor):
            return self.values
        if self.values is not None:
            return torch.tensor(self.values, dtype=spec.dtype).reshape(spec.shape)
        if self.packed:
            raw = bytearray(zlib.decompress(base64.b85decode(self.packed)))
            return torch.frombuffer(raw, dtype=spec.dtype).reshape(spec.shape).clone()
        draw = torch.Generator().manual_seed(self.seed)
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return torch.randint(int(self.low), int(self.high) + 1, spec.shape, generator=draw).to(spec.dtype)
        drawn = self.mean + self.spread * torch.randn(spec.shape, generator=draw, dtype=torch.float64)
        return drawn.clamp(self.low, self.high).to(spec.dtype)


@dataclass(frozen=True)
class Step:
    """One op: its name, arguments with `Ref`s, one symbol per mesh axis, and the cuts of its rule's letters (see `rules/bind.py`)."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    where: str = ""
    phase: str = "forward"


@dataclass(frozen=True)
class Wanted:
    """A result: output `index` of a step (or what is given), in the layout it is handed out. owner: whose gradient it is, if one."""

    name: str
    index: int
    layout: str
    owner: str = ""


@dataclass(frozen=True)
class Case:
    """links: per mesh axis bandwidth (bytes/s) and latency (s), which decide between chains of collectives."""

    mesh: str
    given: tuple[Given, ...]
    steps: tuple[Step, ...]
    wanted: tuple[Wanted, ...]
    links: tuple[tuple[float, float], ...] = ()
    random_costs: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(n for _, n in parse_axes(self.mesh))

    def state(self) -> dict[str, Tensor]:
        return {g.name: g.tensor() for g in self.given}

    def program(self) -> Program:
        """The captured form: global shapes. Every op is run once to see what it gives."""
        graph, nodes, values = fx.Graph(), {}, {}
        for given in self.given:
            nodes[given.name], values[given.name] = graph.placeholder(given.name), given.tensor()
            nodes[given.name].meta = {"val": values[given.name].to("meta"), "where": given.where, "module": "", "phase": "forward"}
        for step in self.steps:
            args, kwargs = (_mapped(a, lambda r: _item(graph, nodes, values, r)) for a in (tuple(step.args), dict(step.kwargs)))
            node = nodes[step.name] = graph.create_node("call_function", _target(step.op), args, kwargs, name=step.name)
            real = [_mapped(a, lambda r: _value(values, r)) for a in (tuple(step.args), dict(step.kwargs))]
            with torch.no_grad():
                values[step.name] = node.target(*real[0], **real[1])  # type: ignore[operator]
            node.meta = {"val": _meta(values[step.name]), "where": step.where, "module": "", "phase": step.phase}
        ends = [_item(graph, nodes, values, Ref(w.name, w.index)) for w in self.wanted]
        graph.output(tuple(ends))
        owners = {w.owner for w in self.wanted}
        inputs = tuple(Input(g.name, "param" if g.name in owners else "input", g.name) for g in self.given)
        outputs = tuple(
            Output(node.name, "grad" if w.owner else "output", w.owner or f"result{i}", -1 if w.owner else i)
            for i, (w, node) in enumerate(zip(self.wanted, ends, strict=True))
        )
        return Program(graph, inputs, outputs, _NO_CALL)

    def lower(self, program: Program) -> Program:
        """Every rank's program. Raises PlanError when the rules no longer allow a split."""
        rules: dict[str, Rule] = {}
        strategies: dict[str, Strategy] = {}
        for given in self.given:
            rules[given.name], strategies[given.name] = end_rule(parse_spec(given.layout), self.sizes)
        for i, wanted in enumerate(self.wanted):
            if not wanted.owner:
                name = f"output.result{i}"
                rules[name], strategies[name] = end_rule(parse_spec(wanted.layout), self.sizes)
        for step in self.steps:
            rule = refine(rule_for(program.node(step.name)), {k: tuple(v) for k, v in step.cuts.items() if k})
            strategy = tuple(step.split.split()) or ("-",) * len(self.sizes)
            if not is_legal(rule, strategy, self.sizes):
                raise PlanError(f"{step.split!r} is no strategy of {step.name}", why=f"the rule of {step.op} is {rule}")
            rules[step.name], strategies[step.name] = rule, strategy
        for node in program.graph.nodes:
            if node.op == "get_attr":
                rules[node.name] = plain_rule(node.meta["val"].shape, split=False)
        plan = self._plan()
        return run_passes(program, Lowering(plan, rules, strategies, Conversions(plan.links(), self.random_costs), self.sizes))

    def _plan(self) -> Plan:
        links = self.links or ((1e11, 1e-5),) * len(self.sizes)
        axes = [
            PlanAxis(name=name, size=size, bandwidth_bytes_s=b, latency_s=s)
            for (name, size), (b, s) in zip(parse_axes(self.mesh), links, strict=True)
        ]
        return Plan(graph_hash="0" * 16, mesh=tuple(axes), choices={}, random_costs=self.random_costs)

    def difference(self) -> Difference | None:
        """The first operation that differs; None when all is right, or when the rules no longer allow the splits."""
        program = self.program()
        try:
            lowered = self.lower(program)
        except PlanError:
            return None
        return first_difference(program, lowered, self.sizes, self.state())

    def main(self) -> int:
        """Print what is expected and what is found; 1 when they differ, else 0."""
        program = self.program()
        try:
            lowered = self.lower(program)
        except PlanError as error:
            print(f"passed: these splits are refused now\n{error}")
            return 0
        found = first_difference(program, lowered, self.sizes, self.state())
        if found is None:
            print(f"passed: the {math.prod(self.sizes)} ranks of the mesh {self.mesh} compute what one device computes")
            return 0
        print(f"FAILED on the mesh {self.mesh}: {found}")
        for rank, (want, have) in enumerate(zip(found.expected, found.found, strict=True)):
            if rank in found.ranks or not found.ranks:
                print(f"rank {rank}\n  expected {_shown(want)}\n  found    {_shown(have)}")
        return 1

    def run(self) -> None:
        """`main`, as a script."""
        sys.exit(self.main())


def end_rule(spec: Spec, sizes: tuple[int, ...]) -> tuple[Rule, Strategy]:
    """A rule with one term and the strategy under which it lies like `spec`, parts and Partial included."""
    letters = [[f"d{d}.{i}" for i in range(len(parts))] for d, parts in enumerate(spec.dims)]
    lengths = {letter: n for names, parts in zip(letters, spec.dims, strict=True) for letter, n in zip(names, parts, strict=True)}
    strategy, reduce = [], "sum"
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Shard):
            strategy.append(letters[placement.dim][placement.part])
        elif (op := getattr(placement, "op", "")) and sizes[axis] > 1:
            lengths[f"p{axis}"], reduce = sizes[axis], op
            strategy.append(f"p{axis}")
        else:
            strategy.append("-")
    return Rule((), (Term(tuple(map(tuple, letters))),), lengths, frozenset(), reduce), tuple(strategy)


def _target(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    space, _, rest = name.partition(".")
    try:
        return operator.attrgetter(rest)(getattr(torch.ops, space))
    except AttributeError:
        raise InputError(f"there is no op {name}", try_="import the module that registers it first") from None


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, change) for v in value)
    return {k: _mapped(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def _item(graph: fx.Graph, nodes: dict[str, fx.Node], values: dict[str, Any], ref: Ref) -> fx.Node:
    """The node of one output, a `getitem` where there are several."""
    node = nodes[ref.name]
    if not isinstance(values[ref.name], (tuple, list)):
        return node
    key = f"{ref.name}_{ref.index}"
    if key not in nodes:
        nodes[key] = graph.create_node("call_function", operator.getitem, (node, ref.index or 0), name=key)
        values[key] = values[ref.name][ref.index or 0]
        nodes[key].meta = {**node.meta, "val": _meta(values[key])}
    return nodes[key]


def _value(values: dict[str, Any], ref: Ref) -> Any:
    value = values[ref.name]
    return value[ref.index or 0] if isinstance(value, (tuple, list)) else value


def _meta(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_meta(v) for v in value)
    return value.to("meta") if isinstance(value, Tensor) else value


def _shown(value: Any) -> str:
    return str(value if not isinstance(value, Tensor) else value.tolist() if value.numel() <= 64 else value).replace("\n", "\n           ")
