"""From a captured program to the solver's problem: classes instead of nodes, layouts instead of tensors, moments instead of ops.

Moments follow the emitted code: forward, then backward. Op m runs at moment 2m + 1, the conversions that it is the first to need
at 2m; a result of the program is converted right after it is made. So the memory of a conversion and of the op after it are
counted apart, as they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ..costs.comm import BUCKET_BYTES, Conversions
from ..costs.compute import FREE, node_prices, short_name
from ..costs.room import room
from ..ir.mesh import Mesh
from ..ir.program import Input, Program, is_getitem, tensor_args, values
from ..ir.spec import Layout, Spec, layout, local_bytes
from ..rules.algebra import Rule, Strategy, input_specs, output_specs, strategies
from .conversions import Use, end_rules, owner_of, regathered, uses, value_name, value_of
from .fold import classes, signature
from .problem import BACKWARD, FORWARD, Consumer, Node, Problem, Value

RESULT = "result"  # the node that replicated results want
Column = tuple[list[Spec], np.ndarray]  # layouts per strategy: specs, and numbers that are equal where layouts are


@dataclass(frozen=True)
class Kind:
    """One class: its members in program order, the rule and strategies they share, and the layouts that follow."""

    name: str
    members: tuple[str, ...]
    rule: Rule
    strategies: tuple[Strategy, ...]
    takes: tuple[tuple[Spec, ...], ...]
    gives: tuple[tuple[Spec | None, ...], ...]
    role: str = "op"


@dataclass(frozen=True)
class Built:
    """The problem, and what its numbers stand for: `kinds[i]` is node i, `specs[v]` the (source, target) layouts of value v,
    `takers[v]` the uses of its first instance, `order[m]` the op that runs, or is prepared, at moment m."""

    problem: Problem
    kinds: tuple[Kind, ...]
    specs: tuple[tuple[tuple[Spec, ...], tuple[Spec, ...]], ...]
    takers: tuple[tuple[Use, ...], ...]
    order: tuple[str, ...]
    nodes: Mapping[str, fx.Node]
    forward_end: int


def random_seconds(seed: int, name: str, label: str) -> float:
    """A price between 1 µs and 1 ms that depends on the arguments alone."""
    digest = hashlib.blake2b(f"{seed}|{name}|{label}".encode(), digest_size=8).digest()
    return 1e-6 + 1e-3 * int.from_bytes(digest, "big") / 2**64


def strategies_of(kind_rule: Rule, sizes: tuple[int, ...], cache: dict) -> tuple[Strategy, ...]:
    key = (kind_rule.inputs, kind_rule.outputs, tuple(kind_rule.sizes.items()), kind_rule.fixed, kind_rule.reduce, sizes)
    if key not in cache:
        cache[key] = strategies(kind_rule, sizes)
    return cache[key]


def collect(program: Program, rules: Mapping[str, Rule], sizes: tuple[int, ...], inputs: str) -> dict[str, Kind]:
    """All classes of the program by name. Tangents belong to the class of their output."""
    rules = {**end_rules(program, inputs), **rules}
    cache: dict = {}
    members: dict[str, list[str]] = {}
    names = classes(program, rules)
    ends = program.placeholders()
    for node_name, name in names.items():
        if node_name not in ends or ends[node_name].role != "tangent":
            members.setdefault(name, []).append(node_name)
    nodes = {node.name: node for node in program.graph.nodes}
    out: dict[str, Kind] = {}
    for name, group in members.items():
        node = nodes[group[0]]
        role = ends[group[0]].role if group[0] in ends else "constant" if node.op == "get_attr" else "op"
        out[name] = _kind(
            name,
            tuple(group),
            rules[group[0]],
            [value_of(a).dtype for a in tensor_args(node)],
            [None if v is None else v.dtype for v in values(node)],
            sizes,
            cache,
            role,
        )
    for item in program.outputs:
        if item.role == "output":
            name = f"output.{item.name}"
            dtype = value_of(nodes[item.node]).dtype
            out[name] = _kind(name, (), rules[name], [], [dtype], sizes, cache, "result")
    out[RESULT] = Kind(RESULT, (), Rule((), (), {}), (("-",) * len(sizes),), ((),), ((),), "result")
    return out


def _kind(
    name: str,
    members: tuple[str, ...],
    rule: Rule,
    ins: Sequence[torch.dtype],
    outs: Sequence[torch.dtype | None],
    sizes: tuple[int, ...],
    cache: dict,
    role: str,
) -> Kind:
    found = strategies_of(rule, sizes, cache)
    key = ("specs", id(found), tuple(ins), tuple(outs), rule.reduce, rule.inputs, rule.outputs)
    if key not in cache:
        cache[key] = tuple(input_specs(rule, s, ins) for s in found), tuple(output_specs(rule, s, outs) for s in found)
    takes, gives = cache[key]
    return Kind(name, members, rule, found, takes, gives, role)


class _Build:
    def __init__(self, program: Program, rules: Mapping[str, Rule], mesh: Mesh, inputs: str, regather: Sequence[str] = ()) -> None:
        self.program, self.mesh, self.sizes = program, mesh, mesh.sizes
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.kinds = collect(program, rules, mesh.sizes, inputs)
        self.index = {name: i for i, name in enumerate(self.kinds)}
        self.class_of = {member: kind.name for kind in self.kinds.values() for member in kind.members}
        self.ends: dict[str, Input] = program.placeholders()
        ops = [n for n in program.graph.nodes if n.op == "call_function" and not is_getitem(n)]
        forward = [n.name for n in ops if n.meta["phase"] == "forward"]
        self.ops = tuple(forward + [n.name for n in ops if n.meta["phase"] != "forward"])
        self.moment = {name: 2 * m + 1 for m, name in enumerate(self.ops)}
        self.forward_end, self.end = max(2 * len(forward) - 1, 0), 2 * len(self.ops)
        self.uses = uses(program)
        self.again = regathered(program, self.class_of | {t: f"output.{i.name}" for t, i in self.ends.items() if i.role == "tangent"}, regather)
        grads = {o.node for o in program.outputs if o.role == "grad"}
        self.gradient_bytes = sum(v.numel() * v.dtype.itemsize for v in (value_of(self.nodes[name]) for name in grads))
        self.hold = self._holds()
        self.columns: dict[tuple[int, int], Column] = {}
        self.layouts: dict[Spec, int] = {}
        self.known: dict[Layout, int] = {}
        self.chains: dict[tuple, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _holds(self) -> dict[str, int]:
        """Per op the last moment at which something taken from it as a view is needed."""
        hold: dict[str, int] = {}
        by_node: dict[str, list[Use]] = {}
        for (name, _), takers in self.uses.items():
            by_node.setdefault(name, []).extend(takers)
        for name in reversed(self.ops):
            hold[name] = max((self.held(use, hold) for use in by_node.get(name, ())), default=self.moment[name])
        return hold

    def held(self, use: Use, hold: Mapping[str, int]) -> int:
        """When a use lets go of what it took: the user keeps outputs and gradients; a buffer's new value is copied after forward."""
        if use.result:
            return min(self.forward_end + 1, self.end) if use.result.role == "mutation" else self.end
        return hold[use.node] if self.is_view(use.node) else self.moment[use.node]

    def consumer(self, use: Use) -> str:
        """The class whose choice says in which layout `use` wants its value."""
        if use.result is None:
            return self.class_of[use.node]
        owner = owner_of(self.program, use.result)
        return RESULT if owner is None else self.class_of.get(owner, owner)

    def column(self, table: Sequence[tuple[Spec | None, ...]], position: int) -> Column:
        """One position of a kind's `takes` or `gives`: its specs per strategy, and their layouts as numbers."""
        key = (id(table), position)
        if key not in self.columns:
            self.columns[key] = self.numbers([row[position] for row in table])  # type: ignore[misc]
        return self.columns[key]

    def numbers(self, specs: list[Spec]) -> Column:
        """Specs, and numbers that are equal where their layouts are."""
        out = []
        for spec in specs:
            if spec not in self.layouts:
                self.layouts[spec] = self.known.setdefault(layout(spec, self.sizes), len(self.known))
            out.append(self.layouts[spec])
        return specs, np.array(out, dtype=np.int64)

    def wanted(self, use: Use, have: Spec) -> Column:
        """Per strategy of the consumer's class the layout that `use` wants."""
        kind = self.kinds[self.consumer(use)]
        if use.result is None:
            return self.column(kind.takes, use.position)
        return self.numbers([have.replicated]) if kind.name == RESULT else self.column(kind.gives, 0)

    def produced(self, name: str, index: int) -> tuple[str, Column]:
        """The class that decides how a value lies, and its layout per strategy."""
        kind = self.kinds[f"output.{self.ends[name].name}" if self.is_tangent(name) else self.class_of[name]]
        return kind.name, self.column(kind.gives, index)

    def numbered(self, columns: Sequence[Column]) -> tuple[Column, list[np.ndarray]]:
        """The different layouts of all columns in order of appearance, and every column as positions among them."""
        if not columns:
            return ([], np.zeros(0, np.int64)), []
        _, first, inverse = np.unique(np.concatenate([numbers for _, numbers in columns]), return_index=True, return_inverse=True)
        states = np.argsort(np.argsort(first))[inverse].astype(np.int32)
        specs = [spec for found, _ in columns for spec in found]
        ends = np.cumsum([len(found) for found, _ in columns])
        return self.numbers([specs[i] for i in np.sort(first)]), np.split(states, ends[:-1])

    def folded(self) -> dict[tuple, list[tuple[str, int]]]:
        """Values that are alike: same producer class, same consumers."""
        groups: dict[tuple, list[tuple[str, int]]] = {}
        for (name, index), takers in self.uses.items():
            producer, _ = self.produced(name, index)
            into = tuple(
                (self.consumer(u), u.position if u.result is None else -1, u.phase, u.result.role if u.result else "") for u in takers
            )
            role = self.ends[name].role if name in self.ends else ""
            groups.setdefault((producer, role, index, into, (name, index) in self.again), []).append((name, index))
        return groups

    def value(self, group: Sequence[tuple[str, int]], conversions: Conversions) -> tuple[Value, tuple[tuple[Spec, ...], tuple[Spec, ...]]]:
        name, index = group[0]
        takers = self.uses[name, index]
        producer, gives = self.produced(name, index)
        (sources, here), (state,) = self.numbered([gives])
        (targets, there), states = self.numbered([self.wanted(u, gives[0][0]) for u in takers])
        is_gradient = any(u.result is not None and u.result.role == "grad" for u in takers)
        same = here[:, None] == there[None, :]
        seconds, need, left = self.chain(name, index, conversions, sources, targets, same, is_gradient)
        consumers = tuple(
            Consumer(self.index[self.consumer(u)], s, BACKWARD if u.phase == "backward" else FORWARD)
            for u, s in zip(takers, states, strict=True)
        )
        produced = np.array([self.born(n) for n, _ in group])
        used = np.array([[self.taken(u, n) for u in self.uses[n, i]] for n, i in group])
        held = np.array([[self.end if self.is_tangent(n) else self.held(u, self.hold) for u in self.uses[n, i]] for n, i in group])
        shape = (len(group), len(takers))
        owns = not self.is_resident(name) and not self.is_view(name)
        value = Value(
            value_name(producer, index),
            self.index[producer],
            state,
            consumers,
            np.where(same, 0.0, seconds),
            same,
            np.array([s.has_partial or (name, index) not in self.again for s in sources]),
            np.array([local_bytes(s, self.sizes) * owns for s in sources], dtype=np.int64),
            left,
            produced,
            used.reshape(shape),
            held.reshape(shape),
            "gradient" if is_gradient else "activation",
            need,
        )
        return value, (tuple(sources), tuple(targets))

    def chain(
        self, name: str, index: int, conversions: Conversions, sources: list[Spec], targets: list[Spec], same: np.ndarray, is_gradient: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the conversions of one value: seconds, bytes that they need while they run, bytes of the copies they leave.

        A tensor that is not contiguous is packed first. A gradient's all-reduce waits for its bucket: others lie there packed.
        """
        dense = values(self.nodes[name])[index].is_contiguous()  # type: ignore[union-attr]
        key = (tuple(sources), tuple(targets), is_gradient, dense)
        if key not in self.chains:
            seconds = conversions.matrix(sources, targets, bucketed=is_gradient) if targets else np.zeros((len(sources), 0))
            need, left, reduced = room(conversions, sources, targets)
            if not dense:
                need = need + np.array([local_bytes(s, self.sizes) for s in sources], np.int64)[:, None]
            if is_gradient and self.gradient_bytes > BUCKET_BYTES:
                need = need + reduced * BUCKET_BYTES
            elif is_gradient:  # all in one bucket
                left = left + reduced * left
            self.chains[key] = seconds, need * ~same, np.max(left * ~same, axis=0, initial=0)
        return self.chains[key]

    def born(self, name: str) -> int:
        """The moment at which a value exists: a tangent when backward begins, other ends from the start."""
        return min(self.forward_end + 1, self.end) if self.is_tangent(name) else self.moment.get(name, 0)

    def is_tangent(self, name: str) -> bool:
        """Tangents are the caller's: they live until the step's end."""
        return name in self.ends and self.ends[name].role == "tangent"

    def taken(self, use: Use, producer: str) -> int:
        """The moment at which a value is converted for a use, if it must be."""
        return self.moment[use.node] - 1 if use.result is None else min(self.born(producer) + 1, self.end)

    def is_resident(self, name: str) -> bool:
        return self.nodes[name].op != "call_function" and not self.is_tangent(name)

    def is_view(self, name: str) -> bool:
        return short_name(self.nodes[name]) in FREE

    def resident(self, kind: Kind, trained: set[str], states: int) -> np.ndarray:
        """Bytes per strategy that always live: the class's parameters, buffers or inputs, with optimizer state."""
        total = np.zeros(len(kind.strategies), dtype=np.int64)
        if kind.role in ("op", "result"):
            return total
        copies = sum(1 + (states if member in trained else 0) for member in kind.members)
        return total + copies * np.array([local_bytes(specs[0], self.sizes) for specs in kind.gives], dtype=np.int64)  # type: ignore[arg-type]


def trained_parameters(program: Program) -> set[str]:
    """The placeholder nodes of parameters that get a gradient."""
    wanted = {o.name for o in program.outputs if o.role == "grad"}
    return {i.node for i in program.inputs if i.role == "param" and i.name in wanted}


def build(
    program: Program,
    rules: Mapping[str, Rule],
    mesh: Mesh,
    conversions: Conversions,
    *,
    states: int = 2,
    inputs: str = "global",
    random_costs: int | None = None,
    limit_bytes: int | None = None,
    regather: Sequence[str] = (),
) -> Built:
    """The folded problem of a program on a mesh. Gradients of parameters are priced as they travel: in buckets.

    states: tensors of a parameter's size that the optimizer keeps. Random costs replace the seconds of ops; pass conversions that
    were made with the same seed.
    """
    work = _Build(program, rules, mesh, inputs, regather)
    trained = trained_parameters(program)
    priced: dict[tuple, np.ndarray] = {}
    nodes = []
    for kind in work.kinds.values():
        labels = tuple(" ".join(s) for s in kind.strategies)
        seconds = np.zeros(len(labels))
        if kind.role == "op" and random_costs is not None:
            seconds = np.array([random_seconds(random_costs, kind.name, label) for label in labels])
        elif kind.role == "op":
            seconds = _priced(work.nodes[kind.members[0]], kind, mesh, priced)
        nodes.append(Node(kind.name, labels, seconds * len(kind.members), work.resident(kind, trained, states)))
    made, specs, takers = [], [], []
    for group in work.folded().values():
        value, spec = work.value(group, conversions)
        made.append(value)
        specs.append(spec)
        takers.append(tuple(work.uses[group[0]]))
    problem = Problem(tuple(nodes), tuple(made), work.end + 1, 0, limit_bytes)
    order = tuple(work.ops[min(m // 2, len(work.ops) - 1)] if work.ops else "" for m in range(work.end + 1))
    return Built(problem, tuple(work.kinds.values()), tuple(specs), tuple(takers), order, work.nodes, work.forward_end)


def _priced(node: fx.Node, kind: Kind, mesh: Mesh, cache: dict[tuple, np.ndarray]) -> np.ndarray:
    key = signature(node, kind.rule)
    if key not in cache:
        cache[key] = node_prices(node, kind.rule, kind.strategies, mesh)
    return cache[key]
