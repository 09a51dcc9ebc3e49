"""Wrong results that random modules once found, each as the few lines that showed it, under every kind of plan on three meshes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_plans import random_plan
from torch import Tensor, nn

from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare

PLANS = 6  # a mesh


def scatter_from_the_end(w: Tensor, x: Tensor) -> Tensor:
    """The gradient of `topk` is a scatter whose dim is -1: its block had no place for what belongs elsewhere."""
    return (x @ w).softmax(-1).topk(2, -1).values.square().sum()


def divergence_of_logarithms(w: Tensor, x: Tensor) -> Tensor:
    """`log_target` is an argument by keyword, which the loss did not take."""
    return F.kl_div((x @ w).log_softmax(-1), x.cos()[:, :1].expand(-1, 8).log_softmax(-1), reduction="batchmean", log_target=True)


def plain_binary_cross_entropy(w: Tensor, x: Tensor) -> Tensor:
    """Without a weight and a reduction: the rewritten reduction went to where the weight stands."""
    return F.binary_cross_entropy(torch.sigmoid(x @ w), torch.sigmoid(x.sin()[:, :1].expand(-1, 8)))


FOUND: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (scatter_from_the_end, divergence_of_logarithms, plain_binary_cross_entropy)


class Found(nn.Module):
    """One parameter and a function of it and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w, x)


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_it_is_right_now(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Found(function)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    program = capture(model, (x,))
    rules = bind_program(program)
    for mesh in ("a=4", "a=3", "a=2,b=2"):
        for seed in range(PLANS):
            plan = random_plan(program, rules, mesh, seed, idle=0.05)
            report = compare(model, (x,), program, lower(program, rules, plan), plan)
            assert report.ok, f"{mesh}, plan {seed}: {report}"
