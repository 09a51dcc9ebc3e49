"""Features of torch that a capture could get wrong without anybody noticing: hand-written gradients, hooks, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tracer import check, close, run
from torch import Tensor, nn

from netmind_autopar.ir.errors import CaptureError
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
        if self.kind == "no_grad":
            with torch.no_grad():
                scale = Modern.apply(y)
            return (self.other(y) * scale).mean()
        y.register_hook(lambda grad: grad * 2)
        z = self.other(torch.tanh(y))
        z.register_hook(lambda grad: None)
        y.register_hook(lambda grad: grad.clamp(max=0.01))
        return z.square().sum()


@pytest.mark.parametrize("kind", ["reverse", "modern", "dirty", "no_grad", "hook"])
def test_gradients_written_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    check(Functions(kind).double(), {"x": torch.randn(3, 4).double()})
