"""Every op that is known, one line each. Data first; the few functions that read it are at the end.

A row is a pattern of `algebra.py`, optionally with `| argument=adjustment`, or the name of a function of `compute.py` or
`shapes.py` with its words. Marks after `pointwise` are those of the tensor operands: "+ +" linear in all together, "*" linear
in this one alone, "_" not linear. To add an op: write its row here and a case in `tests/rule_cases.py`, which proves it.
"""

from __future__ import annotations

import torch
from torch import fx

from ..ir.errors import UnknownOpError
from . import compute, fused, indexing, library, linalg, shapes, spatial
from .algebra import Rule, bind
from .call import Call, call_of, signature
from .learnt import learnt
from .sketch import linear_checked

_GROUPS: dict[str, str] = {
    # element-wise, not linear
    "pointwise": """
        abs acos acosh asin asinh atan atanh bitwise_not ceil celu cos cosh digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu
        hardsigmoid hardswish hardtanh isinf isnan leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish
        nan_to_num reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinh softplus sqrt tan tanh trunc
        add.Scalar sub.Scalar rsub.Scalar pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor fmod.Scalar fmod.Tensor remainder.Scalar
        remainder.Tensor atan2 hypot maximum minimum fmax fmin clamp clamp.Tensor clamp_min clamp_max clamp_min.Tensor clamp_max.Tensor
        eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor
        logical_and logical_or logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_and.Scalar bitwise_or.Scalar
        bitwise_xor.Scalar bitwise_left_shift.Tensor bitwise_right_shift.Tensor where.self where.Scalar addcmul addcdiv div.Tensor_mode
        div.Scalar_mode floor_divide lerp.Tensor masked_fill.Tensor polar xlogy.Tensor
    """,
    "pointwise +": "neg positive mul.Scalar div.Scalar _to_copy clone detach alias lift_fresh_copy",
    "pointwise + +": "add.Tensor sub.Tensor rsub.Tensor lerp.Scalar",
    "pointwise * *": "mul.Tensor",
    "pointwise * _": """
        div.Tensor gelu_backward silu_backward tanh_backward sigmoid_backward threshold_backward hardtanh_backward hardswish_backward
        hardsigmoid_backward leaky_relu_backward elu_backward softplus_backward mish_backward
    """,
    "pointwise _ *": "copy fill.Tensor",
    "masked_fill": "masked_fill.Scalar",
    "where_scalar self other": "where.ScalarOther",
    "where_scalar other self": "where.ScalarSelf",
    "reduce sum +": "sum sum.dim_IntList",
    "reduce max": "amax max",
    "reduce min": "amin min",
    "reduce whole": """
        any any.dim any.dims all all.dim all.dims prod prod.dim_int argmax argmin var.correction std.correction var_mean.correction
        logsumexp max.dim min.dim linalg_vector_norm
    """,
    "reduce whole +": "mean mean.dim",
    "along": "_softmax _log_softmax softmax.int log_softmax.int sort sort.stable topk cumprod logcumsumexp",
    "along +": "cumsum",
    "along_dims +": "flip",
    "along * _": "_softmax_backward_data _log_softmax_backward_data",
    "loss": "mse_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits",
    "loss *": "mse_loss_backward smooth_l1_loss_backward huber_loss_backward",
    "added_matmul": "addmm",
    "added_matmul b": "baddbmm",
    "linear": "linear",
    "norm forward": "native_layer_norm _fused_rms_norm",
    "norm backward": "native_layer_norm_backward",
    "group_norm forward": "native_group_norm",
    "group_norm backward": "native_group_norm_backward",
    "batch_norm forward": "_native_batch_norm_legit_no_training _native_batch_norm_legit_functional native_batch_norm",
    "batch_norm backward": "native_batch_norm_backward",
    "convolution forward": "convolution",
    "convolution backward": "convolution_backward",
    "creation size": "full zeros ones empty.memory_format new_full new_zeros new_ones new_empty",
    "creation": "scalar_tensor",
    "pointwise _": "full_like zeros_like ones_like empty_like",
    "fixed": "arange arange.start arange.start_step eye histc",
    "view": "view _unsafe_view",
    "view shape": "reshape",
    "permute": "permute",
    "permute swap": "transpose.int",
    "permute last": "t",
    "expand": "expand",
    "repeat": "repeat",
    "squeeze": "squeeze squeeze.dim squeeze.dims",
    "unsqueeze": "unsqueeze",
    "cat": "cat",
    "stack": "stack",
    "split split_size": "split.Tensor",
    "split split_sizes": "split_with_sizes",
    "split chunks": "chunk",
    "unbind": "unbind.int",
    "cut": "slice.Tensor select.int slice_scatter select_scatter",
    "cut input_sizes": "slice_backward select_backward",
    "pad": "constant_pad_nd",
    "index": "index.Tensor _unsafe_index.Tensor",
    "index_put": "index_put _unsafe_index_put",
    "along_index read": "gather index_select",
    "along_index add": "scatter_add index_add",
    "along_index write": "scatter.src scatter.value index_copy",
}

