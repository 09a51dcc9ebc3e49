"""The planner decides which parameters wait elsewhere, and counts what the program then does."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
from liveness import lowered_peak
from random_plans import random_plan
from random_saving import with_saving
from test_stowed import everything

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.costs.timeline import simulate
from netmind_autopar.ir.plan import Entry, Plan, entries_of
from netmind_autopar.passes.pipeline import lower, prepare
from netmind_autopar.passes.timing import events
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver import build as build_module
from netmind_autopar.solver.problem import Problem, evaluate, parking_s, profile, stowed_bytes
from netmind_autopar.solver.saving.cut import Cut
from netmind_autopar.solver.saving.decide import Task, entries, state_entries
from netmind_autopar.solver.saving.mix import least
from netmind_autopar.solver.saving.place import room_left, stowable, stowed_places
from netmind_autopar.solver.saving.price import priced
from netmind_autopar.solver.saving.shares import shares
from netmind_autopar.solver.saving.tape import Saved, Tape
from netmind_autopar.solver.search import solve_problem
from netmind_autopar.solver.sketch import Sketcher
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare

BUCKET = 20_000


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "STATE_BUCKET_BYTES", BUCKET)


@functools.cache
def model() -> tuple:
    return models.gpt2(torch.float64, 0.1, layers=3)


@functools.cache
def task(mesh: str = "a=2,b=2") -> Task:
    program = capture(*model())
    links = make_mesh(mesh, "h100-sxm")
    links = replace(links, device=replace(links.device, fragmentation=0.0))  # limits here are of tensors
    return Task(program, bind_program(program), links, Conversions(links), "global", 2, offload=True)


@functools.cache
def cheapest(mesh: str = "a=2,b=2") -> tuple[Problem, tuple[int, ...], Tape, Cut]:
    problem = replace(task(mesh).build().problem, bucket_bytes=BUCKET)
    choice = solve_problem(problem).choice
    assert choice is not None
    tape = Tape(problem, choice)
    return problem, choice, tape, Cut(tape)


def choice_of(plan: Plan, built: build_module.Built) -> tuple[int, ...]:
    labels = [[" ".join(s) for s in kind.strategies] for kind in built.kinds]
    return tuple(found.index(plan.choices.get(kind.name, found[0])) for kind, found in zip(built.kinds, labels, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_planned_memory_is_that_of_the_lowered_program(seed: int) -> None:
    """On one device to the byte; without transfers of values, which are counted by the block."""
    work = task("a=1")
    plan = random_plan(work.program, dict(work.rules), "a=1", seed).model_copy(update={"overlap": False})
    plan = with_saving(plan, work.program, dict(work.rules), seed).model_copy(update={"offload": ()}) if seed else plan
    plan = plan.model_copy(update={"state": everything(work.program, dict(work.rules), random.Random(seed) if seed != 2 else None)})
    built = work.build(plan.recompute, plan.regather, (), None, plan.state)
    found = profile(built.problem, choice_of(plan, built))
    context = prepare(work.program, work.rules, plan)[1]
    walked = lowered_peak(lower(work.program, work.rules, plan), plan, stowed=context.stowed, over=False)
    assert context.stowed and int(found[:-1].max()) == sum(walked.model_dump().values())


@pytest.mark.parametrize("seed", range(3))
def test_names_and_counts_agree(seed: int) -> None:
    """Any parameters, and ops that run again: the tape counts what the problem of the rewritten program does."""
    problem, choice, tape, _ = cheapest("a=1")
    draw = np.random.default_rng(seed)
    found = {
        n: (int(h := draw.integers(0, count + 1)), int(draw.integers(0, count - h + 1)))
        for n, (count, _) in stowable(problem, choice).items()
    }
    nodes = [(n, node) for n, node in enumerate(problem.nodes) if node.again and draw.random() < 0.5 * (seed % 2)]
    saved = Saved({n: frozenset(range(sum(m <= problem.forward_end for m in node.moments))) for n, node in nodes})
    there = tape.stow({n: places for n, places in found.items() if sum(places)})
    run = there.run(saved)
    built = task("a=1").build(*entries(problem, saved), None, state_entries(problem, {}, there.stowed))
    at = {node.name: k for node, k in zip(problem.nodes, choice, strict=True)}
    used = tuple(at[kind.name] for kind in built.kinds)
    seconds, peak, _ = evaluate(built.problem, used)
    assert stowed_bytes(built.problem, used) == stowed_bytes(there.problem, choice) != (0, 0)
    assert run.seconds - run.waits_s == pytest.approx(seconds, rel=1e-9)
    assert run.waits_s >= parking_s(built.problem, used) * (1 - 1e-9) > 0
    assert run.memory[-1] == profile(built.problem, used)[-1] and 0.97 * peak <= run.peak <= peak


def test_a_stowed_parameter_is_here_from_a_block_before_its_use() -> None:
    """And its gradient until two borders later; between steps nothing of it."""
    problem, choice, tape, _ = cheapest("a=1")
    n = next(n for n, node in enumerate(problem.nodes) if node.name.endswith("mlp.c_fc.weight"))
    count, piece = stowable(problem, choice)[n]
    size = int(problem.nodes[n].size[choice[n]])  # type: ignore[index]
    moments = problem.moments
    gain = tape.run().profile(moments) - tape.stow({n: (count, 0)}).run().profile(moments)
    assert count == 3 and piece == 4 * size
    forward = gain[2 : problem.forward_end + 1]
    assert forward.max() == 3 * 3 * size, "three parameters, and two tensors of state of each"
    assert set(np.unique(forward)) == {9 * size, 8 * size, 7 * size}, "at most two are here at a time"
    assert gain[-2] == (3 * 3 + 1) * size, "of the gradients that of the last layer is out, the others are on their way"
    assert gain[-1] == 3 * 4 * size - max(BUCKET, piece) and (gain >= 0).all()


def limits() -> tuple[int, int]:
    """Just below what parking state alone can do, and just above what there is with all parameters elsewhere."""
    problem, choice, tape, _ = cheapest("a=1")
    every = tape.stow(stowed_places(problem, choice, dict.fromkeys(stowable(problem, choice), 1.0)))
    low = least(every, Cut(every))[1].peak
    return int(1.25 * low), int(1.02 * low)


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_plan_stows_what_it_must_and_is_exact(which: int) -> None:
    work, limit = task("a=1"), limits()[which]
    options = {"graph_hash": graph_hash(work.program), "memory_limit": limit, "offload": True}
    plan = solve(work.program, work.rules, work.mesh, **options)  # type: ignore[arg-type]
    kinds = {Entry.parse(text, "optimizer", "param").what for text in plan.state}
    assert "param" in kinds and plan.cost.peak_bytes <= limit and plan.cost.transfer_s > 0 and 0 <= plan.gap < 0.4
    report = compare(*model(), work.program, lower(work.program, work.rules, plan), plan)
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def test_without_offload_nothing_is_stowed() -> None:
    problem, choice, *_ = cheapest()
    assert stowable(problem, choice) and not stowable(replace(problem, host_bytes_s=0.0), choice)


@pytest.mark.parametrize("scale", [0.03, 0.3, 3.0, 100.0])
def test_no_way_beats_the_bound(scale: float) -> None:
    """The relaxation is below what the tape counts, whatever parameters wait elsewhere, at any prices and with the limit at the peak."""
    problem, choice, tape, cut = cheapest("a=1")
    may = stowable(problem, choice)
    draw = np.random.default_rng(0)
    for share in (0.0, 0.5, 1.0, *draw.random(4)):
        found = stowed_places(problem, choice, {n: share for n in may if draw.random() < 0.8 or share == 1.0})
        run = tape.stow(found).run()
        for moment in {run.peak_moment, tape.run().peak_moment, problem.moments - 1}:
            prices = {moment: scale * run.seconds / run.peak}
            relaxed, constant = priced(cut, prices, shares(cut, None), run.peak)
            assert evaluate(relaxed, choice)[0] + constant <= run.seconds * (1 + 1e-9)


def test_what_host_memory_has_no_room_for_goes_to_disk() -> None:
    problem, choice, *_ = cheapest()
    may = stowable(problem, choice)
    whole = sum(count * size for count, size in may.values())
    less = replace(problem, host_limit_bytes=whole // 3)
    found = stowed_places(less, choice, dict.fromkeys(may, 1.0))
    nodes = tuple(node.stow(*found[n]) if n in found else node for n, node in enumerate(less.nodes))
    there = replace(less, nodes=nodes)
    host, disk = stowed_bytes(there, choice)
    assert host <= whole // 3 and host + disk == whole and room_left(there, choice) == whole // 3 - host
    assert parking_s(there, choice) > parking_s(replace(problem, nodes=nodes), choice) * 0.99


@pytest.mark.parametrize("seed", range(2))
def test_the_sketch_of_the_timeline_has_them(seed: int) -> None:
    """On the streams of the host what the lowered program sends, and about its step."""
    work = task("a=1")
    plan = random_plan(work.program, dict(work.rules), "a=1", seed)
    plan = plan.model_copy(update={"state": everything(work.program, dict(work.rules), random.Random(seed))})
    built = work.build(state=plan.state)
    found = Sketcher(built, work.conversions).sketch(choice_of(plan, built))
    prepared, context = prepare(work.program, work.rules, plan)
    full = simulate(events(lower(work.program, work.rules, plan), prepared, context, work.mesh))
    for stream in ("to the host", "from the host", "optimizer state"):
        assert found.busy[stream] == pytest.approx(full.busy[stream], rel=1e-6)
    assert found.step_s == pytest.approx(full.step_s, rel=0.1)


def test_transfers_stand_in_the_timeline() -> None:
    """Every fetch and every gradient has its event, and the optimizer's moment its bytes."""
    work = task("a=1")
    plan = random_plan(work.program, dict(work.rules), "a=1", 0)
    name = "transformer.h.*.mlp.c_fc.weight"
    there = plan.model_copy(update={"state": (f"param:{name}",), "optimizer": "adamw"})
    prepared, context = prepare(work.program, work.rules, there)
    found = events(lower(work.program, work.rules, there), prepared, context, work.mesh)
    size = sum(e.bytes for e in found if e.stream == "to the host")
    assert size and sum(e.bytes for e in found if e.stream == "from the host") == 2 * size
    assert [e.bytes for e in found if e.stream == "optimizer state"] == [7 * size]
    assert simulate(found).step_s >= 7 * size / work.mesh.device.host_bandwidth_bytes_s
    assert entries_of(name, range(3), 3, "host", "param") == [f"param:{name}"]
