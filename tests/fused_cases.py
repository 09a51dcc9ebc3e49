"""Calls that prove the rules of the fused ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case_kit import B, Case, F, I, K


def fused() -> Iterator[Case]:
    yield from _norms()
    yield from _group_norms()
    for m, n in ((4, 6), (5, 7)):
        for kind in ("silu", "gelu", "gelu_tanh"):
            yield "autopar.gated.default", (F(m, 3, n), F(m, 3, n), kind), {}
            yield "autopar.gated_backward.default", (F(m, 3, n), F(m, 3, n), F(m, 3, n), kind), {}
        for angles in ((n, 4), (1, n, 4), (m, n, 4), (m, n, 6)):
            for back in (False, True):
                yield "autopar.rope.default", (F(m, 6, n, 6), F(*angles), F(*angles), back), {}
        yield "autopar.rope.default", (F(1, m, n, 6), F(1, n, 6), F(1, n, 6), False), {}
        yield "autopar.dropout_add.default", (F(m, 3, n), F(m, 3, n), torch.tensor(5), 0.4, 7, [m, 3, n], [0, 0, 0], [m, 3, n]), {}
        x = F(m, 4, n, 5)
        for mask in (None, F(n, 5), F(m, 1, n, 5), F(m, 1, 1, 5), B(4, n, 5) | (torch.arange(5) == 0)):
            yield "autopar.masked_softmax.default", (x, mask, 0.5), {}
        yield "autopar.masked_softmax_backward.default", (F(m, 4, n, 5), x.softmax(-1), 0.5), {}
        for smoothing in (0.0, 0.1):
            yield "autopar.cross_entropy.default", (F(m, n), I(n, m), 2, smoothing), {}
        for smoothing in (0.0, 0.1):
            x, w, labels = F(m, 5), F(n, 5), I(n, m)
            yield "autopar.linear_cross_entropy.default", (x, w, labels, 2, smoothing, 3), {}
            _, lse = K.linear_cross_entropy(x, w, labels, 2, smoothing, 3)
            yield "autopar.linear_cross_entropy_backward.default", (F(m), x, w, labels, lse, 1.0, 0.0, 2), {}
        order = torch.randperm(2 * m)
        yield "autopar.permute_rows.default", (F(m, n), order, 2), {}
        for weight in (None, F(m, 2)):
            yield "autopar.unpermute_rows.default", (F(2 * m, n), order, weight, 2), {}
        yield "autopar.vocab_stats.default", (F(m, n), I(3 * n, m), n, 3 * n, 2), {}
        yield "autopar.vocab_combine.default", (F(m, 3, n).exp(),), {}


def _group_norms() -> Iterator[Case]:
    for shape, groups in (((4, 6, 5), 3), ((3, 8, 2, 3), 2), ((5, 4, 3), 1), ((2, 6, 3), 6)):
        x, w, b, grad = F(*shape), F(shape[1]), F(shape[1]), F(*shape)
        for weight, bias in ((w, b), (w, None), (None, None)):
            yield "autopar.group_norm_silu.default", (x, weight, bias, groups, 1e-5), {}
            _, mean, rstd = K.group_norm_silu(x, weight, bias, groups, 1e-5)
            yield "autopar.group_norm_silu_backward.default", (grad, x, weight, bias, mean, rstd), {}


def _norms() -> Iterator[Case]:
    for shape in ((4, 6, 8), (5, 7), (3, 4, 1)):
        x, r, w, b, grad = F(*shape), F(*shape), F(shape[-1]), F(shape[-1]), F(*shape)
        for weight, bias in ((w, b), (w, None), (None, None)):
            _, rstd = K.rms_norm(x, weight, 1e-5, 1.0)
            _, mean, scale = K.layer_norm(x, weight, bias, 1e-5)
            if bias is None:
                yield "autopar.rms_norm.default", (x, weight, 1e-5, 1.0), {}
                yield "autopar.add_rms_norm.default", (x, r, weight, 1e-5, 0.0), {}
            yield "autopar.layer_norm.default", (x, weight, bias, 1e-5), {}
            yield "autopar.add_layer_norm.default", (x, r, weight, bias, 1e-5), {}
            for more in (None, torch.randn_like(x)):
                if bias is None:
                    yield "autopar.rms_norm_backward.default", (grad, more, x, weight, rstd, 1.0), {}
                yield "autopar.layer_norm_backward.default", (grad, more, x, weight, bias, mean, scale), {}
    x = F(5)
    yield "autopar.add_rms_norm.default", (x, F(5), F(5), 1e-5, 0.0), {}
    yield "autopar.rms_norm_backward.default", (F(5), None, x, F(5), K.rms_norm(x, None, 1e-5, 0.0)[1], 0.0), {}
