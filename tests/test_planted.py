"""`verify` finds every planted bug, names its place, and finds nothing in correct programs."""

from __future__ import annotations

import functools

import models
import planted
import pytest
import torch
from planted import BUGS, Bug
from random_plans import random_plan
from torch import nn

from netmind_autopar.ir.mesh import parse_axes
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import Report, compare

SEEDS = 12


class Norms(nn.Module):
    """Convolution, batch norm with running statistics, a mean; one bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.middle, self.late, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.middle.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return nn.functional.mse_loss(self.head(torch.tanh(self.late(self.middle(y)))), target)


class Labels(nn.Module):
    """A classifier of which some labels may be ignored: none of the sample's is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(24, 12), nn.Linear(12, 12)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.table(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Experts(nn.Module):
    """A soft mixture of experts over tokens that are pooled by their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 12) / 3), nn.Parameter(torch.randn(4, 12, 8) / 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(self.gate(x), -1)
        y = torch.einsum("btd,edf,bte->betf", x, self.up, weights)
        y = torch.einsum("betf,efd->btd", torch.nn.functional.silu(y), self.down)
        return y.square().mean(), y.detach().amax(1)


@functools.cache
def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, object, Program, dict]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if name == "norms":
        model: nn.Module = Norms()
        inputs: object = {"x": torch.randn(12, 3, 4, 4, generator=generator), "target": torch.randn(12, 8, generator=generator)}
    elif name == "labels":  # all tokens equal, all labels equal: values that hide bugs
        model, inputs = Labels(), {"ids": torch.zeros(12, 4, dtype=torch.long), "labels": torch.ones(12, 4, dtype=torch.long)}
    elif name == "experts":
        model, inputs = Experts(), {"x": torch.ones(12, 8, 8)}
    else:
        small = {} if name == "mlp" else {"layers": 1}
        model, inputs = getattr(models, name)(dtype, 0.2 if name == "bert" else 0.0, **small)
        if name == "bert":
            mask = torch.ones(4, 8, dtype=torch.long)
            mask[1, 5:], mask[3, 3:] = 0, 0
            inputs = {**inputs, "attention_mask": mask}
    model = model.to(dtype).train()
    if isinstance(inputs, dict):
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


@functools.cache
def lowered(name: str, mesh: str, seed: int) -> tuple[Program, Plan]:
    _, _, program, rules = made(name)
    plan = random_plan(program, rules, mesh, seed)
    return lower(program, rules, plan), plan


def places(bug: Bug) -> list[tuple[str, str, int, int]]:
    """(model, mesh, seed, which) of `count` places, in different plans where there are some."""
    found: list[tuple[str, str, int, int]] = []
    for seed in range(SEEDS):
        for name in bug.models:
            for mesh in bug.meshes:
                sizes = tuple(n for _, n in parse_axes(mesh))
                count = planted.place_count(lowered(name, mesh, seed)[0], bug, sizes)
                if count:
                    found.append((name, mesh, seed, (7 * seed + len(found)) % count))
                if len(found) == bug.count:
                    return found
    return found


def judged(name: str, program: Program, plan: Plan, **options: object) -> Report:
    model, inputs, original, _ = made(name)
    return compare(model, inputs, original, program, plan, **options)  # type: ignore[arg-type]


def test_there_are_enough() -> None:
    assert len(BUGS) >= 40


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_planted_bugs_are_caught(bug: Bug) -> None:
    cases = places(bug)
    assert len(cases) == bug.count, "too few places for this bug"
    for name, mesh, seed, which in cases:
        good, plan = lowered(name, mesh, seed)
        found = planted.planted(good, bug, plan.sizes, which)
        assert found is not None
        bad, node, near = found
        report = judged(name, bad, plan)
        at = f"{name} {mesh} seed {seed}: {node.name}"
        assert not report.ok, at
        assert report.difference is not None, at
        assert {report.difference.node, report.difference.origin} & set(near), f"{at} at {node.meta.get('where')}\n{report}\n{near}"
        lines = {n.meta.get("where") for n in (*good.graph.nodes, *bad.graph.nodes) if n.name in near}
        assert report.difference.where in lines, at


@pytest.mark.parametrize("mesh", ["a=4", "a=2,b=2", "a=3"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "norms", "labels", "experts", "mlp"])
def test_nothing_is_found_in_correct_programs(name: str, mesh: str) -> None:
    for seed in range(2):
        good, plan = lowered(name, mesh, seed)
        report = judged(name, good, plan, steps=2, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        assert report.ok, str(report)
        assert report.first_difference == ""
