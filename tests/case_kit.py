"""What cases of rules are made of: random tensors, an op by its name, a call that was run once."""

from __future__ import annotations

from typing import Any

import torch

from netmind_autopar.kernels import DIRECT  # registers the ops of our own
from netmind_autopar.rules.call import Call

assert DIRECT
A, K = torch.ops.aten, torch.ops.autopar
Case = tuple[str, tuple[Any, ...], dict[str, Any]]
GENERATOR = torch.Generator().manual_seed(0)


def F(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def P(*shape: int) -> torch.Tensor:
    """In (0.1, 0.9): inside the domain of every function."""
    return torch.rand(shape, generator=GENERATOR, dtype=torch.float64) * 0.8 + 0.1


def I(high: int, *shape: int) -> torch.Tensor:  # noqa: E743
    return torch.randint(0, high, shape, generator=GENERATOR)


def B(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=GENERATOR) < 0.5


def overload(name: str) -> Any:
    space, op, which = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), op), which)


def make(case: Case) -> Call:
    """The call of a case, run once."""
    name, args, kwargs = case
    result = overload(name)(*args, **kwargs)
    items = result if isinstance(result, (list, tuple)) else (result,)
    return Call(overload(name), args, kwargs, tuple(t if isinstance(t, torch.Tensor) and _given(t) else None for t in items))


def _given(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 0 or tensor.numel() > 0
