"""Training loops behave as on one device: optimizers, clipping, schedules, averages, frozen parameters."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import launch
from gloo_training import AVERAGES, OPTIMIZERS, SCHEDULERS
from torch import Tensor

from netmind_autopar.ir.errors import InputError
from netmind_autopar.optim import LAMB, LARS

CLIPS = ("", "torch 2", "own 2", "foreach 2", "own inf", "torch inf", "own 1", "own 3")
PLANS: tuple[dict[str, Any], ...] = (
    {"model": "odd", "options": {"pins": {"up.weight": "S(0)", "down.weight": "S(1)", "up.bias": "S(0)", "norm.weight": "R"}}},
    {"model": "odd", "options": {"random_costs": 1}},
    {"model": "gpt2", "options": {"random_costs": 2}},
)


def matrix(world: int = 2) -> list[dict]:
    """Every optimizer with every schedule; clips and plans take turns."""
    rows = itertools.product(OPTIMIZERS, SCHEDULERS)
    out = []
    for i, (optimizer, scheduler) in enumerate(rows):
        plan = PLANS[2 if i % 7 == 3 else i % 2]
        out.append(
            {"training": "loop", "mesh": (world,), "optimizer": optimizer, "scheduler": scheduler, "clip": CLIPS[i % len(CLIPS)], **plan}
        )
    return out


def agree(work: list[dict], results: list[dict]) -> None:
    for case, result in zip(work, results, strict=False):
        assert "error" not in result, f"{case}\n{result['error']}"
        assert all(error <= 1e-9 for error in result.values()), (case, result)
    assert len(work) == len(results)


def by_hand(kind: str, weights: list[Tensor], steps: list[list[Tensor]]) -> list[Tensor]:
    """The papers' algorithms, one parameter after the other, with numbers in Python."""
    out = []
    for k, w in enumerate(weights):
        w, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
        for t, gradients in enumerate(steps, 1):
            g = gradients[k]
            if kind == "lars":
                decayed = w.dim() > 1 and float(w.norm()) > 0
                trust = 0.01 * float(w.norm()) / (float(g.norm()) + 0.1 * float(w.norm()) + 1e-9) if decayed else 1.0
                m = 0.9 * m + 0.5 * trust * (g + (0.1 if w.dim() > 1 else 0.0) * w)
                w = w - m
            else:
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
                u = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-6) + 0.1 * w
                w = w - 0.5 * float(w.norm()) / float(u.norm()) * u if float(w.norm()) and float(u.norm()) else w - 0.5 * u
        out.append(w)
    return out


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_optimizers_are_those_of_the_papers(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (4,), (2, 2, 3), (5, 1))
    weights = [torch.randn(s, generator=draw, dtype=torch.float64) * (i != 3) for i, s in enumerate(shapes)]  # the last is zero
    steps = [[torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes] for _ in range(3)]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    options: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1}
    optimizer = LARS(ours, trust=0.01, **options) if kind == "lars" else LAMB(ours, betas=(0.9, 0.99), **options)
    for gradients in steps:
        for p, g in zip(ours, gradients, strict=True):
            p.grad = g.clone()
        assert optimizer.step(lambda: 7) == 7
    torch.testing.assert_close([p.detach() for p in ours], by_hand(kind, weights, steps), rtol=1e-12, atol=1e-12)
    again = type(optimizer)(ours)
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"weight_decay": float("nan")}, {"eps": -1.0}])
@pytest.mark.parametrize("make", [LARS, LAMB])
def test_absurd_options_are_refused(make: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="negative or no number"):
        make([torch.nn.Parameter(torch.zeros(2))], **wrong)


@pytest.mark.gloo
def test_a_norm_of_pieces_is_seen(tmp_path: Path) -> None:
    """Bugs that are planted in the norms, and that the matrix above must catch."""
    work = [
        {**matrix()[0], "training": "bug", "optimizer": optimizer, "clip": clip, "bug": bug}
        for optimizer, clip, bug in (
            ("lamb", "", "local"),
            ("lars", "", "local"),
            ("sgd", "own 2", "counted twice"),
            ("sgd", "own 2", "local"),
            ("sgd", "own inf", "local"),
        )
    ]
    for case, result in zip(work, launch(2, work, tmp_path), strict=True):
        assert "error" not in result, result["error"]
        assert max(result.values()) > 1e-4, (case, result)


@pytest.mark.gloo
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_loops_equal_one_device(tmp_path: Path, part: int) -> None:
    """Every optimizer is in every third of the matrix."""
    work = [case for i, case in enumerate(matrix()) if (i + i // 3) % 3 == part]
    assert {case["optimizer"] for case in work} == set(OPTIMIZERS)
    agree(work, launch(2, work, tmp_path))


@pytest.mark.gloo
def test_averages_and_loss_scaling(tmp_path: Path) -> None:
    plans = (PLANS[0]["options"], {"random_costs": 3})
    work = [
        {"training": "averages", "model": "odd", "mesh": (2,), "average": name, "options": plan, "optimizer": optimizer}
        for name, plan, optimizer in zip(AVERAGES, plans * 2, ("sgd", "adamw fused", "lamb"), strict=False)
    ]
    agree(work, launch(2, work, tmp_path))
