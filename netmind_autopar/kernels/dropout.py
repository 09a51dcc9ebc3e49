"""`autopar::dropout`: dropout whose mask does not depend on how the tensor is split, nor on when it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .counter import keep_mask


def dropout(
    x: torch.Tensor, seed: torch.Tensor, p: float, salt: int, parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> torch.Tensor:
    """x / (1 - p) where element i of the global tensor is kept, else 0. Same shape and dtype as x; contiguous.

    seed: int64, 0-dim. parts: sizes of the global tensor's parts, major first; x holds `lengths` of them from `starts` on.
    Linear in x, and its own transpose: the backward is the same call on the gradient.
    """
    from .fused import dropout_add  # it comes after this file

    found = dropout_add.drop(x, None, seed, p, salt, parts, starts, lengths)
    if found is not None:
        return found
    keep = keep_mask(seed, salt, p, parts, starts, lengths).view(x.shape)
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return torch.mul(x, keep, out=torch.empty(x.shape, dtype=x.dtype, device=x.device)).mul_(scale)


@torch.library.custom_op("autopar::dropout", mutates_args=())
def _dropout(
    x: torch.Tensor, seed: torch.Tensor, p: float, salt: int, parts: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> torch.Tensor:
    return dropout(x, seed, p, salt, parts, starts, lengths)


@_dropout.register_fake
def _fake(x, seed, p, salt, parts, starts, lengths):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx, inputs, output):
    _, seed, *ctx.rest = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad):
    return torch.ops.autopar.dropout.default(grad, ctx.saved_tensors[0], *ctx.rest), None, None, None, None, None, None


_dropout.register_autograd(_backward, setup_context=_setup)

DIRECT = {torch.ops.autopar.dropout.default: dropout}
