"""`autopar::embedding`: rows of a table of which only a block of rows may be here. The blocks' results add up to the whole."""

from __future__ import annotations

import torch


def embedding(weight: torch.Tensor, indices: torch.Tensor, start: int, padding_idx: int) -> torch.Tensor:
    """weight [rows, d], integer indices of any shape -> [*indices.shape, d].

    `weight` holds the rows [start, start + rows) of the global table; an index outside gives zeros. `padding_idx` is a global
    row without a gradient, -1 for none.
    """
    rows = weight.shape[0]
    local = indices - start if start else indices
    outside = (local < 0) | (local >= rows)
    if indices.device.type == "cpu" and not bool(outside.any()):
        return torch.nn.functional.embedding(local, weight)
    return torch.nn.functional.embedding(local.clamp(0, rows - 1), weight).masked_fill_(outside.unsqueeze(-1), 0)


def embedding_backward(grad: torch.Tensor, indices: torch.Tensor, rows: int, start: int, padding_idx: int) -> torch.Tensor:
    """grad [*indices.shape, d] -> gradient of the block of the table, [rows, d]."""
    local = indices - start if start else indices
    skip = (local < 0) | (local >= rows)
    if padding_idx >= 0:
        skip |= indices == padding_idx
    from .fused import launch, segments  # they come after this file

    local = local.masked_fill(skip, -1)  # -1 is passed on as the row to leave out
    if launch.usable(grad) and rows:
        return segments.segment_sum(grad, local, rows)
    return torch.ops.aten.embedding_dense_backward(grad, local, rows, -1, False)


@torch.library.custom_op("autopar::embedding", mutates_args=())
def _embedding(weight: torch.Tensor, indices: torch.Tensor, start: int, padding_idx: int) -> torch.Tensor:
    return embedding(weight, indices, start, padding_idx)


@_embedding.register_fake
def _fake(weight, indices, start, padding_idx):
    return weight.new_empty((*indices.shape, weight.shape[1]))


@torch.library.custom_op("autopar::embedding_backward", mutates_args=())
def _embedding_backward(grad: torch.Tensor, indices: torch.Tensor, rows: int, start: int, padding_idx: int) -> torch.Tensor:
    return embedding_backward(grad, indices, rows, start, padding_idx)


@_embedding_backward.register_fake
def _fake_backward(grad, indices, rows, start, padding_idx):
    return grad.new_empty((rows, grad.shape[-1]))


def _setup(ctx, inputs, output):
    weight, indices, ctx.start, ctx.padding_idx = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(indices)


def _backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    return torch.ops.autopar.embedding_backward.default(grad, indices, ctx.rows, ctx.start, ctx.padding_idx), None, None, None


_embedding.register_autograd(_backward, setup_context=_setup)

DIRECT = {torch.ops.autopar.embedding.default: embedding, torch.ops.autopar.embedding_backward.default: embedding_backward}
