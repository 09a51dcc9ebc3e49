"""The whole story: capture, bind rules, solve, lower, emit, run. Everything else is detail."""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .arguments import check_model, fusing, mesh_or_devices, parse_memory, running_mesh
from .costs.device import default_cluster, make_mesh
from .costs.timeline import Timeline
from .ir import flags
from .ir.collector import collector_off
from .ir.errors import InputError, UnknownOpError
from .ir.mesh import Mesh
from .ir.plan import Plan
from .ir.precision import Precision, agreed
from .ir.program import Program, op_name
from .passes.emit import emit
from .passes.pipeline import lower
from .passes.timing import mesh_of, plan_timeline, with_timeline
from .rules.algebra import Rule
from .rules.bind import bind_program, learnt_rules, unlisted
from .rules.call import call_of
from .rules.learnt import share
from .runtime.agree import all_alike, from_rank_zero, together
from .runtime.alike import compare_every
from .runtime.executable import Executable, Variant
from .runtime.module import ParallelModule
from .sight import planner
from .solver.baselines import solve_baseline
from .solver.batches import solve_batches
from .solver.conversions import end_rules
from .solver.fold import classes
from .solver.meshes import Devices, search_meshes
from .solver.micro import in_turns
from .solver.parking import parked, stowed
from .solver.pins import Pin
from .solver.recipes import Baseline
from .tracer.capture import capture
from .tracer.fusion import fused_rows
from .tracer.hash import graph_hash
from .tracer.inductor import compiler_for
from .tracer.torch_private import peak_of

Progress = Callable[[str], None]
Asked = str | Mapping[str, Any] | Precision | None


