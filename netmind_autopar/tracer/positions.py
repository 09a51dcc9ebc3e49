"""Rewrites of ops that read and write at positions: bags of embeddings, memory by strides, indices.

`TABLE` is for the forward graph, before autograd (see normalize.py), `DECOMPOSITIONS` for the joint graph: there ATen's indexing
becomes the ops of `kernels/indexing.py`, which know where a block of the indexed dim begins, so that it can be split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels  # noqa: F401 - registers the namespace
from ..ir.errors import CaptureError

_aten = torch.ops.aten
_own = torch.ops.autopar
SUM, MEAN, MAX = 0, 1, 2  # modes of an embedding bag


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    begin: tuple[Any, ...] = (),
) -> tuple[Tensor | None, ...]:
    """Bags as weighted sums of rows; a mean is a sum with weights 1 / count. A sparse gradient is made dense.

    `begin`: (start, end, step) of the offsets when they are that. Bags of one size are then a dim of their own, so that batches
    split.
    """
    if scale_grad_by_freq:
        return _aten.embedding_bag.padding_idx(
            weight, indices, offsets, True, mode, False, per_sample_weights, include_last_offset, padding_idx
        )
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    if width := _width(begin, indices.shape[0], include_last_offset):
        scale = None if per_sample_weights is None else per_sample_weights.reshape(-1, width)
        return _equal_bags(weight, indices.reshape(-1, width), scale, mode, padding), None, None, None
    number = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    starts = offsets[:-1] if include_last_offset else offsets
    bags = torch.searchsorted(starts, number, right=True) - 1
    used = indices != padding if padding >= 0 else None
    if include_last_offset:
        used = number < offsets[-1] if used is None else used & (number < offsets[-1])
    return _ragged_bags(weight, indices, bags, len(starts), per_sample_weights, used, mode), bags, None, None


def _equal_bags(weight: Tensor, indices: Tensor, scale: Tensor | None, mode: int, padding: int) -> Tensor:
    rows = _own.embedding.default(weight, indices, 0, padding)
    used = None if padding < 0 else (indices != padding).unsqueeze(-1)
    if mode == MAX:
        if used is None:
            return rows.amax(1)
        return torch.where(used.any(1), rows.masked_fill(~used, -math.inf).amax(1), 0)
    if scale is not None:
        rows = rows * scale.unsqueeze(-1)
    total = (rows if used is None else rows * used).sum(1)
    if mode == SUM:
        return total
    return total / (indices.shape[1] if used is None else used.sum(1).clamp(min=1))


def _ragged_bags(weight: Tensor, indices: Tensor, bags: Tensor, count: int, scale: Tensor | None, used: Tensor | None, mode: int) -> Tensor:
    if mode == MAX:
        rows = _own.embedding.default(weight, indices, 0, -1)
        rows = rows if used is None else rows.masked_fill(~used.unsqueeze(1), -math.inf)
        least = rows.new_full((count, rows.shape[1]), -math.inf)
        out = least.scatter_reduce(0, bags.unsqueeze(1).expand(rows.shape), rows, "amax")
        return torch.where(out == -math.inf, 0, out)
    if mode == MEAN:
        ones = weight.new_ones(indices.shape) if used is None else used.to(weight.dtype)
        counts = weight.new_zeros(count).index_add(0, bags, ones)
        scale = ones / counts.index_select(0, bags).clamp(min=1)
    elif used is not None:
        scale = used.to(weight.dtype) if scale is None else scale * used
    return _own.embedding_bag.default(weight, indices, bags, scale, count, 0, 0)


def prepare_bags(node: fx.Node) -> None:
    """Notes where bags begin when that is an `arange`, as `F.embedding_bag` makes it of an input with two dims."""
    offsets = node.args[2]
    if isinstance(offsets, fx.Node) and offsets.target is _aten.arange.start_step:
        node.kwargs = {**node.kwargs, "begin": tuple(offsets.args[:3])}


def _width(begin: tuple[Any, ...], number: int, include_last_offset: bool) -> int:
    """n, when bags begin at every n-th of `number` elements; else 0."""
    if include_last_offset or len(begin) != 3 or not all(isinstance(x, int) for x in begin):
        return 0
    start, end, step = begin
    return step if start == 0 and end == number and step > 0 and number % step == 0 else 0


def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """Memory by strides, as a view where it is one, else as reads at positions. Strides are facts of one device's memory alone."""
    order, offset = _memory(x, size, stride, storage_offset)
    flat = x.permute(order).reshape(-1)
    kept = [d for d in range(len(size)) if stride[d] != 0 and size[d] != 1]
    inner = sorted(kept, key=lambda d: (-stride[d], size[d]))
    count = math.prod(size[d] for d in kept)
    if all(stride[d] == math.prod(size[e] for e in inner[i + 1 :]) for i, d in enumerate(inner)):
        dense = flat if count == flat.shape[0] else flat.narrow(0, offset, count)
        out = dense.reshape([size[d] for d in inner]).permute([inner.index(d) for d in kept])
        return out.reshape([n if d in kept else 1 for d, n in enumerate(size)]).expand(list(size))
    return _aten.index.Tensor(flat, [_positions(x, size, stride, offset)])


