"""The planner decides what waits elsewhere: optimizer state between steps, and what host memory has no room for on disk."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import models
import numpy as np
import pytest
import small_problems
import torch

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.costs.presets import DEVICES, HOSTS
from netmind_autopar.ir.plan import Entry, Plan
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver import build as build_module
from netmind_autopar.solver.problem import Problem, evaluate, items, parked_bytes, parking_s, profile, resident_bytes, step_bytes
from netmind_autopar.solver.saving import place
from netmind_autopar.solver.saving.cut import Cut
from netmind_autopar.solver.saving.decide import Task, entries, state_entries
from netmind_autopar.solver.saving.mix import fit, least
from netmind_autopar.solver.saving.place import on_disk, parkable_bytes, pieces, places
from netmind_autopar.solver.saving.price import priced
from netmind_autopar.solver.saving.shares import shares
from netmind_autopar.solver.saving.tape import Saved, Tape
from netmind_autopar.solver.search import solve_problem
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare

BUCKET = 20_000


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that is small beside the state of a small model, as the real one is beside a real model's."""
    monkeypatch.setattr(build_module, "STATE_BUCKET_BYTES", BUCKET)


@functools.cache
def model() -> tuple:
    return models.gpt2(torch.float64, 0.1, layers=3)


@functools.cache
def task(states: int = 2, host_limit: int | None = None) -> Task:
    program = capture(*model())
    links = make_mesh("a=2,b=2", "h100-sxm")
    links = replace(links, device=replace(links.device, host_memory_bytes=host_limit, fragmentation=0.0))  # limits are of tensors
    return Task(program, bind_program(program), links, Conversions(links), "global", states, offload=True)


@functools.cache
def cheapest() -> tuple[Problem, tuple[int, ...], Tape, Cut]:
    problem = replace(task().build().problem, bucket_bytes=BUCKET)
    choice = solve_problem(problem).choice
    assert choice is not None
    tape = Tape(problem, choice)
    return problem, choice, tape, Cut(tape)


def planned(limit: int, **options: object) -> Plan:
    work = task(**options)  # type: ignore[arg-type]
    return solve(work.program, work.rules, work.mesh, graph_hash=graph_hash(work.program), memory_limit=limit, offload=True)


def test_parked_state_is_there_at_the_optimizers_moment_only() -> None:
    problem, choice, *_ = cheapest()
    found = places(problem, choice, math.inf)
    nodes = tuple(node.park(*found[n]) if n in found else node for n, node in enumerate(problem.nodes))
    there = replace(problem, nodes=nodes)
    state = parkable_bytes(problem, choice)
    assert parked_bytes(there, choice) == (state, 0) and state > BUCKET
    assert resident_bytes(there, choice) == resident_bytes(problem, choice) - state
    before, after = profile(problem, choice), profile(there, choice)
    largest = max(size for _, _, size in pieces(problem, choice))
    assert step_bytes(there, choice) == max(BUCKET, largest)
    assert (before[:-1] - after[:-1] == state).all() and before[-1] - after[-1] == state - step_bytes(there, choice)
    assert parking_s(there, choice) == pytest.approx(2 * state / 64e9)
    disk = replace(there, nodes=tuple(node.park(0, node.here) for node in problem.nodes))
    assert parking_s(disk, choice) == pytest.approx(2 * state * (1 / 64e9 + 1 / 3.5e9))


def test_nothing_runs_at_the_last_moment() -> None:
    """Parameters, their gradients and state, and what the user holds: that is all that the optimizer's moment has."""
    problem, choice, *_ = cheapest()
    found = [item for item in items(problem, choice) if (item.end == problem.moments - 1).any()]
    grads = sum(item.bytes * len(item.start) for item in found if problem.values[item.value].kind == "gradient")
    outputs = sum(item.bytes * len(item.start) for item in found if problem.values[item.value].kind != "gradient")
    assert profile(problem, choice)[-1] == resident_bytes(problem, choice) + grads + outputs <= profile(problem, choice)[-2]
    bases = 0  # of gradients that are views
    for item in found:
        value = problem.values[item.value]
        late = value.kind != "gradient" and value.produced.min() > problem.forward_end
        if late and any(problem.nodes[c.node].view for c in value.consumers):
            bases += item.bytes * len(item.start)
    assert 3 * (grads + bases) == sum(node.resident[k] for node, k in zip(problem.nodes, choice, strict=True) if node.here)
    assert not any(node.moments and node.moments[-1] >= problem.moments - 2 for node in problem.nodes)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_names_and_counts_agree(share: float) -> None:
    """Places as entries of a plan, and the problem that is built from those, count what the tape counts."""
    problem, choice, tape, _ = cheapest()
    found = places(problem, choice, share * parkable_bytes(problem, choice))
    built = task().build(state=state_entries(problem, found))
    there = tape.placed(found)
    assert parked_bytes(built.problem, choice) == parked_bytes(there.problem, choice)
    assert sum(parked_bytes(built.problem, choice)) >= share * parkable_bytes(problem, choice)
    assert len(state_entries(problem, found)) <= (6 if share < 1 else 20)
    run = there.run()
    assert run.seconds == pytest.approx(evaluate(built.problem, choice)[0] + parking_s(built.problem, choice), rel=1e-9)
    assert 0.96 * profile(built.problem, choice).max() <= run.peak <= profile(built.problem, choice).max()
    assert run.memory[-1] == pytest.approx(profile(built.problem, choice)[-1], rel=1e-9)


