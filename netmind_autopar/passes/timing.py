"""A lowered program as events in time: what its ops, moves and transfers cost, and what each must wait for.

Prices are those of the planner: without overlap the events add up to `Plan.cost.step_s`. A collective may begin when the device has
come to where it is started and no other one is on its way along its axis; ops run on until something waits for it. Those of axes
that one link carries share its bandwidth. Copies to and from the host take their link's time, in both directions at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..costs.compute import node_prices
from ..costs.device import make_mesh
from ..costs.memory import optimizer_states
from ..costs.timeline import COMPUTE, Event, Timeline, simulate
from ..ir.mesh import Mesh
from ..ir.plan import Plan, streams_of
from ..ir.program import Program, is_getitem, source, tensor_args
from ..ir.spec import Spec, local_bytes
from ..rules.algebra import Rule
from ..runtime.collectives import BUCKETS, MOVES, STARTS, sender, wait
from ..runtime.offload import fetch, offload, prefetch, release, reload
from ..solver.build import random_seconds
from ..solver.parking import parked
from ..solver.sketch import IN, OUT, STATE
from .defer import FINISH
from .pipeline import Lowering, prepare, run_passes
from .schedule import is_collective


def plan_timeline(program: Program, rules: Mapping[str, Rule], plan: Plan, mesh: Mesh) -> Timeline:
    """One step of a plan on `mesh`, whose axes are the plan's. Raises what lowering raises."""
    prepared, context = prepare(program, rules, plan)
    return simulate(events(run_passes(prepared, context), prepared, context, mesh))


def with_timeline(program: Program, rules: Mapping[str, Rule], plan: Plan, mesh: Mesh) -> tuple[Plan, Timeline]:
    """The plan with `timeline_s` and `streams` of its cost filled in, and the timeline."""
    found = plan_timeline(program, rules, plan, mesh)
    cost = plan.cost.model_copy(update={"timeline_s": found.step_s, "streams": streams_of(found.busy, found.exposed)})
    return plan.model_copy(update={"cost": cost, "timeline_bound_s": min(plan.timeline_bound_s, found.step_s)}), found


def mesh_of(plan: Plan, cluster: str | None = None) -> Mesh:
    """The mesh that a plan was made for, by the name of its cluster or another one. Raises MeshError for an unknown name."""
    return make_mesh(",".join(f"{a.name}={a.size}" for a in plan.mesh), cluster or plan.cluster)


def events(lowered: Program, prepared: Program, context: Lowering, mesh: Mesh) -> list[Event]:
    """The events of a lowered program in the order in which a device is given them, all micro-batches one after the other.

    prepared: the program before the passes, with global shapes.
    """
    work = _Events(lowered, context, mesh, op_seconds(prepared, context, mesh))
    nodes = [n for n in lowered.graph.nodes if n.op == "call_function" and not is_getitem(n)]
    phases = {phase: [n for n in nodes if n.meta["phase"] == phase] for phase in ("forward", "backward", FINISH)}
    for _ in range(lowered.turns):
        for node in (*phases["forward"], *phases["backward"]):
            work.add(node)
        work.sums()
    for node in phases[FINISH]:
        work.add(node)
    work.state()
    return work.made


def op_seconds(prepared: Program, context: Lowering, mesh: Mesh) -> dict[str, float]:
    """Seconds of every op by node name, under its strategy: as solver/build.py has them."""
    random_costs, known = context.plan.random_costs, {}
    out: dict[str, float] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_function" or is_getitem(node):
            continue
        name, strategy = context.names[node.name], context.strategies[node.name]
        if name not in known:
            if random_costs is not None:
                known[name] = random_seconds(random_costs, name, " ".join(strategy))
            else:
                known[name] = float(node_prices(node, context.rules[node.name], (strategy,), mesh)[0])
        out[node.name] = known[name]
    return out


