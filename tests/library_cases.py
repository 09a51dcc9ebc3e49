"""Calls that prove the rows of rules/library.py, element-wise ones aside (elementwise_cases.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case_kit import GENERATOR, A, B, Case, F, I, P

C = torch.complex


def Z(*shape: int) -> torch.Tensor:
    """Complex."""
    return C(F(*shape), F(*shape))


def spd(*shape: int) -> torch.Tensor:
    """Symmetric positive definite matrices."""
    x = F(*shape, shape[-1])
    return x @ x.mT + shape[-1] * torch.eye(shape[-1], dtype=torch.float64)


def library() -> Iterator[Case]:
    yield from _along()
    yield from _made()
    yield from _images()
    yield from _volumes()
    yield from _windows()
    yield from _matrices()
    yield from _factored()
    yield from _positions()


def _along() -> Iterator[Case]:
    for shape in ((4, 6, 5), (5, 7, 3)):
        x = F(*shape)
        for name in ("aminmax.default", "median.default", "nanmedian.default", "norm.Scalar"):
            yield f"aten.{name}", (x,), {}
        yield "aten.aminmax.default", (x,), {"dim": -2, "keepdim": True}
        for name in ("nansum.default", "norm.ScalarOpt_dim", "linalg__powsum.default"):
            yield f"aten.{name}", (x, *((2,) if "nansum" not in name else ()), [1], True), {}
        yield "aten.nansum.default", (x,), {}
        yield "aten.norm.ScalarOpt_dtype", (x, 2), {"dtype": torch.float64}
        yield "aten.norm.ScalarOpt_dim_dtype", (x, 2, [-1], False), {"dtype": torch.float64}
        for name in ("median.dim", "nanmedian.dim", "mode.default", "std_mean.correction", "var.dim"):
            yield f"aten.{name}", (x, [1] if "." in name and name.startswith(("std", "var")) else 1), {}
        yield "aten.mode.default", (x,), {}
        yield "aten.kthvalue.default", (x, 2), {}
        yield "aten.kthvalue.default", (x, 2, 0, True), {}
        yield "aten.count_nonzero.default", (I(2, *shape),), {}
        yield "aten.count_nonzero.default", (I(2, *shape), -1), {}
        yield "aten.count_nonzero.dim_IntList", (I(2, *shape), [0, 2]), {}
        yield "aten._is_all_true.default", (B(*shape),), {}
        yield "aten._is_any_true.default", (B(*shape),), {}
        for name in ("cummax", "cummin", "_logcumsumexp"):
            yield f"aten.{name}.default", (x, 1), {}
        yield "aten._safe_softmax.default", (x, -1), {}
        yield "aten.linalg_cross.default", (F(shape[0], 3, 2), F(shape[0], 3, 2)), {"dim": 1}
        yield "aten.linalg_cross.default", (F(1, shape[1], 3), F(shape[0], 1, 3)), {}
        yield "aten.renorm.default", (x, 2, 1, 0.5), {}
        yield "aten.roll.default", (x, [1, -2], [0, 2]), {}
        yield "aten.roll.default", (x, [3]), {}
        for k in (1, 2, -1):
            yield "aten.rot90.default", (x, k, [0, 1]), {}
        z = Z(*shape)
        yield "aten._fft_c2c.default", (z, [0, 2], 0, True), {}
        yield "aten._fft_c2c.default", (z, [1], 2, False), {}
        yield "aten._fft_r2c.default", (x, [2], 0, True), {}
        yield "aten._fft_r2c.default", (x, [1], 1, True), {}
        yield "aten._fft_c2r.default", (z, [1], 2, 2 * shape[1] - 1), {}
        yield "aten.view_as_real.default", (z,), {}
        yield "aten.view_as_complex.default", (F(*shape, 2),), {}
        yield "aten.view.dtype", (x, torch.int64), {}
        yield "aten.view.dtype", (x, torch.int32), {}
        yield "aten._weight_norm_interface.default", (x, P(shape[0], 1, 1), 0), {}
        y, norms = A._weight_norm_interface(x, P(1, 1, shape[2]), 2)
        yield "aten._weight_norm_interface.default", (x, P(1, 1, shape[2]), 2), {}
        yield "aten._weight_norm_interface_backward.default", (torch.randn_like(y), x, P(1, 1, shape[2]), norms, 2), {}
        yield "aten._native_batch_norm_legit.no_stats", (x, F(shape[1]), F(shape[1]), True, 0.1, 1e-5), {}
        for half in (4, 5):
            yield "aten.glu.default", (F(shape[0], 2 * half, 3), 1), {}
            yield "aten.glu_backward.default", (F(shape[0], half, 3), F(shape[0], 2 * half, 3), -2), {}
    for reduction, grad in ((0, F(5, 7)), (1, F()), (2, F())):
        yield "aten.binary_cross_entropy.default", (P(5, 7), P(5, 7), None, reduction), {}
        yield "aten.binary_cross_entropy.default", (P(5, 7), P(5, 7), P(7), reduction), {}
        yield "aten.binary_cross_entropy_backward.default", (grad, P(5, 7), P(5, 7), P(5, 7), reduction), {}
        yield "aten.soft_margin_loss.default", (F(5, 7), F(5, 7), reduction), {}
        yield "aten.soft_margin_loss_backward.default", (grad, F(5, 7), F(5, 7), reduction), {}


def _made() -> Iterator[Case]:
    for name, args in (
        ("eye.m", (3, 4)),
        ("linspace.default", (0, 1, 6)),
        ("linspace.Tensor_Tensor", (F(), F(), 6)),
        ("linspace.Tensor_Scalar", (F(), 2, 6)),
        ("linspace.Scalar_Tensor", (2, F(), 6)),
        ("logspace.default", (0, 1, 6)),
        ("tril_indices.default", (4, 4)),
        ("triu_indices.default", (4, 4)),
        ("range.default", (0, 5)),
        ("range.step", (0, 6, 2)),
        ("hann_window.default", (6,)),
        ("hann_window.periodic", (6, False)),
        ("hamming_window.default", (6,)),
        ("hamming_window.periodic", (6, False)),
        ("blackman_window.default", (6,)),
        ("blackman_window.periodic", (6, False)),
        ("bartlett_window.default", (6,)),
        ("bartlett_window.periodic", (6, False)),
        ("kaiser_window.default", (6,)),
        ("fft_fftfreq.default", (6,)),
        ("fft_rfftfreq.default", (6,)),
        ("block_diag.default", ([F(2, 3), F(4, 2)],)),
        ("dist.default", (F(4, 6), F(4, 6))),
        ("bincount.default", (I(5, 8), None, 6)),
        ("masked_scatter.default", (F(4, 6), B(4, 6), F(4, 6))),
        ("masked_scatter_backward.default", (F(4, 6), B(4, 6), [4, 6])),
        ("put.default", (F(4, 6), torch.randperm(24, generator=GENERATOR)[:5], F(5))),
        ("_pdist_forward.default", (F(4, 6),)),
    ):
        yield f"aten.{name}", args, {}
    for size in ([4, 6], [5, 7]):
        yield "aten.empty_strided.default", (size, [size[1], 1]), {"dtype": torch.float64}
        yield "aten.new_empty_strided.default", (F(3), size, [1, size[0]]), {}
        yield "aten.empty_permuted.default", (size, [1, 0]), {"dtype": torch.float64}


def _images() -> Iterator[Case]:
    for n, c in ((4, 6), (5, 3)):
        x, line = F(n, c, 6, 5), F(n, c, 6)
        size = [n, c, 6, 5]
        for name, more in (
            ("upsample_bicubic2d", (False,)),
            ("_upsample_nearest_exact2d", ()),
            ("_upsample_bilinear2d_aa", (False,)),
            ("_upsample_bicubic2d_aa", (True,)),
        ):
            yield f"aten.{name}.default", (x, [9, 7], *more), {}
            yield f"aten.{name}_backward.default", (F(n, c, 9, 7), [9, 7], size, *more), {}
        yield "aten.upsample_bilinear2d.vec", (x, None, False, [2.0, 2.0]), {}
        yield "aten.upsample_nearest2d.vec", (x, [9, 7], None), {}
        for name, more in (("upsample_nearest1d", ()), ("upsample_linear1d", (False,)), ("_upsample_nearest_exact1d", ())):
            yield f"aten.{name}.default", (line, [9], *more), {}
            yield f"aten.{name}_backward.default", (F(n, c, 9), [9], [n, c, 6], *more), {}
        for kind in ("reflection", "replication"):
            yield f"aten.{kind}_pad1d.default", (line, [2, 1]), {}
            yield f"aten.{kind}_pad1d_backward.default", (F(n, c, 9), line, [2, 1]), {}
            yield f"aten.{kind}_pad2d.default", (x, [1, 2, 0, 1]), {}
            yield f"aten.{kind}_pad2d.default", (x[0], [1, 2, 0, 1]), {}
            yield f"aten.{kind}_pad2d_backward.default", (F(n, c, 7, 8), x, [1, 2, 0, 1]), {}
        yield "aten.adaptive_avg_pool2d.default", (x, [3, 2]), {}
        yield "aten.adaptive_avg_pool1d.default", (line, [4]), {}
        yield "aten.avg_pool1d.default", (line, [3], [2], [1]), {}
        y, where = A.adaptive_max_pool2d(x, [3, 2])
        yield "aten.adaptive_max_pool2d.default", (x, [3, 2]), {}
        yield "aten.adaptive_max_pool2d_backward.default", (torch.randn_like(y), x, where), {}
        y, where = A.max_pool2d_with_indices(x, [2, 2])
        yield "aten.max_unpool2d.default", (y, where, [6, 5]), {}
        picked = (x, [2, 2], [3, 3], P(n, c, 2))
        y, where = A.fractional_max_pool2d(*picked)
        yield "aten.fractional_max_pool2d.default", picked, {}
        yield "aten.fractional_max_pool2d_backward.default", (torch.randn_like(y), x, [2, 2], [3, 3], where), {}
        yield "aten.pixel_shuffle.default", (F(n, 4 * c, 4, 5), 2), {}
        yield "aten.pixel_unshuffle.default", (F(n, c, 8, 10), 2), {}
        for name in ("channel_shuffle", "native_channel_shuffle"):
            yield f"aten.{name}.default", (F(n, 12, 2, 4), 3), {}
        theta = F(n, 2, 3)
        yield "aten.affine_grid_generator.default", (theta, size, False), {}
        for mask in ([True, True], [False, True], [True, False]):
            grid = P(n, 4, 3, 2) * 2 - 1
            yield "aten.grid_sampler_2d_backward.default", (F(n, c, 4, 3), x, grid, 0, 0, False, mask), {}
        yield "aten.grid_sampler_2d.default", (x, grid, 0, 1, True), {}


def _volumes() -> Iterator[Case]:
    for n, c in ((4, 2), (3, 5)):
        x, size = F(n, c, 4, 5, 3), [n, c, 4, 5, 3]
        for name, more in (("upsample_nearest3d", ()), ("upsample_trilinear3d", (False,)), ("_upsample_nearest_exact3d", ())):
            yield f"aten.{name}.default", (x, [6, 7, 5], *more), {}
            yield f"aten.{name}_backward.default", (F(n, c, 6, 7, 5), [6, 7, 5], size, *more), {}
        for kind in ("reflection", "replication"):
            yield f"aten.{kind}_pad3d.default", (x, [1, 1, 2, 0, 0, 1]), {}
            yield f"aten.{kind}_pad3d_backward.default", (F(n, c, 5, 7, 5), x, [1, 1, 2, 0, 0, 1]), {}
        y = A.avg_pool3d(x, [2, 2, 2])
        yield "aten.avg_pool3d.default", (x, [2, 2, 2]), {}
        yield "aten.avg_pool3d_backward.default", (torch.randn_like(y), x, [2, 2, 2], [2, 2, 2], [0, 0, 0], False, True, None), {}
        yield "aten._adaptive_avg_pool3d.default", (x, [2, 3, 2]), {}
        yield "aten._adaptive_avg_pool3d_backward.default", (F(n, c, 2, 3, 2), x), {}
        y, where = A.adaptive_max_pool3d(x, [2, 3, 2])
        yield "aten.adaptive_max_pool3d.default", (x, [2, 3, 2]), {}
        yield "aten.adaptive_max_pool3d_backward.default", (torch.randn_like(y), x, where), {}
        y, where = A.max_pool3d_with_indices(x, [2, 2, 2])
        yield "aten.max_pool3d_with_indices.default", (x, [2, 2, 2]), {}
        rest = ([2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False, where)
        yield "aten.max_pool3d_with_indices_backward.default", (torch.randn_like(y), x, *rest), {}
        yield "aten.max_unpool3d.default", (y, where, [4, 5, 3], [2, 2, 2], [0, 0, 0]), {}
        picked = (x, [2, 2, 2], [2, 2, 1], P(n, c, 3))
        y, where = A.fractional_max_pool3d(*picked)
        yield "aten.fractional_max_pool3d.default", picked, {}
        yield "aten.fractional_max_pool3d_backward.default", (torch.randn_like(y), x, [2, 2, 2], [2, 2, 1], where), {}
        grid = P(n, 2, 4, 3, 3) * 2 - 1
        yield "aten.grid_sampler_3d.default", (x, grid, 0, 0, False), {}
        yield "aten.grid_sampler_3d_backward.default", (F(n, c, 2, 4, 3), x, grid, 0, 0, False, [True, True]), {}


def _windows() -> Iterator[Case]:
    for n, c in ((4, 6), (5, 3)):
        x = F(n, c, 12)
        for size, step in ((3, 3), (4, 2), (5, 5), (12, 1)):
            y = x.unfold(2, size, step)
            yield "aten.unfold.default", (x, -1, size, step), {}
            yield "aten.unfold_backward.default", (torch.randn_like(y), [n, c, 12], 2, size, step), {}
        yield "aten.unfold.default", (x, 0, 1, 1), {}
        image = F(n, c, 5, 6)
        y = A.im2col(image, [3, 2], [1, 1], [1, 0], [2, 1])
        yield "aten.im2col.default", (image, [3, 2], [1, 1], [1, 0], [2, 1]), {}
        yield "aten.im2col.default", (image[0], [3, 2], [1, 1], [1, 0], [2, 1]), {}
        yield "aten.col2im.default", (torch.randn_like(y), [5, 6], [3, 2], [1, 1], [1, 0], [2, 1]), {}
        yield "aten.unsafe_split.Tensor", (x, 4, 2), {}
        yield "aten.unsafe_split.Tensor", (x, 5, 2), {}
        yield "aten.unsafe_split_with_sizes.default", (x, [6, 6], 2), {}


def _matrices() -> Iterator[Case]:
    for m, k, n in ((4, 6, 8), (5, 7, 3)):
        for bias in (F(m, n), F(n), F(1, n)):
            yield "aten.addr.default", (bias, F(m), F(n)), {"alpha": 2.0}
            yield "aten.addbmm.default", (bias, F(3, m, k), F(3, k, n)), {"beta": 0.5}
        for bias in (F(m), F()):
            yield "aten.addmv.default", (bias, F(m, k), F(k)), {}
        yield "aten.vdot.default", (Z(k), Z(k)), {}
        yield "aten.trace.default", (F(m, k),), {}
        yield "aten._int_mm.default", (I(5, m, 8).to(torch.int8), I(5, 8, 16).to(torch.int8)), {}
        yield "aten._euclidean_dist.default", (F(m, k), F(n, k)), {}
        first, second = F(3, m, k), F(3, n, k)
        for p, wide in ((2.0, F(1, n, k)), (1.0, second)):
            yield "aten._cdist_forward.default", (first, wide, p, None), {}
            table = A._cdist_forward(first, second, p, None)
            yield "aten._cdist_backward.default", (torch.randn_like(table), first, second, p, table), {}
        yield "aten._trilinear.default", (F(m, k), F(n, k, 3), F(m, 3), [1, 3], [0], [1, 2], [2, 3]), {}
        for offset, a, b in ((0, 0, 1), (1, -2, -1), (-1, 2, 0)):
            x = F(m, k, n)
            line = x.diagonal(offset, a, b)
            yield "aten.diagonal.default", (x, offset, a, b), {}
            yield "aten.diagonal_backward.default", (F(*line.shape), [m, k, n], offset, a, b), {}
            yield "aten.diagonal_scatter.default", (x, F(*line.shape), offset, a, b), {}
            yield "aten.diag_embed.default", (F(m, k), offset, a, b), {}


def _factored() -> Iterator[Case]:
    for batch in ((4, 6), (5,)):
        x, full, b = spd(*batch, 3), F(*batch, 3, 3), F(*batch, 3, 4)
        lower = torch.linalg.cholesky(x)
        for name in (
            "linalg_inv_ex",
            "linalg_cholesky_ex",
            "cholesky",
            "linalg_matrix_exp",
            "_linalg_det",
            "_linalg_slogdet",
            "_linalg_eigh",
        ):
            yield f"aten.{name}.default", (x,), {}
        yield "aten.cholesky_inverse.default", (lower,), {}
        yield "aten.cholesky_solve.default", (b, lower), {}
        for name in ("linalg_eig", "_linalg_eigvals", "linalg_lu_factor_ex", "linalg_lu", "linalg_qr"):
            yield f"aten.{name}.default", (full,), {}
        yield "aten.linalg_qr.default", (b, "complete"), {}
        yield "aten.geqrf.default", (b,), {}
        yield "aten.linalg_ldl_factor_ex.default", (x,), {}
        ld, pivots, _ = A.linalg_ldl_factor_ex(x)
        yield "aten.linalg_ldl_solve.default", (ld, pivots, b), {}
        lu, pivots, _ = A.linalg_lu_factor_ex(full)
        yield "aten.linalg_lu_solve.default", (lu, pivots, b), {}
        yield "aten.lu_unpack.default", (lu, pivots), {}
        qr, tau = A.geqrf(b)
        yield "aten.linalg_householder_product.default", (qr[..., :3].contiguous(), tau), {}
        yield "aten.ormqr.default", (qr[..., :3].contiguous(), tau, b), {}
        yield "aten._linalg_svd.default", (b, False, True), {}
        yield "aten._linalg_svd.default", (b, True, True), {}
        yield "aten._linalg_svd.default", (b, False, False), {}
        yield "aten._linalg_solve_ex.default", (full, b), {}
        yield "aten._linalg_solve_ex.default", (full, b[..., 0].contiguous()), {}
        yield "aten.linalg_solve_triangular.default", (lower, b), {"upper": False}
        yield (
            "aten.linalg_solve_triangular.default",
            (lower[0] if len(batch) == 1 else lower[:1], b.mT.contiguous()),
            {"upper": False, "left": False},
        )
        yield "aten.triangular_solve.default", (b, lower, False), {}


def _positions() -> Iterator[Case]:
    for n, m in ((4, 6), (5, 7)):
        table = F(n, m).sort(-1).values
        yield "aten.searchsorted.Tensor", (table[0].contiguous(), F(n, 4, 3)), {}
        yield "aten.searchsorted.Tensor", (table, F(n, 5)), {"right": True}
        order = F(n, m).argsort(-1)
        yield "aten.searchsorted.Tensor", (F(n, m), F(n, 4)), {"sorter": order}
        yield "aten.bucketize.Tensor", (F(n, m), F(6).sort().values), {}
        yield "aten.isin.Tensor_Tensor", (I(9, n, m), I(9, 4)), {}
        yield "aten.take.default", (F(n, m), I(n * m, 4, 5)), {}
        x, index = F(n, m, 3), I(m, n, 4, 3)
        yield "aten.index_fill.int_Scalar", (x, 1, I(m, 3), 2.5), {}
        yield "aten.index_fill.int_Tensor", (x, -2, I(m, 3), F()), {}
        yield "aten.scatter_reduce.two", (x, 1, index, F(n, 4, 3), "amax"), {}
        yield "aten.scatter_reduce.two", (x, 1, index, F(n, 4, 3), "mean"), {"include_self": False}
        yield "aten.scatter.reduce", (x, 1, index, F(n, 4, 3)), {"reduce": "multiply"}
        yield "aten.scatter.value_reduce", (x, 1, index, 1.5), {"reduce": "add"}
        yield "aten.index_reduce.default", (x, 1, I(m, 4), F(n, 4, 3), "prod"), {}
