"""Plans of small models: known optima as costs and collectives, limits, pins, determinism, and errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import InfeasibleError, InputError, PlanError
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.conversions import end_rules, needed_conversions, regathered
from netmind_autopar.solver.explain import class_rows, conversion_rows
from netmind_autopar.solver.fold import classes
from netmind_autopar.solver.solve import choices_to_strategies, solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash


class MLP(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(d, d), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).square().mean()


class Table(nn.Module):
    def __init__(self, rows: int, d: int) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(rows, d), nn.Linear(d, d)

    def forward(self, ids):
        return self.fc(self.table(ids)).square().mean()


def captured(make, *inputs):
    with torch.device("meta"):
        model = make()
    program = capture(model, inputs)
    return program, bind_program(program)


def planned(make, *inputs, mesh: str, **options):
    program, rules = captured(make, *inputs)
    return program, rules, solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=graph_hash(program), **options)


def meta(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=grad)


def sent(plan, phase: str) -> list[tuple[str, int]]:
    """Collectives of tensors, those of single numbers left out."""
    return [(c.kind, c.count) for c in plan.collectives if c.phase == phase and c.bytes > 64]


class WideMLP(nn.Module):
    """Parameters at both ends of a wide block, so that a gradient passes through it: h is the tensor to send, once each way."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.scale, self.up, self.down = nn.Parameter(torch.empty(d)), nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x * self.scale))).square().mean()


def test_wide_mlp_is_tensor_parallel():
    _, _, plan = planned(lambda: WideMLP(4096, 16384), meta(16, 4096), mesh="tp=4")
    assert sent(plan, "forward") == [("all_reduce", 1)]
    assert sum(n for _, n in sent(plan, "backward")) == 1
    assert plan.cost.memory.parameters < 4 * 2 * 4096 * 16384 / 4 * 1.01
    assert plan.status == "optimal" and plan.gap <= 1e-4


def test_small_model_large_batch_is_data_parallel():
    _, _, plan = planned(lambda: MLP(64, 128), meta(65536, 64), mesh="dp=4")
    assert sent(plan, "forward") == []
    assert {kind for kind, _ in sent(plan, "backward")} <= {"all_reduce", "reduce_scatter"}
    parameters = 4 * (64 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64)
    assert sum(c.bytes for c in plan.collectives if c.phase == "backward") <= 2 * parameters