@pytest.mark.parametrize("part", [0.5, pytest.param(-0.3, marks=pytest.mark.slow), -0.9])
def test_a_plan_parks_what_it_must_and_is_exact(part: float) -> None:
    """Limits within what recomputation can do, and far below it."""
    problem, choice, tape, cut = cheapest()
    low, high, state = least(tape, cut)[1].peak, tape.run().peak, parkable_bytes(problem, choice)
    limit = int(low + part * (high - low if part > 0 else state))
    plan = planned(limit)
    assert plan.state and plan.cost.peak_bytes <= limit and plan.cost.transfer_s > 0
    assert plan.cost.memory.optimizer < state and plan.gap < 0.06
    assert plan.cost.step_s == pytest.approx(plan.cost.compute_s + plan.cost.recompute_s + plan.cost.communication_s + plan.cost.transfer_s)
    assert {Entry.parse(text, "optimizer").tier for text in plan.state} == {"host"}
    assert planned(limit).dumps() == plan.dumps()
    work = task()
    report = compare(*model(), work.program, lower(work.program, work.rules, plan), plan)
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def test_without_offload_nothing_is_parked() -> None:
    problem, choice, tape, cut = cheapest()
    limit = (least(tape, cut)[1].peak + tape.run().peak) // 2
    work = task()
    plan = solve(work.program, work.rules, work.mesh, graph_hash=graph_hash(work.program), memory_limit=limit)
    assert not plan.state and not plan.offload
    assert parkable_bytes(replace(problem, host_bytes_s=0.0), choice) == 0


def test_an_optimizer_without_state_has_nothing_to_park() -> None:
    built = task(states=0).build()
    assert not any(pieces(built.problem, tuple(0 for _ in built.problem.nodes)))


