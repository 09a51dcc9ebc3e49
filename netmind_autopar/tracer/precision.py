"""A policy of precision, written into the forward graph before autograd: casts in front of ops, by lists of ops.

    LOW       matrix products, convolutions, attention: float32 operands are cast to the policy's dtype
    WIDE      exponentials, norms, losses, sums: operands of fewer bits are cast to float32
    own       cross-entropy sums in float32 whatever it is given: it takes logits as they come, and gives float32
    others    element-wise ops promote by themselves; ops that want operands of one dtype get them in the widest

The lists are those that torch.autocast has on CUDA (pytorch.org/docs/stable/amp.html), on every device. Other than autocast, a value is
cast once for all that take it, not once for each: the casts are ops of the graph like others, so the planner sees one small copy that it
can cast in pieces and gather afterwards, and gradients meet in the policy's dtype before they are cast back. Autograd is traced
afterwards and casts gradients back, so that a parameter's gradient has the parameter's dtype.

A region in which the user set autocast is the user's: it is given float32 where it was exported so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.precision import Precision
from ..ir.program import Program, is_getitem
from ..ir.stretches import back, borders, casts_end

_aten = torch.ops.aten

_LOW = """
    linear matmul mm bmm mv addmm baddbmm addbmm addmv addr chain_matmul einsum prelu linalg_multi_dot linalg_vecdot
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution _convolution
    scaled_dot_product_attention _grouped_mm
"""
_WIDE = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus
    layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm instance_norm norm frobenius_norm nuclear_norm renorm
    linalg_vector_norm linalg_matrix_norm logsumexp cosine_similarity cdist pdist _pdist_forward dist
    softmax log_softmax _softmax _log_softmax prod cumprod cumsum sum mean var std var_mean std_mean logcumsumexp
    poisson_nll_loss cosine_embedding_loss nll_loss nll_loss_nd nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss
    mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy
    binary_cross_entropy_with_logits ctc_loss
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell fft_fft fft_rfft fft_ifft fft_irfft
"""
_OWN = _aten.cross_entropy_loss.default
# What stands between logits and a loss that sums in float32 anyway: a copy of the logits in float32 would only cost memory.
_VIEWS = "view reshape flatten contiguous transpose permute unsqueeze squeeze slice select movedim"
_CASTS = "to _to_copy float type_as"
LOW, WIDE, VIEWS, CASTS = (frozenset(names.split()) for names in (_LOW, _WIDE, _VIEWS, _CASTS))


def narrow(x: Any, dtype: torch.dtype) -> Any:
    """float32 in fewer bits; anything else as it is."""
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype is torch.float32 else x


def narrow_mask(x: Any, dtype: torch.dtype) -> Any:
    """An attention mask. The least float32, of which masks are made, stays finite: a row that is masked whole gives no nan."""
    if not isinstance(x, Tensor) or x.dtype is not torch.float32:
        return x
    return x.to(dtype) if x.requires_grad else x.clamp(min=torch.finfo(dtype).min).to(dtype)


def widen(x: Any, dtype: torch.dtype) -> Any:
    """What has the policy's dtype in float32; anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype is dtype else x


def widest(x: Any, others: list[Any], dtype: torch.dtype) -> Any:
    """What has the policy's dtype in float32 if one of `others` has float32."""
    is_wide = any(isinstance(o, Tensor) and o.dtype is torch.float32 for o in others)
    return widen(x, dtype) if is_wide else x


def into(x: Any, target: Tensor) -> Any:
    """A float in the dtype of what it is written into."""
    both = isinstance(x, Tensor) and x.is_floating_point() and target.is_floating_point()
    return x.to(target.dtype) if both else x


def converted(x: Any, dtype: torch.dtype) -> Any:
    """An output in the dtype that the policy says."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def apply_precision(module: fx.GraphModule, policy: Precision) -> None:
    """Write the policy's casts into an exported graph whose nodes know their modules (`capture._note_origins`)."""
    users = {id(m) for m in _user_regions(module)}
    for graph_module in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in list(graph_module.graph.nodes):
            if node.target is _aten._assert_tensor_metadata.default:  # says what dtypes were when the model was exported
                graph_module.graph.erase_node(node)
        if id(graph_module) not in users:
            _Casts(graph_module.graph, policy).run()
    if policy.outputs is not None:
        end = next(n for n in reversed(module.graph.nodes) if n.op == "output")
        with module.graph.inserting_before(end):
            end.args = fx.node.map_arg(
                end.args, lambda n: module.graph.call_function(converted, (n, getattr(torch, policy.outputs or ""))) if _is_value(n) else n
            )


def _is_value(node: fx.Node) -> bool:
    return node.op != "get_attr"


