"""The choice by the timeline: the sketch against the lowered program, its clock against the simulation, and what is chosen."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import random_plan
from random_saving import with_saving

from netmind_autopar import plan as plan_of
from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.costs.timeline import COMPUTE, Event, simulate
from netmind_autopar.ir.mesh import Mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.timing import plan_timeline
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.baselines import compare_baselines
from netmind_autopar.solver.build import Built
from netmind_autopar.solver.clock import Clock, Flight
from netmind_autopar.solver.micro import in_turns
from netmind_autopar.solver.overlap import _Weights, choose, hideable, least_beside_s
from netmind_autopar.solver.problem import Choice, evaluate, seconds
from netmind_autopar.solver.saving.decide import Task
from netmind_autopar.solver.search import solve_problem
from netmind_autopar.solver.sketch import Sketch, Sketcher
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash

CLUSTER, LIMIT = "dgx-h100", 1 << 40
EXACT, CLOSE, FAR = 1e-9, 0.02, 0.11  # of the sum; of the timeline: usually, and where nearly all is communication
FAMILIES = ["mlp", "gpt2", pytest.param("llama", marks=pytest.mark.slow)]
MESHES = {"gpt2": "dp=2,tp=4", "llama": "dp=4,tp=2", "mlp": "dp=4,tp=2"}
NAMES = ("ddp", "zero1", "fsdp", "ddp+megatron-tp", "zero1+megatron-tp-sp", "fsdp+megatron-tp", "ddp+ulysses")
WIDE = {
    "gpt2": {"layers": 3, "hidden": 256, "vocab": 1024, "seq": 128, "batch": 8, "heads": 4},
    "llama": {"layers": 3, "hidden": 256, "vocab": 1024, "seq": 128, "batch": 8, "heads": 8, "kv_heads": 4},
    "mlp": {},
}


@functools.cache
def captured(family: str) -> tuple[Program, dict[str, Rule]]:
    with torch.device("meta"):
        model, inputs = getattr(models, family)(dtype=torch.bfloat16, **WIDE[family])
    program = capture(model, inputs, outputs=("loss",) if family != "mlp" else None)
    return program, bind_program(program)


@functools.cache
def built(family: str) -> tuple[Built, Conversions]:
    program, rules = captured(family)
    mesh = make_mesh(MESHES[family], CLUSTER)
    conversions = Conversions(mesh, None)
    return Task(program, rules, mesh, conversions, "global", 2).build(), conversions


@functools.cache
def plans(family: str) -> dict[str, Plan]:
    """The plan, the one with the least sum, and baselines."""
    program, rules = captured(family)
    mesh, known = make_mesh(MESHES[family], CLUSTER), {"graph_hash": graph_hash(program), "cluster": CLUSTER}
    found = compare_baselines(program, rules, mesh, NAMES, **known)  # type: ignore[arg-type]
    out = {c.row.name: c.plan for c in found if c.plan is not None}
    return {"free": solve(program, rules, mesh, **known), "sum": solve(program, rules, mesh, overlap=False, **known), **out}  # type: ignore[arg-type]


def sketch_of(family: str, plan: Plan, mesh: Mesh | None = None) -> tuple[Sketch, Choice]:
    """The sketch of a plan by its file alone."""
    mesh, (program, rules) = mesh or make_mesh(MESHES[family], CLUSTER), in_turns(*captured(family), plan.micro_batches)
    conversions = Conversions(mesh, None)
    task = Task(program, rules, mesh, conversions, "global", 2, offload=bool(plan.offload or plan.state))
    work = task.build(plan.recompute, plan.regather, plan.offload, None, plan.state)
    choice = tuple(
        node.labels.index(plan.choices[kind.name]) if kind.name in plan.choices else 0
        for kind, node in zip(work.kinds, work.problem.nodes, strict=True)
    )
    return Sketcher(work, conversions, plan.offload).sketch(choice), choice


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sketch_is_the_lowered_programs_timeline(family: str) -> None:
    program, rules = captured(family)
    off, hidden = {}, 0
    for name, plan in plans(family).items():
        full = plan_timeline(program, rules, plan, make_mesh(MESHES[family], CLUSTER))
        found, _ = sketch_of(family, plan)
        assert found.sum_s == pytest.approx(full.sequential_s, rel=EXACT), name
        assert {k: v for k, v in found.work.items() if v} == pytest.approx({k: v for k, v in full.work.items() if v}, rel=EXACT), name
        if plan.cost.timeline_s:
            assert plan.cost.timeline_s == pytest.approx(found.step_s, rel=EXACT), name
        off[name] = abs(found.step_s / full.step_s - 1)
        hidden += found.step_s < 0.98 * found.sum_s
    assert max(off.values()) <= FAR and float(np.median([*off.values()])) <= CLOSE, off
    assert off["free"] <= CLOSE
    assert hidden, "nothing overlaps"


@pytest.mark.parametrize("micro", [1, 4])
def test_what_cannot_be_hidden_is_the_devices_own_work(micro: int) -> None:
    """Where the cores that compute also send: the sketch and the timeline agree, the sum stays, and less is hidden."""
    program, rules = captured("gpt2")
    mesh, known = make_mesh(MESHES["gpt2"], CLUSTER), {"graph_hash": graph_hash(program), "cluster": CLUSTER}
    plan = solve(*in_turns(program, rules, micro), mesh, **known) if micro > 1 else plans("gpt2")["fsdp"]  # type: ignore[arg-type]
    steps = []
    for part in (1.0, 0.4, 0.0):
        busy = replace(mesh, axes=tuple(replace(axis, hideable=part) for axis in mesh.axes))
        full, (found, _) = plan_timeline(program, rules, plan, busy), sketch_of("gpt2", plan, busy)
        assert found.sum_s == pytest.approx(full.sequential_s, rel=EXACT)
        assert found.busy[COMPUTE] == pytest.approx(full.busy[COMPUTE], rel=EXACT)
        assert found.step_s == pytest.approx(full.step_s, rel=FAR)
        steps.append((full.step_s, found.step_s, full.sequential_s))
    (most, other, total), middle, (least, without, whole) = steps
    assert total == pytest.approx(whole, rel=EXACT)
    assert least == pytest.approx(whole, rel=EXACT) and without == pytest.approx(whole, rel=EXACT)
    assert most <= middle[0] <= least and other <= middle[1] <= without
    if micro == 1:  # otherwise little is left to hide
        assert most < middle[0] < least and other < middle[1] < without


def test_it_is_that_of_a_larger_model_to_a_fiftieth() -> None:
    """What travels is long here, as in models of a real size, and the memory leaves room for it."""
    with torch.device("meta"):
        model, inputs = models.llama(dtype=torch.bfloat16, layers=4, hidden=2048, vocab=8192, seq=2048, batch=16, heads=16, kv_heads=4)
    program = capture(model, inputs, outputs=("loss",))
    rules, mesh, known = bind_program(program), make_mesh("dp=8,tp=4", CLUSTER), {"graph_hash": graph_hash(program), "cluster": CLUSTER}
    names = ("zero1+megatron-tp", "fsdp+megatron-tp-sp")
    rows = [c.plan for c in compare_baselines(program, rules, mesh, names, **known)]  # type: ignore[arg-type]
    for plan in [solve(program, rules, mesh, **known), *rows]:  # type: ignore[arg-type]
        assert plan is not None
        full = plan_timeline(program, rules, plan, mesh)
        assert plan.cost.timeline_s == pytest.approx(full.step_s, rel=2e-2)
        assert full.step_s < 0.97 * full.sequential_s


@pytest.mark.parametrize(("micro", "saving"), [(1, 0), (1, 1), (4, None)])
def test_what_saves_memory_and_micro_batches_are_in_it(micro: int, saving: int | None) -> None:
    program, rules = captured("gpt2")
    mesh = make_mesh(MESHES["gpt2"], CLUSTER)
    plan = solve(*in_turns(program, rules, micro), mesh, graph_hash=graph_hash(program), cluster=CLUSTER)
    if saving is not None:
        plan = with_saving(plan, program, rules, saving)
        assert plan.recompute or plan.offload
    full, (found, _) = plan_timeline(program, rules, plan, mesh), sketch_of("gpt2", plan)
    ours = {name: found.work.get(name, 0.0) for name in (COMPUTE, *mesh.names)}
    assert ours == pytest.approx({name: full.work.get(name, 0.0) for name in ours}, rel=EXACT, abs=1e-15)
    assert found.step_s == pytest.approx(full.step_s, rel=0.2 if plan.offload else FAR)


@st.composite
def flights(draw: st.DrawFn) -> tuple[list[Flight], np.ndarray]:
    """Up to eight flights on two streams over up to six ops, whole seconds, so that ends coincide often, and halves are exact."""
    ops = draw(st.integers(1, 6))
    out = []
    for f in range(draw(st.integers(0, 8))):
        go = draw(st.integers(0, ops))
        come = draw(st.integers(go, ops))
        at = draw(st.integers(go, come))
        stream, seconds, busy = draw(st.sampled_from(["dp", "tp"])), float(draw(st.integers(0, 4))), float(draw(st.integers(0, 2)))
        transfer_s = float(draw(st.integers(0, int(seconds))))
        out.append(Flight(f, stream, seconds, go, come, (at, f), busy=busy, transfer_s=transfer_s))
    compute = [float(draw(st.integers(0, 3))) for _ in range(ops)]
    return out, np.concatenate([[0.0], np.cumsum(compute)])


@settings(max_examples=400, deadline=None)
@given(flights(), st.booleans())
def test_the_clock_is_the_simulation(case: tuple[list[Flight], np.ndarray], shared: bool) -> None:
    """The same starts, waits and compute as events, one by one; on two links, and on one."""
    found, before = case
    links = {"dp": "intra", "tp": "intra"} if shared else {"dp": "inter", "tp": "intra"}
    clock = Clock(found, before, links)
    clock.run()
    events: list[Event] = []
    waiting: tuple[int, ...] = ()
    event_of: dict[int, int] = {}
    slot = 0
    for _, at, f, begins in [*clock.items, ((), len(before) - 1, -1, False)]:
        if before[at] > before[slot]:
            events.append(Event("op", COMPUTE, float(before[at] - before[slot]), waiting))
            waiting = (len(events) - 1,)
        slot = at
        if begins:
            if found[f].busy:
                events.append(Event("busy", COMPUTE, found[f].busy, waiting))
                waiting = (len(events) - 1,)
            event_of[f] = len(events)
            carried = {"link": links[found[f].stream], "transfer_s": found[f].transfer_s}
            events.append(Event(f"flight {f}", found[f].stream, found[f].seconds, waiting, **carried))  # type: ignore[arg-type]
        elif f >= 0:
            waiting = (*waiting, event_of[f])
    full = simulate(events)
    assert clock.now == full.step_s
    streams = clock.streams()
    assert {name: s for name, (s, _) in streams.items()} == {name: full.busy[name] for name in streams}
    assert {name: alone for name, (_, alone) in streams.items()} == {name: full.exposed[name] for name in streams}
    slots, flown, worked = clock.critical()
    on_compute = sum(float(before[s + 1] - before[s]) * slots[s] for s in range(len(before) - 1))
    on_compute += sum(flight.busy * on for flight, on in zip(found, worked, strict=True))
    assert on_compute + sum(flight.seconds * on for flight, on in zip(found, flown, strict=True)) == pytest.approx(full.step_s, rel=1e-12)
    assert all(0 <= on <= 1 + 1e-12 for on in flown)
    assert shared or set(flown) <= {0.0, 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_baseline_and_no_sum_has_a_shorter_timeline(family: str) -> None:
    found = plans(family)
    free, least = found["free"], found["sum"]
    assert free.least_sum_s == least.cost.step_s == least.least_sum_s and not least.overlap and not least.cost.timeline_s
    assert free.bound_s == pytest.approx(least.bound_s) and free.gap == pytest.approx(least.gap) and free.bound_s <= free.cost.step_s
    assert 0 < free.timeline_bound_s <= free.cost.timeline_s <= sketch_of(family, least)[0].step_s
    for name, plan in found.items():
        if name not in ("free", "sum"):
            assert free.cost.timeline_s <= plan.cost.timeline_s * (1 + 1e-9), name
            assert free.timeline_bound_s <= plan.cost.timeline_s, name


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_same_again_and_within_the_limit(family: str) -> None:
    work, conversions = built(family)
    first = solve_problem(work.problem).choice
    assert first is not None
    free = choose(work, first, conversions, LIMIT)
    assert choose(work, first, conversions, LIMIT).choice == free.choice
    peaks = sorted(evaluate(work.problem, c)[1] for c in (first, free.choice))
    for limit in (peaks[0], peaks[1], (peaks[0] + peaks[1]) // 2):
        if evaluate(work.problem, first)[1] <= limit:
            found = choose(work, first, conversions, limit)
            assert evaluate(work.problem, found.choice)[1] <= limit
            assert found.sketch.step_s <= Sketcher(work, conversions).sketch(first).step_s


def tau(a: list[float], b: list[float]) -> float:
    """Kendall's rank correlation; pairs that are equal to a millionth in one of them are left out."""
    signs = []
    for (x, y), (u, v) in itertools.combinations(zip(a, b, strict=True), 2):
        if abs(x - u) > 1e-6 * abs(x) and abs(y - v) > 1e-6 * abs(y):
            signs.append(math.copysign(1.0, (x - u) * (y - v)))
    assert len(signs) >= 50
    return sum(signs) / len(signs)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_repriced_sum_and_the_timeline_agree_on_ranks(family: str) -> None:
    """Over plans drawn at random and plans that the search meets on its way."""
    program, rules = captured(family)
    work, conversions = built(family)
    sketcher, found = Sketcher(work, conversions), plans(family)
    pool = {sketch_of(family, p)[1] for p in found.values() if not p.regather}
    for seed in range(8):
        drawn = random_plan(program, rules, MESHES[family], seed)
        pool.add(tuple(n.labels.index(drawn.choices.get(n.name, n.labels[0])) for n in work.problem.nodes))
    choices = [c for c in sorted(pool) if math.isfinite(seconds(work.problem, c))]
    sketches = {c: sketcher.sketch(c) for c in choices}
    weights = _Weights(work.problem, hideable(work), 0.5)
    for c in sorted(choices, key=lambda c: sketches[c].step_s)[::-1]:
        weights.learn(c, sketches[c])
    priced, timeline = [seconds(weights.priced(), c) for c in choices], [sketches[c].step_s for c in choices]
    assert tau(priced, timeline) >= 0.8
    bound = least_beside_s(work.problem)
    assert all(bound <= s.step_s and max(s.busy.values()) <= s.step_s * (1 + 1e-12) <= s.sum_s * (1 + 1e-9) for s in sketches.values())


def test_without_overlap_the_sum_decides() -> None:
    model, inputs = models.mlp(dtype=torch.float32)
    beside, alone = (plan_of(model, inputs, "dp=2,tp=2", cluster=CLUSTER, overlap=overlap) for overlap in (True, False))
    assert beside.overlap and beside.cost.timeline_s and not alone.overlap and alone.cost.timeline_s == 0.0
    assert alone.cost.step_s == alone.least_sum_s == pytest.approx(beside.least_sum_s) and alone.cost.predicted_s == alone.cost.step_s
    odd = plan_of(model, inputs, "dp=2,tp=2", cluster=CLUSTER, random_costs=1)
    assert odd.cost.timeline_s == 0.0 and odd.overlap, "drawn prices say nothing about a timeline"
    assert Plan.loads(beside.dumps()) == beside
