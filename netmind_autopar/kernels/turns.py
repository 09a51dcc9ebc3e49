"""`autopar::turn_part` and `autopar::first_turn`: what a micro-batch takes of a tensor that is there for the whole batch.

`turn` is the micro-batch that runs, 0 to `turns` − 1. The parts of all turns, joined or added up, are the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turn_part(x: Tensor, dim: int, turn: int, turns: int) -> Tensor:
    """Piece `turn` of `turns` equal ones along `dim`; a copy, so that the step may write nothing into its caller's tensor."""
    length = x.shape[dim] // turns
    return x.narrow(dim, turn * length, length).clone(memory_format=torch.contiguous_format)


def first_turn(x: Tensor, turn: int) -> Tensor:
    """x in the first micro-batch, zeros in the others: a term that is counted once."""
    return x.clone() if turn == 0 else torch.zeros_like(x)


@torch.library.custom_op("autopar::turn_part", mutates_args=())
def _turn_part(x: Tensor, dim: int, turn: int, turns: int) -> Tensor:
    return turn_part(x, dim, turn, turns)


@_turn_part.register_fake
def _fake_part(x, dim, turn, turns):
    shape = list(x.shape)
    shape[dim] //= turns
    return x.new_empty(shape)


@torch.library.custom_op("autopar::first_turn", mutates_args=())
def _first_turn(x: Tensor, turn: int) -> Tensor:
    return first_turn(x, turn)


@_first_turn.register_fake
def _fake_first(x, turn):
    return torch.empty_like(x)


DIRECT = {torch.ops.autopar.turn_part.default: turn_part, torch.ops.autopar.first_turn.default: first_turn}
