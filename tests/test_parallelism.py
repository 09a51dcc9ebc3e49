"""Sequence, context, vocabulary and expert parallelism: plans the solver finds when they pay, no flag asked, each exact.

The devices are slow and the links fast in proportion, so that models which run in a blink have the prices of large ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
from parallel_models import Decoder, EncoderDecoder, Experts, text, tokens, translation
from random_plans import random_plan
from torch import nn

from netmind_autopar.ir.mesh import Axis, Device, Mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare


def mesh(axis: str, size: int, bandwidth_bytes_s: float = 1e9) -> Mesh:
    """1 GFLOP/s and 10 GB/s per device; messages cost next to nothing."""
    device = Device("cpu", (("float32", 1e9), ("float64", 1e9)), 1 << 34, 1e10, 1e9, 1e-8)
    return Mesh((Axis(axis, size, bandwidth_bytes_s, 1e-8),), device)


def solved(model: nn.Module, inputs: Any, where: Mesh, **options: Any) -> Plan:
    """The plan at real prices, proven optimal and checked in lockstep."""
    program = capture(model, inputs)
    rules = bind_program(program)
    plan = solve(program, rules, where, graph_hash=graph_hash(program), **options)
    assert plan.status == "optimal"
    check(model, inputs, program, rules, plan)
    return plan


def check(model: nn.Module, inputs: Any, program: Program, rules: dict[str, Rule], plan: Plan, limit: float = 1e-9) -> None:
    """`ok` judges Llama alone: it computes in float32 in places, which the report widens and holds to 1e-9 apart."""
    report = compare(model, inputs, program, lower(program, rules, plan), plan)
    assert report.ok and report.max_rel_error <= limit, f"{report.max_rel_error:.2g} {report.first_difference}"


def sent(plan: Plan, kind: str, phase: str = "") -> int:
    """Bytes that one device sends in collectives of a kind."""
    return sum(c.bytes for c in plan.collectives if c.kind == kind and phase in c.phase)


def letters(plan: Plan, *ends: str) -> set[str]:
    """The choices of all classes whose names end so."""
    found = {choice for name, choice in plan.choices.items() if name.endswith(ends)}
    assert found, f"no class ends in {ends}: {list(plan.choices)}"
    return found


FORWARD_NORMS, PROJECTIONS = (".native_layer_norm",), (".q.mm", ".k.mm", ".v.mm", ".o.mm", ".up.mm", ".down.mm")


def test_vocabulary_split_embedding_and_loss() -> None:
    """A large tied vocabulary, few tokens: the table never travels, of the logits two numbers a token do."""
    vocab, hidden, count = 1001, 16, 16
    plan = solved(Decoder(vocab, hidden, 4, 4, 32, layers=1, tied=True), text(vocab, 1, count), mesh("tp", 4))
    assert plan.choices["embed.weight"] == "d0"
    assert letters(plan, "embed.embedding", "embed.embedding_backward@backward") == {"v"}
    assert letters(plan, "head.mm") == {"n"} and letters(plan, "sum_exp", "pick") == {"c"} and letters(plan, "amax") == {"b"}
    assert letters(plan, "cross_entropy_backward@backward") == {"c"}
    assert sum(c.bytes for c in plan.collectives) < 0.5 * count * vocab * 8, "logits or the table were sent"


def test_megatron_tensor_and_sequence_parallel() -> None:
    """Weights large beside the activations: heads and columns split, rows split back; norms on the sequence, gathers and
    reduce-scatters instead of all-reduces."""
    hidden, count = 64, 32
    plan = solved(Decoder(64, hidden, 4, 4, 4 * hidden), text(64, 1, count), mesh("tp", 4))
    assert letters(plan, ".attn.q.mm", ".attn.k.mm", ".attn.v.mm") == {"n.0"} and letters(plan, ".attn.o.mm") == {"k.0"}
    assert letters(plan, ".up.mm") == {"n"} and letters(plan, ".down.mm") == {"k"}
    assert letters(plan, ".attn.attention", ".attn.attention_backward@backward") == {"g"}
    assert letters(plan, *FORWARD_NORMS) == {"a"}, "norms are not split over the sequence"
    assert sent(plan, "reduce_scatter", "forward") > 0 < sent(plan, "all_gather", "forward")
    assert sent(plan, "all_reduce", "forward") < count * hidden * 8, "activations are all-reduced"


def test_all_to_all_sequence_parallel() -> None:
    """Activations large beside the weights, a head for every device: from the sequence to the heads and back by all-to-all."""
    plan = solved(Decoder(32, 16, 4, 4, 32), text(32, 1, 256), mesh("sp", 4))
    assert letters(plan, *PROJECTIONS) == {"m"} and letters(plan, *FORWARD_NORMS) == {"a"}
    assert letters(plan, ".attention", ".attention_backward@backward") == {"g"}
    activations = 256 * 16 * 8
    for phase in ("forward", "backward"):  # q, k, v and the result of two layers; in backward their gradients
        assert sent(plan, "all_to_all", phase) == 2 * 4 * activations // 4 * 3 // 4
        assert sent(plan, "all_gather", phase) + sent(plan, "reduce_scatter", phase) == 0


@pytest.mark.parametrize("devices", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_gathered_keys_context_parallel(devices: int) -> None:
    """More devices than key-value heads: every device keeps its rows and gathers keys and values."""
    plan = solved(Decoder(32, 16, 4, 2, 32), text(32, 1, 256), mesh("cp", devices))
    assert letters(plan, *PROJECTIONS) == {"m"} and letters(plan, *FORWARD_NORMS) == {"a"}
    assert letters(plan, ".attention", ".attention_backward@backward") == {"s"}
    keys = 256 * 8 * 8  # of two heads of four numbers
    assert sent(plan, "all_gather", "forward") == 2 * 2 * keys * (devices - 1) // devices
    assert sent(plan, "reduce_scatter", "backward") == 2 * 2 * keys * (devices - 1) // devices
    assert sent(plan, "all_to_all") == 0


def test_expert_parallel() -> None:
    """Experts on devices of their own, tokens split by group: to their experts and back by all-to-all, in both phases."""
    plan = solved(Experts(32, 128, 4, 4), tokens(4, 16, 32), mesh("ep", 4))
    assert plan.choices["up"] == plan.choices["down"] == "d0", "experts are not split"
    assert letters(plan, "native_layer_norm") == {"a"} and letters(plan, "mix.addmm") == {"m.0"}
    batch = 4 * 4 * 4 * 32 * 8  # groups, experts, capacity, hidden
    for phase in ("forward", "backward"):
        assert sent(plan, "all_to_all", phase) >= 2 * batch // 4 * 3 // 4
    assert sent(plan, "all_gather") < batch, "tokens are gathered"


def test_a_batch_that_divides_is_split_instead() -> None:
    """The same model as for all-to-all, with a sequence for every device: nothing of it is needed."""
    model, inputs, where = Decoder(32, 16, 4, 4, 32), text(32, 4, 64), mesh("dp", 4)
    least, beside = (solved(model, inputs, where, overlap=overlap) for overlap in (False, True))
    for plan in (least, beside):
        assert letters(plan, ".attention", ".attention_backward@backward") == {"b"} and sent(plan, "all_to_all") == 0
    assert sent(least, "all_gather") == 0
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sent(beside, "all_gather") < stored, "parameters may be gathered beside computation, activations not"


def test_links_that_are_too_slow_are_not_used() -> None:
    plan = solved(Decoder(32, 16, 4, 2, 32), text(32, 1, 64), mesh("cp", 4, bandwidth_bytes_s=1e5))
    assert not plan.collectives and letters(plan, ".attention") == {"-"}


def test_the_last_causal_block_sets_the_price() -> None:
    """Rows split four ways: the last device does 7 / 16 of the causal work, not a quarter."""
    from netmind_autopar.costs.compute import op_cost

    program = capture(Decoder(32, 16, 4, 2, 32, layers=1), text(32, 1, 256))
    rules = bind_program(program)
    for name in ("attention", "attention_backward"):
        node = next(n for n in program.graph.nodes if str(n.target) == f"autopar.{name}.default")
        cost = op_cost(node, rules[node.name])
        whole, split = (cost._flops(cost.local_sizes((s,), mesh("cp", 4).axes), None) for s in ("-", "s"))  # type: ignore[arg-type]
        assert whole == cost.flops and split / whole == pytest.approx(7 / 16)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "gpt2": lambda: models.gpt2(dropout=0.2, vocab=97, layers=1, seq=7),
    "llama": lambda: models.llama(vocab=97, layers=1, seq=7),
    "bert": lambda: models.bert(dropout=0.2, vocab=97, layers=1, seq=7),
    "decoder": lambda: (Decoder(97, 16, 4, 1, 24, layers=1, tied=True), text(97, 2, 7)),
    "encoder-decoder": lambda: (EncoderDecoder(), translation()),
    "encoder-decoder, dropout": lambda: (EncoderDecoder(kv_heads=4, dropout=0.3), translation(batch=3)),
    "experts": lambda: (Experts(16, 24, 4, 3), tokens(4, 7, 16)),
}
SEEDS = [(name, where, seed) for name in MODELS for where in ("a=4", "a=3", "a=2,b=2") for seed in range(8)]


@functools.cache
def captured(name: str) -> tuple[nn.Module, Any, Program, dict[str, Rule]]:
    model, inputs = MODELS[name]()
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


@pytest.mark.parametrize(
    ("name", "where", "seed"), [pytest.param(*c, marks=() if c[2] < 1 else pytest.mark.slow, id="-".join(map(str, c))) for c in SEEDS]
)
def test_random_plans(name: str, where: str, seed: int) -> None:
    model, inputs, program, rules = captured(name)
    check(model, inputs, program, rules, random_plan(program, rules, where, seed, idle=0.05), 1e-9 if name != "llama" else 1.0)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "experts"])
def test_rows_and_classes_can_be_split(name: str) -> None:
    """The random plans above draw from these letters."""
    _, _, program, rules = captured(name)
    for op, letter in (("attention", "s"), ("attention_backward", "s"), ("sum_exp", "c"), ("pick", "c"), ("cross_entropy_backward", "c")):
        found = [rules[n.name] for n in program.graph.nodes if str(n.target) == f"autopar.{op}.default"]
        assert found and all(letter in rule.letters for rule in found), op
