"""Forward and backward traced as they are: the same program as by torch's own way, and that way where something is written in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO

from netmind_autopar.ir.program import Program
from netmind_autopar.tracer import joint, repeat
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash

QUICK = ("bert", "gpt2", "llama", "resnet", "unet")  # as far as the zoo has them under such names


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each trace has gone: "" as it is, else why not."""
    found: list[str] = []
    inner = joint.directly

    def noted(*args: Any) -> joint.Joint:
        try:
            made = inner(*args)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            raise
        found.append("")
        return made

    monkeypatch.setattr(joint, "directly", noted)
    return found


def by_torch(model: nn.Module, inputs: Any, **options: Any) -> Program:
    def never(*_: Any) -> joint.Joint:
        raise joint.NotDirect("not now")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "directly", never)
        return capture(model, inputs, fold=False, **options)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(ZOO)])
def test_both_ways_give_the_same_program(name: str, ways: list[str]) -> None:
    """Nodes, names, order, shapes, strides, lines, modules, phases, constants, ends."""
    entry = ZOO[name]
    model, inputs = entry.make(torch.float64)
    direct = capture(model, inputs, fold=False, **entry.options)
    assert ways  # some models are traced twice
    if any(ways):
        assert all(why.startswith("NotDirect: ") for why in ways if why), ways
        pytest.skip(f"traced by torch's own way: {max(ways)}")
    full = by_torch(model, inputs, **entry.options)
    assert repeat.difference(direct, full) == "" and graph_hash(direct) == graph_hash(full)


class Cell(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        if self.kind == "in place":
            y = y.mul_(2.0)
        elif self.kind == "buffer":
            self.count.add_(1.0)
        elif self.kind == "views":
            y = self.second(y)
            return y[:, :2], y.t(), y.detach()
        elif self.kind == "constant":
            y = y * torch.tensor([1.0, 2.0, 3.0, 4.0])
        elif self.kind == "no grad":
            with torch.no_grad():
                scale = y.abs().max()
            y = y / scale
        elif self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = self.second(y)
        elif self.kind == "unused":
            return self.second(x).detach(), y.sum()
        return self.second(y.relu()).sum()


@pytest.mark.parametrize("kind", ["plain", "constant", "no grad", "autocast", "unused"])
def test_programs_that_write_nothing_are_traced_as_they_are(kind: str, ways: list[str]) -> None:
    model, x = Cell(kind), torch.randn(3, 4)
    direct = capture(model, x, fold=False)
    assert ways == [""]
    full = by_torch(model, x)
    assert repeat.difference(direct, full) == "" and graph_hash(direct) == graph_hash(full)
    assert not any(
        n.op == "call_function" and getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in direct.graph.nodes
    )


def test_outputs_that_are_views_of_one_tensor(ways: list[str]) -> None:
    """Torch's own way has no tangents for them; traced as it is, each has its own."""
    program = capture(Cell("views"), torch.randn(3, 4), fold=False)
    assert ways == [""]
    assert [i.name for i in program.inputs if i.role == "tangent"] == ["0", "1"]
    assert {o.name for o in program.outputs if o.role == "grad"} == {"first.weight", "first.bias", "second.weight", "second.bias"}


@pytest.mark.parametrize("kind", ["in place", "buffer"])
def test_programs_that_write_go_torch_s_own_way(kind: str, ways: list[str]) -> None:
    program = capture(Cell(kind), torch.randn(3, 4), fold=False)
    assert len(ways) == 1 and ways[0].startswith("NotDirect: aten.")
    assert not any(n.op == "call_function" and n.target._schema.is_mutable for n in program.graph.nodes)


def test_gradients_that_autograd_accumulates_in_place_are_noticed(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a backward that writes into what it made. The trace would be right only as long as nobody else reads that."""

    @torch.library.custom_op("planted::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return (grad + 0).mul_(2)

    twice.register_autograd(backward)

    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(super().forward(x)).sum()

    program = capture(Twice(4, 4), torch.randn(3, 4), fold=False)
    assert ways == ["NotDirect: aten.mul_.Tensor"]
    assert not any(
        n.op == "call_function" and getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in program.graph.nodes
    )