@collector_off()
def plan(
    model: nn.Module,
    sample_inputs: Any,
    mesh: str | Mesh | DeviceMesh | None = None,
    *,
    devices: int | None = None,
    cluster: str | None = None,
    memory: str | int | None = None,
    optimizer: str = "adamw",
    pins: Mapping[str, Pin] | None = None,
    forbid: Mapping[str, Pin] | None = None,
    baseline: Baseline | None = None,
    checkpoint: bool = False,
    micro_batches: int | None = None,
    inputs: Literal["global", "local"] = "global",
    outputs: Sequence[str] | Literal["global"] | None = None,
    differentiable: Sequence[str] | None = None,
    mode: Literal["training", "inference"] = "training",
    precision: Asked = None,
    random_costs: int | None = None,
    time_limit: float = 60.0,
    gap: float = 1e-4,
    offload: bool = False,
    overlap: bool = True,
    fuse: bool | Literal["auto"] = "auto",
    strict: bool = False,
    timeline: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Decide how `model` runs on `mesh`; needs no process group, no accelerator and no weights.

    sample_inputs: a tensor, tuple or dict of tensors with global shapes. mesh: "dp=4,tp=8", a DeviceMesh or a Mesh. devices: instead of
    a mesh, so many devices of the cluster on the best mesh; `Plan.alternatives` lists the others. cluster: a preset or a profile
    file; the present machine when None. memory: bytes or "70GiB" per device; the device's own when None. pins: {"lm_head.weight":
    "S(0)"} fixes parameters, forbid: placements that they must not have. baseline: "fsdp+megatron-tp" plans by these recipes
    (docs/baselines.md), checkpoint: and runs every block again in backward. micro_batches: how many the step is made of, run one
    after the other with gradients added up; None: one, unless more fit where it does not, or are faster. outputs: names to keep, all
    when None. mode: "inference" plans forward alone. precision: "bf16", "fp16" or a policy (docs/precision.md); as the model is when
    None. offload: activations, parameters and optimizer state may wait in host memory
    or on disk (docs/offload.md).
    overlap: collectives travel beside compute, and the plan with the shortest timeline is taken (docs/timeline.md); False runs each where
    it is needed, and the sum counts. fuse: fused ops in the places of what they compute (docs/fusion.md); "auto": where they were timed.
    random_costs: a seed; prices are then drawn, which makes plans odd but no less exact. strict: an op without a rule is an error.
    timeline: simulate the step on the lowered program, op by op, instead of sketching it for `Plan.cost.timeline_s`.
    Raises errors from `netmind_autopar.ir.errors`, InfeasibleError among them when nothing fits.
    """
    say = progress or (lambda _: None)
    start = time.process_time()
    where = mesh_or_devices(mesh, devices, cluster)
    say("capturing the model")
    tracing = {"mode": mode, "fuse": fusing(fuse), "precision": Precision.of(precision)}
    program = _capture(model, sample_inputs, outputs, differentiable, tracing)
    options: dict[str, Any] = {"memory": memory, "optimizer": optimizer, "pins": pins, "forbid": forbid, "inputs": inputs}
    options |= {"baseline": baseline, "checkpoint": checkpoint, "micro_batches": micro_batches, "offload": offload, "strict": strict}
    options |= {"random_costs": random_costs, "time_limit": time_limit, "gap": gap, "overlap": overlap}
    found = plan_program(program, where, say, timeline=timeline, **options)
    _warn_of_replicated(found)
    return found.timed(time.process_time() - start)


def autoparallelize(
    model: nn.Module,
    sample_inputs: Any,
    device_mesh: DeviceMesh | str,
    *,
    plan: Plan | None = None,
    cluster: str | None = None,
    memory: str | int | None = None,
    optimizer: str = "adamw",
    pins: Mapping[str, Pin] | None = None,
    forbid: Mapping[str, Pin] | None = None,
    baseline: Baseline | None = None,
    micro_batches: int | None = None,
    inputs: Literal["global", "local"] = "global",
    outputs: Sequence[str] | Literal["global"] | None = None,
    differentiable: Sequence[str] | None = None,
    mode: Literal["training", "inference"] = "training",
    precision: Asked = None,
    random_costs: int | None = None,
    time_limit: float = 60.0,
    gap: float = 1e-4,
    offload: bool = False,
    overlap: bool = True,
    fuse: bool | Literal["auto"] = "auto",
    strict: bool = False,
    strict_shapes: bool = False,
    compile: bool = False,
    weights: str | os.PathLike[str] | None = None,
    init: Callable[[nn.Module], object] | None = None,
    timeout_s: float | None = 30.0,
    check_every: int = 0,
) -> ParallelModule:
    """The same model running on every device of `device_mesh`; call it on every rank. Options as in `plan`.

    plan: run this plan instead of searching one. outputs="global" gathers every output at once. strict_shapes: refuse calls of another
    shape or mode, which are planned when they are first seen otherwise (docs/training.md).
    compile: Inductor compiles what stands between two collectives, on first use (docs/execution.md).
    weights: a folder or file of safetensors, of which every rank reads its own slices. init: called with every module of a model on the
    meta device; without either such a model is initialised by its own `_init_weights` or `reset_parameters` (docs/checkpoints.md).
    timeout_s: how long ranks wait in a collective for one that does not come, before all end with an error that names it; None: nobody
    watches. check_every: every so many steps batch, loss and parameters are compared where ranks must have the same (docs/failures.md).
    Rank 0 plans and all ranks check that they captured the same graph. The model is not touched.
    Raises what `plan` raises, MeshError when mesh and processes do not fit, PlanError when the plan belongs to another model or mesh.
    """
    torch_mesh = running_mesh(device_mesh, plan, timeout_s)
    options: dict[str, Any] = {"memory": memory, "optimizer": optimizer, "inputs": inputs, "offload": offload, "strict": strict}
    options |= {"random_costs": random_costs, "time_limit": time_limit, "gap": gap, "overlap": overlap}
    mesh = make_mesh(torch_mesh, cluster or default_cluster())
    tracing = {"fuse": plan.fuse if plan else fusing(fuse)}
    tracing["precision"] = agreed(precision, plan.precision) if plan else Precision.of(precision)  # type: ignore[assignment]
    compiler = compiler_for(torch_mesh.device_type) if compile else None
    alike = _Alike(mesh, outputs, differentiable, tracing, options, compiler is not None)
    program = alike.capture(model, sample_inputs, mode, differentiable)
    found = alike.decide(program, plan, pins=pins, forbid=forbid, baseline=baseline, micro_batches=micro_batches)
    executable = alike.compile(program, found, model.training)
    later = None if strict_shapes else planner(model, alike.capture, alike.decide, alike.compile)
    made: dict[str, Any] = {"gather_outputs": outputs == "global", "weights": weights, "init": init, "planner": later}
    pm = ParallelModule(executable, model, found, torch_mesh, **made, peak_of=peak_of, compiler=compiler)
    compare_every(pm, check_every)
    return pm


@dataclass(frozen=True)
class _Alike:
    """What all ranks do together, with the options of `autoparallelize`: every rank gets the same, or the same error."""

    mesh: Mesh
    outputs: Sequence[str] | str | None
    differentiable: Sequence[str] | None
    tracing: Mapping[str, Any]
    options: Mapping[str, Any]
    regions: bool = False

    def capture(self, model: nn.Module, sample_inputs: Any, mode: str, differentiable: Sequence[str] | None = None) -> Program:
        wanted = differentiable if mode == "inference" else self.differentiable
        tracing = {**self.tracing, "mode": mode}
        program: Program = together(lambda: _capture(model, sample_inputs, self.outputs, wanted, tracing), "capture")  # type: ignore[assignment]
        all_alike(
            "the captured graph",
            graph_hash(program),
            why="every rank must build the same model and sample inputs",
            try_="seed and configure all ranks alike",
        )
        return program

    def decide(self, program: Program, plan: Plan | None = None, **more: Any) -> Plan:
        """`plan`, or what rank 0 finds."""

        def made() -> str:
            found = plan_program(program, self.mesh, lambda _: None, **self.options, **more)
            _warn_of_replicated(found)
            return found.dumps()

        _share_rules(program)
        return Plan.loads(from_rank_zero(plan.dumps if plan else made))

    def compile(self, program: Program, found: Plan, training: bool) -> Executable:
        all_alike("the plan", found.hash(), why="all ranks must run one plan", try_="pass the same plan on every rank")
        made = functools.partial(compile_plan, program, found, training=training, regions=self.regions)
        return together(made, "emission")  # type: ignore[return-value]


def compile_plan(program: Program, plan: Plan, *, training: bool, regions: bool = False) -> Executable:
    """Lower and emit, with regions for a compiler. Raises PlanError when the plan was made for another program."""
    lowered = lower_plan(program, plan)
    source = emit(lowered, plan, inference=program.mode == "inference", regions=regions)
    flags.debug(4, source)
    flags.dump("lowered.txt", lambda: str(lowered.graph))
    flags.dump("emitted.py", lambda: source)

    def variant(kind: Variant) -> str:
        if kind == "inference":
            return emit(lowered, plan, inference=True, regions=regions)
        return emit(lower(program, bind_program(program), plan, kind), plan, gradients=kind, regions=regions)

    state, stays = parked_parameters(program, plan)
    return Executable.of(lowered, source, variant, training=training, parked=state, stowed=stays)


def parked_parameters(program: Program, plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """The names of parameters whose optimizer state waits between steps elsewhere, and where: "host" or "disk". And of those that wait
    there themselves."""
    if not plan.state:
        return {}, {}
    names = classes(program, {**end_rules(program, plan.inputs), **bind_program(program)})
    found = [f(program, plan.state, names) for f in (parked, stowed)]
    return tuple({item.name: f[item.node] for item in program.inputs if item.node in f} for f in found)  # type: ignore[return-value]


def step_timeline(model: nn.Module, sample_inputs: Any, plan: Plan, *, cluster: str | None = None, **capturing: Any) -> Timeline:
    """What runs when in a step of a plan: see costs/timeline.py; `costs.timeline.trace` writes it for Perfetto.

    cluster: whose prices count, the plan's own when None. capturing: `outputs` and `differentiable` as they were for the plan.
    """
    program = capture(check_model(model), sample_inputs, mode=plan.mode, fuse=plan.fuse, precision=plan.precision, **capturing)
    return plan_timeline(program, bind_program(program), plan, mesh_of(plan, cluster))


def lower_plan(program: Program, plan: Plan) -> Program:
    """The program of one device, rank-symbolic."""
    return lower(program, bind_program(program), plan)


def _capture(
    model: nn.Module,
    sample_inputs: Any,
    outputs: Sequence[str] | str | None,
    differentiable: Sequence[str] | None,
    tracing: Mapping[str, Any],
) -> Program:
    kept = None if outputs is None or outputs == "global" else tuple(outputs)
    wanted = tuple(differentiable) if differentiable else None
    return capture(check_model(model), sample_inputs, outputs=kept, differentiable=wanted, **tracing)


@collector_off()
def plan_program(
    program: Program,
    where: Mesh | Devices,
    say: Progress,
    *,
    memory: str | int | None = None,
    baseline: Baseline | None = None,
    checkpoint: bool = False,
    micro_batches: int | None = None,
    strict: bool = False,
    timeline: bool = False,
    time_limit: float = 60.0,
    **options: Any,
) -> Plan:
    """`plan` for a model that is captured already; options as there. `say` hears what is being done."""
    say("reading the sharding rules")
    rules = bind_program(program)
    if strict:
        _refuse_unknown(program, rules)
    if checkpoint and baseline is None:
        raise InputError(
            "checkpoint=True without a baseline",
            why="a plan that is searched freely recomputes what memory asks for, op by op",
            try_='drop it, or name a baseline="fsdp"',
        )
    known = {"graph_hash": graph_hash(program), "memory_limit": parse_memory(memory), **options}

    def decide(mesh: Mesh, seconds: float) -> Plan:
        if baseline is not None:
            fixed = {key: value for key, value in known.items() if key != "offload"}
            turns = in_turns(program, rules, micro_batches or 1)
            return solve_baseline(*turns, mesh, baseline, checkpoint=checkpoint, cluster=mesh.cluster, time_limit=seconds, **fixed)
        return solve_batches(program, rules, mesh, micro_batches, say, cluster=mesh.cluster, time_limit=seconds, **known)

    if isinstance(where, Devices):
        shared = {k: options[k] for k in ("optimizer", "inputs", "random_costs", "gap") if k in options}
        found = search_meshes(program, rules, where, decide, time_limit=time_limit, bounds=baseline is None, say=say, **shared)
    else:
        say("choosing shardings")
        found = decide(where, time_limit)
    found = found.model_copy(update={"fuse": program.fused, "fusions": fused_rows(program), "precision": program.precision})
    if timeline:
        say("simulating the step")
        mesh = where if isinstance(where, Mesh) else mesh_of(found)
        found = with_timeline(program, rules, found, mesh)[0].timed(found.solve_s).beside(found.alternatives)
    if flags.debug_level():
        flags.debug(1, found.dumps())
        flags.debug(2, "\n".join([str(found.cost), *map(str, found.collectives), *map(str, found.replicated)]))
    flags.dump("graph.txt", lambda: str(program.graph))
    flags.dump("plan.json", found.dumps)
    return found


def _share_rules(program: Program) -> None:
    """What rank 0 finds out about ops without a row is what every rank uses; rules given by hand must be the same everywhere."""
    nodes = unlisted(program)
    if not nodes:
        return
    share(map(call_of, nodes), from_rank_zero)
    all_alike(
        "the rule of an op",
        str(together(lambda: learnt_rules(program))),
        why="every rank must know the same rules",
        try_="call register_rule alike on every rank",
    )


def _warn_of_replicated(found: Plan) -> None:
    """One warning for the operations that no device shares: what they cost, and what helps."""
    if not found.replicated or found.random_costs is not None:
        return
    rows = sorted(found.replicated, key=lambda r: (-r.seconds, r.op, r.where))
    total = sum(r.seconds for r in rows)
    lines = [f"{len(rows)} operation{'s' * (len(rows) > 1)} without a sharding rule run whole on every device"]
    lines[0] += f": {_cost(total, found)} of the predicted step"
    for r in rows[:5]:
        lines.append(f"  {r.op}: {_cost(r.seconds, found)}  {r.where}" + (f"\n    {r.why}" if r.why else ""))
    lines += [f"  … and {len(rows) - 5} more in Plan.replicated"] * (len(rows) > 5)
    name = rows[0].op.removesuffix(".default").replace(".", "::", 1)
    lines.append(f'  if one can be split, say how: netmind_autopar.register_rule("{name}", "b d, d -> b d")')
    warnings.warn("\n".join(lines), UserWarning, stacklevel=3)


def _cost(seconds: float, plan: Plan) -> str:
    share = seconds / plan.cost.step_s if plan.cost.step_s else 0.0
    return f"{seconds * 1e3:.3g} ms, {share:.1%}"


def _refuse_unknown(program: Program, rules: Mapping[str, Rule]) -> None:
    for node in program.graph.nodes:
        if node.name in rules and not rules[node.name].known:
            raise UnknownOpError(
                f"no sharding rule for {op_name(node)}",
                where=node.meta.get("where", ""),
                why="strict=True, and an op without a rule runs whole on every device",
                try_="drop strict=True, or say how it splits: netmind_autopar.register_rule(op, rule)",
            )
