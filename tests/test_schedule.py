"""Collectives that travel while other ops run: exact, never above the peak, one order, and every misplaced wait is found."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo_ranks import launch
from liveness import lowered_peak
from random_modules import random_module
from random_plans import random_plan
from test_exact import captured, planned
from torch import fx

from netmind_autopar.costs.compute import FREE, short_name
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import GraphError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Draft, Program, is_getitem, tensor_args
from netmind_autopar.passes.emit import emit, split_phases
from netmind_autopar.passes.pipeline import check, lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.collectives import BUCKETS, MOVES, STARTS, start, start_bucket, wait
from netmind_autopar.solver.baselines import solve_baseline
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare

F32, F64 = torch.float32, torch.float64


def alone(plan: Plan) -> Plan:
    """The same plan, every collective where it is needed."""
    return plan.model_copy(update={"overlap": False})


@functools.cache
def scheduled(family: str, mesh: str, seed: int, dtype: torch.dtype = F64) -> tuple[Program, Plan]:
    _, _, program, rules, _ = captured(family, dtype)
    plan = random_plan(program, rules, mesh, seed)
    return lower(program, rules, plan), plan


def starts(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target in STARTS]


def ops(program: Program) -> list[str]:
    """What is called, in emitted order, but for moves and views, which may go with them."""
    forward, backward = split_phases(program)
    names = (n for n in (*forward, *backward) if n.target not in (*MOVES, *BUCKETS, wait))
    return [n.name for n in names if short_name(n) not in FREE and not is_getitem(n)]


@pytest.mark.parametrize(("mesh", "seed"), [("a=4", 0), ("a=2,b=2", 1), ("a=3", 2)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mlp"])
def test_odd_plans_are_exact(family: str, mesh: str, seed: int) -> None:
    lowered, plan = scheduled(family, mesh, seed)
    model, inputs, program, _, _ = captured(family, F64)
    assert len(starts(lowered)) >= (3 if family == "mlp" else 50)
    report = compare(model, inputs, program, lowered, plan, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    assert report.ok, report


@pytest.mark.parametrize("seed", range(6))
def test_random_modules_are_exact(seed: int) -> None:
    model, inputs = random_module(seed)
    program = capture(model, inputs)
    rules = bind_program(program)
    plan = random_plan(program, rules, ("a=2", "a=2,b=2")[seed % 2], seed)
    report = compare(model, inputs, program, lower(program, rules, plan), plan)
    assert report.ok, report


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", ["gpt2", "mlp"])
def test_nothing_else_changes_its_place(family: str, seed: int) -> None:
    lowered, plan = scheduled(family, "a=2,b=2", seed)
    _, _, program, rules, _ = captured(family, F64)
    before = lower(program, rules, alone(plan))
    assert not starts(before) and ops(lowered) == ops(before)
    assert sum(n.target in (*MOVES, *BUCKETS) for n in lowered.graph.nodes) == sum(
        n.target in (*MOVES, *BUCKETS) for n in before.graph.nodes
    )
    assert emit(lowered, plan) == emit(lower(program, rules, plan), plan)


def peak(program: Program, plan: Plan) -> int:
    return sum(lowered_peak(program, plan).model_dump().values())


@pytest.mark.parametrize("mesh", ["a=4", "a=2,b=2"])
@pytest.mark.parametrize("family", ["gpt2", "mlp", "bert"])
def test_the_peak_does_not_grow(family: str, mesh: str) -> None:
    """Drawn plans; those of the solver are held against their own prediction in test_memory.py."""
    _, _, program, rules, _ = captured(family, F32)
    for seed in range(2):
        lowered, plan = scheduled(family, mesh, seed, F32)
        assert peak(lowered, plan) <= peak(lower(program, rules, alone(plan)), plan)


def test_a_limit_that_binds_holds() -> None:
    _, _, program, rules, _ = captured("gpt2", F32)
    free = planned("gpt2", F32, "a=4", time_limit=20.0, gap=0.05)
    plan = planned("gpt2", F32, "a=4", time_limit=20.0, gap=0.05, memory_limit=int(0.7 * free.cost.peak_bytes))
    lowered = lower(program, rules, plan)
    assert starts(lowered) and peak(lowered, plan) <= plan.cost.peak_bytes <= plan.memory_limit_bytes  # type: ignore[operator]


@functools.cache
def by_recipe(recipe: str) -> tuple[Program, Plan]:
    _, _, program, rules, hash_ = captured("gpt2", F64, layers=4)
    plan = solve_baseline(program, rules, make_mesh("a=4", "h100-sxm"), recipe, graph_hash=hash_, cluster="h100-sxm")  # type: ignore[arg-type]
    return lower(program, rules, plan), plan


def test_parameters_are_gathered_a_block_ahead() -> None:
    lowered, _ = by_recipe("fsdp")
    order = {n: i for i, n in enumerate(lowered.graph.nodes)}
    first = {}  # op of every block, by phase
    for n in order:
        if n.op == "call_function" and n.target not in (*MOVES, *STARTS, wait) and "transformer.h." in (n.meta.get("module") or ""):
            first.setdefault((n.meta["phase"], int(n.meta["module"].split(".")[2])), order[n])
    gathers = [n for n in starts(lowered) if n.args[1:2] == ("all_gather",) and n.args[0].op == "placeholder"]  # type: ignore[union-attr]
    late = [n for n in gathers if "_h_" in n.name and "_h_0_" not in n.name and n.meta["phase"] == "forward"]
    blocks = [int(n.name.split("_h_")[1].split("_")[0]) for n in late]
    ahead = [first["forward", b - 1] - 60 < order[n] < first["forward", b] for n, b in zip(late, blocks, strict=True)]
    assert sum(ahead) >= 9 and sum(ahead) > 0.6 * len(ahead)


def test_gradients_are_reduced_while_backward_runs() -> None:
    lowered, _ = by_recipe("fsdp")
    order = [n for n in lowered.graph.nodes if n.op == "call_function"]
    at = {n: i for i, n in enumerate(order)}
    reductions = [n for n in starts(lowered) if n.args[1:2] == ("reduce_scatter",) and n.meta["phase"] == "backward"]
    late = [at[next(iter(n.users))] - at[n] for n in reductions]
    assert len(reductions) > 20 and sum(gap > 20 for gap in late) > 0.5 * len(late), late


def test_the_code_reads() -> None:
    lowered, plan = by_recipe("fsdp")
    source = emit(lowered, plan)
    compile(source, "emitted", "exec")
    name = next(n.name for n in starts(lowered) if n.target is start)
    assert f"{name} = all_gather_" in source and ".start(" in source
    assert f"{name.removesuffix('_started')} = {name}.wait()  # " in source and f"del {name}\n" in source


# Planted bugs: (what is done to a start and its wait, what the error says).


def _drop_the_wait(draft: Draft, begin: fx.Node) -> None:
    (end,) = begin.users
    for user in [u for u in end.users if u.op != "output"][:1]:
        user.replace_input_with(end, begin)


def _wait_after_a_use(draft: Draft, begin: fx.Node) -> None:
    (end,) = begin.users
    user = next(u for u in end.users if u.op != "output")
    user.append(end)


def _never_wait(draft: Draft, begin: fx.Node) -> None:
    (end,) = begin.users
    with draft.graph.inserting_after(end):
        other = draft.graph.create_node("call_function", begin.target, begin.args, name=f"{begin.name}_2")
    other.meta, draft.specs[other.name], draft.expects[other.name] = dict(begin.meta), draft.specs[begin.name], draft.expects[begin.name]


def _wait_twice(draft: Draft, begin: fx.Node) -> None:
    (end,) = begin.users
    with draft.graph.inserting_after(end):
        again = draft.graph.create_node("call_function", wait, (begin,), name=f"{end.name}_2")
    again.meta, draft.specs[again.name], draft.expects[again.name] = dict(end.meta), draft.specs[end.name], draft.expects[end.name]
    user = next(u for u in end.users if u.op != "output")
    user.replace_input_with(end, again)


BUGS: dict[str, tuple[Callable[[Draft, fx.Node], None], str]] = {
    "dropped wait": (_drop_the_wait, "before it was waited for"),
    "wait after a use": (_wait_after_a_use, "before it is made"),
    "never waited for": (_never_wait, "never waited for"),
    "waited for twice": (_wait_twice, "a second time"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_misplaced_wait_is_found(name: str) -> None:
    plant, says = BUGS[name]
    model, inputs, program, _, _ = captured("gpt2", F64)
    lowered, plan = scheduled("gpt2", "a=2,b=2", 0)
    middle = [n.name for n in starts(lowered) if n.target is start and any(u.op != "output" for u in next(iter(n.users)).users)]
    for which in (middle[len(middle) // 4], middle[-5]):
        draft = Draft(lowered)
        begin = next(n for n in draft.graph.nodes if n.name == which)
        plant(draft, begin)
        bad = _unchecked(draft, lowered)
        with pytest.raises((GraphError, RuntimeError)):
            check(bad, plan.sizes)
        report = compare(model, inputs, program, bad, plan)
        found = str(report.first_difference)
        assert not report.ok and which.removesuffix("_started") in found and says in found, found
        assert "at modeling_gpt2.py:" in found or which == middle[-5]  # some ops of backward have no line


def _unchecked(draft: Draft, lowered: Program) -> Program:
    """What the draft is, without the check that comes with `Program.edit`."""
    from dataclasses import replace

    return replace(lowered, graph=draft.graph, specs=draft.specs, expects=draft.expects)


def test_a_wait_in_another_phase_is_refused() -> None:
    lowered, plan = scheduled("gpt2", "a=2,b=2", 0)
    with lowered.edit() as draft:
        begin = next(n for n in draft.graph.nodes if n.target is start and n.meta["phase"] == "forward")
        begin.meta = {**begin.meta, "phase": "backward"}
    with pytest.raises(GraphError, match="is started in backward and waited for in forward"):
        check(draft.program, plan.sizes)


def test_buckets_start_where_they_are_full() -> None:
    lowered, _ = by_recipe("ddp")
    found = [n for n in lowered.graph.nodes if n.target in BUCKETS]
    assert found and all(a.op == "call_function" for n in found for a in tensor_args(n))
    assert all(n.target is start_bucket or next(reversed(ops(lowered))) for n in found)


@pytest.mark.gloo
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_real_processes_give_the_same_with_and_without(world: int, tmp_path: Path) -> None:
    """Odd plans on gloo: gradients are bitwise those of the same plan without overlap."""
    mesh = (2,) if world == 2 else (2, 2)
    work = [{"overlap": model, "mesh": mesh, "random_costs": seed} for model, seed in (("gpt2", 1), ("llama", 2), ("mlp", 3))]
    results = launch(world, work, tmp_path, timeout_s=300)
    assert len(results) == len(work), results
    for case, result in zip(work, results, strict=True):
        assert "error" not in result, result
        assert result["differs"] == 0 and result["starts"] > (3 if case["overlap"] == "mlp" else 30), json.dumps(result)


@pytest.mark.gloo
@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_small_collectives_on_their_way(rounds: int, tmp_path: Path) -> None:
    """gloo's two threads corrupt memory when several all-gathers of a group run at once: only one is ever given to it."""
    result, planted = launch(2, [{"flights": rounds}, {"flights": 1, "at will": True}], tmp_path)
    assert result == {"wrong": 0, "at once": 1}, result.get("error")
    assert planted["at once"] > 1, "a wire that does not wait would not be seen"