@pytest.mark.parametrize("first", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 21, 3))])
def test_small_problems_are_solved_as_well_as_by_trying_everything(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parking among the ways; and no bound is above the best of all. What is worse has little room below what fits at all."""
    monkeypatch.setattr(place, "SPARE", 0.0)
    equal, _, checked = small_problems.compare(3, first, ops=2, host=True)
    assert equal >= checked - 1


@pytest.mark.parametrize("share", [0.6, -0.5])
def test_no_sharding_beats_the_bound(share: float) -> None:
    """The relaxation is below what the tape counts, at its own sharding and at others, for any prices."""
    bounds_hold(share, (0.3, 1.0, 3.0))


def bounds_hold(share: float, scales: Sequence[float]) -> None:
    problem, choice, tape, cut = cheapest()
    low, high, state = least(tape, cut)[1].peak, tape.run().peak, parkable_bytes(problem, choice)
    limit = int(low + share * (high - low if share > 0 else state))
    here = fit(tape, cut, limit)
    assert here is not None and bool(here.run.places) == (share < 0)
    for scale in scales:
        prices = {m: price * scale for m, price in here.prices.items()}
        relaxed, constant = priced(cut, prices, shares(cut, here.answer), limit, here.answer.host)
        other = solve_problem(relaxed)
        assert other.choice is not None
        for tried in (choice, other.choice):
            there = Tape(problem, tried)
            fitted = fit(there, Cut(there), limit)
            if fitted is not None:
                assert evaluate(relaxed, tried)[0] + constant <= fitted.run.seconds * (1 + 1e-9)
                assert other.bound + constant <= fitted.run.seconds * (1 + 1e-9)


def test_what_host_memory_has_no_room_for_goes_to_disk() -> None:
    """Both kinds: the state first takes host memory, the values that wait the longest go on."""
    problem, choice, tape, _ = cheapest()
    state = parkable_bytes(problem, choice)
    less = replace(problem, host_limit_bytes=state // 3)
    found = places(less, choice, state)
    there = replace(less, nodes=tuple(node.park(*found[n]) if n in found else node for n, node in enumerate(less.nodes)))
    host, disk = parked_bytes(there, choice)
    assert host <= state // 3 and host + disk == state and disk < 0.8 * state
    names = {v.name: frozenset(v.rank) for v in problem.values if v.produced.max() <= problem.forward_end and v.produced.min() > 0}
    sent = tape.run(Saved(offload=names))
    limited = Tape(replace(problem, host_limit_bytes=100_000), choice)
    away, room = on_disk(limited, names, 40_000)
    assert away and room is not None and 40_000 <= room <= 100_000
    moved = limited.placed({}, away).run(Saved(offload=names))
    assert (moved.memory == sent.memory).all() and moved.seconds > sent.seconds, "the same memory, and the disk is slower"
    assert on_disk(tape, names, 0) == ({}, None)


def test_values_on_disk_are_named_and_exact() -> None:
    """Of what waits for backward the first layer on disk, the others in host memory: the same memory, and the same numbers."""
    problem, choice, tape, _ = cheapest()
    name = "transformer.h.*.mlp.c_fc.addmm"
    saved, disk = Saved(offload={name: frozenset({0, 1, 2})}), {name: frozenset({0})}
    assert entries(problem, saved, disk)[2] == (f"{name}[1:]", f"disk:{name}[:1]")
    work, away = task(), entries(problem, saved, disk)[2]
    assert evaluate(work.build((), (), away).problem, choice) == evaluate(work.build((), (), (name,)).problem, choice)
    plan = planned(int(1.01 * tape.run().peak)).model_copy(update={"offload": away})
    report = compare(*model(), work.program, lower(work.program, work.rules, plan), plan)
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def test_a_plan_may_use_the_disk() -> None:
    """With hardly any host memory a plan that must park says disk, at the disk's price, and within the limit."""
    problem, choice, tape, cut = cheapest()
    low, state = least(tape, cut)[1].peak, parkable_bytes(problem, choice)
    limit = int(low - 0.5 * state)
    plan, roomy = planned(limit, host_limit=50_000), planned(limit)
    tiers = [Entry.parse(text, "optimizer").tier for text in plan.state]
    assert "disk" in tiers and plan.cost.peak_bytes <= limit
    assert plan.cost.transfer_s > roomy.cost.transfer_s and plan.cost.step_s >= roomy.cost.step_s
    built = task().build(plan.recompute, plan.regather, plan.offload, limit, plan.state)
    at = {kind.name: [" ".join(s) for s in kind.strategies] for kind in built.kinds}
    used = tuple(at[kind.name].index(plan.choices.get(kind.name, at[kind.name][0])) for kind in built.kinds)
    assert parked_bytes(built.problem, used)[0] <= 50_000


def test_every_device_has_a_host() -> None:
    assert HOSTS.keys() == DEVICES.keys()
    for name, host in HOSTS.items():
        assert host.source and 1e8 <= host.disk_bytes_s <= 2e10, name
        assert not host.memory_bytes or host.memory_bytes >= DEVICES[name]["memory_bytes"], name  # type: ignore[operator]
    assert make_mesh("a=8", "dgx-h100").device.host_memory_bytes == 250 * 10**9


def test_exact_and_greedy_choices_cover_the_need() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        found = [(n, int(draw.integers(1, 5)), int(draw.integers(1, 50))) for n in range(4)]
        need = float(draw.integers(1, sum(c * s for _, c, s in found) + 1))
        for ways in (place._exact, place._greedy):
            taken = ways(found, need)
            total = sum(taken.get(n, 0) * s for n, _, s in found)
            assert total >= need and all(taken.get(n, 0) <= c for n, c, _ in found)
            assert total - need < max(s for _, _, s in found) + place.SPARE * need


@pytest.mark.slow
def test_a_bound_that_forgets_what_parking_gains_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were parking thought too dear to be used, some bound would be above a plan that parks."""
    from netmind_autopar.solver.saving import price

    monkeypatch.setattr(price, "parked_byte_s", lambda problem: math.inf)
    monkeypatch.setattr(price, "stowed_s", lambda problem, node, k: math.inf)
    with pytest.raises(AssertionError):
        bounds_hold(-0.5, (30.0,))
