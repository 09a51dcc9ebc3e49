"""Models that compute in float32 in places whatever their dtype (norms, softmaxes, position tables), made float64 throughout.

Such a model in float64 differs from itself by float32's rounding as soon as a sum is split. Inside `float32_is_float64` the library's
modules see a `torch` whose float32 is float64, so that what they compute, eagerly or captured, can be compared to 1e-9.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

LIBRARIES = ("transformers", "diffusers")


class WideTorch(types.ModuleType):
    """`torch` with float64 under the names of float32."""

    float32 = torch.float64
    float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float32_is_float64() -> Iterator[None]:
    """For model code of the libraries; `tensor.float()` is `tensor.double()` everywhere."""
    wide = WideTorch("torch")
    places = [m for name, m in list(sys.modules.items()) if name.startswith(LIBRARIES) and m.__dict__.get("torch") is torch]
    plain = torch.Tensor.float
    try:
        for module in places:
            module.__dict__["torch"] = wide
        torch.Tensor.float = lambda self, *args, **kwargs: self.double(*args, **kwargs)  # type: ignore[method-assign,assignment]
        yield
    finally:
        torch.Tensor.float = plain  # type: ignore[method-assign]
        for module in places:
            module.__dict__["torch"] = torch
