"""What a choice means, as plain rows: time, memory by category, collectives, and every class with its layouts. Rendering is the CLI's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..costs.comm import MESSAGES, Conversions, Move
from ..costs.compute import short_name
from ..costs.memory import lost
from ..ir.mesh import Device
from ..ir.plan import Cost, Memory, Plan
from ..ir.planrows import Collective, Replicated
from ..ir.program import Program, op_name
from ..ir.spec import Spec, local_bytes
from ..rules.algebra import Rule
from .build import Built
from .conversions import end_rules, needed_conversions, regathered
from .kinds import collect
from .micro import in_turns
from .problem import Choice, Item, conversions, evaluate, items, step_bytes


@dataclass(frozen=True)
class ClassRow:
    """One class of a plan: its members, strategy, and the layouts it takes and gives. role: "param", "op", "input", "result" …"""

    name: str
    role: str
    count: int
    choice: str
    takes: tuple[Spec, ...]
    gives: tuple[Spec | None, ...]
    device_bytes: int


@dataclass(frozen=True)
class ConversionRow:
    """Conversions that are alike: `count` of them from `source` to `target` by the moves of `path`, e.g. ("all_gather tp",)."""

    producer: str
    consumers: tuple[str, ...]
    phase: str
    source: Spec
    target: Spec
    path: tuple[str, ...]
    count: int
    bytes: int
    seconds: float


def cost_of(built: Built, choice: Choice, device: Device, waits_s: float = 0.0) -> Cost:
    """Seconds of a whole step by part and bytes by category of one choice; per micro-batch `waits_s` are spent waiting for transfers."""
    problem, turns = built.problem, built.problem.turns
    _, peak, moment = evaluate(problem, choice)
    compute_s = recompute_s = 0.0
    for kind, node, k in zip(built.kinds, problem.nodes, choice, strict=True):
        again = sum("again" in built.nodes[m].meta for m in kind.members)
        compute_s += float(node.seconds[k])
        recompute_s += float(node.seconds[k]) * again / max(len(kind.members), 1)
    compute_s -= recompute_s
    communication_s = sum(c.seconds for c in conversions(problem, choice))
    compute_s += 3 * summed_bytes(built, choice) / device.memory_bandwidth_bytes_s  # gradients are added up: two reads and a write
    held = memory_at(built, choice, moment).model_copy(update={"fragmentation": lost(peak, device)})
    return Cost(
        step_s=turns * (compute_s + recompute_s + communication_s + waits_s),
        compute_s=turns * compute_s,
        recompute_s=turns * recompute_s,
        transfer_s=turns * waits_s,
        communication_s=turns * communication_s,
        peak_bytes=peak + held.fragmentation,
        memory=held,
    )


def least_summing_s(built: Built, device: Device) -> float:
    """Seconds per micro-batch that adding up gradients takes under any choice."""
    return 3 * sum(int(np.min(sums)) for sums in built.sums) / device.memory_bandwidth_bytes_s


def summed_bytes(built: Built, choice: Choice) -> int:
    """Bytes of the gradients that micro-batches add up."""
    return sum(int(np.asarray(sums).reshape(-1)[k]) for sums, k in zip(built.sums, choice, strict=False) if np.ndim(sums))


def memory_at(built: Built, choice: Choice, moment: int) -> Memory:
    """Bytes of tensors alive at one moment by category; their sum is what `problem.profile` says.

    activations: made in forward and needed in backward. communication_buffers: what conversions pack, receive and join, gradients that
    lie in buckets, and copies of parameters that were gathered. transients: everything else that ops make.
    """
    total = dict.fromkeys(Memory.model_fields, 0)
    for kind, node, k in zip(built.kinds, built.problem.nodes, choice, strict=True):
        state = node.here * int(node.state[k]) if node.state is not None else 0
        role = {"input": "inputs", "seed": "inputs", "result": "transients"}.get(kind.role, "parameters")
        total[role] += int(node.resident[k]) - state
        total["optimizer"] += state
    total["gradients"] = summed_bytes(built, choice)
    total["parameters"] -= total["gradients"]
    last = built.problem.moments - 1
    total["optimizer"] += step_bytes(built.problem, choice) if moment == last else 0
    stored = _stored(built)
    for item in items(built.problem, choice):
        value = built.problem.values[item.value]
        staged = _staged(built, item, int(value.state[choice[value.node]]), stored[item.value])
        for start, end in zip(item.start.tolist(), item.end.tolist(), strict=True):
            if start <= moment <= end:
                name = "activations" if start <= built.forward_end < end else "transients"
                name = "parameters" if value.kind == "parameter" and item.target < 0 else name
                name = "gradients" if value.kind == "gradient" and end == last else name
                total[name] += item.bytes - staged
                total["communication_buffers"] += staged
    total["transients"] += built.problem.fixed_bytes
    return Memory(**total)


def _stored(built: Built) -> list[bool]:
    """Per value whether it is a parameter, a view of one, or one cast to another dtype: what of it is gathered is a buffer."""
    problem, taken = built.problem, dict[int, int]()  # what a view or a cast is of
    for v, value in enumerate(problem.values):
        for consumer in value.consumers:
            members = built.kinds[consumer.node].members
            if problem.nodes[consumer.node].view or (members and short_name(built.nodes[members[0]]) == "_to_copy"):
                taken.setdefault(consumer.node, v)

    def is_stored(v: int) -> bool:
        n = problem.values[v].node
        return built.kinds[n].role == "param" or (n in taken and taken[n] != v and is_stored(taken[n]))

    return [is_stored(v) for v in range(len(problem.values))]


def _staged(built: Built, item: Item, p: int, stored: bool) -> int:
    """Of an item's bytes those that are there for a collective alone."""
    if item.staging or item.target < 0:
        return item.bytes if item.staging else 0
    sources, targets = built.specs[item.value]
    sizes = sources.conversions.mesh.sizes  # type: ignore[attr-defined]
    whole = local_bytes(targets[item.target], sizes)
    if stored:  # a slice of it would be smaller
        return item.bytes if whole >= local_bytes(sources[p], sizes) else 0
    return item.bytes - whole if built.problem.values[item.value].kind == "gradient" else 0


