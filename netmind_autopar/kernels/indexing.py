"""`autopar::index`, `index_put`, `gather`, `scatter_add`, `scatter`: ATen's ops for a tensor of which only a block may be here.

Along an indexed dim of global size `size` the local block is [start, start + its local size). What is read from elsewhere is zero,
so that the blocks' results add up to the whole; what is written elsewhere is left out. A negative index counts from the global
end. An index outside of the whole tensor is an error of the model, as in ATen; where the dim is split it reads zero.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
Indices = Sequence[Tensor | None]


def _local(index: Tensor, start: int, size: int, here: int) -> tuple[Tensor, Tensor | None]:
    """The index inside of the local block, clamped, and which elements lie outside of it; None when the block is everything."""
    if here == size:
        return index, None
    at = torch.where(index < 0, index + size, index) - start
    return at.clamp(0, here - 1), (at < 0) | (at >= here)


def _local_all(x: Tensor, indices: Indices, starts: Sequence[int], sizes: Sequence[int]) -> tuple[list[Tensor | None], Tensor | None]:
    """`_local` of every index; one mask, of the indices' broadcast shape, for all."""
    found: list[Tensor | None] = []
    masks = []
    for d, index in enumerate(indices):
        local, outside = (None, None) if index is None else _local(index, starts[d], sizes[d], x.shape[d])
        found.append(local)
        masks += [] if outside is None else [outside]
    return found, functools.reduce(torch.logical_or, masks) if masks else None


def _over_values(mask: Tensor, x: Tensor, indices: Indices) -> Tensor:
    """The mask with dims of size 1 for the dims of x that stand behind the indices' dims in `x[indices]`."""
    places = [d for d, i in enumerate(indices) if i is not None]
    wide = torch.broadcast_shapes(*(i.shape for i in indices if i is not None))
    at = places[0] if places == list(range(places[0], places[0] + len(places))) else 0
    behind = x.dim() - len(places) - at
    return mask.broadcast_to(wide).reshape(*wide, *(1 for _ in range(behind)))


def index(x: Tensor, indices: Indices, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """`x[indices]`. For each dim of `indices` (None: all of it) where the block of x starts and its global size."""
    local, outside = _local_all(x, indices, starts, sizes)
    out = _aten.index.Tensor(x, local)
    return out if outside is None else out.masked_fill_(_over_values(outside, x, indices), 0)


def index_put(x: Tensor, indices: Indices, values: Tensor, accumulate: bool, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """`x` with `values` written at, or added to, `x[indices]`."""
    local, outside = _local_all(x, indices, starts, sizes)
    if outside is None:
        return _aten.index_put.default(x, local, values, accumulate)
    if accumulate:
        mask = _over_values(outside, x, indices)
        return _aten.index_put.default(x, local, values.masked_fill(mask, 0), True)
    first = next(d for d, i in enumerate(local) if i is not None)
    spare, here = _with_spare(x, first)
    local[first] = torch.where(outside, here, local[first])  # type: ignore[arg-type]
    return _aten.index_put_.default(spare, local, values, False).narrow(first, 0, here).contiguous()


def _with_spare(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """A copy of x with one more place along `dim`, where everything lands that belongs elsewhere; the place."""
    dim %= x.dim()
    here = x.shape[dim]
    spare = x.new_empty([n + (d == dim) for d, n in enumerate(x.shape)])
    spare.narrow(dim, 0, here).copy_(x)
    spare.narrow(dim, here, 1).zero_()
    return spare, here


def gather(x: Tensor, dim: int, index: Tensor, start: int, size: int) -> Tensor:
    local, outside = _local(index, start, size, x.shape[dim] if x.dim() else 1)
    out = torch.gather(x, dim, local)
    return out if outside is None else out.masked_fill_(outside, 0)


def scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor, start: int, size: int) -> Tensor:
    local, outside = _local(index, start, size, x.shape[dim] if x.dim() else 1)
    if outside is not None:
        src = src[tuple(slice(n) for n in index.shape)].masked_fill(outside, 0)
    return torch.scatter_add(x, dim, local, src)


def scatter(x: Tensor, dim: int, index: Tensor, src: Tensor | None, value: float, start: int, size: int) -> Tensor:
    """`src`, or one number when there is none, written to x at the positions `index` of `dim`."""
    local, outside = _local(index, start, size, x.shape[dim] if x.dim() else 1)
    filled: Any = value if src is None else src
    if outside is None:
        return torch.scatter(x, dim, local, filled)
    spare, here = _with_spare(x, dim)
    return spare.scatter_(dim, torch.where(outside, here, local), filled).narrow(dim, 0, here).contiguous()


_SCHEMAS = {
    "index": (index, "(Tensor x, Tensor?[] indices, SymInt[] starts, SymInt[] sizes) -> Tensor"),
    "index_put": (index_put, "(Tensor x, Tensor?[] indices, Tensor values, bool accumulate, SymInt[] starts, SymInt[] sizes) -> Tensor"),
    "gather": (gather, "(Tensor x, int dim, Tensor index, SymInt start, SymInt size) -> Tensor"),
    "scatter_add": (scatter_add, "(Tensor x, int dim, Tensor index, Tensor src, SymInt start, SymInt size) -> Tensor"),
    "scatter": (scatter, "(Tensor x, int dim, Tensor index, Tensor? src, float value, SymInt start, SymInt size) -> Tensor"),
}
for _name, (_function, _schema) in _SCHEMAS.items():
    torch.library.custom_op(f"autopar::{_name}", _function, mutates_args=(), schema=_schema)


@torch.library.register_fake("autopar::index")
def _fake_index(x, indices, starts, sizes):
    return x.new_empty(_aten.index.Tensor(x, indices).shape)


@torch.library.register_fake("autopar::gather")
def _fake_gather(x, dim, index, start, size):
    return x.new_empty(index.shape)


def _fake_like(x, *rest):
    return x.new_empty(x.shape)


for _name in ("index_put", "scatter_add", "scatter"):
    torch.library.register_fake(f"autopar::{_name}", _fake_like)

DIRECT = {getattr(torch.ops.autopar, name).default: function for name, (function, _) in _SCHEMAS.items()}
