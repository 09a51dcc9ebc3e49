"""A plain MLP classifier. `netmind-autopar plan examples/mlp.py --mesh tp=8 --cluster h100-sxm`; `examples/mlp.py:tiny` is small."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Hidden layers of one width with GELU between them; returns the mean cross-entropy."""

    def __init__(self, features: int, width: int, classes: int, layers: int = 2) -> None:
        super().__init__()
        sizes = [features] + [width] * layers + [classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return F.cross_entropy(self.layers[-1](x), target)


def model() -> nn.Module:
    return MLP(features=4096, width=16384, classes=1000)


def sample_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(256, 4096), "target": torch.randint(1000, (256,))}


def tiny() -> nn.Module:
    return MLP(features=24, width=32, classes=10)


def tiny_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(16, 24), "target": torch.randint(10, (16,))}
