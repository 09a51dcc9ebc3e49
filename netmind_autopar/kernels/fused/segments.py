"""The gradient of an embedding as sums of segments: deterministic, without atomic additions. Kernel of `autopar::embedding_backward`.

    out[v] = Σ_{i: index_i = v} grad_i        in float32, rounded once

Indices are sorted once, stably (torch.sort); a program has one block of columns of one run of equal indices and adds its rows in their
order, so the bits are the same in every run. Roofline, bytes per element of grad in 16 bit: 2 read, and 2 per element of the table
written (zeros included), and about 100 per index for the sort. A run is added by one program: an index that most rows have makes it
slow, never wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import as_rows
from .language import jit, tl
from .launch import Config, choose, launch, register

# The eager reference is `kernels.embedding.embedding_backward` with `embedding_dense_backward`.


@jit
def _sum(grad, order, keys, out, count, n, g_row, BLOCK: tl.constexpr):
    """Rows of `grad` in the order `order`, whose indices are `keys`, rising; rows with a negative one are left out."""
    blocks = tl.cdiv(n, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = col < n
    key = tl.load(keys + at)
    before = tl.load(keys + at - 1, mask=at > 0, other=-1)
    if (key >= 0) & (key != before):
        total = tl.zeros((BLOCK,), tl.float32)
        same = key
        while same == key:
            place = tl.load(order + at)
            total += tl.load(grad + place * g_row + col, mask=seen, other=0.0).to(tl.float32)
            at += 1
            same = tl.load(keys + at, mask=at < count, other=-1)
        tl.store(out + key * n + col, total, mask=seen)


SUM = register("embedding.sum", _sum, (Config(512, 1, 2), Config(1024, 1, 4), Config(1024, 1, 8, only=4)))


def segment_sum(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """grad [..., n], index of its leading dims, negative: left out -> [rows, n] of grad's dtype."""
    flat, (keys, order) = as_rows(grad), torch.sort(index.reshape(-1), stable=True)
    count, n = flat.shape
    out = torch.zeros((rows, n), dtype=grad.dtype, device=grad.device)
    config = choose(SUM, n, grad) or SUM.configs[0]
    launch(SUM, config, count * -(-n // config.block), flat, order, keys, out, count, n, flat.stride(0))
    return out
