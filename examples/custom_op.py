"""A model with kernels of one's own: how they may be split is found out by running them.

    netmind-autopar plan examples/custom_op.py --mesh dp=2,tp=2 --cluster h100-sxm

Both ops are plain `torch.library.custom_op`s, as a Triton kernel would be registered. Nothing says how they can be split.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.library.custom_op("custom_op_example::gated_norm", mutates_args=())
def gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMS norm of each row, scaled by `weight`, times SiLU of the gate."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight * torch.nn.functional.silu(gate)


@torch.library.custom_op("custom_op_example::gated_norm_backward", mutates_args=())
def gated_norm_backward(grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    s = torch.sigmoid(gate)
    g = grad * gate * s
    by_weight = g * weight
    dx = r * by_weight - x * r**3 * (by_weight * x).mean(-1, keepdim=True)
    dgate = grad * x * r * weight * s * (1 + gate * (1 - s))
    return dx, dgate, (g * x * r).flatten(0, -2).sum(0)


@torch.library.custom_op("custom_op_example::energy", mutates_args=())
def energy(x: Tensor) -> Tensor:
    """The sum of squares of all elements: a number."""
    return x.square().sum()


@torch.library.custom_op("custom_op_example::energy_backward", mutates_args=())
def energy_backward(grad: Tensor, x: Tensor) -> Tensor:
    return 2 * grad * x


gated_norm.register_fake(lambda x, gate, weight: torch.empty_like(x))
gated_norm_backward.register_fake(lambda grad, x, gate, weight: (torch.empty_like(x), torch.empty_like(gate), torch.empty_like(weight)))
energy.register_fake(lambda x: x.new_empty(()))
energy_backward.register_fake(lambda grad, x: torch.empty_like(x))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


gated_norm.register_autograd(lambda ctx, grad: gated_norm_backward(grad, *ctx.saved_tensors), setup_context=_keep)
energy.register_autograd(lambda ctx, grad: energy_backward(grad, *ctx.saved_tensors), setup_context=_keep)


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.weight = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gated_norm(self.up(x), self.gate(x), self.weight))


class Model(nn.Module):
    """[batch, sequence, width] → a loss."""

    def __init__(self, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return energy(x) / x.numel()


def model() -> nn.Module:
    return Model(width=1024, inner=4096, layers=4)


def sample_inputs() -> Tensor:
    return torch.randn(16, 512, 1024)


def tiny() -> nn.Module:
    return Model(width=12, inner=20, layers=2)


def tiny_inputs() -> Tensor:
    return torch.randn(6, 5, 12)
