"""Program, rules and mesh in; a proven plan out. And back: from a plan to one strategy per node."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from ..costs.comm import Conversions
from ..costs.memory import lost, optimizer_states, room
from ..ir.errors import InfeasibleError, PlanError, SolverError
from ..ir.mesh import Mesh
from ..ir.plan import Plan, PlanAxis, PlanDevice, streams_of
from ..ir.program import Program
from ..rules.algebra import Rule, Strategy, is_legal, strategies
from ..tracer.hash import graph_hash as hash_of
from . import milp
from .build import Built
from .conversions import end_rules
from .explain import collectives_of, cost_of, least_summing_s, replicated_of
from .fold import classes
from .memory import largest
from .overlap import Beside, choose, least_beside_s
from .pins import Pin, pinned
from .presolve import Kept
from .problem import Choice, evaluate
from .saving.decide import Decision, Task, within
from .saving.remedy import remedies
from .search import solve_problem
from .shard import Solution

REMEDY_S = 15.0  # seconds that are spent on what would fit, when nothing does


def solve(
    program: Program,
    rules: Mapping[str, Rule],
    mesh: Mesh,
    *,
    graph_hash: str,
    cluster: str = "custom",
    memory_limit: int | None = None,
    optimizer: str = "adamw",
    pins: Mapping[str, Pin] | None = None,
    forbid: Mapping[str, Pin] | None = None,
    inputs: Literal["global", "local"] = "global",
    random_costs: int | None = None,
    time_limit: float = 60.0,
    gap: float = 1e-4,
    offload: bool = False,
    overlap: bool = True,
    advise: bool = True,
) -> Plan:
    """The cheapest plan that fits: the one with the shortest timeline that is found, from the one with the least sum on (overlap.py).

    memory_limit: bytes per device, the device's own memory when None. pins: parameter name -> placements: "S(0)" (on every axis),
    "R S(0)" or ("R", "S(0)") (one per axis) or {"tp": "S(0)"} (other axes free). forbid: parameter name -> placements that it must
    not have: "S(0)" or ("S(0)", "S(1)") (on any axis) or {"tp": "S(0)"} (on this one). random_costs: a seed for random prices.
    offload: activations, parameters and optimizer state may wait in host memory or on disk. overlap: collectives travel beside compute;
    without it, and with random costs, the sum of all work is what counts. time_limit: seconds for the solver, after which the best plan
    found is returned as "feasible" with its true gap. gap: relative.
    advise: what would fit is looked for when nothing does.
    Raises InputError (pins, optimizer), InfeasibleError (nothing fits), SolverError (nothing found in time).
    """
    start, clock = time.process_time(), time.monotonic()
    limit = mesh.device.memory_bytes if memory_limit is None else memory_limit
    most = room(limit, mesh.device)  # of tensors
    states = optimizer_states(optimizer)
    conversions = Conversions(mesh, random_costs)
    task = Task(program, rules, mesh, conversions, inputs, states, offload)
    built = task.build()
    free = built.problem
    allowed = pinned(program, built, mesh, pins or {}, forbid or {})
    found = solve_problem(built.problem, allowed=allowed, time_limit=time_limit, gap=gap, wish=most)
    saving = Decision(built, found)
    if found.choice is not None and evaluate(built.problem, found.choice)[1] > most:
        left = max(time_limit - (time.monotonic() - clock), 1.0)
        saving = within(task, built, found, most, allowed=allowed, time_limit=left, gap=gap)
        built, found = saving.built, saving.solution
    if found.choice is None or found.seconds == math.inf:
        others = remedies(task, most, allowed=allowed, time_limit=REMEDY_S) if found.choice and advise else []
        raise _refusal(built, found, limit, bool(pins or forbid), others, (task, allowed))
    beside = None
    if overlap and random_costs is None:
        bound_s = least_beside_s(free, allowed)
        left = max(time_limit - (time.monotonic() - clock), 1.0)
        more = {"allowed": allowed, "offload": saving.offload, "byte_s": saving.byte_worth_s}
        more |= {"bound_s": bound_s, "deadline": time.monotonic() + left}
        beside = choose(built, found.choice, conversions, most, **more)  # type: ignore[arg-type]
    file = {"graph_hash": graph_hash, "cluster": cluster, "limit": limit, "optimizer": optimizer, "inputs": inputs, "overlap": overlap}
    plan = assemble(program, saving, mesh, conversions, beside, **file)  # type: ignore[arg-type]
    return plan.timed(time.process_time() - start)


def assemble(
    program: Program,
    saving: Decision,
    mesh: Mesh,
    conversions: Conversions,
    beside: Beside | None = None,
    *,
    graph_hash: str,
    cluster: str,
    limit: int | None,
    optimizer: str,
    inputs: Literal["global", "local"],
    overlap: bool = True,
) -> Plan:
    """The plan file of a solution: choices, their cost, and what was proven about them. beside: the choice by the timeline."""
    built, found = saving.built, saving.solution
    assert found.choice is not None
    cost = cost_of(built, found.choice, mesh.device, saving.waits_s)
    least, choice, timeline_bound = cost.step_s, found.choice, 0.0
    bound = max(0.0, min(program.turns * (found.bound + least_summing_s(built, mesh.device)), least))
    if beside is not None:
        choice, shown = beside.choice, beside.sketch
        cost = cost_of(built, choice, mesh.device, saving.waits_s)
        cost = cost.model_copy(update={"timeline_s": shown.step_s, "streams": streams_of(shown.busy, shown.exposed)})
        timeline_bound = min(max(program.turns * beside.bound_s, bound / (1 + len(shown.exposed))), shown.step_s)
    choices = {k.name: label for k, label in zip(built.kinds, _labels(built, choice), strict=True) if len(k.strategies) > 1}
    return Plan(
        graph_hash=graph_hash,
        mode=program.mode,  # type: ignore[arg-type]
        cluster=cluster,
        memory_limit_bytes=limit,
        optimizer=optimizer,
        inputs=inputs,
        choices=choices,
        micro_batches=program.turns,
        recompute=saving.recompute,
        regather=saving.regather,
        offload=saving.offload,
        state=saving.state,
        cost=cost,
        mesh=tuple(PlanAxis.of(a) for a in mesh.axes),
        device=PlanDevice(memory_bandwidth_bytes_s=mesh.device.memory_bandwidth_bytes_s, launch_s=mesh.device.launch_s),
        collectives=collectives_of(built, choice, conversions),
        replicated=replicated_of(built, choice),
        gib_worth_s=program.turns * saving.byte_worth_s * 2**30 / (1 + mesh.device.fragmentation),
        bound_s=bound,
        gap=(least - bound) / least if least else 0.0,
        least_sum_s=least,
        timeline_bound_s=timeline_bound,
        status="optimal" if found.status == milp.OPTIMAL else "feasible",
        solver=milp.solver_name(),
        random_costs=conversions.random_costs,
        overlap=overlap,
    )


def _labels(built: Built, choice: Choice) -> list[str]:
    return [node.labels[k] for node, k in zip(built.problem.nodes, choice, strict=True)]


def advised(error: InfeasibleError, limit: int) -> InfeasibleError:
    """The refusal of a solve that was not to advise, with what would fit."""
    if isinstance(error, NothingFits):
        task, allowed = error.task
        found = remedies(task, room(limit, task.mesh.device), allowed=allowed, time_limit=REMEDY_S)
        return InfeasibleError(error.what, where=error.where, why=error.why, try_="; ".join((*found, error.try_)))
    return error


class NothingFits(InfeasibleError):
    """need_bytes: the least peak that was found. task: what was asked, and the strategies that pins leave."""

    def __init__(self, what: str, *, need_bytes: int, task: tuple[Task, Kept | None], **more: str) -> None:
        super().__init__(what, **more)
        self.need_bytes, self.task = need_bytes, task


def _refusal(
    built: Built, found: Solution, limit: int, pinned: bool, others: Sequence[str], task: tuple[Task, Kept | None]
) -> InfeasibleError | SolverError:
    """Why there is no plan: what is needed, what there is, the largest tensors, and the smallest limit that works."""
    if found.choice is None:
        if found.status == milp.UNKNOWN:
            return SolverError("no plan was found in time", why="the solver stopped at its time limit", try_="raise time_limit")
        return InfeasibleError(
            "no plan satisfies all constraints",
            where="pins=" if pinned else "",
            why="some op has no strategy that agrees with its neighbours",
            try_="drop a pin" if pinned else "report this model",
        )
    _, tensors, moment = evaluate(built.problem, found.choice)
    device = task[0].mesh.device
    need, known = tensors + lost(tensors, device), found.least_bytes + lost(found.least_bytes, device)
    node = built.nodes.get(built.order[moment])
    most = ", ".join(f"{name} {_size(size)}" for name, size in largest(built.problem, found.choice, moment))
    proven = "" if known >= 0.99 * need else f"; proven is only that {_size(known)} are" if known else ""
    proven = proven and f" (the least that was found{proven})" if known else " (the least that was found)"
    return NothingFits(
        f"no plan fits into {limit} bytes ({_size(limit)}) per device: {need} bytes ({_size(need)}) are needed{proven}",
        where=(node.meta.get("where") or node.name) if node is not None else "",
        why=f"the largest tensors on one device there: {most}",
        try_="; ".join((f"a limit of {need} bytes or more", *others, "a smaller batch, more devices, or an optimizer with less state")),
        need_bytes=need,
        task=task,
    )


def _size(n: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"


def choices_to_strategies(program: Program, rules: Mapping[str, Rule], plan: Plan) -> dict[str, Strategy]:
    """One strategy per placeholder, constant and op by node name, and per result as `output.<path>`.

    Raises PlanError when the plan was made for another program, or names classes or symbols that this one does not have.
    """
    if plan.mode != program.mode:
        raise PlanError(
            f"the plan was made for {plan.mode}, and the model was captured for {program.mode}",
            where=f"mode {plan.mode}",
            why="inference has a graph of its own: forward alone, with no gradients to keep anything for",
            try_=f'mode="{plan.mode}", or plan again with mode="{program.mode}"',
        )
    found = hash_of(program)
    if found != plan.graph_hash:
        raise PlanError(
            "the plan belongs to another model or to other input shapes",
            where=f"graph_hash {plan.graph_hash}",
            why=f"this model's graph has the hash {found}",
            try_="plan again for this model",
        )
    rules = {**end_rules(program, plan.inputs), **rules}
    names = classes(program, rules)
    names |= {f"output.{o.name}": f"output.{o.name}" for o in program.outputs if o.role == "output"}
    ends = program.placeholders()
    out: dict[str, Strategy] = {}
    chosen: dict[str, Strategy] = {}
    for node, name in names.items():
        key = f"output.{ends[node].name}" if node in ends and ends[node].role == "tangent" else node
        if name not in chosen:
            chosen[name] = _chosen(plan, name, rules[key])
        out[node] = chosen[name]
    if extra := sorted(plan.choices.keys() - chosen.keys()):
        raise PlanError(
            f"the plan decides {extra[0]!r}, which this model does not have",
            where=f"choices: {extra[0]}",
            try_="undo the edit, or plan again",
        )
    return out


def _chosen(plan: Plan, name: str, rule: Rule) -> Strategy:
    text = plan.choices.get(name)
    if text is None:
        possible = strategies(rule, plan.sizes)
        if len(possible) > 1:
            raise PlanError(f"the plan does not decide {name!r}", where=f"choices: {name}", try_="undo the edit, or plan again")
        return possible[0]
    strategy = tuple(text.split())
    if not is_legal(rule, strategy, plan.sizes):
        raise PlanError(
            f"{text!r} is no strategy of {name!r}",
            where=f"choices: {name}",
            why=f"its rule is {rule}; each of the {len(plan.sizes)} axes takes one of {' '.join(rule.symbols)}, "
            "and no device may be left without elements",
            try_="undo the edit, or plan again",
        )
    return strategy
