"""What is measured: calls of ops at sizes that models use. A case is data, so that every process makes the same list.

Ops stand for themselves and for their class (`costs.compute.CLASSES`): an op that is not listed is priced as its class.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import DIRECT

Sizes = tuple[int, ...]
aten, autopar = torch.ops.aten, torch.ops.autopar


@dataclass(frozen=True)
class Case:
    """One call: an op of OPS, its sizes, its dtype."""

    op: str
    sizes: Sizes
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.op} {'×'.join(map(str, self.sizes))} {self.dtype}"


@dataclass(frozen=True)
class Op:
    """How to call an op. `shapes(*sizes)`: of its tensors; one that begins with "i" and a number holds integers below that number, one
    that begins with "wide" is float32 whatever the case's dtype."""

    call: Callable[..., Any]
    shapes: Callable[..., tuple]


def _same(count: int) -> Callable[..., tuple]:
    return lambda *sizes: (sizes,) * count


def _own(name: str) -> Callable[..., Any]:
    """An op of this package: as emitted code calls it, and as a call of a graph where one is captured."""
    op = getattr(autopar, name).default
    return lambda *args: (op if torch.compiler.is_exporting() else DIRECT[op])(*args)


def _attention(causal: bool) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return _own("attention")(q, k, v, None, None, causal, q.shape[-1] ** -0.5, 0.0, 0, 0, 0, q.shape[1], 0, q.shape[2])

    return call


def _attention_backward(causal: bool) -> Callable[..., Any]:
    def call(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        scale, heads, rows = q.shape[-1] ** -0.5, q.shape[1], q.shape[2]
        return _own("attention_backward")(g, q, k, v, out, lse, None, None, causal, scale, 0.0, 0, 0, 0, heads, 0, rows)

    return call


def _norm_backward(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor) -> Any:
    return aten.native_layer_norm_backward(g, x, [x.shape[-1]], mean, rstd, w, b, [True, True, True])


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor) -> Any:
    return aten.convolution_backward(g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])


