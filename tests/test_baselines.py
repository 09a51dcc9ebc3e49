"""Baselines: what each sends is what its authors say, every one is exact, and a model that has no place for one is told so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import zoo_hf
from torch import nn

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import InfeasibleError, InputError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.baselines import compare_baselines, solve_baseline, usual
from netmind_autopar.solver.recipes import RECIPES, axis_recipes
from netmind_autopar.solver.roles import roles_of
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare


class Mixture(nn.Module):
    """A layer whose tokens choose one of four experts softly; no attention."""

    def __init__(self, hidden: int = 16, wide: int = 24, experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.gate = nn.LayerNorm(hidden), nn.Linear(hidden, experts)
        self.up, self.down = nn.Parameter(torch.randn(experts, hidden, wide)), nn.Parameter(torch.randn(experts, wide, hidden))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        inside = torch.relu(torch.einsum("bsh,ehw->ebsw", y, self.up))
        out = torch.einsum("ebsw,ewh->ebsh", inside, self.down)
        return (x + torch.einsum("ebsh,bse->bsh", out, self.gate(y).softmax(-1))).square().mean()


def vit(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=4, num_labels=5
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=dtype)
    return models._build(lambda: ViTForImageClassification(config), dtype, "cpu"), {"pixel_values": images, "labels": torch.arange(4)}


def mixtral(experts: str) -> tuple[nn.Module, Any]:
    model, _ = zoo_hf.mixtral(torch.float64, experts=experts)
    return model, models._text(97, 4, 8)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "gpt2": lambda: models.gpt2(dropout=0.1),
    "llama": lambda: models.llama(heads=8, kv_heads=4),
    "bert": lambda: models.bert(dropout=0.1),
    "vit": lambda: vit(torch.float64),
    "mixtral": lambda: mixtral("batched_mm"),
    "grouped": lambda: mixtral("grouped_mm"),
    "mixture": lambda: (Mixture(), torch.randn(4, 8, 16, dtype=torch.float64)),
    "resnet": lambda: models.resnet50(blocks=(1, 1)),
}
GPT2_BYTES = 8 * (64 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32)


@functools.cache
def captured(name: str) -> tuple[nn.Module, Any, Program, dict[str, Rule]]:
    model, inputs = MODELS[name]()
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


@functools.cache
def planned(name: str, mesh: str, baseline: str, memory: int | None = None, checkpoint: bool = False) -> Plan:
    _, _, program, rules = captured(name)
    where, options = make_mesh(mesh, "h100-sxm"), {"memory_limit": memory, "checkpoint": checkpoint}
    return solve_baseline(program, rules, where, baseline, graph_hash=graph_hash(program), **options)  # type: ignore[arg-type]


def sent(plan: Plan, kind: str, phase: str, least: int = 100) -> tuple[int, int]:
    """(how many, bytes) of collectives of a kind; those of single numbers left out."""
    rows = [c for c in plan.collectives if c.kind == kind and c.phase == phase and c.bytes >= least]
    return sum(c.count for c in rows), sum(c.bytes for c in rows)


def kinds(plan: Plan, least: int = 100) -> set[tuple[str, str]]:
    return {(c.kind, c.phase) for c in plan.collectives if c.bytes >= least}


NOT_THERE = {"resnet": ("megatron-tp-sp", "ulysses", "ulysses-fsdp"), "mixture": ("ulysses", "ulysses-fsdp")}
FOUR = [(m, "a=4", b) for m in MODELS for b in RECIPES if not (m in ("mixtral", "grouped") and b.startswith(("megatron", "ulysses")))]
PRODUCTS = ("ddp", "fsdp", "ddp+fsdp", "zero1+megatron-tp", "fsdp+megatron-tp-sp", "fsdp+ulysses")
TWO = [(m, "dp=2,tp=2", b) for m in MODELS for b in PRODUCTS]
CASES = [(m, mesh, b) for m, mesh, b in FOUR + TWO if not any(x in b for x in NOT_THERE.get(m, ()))]
QUICK = {("gpt2", b) for b in RECIPES} | {("llama", "fsdp+megatron-tp-sp"), ("vit", "fsdp+ulysses"), ("grouped", "fsdp+megatron-tp-sp")}


@pytest.mark.parametrize(
    ("name", "mesh", "baseline"), [pytest.param(*c, id="-".join(c), marks=() if (c[0], c[2]) in QUICK else pytest.mark.slow) for c in CASES]
)
def test_every_baseline_is_exact(name: str, mesh: str, baseline: str) -> None:
    model, inputs, program, rules = captured(name)
    plan = planned(name, mesh, baseline)
    report = compare(model, inputs, program, lower(program, rules, plan), plan)
    assert report.ok and report.max_rel_error <= (1e-9 if name not in ("llama", "mixtral", "grouped") else 1e-5), report.first_difference


def test_ddp_reduces_every_gradient_once() -> None:
    plan = planned("gpt2", "a=4", "ddp")
    assert kinds(plan) == {("all_reduce", "backward")}
    parameters = 4 + 2 * 12  # of the stem, the final norm, and two blocks; the head is the embedding's table
    assert sent(plan, "all_reduce", "backward") == (parameters, 2 * 3 * GPT2_BYTES // 4)
    assert plan.cost.memory.parameters == GPT2_BYTES and plan.cost.memory.optimizer == 2 * GPT2_BYTES


def test_zero1_gathers_once_and_holds_a_quarter() -> None:
    plan = planned("gpt2", "a=4", "zero1")
    assert kinds(plan) == {("all_gather", "forward"), ("reduce_scatter", "backward")}
    for kind, phase in kinds(plan):
        assert sent(plan, kind, phase) == (28, 3 * GPT2_BYTES // 4)
    assert plan.cost.memory.optimizer == 2 * GPT2_BYTES // 4


def test_fsdp_gathers_in_both_phases() -> None:
    plan = planned("gpt2", "a=4", "fsdp")
    assert kinds(plan) == {("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")}
    assert sent(plan, "all_gather", "forward") == sent(plan, "reduce_scatter", "backward") == (28, 3 * GPT2_BYTES // 4)
    count, size = sent(plan, "all_gather", "backward")
    assert count < 28 and size >= 0.9 * 3 * GPT2_BYTES // 4  # biases are not needed again
    assert plan.cost.memory.parameters == GPT2_BYTES // 4
    assert plan.cost.peak_bytes < planned("gpt2", "a=4", "zero1").cost.peak_bytes


def test_megatron_reduces_twice_per_block_and_phase() -> None:
    plan = planned("llama", "tp=4", "megatron-tp")
    activation, tokens = 4 * 8 * 32 * 8, 4 * 8 * 8
    one, number = 2 * 3 * activation // 4, 2 * 3 * tokens // 4
    assert sent(plan, "all_reduce", "forward") == (2 * 2 + 1 + 3, 5 * one + 3 * number)  # blocks, the embedding, three of the loss
    assert sent(plan, "all_reduce", "backward") == (2 * 2 + 1, 5 * one)
    assert kinds(plan) == {("all_reduce", "forward"), ("all_reduce", "backward")}
    assert plan.choices["model.embed_tokens.weight"] == plan.choices["lm_head.weight"] == "d0"
    assert plan.choices["model.layers.*.self_attn.o_proj.weight"] == "d1" and plan.choices["model.norm.weight"] == "-"


def test_sequence_parallel_sends_as_much_by_gathers_and_scatters() -> None:
    plan, whole = planned("gpt2", "tp=4", "megatron-tp-sp"), planned("gpt2", "tp=4", "megatron-tp")
    activation = 4 * 8 * 32 * 8
    for kind in ("all_gather", "reduce_scatter"):
        assert sent(plan, kind, "forward") == (5, 5 * 3 * activation // 4)
    gathered = sent(plan, "all_gather", "backward")[1] - sent(whole, "all_gather", "backward")[1]
    assert gathered == sent(plan, "reduce_scatter", "backward")[1] == 5 * 3 * activation // 4
    assert sent(plan, "all_reduce", "forward", 5000) == (0, 0)
    assert plan.cost.memory.activations < whole.cost.memory.activations


def test_ulysses_sends_activations_around_attention() -> None:
    fused, apart = planned("gpt2", "sp=4", "ulysses"), planned("llama", "sp=4", "ulysses")
    each = 4 * 8 * 32 * 8 // 4 * 3 // 4  # of a quarter three quarters go elsewhere
    assert sent(fused, "all_to_all", "forward") == (2 * 2, 2 * 4 * each)
    assert sent(apart, "all_to_all", "forward") == (2 * 4, 2 * 3 * each)  # keys and values have half the heads
    assert sent(apart, "all_to_all", "backward") == (2 * 4, 2 * 3 * each)
    assert kinds(apart) == {("all_to_all", "forward"), ("all_to_all", "backward"), ("all_reduce", "backward")}


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_no_baseline_beats_the_plan(name: str) -> None:
    _, _, program, rules = captured(name)
    mesh = make_mesh("dp=2,tp=2", "h100-sxm")
    best = solve(program, rules, mesh, graph_hash=graph_hash(program))
    for baseline in PRODUCTS:
        plan = planned(name, "dp=2,tp=2", baseline)
        assert best.bound_s <= best.cost.step_s <= plan.cost.step_s * (1 + 1e-4), baseline
        assert plan.bound_s >= best.bound_s * (1 - 1e-9)


def test_what_does_not_fit_says_how_much_it_takes() -> None:
    peak = planned("gpt2", "a=4", "ddp").cost.peak_bytes
    with pytest.raises(InfeasibleError, match=r"'ddp' does not fit: \d+ bytes"):
        planned("gpt2", "a=4", "ddp", peak // 2)
    assert planned("gpt2", "a=4", "fsdp", peak // 2).cost.peak_bytes <= peak // 2


def deep(make: Callable[..., tuple[nn.Module, Any]], **options: Any) -> tuple[nn.Module, Any]:
    """Three blocks, whose keys and values are no results."""
    model, inputs = make(layers=3, seq=16, **options)
    model.config.use_cache = False  # type: ignore[union-attr, assignment]
    return model, inputs


DEEP = {"gpt2": lambda: deep(models.gpt2, dropout=0.1), "llama": lambda: deep(models.llama, heads=8, kv_heads=4)}
MODELS |= {f"{name}, deep": make for name, make in DEEP.items()}
CHECKPOINTED = [(f"{m}, deep", mesh, b) for m in DEEP for mesh, b in [*(("a=4", b) for b in RECIPES), ("dp=2,tp=2", "fsdp+megatron-tp-sp")]]


@pytest.mark.parametrize(
    ("name", "mesh", "baseline"),
    [pytest.param(*c, id="-".join(c), marks=() if c[2].startswith(("zero1", "fsdp")) else pytest.mark.slow) for c in CHECKPOINTED],
)
def test_checkpointed_blocks_are_exact_and_hold_less(name: str, mesh: str, baseline: str) -> None:
    model, inputs, program, rules = captured(name)
    plan, kept = planned(name, mesh, baseline, checkpoint=True), planned(name, mesh, baseline)
    report = compare(model, inputs, program, lower(program, rules, plan), plan)
    assert report.ok and report.max_rel_error <= 1e-9, report.first_difference
    assert plan.recompute and plan.cost.step_s > kept.cost.step_s and plan.cost.peak_bytes <= kept.cost.peak_bytes
    tokens = 4 * 16 * 32 * 8 // (4 if baseline.startswith(("ddp", "zero", "fsdp", "uly")) else 1)
    if baseline.startswith("fsdp") or baseline == "megatron-tp":
        assert plan.cost.memory.activations <= (3 + 2) * tokens + 5000, "more is kept than what leaves the blocks"


def test_checkpointed_fsdp_gathers_no_more() -> None:
    plan, kept = (planned("llama, deep", "a=4", "fsdp", checkpoint=c) for c in (True, False))
    for phase in ("forward", "backward"):
        assert sent(plan, "all_gather", phase) == sent(kept, "all_gather", phase)
    assert not any(".add.1" in name and "mlp" not in name for name in plan.recompute)  # a block's result is kept


def test_a_model_without_blocks_has_nothing_to_checkpoint() -> None:
    with pytest.raises(InputError, match="no repeated blocks"):
        planned("mixture", "a=4", "ddp", checkpoint=True)


def test_a_comparison_has_a_row_for_each() -> None:
    _, _, program, rules = captured("gpt2, deep")
    mesh, key = make_mesh("dp=4", "h100-sxm"), graph_hash(program)
    free = planned("gpt2, deep", "dp=4", "zero1")
    limit = planned("gpt2, deep", "dp=4", "zero1", checkpoint=True).cost.peak_bytes
    assert limit < free.cost.peak_bytes
    rows = compare_baselines(program, rules, mesh, ("ddp", "zero1", "fsdp", "fsdp@b"), graph_hash=key, memory_limit=limit)
    assert [(c.row.name, c.row.status) for c in rows] == [
        ("ddp", "does not fit"),
        ("zero1, checkpointed", "planned"),
        ("fsdp", "planned"),
        ("fsdp@b", "no place"),
    ]
    assert rows[0].row.peak_bytes == planned("gpt2, deep", "dp=4", "ddp").cost.peak_bytes > limit  # type: ignore[operator]
    assert len(usual(mesh)) == len(RECIPES) and "fsdp+megatron-tp" in usual(make_mesh("dp=2,tp=2", "h100-sxm"))


def test_no_place_is_an_error_that_says_why() -> None:
    for name, mesh, baseline, word in (
        ("resnet", "a=2", "ulysses", "no attention"),
        ("resnet", "a=2", "megatron-tp-sp", "no sequence"),
        ("gpt2", "a=8", "ddp", "batch of 4"),
        ("gpt2", "dp=3,tp=2", "ddp+megatron-tp", "batch of 4"),
        ("gpt2", "a=3", "megatron-tp", "heads of 4"),
        ("gpt2", "a=8", "ulysses", "heads of 4"),
        ("gpt2", "a=4", "dpp", "unknown baseline"),
        ("gpt2", "a=4", "fsdp@b", "axis 'b'"),
        ("gpt2", "a=4", "fsdp+megatron-tp", "no axis is left"),
        ("gpt2", "a=2,b=2", "fsdp@a+ddp@a", "axis 'a'"),
    ):
        with pytest.raises(InputError) as caught:
            planned(name, mesh, baseline)
        assert word in f"{caught.value.what} {caught.value.why}", caught.value


def test_axes_go_to_recipes_by_name_and_order() -> None:
    def names(baseline: Any, mesh: str) -> list[str]:
        return [recipe.name for recipe in axis_recipes(baseline, make_mesh(mesh, "h100-sxm"))]

    assert names("fsdp+megatron-tp", "dp=2,tp=2") == names("megatron-tp+fsdp", "a=2,b=2") == ["fsdp", "megatron-tp"]
    assert names("fsdp+megatron-tp", "tp=2,dp=2") == ["megatron-tp", "fsdp"]
    assert names("megatron-tp-sp", "dp=2,tp=2") == names("megatron-tp-sp", "replica=2,model=2") == ["ddp", "megatron-tp-sp"]
    assert names("fsdp", "dp=2,tp=2") == ["fsdp", "fsdp"] and names("ddp+fsdp", "a=2,b=2") == ["ddp", "fsdp"]
    assert names("ddp+fsdp", "shard=2,replicate=2") == ["fsdp", "ddp"]
    assert names("fsdp+megatron-tp+ulysses", "sp=2,dp=2,tp=2") == ["ulysses", "fsdp", "megatron-tp"]
    assert names({"b": "fsdp", "a": "ulysses"}, "a=2,b=2") == names("fsdp@b+ulysses@a", "a=2,b=2") == ["ulysses", "fsdp"]
    assert names("fsdp@a*b+megatron-tp@c", "a=2,b=2,c=2") == ["fsdp", "fsdp", "megatron-tp"]


def test_roles_are_read_off_the_graph() -> None:
    _, _, program, rules = captured("llama")
    roles = roles_of(program, rules)
    assert roles.batch_size == 4 and len(roles.sequence) == 1 and len(roles.stream) == 1
    assert len(roles.heads) == 2 and len(roles.pairs) == 4  # heads and the hidden features of two blocks
    assert roles.of("model_layers_0_mlp_down_proj_mm", roles.split) == ("k",)
    assert roles.of("model_layers_1_self_attn_q_proj_mm", roles.split) == ("n.0",)
    assert roles.of("model_layers_0_mlp_up_proj_mm", roles.stream) == ("k",)


def test_the_same_baseline_gives_the_same_bytes() -> None:
    texts = {planned.__wrapped__("gpt2", "dp=2,tp=2", "fsdp+megatron-tp").dumps() for _ in range(2)}
    assert len(texts) == 1
