"""Features of torch that a capture could get wrong without anybody noticing: hand-written gradients, hooks, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_plans import random_plan
from test_tracer import check, close
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from netmind_autopar import autoparallelize
from netmind_autopar.ir.errors import CaptureError
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.reach import reached
from netmind_autopar.tracer.capture import capture


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is turned round (domain-adversarial training); takes what is no tensor, returns two tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, float], *more: Tensor) -> tuple[Tensor, Tensor]:
        ctx.factor = options["factor"]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sign := torch.sign(x))
        return x.view_as(x), sign

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        return (None if grad is None else -ctx.factor * grad), None, None


class Modern(torch.autograd.Function):
    """The newer form: setup_context, default arguments, a rule for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, power: int = 3) -> Tensor:
        return x.abs() ** power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.power = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        return 7.0 * x * grad, None  # not the true gradient, so that it can be told from it


class AddInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.add_(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, 3 * grad


class Hidden(torch.autograd.Function):
    """Reads a tensor that is no argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        return x * weight()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class Functions(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.other = kind, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.kind == "reverse":
            y, sign = Reverse.apply(y, {"factor": 0.5}, self.other.weight)
            return (self.other(y) * sign).square().mean()
        if self.kind == "modern":
            return Modern.apply(self.other(Modern.apply(y))).mean()
        if self.kind == "dirty":
            z = self.other(y)
            AddInPlace.apply(z, y)
            return z.square().mean()
        if self.kind == "closure":
            return Hidden.apply(y, lambda: self.other.bias).square().mean() + self.other(y).mean()
        if self.kind == "no_grad":
            with torch.no_grad():
                scale = Modern.apply(y)
            return (self.other(y) * scale).mean()
        y.register_hook(lambda grad: grad * 2)
        z = self.other(torch.tanh(y))
        z.register_hook(lambda grad: None)
        y.register_hook(lambda grad: grad.clamp(max=0.01))
        return z.square().sum()


@pytest.mark.parametrize("kind", ["reverse", "modern", "dirty", "closure", "no_grad", "hook"])
def test_gradients_written_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    check(Functions(kind).double(), {"x": torch.randn(3, 4).double()})


class Refused(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "closure":
            scale = self.fc(x)
            return Hidden.apply(self.fc(x), lambda: scale).sum()
        if self.kind == "module":
            return Hidden.apply(x, self.fc).sum()
        if self.kind == "vmap":
            return torch.vmap(Modern.apply)(self.fc(x)).sum()
        if self.kind == "grad":
            energy = self.fc(x).tanh().sum()
            return torch.autograd.grad(energy, self.fc.weight, create_graph=True)[0].sum()
        return torch.func.grad(lambda y: self.fc(y).tanh().sum())(x).sum()


@pytest.mark.parametrize(
    ("kind", "line", "what"),
    [
        ("closure", "Hidden.apply(self.fc(x), lambda: scale)", "neither argument, parameter nor buffer"),
        ("module", "Hidden.apply(x, self.fc)", "is given a module"),
        ("vmap", "torch.vmap(Modern.apply)", "inside torch.func or vmap"),
        ("grad", "torch.autograd.grad(energy", "computes gradients itself"),
        ("func", "torch.func.grad(lambda y:", "computes gradients itself"),
    ],
)
def test_gradients_that_cannot_be_kept(kind: str, line: str, what: str) -> None:
    with pytest.raises(CaptureError, match=what) as caught:
        capture(Refused(kind), torch.randn(3, 4))
    assert line in caught.value.where and caught.value.where.startswith("test_features.py:"), caught.value
    assert caught.value.why and caught.value.try_


def test_hooks_outside_of_forward() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    handle = model[0].weight.register_hook(lambda g: g * 2)
    with pytest.raises(CaptureError, match=r"0.weight has a hook"):
        capture(model, torch.randn(2, 3))
    handle.remove()
    handle = model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="module 0 has a backward hook"):
        capture(model, torch.randn(2, 3))
    handle.remove()
    capture(model, torch.randn(2, 3))


def test_nothing_stays_patched() -> None:
    before = (torch.autograd.Function.apply.__func__, torch.autograd.grad, Tensor.register_hook, vars(CheckpointFunction).get("apply"))
    with pytest.raises(CaptureError):
        capture(Refused("grad"), torch.randn(3, 4))
    after = (torch.autograd.Function.apply.__func__, torch.autograd.grad, Tensor.register_hook, vars(CheckpointFunction).get("apply"))
    assert before == after


def test_reentrant_checkpointing_without_inputs_that_want_a_gradient() -> None:
    """Eager mode gives no gradients then, and warns."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(checkpoint(self.one, x, use_reentrant=True)).sum()

    program = capture(Model(), torch.randn(2, 3))
    reached = {o.name for o in program.outputs if o.role == "grad" and program.node(o.node).target is not torch.ops.aten.zeros.default}
    assert {"two.weight", "two.bias"} <= reached


class TwoLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.one(h).square().sum(), self.two(h).square().sum()


def test_one_of_several_losses_gives_no_gradient_to_what_only_another_uses() -> None:
    torch.manual_seed(0)
    model, x = TwoLosses(), torch.randn(3, 4)
    parallel = autoparallelize(model, x, "a=1", cluster="h100-sxm")
    for which in (0, 1):
        for module in (model, parallel):
            module.zero_grad(set_to_none=True)
            module(x)[which].backward()
        for name, parameter in model.named_parameters():
            found = parallel.get_parameter(name).grad
            assert (found is None) == (parameter.grad is None), name
            if found is not None:
                close(found.full_tensor(), parameter.grad, 1e-6)


def test_which_outputs_enter_a_gradient() -> None:
    """Also where several gradients travel in one all-reduce."""
    program = capture(TwoLosses(), torch.randn(4, 4))
    rules = bind_program(program)
    for seed in range(4):
        plan = random_plan(program, rules, "a=2,b=2", seed)
        behind = reached(lower(program, rules, plan))
        names = [o.name.partition(".")[0] for o in program.outputs if o.role == "grad"]
        assert {*zip(names, behind, strict=True)} == {("trunk", frozenset({0, 1})), ("one", frozenset({0})), ("two", frozenset({1}))}
