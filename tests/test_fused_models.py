"""Models written with the fused ops: captured, planned in odd ways, lowered and run in lockstep as on one device; and a loss over a
vocabulary that is split over real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_plans import random_plan
from torch import Tensor, nn

from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare

ops = torch.ops.autopar
WORKER = Path(__file__).parent / "gloo_vocab.py"


class Block(nn.Module):
    """A decoder of one block in which every norm, activation, rotation and the loss is a fused op."""

    def __init__(self, vocab: int = 22, d: int = 12, heads: int = 6, hidden: int = 20, center: bool = False, kind: str = "silu") -> None:
        super().__init__()
        self.heads, self.center, self.kind = heads, center, kind
        self.embed = nn.Embedding(vocab, d)
        self.qkv, self.o = nn.Linear(d, 3 * heads * 4, bias=False), nn.Linear(heads * 4, d, bias=False)
        self.gate, self.up, self.down = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)
        self.head = nn.Linear(d, vocab, bias=False)
        self.weights = nn.ParameterList(nn.Parameter(1 + 0.1 * torch.randn(d)) for _ in range(3))
        self.biases = nn.ParameterList(nn.Parameter(0.1 * torch.randn(d)) for _ in range(3))

    def add_norm(self, x: Tensor, more: Tensor, i: int) -> tuple[Tensor, Tensor]:
        if self.center:
            y, total, *_ = ops.add_layer_norm(x, more, self.weights[i], self.biases[i], 1e-5)
        else:
            y, total, _ = ops.add_rms_norm(x, more, self.weights[i], 1e-5, 0.0)
        return y, total

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, s, _ = x.shape
        y = ops.layer_norm(x, self.weights[0], None, 1e-5)[0] if self.center else ops.rms_norm(x, self.weights[0], 1e-5, 1.0)[0]
        q, k, v = self.qkv(y).view(b, s, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind()
        angles = torch.arange(s, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
        q, k = (ops.rope(t, angles.cos(), angles.sin(), False) for t in (q, k))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y, x = self.add_norm(self.o(mixed.transpose(1, 2).reshape(b, s, -1)), x, 1)
        y, x = self.add_norm(self.down(ops.gated(self.gate(y), self.up(y), self.kind)), x, 2)
        loss, _ = ops.cross_entropy(self.head(y).view(b * s, -1), labels.view(-1), -100, 0.1)
        return loss.sum() / (labels != -100).sum() + x.square().mean()


@pytest.mark.parametrize(("center", "kind"), [(False, "silu"), (True, "gelu_tanh")])
def test_every_plan_of_a_model_of_fused_ops_is_exact(center: bool, kind: str) -> None:
    torch.manual_seed(0)
    model = Block(center=center, kind=kind).double()
    tokens = torch.randint(0, 22, (4, 6))
    inputs = (tokens, torch.where(tokens % 5 == 0, -100, tokens))
    program = capture(model, inputs)
    used = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("autopar.")}
    assert {f"autopar.{name}.default" for name in ("gated", "gated_backward", "rope", "cross_entropy", "cross_entropy_backward")} <= used
    rules = bind_program(program)
    assert all(rule.known for rule in rules.values())
    split = set()
    for seed, mesh in enumerate(("a=1", "a=2", "a=3", "a=2,b=2", "a=2,b=2", "a=4", "a=3,b=2")):
        plan = random_plan(program, rules, mesh, seed)
        report = compare(model, inputs, program, lower(program, rules, plan), plan)
        assert report.ok and report.max_rel_error <= 1e-9, f"{mesh}: {report.max_rel_error:.2g} {report.first_difference}"
        split |= {name.rpartition(".")[2] for name, choice in plan.choices.items() if set(choice.split()) - {"-"}}
    wanted = {"gated", "gated_backward@backward", "rope", "add_layer_norm" if center else "add_rms_norm", "cross_entropy"}
    assert wanted <= {s.rstrip("_0123456789") for s in split}, sorted(split)


@pytest.mark.gloo
@pytest.mark.parametrize("world", [2, 4])
def test_a_loss_over_a_split_vocabulary_takes_one_small_collective(world: int, tmp_path: Path) -> None:
    """Loss within 1e-6 of eager's on whole logits, gradients too; 12 bytes a row from each device; uneven blocks."""
    command = [sys.executable, str(WORKER), str(world), str(tmp_path / "store")]
    processes = [subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(world)]
    try:
        outputs = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for out, err in outputs:
        assert out, err
        for row in map(json.loads, out.splitlines()):
            assert row["loss"] <= 1e-6 and row["gradient"] <= 1e-6, row
            assert row["collectives"] == 1 and row["bytes_per_row"] == 12, row
        assert len(out.splitlines()) == 3
