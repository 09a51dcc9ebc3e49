"""Micro-batches at run time: results joined, gradients added up, in a place of their own for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join(how: str, pieces: Sequence[Tensor]) -> Tensor:
    """A result of the step from those of its micro-batches; see `ir.program.Micro`."""
    if how == "same":
        return pieces[0]
    if how.startswith("cat:"):
        return torch.cat(list(pieces), dim=int(how[4:]))
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total
