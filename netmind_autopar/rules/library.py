"""Rows of the wider ATen library, in the form of `table.py`: row → ops. Data only.

Element-wise and special functions, images, linear algebra, transforms, complex numbers, indexing by position.
"""

from __future__ import annotations

_IMAGE = "... h! w!"
_VOLUME = "... d! h! w!"

GROUPS: dict[str, str] = {
    # ---- element-wise ---------------------------------------------------------------------------------------------------------
    "pointwise": """
        angle conj_physical _conj_physical sinc i0 mvlgamma polygamma hardshrink softshrink threshold isposinf isneginf
        special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr special_erfcx
        special_i0e special_i1 special_i1e special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1
        special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
        special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py special_xlog1py.other_scalar
        special_xlog1py.self_scalar special_zeta special_zeta.other_scalar special_zeta.self_scalar
        xlogy.Scalar_Other xlogy.Scalar_Self frexp.Tensor nextafter copysign.Tensor copysign.Scalar gcd lcm igamma igammac
        heaviside ldexp.Tensor logaddexp logaddexp2 round.decimals remainder.Scalar_Tensor floor_divide.Scalar
        bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor bitwise_left_shift.Tensor_Scalar
        bitwise_left_shift.Scalar_Tensor bitwise_right_shift.Tensor_Scalar bitwise_right_shift.Scalar_Tensor
        __lshift__.Tensor __lshift__.Scalar __rshift__.Tensor __rshift__.Scalar _prelu_kernel isin.Tensor_Scalar
        log_sigmoid_forward
    """,
    "pointwise +": "deg2rad rad2deg _conj _neg_view",
    "pointwise + +": "complex",
    "pointwise * _": """
        hardshrink_backward softshrink_backward logit_backward native_dropout_backward log_sigmoid_backward
        rrelu_with_noise_backward _prelu_kernel_backward
    """,
    "pointwise _ *": "fill.Tensor",
    "halves": "glu",
    "halves * _": "glu_backward",
    "retyped": "view.dtype",
    "+... -> ... z!": "view_as_real",
    "+... z! -> ...": "view_as_complex",
    # ---- reductions, along a dim ----------------------------------------------------------------------------------------------
    "reduce sum": "nansum count_nonzero count_nonzero.dim_IntList",
    "reduce whole": """
        aminmax median median.dim nanmedian nanmedian.dim mode kthvalue std_mean.correction var.dim
        norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dtype norm.ScalarOpt_dim_dtype
        linalg__powsum _is_all_true _is_any_true
    """,
    "along": "cummax cummin _safe_softmax _logcumsumexp",
    "along * *": "linalg_cross",
    "one_dim_each": "renorm",
    "moved_along dims +": "roll rot90",
    "moved_along dim +": "_fft_c2c _fft_r2c _fft_c2r",
    "fixed": """
        dist bincount eye.m linspace linspace.Tensor_Tensor linspace.Tensor_Scalar linspace.Scalar_Tensor logspace tril_indices
        triu_indices range range.step hann_window hann_window.periodic hamming_window hamming_window.periodic blackman_window
        blackman_window.periodic bartlett_window bartlett_window.periodic kaiser_window fft_fftfreq fft_rfftfreq block_diag
        masked_scatter masked_scatter_backward put _pdist_forward
    """,
    "loss": "binary_cross_entropy soft_margin_loss",
    "loss *": "binary_cross_entropy_backward soft_margin_loss_backward",
    "batch_norm forward": "_native_batch_norm_legit.no_stats",
    "weight_norm forward": "_weight_norm_interface",
    "weight_norm backward": "_weight_norm_interface_backward",
    "creation size": "empty_strided new_empty_strided empty_permuted",
    "pointwise _": "fill.Scalar zero",
    # ---- images ---------------------------------------------------------------------------------------------------------------
    f"+{_IMAGE} -> ... y! x!": """
        upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_bilinear2d.vec
        upsample_nearest2d.vec reflection_pad2d replication_pad2d adaptive_avg_pool2d
    """,
    f"+... y! x! -> {_IMAGE} | input_size=shape": """
        upsample_bicubic2d_backward _upsample_nearest_exact2d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward
    """,
    "+... h! -> ... y!": """
        upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d reflection_pad1d replication_pad1d avg_pool1d adaptive_avg_pool1d
    """,
    "+... y! -> ... h! | input_size=shape": "upsample_nearest1d_backward upsample_linear1d_backward _upsample_nearest_exact1d_backward",
    f"+{_VOLUME} -> ... z! y! x!": """
        upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d avg_pool3d _adaptive_avg_pool3d
    """,
    f"+... z! y! x! -> {_VOLUME} | input_size=shape": """
        upsample_nearest3d_backward upsample_trilinear3d_backward _upsample_nearest_exact3d_backward
    """,
    "*... y!, ... h! -> ... h!": "reflection_pad1d_backward replication_pad1d_backward",
    f"*... y! x!, {_IMAGE} -> {_IMAGE}": "reflection_pad2d_backward replication_pad2d_backward",
    f"*... z! y! x!, {_VOLUME} -> {_VOLUME}": """
        reflection_pad3d_backward replication_pad3d_backward avg_pool3d_backward _adaptive_avg_pool3d_backward
    """,
    f"{_IMAGE} -> ... y! x!, ... y! x!": "adaptive_max_pool2d",
    f"{_VOLUME} -> ... z! y! x!, ... z! y! x!": "adaptive_max_pool3d max_pool3d_with_indices",
    f"*... y! x!, {_IMAGE}, ... y! x! -> {_IMAGE}": "adaptive_max_pool2d_backward",
    f"*... z! y! x!, {_VOLUME}, ... z! y! x! -> {_VOLUME}": "adaptive_max_pool3d_backward max_pool3d_with_indices_backward",
    f"*... y! x!, ... y! x! -> {_IMAGE}": "max_unpool2d",
    f"*... z! y! x!, ... z! y! x! -> {_VOLUME}": "max_unpool3d",
    "fractional_pool forward": "fractional_max_pool2d fractional_max_pool3d",
    "fractional_pool backward": "fractional_max_pool2d_backward fractional_max_pool3d_backward",
    "pixel_shuffle out": "pixel_shuffle",
    "pixel_shuffle in": "pixel_unshuffle",
    "channel_shuffle": "channel_shuffle native_channel_shuffle",
    "columns out": "im2col",
    "columns in": "col2im",
    "*n c h! w!, n y x z! -> n c y x": "grid_sampler_2d",
    "*n c d! h! w!, n v y x z! -> n c v y x": "grid_sampler_3d",
    "*n c y x, n c h! w!, n y x z! -> n c h! w!, n y x z!": "grid_sampler_2d_backward",
    "*n c v y x, n c d! h! w!, n v y x z! -> n c d! h! w!, n v y x z!": "grid_sampler_3d_backward",
    "affine_grid": "affine_grid_generator",
    "unfold": "unfold",
    "unfold_backward": "unfold_backward",
    "split split_size": "unsafe_split.Tensor",
    "split split_sizes": "unsafe_split_with_sizes",
    # ---- linear algebra: matrices of a batch are independent ------------------------------------------------------------------
    "outer_added": "addr",
    "vector_added": "addmv",
    "summed_matmul": "addbmm",
    "k, k -> ": "vdot",
    "+m! n! -> ": "trace",
    "m k, k n -> m n": "_int_mm",
    "distances forward": "_cdist_forward",
    "distances backward": "_cdist_backward",
    "... p m!, ... r m! -> ... p r": "_euclidean_dist",
    "trilinear": "_trilinear",
    "diagonal read": "diagonal",
    "diagonal grad": "diagonal_backward",
    "diagonal embed": "diag_embed",
    "diagonal write": "diagonal_scatter",
    "... n! m! -> ... n! m!, ...": "linalg_inv_ex linalg_cholesky_ex",
    "... n! m! -> ... n! m!": "cholesky cholesky_inverse linalg_matrix_exp",
    "... n! k!, ... n! m! -> ... n! k!": "cholesky_solve",
    "... n! m! -> ..., ... n! m!, ... n!": "_linalg_det",
    "... n! m! -> ..., ..., ... n! m!, ... n!": "_linalg_slogdet",
    "... n! m! -> ... n! p!, ... q! m!": "linalg_qr",
    "... n! m! -> ... n!, ... n! m!": "_linalg_eigh linalg_eig",
    "... n! m! -> ... n!": "_linalg_eigvals",
    "... n! m! -> ... n! m!, ... k!": "geqrf",
    "... n! m! -> ... n! m!, ... k!, ...": "linalg_lu_factor_ex linalg_ldl_factor_ex",
    "... n! m! -> ... n! p!, ... p! q!, ... q! m!": "linalg_lu",
    "... n! m!, ... k! -> ... n! p!, ... p! q!, ... q! m!": "lu_unpack",
    "... n! n!, ... n!, ... p! q! -> ... p! q!": "linalg_lu_solve linalg_ldl_solve",
    "... n! m!, ... k! -> ... n! m!": "linalg_householder_product",
    "... n! m!, ... k!, ... p! q! -> ... p! q!": "ormqr",
    "svd": "_linalg_svd",
    "solve": "_linalg_solve_ex",
    "triangular": "linalg_solve_triangular",
    "... b! k!, ... n! m! -> ... b! k!, ... n! m!": "triangular_solve",
    # ---- positions ------------------------------------------------------------------------------------------------------------
    "sorted_search": "searchsorted.Tensor",
    "..., k! -> ...": "bucketize.Tensor",
    "members": "isin.Tensor_Tensor",
    "taken": "take",
    "index_fill": "index_fill.int_Scalar index_fill.int_Tensor",
    "along_index write": "scatter_reduce.two scatter.reduce scatter.value_reduce index_reduce",
}

# Ops of the core ATen opset that have no row, and why.
_MADE = "says a size or stride, which is a number at capture"
_DRAWN = "capture draws by counters instead (autopar.uniform, normal, randint, dropout)"
WITHOUT: dict[str, str] = {
    "aten._embedding_bag.default": "capture makes it autopar.embedding, or autopar.embedding_bag; scaled by frequency it runs whole",
    "aten._local_scalar_dense.default": "a number that depends on values: refused at capture",
    "aten.nonzero.default": "a shape that depends on values: refused at capture",
    "aten.as_strided.default": "capture makes it views, or reads at positions: strides are facts of one device's memory",
    "aten.sym_is_contiguous.default": _MADE,
    "aten.sym_numel.default": _MADE,
    "aten.sym_size.int": _MADE,
    "aten.sym_storage_offset.default": _MADE,
    "aten.sym_stride.int": _MADE,
    "aten.native_dropout.default": _DRAWN,
    "aten.rand.default": _DRAWN,
    "aten.randn.default": _DRAWN,
    "aten.randperm.default": _DRAWN,
}
