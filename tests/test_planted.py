"""`verify` finds every planted bug, names its place, and finds nothing in correct programs."""

from __future__ import annotations

import functools
from dataclasses import replace

import models
import planted
import pytest
import torch
from planted import Bug
from planted_bugs import BUGS
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
    plan = random_plan(program, rules, mesh, seed).model_copy(update={"overlap": False})
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


def bad_of(name: str, mesh: str, seed: int, bug: str) -> tuple[Program, Plan]:
    good, plan = lowered(name, mesh, seed)
    found = planted.planted(good, BUGS[bug], plan.sizes, 0)
    assert found is not None
    return found[0], plan


def test_a_frozen_parameter_must_get_no_gradient() -> None:
    good, plan = lowered("norms", "a=2", 0)
    report = judged("norms", planted.with_frozen_gradient(good, "middle.bias"), plan)
    assert not report.ok
    assert "middle.bias" in [row.name for row in report.rows if not row.ok]


def test_a_parameter_of_the_step_before() -> None:
    """The value that was there at capture is baked in: noise on the parameters shows it, and so does a second step."""
    model, *_ = made("norms")
    node = next(i.node for i in made("norms")[2].inputs if i.name == "head.weight")
    whole = (p for seed in range(SEEDS) if str((p := lowered("norms", "a=2", seed))[0].specs[node]).endswith(" R"))
    good, plan = next(whole)
    bad = planted.with_baked_parameter(good, "head.weight", model.get_parameter("head.weight").detach())
    report = judged("norms", bad, plan)
    assert not report.ok and "head" in report.difference.module
    assert judged("norms", bad, plan, perturb=0.0).ok
    trained = judged("norms", bad, plan, perturb=0.0, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert not trained.ok and {row.step for row in trained.rows if not row.ok} == {1}


def test_an_update_that_one_rank_misses() -> None:
    """An optimizer that treats ranks unlike: the parameters after the step tell, before any result does."""
    good, plan = lowered("norms", "a=2", 0)
    calls = []

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        calls.append(1)
        return torch.optim.SGD(parameters, lr=0.0 if len(calls) == 2 else 0.1)  # type: ignore[arg-type]

    report = judged("norms", good, plan, optimizer=optimizer)
    assert not report.ok
    assert {row.kind for row in report.rows if not row.ok} == {"parameter"}


HIDDEN = {"count of the loss not reduced": "labels", "ignored labels counted": "labels", "vocabulary offset": "labels"}


@pytest.mark.parametrize("bug", HIDDEN)
def test_values_that_hide_a_bug_do_not_hide_it(bug: str) -> None:
    """Equal labels, none ignored, equal tokens: without the noise these bugs give the right numbers, with it they do not."""
    found = places(replace(BUGS[bug], models=(HIDDEN[bug],), count=1))
    name, mesh, seed, which = found[0]
    good, plan = lowered(name, mesh, seed)
    bad, *_ = planted.planted(good, BUGS[bug], plan.sizes, which)  # type: ignore[misc]
    assert not judged(name, bad, plan).ok
    if bug != "vocabulary offset":
        assert judged(name, bad, plan, perturb=0.0).ok


def test_float32_is_checked_in_float64_too() -> None:
    """An epsilon that is a little off is within float32's tolerance and outside of float64's."""
    model, inputs, program, rules = made("gpt2", torch.float32)
    plan = random_plan(program, rules, "a=2", 0)
    good = lower(program, rules, plan)
    bug = Bug(
        lambda draft, sizes: (
            (n, lambda n=n: planted.set_arg(n, "eps", lambda old: old * 1.01)) for n in planted.ops(draft, "aten.native_layer_norm")
        )
    )
    bad, node, _ = planted.planted(good, bug, plan.sizes, 0)  # type: ignore[misc]
    report = compare(model, inputs, program, bad, plan)
    assert not report.ok
    assert report.difference.node == node.name
    assert compare(model, inputs, program, good, plan).ok


def test_a_buffer_whose_new_value_is_lost() -> None:
    """The program hands out no new running variance: the model's changes, the ranks' would stay."""
    model, inputs, program, rules = made("norms")
    lost = next(k for k, o in enumerate(program.outputs) if o.name == "norm.running_var")

    def without(whole: Program) -> Program:
        with whole.edit() as draft:
            out = next(n for n in draft.graph.nodes if n.op == "output")
            leaves = planted.tree_leaves(out.args)
            out.args = ((*leaves[:lost], *leaves[lost + 1 :]),)
        return replace(draft.program, outputs=(*whole.outputs[:lost], *whole.outputs[lost + 1 :]))

    small = without(program)
    plan = random_plan(small, rules, "a=2", 0)
    report = compare(model, inputs, small, lower(small, rules, plan), plan)
    assert [(row.kind, row.name) for row in report.rows if not row.ok] == [("buffer", "norm.running_var")]


class Angles(nn.Module):
    """Has no value where noise moves its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((6,), 0.99, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.asin(self.w)).sum()


def test_noise_that_drives_a_model_out_of_its_range_is_taken_back() -> None:
    model, x = Angles(), torch.linspace(1, 2, 24, dtype=torch.float64).reshape(4, 6)
    program = capture(model, x)
    rules = bind_program(program)
    plan = random_plan(program, rules, "a=2", 1)
    report = compare(model, x, program, lower(program, rules, plan), plan, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    assert report.ok
    assert any("as given" in note for note in report.notes)


def test_the_report_is_readable() -> None:
    bad, plan = bad_of("norms", "a=4", 0, "doubled all-reduce")
    report = judged("norms", bad, plan)
    lines = str(report).splitlines()
    failed = [row for row in report.rows if not row.ok]
    assert f"{len(failed)} failed" in lines[0]
    worst = [row.error / row.tolerance for row in report.worst()[: len(failed)]]
    assert worst == sorted(worst, reverse=True)
    assert any(line.startswith("first difference: ") and "test_planted.py:" in line for line in lines)