def _user_regions(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs inside regions where the user set autocast."""
    found = []
    for outer in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in outer.graph.nodes:
            if _is_autocast(node):
                names = [a.target for a in node.all_input_nodes if a.op == "get_attr"]
                inner = [getattr(outer, str(name), None) for name in names]
                found += [m for g in inner if isinstance(g, fx.GraphModule) for m in g.modules() if isinstance(m, fx.GraphModule)]
    return found


def _is_autocast(node: fx.Node) -> bool:
    return node.op == "call_function" and "autocast" in getattr(node.target, "__name__", "")


@dataclass
class _Casts:
    """Walks one graph. `made`: the casts that later nodes may share, by what they cast."""

    graph: fx.Graph
    policy: Precision
    made: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            self._cast(node)
            if _writes(node):  # what was cast may be out of date; parameters are not written
                self.made = {key: cast for key, cast in self.made.items() if isinstance(key[0], str)}

    def _cast(self, node: fx.Node) -> None:
        dtype, name = self.policy.dtype, _packet(node)
        schema = getattr(node.target, "_schema", None)
        if _is_autocast(node):
            self._each(node, widen, dtype)
        elif schema is None and not (_is_call(node) and node.users):
            return  # getitem, arithmetic on sizes, regions that are graphs of their own, hooks
        elif self.policy.keeps(_module(node)) or schema is None:
            self._each(node, widen, dtype)
        elif _writes(node):
            self._written(node)
        elif node.target is _OWN:
            self._own(node)
        elif name in LOW:
            mask = node.args[3] if name == "scaled_dot_product_attention" and len(node.args) > 3 else node.kwargs.get("attn_mask")
            self._each(node, narrow, dtype, {mask: narrow_mask} if isinstance(mask, fx.Node) else {})
        elif name in WIDE or (schema is not None and node.target.namespace not in ("aten", "autopar", "prims")):  # type: ignore[union-attr]
            self._each(node, widen, dtype)
        elif torch.Tag.pointwise not in getattr(node.target, "tags", ()) and len(_tensors(node)) > 1:
            others = _tensors(node)
            self._replace(node, lambda n: self._insert(node, widest, (n, others, dtype)))

    def _each(self, node: fx.Node, how: Callable[..., Any], dtype: torch.dtype, special: dict[fx.Node, Any] | None = None) -> None:
        self._replace(node, lambda n: self._shared(node, (special or {}).get(n, how), n, dtype))

    def _replace(self, node: fx.Node, cast: Callable[[fx.Node], fx.Node]) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: cast(n) if _is_tensor(self.graph, n) else n)
        node.args, node.kwargs = args, kwargs

    def _shared(self, node: fx.Node, how: Callable[..., Any], value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """One cast for all that want the same one."""
        key = (str(value.target) if value.op == "get_attr" else value, how)
        if key not in self.made:
            self.made[key] = self._insert(node, how, (value, dtype))
        return self.made[key]

    def _insert(self, node: fx.Node, how: Callable[..., Any], args: tuple) -> fx.Node:
        with self.graph.inserting_before(node):
            cast = self.graph.call_function(how, args)
        cast.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        return cast

    def _written(self, node: fx.Node) -> None:
        """An op that writes into its first argument: the others follow that one."""
        target = node.args[0] if node.args else None
        if isinstance(target, fx.Node) and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            self._replace(node, lambda n: n if n is target else self._insert(node, into, (n, target)))

    def _own(self, node: fx.Node) -> None:
        """Logits as they come: a cast to float32 before them is for others."""
        node.kwargs = {**node.kwargs, "wide": True}
        value, chain = node.args[0], [node]
        while isinstance(value, fx.Node) and len(value.users) == 1 and _packet(value) in VIEWS:
            chain.append(value)
            value = value.args[0]
        if isinstance(value, fx.Node) and _packet(value) in CASTS and _to_float32(value):
            chain[-1].replace_input_with(value, value.args[0])  # type: ignore[arg-type]


def _to_float32(node: fx.Node) -> bool:
    given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return given == [torch.float32]


def _packet(node: fx.Node) -> str:
    """`linear` of aten.linear.default; of another library ""."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return node.target.overloadpacket.__name__
    return ""


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(iter(stack.values()))[0]) if stack else ""


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_call(node: fx.Node) -> bool:
    """What `functions.Kept.restore` puts into a graph: the user's own function or hook."""
    return getattr(node.target, "__module__", "").startswith(__package__ or "")


def _is_tensor(graph: fx.Graph, node: fx.Node) -> bool:
    owner = graph.owning_module
    if node.op != "get_attr" or owner is None:
        return True
    return not isinstance(_at(owner, str(node.target)), fx.GraphModule)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _tensors(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def early(program: Program) -> Program:
    """Casts of parameters one block ahead of their first use, where a gather of what they give may start: a parameter always exists."""
    if program.precision is None:
        return program
    with program.edit() as new:
        order = [n for n in new.graph.nodes if n.op == "call_function" and not is_getitem(n) and n.meta["phase"] == "forward"]
        at, starts = {node: i for i, node in enumerate(order)}, borders(order)
        params = {i.node for i in program.inputs if i.role == "param"}
        for cast in [n for n in order if casts_end(n) and n.args[0].name in params]:  # type: ignore[union-attr]
            first = min((at[u] for u in cast.users if u in at), default=at[cast])
            goal = next(i for i in range(back(starts, first), len(order)) if not casts_end(order[i]))
            if goal < at[cast]:
                order[goal].prepend(cast)
    return new.program
