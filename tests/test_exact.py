"""Every feasible plan is a correct plan: all ranks in lockstep against the original model, real and random prices."""

from __future__ import annotations

import functools

import models
import pytest
import torch

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import Optimizer, Report, compare

MESHES = ("a=1", "a=4", "a=2,b=2")
FAMILIES = ("gpt2", "llama", "bert", "resnet50", "mlp")


def optimizers(family: str) -> dict[str, Optimizer]:
    """ResNet takes small steps: at larger ones eager float32 is 1e-3 and more from eager float64 by itself, where a ReLU flips."""
    sgd, adamw = (1e-4, 1e-4) if family == "resnet50" else (0.05, 1e-3)
    return {"sgd": lambda p: torch.optim.SGD(p, lr=sgd, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=adamw)}


# 60 odd plans; the deep ResNet takes as long to plan as the others together.
RANDOM = [(m, mesh, seed) for m, n in (("gpt2", 8), ("llama", 8), ("bert", 8), ("mlp", 4)) for mesh in MESHES[1:] for seed in range(n)]
RANDOM += [("resnet50", mesh, seed) for mesh in MESHES[1:] for seed in range(2)]
RANDOM_QUICK = [case for case in RANDOM if case[2] < (1 if case[0] == "resnet50" else 4)]


@functools.cache
def captured(family: str, dtype: torch.dtype, **options: float) -> tuple[torch.nn.Module, object, Program, dict, str]:
    model, inputs = getattr(models, family)(dtype=dtype, **options)
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program), graph_hash(program)


def planned(family: str, dtype: torch.dtype, mesh: str, **options: object) -> Plan:
    _, _, program, rules, hash_ = captured(family, dtype)
    return solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=hash_, cluster="h100-sxm", **options)  # type: ignore[arg-type]


def checked(family: str, dtype: torch.dtype, plan: Plan, **options: object) -> Report:
    model, inputs, program, rules, _ = captured(family, dtype)
    return compare(model, inputs, program, lower(program, rules, plan), plan, **options)  # type: ignore[arg-type]


def test_there_are_sixty_odd_plans() -> None:
    assert len(RANDOM) >= 60


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_plan_is_exact(family: str, dtype: torch.dtype, mesh: str) -> None:
    plan = planned(family, dtype, mesh)
    for name, optimizer in optimizers(family).items():
        report = checked(family, dtype, plan, steps=3, optimizer=optimizer)
        assert report.ok, f"{name}: {report.max_rel_error:.2g} {report.first_difference}"
        assert {row.kind for row in report.rows} >= {"output", "gradient"}


@pytest.mark.parametrize(
    ("family", "mesh", "seed"),
    [pytest.param(*c, marks=() if c in RANDOM_QUICK else pytest.mark.slow, id="-".join(map(str, c))) for c in RANDOM],
)
def test_odd_plans_are_exact(family: str, mesh: str, seed: int) -> None:
    plan = planned(family, torch.float64, mesh, random_costs=seed, time_limit=20.0, gap=0.05)
    report = checked(family, torch.float64, plan)
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


@pytest.mark.parametrize("mesh", ["a=3", "a=2,b=3"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mlp"])
def test_dims_that_do_not_divide(family: str, mesh: str) -> None:
    for seed in (0, 1):
        plan = planned(family, torch.float64, mesh, random_costs=seed, time_limit=20.0, gap=0.05)
        report = checked(family, torch.float64, plan)
        assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dropout_drops_the_same_on_every_mesh(family: str, mesh: str) -> None:
    model, inputs, program, rules, hash_ = captured(family, torch.float64, dropout=0.2)
    assert any(i.role == "seed" for i in program.inputs)
    for random_costs in (None, 3):
        plan = solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=hash_, random_costs=random_costs, time_limit=20.0, gap=0.05)
        report = compare(model, inputs, program, lower(program, rules, plan), plan, steps=2)
        assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"
