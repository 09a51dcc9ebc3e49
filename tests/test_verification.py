"""`verify` as users call it, what it refuses, and how errors are measured. What it finds is in test_planted.py."""

from __future__ import annotations

import pytest
import torch
from test_exact import captured

from netmind_autopar import plan as make_plan
from netmind_autopar import verify
from netmind_autopar.ir.errors import InputError, PlanError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.verification import relative_error


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
