"""Ops whose ATen kernels read memory as if it were dense, fed with tensors that are not."""

from __future__ import annotations

import pytest
import torch
from case_kit import make
from random_plans import random_plan
from rule_cases import CASES
from torch import Tensor, nn

from netmind_autopar.passes.dense import DENSE_ONLY
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.rules.prove import difference, put_tensors
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare

VIEWS = {"aten.view.default", "aten._unsafe_view.default"}  # lowered to reshape
OWN = {"autopar.attention.default", "autopar.attention_backward.default"}  # their kernels are tested with their own
GARBAGE = {
    f"aten.{op}"
    for op in (
        "empty.memory_format",
        "empty_like.default",
        "new_empty.default",
        "empty_permuted.default",
        "empty_strided.default",
        "new_empty_strided.default",
    )
}


def turned(t: Tensor) -> Tensor:
    """The same numbers, dims in memory in opposite order."""
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def gaps(t: Tensor) -> Tensor:
    """The same numbers, every other element of a larger tensor."""
    wide = t.new_zeros([2 * n for n in t.shape])
    view = wide[tuple(slice(0, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


@pytest.mark.parametrize("strange", [turned, gaps])
def test_all_other_ops_take_any_strides(strange) -> None:
    """Every case of the rule table: an op that is not in `DENSE_ONLY` computes the same from strided operands."""
    for case in CASES:
        call = make(case)
        if call.op in VIEWS | OWN | GARBAGE or call.target in DENSE_ONLY:
            continue
        args, kwargs = put_tensors(call.args, call.kwargs, [strange(t) if t.dim() else t for t in call.tensors])
        result = call.target(*args, **kwargs)
        items = result if isinstance(result, (list, tuple)) else (result,)
        for got, want in zip(items, call.outputs, strict=True):
            assert want is None or difference(got, want) == "", call.op


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = {"dtype": torch.float64}
        self.group, self.layer = nn.GroupNorm(2, 6, **kind), nn.LayerNorm(5, **kind)
        self.scale = nn.Parameter(torch.randn(6, 1, **kind))

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(x.transpose(0, 1) * self.scale)
        return self.layer(y.transpose(0, 1).sin() * self.scale[:, None]).square().sum()


@pytest.mark.parametrize("mesh", ["a=2,b=2", "a=3"])
def test_norms_of_turned_tensors(mesh: str) -> None:
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    model = Norms()
    program = capture(model, x)
    rules = bind_program(program)
    for seed in range(8):
        plan = random_plan(program, rules, mesh, seed)
        report = compare(model, x, program, lower(program, rules, plan), plan)
        assert report.ok, f"seed {seed}: {report.first_difference}"


@torch.library.custom_op("dense_probe::first_bytes", mutates_args=())
def reads_as_dense(x: Tensor) -> Tensor:
    """A kernel that takes its operand for dense, as hand-written ones do."""
    return torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset()) * 2.0


reads_as_dense.register_fake(lambda x: torch.empty(x.shape, dtype=x.dtype))
reads_as_dense.register_autograd(lambda ctx, grad: grad * 2.0)


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 12, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).view(4, 3, 4)
        return reads_as_dense(y).sin().sum()


def test_ops_of_other_libraries_get_what_eager_gives_them() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    model = Foreign()
    program = capture(model, x)
    rules = bind_program(program)
    for mesh in ("a=4", "a=2,b=2", "a=3"):
        for seed in range(4):
            plan = random_plan(program, rules, mesh, seed)
            lowered = lower(program, rules, plan)
            foreign = [n for n in lowered.graph.nodes if n.target is torch.ops.dense_probe.first_bytes.default]
            assert foreign and all(a.target is torch.ops.aten.contiguous.default for n in foreign for a in n.all_input_nodes)
            report = compare(model, x, program, lowered, plan)
            assert report.ok, f"{mesh} seed {seed}: {report.first_difference}"


class Attention(nn.Module):
    """Heads of 4 numbers: on 4 devices a gather may receive them one number at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(12, 20, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(4, 5, 5, 4).transpose(1, 2) for layer in self.qkv)
        return nn.functional.scaled_dot_product_attention(q, k, v).sin().mean()


def test_attention_of_gathered_heads() -> None:
    x = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    model = Attention()
    program = capture(model, x)
    rules = bind_program(program)
    for seed in range(12):
        plan = random_plan(program, rules, "a=4", seed)
        report = compare(model, x, program, lower(program, rules, plan), plan)
        assert report.ok, f"seed {seed}: {report.first_difference}"
