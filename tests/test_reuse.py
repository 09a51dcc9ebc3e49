"""Memory that is written again: the same bits in every result, and never memory that somebody still needs."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from random_modules import random_module
from random_plans import random_plan
from torch import Tensor, fx, nn

from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes import emit as emission
from netmind_autopar.passes.emit import emit
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.passes.reuse import Reuse, _find, _is_elementwise, reuse
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime import threads
from netmind_autopar.runtime.collectives import move, start, wait
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification.sides import Sides

aten = torch.ops.aten
REDUCE = ("all_reduce", 0, "f32[4,6] P(sum)", "f32[4,6] R")


class Lines:
    """A graph written line by line; every value f32[4,6] unless told."""

    def __init__(self) -> None:
        self.graph, self.order = fx.Graph(), []

    def given(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(4, 6)
        return node

    def __call__(self, target: Callable, *args: object, val: Tensor | None = None) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = torch.empty(4, 6) if val is None else val
        self.order.append(node)
        return node

    def found(self, *pinned: fx.Node) -> Reuse:
        return reuse(self.order, pinned)


def test_an_operand_that_dies_is_written_over() -> None:
    line = Lines()
    x = line.given("x")
    a = line(aten.mm.default, x, x)
    b = line(aten.mul.Tensor, a, 2.0)
    c = line(aten.sub.Tensor, x, b)
    d = line(aten.tanh_backward.default, x, line(aten.view.default, c, [4, 6]))
    e = line(aten.pow.Tensor_Scalar, d, 3.0)
    found = line.found(e)
    assert found.instead[b] == (aten.mul_.Tensor, None) and found.over[b] is a
    assert found.instead[c] == (aten.sub.out, "out") and found.over[c] is b
    assert found.instead[d][0] is aten.tanh_backward.grad_input and found.instead[d][1] == "grad_input"
    assert found.instead[e][0] is aten.pow.Tensor_Scalar_out
    assert not line.found(a, b, c, d).instead  # what the caller gets stays


@pytest.mark.parametrize("case", ["later", "view", "part", "flying", "foreign", "twice", "input", "wider", "layout"])
def test_memory_that_somebody_needs_is_not_written(case: str) -> None:
    line = Lines()
    x = line.given("x")
    a = line(aten.mm.default, x, x)
    view = line(aten.t.default, a, val=torch.empty(4, 6).t())
    begun = line(start, a, *REDUCE) if case == "flying" else None
    piece = line(aten.slice.Tensor, a, 0, 0, 2, val=torch.empty(2, 6))
    seen = line(torch.ops.autopar.dropout.default, a) if case == "foreign" else None
    small = {"wider": torch.empty(4, 6, dtype=torch.float64), "layout": torch.empty(6, 4).t()}.get(case)
    own = x if case == "input" else a
    made = line(aten.add.Tensor, own, view if case == "twice" else 1.0, val=small)
    rest = {"later": a, "view": view, "part": piece, "foreign": seen, "flying": begun}.get(case)
    if case == "flying":
        line(wait, begun)
    elif rest is not None:
        line(aten.exp.default, rest)
    assert made not in line.found(made).instead


def test_an_all_reduce_reduces_where_its_operand_lies() -> None:
    line = Lines()
    x = line.given("x")
    a, b = line(aten.mm.default, x, x), line(aten.mm.default, x, x)
    one = line(move, a, *REDUCE)
    begun = line(start, b, *REDUCE)
    other = line(wait, begun)
    kept, of_input = line(aten.mm.default, x, x), line(move, x, *REDUCE)
    two = line(move, kept, *REDUCE)
    line(aten.exp.default, kept)
    assert line.found(one, other, of_input, two).within == {one, begun}
    assert line.found(a, b).within == set()


def gpt2_plan(mesh: str, seed: int) -> tuple[nn.Module, dict[str, Tensor], Program, Program, Plan]:
    model, inputs = models.gpt2(dropout=0.2)
    return lowered(model, inputs, mesh, seed)


def lowered(model: nn.Module, inputs: object, mesh: str, seed: int) -> tuple:
    program = capture(model, inputs)
    rules = bind_program(program)
    plan = random_plan(program, rules, mesh, seed)
    return model, inputs, program, lower(program, rules, plan), plan


class Twice(nn.Module):
    """Reads an activation again and again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return (h.tanh() * h + h.sigmoid()).square().sum()


def run(case: tuple, monkeypatch: pytest.MonkeyPatch, how: Callable) -> list[list[Tensor]]:
    """What all ranks get from the file that is written with this `reuse`."""
    model, inputs, program, low, plan = case
    with monkeypatch.context() as patch:
        patch.setattr(emission, "reuse", how)
        source = emit(low, plan)
    side = Sides(model, inputs, program, low, plan.sizes)
    return threads.run(source, low, plan.axis_names, plan.sizes, side.dealt(side.snapshot(0)))


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


CASES = [
    pytest.param(lambda: lowered(*models.mlp(dropout=0.2), "a=2,b=2", 1), id="mlp"),
    pytest.param(lambda: gpt2_plan("a=2", 3), id="gpt2", marks=pytest.mark.slow),
    *(
        pytest.param(lambda s=s: lowered(*random_module(s), ("a=2", "a=3")[s % 2], s), id=f"random-{s}", marks=pytest.mark.slow)
        for s in range(24)
    ),
]


@pytest.mark.parametrize("make", CASES)
def test_bits_are_those_of_memory_that_is_never_written_again(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    counted: list[Reuse] = []
    plain = run(case, monkeypatch, lambda order, pinned: Reuse())
    ours = run(case, monkeypatch, lambda order, pinned: counted.append(reuse(order, pinned)) or counted[-1])
    assert same(ours, plain)
    if make is CASES[0].values[0]:
        assert len(counted[0].instead) >= 2 and counted[0].within


def test_memory_written_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an elementwise op writes over an operand that is read again."""

    def careless(order: list[fx.Node], pinned: object) -> Reuse:
        found, at = Reuse(), {n: k for k, n in enumerate(order)}
        for node in order:
            read_again = [a for a in node.all_input_nodes if a in at and any(at.get(u, 0) > at[node] for u in a.users)]
            if _is_elementwise(node):
                _find(node, [a for a in read_again if a.meta["val"].shape == node.meta["val"].shape], found)
        assert found.instead
        return found

    case = lowered(Twice(), torch.randn(8, 16), "a=2", 1)
    assert not same(run(case, monkeypatch, careless), run(case, monkeypatch, lambda order, pinned: Reuse()))