OPS: dict[str, Op] = {
    "mm": Op(aten.mm.default, lambda m, k, n: ((m, k), (k, n))),
    "mm.t": Op(lambda a, b: aten.mm.default(a, b.t()), lambda m, k, n: ((m, k), (n, k))),
    "bmm": Op(aten.bmm.default, lambda b, m, k, n: ((b, m, k), (b, k, n))),
    "add": Op(aten.add.Tensor, _same(2)),
    "mul": Op(aten.mul.Tensor, _same(2)),
    "div": Op(lambda x: aten.div.Tensor(x, 2.0), _same(1)),
    "relu": Op(aten.relu.default, _same(1)),
    "threshold_backward": Op(lambda g, x: aten.threshold_backward.default(g, x, 0), _same(2)),
    "cat": Op(lambda a, b: aten.cat.default([a, b], 1), _same(2)),
    "gelu": Op(aten.gelu.default, _same(1)),
    "gelu.tanh": Op(lambda x: aten.gelu.default(x, approximate="tanh"), _same(1)),
    "gelu_backward": Op(aten.gelu_backward.default, _same(2)),
    "gelu_backward.tanh": Op(lambda g, x: aten.gelu_backward.default(g, x, approximate="tanh"), _same(2)),
    "tanh": Op(aten.tanh.default, _same(1)),
    "silu": Op(aten.silu.default, _same(1)),
    "silu_backward": Op(aten.silu_backward.default, _same(2)),
    "_softmax": Op(lambda x: aten._softmax.default(x, 1, False), _same(1)),
    "_softmax_backward_data": Op(lambda g, y: aten._softmax_backward_data.default(g, y, 1, g.dtype), _same(2)),
    "sum_exp": Op(_own("sum_exp"), lambda n, c: ((n, c), (n,))),
    "cross_entropy_backward": Op(
        lambda g, x, t, lse: _own("cross_entropy_backward")(g, x, t, lse, 0, 1.0, 0.0),
        lambda n, c: ((n,), (n, c), (f"i{c}", n), ("wide", n)),
    ),
    "sum": Op(lambda x: aten.sum.dim_IntList(x, [0]), _same(1)),
    "sum.rows": Op(lambda x: aten.sum.dim_IntList(x, [1]), _same(1)),
    "amax": Op(lambda x: aten.amax.default(x, [1]), _same(1)),
    "native_layer_norm": Op(
        lambda x, w, b: aten.native_layer_norm.default(x, [x.shape[-1]], w, b, 1e-5), lambda n, c: ((n, c), (c,), (c,))
    ),
    "native_layer_norm_backward": Op(_norm_backward, lambda n, c: ((n, c), (n, c), ("wide", n, 1), ("wide", n, 1), (c,), (c,))),
    "embedding": Op(lambda w, i: _own("embedding")(w, i, 0, -1), lambda n, c: ((4096, c), ("i4096", n))),
    "embedding_backward": Op(lambda g, i: _own("embedding_backward")(g, i, 4096, 0, -1), lambda n, c: ((n, c), ("i4096", n))),
    "attention": Op(_attention(False), lambda b, h, s, d: ((b, h, s, d),) * 3),
    "attention.causal": Op(_attention(True), lambda b, h, s, d: ((b, h, s, d),) * 3),
    "attention_backward": Op(_attention_backward(False), lambda b, h, s, d: (*((b, h, s, d),) * 5, ("wide", b, h, s))),
    "attention_backward.causal": Op(_attention_backward(True), lambda b, h, s, d: (*((b, h, s, d),) * 5, ("wide", b, h, s))),
    "convolution": Op(
        lambda x, w: aten.convolution.default(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        lambda n, c, h, o: ((n, c, h, h), (o, c, 3, 3)),
    ),
    "convolution_backward": Op(_convolution_backward, lambda n, c, h, o: ((n, o, h, h), (n, c, h, h), (o, c, 3, 3))),
}

MATMUL = ("mm", "mm.t", "bmm")
_FLAT = (  # ops of rows of numbers, priced by bytes
    "add mul div relu threshold_backward cat gelu gelu.tanh gelu_backward gelu_backward.tanh tanh silu silu_backward "
    "_softmax _softmax_backward_data sum_exp cross_entropy_backward sum sum.rows amax native_layer_norm native_layer_norm_backward "
    "embedding embedding_backward"
)
FLAT = tuple(_FLAT.split())
THIN_DIMS = (1, 2, 4, 8, 16, 32, 64)
WIDTH = 512  # of the rows of FLAT ops


def tensors(case: Case, pool: Tensor) -> tuple[Tensor, ...]:
    """The operands of a case, cut from `pool`: numbers between 0 and 1, for which every op of the list is defined."""
    made, at = [], 0
    for shape in OPS[case.op].shapes(*case.sizes):
        if str(shape[0]).startswith("i"):
            made.append(torch.randint(int(shape[0][1:]), shape[1:], device=pool.device))
            continue
        sizes = _numbers(shape)
        part = pool[at : at + math.prod(sizes)].view(sizes)
        made.append(part if shape[0] == "wide" else part.to(getattr(torch, case.dtype)))
        at += part.numel()
    return tuple(made)


def _numbers(shape: tuple) -> tuple[int, ...]:
    return tuple(n for n in shape if isinstance(n, int))


def pool_for(cases: Sequence[Case], device: torch.device) -> Tensor:
    """Numbers enough for the operands of any of the cases."""
    need = (sum(math.prod(_numbers(s)) for s in OPS[c.op].shapes(*c.sizes)) for c in cases)
    return torch.rand(max(need, default=1), device=device)


def operand_bytes(case: Case) -> int:
    """About how much memory a call takes, its result included."""
    shapes = OPS[case.op].shapes(*case.sizes)
    return 2 * sum(math.prod(_numbers(s)) for s in shapes) * 8


def cases_for(device: str, seed: int, memory_bytes: int) -> list[Case]:
    """All cases of a kind of device ("cpu" or "cuda") whose operands take no more than 1/16 of its memory, cheap ones first."""
    gpu = device == "cuda"
    found = [*_matmuls(gpu, seed), *_flat(gpu), *_blocks(gpu)]
    fitting = [c for c in found if operand_bytes(c) <= memory_bytes // 16]
    return sorted(dict.fromkeys(fitting), key=lambda c: (operand_bytes(c), str(c)))


def _matmuls(gpu: bool, seed: int) -> list[Case]:
    """Cubes for the curve, thin ones for what a small dim costs, and shapes drawn at random to judge by."""
    cubes = [2**e for e in (range(7, 14) if gpu else range(4, 11))]
    wide = 4096 if gpu else 512
    dtypes = ("float32", "bfloat16", "float16") if gpu else ("float32",)
    found = [Case("mm", (n, n, n), dtype) for dtype in dtypes for n in cubes]
    found += [Case("mm", (n,) * 3, "float64") for n in cubes[:-1:2]]
    found += [] if gpu else [Case("mm", (n,) * 3, "bfloat16") for n in cubes[1:-1:2]]
    for dtype in dtypes[:2]:
        for d in THIN_DIMS:
            found += [Case("mm", s, dtype) for s in ((d, wide, wide), (wide, d, wide), (wide, wide, d))]
    draw = random.Random(seed)
    low, high = math.log(64 if gpu else 12), math.log(8192 if gpu else 900)
    for i in range(24):
        m, k, n = (round(math.exp(draw.uniform(low, high))) for _ in range(3))
        found.append(Case(MATMUL[i % 2], (m, k, n), dtypes[i % len(dtypes)]))
    batches = [(2**b, s, 64, s) for b, s in ((3, 64), (5, 128), (6, 256))]
    return found + [Case("bmm", sizes, dtypes[-1]) for sizes in batches]


def _flat(gpu: bool) -> list[Case]:
    rows = [2**e for e in (range(2, 21, 2) if gpu else (1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))]
    dtypes = ("float32", "bfloat16") if gpu else ("float32",)
    return [Case(op, (n, WIDTH), dtype) for op in FLAT for n in rows for dtype in dtypes]


def _blocks(gpu: bool) -> list[Case]:
    """Attention and convolution."""
    dtypes = ("float32", "bfloat16") if gpu else ("float32",)
    spans = (128, 512, 1024, 2048, 4096) if gpu else (16, 32, 64, 128, 256, 512)
    heads = (8, 16) if gpu else (2, 4)
    found = [
        Case(op, (b, heads[1], s, 64), dtype)
        for op in ("attention", "attention.causal", "attention_backward", "attention_backward.causal")
        for s in spans
        for b in (1, heads[0])
        for dtype in dtypes
    ]
    images = ((8, 64, 56, 64), (8, 128, 28, 128), (32, 256, 14, 256), (32, 512, 7, 512)) if gpu else ()
    images = images or ((1, 8, 16, 8), (1, 16, 32, 16), (2, 32, 28, 32), (4, 64, 14, 64), (4, 64, 28, 64), (4, 128, 14, 128))
    return found + [Case(op, sizes, dtype) for op in ("convolution", "convolution_backward") for sizes in images for dtype in dtypes]
