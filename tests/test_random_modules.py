"""Random modules under random plans, all ranks in lockstep against the original: a wrong gradient anywhere is found here first.

The modules are those of `random_modules.py`. Plans come from the solver under random prices, and from `random_plans.py`, which
ignores prices altogether and so visits layouts that no solver would choose. `make fuzz` does the same at length.
"""

from __future__ import annotations

import functools
import linecache

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from random_check import Case, Subject, Verdict, smallest, story
from random_layers import LAYERS
from random_math import ARITHMETIC
from random_modules import DenseNorms, draw_recipe, random_module, recipe_of, refusal
from random_plans import random_plan
from random_shapes import SHAPES
from test_exact import captured as captured_family
from test_exact import checked as checked_family
from torch.utils import _pytree as pytree

MESHES = ("a=4", "a=2,b=2", "a=3")
QUICK, ALL = 10, 60  # modules


@functools.lru_cache(maxsize=2)
def subject(seed: int) -> Subject:
    return Subject(recipe_of(seed))


def check(seed: int, case: Case) -> None:
    verdict = subject(seed).judge(case)
    if not verdict.ok:
        recipe, least = smallest(recipe_of(seed), case)
        pytest.fail(f"module {seed}: {verdict.text}\n{story(recipe, case, least)}")


@pytest.mark.parametrize(("seed", "mesh"), [(s, MESHES[(s + k) % 3]) for s in range(QUICK) for k in range(2)])
def test_random_modules_are_exact(seed: int, mesh: str) -> None:
    check(seed, Case(mesh, "drawn", seed))
    if mesh == MESHES[seed % 3]:
        check(seed, Case(mesh, "solved", seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, ALL))
def test_more_random_modules_are_exact(seed: int) -> None:
    for mesh in (*MESHES, "a=2,b=3"):
        check(seed, Case(mesh, "drawn", seed))
        check(seed, Case(mesh, "solved", seed))


@settings(max_examples=6, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
@given(st.randoms(use_true_random=False), st.sampled_from(MESHES), st.integers(0, 99))
def test_drawn_by_hypothesis(source, mesh: str, seed: int) -> None:
    """The same generator with hypothesis choosing: it goes to corners that seeds do not, and shrinks what fails."""
    recipe = draw_recipe(source, 5)
    assume(recipe.steps and not refusal(recipe))
    note(recipe.source())
    verdict = Subject(recipe).judge(Case(mesh, "drawn", seed))
    assert verdict.ok, verdict.text


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


def test_modules_repeat_and_cover_everything() -> None:
    """The same seed gives the same module and numbers; every op is drawn; eager PyTorch is a judge of nearly all draws."""
    made: set[str] = set()
    heads: set[str] = set()
    draws = 0
    for seed in range(150):
        recipe = recipe_of(seed)
        made |= {step.op for step in recipe.steps}
        heads.add(recipe.head)
        draws += recipe.attempts
        if seed < 20:
            (model, inputs), (again, others) = recipe.build(), random_module(seed)
            torch.manual_seed(0)
            first = pytree.tree_leaves(model(*inputs))
            torch.manual_seed(0)
            assert all(torch.equal(a, b) for a, b in zip(first, pytree.tree_leaves(again(*others)), strict=True))
    assert heads == {"loss", "dict", "tuple", "tensor", "two", "inputs"}
    assert {op.__name__ for op in (*LAYERS, *SHAPES, *ARITHMETIC)} <= made
    assert 150 <= draws <= 150 * 1.25


def test_a_module_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were `tanh` wrong, nothing would be left of a module but a tanh and what its shape depends on."""
    seed = next(s for s in range(200) if "torch.tanh" in recipe_of(s).source() and len(recipe_of(s).steps) > 6)

    def judge(self: Subject, case: Case) -> Verdict:
        return Verdict(1.0, "wrong") if "torch.tanh" in self.recipe.source() else Verdict(0.0)

    monkeypatch.setattr(Subject, "judge", judge)
    whole, case = recipe_of(seed), Case("a=2", "drawn", 0)
    recipe, verdict = smallest(whole, case)
    assert "torch.tanh" in recipe.source() and not verdict.ok
    assert len(recipe.steps) < len(whole.steps) and recipe.head == "loss"
    fewer = [recipe.without(k) for k in range(len(recipe.steps))]
    assert all("torch.tanh" not in r.source() or refusal(r) for r in fewer)  # no step can go
    assert any(verdict.text in line for line in story(recipe, case, verdict).splitlines())


def test_a_wrong_judge_is_known() -> None:
    """Eager PyTorch's own batch norm gives its weight a wrong gradient in this module; numeric differentiation says so too."""
    torch.manual_seed(0)
    x, weights = torch.randn(1, 3, 1, 2, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    mean, var, scale = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5, torch.ones(3, dtype=torch.float64)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.batch_norm(x, mean, var, w, None, False).flatten(2).transpose(1, 2) * weights).sum()

    with DenseNorms():
        w = scale.clone().requires_grad_()
        loss(w).backward()
    assert w.grad is not None
    numeric = torch.stack([(loss(scale + h) - loss(scale - h)) / 2e-6 for h in torch.eye(3, dtype=torch.float64) * 1e-6])
    assert torch.allclose(w.grad, numeric, atol=1e-6)


def test_lines_of_a_module_are_found() -> None:
    """Its source is what error messages and reports quote."""
    model, _ = random_module(0)
    code = type(model).forward.__code__
    assert "def forward" in linecache.getline(code.co_filename, code.co_firstlineno)