TABLE: dict[str, str] = {
    "aten.mm.default": "m k, k n -> m n",
    "aten.bmm.default": "b m k, b k n -> b m n",
    "aten.mv.default": "m k, k -> m",
    "aten.dot.default": "k, k -> ",
    "aten.embedding.default": "*v! d, ... -> ... d",
    "aten.embedding_dense_backward.default": "embedding_backward",
    "aten.tril.default": "+... h! w! -> ... h! w!",
    "aten.triu.default": "+... h! w! -> ... h! w!",
    "aten.max_pool2d_with_indices.default": "... h! w! -> ... y! x!, ... y! x!",
    "aten.max_pool2d_with_indices_backward.default": "*... y! x!, ... h! w!, ... y! x! -> ... h! w!",
    "aten.avg_pool2d.default": "+... h! w! -> ... y! x!",
    "aten.avg_pool2d_backward.default": "*... y! x!, ... h! w! -> ... h! w!",
    "aten._adaptive_avg_pool2d.default": "+... h! w! -> ... y! x!",
    "aten._adaptive_avg_pool2d_backward.default": "*... y! x!, ... h! w! -> ... h! w!",
    "aten.upsample_nearest2d.default": "+... h! w! -> ... y! x!",
    "aten.upsample_nearest2d_backward.default": "+... y! x! -> ... h! w! | input_size=shape",
    "aten.upsample_bilinear2d.default": "+... h! w! -> ... y! x!",
    "aten.upsample_bilinear2d_backward.default": "+... y! x! -> ... h! w! | input_size=shape",
    "prims.convert_element_type.default": "pointwise +",
    "prims.iota.default": "fixed",
    "autopar.attention.default": "attention forward",
    "autopar.attention_backward.default": "attention backward",
    **dict.fromkeys(
        (f"autopar.{name}.default" for name in ("uniform", "normal", "exponential", "randint")),
        " -> ... | shape=shape parts=parts starts=starts lengths=lengths",
    ),
    "autopar.dropout.default": "*..., -> ... | parts=parts starts=starts lengths=lengths",
    "autopar.index.default": "index",
    "autopar.index_put.default": "index_put",
    "autopar.gather.default": "along_index read",
    "autopar.scatter_add.default": "along_index add",
    "autopar.scatter.default": "along_index write",
    "autopar.embedding_bag.default": "bags forward",
    "autopar.embedding_bag_backward.default": "bags backward",
    "autopar.embedding.default": "*v d, ... -> ... d | start=start:v",
    "autopar.embedding_backward.default": "*... d, ... -> v d | rows=size:v start=start:v",
    "autopar.grouped_mm.default": "*s k, *e k n, x! -> s n | start=start:e row=start:s",
    "autopar.grouped_mm_backward.default": "*s k, *s n, x! -> e k n | groups=size:e start=start:e row=start:s",
    "autopar.lstm.default": "t! b g!, b h!, b h!, g! h! -> t! b h!, t! b h!, t! b g!",
    "autopar.lstm_backward.default": "t! b h!, t! b h!, t! b g!, t! b h!, b h!, g! h! -> t! b g!, b h!, b h!",
    "autopar.gru.default": "t! b g!, b h!, g! h!, g! -> t! b h!, t! b q!",
    "autopar.gru_backward.default": "t! b h!, t! b q!, t! b h!, b h!, g! h! -> t! b g!, t! b g!, b h!",
    "autopar.rnn.default": "t! b g!, b h!, g! h! -> t! b g!",
    "autopar.rnn_backward.default": "t! b g!, t! b g!, g! h! -> t! b g!, b h!",
    "autopar.nll_loss.default": "n c!, n -> , ",
    "autopar.nll_loss_backward.default": "*, n -> n c!",
    "autopar.sum_exp.default": "n c, n -> n",
    "autopar.pick.default": "*n c, n -> n | start=start:c",
    "autopar.cross_entropy_backward.default": "*n, n c, n, n -> n c | start=start:c",
    **fused.ROWS,
    **{
        f"aten.{op if '.' in op else op + '.default'}": row
        for groups in (library.GROUPS, _GROUPS)
        for row, ops in groups.items()
        for op in ops.split()
    },
}

_MODULES = (compute, fused, shapes, indexing, linalg, spatial)
_FUNCTIONS = {name: getattr(module, name) for module in _MODULES for name in dir(module) if callable(getattr(module, name))}


def rule_for(node: fx.Node) -> Rule:
    """The rule of one graph node. That of an unlisted op, or of a call that its row does not cover, is found by running it, or
    nothing splits: `known` is then False.

    Raises UnknownOpError for an unlisted op that draws random numbers: devices that ran it whole would draw different ones.
    """
    call = call_of(node)
    if call.op not in TABLE and torch.Tag.nondeterministic_seeded in getattr(call.target, "tags", ()):
        raise UnknownOpError(
            f"{call.op} draws random numbers that devices cannot share",
            where=node.meta.get("where", ""),
            why="every device would draw its own, and the result would not be that of one device",
            try_="draw them outside of the model and pass them in as an input",
        )
    try:
        return rule_of(call)
    except UnknownOpError as error:  # it was seen to draw random numbers
        raise UnknownOpError(error.what, where=node.meta.get("where", ""), why=error.why, try_=error.try_) from None


def rule_of(call: Call) -> Rule:
    """The rule of one call."""
    row = TABLE.get(call.op)
    if row is None:
        return learnt(call)
    try:
        return _pattern(row, call) if "->" in row else _FUNCTIONS[row.split()[0]](call, *row.split()[1:])
    except ValueError:
        return learnt(call)


def _pattern(row: str, call: Call) -> Rule:
    pattern, _, words = row.partition("|")
    adjust = tuple((call.place(name), what) for name, what in (word.split("=") for word in words.split()))
    return linear_checked(call, bind(pattern, call.shapes, call.results, adjust=adjust))


__all__ = ["TABLE", "rule_for", "rule_of", "signature"]
