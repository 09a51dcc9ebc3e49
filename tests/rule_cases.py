"""Calls that prove the rows of the rule table: at least one for every op, even sizes and uneven ones.

A case is (op name, args, kwargs) with real tensors. Element-wise ops are generated from their schema; the rest is listed here.
Sizes 4 and 6 divide over meshes of 2 and 3, sizes 5 and 7 do not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case_kit import GENERATOR, A, B, Case, F, I, K, P
from elementwise_cases import elementwise
from fused_cases import fused
from library_cases import library


@functools.cache
def _norm(rows: tuple[int, ...], inner: int) -> tuple[torch.Tensor, ...]:
    x = F(*rows, inner)
    _, mean, rstd = A.native_layer_norm(x, [inner], None, None, 1e-5)
    return F(*rows, inner), x, mean, rstd


def _pool(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    x = F(*shape)
    y, indices = A.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])
    return torch.randn_like(y), x, indices


def _attention(shape: tuple[int, ...], kv: int, t: int, causal: bool, p: float, mask: torch.Tensor | None = None) -> tuple[Case, Case]:
    b, h, _, d = shape
    q, k, v = F(*shape), F(b, kv, t, d), F(b, kv, t, d)
    rest = (mask, torch.tensor(11) if p else None, causal, d**-0.5, p, 3, 0, 0, h, 0, shape[2])
    out, lse = K.attention(q, k, v, *rest)
    return (
        ("autopar.attention.default", (q, k, v, *rest), {}),
        ("autopar.attention_backward.default", (torch.randn_like(out), q, k, v, out, lse, *rest), {}),
    )


def _conv(
    x: tuple[int, ...], w: tuple[int, ...], groups: int, bias: bool, transposed: bool, mask: list[bool], dilation: int = 1
) -> Iterator[Case]:
    rank = len(x) - 2
    channels = w[1] * groups if transposed else w[0]
    image, weight = F(*x), F(*w)
    rest = ([2] * rank, [1] * rank, [dilation] * rank, transposed, [int(transposed)] * rank, groups)
    y = A.convolution(image, weight, None, *rest)
    yield "aten.convolution.default", (image, weight, F(channels) if bias else None, *rest), {}
    yield "aten.convolution_backward.default", (torch.randn_like(y), image, weight, [channels] if bias else None, *rest, mask), {}


def _losses() -> Iterator[Case]:
    for reduction, grad in ((0, F(5, 7)), (1, F()), (2, F())):
        for name, beta in (("mse_loss", ()), ("smooth_l1_loss", (1.0,)), ("huber_loss", (1.0,))):
            yield f"aten.{name}.default", (F(5, 7), F(5, 7), reduction), {}
            yield f"aten.{name}_backward.default", (grad, F(5, 7), F(5, 7), reduction, *beta), {}
        yield "aten.binary_cross_entropy_with_logits.default", (F(5, 7), P(5, 7), F(7), None, reduction), {}


def _listed() -> Iterator[Case]:
    for m, k, n in ((4, 6, 8), (5, 7, 3)):
        yield "aten.mm.default", (F(m, k), F(k, n)), {}
        yield "aten.bmm.default", (F(3, m, k), F(3, k, n)), {}
        yield "aten.mv.default", (F(m, k), F(k)), {}
        yield "aten.dot.default", (F(k), F(k)), {}
        for bias in (F(n), F(m, n), F(1, n), F(m, 1)):
            yield "aten.addmm.default", (bias, F(m, k), F(k, n)), {"alpha": 2.0, "beta": 0.5}
            yield "aten.baddbmm.default", (bias, F(3, m, k), F(3, k, n)), {}
        yield "aten.baddbmm.default", (F(3, m, n), F(3, m, k), F(3, k, n)), {}
        yield "aten.addmm.default", (I(9, n), I(9, m, k), I(9, k, n)), {}
        yield "aten.linear.default", (F(2, m, k), F(n, k), F(n)), {}
        yield "aten.linear.default", (F(m, k), F(n, k)), {}
        yield "aten.embedding.default", (F(m, n), I(m, k, 2)), {}
        yield "aten.embedding_dense_backward.default", (F(k, 2, n), I(m, k, 2), m, -1, False), {}
        yield "aten.embedding_dense_backward.default", (F(k, 2, n), I(m, k, 2), m, -1, True), {}  # counts how often an index occurs
        yield "autopar.embedding.default", (F(m, n), I(m, k, 2), 0, -1), {}
        yield "autopar.embedding_backward.default", (F(k, 2, n), I(m, k, 2), m, 0, 1), {}
        ends = torch.tensor([2, 2, k + n - 1])  # an empty group, and a row behind the last
        yield "autopar.grouped_mm.default", (F(k + n, m), F(3, m, n), ends, 0, 0), {}
        yield "autopar.grouped_mm_backward.default", (F(k + n, m), F(k + n, n), ends, 3, 0, 0), {}
        yield "autopar.nll_loss.default", (F(k, n), I(n, k), 1), {}
        yield "autopar.nll_loss_backward.default", (F(), I(n, k), n, 1), {}
        yield "autopar.sum_exp.default", (F(k, n), F(k)), {}
        yield "autopar.pick.default", (F(k, n), I(n + 1, k) - 1, 0, n, -1), {}
        yield "autopar.cross_entropy_backward.default", (F(k), F(k, n), I(n, k), F(k), 0, 0.9, 0.01), {}
        for name, a, b, dtype in (
            ("uniform", -1.0, 2.0, torch.float32),
            ("normal", 1.0, 2.0, torch.float64),
            ("exponential", 1.5, 0.0, torch.bfloat16),
            ("randint", -3, 9, torch.int64),
        ):
            yield f"autopar.{name}.default", (torch.tensor(6), a, b, 2, dtype, [m, k, n], [m, k, n], [0, 0, 0], [m, k, n]), {}
        yield "autopar.dropout.default", (F(m, k, n), torch.tensor(5), 0.4, 7, [m, k, n], [0, 0, 0], [m, k, n]), {}
    yield from _norms()
    yield from _losses()
    yield from _images()
    for case in (
        ((4, 6, 6, 4), 6, 6, True, 0.0),
        ((3, 6, 5, 4), 2, 7, False, 0.0),
        ((4, 4, 3, 4), 2, 3, True, 0.3),
        ((5, 6, 4, 4), 1, 4, False, 0.3),
        ((1, 5, 4, 4), 5, 4, False, 0.3),
        ((2, 4, 7, 4), 2, 7, True, 0.0),
        ((2, 2, 7, 4), 2, 4, True, 0.0),
        ((2, 2, 5, 4), 2, 9, True, 0.3),
    ):
        yield from _attention(*case)
    for mask in (B(3, 1, 5, 7) | (torch.arange(7) == 0), F(5, 7), F(3, 6, 1, 7)):
        yield from _attention((3, 6, 5, 4), 2, 7, False, 0.0, mask)
    yield from _moves()
    yield from _reductions()
    yield from _cuts()
    yield from _indexing()
    yield from _recurrent()
    yield from _blocks()


def _recurrent() -> Iterator[Case]:
    for t, b, h in ((3, 4, 6), (2, 5, 7)):
        gates, hidden, cell, weight = F(t, b, 4 * h), F(b, h), F(b, h), F(4 * h, h)
        out, cells, acts = K.lstm(gates, hidden, cell, weight)
        yield "autopar.lstm.default", (gates, hidden, cell, weight), {}
        yield "autopar.lstm_backward.default", (torch.randn_like(out), torch.randn_like(out), acts, cells, cell, weight), {}
        gates, weight = F(t, b, 3 * h), F(3 * h, h)
        out, acts = K.gru(gates, hidden, weight, F(3 * h))
        yield "autopar.gru.default", (gates, hidden, weight, F(3 * h)), {}
        yield "autopar.gru_backward.default", (torch.randn_like(out), acts, out, hidden, weight), {}
        gates, weight = F(t, b, h), F(h, h)
        for relu in (False, True):
            yield "autopar.rnn.default", (gates, hidden, weight, relu), {}
            yield "autopar.rnn_backward.default", (F(t, b, h), K.rnn(gates, hidden, weight, relu), weight, relu), {}


def _norms() -> Iterator[Case]:
    for rows, inner in (((4, 6), 8), ((5,), 7)):
        grad, x, mean, rstd = _norm(rows, inner)
        weight, bias = F(inner), F(inner)
        yield "aten.native_layer_norm.default", (x, [inner], weight, bias, 1e-5), {}
        yield "aten.native_layer_norm.default", (x, [inner], None, None, 1e-5), {}
        yield "aten.native_layer_norm_backward.default", (grad, x, [inner], mean, rstd, weight, bias, [True, True, True]), {}
        yield "aten.native_layer_norm_backward.default", (grad, x, [inner], mean, rstd, weight, None, [True, True, False]), {}
        yield "aten._fused_rms_norm.default", (x, [inner], weight, 1e-5), {}
        for half in (A._softmax, A._log_softmax):
            yield str(half.default), (x, -1, False), {}
            yield str(half.default), (x, 0, False), {}
        yield "aten._softmax_backward_data.default", (grad, torch.softmax(x, -1), -1, torch.float64), {}
        yield "aten._log_softmax_backward_data.default", (grad, torch.log_softmax(x, -1), -1, torch.float64), {}
        for name in ("softmax.int", "log_softmax.int"):
            yield f"aten.{name}", (x, -1), {}
    for n, c, g in ((4, 12, 4), (5, 6, 3)):
        x, weight, bias = F(n, c, 5, 2), F(c), F(c)
        _, mean, rstd = A.native_group_norm(x, weight, bias, n, c, 10, g, 1e-5)
        yield "aten.native_group_norm.default", (x, weight, bias, n, c, 10, g, 1e-5), {}
        yield "aten.native_group_norm_backward.default", (torch.randn_like(x), x, mean, rstd, weight, n, c, 10, g, [True, True, True]), {}
        mean, var = F(c), P(c)
        yield "aten._native_batch_norm_legit_no_training.default", (x, weight, bias, mean, var, 0.1, 1e-5), {}
        yield "aten._native_batch_norm_legit_functional.default", (x, weight, bias, mean, var, True, 0.1, 1e-5), {}
        yield "aten.native_batch_norm.default", (x, weight, bias, mean, var, False, 0.1, 1e-5), {}
        save = A._native_batch_norm_legit_functional(x, weight, bias, mean, var, True, 0.1, 1e-5)[1:3]
        rest = (1e-5, [True, True, True])
        yield "aten.native_batch_norm_backward.default", (torch.randn_like(x), x, weight, mean, var, *save, True, *rest), {}
        none = torch.empty(0, dtype=torch.float64)
        yield "aten.native_batch_norm_backward.default", (torch.randn_like(x), x, weight, mean, var, none, none, False, *rest), {}


def _images() -> Iterator[Case]:
    for mask in ([True, True, True], [True, True, False], [False, True, False], [False, False, True]):
        yield from _conv((4, 6, 7, 7), (8, 6, 3, 3), 1, mask[2], False, mask)
        yield from _conv((5, 6, 7, 7), (9, 2, 3, 3), 3, mask[2], False, mask)
    yield from _conv((3, 4, 9), (4, 1, 3), 4, True, False, [True, True, False])
    yield from _conv((3, 4, 5, 5), (4, 3, 3, 3), 2, True, True, [True, True, False])
    yield from _conv((2, 5, 5, 5), (5, 3, 3, 3), 1, False, True, [True, True, True])
    yield from _conv((4, 5, 9, 8), (7, 5, 3, 2), 1, True, False, [True, True, False], 2)
    yield from _conv((3, 6, 4, 5, 4), (4, 3, 2, 3, 2), 2, True, False, [True, True, False])
    yield from _conv((3, 6, 4, 3, 4), (6, 2, 2, 3, 2), 3, True, True, [True, True, False])
    yield from _conv((4, 7, 6), (7, 5, 3), 1, True, True, [True, True, False], 2)
    for shape in ((4, 6, 8, 8), (5, 3, 7, 7)):
        n, c, h, w = shape
        grad, x, indices = _pool(shape)
        yield "aten.max_pool2d_with_indices.default", (x, [3, 3], [2, 2], [1, 1]), {}
        yield "aten.max_pool2d_with_indices_backward.default", (grad, x, [3, 3], [2, 2], [1, 1], [1, 1], False, indices), {}
        y = A.avg_pool2d(x, [3, 3], [2, 2], [1, 1])
        yield "aten.avg_pool2d.default", (x, [3, 3], [2, 2], [1, 1]), {}
        yield "aten.avg_pool2d_backward.default", (torch.randn_like(y), x, [3, 3], [2, 2], [1, 1], False, True, None), {}
        yield "aten._adaptive_avg_pool2d.default", (x, [3, 3]), {}
        yield "aten._adaptive_avg_pool2d_backward.default", (F(n, c, 3, 3), x), {}
        for kind, more in (("nearest2d", ()), ("bilinear2d", (False,))):
            yield f"aten.upsample_{kind}.default", (x, [11, 11], *more), {}
            yield f"aten.upsample_{kind}_backward.default", (F(n, c, 11, 11), [11, 11], [n, c, h, w], *more), {}


def _moves() -> Iterator[Case]:
    for shape, to in (
        ((4, 6, 8), [24, 8]),
        ((24, 8), [4, 6, 2, 4]),
        ((6, 4), [8, 3]),
        ((5, 7), [1, 35, 1]),
        ((5, 12), [5, 3, 4]),
        ((4, 6), [2, 12]),
        ((12, 5), [4, 15]),
        ((6,), [1, 6]),
        ((2, 6, 10), [2, 4, 15]),
        ((1, 1), [1]),
    ):
        for name in ("view", "_unsafe_view", "reshape"):
            yield f"aten.{name}.default", (F(*shape), to), {}
    for shape in ((4, 6, 5), (5, 7, 3)):
        x = F(*shape)
        yield "aten.permute.default", (x, [2, 0, -2]), {}
        yield "aten.transpose.int", (x, 0, -1), {}
        yield "aten.t.default", (x[0],), {}
        yield "aten.expand.default", (F(shape[0], 1, shape[2]), [2, shape[0], 6, -1]), {}
        yield "aten.repeat.default", (x, [2, 1, 3, 1]), {}
        yield "aten.squeeze.default", (F(1, shape[0], 1),), {}
        yield "aten.squeeze.dim", (F(2, 1, shape[0]), 1), {}
        yield "aten.squeeze.dim", (F(2, 1, shape[0]), 0), {}
        yield "aten.squeeze.dims", (F(2, 1, shape[0]), [0, 1]), {}
        yield "aten.unsqueeze.default", (x, -1), {}
        yield "aten.unsqueeze.default", (x, 1), {}
        yield "aten.cat.default", ([x, F(shape[0], 2, shape[2]), F(shape[0], 1, shape[2])], -2), {}
        yield "aten.cat.default", ([x, F(*shape), F(*shape)], 1), {}
        yield "aten.cat.default", ([F(*shape), F(*shape)], -1), {}
        yield "aten.stack.default", ([x, F(*shape), F(*shape)], 1), {}
        for name in ("tril", "triu"):
            yield f"aten.{name}.default", (x, 1), {}
        yield "aten.flip.default", (x, [0, -1]), {}
    for size in ([4, 6], [5, 7]):
        for name, more in (("full", (2.5,)), ("zeros", ()), ("ones", ()), ("empty.memory_format", ())):
            yield f"aten.{name if '.' in name else name + '.default'}", (size, *more), {"dtype": torch.float64}
        for name, more in (("new_full", (2.5,)), ("new_zeros", ()), ("new_ones", ()), ("new_empty", ())):
            yield f"aten.{name}.default", (F(3), size, *more), {}
    yield "aten.scalar_tensor.default", (2.5,), {"dtype": torch.float64}
    yield "aten.arange.default", (6,), {}
    yield "aten.arange.start", (2, 8), {}
    yield "aten.arange.start_step", (2, 8, 2), {}
    yield "aten.eye.default", (4,), {}
    yield "aten.histc.default", (F(6), 4), {}
    yield "prims.iota.default", (6,), {"start": 0, "step": 1, "dtype": torch.int64, "device": torch.device("cpu"), "requires_grad": False}
    yield "prims.convert_element_type.default", (F(5, 6), torch.float32), {}
    yield "prims.convert_element_type.default", (F(5, 6), torch.int64), {}
    yield "prims.convert_element_type.default", (B(5, 6), torch.float64), {}
    yield "aten._to_copy.default", (F(4, 6),), {"dtype": torch.int64}
    yield "aten._to_copy.default", (F(4, 6),), {"dtype": torch.float32}
    for value in (0, 0.5):
        yield "aten.masked_fill.Scalar", (F(4, 5), B(4, 5), value), {}
        yield "aten.where.ScalarOther", (B(4, 5), F(5), value), {}
        yield "aten.where.ScalarSelf", (B(5), value, F(4, 5)), {}
    yield "aten.elu_backward.default", (F(5, 6), 1.0, 1.0, 1.0, False, F(5, 6)), {}
    yield "aten.add.Tensor", (F(4, 6), 2.0), {}
    yield "aten.add.Tensor", (F(4, 6), F(6)), {"alpha": 3.0}
    yield "aten.add.Tensor", (I(5, 4, 6), I(5, 4, 6)), {}
    yield "aten.add.Tensor", (F(4, 6), F()), {}
    yield "aten.sub.Tensor", (F(4, 6), 2.0), {}
    yield "aten.mul.Tensor", (F(5, 6), 2.0), {}
    yield "aten.mul.Tensor", (F(), F(5, 6)), {}
    yield "aten.mul.Tensor", (F(5, 6), B(5, 6)), {}
    yield "aten.div.Tensor", (F(5, 6), 3.0), {}
    yield "aten.div.Tensor", (F(5, 6), F()), {}


def _reductions() -> Iterator[Case]:
    for shape in ((4, 6, 5), (5, 7, 3)):
        x = F(*shape)
        for name in ("sum", "amax", "amin", "max", "min", "any", "all", "prod", "argmax", "argmin", "mean"):
            yield f"aten.{name}.default", (x,), {}
        for name in ("sum.dim_IntList", "amax.default", "amin.default", "mean.dim", "logsumexp.default"):
            for keep in (False, True):
                yield f"aten.{name}", (x, [0, -1], keep), {}
        yield "aten.sum.dim_IntList", (x, None), {}
        yield "aten.sum.dim_IntList", (x > 0, [1]), {}
        yield "aten.sum.dim_IntList", (F(1, 5), [0], True), {}
        for name in ("any.dim", "all.dim", "prod.dim_int", "max.dim", "min.dim"):
            for keep in (False, True):
                yield f"aten.{name}", (x, 1, keep), {}
        for name in ("any.dims", "all.dims"):
            yield f"aten.{name}", (x > 0, [0, 1]), {}
        yield "aten.argmax.default", (x, 1), {}
        for name in ("var.correction", "std.correction", "var_mean.correction"):
            yield f"aten.{name}", (x, [1]), {"correction": 1}
            yield f"aten.{name}", (x, [1, 2]), {"correction": 0, "keepdim": True}
        yield "aten.linalg_vector_norm.default", (x, 2, [1]), {}
        for name in ("cumsum", "cumprod", "logcumsumexp"):
            yield f"aten.{name}.default", (x, 1), {}
        yield "aten.sort.default", (x, 1), {}
        yield "aten.sort.stable", (x,), {"stable": True, "dim": 1}
        yield "aten.topk.default", (x, 2, 1), {}
        yield "aten.topk.default", (x, shape[1], 1), {}


def _cuts() -> Iterator[Case]:
    for n in (4, 5):
        x = F(n, 12, 3)
        yield "aten.split.Tensor", (x, 4, 1), {}
        yield "aten.split.Tensor", (x, 5, 1), {}
        yield "aten.split.Tensor", (x, 12, 1), {}
        yield "aten.split.Tensor", (x, 1, -1), {}
        yield "aten.split_with_sizes.default", (x, [4, 4, 4], 1), {}
        yield "aten.split_with_sizes.default", (x, [2, 4, 6], 1), {}
        yield "aten.chunk.default", (x, 2, 1), {}
        yield "aten.chunk.default", (x, 5, 1), {}
        yield "aten.unbind.int", (x, -1), {}
        whole = 9223372036854775807
        for start, end in ((0, whole), (None, None), (0, 12), (-12, whole), (1, 7), (-3, whole), (-20, 40)):
            yield "aten.slice.Tensor", (x, 1, start, end), {}
        yield "aten.slice.Tensor", (x, 1, 0, whole, 2), {}
        yield "aten.slice.Tensor", (x,), {}
        yield "aten.select.int", (x, 1, -2), {}
        yield "aten.slice_scatter.default", (x, F(n, 6, 3), 1, 3, 9), {}
        yield "aten.slice_scatter.default", (x, F(n, 12, 3), 1, 0, 12), {}
        yield "aten.select_scatter.default", (x, F(n, 3), 1, 2), {}
        yield "aten.slice_backward.default", (F(n, 6, 3), [n, 12, 3], 1, 3, 9, 1), {}
        yield "aten.slice_backward.default", (F(n, 12, 3), [n, 12, 3], 1, 0, 12, 1), {}
        yield "aten.slice_backward.default", (F(n, 12, 3), [n, 12, 3], 1, 0, whole, 1), {}
        yield "aten.select_backward.default", (F(n, 3), [n, 12, 3], 1, 2), {}
        yield "aten.constant_pad_nd.default", (x, [0, 0, 1, 2], 0.0), {}
        yield "aten.constant_pad_nd.default", (x, [0, 0, 1, 2], 1.5), {}
        yield "aten.constant_pad_nd.default", (x, [0, -1, 1, -1]), {}


def _indexing() -> Iterator[Case]:
    for n, m in ((4, 6), (5, 7)):
        x = F(n, m, 3)
        yield "aten.index.Tensor", (x, [None, I(m, 4, 5)]), {}
        yield "aten.index.Tensor", (x, [I(n, 5, 1), I(m, 4)]), {}
        yield "aten.index.Tensor", (x, [I(n, 6), None, I(3, 6)]), {}
        yield "aten._unsafe_index.Tensor", (x, [None, I(m, 5), I(3, 5)]), {}
        for name in ("index_put", "_unsafe_index_put"):
            for accumulate in (False, True):
                order = torch.randperm(m, generator=GENERATOR)[:4]
                yield f"aten.{name}.default", (x, [None, order], F(n, 4, 3), accumulate), {}
                yield f"aten.{name}.default", (x, [None, order], F(3), accumulate), {}
                yield f"aten.{name}.default", (x, [I(1, 4), order], F(), accumulate), {}
            yield f"aten.{name}.default", (x, [I(n, 6), I(m, 6)], F(6, 3), True), {}
        yield "aten.gather.default", (x, 1, I(m, n, 4, 3)), {}
        yield "aten.gather.default", (x, 1, I(m, n - 1, 4, 3)), {}
        yield "aten.gather.default", (x, 1, I(m, n, 1, 3)), {}
        yield "aten.gather.default", (x, 1, I(m, n, m, 3)), {}
        yield "aten.index_select.default", (x, 1, I(m, 5)), {}
        yield "aten.scatter_add.default", (x, 1, I(m, n, 4, 3), F(n, 4, 3)), {}
        yield "aten.scatter_add.default", (x, 1, I(m, n - 1, 4, 3), F(n, 4, 3)), {}
        yield "aten.scatter_add.default", (I(9, n, m, 3), 1, I(m, n, 4, 3), I(9, n, 4, 3)), {}
        yield "aten.index_add.default", (I(9, n, m, 3), 1, I(m, 5), I(9, n, 5, 3)), {}
        yield "aten.index_put.default", (I(9, n, m), [None, I(m, 4)], I(9, n, 4), True), {}
        yield "aten.index_add.default", (x, 1, I(m, 5), F(n, 5, 3)), {}
        order = torch.randperm(m, generator=GENERATOR)[:4]
        yield "aten.index_copy.default", (x, 1, order, F(n, 4, 3)), {}
        wide = order.reshape(1, 4, 1).expand(n, 4, 3).contiguous()
        yield "aten.scatter.src", (x, 1, wide, F(n, 4, 3)), {}
        yield "aten.scatter.value", (x, 1, wide, 2.5), {}


def _blocks() -> Iterator[Case]:
    """The ops of our own that know where a block of the indexed dim begins; negative indices count from the global end."""
    for n, m in ((4, 6), (5, 7)):
        x = F(n, m, 3)
        for indices in ([None, I(m, 4, 5) - m // 2], [I(n, 5, 1), I(m, 4)], [I(n, 6), None, I(3, 6)], [None, None, I(3, 4)]):
            sizes = [0 if i is None else x.shape[d] for d, i in enumerate(indices)]
            rest = ([0] * len(sizes), sizes)
            values = torch.randn_like(A.index(x, indices))
            yield "autopar.index.default", (x, indices, *rest), {}
            yield "autopar.index_put.default", (x, indices, values, True, *rest), {}
            yield "autopar.index_put.default", (x, indices, values[..., :1].contiguous(), True, *rest), {}
        yield "autopar.index.default", (I(9, n, m), [None, I(m, 4)], [0, 0], [0, m]), {}
        yield "autopar.index.default", (B(n, m), [None, I(m, 4)], [0, 0], [0, m]), {}
        order = torch.randperm(m, generator=GENERATOR)[:4]
        yield "autopar.index_put.default", (x, [None, order - m], F(n, 4, 3), False, [0, 0], [0, m]), {}
        yield "autopar.index_put.default", (x, [I(1, 4), order], F(4, 3), False, [0, 0], [n, m]), {}
        yield "autopar.index_put.default", (I(9, n, m), [None, order], I(9, n, 4), True, [0, 0], [0, m]), {}
        yield "autopar.index_put.default", (B(n, m), [None, order], B(n, 4), False, [0, 0], [0, m]), {}
        for shape in ((n, 4, 3), (n - 1, 4, 3), (n, 1, 3), (n, m, 2)):
            index = I(m, *shape)
            yield "autopar.gather.default", (x, 1, index, 0, m), {}
            yield "autopar.scatter_add.default", (x, -2, index, F(*shape), 0, m), {}
        yield "autopar.gather.default", (I(9, n, m), 0, I(n, 3, m), 0, n), {}
        yield "autopar.scatter_add.default", (x, 1, I(m, n, 4, 3), F(n, m, 4), 0, m), {}
        yield "autopar.scatter_add.default", (I(9, n, m), 1, I(m, n, 4), I(9, n, 4), 0, m), {}
        wide = order.reshape(1, 4, 1).expand(n, 4, 3).contiguous()
        yield "autopar.scatter.default", (x, 1, wide, F(n, 4, 3), 0.0, 0, m), {}
        yield "autopar.scatter.default", (x, 1, wide, None, 2.5, 0, m), {}
        yield "autopar.scatter.default", (B(n, m), 1, wide[..., 0].contiguous(), None, 1.0, 0, m), {}
        bags = I(n, m + 3).sort().values
        for scale in (None, F(m + 3)):
            yield "autopar.embedding_bag.default", (F(8, m), I(8, m + 3), bags, scale, n, 0, 0), {}
            yield "autopar.embedding_bag_backward.default", (F(n, m), I(8, m + 3), bags, scale, 8, 0, 0), {}


CASES: tuple[Case, ...] = (*elementwise(), *_listed(), *library(), *fused())
