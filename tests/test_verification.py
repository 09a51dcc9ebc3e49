"""`verify` finds what it must: planted bugs in lowered programs, and no false alarms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_exact import captured, planned
from torch import fx

from netmind_autopar import plan as make_plan
from netmind_autopar import verify
from netmind_autopar.ir.errors import InputError, PlanError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Draft, Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.runtime.collectives import bucket, move
from netmind_autopar.verification import compare, relative_error

FAMILY, MESH = "gpt2", "a=2,b=2"


def moves(draft: Draft, *kinds: str) -> list[fx.Node]:
    return [n for n in draft.graph.nodes if n.target is move and n.args[1] in kinds]


def lose_a_reduction(draft: Draft) -> fx.Node:
    node = next(iter(moves(draft, "all_reduce", "reduce_scatter")))
    if node.args[1] == "all_reduce":
        node.args = (node.args[0], "recast", node.args[2], node.args[4], node.args[4])
    else:
        node.args = (node.args[0], "slice", node.args[2], node.args[3].replace("P(sum)", "R"), node.args[4])
    return node


def reduce_twice(draft: Draft) -> fx.Node:
    node = next(n for n in moves(draft, "all_reduce"))
    with draft.graph.inserting_after(node):
        again = draft.graph.create_node("call_function", move, node.args, name=f"{node.name}_again")
    again.meta = dict(node.meta)
    node.replace_all_uses_with(again)
    again.args = (node, *node.args[1:])
    draft.specs[again.name], draft.expects[again.name] = draft.specs[node.name], draft.expects[node.name]
    return again


def lose_a_bucket(draft: Draft) -> fx.Node:
    node = next(n for n in draft.graph.nodes if n.target is bucket)
    for user in list(node.users):
        user.replace_all_uses_with(node.args[0][user.args[1]])
    return node


def swap_operands(draft: Draft) -> fx.Node:
    node = next(n for n in draft.graph.nodes if n.target is torch.ops.aten.sub.Tensor or n.target is torch.ops.aten.div.Tensor)
    node.args = (node.args[1], node.args[0], *node.args[2:])
    return node


BUGS = {
    "lost reduction": lose_a_reduction,
    "double reduction": reduce_twice,
    "lost bucket": lose_a_bucket,
    "swapped operands": swap_operands,
}


def broken(lowered: Program, plant: Callable[[Draft], fx.Node]) -> tuple[Program, str]:
    with lowered.edit() as draft:
        node = plant(draft)
    return draft.program, node.name


@pytest.mark.parametrize("plant", BUGS.values(), ids=BUGS)
def test_planted_bugs_are_found(plant: Callable[[Draft], fx.Node]) -> None:
    model, inputs, program, rules, _ = captured(FAMILY, torch.float64)
    found = 0
    for seed in range(6):
        odd = {"random_costs": seed, "time_limit": 20.0, "gap": 0.05} if seed else {}
        plan = planned(FAMILY, torch.float64, MESH, **odd)
        try:
            bad, _ = broken(lower(program, rules, plan), plant)
        except StopIteration:
            continue
        report = compare(model, inputs, program, bad, plan)
        assert not report.ok
        assert report.max_rel_error > 1e-6
        found += 1
        if found == 2:
            return
    assert found


def test_the_first_difference_names_op_and_line() -> None:
    model, inputs, program, rules, _ = captured(FAMILY, torch.float64)
    plan = planned(FAMILY, torch.float64, MESH, random_costs=1, time_limit=20.0, gap=0.05)
    bad, name = broken(lower(program, rules, plan), lose_a_reduction)
    report = compare(model, inputs, program, bad, plan)
    assert "over axis" in report.first_difference or name.split("_all_reduce")[0] in report.first_difference
    assert ".py:" in report.first_difference


def test_verify_is_public_and_leaves_the_model_alone() -> None:
    model, inputs, *_ = captured("mlp", torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = make_plan(model, inputs, "a=2,b=2", cluster="h100-sxm")
    report = verify(model, inputs, plan, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert report.ok and report.first_difference == ""
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_verify_refuses_what_it_cannot_judge() -> None:
    model, inputs, *_ = captured("mlp", torch.float64)
    plan = make_plan(model, inputs, "a=2", cluster="h100-sxm")
    meta = torch.nn.Sequential(torch.nn.Linear(4, 4)).to("meta")
    with pytest.raises(PlanError, match="another model"):
        verify(torch.nn.Linear(3, 3), torch.zeros(4, 3), plan)
    meta_plan = make_plan(meta, torch.zeros(4, 4), "a=2", cluster="h100-sxm")
    with pytest.raises(InputError, match="meta device"):
        verify(meta, torch.zeros(4, 4), meta_plan)


def test_edited_choices_are_refused() -> None:
    model, inputs, *_ = captured("mlp", torch.float64)
    plan = make_plan(model, inputs, "a=2", cluster="h100-sxm")
    name = next(iter(plan.choices))
    for choices in ({**plan.choices, name: "zz"}, {**plan.choices, "nobody": "-"}, {k: v for k, v in plan.choices.items() if k != name}):
        with pytest.raises(PlanError):
            verify(model, inputs, Plan.loads(replace_choices(plan, choices)))


def replace_choices(plan: Plan, choices: dict[str, str]) -> str:
    return plan.model_copy(update={"choices": choices}).dumps()


def test_relative_error() -> None:
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert relative_error(a, a) == 0
    assert relative_error(a, a + 0.02) == pytest.approx(0.01)
    assert relative_error(a * 1e-15, a * 0, largest=1.0) < 1e-9
    assert not relative_error(a, a * float("nan")) <= 1e-4
    assert relative_error(torch.tensor([1]), torch.tensor([2])) == float("inf")
    assert relative_error(a, a.float()) == float("inf")