@dataclass
class _Events:
    """The events so far. before: those that must be over before the device is given the next op; at: the event of a node."""

    lowered: Program
    context: Lowering
    mesh: Mesh
    seconds: Mapping[str, float]
    made: list[Event] = field(default_factory=list)
    before: tuple[int, ...] = ()
    at: dict[fx.Node, int] = field(default_factory=dict)

    def add(self, node: fx.Node) -> None:
        """The events of one op."""
        target = node.target
        if target is wait:
            self._wait_for(sender(node))
        elif is_collective(node, self.context.sizes) or target in STARTS:
            axis = self.mesh.axes[node.args[1] if target in BUCKETS else node.args[2]]  # type: ignore[index, call-overload]
            seconds = float(node.meta["seconds"])  # type: ignore[arg-type]
            if axis.hideable < 1:
                self._event(node, COMPUTE, seconds * (1 - axis.hideable))
            self._event(node, axis.name, seconds * axis.hideable, axis.link, float(node.meta["transfer"]) * axis.hideable)  # type: ignore[arg-type]
            if target not in STARTS:
                self._wait_for(node)
        elif target in (offload, prefetch, fetch):
            self._event(node, OUT if target is offload else IN, self._bytes(node) * self._link_s(self._tier(node)))
        elif target in (release, reload):
            self._wait_for(node.args[0])
        else:
            seconds = float(node.meta["seconds"]) if target in MOVES else self.seconds.get(node.name, 0.0)  # dense: priced with its op
            if seconds:
                self._event(node, COMPUTE, seconds)

    def sums(self) -> None:
        """A micro-batch adds its gradients up: two reads and a write."""
        if self.lowered.micro is not None:
            ends = tensor_args(next(n for n in self.lowered.graph.nodes if n.op == "output"))
            pairs = zip(ends, self.lowered.outputs, self.lowered.expects["output"], strict=True)
            size = sum(local_bytes(self._unreduced(n, spec), self.context.sizes) for n, o, spec in pairs if o.role == "grad")
            self._compute("add gradients up", 3 * size / self.mesh.device.memory_bandwidth_bytes_s, "backward")

    def _unreduced(self, node: fx.Node, spec: Spec) -> Spec:
        """How a gradient lies that is added up before it is reduced."""
        made = source(node)[0]
        return self.lowered.expects[sender(made).name][0] if made.meta.get("phase") == FINISH else spec

    def state(self) -> None:
        """What waits elsewhere travels while the optimizer steps, and nothing hides that: state back and forth, of parameters that wait
        elsewhere themselves all but the new gradient."""
        plan, ends = self.context.plan, self.lowered.placeholders()
        states = optimizer_states(plan.optimizer)
        away = parked(self.lowered, plan.state, {name: self.context.names[name] for name in ends if name in self.context.names})
        trained = {self.lowered.owner(o).node for o in self.lowered.outputs if o.role == "grad"}
        times = dict.fromkeys(away, 2 * states) | {name: 2 * states + 3 for name in self.context.stowed if name in trained}
        tiers = {**away, **self.context.stowed}
        for tier in ("host", "disk"):
            specs = [(self.lowered.specs[name], n) for name, n in times.items() if tiers[name] == tier]
            size = sum(n * local_bytes(s, self.context.sizes) for s, n in specs if isinstance(s, Spec))
            if size:
                self._append(Event(f"optimizer state, {tier}", STATE, size * self._link_s(tier), self._last(), "transfer", "", "", size))

    def _event(self, node: fx.Node, stream: str, seconds: float, link: str = "", transfer_s: float = 0.0) -> None:
        kind = str(node.args[1]) if node.target in MOVES else "all_reduce" if node.target in BUCKETS else ""
        facts = {"phase": node.meta.get("phase", ""), "where": node.meta.get("where") or "", "kind": kind}
        size = self._bytes(node) if stream in (OUT, IN) else 0
        self.at[node] = self._append(Event(node.name, stream, seconds, self.before, bytes=size, link=link, transfer_s=transfer_s, **facts))

    def _compute(self, name: str, seconds: float, phase: str) -> None:
        self._append(Event(name, COMPUTE, seconds, self.before, phase=phase))

    def _append(self, event: Event) -> int:
        self.made.append(event)
        if event.stream == COMPUTE:
            self.before = (len(self.made) - 1,)
        return len(self.made) - 1

    def _wait_for(self, node: Any) -> None:
        self.before = (*self.before, self.at[node])

    def _last(self) -> tuple[int, ...]:
        last: dict[str, int] = {}
        for i, event in enumerate(self.made):
            last[event.stream] = i
        return tuple(sorted(last.values()))

    def _bytes(self, node: fx.Node) -> int:
        spec = self.lowered.specs[node.name]
        assert isinstance(spec, Spec)
        return local_bytes(spec, self.context.sizes)

    def _tier(self, node: fx.Node) -> str:
        away: Any = node
        while away.target not in (offload, fetch):
            away = away.args[0]
        return str(away.args[1])

    def _link_s(self, tier: str) -> float:
        """Seconds per byte over the host's link, and for the disk from there on."""
        device = self.mesh.device
        return 1.0 / device.host_bandwidth_bytes_s + (1.0 / device.disk_bandwidth_bytes_s if tier == "disk" else 0.0)
