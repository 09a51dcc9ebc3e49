"""Random modules under random plans, all ranks in lockstep against the original: a wrong gradient anywhere is found here first.

The modules are those of `random_modules.py`. Plans come from the solver under random prices, and from `random_plans.py`, which
ignores prices altogether and so visits layouts that no solver would choose.
"""

from __future__ import annotations

import functools

import pytest
import torch
from random_modules import random_module
from random_plans import random_plan
from test_exact import captured as captured_family
from test_exact import checked as checked_family

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare

MESHES = ("a=2,b=2", "a=3", "a=4", "a=2,b=3")
QUICK, ALL = 16, 120  # modules


@functools.lru_cache(maxsize=4)
def captured(seed: int):
    model, inputs = random_module(seed)
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


def check(seed: int, plan: Plan) -> None:
    model, inputs, program, rules = captured(seed)
    lowered = lower(program, rules, plan)
    report = compare(model, inputs, program, lowered, plan, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def some(cases: list[tuple], quick: int) -> list:
    return [pytest.param(*c, marks=() if c[0] < quick else pytest.mark.slow, id="-".join(map(str, c))) for c in cases]


@pytest.mark.parametrize(
    ("seed", "mesh"), some([(s, MESHES[(s + k) % 4]) for s in range(ALL) for k in range(4 if s >= QUICK else 2)], QUICK)
)
def test_random_plans_of_random_modules(seed: int, mesh: str) -> None:
    _, _, program, rules = captured(seed)
    check(seed, random_plan(program, rules, mesh, seed))


@pytest.mark.parametrize(("seed", "mesh"), some([(s, MESHES[s % 4]) for s in range(ALL)], 8))
def test_solved_plans_of_random_modules(seed: int, mesh: str) -> None:
    _, _, program, rules = captured(seed)
    links = make_mesh(mesh, "h100-sxm")
    plan = solve(program, rules, links, graph_hash=graph_hash(program), random_costs=seed, time_limit=20.0, gap=0.2)
    check(seed, plan)


FAMILIES = [(seed, family, mesh) for seed in range(6) for family in ("gpt2", "llama", "bert", "mlp", "resnet50") for mesh in MESHES]
FAMILIES = [c for c in FAMILIES if c[1] != "resnet50" or c[0] < 2]


@pytest.mark.parametrize(
    ("seed", "family", "mesh"),
    [
        pytest.param(
            *c, marks=() if c[0] == 0 and c[2] in MESHES[:2] and c[1] != "resnet50" else pytest.mark.slow, id="-".join(map(str, c))
        )
        for c in FAMILIES
    ],
)
def test_random_plans_of_known_models(seed: int, family: str, mesh: str) -> None:
    _, _, program, rules, _ = captured_family(family, torch.float64)
    report = checked_family(family, torch.float64, random_plan(program, rules, mesh, seed))
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def test_modules_differ_and_repeat() -> None:
    """The generator is deterministic and covers what it is meant to cover."""
    seen: set[str] = set()
    for seed in range(120):
        model, inputs = random_module(seed)
        again, _ = random_module(seed)
        a, b = model(*inputs), again(*inputs)
        first = a[0] if isinstance(a, tuple) else next(iter(a.values())) if isinstance(a, dict) else a
        second = b[0] if isinstance(b, tuple) else next(iter(b.values())) if isinstance(b, dict) else b
        assert torch.equal(first, second)
        seen |= {model.head, *(type(m).__name__ for m in model.layers)}
    assert {"loss", "dict", "tuple", "tensor", "two", "inputs", "Linear", "LayerNorm", "Embedding"} <= seen
    assert {n for n in seen if n.startswith("Conv")} and {n for n in seen if n.startswith("BatchNorm")}
