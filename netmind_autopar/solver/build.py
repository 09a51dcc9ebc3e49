"""From a captured program to the solver's problem: classes instead of nodes, layouts instead of tensors, moments instead of ops.

Moments follow the emitted code: forward, then backward. Op m runs at moment 2m + 1, the conversions that it is the first to need
at 2m; a result of the program is converted right after it is made. So the memory of a conversion and of the op after it are
counted apart, as they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from ..costs.comm import BUCKET_BYTES, Conversions
from ..costs.compute import FREE, node_prices, short_name
from ..ir.mesh import Mesh
from ..ir.plan import STATE_BUCKET_BYTES
from ..ir.program import Input, Program, is_getitem, values
from ..ir.spec import Spec
from ..rules.algebra import Rule
from .conversions import Use, is_bucketed, owner_of, regathered, uses, value_name, value_of
from .fold import signature
from .kinds import RESULT, Kind, collect
from .layouts import Side, Specs, distinct, tables
from .parking import stays, with_places
from .problem import BACKWARD, FORWARD, Consumer, Node, Problem, Value
from .replay import refusal
from .sums import cast_first
from .window import back, borders, gone


@dataclass(frozen=True)
class Built:
    """The problem, and what its numbers stand for: `kinds[i]` is node i, `specs[v]` the (source, target) layouts of value v,
    `takers[v]` the uses of its first instance, `order[m]` the op that runs, or is prepared, at moment m."""

    problem: Problem
    kinds: tuple[Kind, ...]
    specs: tuple[tuple[Sequence[Spec], Sequence[Spec]], ...]
    takers: tuple[tuple[Use, ...], ...]
    order: tuple[str, ...]
    nodes: Mapping[str, fx.Node]
    forward_end: int
    sums: tuple[np.ndarray | int, ...] = ()  # per kind and strategy the bytes of gradients that micro-batches add up


def random_seconds(seed: int, name: str, label: str) -> float:
    """A price between 1 µs and 1 ms that depends on the arguments alone."""
    digest = hashlib.blake2b(f"{seed}|{name}|{label}".encode(), digest_size=8).digest()
    return 1e-6 + 1e-3 * int.from_bytes(digest, "big") / 2**64


class _Build:
    def __init__(
        self,
        program: Program,
        rules: Mapping[str, Rule],
        conversions: Conversions,
        inputs: str,
        again: frozenset[tuple[str, int]] | Sequence[str] = (),
        stowed: Mapping[str, str] | None = None,
    ) -> None:
        self.program, self.conversions, self.turns = program, conversions, program.turns
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.kinds = collect(program, rules, conversions.mesh.sizes, inputs)
        self.index = {name: i for i, name in enumerate(self.kinds)}
        self.class_of = {member: kind.name for kind in self.kinds.values() for member in kind.members}
        self.ends: dict[str, Input] = program.placeholders()
        ops = [n for n in program.graph.nodes if n.op == "call_function" and not is_getitem(n)]
        forward = [n.name for n in ops if n.meta["phase"] == "forward"]
        self.ops = tuple(forward + [n.name for n in ops if n.meta["phase"] != "forward"])
        self.moment = {name: 2 * m + 1 for m, name in enumerate(self.ops)}
        self.forward_end, self.end = max(2 * len(forward) - 1, 0), 2 * len(self.ops) + 1  # the last moment is the optimizer's
        self.uses = uses(program)
        if not isinstance(again, frozenset):
            tangents = {name: f"output.{end.name}" for name, end in self.ends.items() if end.role == "tangent"}
            again = regathered(program, self.class_of | tangents, again)
        self.again = again
        self.view_kinds = {name: _is_view(self.nodes[kind.members[0]]) for name, kind in self.kinds.items() if kind.members}
        self.owners: dict[tuple[str, str, int], str] = {}
        grads = {o.node for o in program.outputs if o.role == "grad"}
        self.gradient_bytes = sum(v.numel() * v.dtype.itemsize for v in (value_of(self.nodes[name]) for name in grads))
        self.ranks = self._ranks()
        self.away: frozenset[tuple[str, int]] = frozenset()
        self.cast_first = cast_first(program)
        self.parked: Mapping[str, str] = {}
        self.stowed: Mapping[str, str] = stowed or {}
        self.late: list[int] | None = None  # where stretches of backward begin
        self.trained: set[str] = set()
        self.states = 0
        joins = zip(program.outputs, program.micro.joins, strict=True) if program.micro else ()
        self.joined = {f"output.{o.name}": self.turns - 1 for o, join in joins if o.role == "output" and join.startswith("cat:")}
        self.release = self._releases()
        self.columns: dict[tuple[str, bool, int], np.ndarray] = {}

    def _ranks(self) -> dict[tuple[str, int], int]:
        """Per value its position among those of the same name."""
        seen: dict[str, int] = {}
        out: dict[tuple[str, int], int] = {}
        for name, index in self.uses:
            known = value_name(self.class_of.get(name, name), index)
            out[name, index] = seen[known] = seen.get(known, -1) + 1
        return out

    def _releases(self) -> dict[str, int]:
        """Per op when it lets go of what it takes: at once, or, if it gives views of that, when the last taker of one does."""
        out = dict(self.moment)
        views: dict[str, list[Use]] = {name: [] for name in self.ops if self.is_view(name)}
        for (name, _), takers in self.uses.items():
            if name in views:
                views[name].extend(takers)
        for name in reversed(views):
            out[name] = max((self.held(use, out, name) for use in views[name]), default=self.moment[name])
        return out

    def held(self, use: Use, release: Mapping[str, int], producer: str) -> int:
        """When a use lets go of what it took: the user keeps outputs and gradients; a buffer's new value is copied after forward.

        A micro-batch adds its gradient up as soon as it is made.
        """
        if self.turns > 1 and use.result and use.result.role == "grad":
            return self.taken(use, producer)
        if use.result and self.leaves(use):
            return self.out(producer)
        if use.result:
            return min(self.forward_end + 1, self.end) if use.result.role == "mutation" else self.end
        return release[use.node]

    def leaves(self, use: Use) -> bool:
        """Whether a use is a gradient that goes out to where its parameter waits."""
        is_grad = use.result is not None and use.result.role == "grad"
        return is_grad and owner_of(self.program, use.result) in self.stowed  # type: ignore[arg-type]

    def owner(self, use: Use) -> int:
        """Of a gradient the position of its parameter in its class, else -1."""
        if use.result is None or use.result.role != "grad" or use.result.index >= 0:
            return -1
        return self.ranks[owner_of(self.program, use.result), 0]  # type: ignore[index]

    def out(self, producer: str) -> int:
        """The last moment at which a gradient that goes out is on the device: see passes/stow.py."""
        split = (self.forward_end + 1) // 2
        if self.late is None:
            self.late = borders([self.nodes[op] for op in self.ops[split:]])
        taken = [u.node for i in range(len(values(self.nodes[producer]))) for u in self.uses.get((producer, i), ()) if not u.result]
        at = [self.moment.get(op, 0) // 2 - split for op in (producer, *taken)]
        return min(2 * (split + gone(self.late, max(at[0], 0), max(0, *at))), self.end - 1)

    def consumer(self, use: Use) -> str:
        """The class whose choice says in which layout `use` wants its value."""
        if use.result is None:
            return self.class_of[use.node]
        key = (use.result.role, use.result.name, use.result.index)
        if key not in self.owners:
            owner = owner_of(self.program, use.result)
            self.owners[key] = RESULT if owner is None else self.class_of.get(owner, owner)
        return self.owners[key]

    def column(self, kind: Kind, gives: bool, position: int) -> np.ndarray:
        """The numbers of the specs that a kind takes or gives at one position, per strategy."""
        key = (kind.name, gives, position)
        if key not in self.columns:
            side = kind.gives if gives else kind.takes
            assert isinstance(side, Side)
            self.columns[key] = side.column(position, self.conversions)
        return self.columns[key]

    def wanted(self, use: Use, have: np.ndarray) -> np.ndarray:
        """Per strategy of the consumer's class the spec that `use` wants, of a value with the specs `have`."""
        kind = self.kinds[self.consumer(use)]
        if use.result is not None and kind.name == RESULT:
            return np.array([self.conversions.number(self.conversions.spec(int(have[0])).replicated)])
        return self.column(kind, use.result is not None, 0 if use.result else use.position)

    def producer(self, name: str) -> Kind:
        """The class that decides how a value lies."""
        return self.kinds[f"output.{self.ends[name].name}" if self.is_tangent(name) else self.class_of[name]]

    def folded(self) -> dict[tuple, list[tuple[str, int]]]:
        """Values that are alike: same producer class, same consumers."""
        groups: dict[tuple, list[tuple[str, int]]] = {}
        for (name, index), takers in self.uses.items():
            producer = self.producer(name).name
            into = tuple(
                (self.consumer(u), u.position if u.result is None else -1, u.phase, u.result.role if u.result else "") for u in takers
            )
            role = self.ends[name].role if name in self.ends else ""
            out = name in self.stowed, tuple(self.leaves(u) for u in takers)
            groups.setdefault((producer, role, index, into, (name, index) in self.again, out), []).append((name, index))
        return groups

    def value(self, group: Sequence[tuple[str, int]]) -> tuple[Value, tuple[Specs, Specs]]:
        name, index = group[0]
        takers, kind, convert = self.uses[name, index], self.producer(name), self.conversions
        gives = self.column(kind, True, index)
        sources, (state,) = distinct(convert, [gives])
        targets, states = distinct(convert, [self.wanted(u, gives) for u in takers])
        is_gradient = any(u.result is not None and u.result.role == "grad" for u in takers)
        dense = values(self.nodes[name])[index].is_contiguous()  # type: ignore[union-attr]
        bucket = BUCKET_BYTES if self.gradient_bytes > BUCKET_BYTES else None
        bucketed = any(is_bucketed(self.program, u, self.stowed) for u in takers)
        facts = {"dense": dense, "is_gradient": bucketed, "bucket_bytes": bucket, "turns": self.turns}
        same, seconds, need, left = tables(convert, sources, targets, **facts)
        if not self.cast_first.isdisjoint(group):
            seconds = np.where(convert.partial(sources)[:, None] & ~same, np.inf, seconds)
        consumers = tuple(
            Consumer(self.index[self.consumer(u)], s, BACKWARD if u.phase == "backward" else FORWARD)
            for u, s in zip(takers, states, strict=True)
        )
        produced = np.array([self.born(n) for n, _ in group])
        used = np.array([[self.taken(u, n) for u in self.uses[n, i]] for n, i in group])
        held = np.array([[self.end if self.is_tangent(n) else self.held(u, self.release, n) for u in self.uses[n, i]] for n, i in group])
        shape = (len(group), len(takers))
        owns = name in self.stowed or (not self.is_resident(name) and not self.is_view(name))
        value = Value(
            value_name(kind.name, index),
            self.index[kind.name],
            state,
            consumers,
            seconds,
            same,
            convert.partial(sources) | ((name, index) not in self.again),
            convert.local_bytes(sources) * owns,
            left,
            produced,
            used.reshape(shape),
            held.reshape(shape),
            "gradient" if is_gradient else "parameter" if name in self.stowed else "activation",
            need,
            tuple(self.ranks[pair] for pair in group),
            convert.partial(sources),
            self.gone(group),
            name in self.stowed,
            np.array([[self.owner(u) for u in self.uses[n, i]] for n, i in group]) if is_gradient else None,
        )
        return value, (Specs(convert, sources), Specs(convert, targets))

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

    def gone(self, group: Sequence[tuple[str, int]]) -> np.ndarray | None:
        """When each of these values is elsewhere, as passes/offload.py makes it."""
        if self.away.isdisjoint(group):
            return None
        split, out = (self.forward_end + 1) // 2, np.full((len(group), 2), -1)
        early, late = (borders([self.nodes[op] for op in ops]) for ops in (self.ops[:split], self.ops[split:]))
        for i, (name, index) in enumerate(group):
            at = [self.moment[u.node] // 2 for u in self.uses[name, index] if u.result is None]
            if (name, index) in self.away and max(at, default=0) >= split:
                made = self.moment[name] // 2
                leave = gone(early, made, max((m for m in at if m < split), default=made))
                come = back(late, min(m for m in at if m >= split) - split) + split
                out[i] = 2 * min(leave, split) + 1, 2 * come
        return out

    def borders(self) -> tuple[int, ...]:
        """The moments at which stretches of ops begin, forward and backward."""
        split = (self.forward_end + 1) // 2
        parts = ((self.ops[:split], 0), (self.ops[split:], split))
        return tuple(2 * (at + base) + 1 for ops, base in parts if ops for at in borders([self.nodes[op] for op in ops]))

    def node(self, kind: Kind, labels: tuple[str, ...], seconds: np.ndarray, resident: np.ndarray) -> Node:
        if kind.role != "op":
            return self.parameter(kind, Node(kind.name, labels, seconds, resident))
        again = not refusal(self.nodes[kind.members[0]])
        return Node(kind.name, labels, seconds, resident, tuple(self.moment[m] for m in kind.members), self.is_view(kind.members[0]), again)

    def is_view(self, name: str) -> bool:
        return self.view_kinds.get(self.class_of.get(name, ""), False)

    def resident(self, kind: Kind, trained: set[str], states: int) -> np.ndarray:
        """Bytes per strategy that always live: the class's parameters, buffers or inputs, with optimizer state."""
        total = np.zeros(len(kind.strategies), dtype=np.int64)
        if kind.role == "op":
            return total
        if kind.role == "result":  # those of the other micro-batches
            return total + self.joined[kind.name] * self.local(kind) if kind.name in self.joined else total
        copies = sum(1 + (states if member in trained else 0) for member in kind.members)
        return total + copies * self.local(kind) + self.sums(kind)

    def local(self, kind: Kind) -> np.ndarray:
        """Local bytes per strategy of a class at the program's ends."""
        return self.conversions.local_bytes(self.column(kind, True, 0))

    def sums(self, kind: Kind) -> np.ndarray | int:
        """Bytes per strategy of the gradients of all micro-batches so far."""
        trained = sum(member in self.trained for member in kind.members) if self.turns > 1 else 0
        return trained * self.local(kind) if trained else 0

    def parameter(self, kind: Kind, node: Node) -> Node:
        """With what of a class of parameters may wait elsewhere told apart."""
        if kind.role != "param":
            return node
        trained = [member for member in kind.members if member in self.trained]
        node = with_places(node, kind.members, trained, self.local(kind), self.states, self.parked, self.stowed)
        fixed = any(stays(self.turns, any(u.result for u in self.uses[member, 0])) for member in kind.members)
        return replace(node, size=None) if fixed else node


def _is_view(node: fx.Node) -> bool:
    return short_name(node) in FREE


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
    regather: frozenset[tuple[str, int]] | Sequence[str] = (),
    away: Collection[tuple[str, int]] = (),
    parked: Mapping[str, str] | None = None,
    stowed: Mapping[str, str] | None = None,
) -> Built:
    """The folded problem of a program on a mesh. Gradients of parameters are priced as they travel: in buckets.

    states: tensors of a parameter's size that the optimizer keeps. regather: what is converted again in backward, as a plan says it or
    as `regathered` found it in the program before it was rewritten. away: values that wait for backward elsewhere. parked: parameters
    whose optimizer state waits between steps elsewhere, and where; stowed: those that wait there themselves. Random costs replace the
    seconds of ops; pass conversions that were made with the same seed.
    """
    work = _Build(program, rules, conversions, inputs, regather, stowed)
    work.away, work.parked, work.states = frozenset(away), parked or {}, states
    work.trained = trained = trained_parameters(program)
    priced: dict[tuple, np.ndarray] = {}
    nodes = []
    for kind in work.kinds.values():
        labels = tuple(" ".join(s) for s in kind.strategies)
        seconds = np.zeros(len(labels))
        if kind.role == "op" and random_costs is not None:
            seconds = np.array([random_seconds(random_costs, kind.name, label) for label in labels])
        elif kind.role == "op":
            seconds = _priced(work.nodes[kind.members[0]], kind, mesh, priced)
        nodes.append(work.node(kind, labels, seconds * len(kind.members), work.resident(kind, trained, states)))
    made, specs, takers = [], [], []
    for group in work.folded().values():
        value, spec = work.value(group)
        made.append(value)
        specs.append(spec)
        takers.append(tuple(work.uses[group[0]]))
    at = mesh.device
    host = at.host_bandwidth_bytes_s, at.host_memory_bytes, at.disk_bandwidth_bytes_s, STATE_BUCKET_BYTES
    problem = Problem(tuple(nodes), tuple(made), work.end + 1, 0, limit_bytes, work.forward_end, work.borders(), *host)
    problem = replace(problem, turns=work.turns)
    order = tuple(work.ops[min(m // 2, len(work.ops) - 1)] if work.ops else "" for m in range(work.end + 1))
    kinds = tuple(work.kinds.values())
    sums = tuple(work.sums(kind) for kind in kinds) if work.turns > 1 else ()
    return Built(problem, kinds, tuple(specs), tuple(takers), order, work.nodes, work.forward_end, sums)


def _priced(node: fx.Node, kind: Kind, mesh: Mesh, cache: dict[tuple, np.ndarray]) -> np.ndarray:
    key = signature(node, kind.rule)
    if key not in cache:
        cache[key] = node_prices(node, kind.rule, kind.strategies, mesh)
    return cache[key]
