"""`autopar::embedding_bag`: weighted sums of rows of a table, one sum a bag, and its gradient.

Element i adds `scale[i] * weight[indices[i]]` to bag `bags[i]`; bags ascend. `weight` holds the rows from `start` on, the output the
bags from `bag_start` on: what belongs elsewhere is left out, so blocks of rows and of elements give terms of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _inside(at: Tensor, here: int) -> tuple[Tensor, Tensor]:
    """Clamped positions and a mask of those that lie in [0, here)."""
    return at.clamp(0, here - 1), (at >= 0) & (at < here)


def embedding_bag(weight: Tensor, indices: Tensor, bags: Tensor, scale: Tensor | None, count: int, bag_start: int, start: int) -> Tensor:
    """weight [rows, d], indices, bags and scale [elements] -> [count, d]."""
    row, known = _inside(indices - start, weight.shape[0])
    bag, wanted = _inside(bags - bag_start, count)
    factor = (known & wanted).to(weight.dtype)
    factor = factor if scale is None else torch.where(factor > 0, scale, factor)
    edges = torch.searchsorted(bag, torch.arange(count + 1, device=bag.device, dtype=bag.dtype))
    return torch.ops.aten._embedding_bag_forward_only(weight, row, edges.to(row.dtype), False, 0, False, factor, True, -1)[0]


def embedding_bag_backward(
    grad: Tensor, indices: Tensor, bags: Tensor, scale: Tensor | None, rows: int, bag_start: int, start: int
) -> Tensor:
    """grad [bags here, d] -> gradient of the block of the table, [rows, d]."""
    row, known = _inside(indices - start, rows)
    bag, wanted = _inside(bags - bag_start, grad.shape[0])
    values = grad.index_select(0, bag)
    values = values if scale is None else values * scale.unsqueeze(1)
    row = row.masked_fill(~(known & wanted), -1)  # -1 is passed on as the row to leave out
    return torch.ops.aten.embedding_dense_backward(values, row, rows, -1, False)


_SCHEMAS = {
    "embedding_bag": (
        embedding_bag,
        "(Tensor weight, Tensor indices, Tensor bags, Tensor? scale, SymInt count, SymInt bag_start, SymInt start) -> Tensor",
    ),
    "embedding_bag_backward": (
        embedding_bag_backward,
        "(Tensor grad, Tensor indices, Tensor bags, Tensor? scale, SymInt rows, SymInt bag_start, SymInt start) -> Tensor",
    ),
}
for _name, (_function, _schema) in _SCHEMAS.items():
    torch.library.custom_op(f"autopar::{_name}", _function, mutates_args=(), schema=_schema)


@torch.library.register_fake("autopar::embedding_bag")
def _fake(weight, indices, bags, scale, count, bag_start, start):
    return weight.new_empty(count, weight.shape[1])


@torch.library.register_fake("autopar::embedding_bag_backward")
def _fake_backward(grad, indices, bags, scale, rows, bag_start, start):
    return grad.new_empty(rows, grad.shape[1])


def _setup(ctx, inputs, output):
    weight, indices, bags, scale, _, _, _ = inputs
    ctx.rows = weight.shape[0]
    scaled = scale is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(indices, bags, scale, weight if scaled else None)


def _backward(ctx, grad):
    indices, bags, scale, weight = ctx.saved_tensors
    own = torch.ops.autopar
    dweight = dscale = None
    if ctx.needs_input_grad[0]:
        dweight = own.embedding_bag_backward.default(grad, indices, bags, scale, ctx.rows, 0, 0)
    if weight is not None:
        rows = own.embedding.default(weight, indices, 0, -1)
        dscale = (own.embedding.default(grad, bags, 0, -1) * rows).sum(1)
    return dweight, None, None, dscale, None, None, None


torch.library.register_autograd("autopar::embedding_bag", _backward, setup_context=_setup)

DIRECT = {getattr(torch.ops.autopar, name).default: function for name, (function, _) in _SCHEMAS.items()}