def as_strided_scatter(x: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    order, offset = _memory(x, size, stride, storage_offset)
    flat = x.permute(order).reshape(-1)
    flat = _aten.index_put.default(flat, [_positions(x, size, stride, offset)], src)
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([x.shape[d] for d in order]).permute(back)


def _memory(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None) -> tuple[list[int], int]:
    """The dims of x from the outermost in memory to the innermost, and where in it the strides begin to count.

    Raises CaptureError when x has gaps or overlaps, or when the strides lead out of it.
    """
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), x.shape[d]))
    dense = [x.stride(d) == math.prod(x.shape[e] for e in order[i + 1 :]) for i, d in enumerate(order) if x.shape[d] != 1]
    offset = 0 if storage_offset is None else storage_offset - x.storage_offset()
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 in size or not all(dense) or offset < 0 or last >= x.numel():
        raise CaptureError(
            f"as_strided of {tuple(size)} by {tuple(stride)} leaves the memory of its tensor of shape {tuple(x.shape)}",
            why="what lies beside a tensor in memory is different on every device",
            try_="use slices, unfold or indexing, or call contiguous() first",
        )
    return order, offset


def _positions(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Integer tensor [*size]: where each element lies in memory."""
    out = torch.full((), offset, dtype=torch.int64, device=x.device)
    for d, (n, s) in enumerate(zip(size, stride, strict=True)):
        out = out + (torch.arange(n, device=x.device) * s).reshape([-1 if e == d else 1 for e in range(len(size))])
    return out


def log_sigmoid(x: Tensor) -> Tensor:
    """ATen's own op saves a buffer that is empty on some devices."""
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def _ends(x: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    return [0] * len(indices), [0 if i is None else x.shape[d] for d, i in enumerate(indices)]


def _is_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    return NotImplemented if _is_mask(indices) else _own.index.default(x, list(indices), *_ends(x, indices))


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    return NotImplemented if _is_mask(indices) else _own.index_put.default(x, list(indices), values, accumulate, *_ends(x, indices))


def _at(x: Tensor, dim: int, index: Tensor) -> list[Tensor | None]:
    """The indices that say the same as an index of one dim."""
    return [*[None] * (dim % x.dim()), index.reshape(-1)]


def _index_select(x: Tensor, dim: int, index: Tensor) -> Any:
    return _index(x, _at(x, dim, index)) if x.dim() else NotImplemented


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Any:
    if not x.dim() or source.dim() != x.dim():
        return NotImplemented
    return _index_put(x, _at(x, dim, index), source if alpha == 1 else source * alpha, True)


def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    return _index_put(x, _at(x, dim, index), source) if x.dim() and source.dim() == x.dim() else NotImplemented


def _gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    return _own.gather.default(x, dim, index, 0, x.shape[dim]) if x.dim() and index.dim() == x.dim() else NotImplemented


def _scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    same = x.dim() and index.dim() == x.dim() == src.dim()
    return _own.scatter_add.default(x, dim, index, src, 0, x.shape[dim]) if same else NotImplemented


def _scatter(x: Tensor, dim: int, index: Tensor, src: Tensor | float) -> Any:
    if not x.dim() or index.dim() != x.dim() or isinstance(src, complex):
        return NotImplemented
    tensor, number = (src, 0.0) if isinstance(src, Tensor) else (None, float(src))
    return _own.scatter.default(x, dim, index, tensor, number, 0, x.shape[dim])


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.embedding_bag.padding_idx: embedding_bag,
    _aten.embedding_bag.default: embedding_bag,
    _aten.as_strided.default: as_strided,
    _aten.as_strided_scatter.default: as_strided_scatter,
    _aten.log_sigmoid.default: log_sigmoid,
}
PREPARE: dict[Any, Callable[[fx.Node], None]] = {embedding_bag: prepare_bags}
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.as_strided.default: as_strided,
    _aten.as_strided_scatter.default: as_strided_scatter,
    _aten.new_empty_strided.default: lambda x, size, stride, **options: x.new_empty(size, **options),
    _aten.empty_strided.default: lambda size, stride, **options: torch.empty(size, **options),
    _aten.index.Tensor: _index,
    _aten._unsafe_index.Tensor: _index,
    _aten.index_put.default: _index_put,
    _aten._unsafe_index_put.default: _index_put,
    _aten.index_select.default: _index_select,
    _aten.index_add.default: _index_add,
    _aten.index_copy.default: _index_copy,
    _aten.gather.default: _gather,
    _aten.scatter_add.default: _scatter_add,
    _aten.scatter.src: _scatter,
    _aten.scatter.value: _scatter,
}
