"""Every kind of model that users bring, small, unmodified, built from configs or by hand: the list that all wide tests walk.

    ZOO["t5"].make(torch.float64) -> (model, sample_inputs)

A factory is seeded and gives real CPU tensors in the dtype asked for; sample_inputs is a tensor, a tuple or a dict, as `plan` takes
them. To add a model: write a factory in the `zoo_*.py` file of its family and a line in that file's `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo_diffusion
import zoo_features
import zoo_hand
import zoo_hf
from torch import nn

Factory = Callable[[torch.dtype], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Entry:
    """One model. `options` go to `capture` (outputs, differentiable); `note` says in a few words what the model is there for."""

    name: str
    make: Factory
    note: str
    options: dict[str, Any] = field(default_factory=dict)


def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for module in (zoo_hf, zoo_diffusion, zoo_hand, zoo_features):
        for name, (make, note, *options) in module.MODELS.items():
            assert name not in found, f"two models are called {name}"
            found[name] = Entry(name, make, note, options[0] if options else {})
    return found


ZOO = _entries()