def collectives_of(built: Built, choice: Choice, conv: Conversions) -> tuple[Collective, ...]:
    """All collectives by kind, axis and phase, from the paths of the chosen conversions. Slices, masks and recasts send nothing."""
    found: dict[tuple[str, int, str], list[float]] = {}
    turns = built.problem.turns
    late = {v for v, value in enumerate(built.problem.values) if value.kind == "gradient"}
    for c in conversions(built.problem, choice):
        sources, targets = built.specs[c.value]
        moves = conv.path(sources[c.p], targets[c.q])
        whole = sum(m.seconds for m in moves)
        scale = c.seconds / whole if whole else 0.0
        phase = "forward" if any(built.takers[c.value][t].phase == "forward" for t in c.consumers) else "backward"
        for m in moves:
            if m.kind in MESSAGES:
                row = found.setdefault((m.kind, m.axis, phase), [0, 0, 0.0])
                times = built.problem.values[c.value].count * (1 if c.value in late and m in _last(moves) else turns)
                row[0] += times
                row[1] += times * m.bytes
                row[2] += turns * m.seconds * scale
    names = conv.mesh.names
    return tuple(
        Collective(kind=kind, axis=names[axis], phase=phase, count=int(n), bytes=int(size), seconds=s)  # type: ignore[arg-type]
        for (kind, axis, phase), (n, size, s) in sorted(found.items(), key=lambda item: (item[0][2] != "forward", *item[0]))
    )


def _last(moves: Sequence[Move]) -> list[Move]:
    """The all-reduces that end a gradient's way: they come once, after the last micro-batch."""
    return list(itertools.takewhile(lambda m: m.kind in ("all_reduce", "recast"), reversed(moves)))


def replicated_of(built: Built, choice: Choice) -> tuple[Replicated, ...]:
    """Ops without a rule, by op and source line."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for kind, node, k in zip(built.kinds, built.problem.nodes, choice, strict=True):
        if kind.rule.known or kind.role != "op":
            continue
        for member in kind.members:
            where = built.nodes[member].meta.get("where", "") or ""
            row = found.setdefault((op_name(built.nodes[member]), where, kind.rule.why), [0, 0.0])
            row[0] += 1
            row[1] += built.problem.turns * float(node.seconds[k]) / len(kind.members)
    return tuple(Replicated(op=op, where=where, count=int(n), seconds=s, why=why) for (op, where, why), (n, s) in sorted(found.items()))


def class_rows(program: Program, rules: Mapping[str, Rule], plan: Plan) -> tuple[ClassRow, ...]:
    """Every class of the program under a plan, in program order."""
    program, rules = in_turns(program, rules, plan.micro_batches)
    out = []
    for kind in collect(program, rules, plan.sizes, plan.inputs).values():
        label = plan.choices.get(kind.name, " ".join(kind.strategies[0]))
        at = [" ".join(s) for s in kind.strategies].index(label)
        size = sum(local_bytes(s, plan.sizes) for s in kind.gives[at] if s is not None) * len(kind.members)
        out.append(ClassRow(kind.name, kind.role, len(kind.members), label, kind.takes[at], kind.gives[at], size))
    return tuple(out)


def conversion_rows(program: Program, rules: Mapping[str, Rule], plan: Plan) -> tuple[ConversionRow, ...]:
    """The conversions of a plan, those of repeated blocks together, most expensive first."""
    from .fold import classes
    from .parking import stowed
    from .solve import choices_to_strategies

    conv = Conversions(plan.links(), plan.random_costs)
    program, rules = in_turns(program, rules, plan.micro_batches)
    names = classes(program, {**end_rules(program, plan.inputs), **rules})
    rows: dict[tuple, list] = {}
    again, gone = regathered(program, names, plan.regather), stowed(program, plan.state, names)
    for need in needed_conversions(program, rules, choices_to_strategies(program, rules, plan), plan.sizes, again, gone):
        moves = [m for m in conv.path(need.source, need.target) if m.kind != "recast"]
        takers = tuple(names.get(u.node, f"{u.result.role}.{u.result.name}" if u.result else "") for u in need.uses)
        if any(u.result and u.result.role == "grad" for u in need.uses):
            takers = ("gradient",)
        key = (names[need.producer], takers, need.phase, need.source, need.target)
        row = rows.setdefault(key, [tuple(f"{m.kind} {conv.mesh.names[m.axis]}" for m in moves), 0, 0, 0.0])
        row[1] += 1
        row[2] += sum(m.bytes for m in moves)
        row[3] += conv.seconds(need.source, need.target, bucketed=need.is_gradient)
    made = [ConversionRow(*key, *row) for key, row in rows.items()]
    return tuple(sorted(made, key=lambda r: (-r.seconds, r.producer, r.consumers)))