def test_what_does_not_fit_is_stored_split_and_gathered_when_used():
    make, x = (lambda: MLP(2048, 8192)), meta(32768, 2048)
    _, _, free = planned(make, x, mesh="dp=4")
    whole = 4 * (2048 * 2048 + 2 * 2048 * 8192)
    state = free.cost.memory.parameters + free.cost.memory.gradients + free.cost.memory.optimizer
    assert state > 3 * whole
    program, rules, plan = planned(make, x, mesh="dp=4", memory_limit=free.cost.peak_bytes - 8 * whole // 5)
    assert plan.cost.peak_bytes <= plan.memory_limit_bytes < free.cost.peak_bytes
    assert plan.cost.memory.parameters < 0.6 * free.cost.memory.parameters
    gathered = [row for row in conversion_rows(program, rules, plan) if any("all_gather" in step for step in row.path)]
    assert any(row.producer.endswith("weight") or ".t" in row.producer for row in gathered)


def test_a_large_embedding_is_split():
    _, _, plan = planned(lambda: Table(4_000_000, 64), meta(1024, dtype=torch.long), mesh="tp=4")
    assert "d0" in plan.choices["table.weight"] or "d1" in plan.choices["table.weight"]
    assert max((c.bytes for c in plan.collectives), default=0) < 4 * 4_000_000 * 64 / 100


def test_an_impossible_limit_names_the_smallest_that_works():
    make, x = (lambda: MLP(256, 1024)), meta(64, 256)
    with pytest.raises(InfeasibleError) as caught:
        planned(make, x, mesh="dp=2,tp=2", memory_limit=1000)
    limit = int(re.search(r"(\d+) bytes \([^)]*\) are needed", caught.value.what)[1])
    assert caught.value.why.count("iB") >= 3 and caught.value.where
    _, _, plan = planned(make, x, mesh="dp=2,tp=2", memory_limit=limit)
    assert plan.cost.peak_bytes <= limit
    with pytest.raises(InfeasibleError):
        planned(make, x, mesh="dp=2,tp=2", memory_limit=int(limit * 0.99))


def test_prices_are_those_of_the_needed_conversions():
    program, rules, plan = planned(lambda: MLP(256, 1024), meta(64, 256), mesh="dp=2,tp=2", random_costs=3)
    again = regathered(program, classes(program, {**end_rules(program), **rules}), plan.regather)
    needed = needed_conversions(program, rules, choices_to_strategies(program, rules, plan), plan.sizes, again)
    conv = Conversions(plan.links(), plan.random_costs)
    total = sum(conv.seconds(n.source, n.target, bucketed=n.is_gradient) for n in needed)
    assert total == pytest.approx(plan.cost.communication_s, rel=1e-9)
    moved = sum(m.bytes for n in needed for m in conv.path(n.source, n.target))
    assert moved == sum(c.bytes for c in plan.collectives)
    assert sum(row.count for row in conversion_rows(program, rules, plan)) == len(needed)


def test_cost_adds_up_and_memory_is_the_peak():
    program, rules, plan = planned(lambda: MLP(256, 1024), meta(64, 256), mesh="dp=2,tp=2")
    assert plan.cost.step_s == pytest.approx(plan.cost.compute_s + plan.cost.communication_s)
    assert sum(plan.cost.memory.model_dump().values()) == plan.cost.peak_bytes
    assert plan.bound_s <= plan.cost.step_s and math.isclose(plan.gap, 1 - plan.bound_s / plan.cost.step_s, abs_tol=1e-12)
    rows = {row.name: row for row in class_rows(program, rules, plan)}
    assert rows["up.weight"].role == "param" and rows["up.weight"].choice == plan.choices["up.weight"]


def test_the_same_input_gives_the_same_bytes():
    texts = {planned(lambda: MLP(256, 1024), meta(64, 256), mesh="dp=2,tp=2", random_costs=seed)[2].dumps() for seed in (5, 5)}
    assert len(texts) == 1
    assert planned(lambda: MLP(256, 1024), meta(64, 256), mesh="dp=2,tp=2", random_costs=6)[2].dumps() not in texts


def test_two_meshes_in_one_process():
    program, rules = captured(lambda: MLP(256, 1024), meta(64, 256))
    key = graph_hash(program)
    plans = [solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=key) for mesh in ("tp=4", "dp=2,tp=2", "tp=4")]
    assert plans[0].dumps() == plans[2].dumps() and plans[1].sizes == (2, 2)


def test_pins_hold():
    make, x = (lambda: MLP(256, 1024)), meta(64, 256)
    for pin, want in (("S(0)", "d0"), (("S(1)",), "d1"), ({"tp": "R"}, "-")):
        assert planned(make, x, mesh="tp=4", pins={"up.weight": pin})[2].choices["up.weight"] == want
    for pins in ({"nope": "R"}, {"up.weight": {"dp": "R"}}, {"up.weight": "S(7)"}, {"up.weight": "sideways"}, {"up.weight": "R R"}):
        with pytest.raises(InputError):
            planned(make, x, mesh="tp=4", pins=pins)


def test_local_inputs_are_chosen():
    program, _, plan = planned(lambda: MLP(64, 128), meta(65536, 64), mesh="dp=4", inputs="local")
    (name,) = [i.name for i in program.inputs if i.role == "input"]
    assert plan.choices[f"input.{name}"] == "d0"
    assert plan.cost.memory.inputs == 65536 * 64 * 4 / 4


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError):
        planned(lambda: MLP(64, 128), meta(64, 64), mesh="dp=4", optimizer="magic")


def test_plans_of_other_graphs_and_edited_plans_are_refused():
    program, rules, plan = planned(lambda: MLP(64, 128), meta(64, 64), mesh="dp=4")
    other, other_rules = captured(lambda: MLP(64, 256), meta(64, 64))
    with pytest.raises(PlanError):
        choices_to_strategies(other, other_rules, plan)
    for edit in ({"up.weight": "zz"}, {"up.weight": "d0 d0"}, {"nobody": "-"}):
        with pytest.raises(PlanError, match=re.escape(next(iter(edit)))):
            choices_to_strategies(program, rules, plan.model_copy(update={"choices": {**plan.choices, **edit}}))
    fewer = {k: v for k, v in plan.choices.items() if k != "up.weight"}
    with pytest.raises(PlanError, match=r"up\.weight"):
        choices_to_strategies(program, rules, plan.model_copy(update={"choices": fewer}))
