"""Seconds of one op on the fullest device: a roofline with efficiencies that depend on the op's class and size.

    seconds = max(flops / (peak · efficiency), bytes / (memory bandwidth · efficiency)) + ramp + launch

`flops` and `bytes` are those of the local operands. The ramp is the time in which a kernel fills and drains the device: an op that
lasts as long as its ramp runs at half of its efficiency. That is why small matmuls are slow, and why splitting them ever
further gains ever less. A device that was measured (`netmind-autopar calibrate`) has curves instead: see `curves.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..ir.mesh import Axis, Device, Mesh
from ..ir.program import op_name, source, tensor_args, values
from ..rules.algebra import Rule, Strategy, Term
from .curves import op_seconds

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Efficiency:
    """What an op class reaches: parts of the peak and of the memory bandwidth when large, and its ramp in seconds.

    `tile` rounds (rows, columns, inner) of a matmul up: a device computes whole tiles.
    """

    flops: float
    memory: float
    ramp_s: float = 0.0
    tile: tuple[int, int, int] = (1, 1, 1)


WHOLE = Efficiency(1.0, 1.0)  # nothing rounded, nothing lost

# GPU. matmul: 770–798 of 989 TFLOP/s were measured on an H200 in bfloat16 (0.8), and vendors' libraries come close to that on every
# device of the table; 64 × 64 tiles are the smallest that use tensor cores well, 16 bytes of the inner dim are loaded at once
# (NVIDIA, Deep Learning Performance Guide, Matrix Multiplication Background). attention: FlashAttention-3 reports 740 of 989 forward for
# long sequences without a mask, FlashAttention-2 half of the peak; backward is lower. memory: a copy reaches 4.3 of
# 4.8 TB/s on an H200 (0.9); reductions and norms read in rows and lose some; scattered access loses half.
GPU = {
    "matmul": Efficiency(0.80, 0.85, 3e-6, (64, 64, 16)),
    "convolution": Efficiency(0.55, 0.80, 5e-6),
    "attention": Efficiency(0.55, 0.80, 5e-6),
    "elementwise": Efficiency(1.0, 0.90),
    "reduction": Efficiency(1.0, 0.75, 1e-6),
    "scattered": Efficiency(1.0, 0.50, 1e-6),
}
# CPU, one core: matmul measured 0.9 of the table's peak at 256 and above. Element-wise ops that call exp or tanh, and first touch of fresh
# memory, keep PyTorch at a quarter of the bandwidth and less (measured 0.6–2.8 GB/s for GELU, tanh and exp of 64 MB).
CPU = {
    "matmul": Efficiency(0.90, 0.80, 2e-6, (1, 16, 1)),
    "convolution": Efficiency(0.50, 0.50, 1e-5),
    "attention": Efficiency(0.40, 0.50, 1e-5),
    "elementwise": Efficiency(1.0, 0.50),
    "transcendental": Efficiency(1.0, 0.15),
    "reduction": Efficiency(1.0, 0.40),
    "scattered": Efficiency(1.0, 0.30),
}

CLASSES = {
    "matmul": "linear_cross_entropy linear_cross_entropy_backward "
    "mm addmm bmm baddbmm mv addmv dot linear _grouped_mm grouped_mm grouped_mm_backward "
    "lstm lstm_backward gru gru_backward rnn rnn_backward",
    "convolution": "convolution convolution_backward",
    "attention": "attention attention_backward",
    "transcendental": "gelu gelu_backward exp tanh sigmoid silu silu_backward log erf sin cos pow _softmax _log_softmax softplus mish "
    "sum_exp cross_entropy_backward cross_entropy vocab_stats gated gated_backward masked_softmax",
    "reduction": "sum mean amax amin max min var var_mean native_layer_norm native_layer_norm_backward native_group_norm "
    "native_group_norm_backward native_batch_norm native_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward "
    "_softmax_backward_data _log_softmax_backward_data cumsum cumprod logsumexp argmax argmin any all topk sort "
    "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d linalg_vector_norm prod "
    "rms_norm layer_norm add_rms_norm add_layer_norm rms_norm_backward layer_norm_backward group_norm_silu group_norm_silu_backward "
    "masked_softmax_backward",
    "scattered": "embedding embedding_backward embedding_dense_backward index index_select index_put gather scatter scatter_add index_add "
    "nll_loss nll_loss_backward nll_loss_forward pick max_pool2d_with_indices_backward select_backward slice_backward "
    "slice_scatter select_scatter upsample_nearest2d _embedding_bag embedding_bag embedding_bag_backward take searchsorted "
    "permute_rows unpermute_rows",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}

# Views: no bytes move.
_FREE = (
    "view _unsafe_view reshape t transpose permute expand unsqueeze squeeze slice select split split_with_sizes chunk unbind narrow alias "
    "detach as_strided unfold diagonal view_as_real view_as_complex flatten unflatten movedim swapaxes lift_fresh_copy getitem"
)
FREE = frozenset(_FREE.split())
# Made from nothing: only written, and free when it is next to nothing.
_CREATION = (
    "full zeros ones empty arange scalar_tensor full_like zeros_like ones_like empty_like new_full new_zeros new_ones "
    "new_empty eye linspace rand randn tril_indices"
)
CREATION = frozenset(_CREATION.split())
TINY_BYTES = 4096
# Position of the operand of which only as much is read as comes out.
_GATHERED = "embedding _embedding_bag embedding_bag index index_select gather nll_loss nll_loss_forward pick"
GATHERED = dict.fromkeys(_GATHERED.split(), 0)
# Calls with this argument have curves of their own, where they were measured: `gelu.approximate`.
VARIANTS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("gelu", "gelu_backward"), ("approximate", "tanh")),
    **dict.fromkeys(("attention", "attention_backward"), ("causal", True)),
}
ATTENTION_BACKWARD = 2.5  # five matmuls instead of two: FlashAttention-2 (Dao, 2023), section 4.1


def tensor_bytes(value: torch.Tensor | None) -> int:
    """Bytes of a whole (fake) tensor, 0 for None."""
    return 0 if value is None else math.prod(map(int, value.shape)) * value.dtype.itemsize


def short_name(node: fx.Node) -> str:
    """`mm` of `aten.mm.default`."""
    parts = op_name(node).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def flops(node: fx.Node) -> float:
    """Floating-point operations of the whole op (a multiply-add is two) for matmuls, convolutions and attention; 0 for all else."""
    count = _FLOPS.get(short_name(node))
    return float(count(node)) if count else 0.0


def _shape(node: fx.Node, position: int) -> Shape:
    """Global shape of the tensor argument at a position of the call."""
    arg, index = source(node.args[position])  # type: ignore[arg-type]
    value = values(arg)[index]
    assert value is not None
    return tuple(map(int, value.shape))


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """A non-tensor argument by its name in the op's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[i] if i < len(node.args) else argument.default_value
    return default


def _matmul(first: int) -> Callable[[fx.Node], float]:
    """2 · rows · inner · columns of the operands at positions first and first + 1, times the batch."""

    def count(node: fx.Node) -> float:
        a, b = _shape(node, first), _shape(node, first + 1)
        return 2.0 * math.prod(a) * (b[-1] if len(b) > 1 else 1)

    return count


def _linear(node: fx.Node) -> float:
    return 2.0 * math.prod(_shape(node, 0)) * _shape(node, 1)[0]


def _projected_back(node: fx.Node) -> float:
    """The logits again, the gradient of rows and that of the weight."""
    return 6.0 * math.prod(_shape(node, 1)) * _shape(node, 2)[0]


def _grouped(node: fx.Node) -> float:
    """Every row meets one matrix: 2 · rows · inner · columns, forward and backward."""
    return 2.0 * math.prod(_shape(node, 0)) * _shape(node, 1)[-1]


def _convolution(image: Shape, weight: Shape, made: Shape, transposed: bool) -> float:
    """Every weight meets every place of the output (of the input, when transposed), for every image of the batch."""
    places = image if transposed else made
    return 2.0 * places[0] * math.prod(places[2:]) * math.prod(weight)


def _convolution_forward(node: fx.Node) -> float:
    made = values(node)[0]
    assert made is not None
    return _convolution(_shape(node, 0), _shape(node, 1), tuple(map(int, made.shape)), bool(_argument(node, "transposed", False)))


def _convolution_backward(node: fx.Node) -> float:
    mask = _argument(node, "output_mask", (True, True, False))
    one = _convolution(_shape(node, 1), _shape(node, 2), _shape(node, 0), bool(_argument(node, "transposed", False)))
    return one * (int(mask[0]) + int(mask[1]))


def _attention(first: int, factor: float) -> Callable[[fx.Node], float]:
    """Two matmuls of [s, d] with [d, t] for every head; half of them are masked when causal."""

    def count(node: fx.Node) -> float:
        (b, h, s, d), t = _shape(node, first), _shape(node, first + 1)[2]
        return factor * 4.0 * b * h * s * t * d * (0.5 if _argument(node, "causal", False) else 1.0)

    return count


def _recurrent(node: fx.Node) -> float:
    """Every step multiplies the states of a batch with the recurrent weight, or their gradient with its transpose."""
    weight = fx.node.map_arg(_argument(node, "weight"), lambda n: n.meta["val"])
    return 2.0 * math.prod(_shape(node, 0)[:2]) * weight.numel()


_FLOPS: dict[str, Callable[[fx.Node], float]] = {
    **dict.fromkeys(("lstm", "lstm_backward", "gru", "gru_backward", "rnn", "rnn_backward"), _recurrent),
    "mm": _matmul(0),
    "bmm": _matmul(0),
    "mv": _matmul(0),
    "dot": _matmul(0),
    "_grouped_mm": _matmul(0),
    "grouped_mm": _grouped,
    "grouped_mm_backward": _grouped,
    "addmm": _matmul(1),
    "baddbmm": _matmul(1),
    "addmv": _matmul(1),
    "linear": _linear,
    "linear_cross_entropy": _linear,
    "linear_cross_entropy_backward": _projected_back,
    "convolution": _convolution_forward,
    "convolution_backward": _convolution_backward,
    "attention": _attention(0, 1.0),
    "attention_backward": _attention(1, ATTENTION_BACKWARD),
}


@dataclass(frozen=True)
class OpCost:
    """What a node's price depends on, read off it once; `seconds` then prices any strategies at once."""

    kind: str  # "" for what costs nothing
    flops: float
    dtype: str
    sizes: dict[str, int]
    operands: tuple[tuple[tuple[str, ...], int, int], ...]  # (letters, bytes per element, how the operand counts)
    matmul: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None = None  # letters of rows, columns, inner dim
    creates: bool = False
    late: str = ""  # the letter of rows of which a later block has more to do
    op: str = ""

    def moved_bytes(self) -> int:
        """Bytes that the whole op reads and writes."""
        return int(self._bytes(self.sizes))

    def local_sizes(self, strategy: Strategy, axes: Sequence[Axis]) -> dict[str, int]:
        """Size of every letter on the fullest device."""
        return {letter: int(n[0]) for letter, n in self._local((strategy,), axes).items()}

    def _local(self, strategies: Sequence[Strategy], axes: Sequence[Axis]) -> dict[str, np.ndarray]:
        """Size of every letter on the fullest device, per strategy."""
        local = {letter: np.full(len(strategies), n, dtype=np.int64) for letter, n in self.sizes.items()}
        for a, axis in enumerate(axes):
            rows: dict[str, list[int]] = {}
            for k, strategy in enumerate(strategies):
                rows.setdefault(strategy[a], []).append(k)
            for symbol, at in rows.items():
                if symbol in local:
                    local[symbol][at] = -(-local[symbol][at] // axis.size)
        return local

    def seconds(self, strategies: Sequence[Strategy], mesh: Mesh) -> np.ndarray:
        """Seconds under each strategy."""
        if not self.kind:
            return np.zeros(len(strategies))
        local = self._local(strategies, mesh.axes)
        moved = np.broadcast_to(self._bytes(local), (len(strategies),))
        device = mesh.device
        if device.curves and (known := self._measured(local, moved, device)) is not None:
            return np.where(moved <= TINY_BYTES, 0.0, known) if self.creates else known
        table = CPU if device.name.endswith("cpu") else GPU
        reach = table.get(self.kind) or table["elementwise"]
        memory_s = moved / (device.memory_bandwidth_bytes_s * reach.memory)
        compute_s = self._flops(local, reach) / (device.flops(self.dtype) * reach.flops) if self.flops else np.zeros(1)
        ramp = np.where((self.flops > 0) | (moved > TINY_BYTES), reach.ramp_s, 0.0)
        out = np.maximum(compute_s, memory_s) + ramp + device.launch_s
        return np.where(moved <= TINY_BYTES, 0.0, out) if self.creates else out

    def _measured(self, local: Mapping[str, np.ndarray], moved: np.ndarray, device: Device) -> np.ndarray | None:
        """Seconds from the device's curves, shape (strategies,); None where it has none for this op."""
        work = np.broadcast_to(self._flops(local, WHOLE), moved.shape) if self.flops else None
        sizes = [math.prod(local[letter] for letter in letters) for letters in self.matmul or ()]
        dims = [np.broadcast_to(n, moved.shape) for n in sizes]
        return op_seconds(device, (self.op, self.op.partition(".")[0], self.kind), self.dtype, work, moved, dims)

    def _flops(self, local: Mapping[str, Any], reach: Efficiency) -> Any:
        """Of local sizes, numbers or arrays."""
        count: Any = self.flops
        for letter, n in local.items():
            count = count * (n / self.sizes[letter] if self.sizes[letter] else 1.0)
        if self.late:  # causal rows: the last block sees almost all keys, all rows together half of them
            count = count * (2.0 - local[self.late] / self.sizes[self.late])
        if self.matmul:
            for letters, tile in zip(self.matmul, reach.tile, strict=True):
                n = np.maximum(math.prod(local[letter] for letter in letters), 1)
                count = count * (-(-n // tile) * tile / n)
        return count

    def _bytes(self, local: Mapping[str, Any]) -> Any:
        """Of local sizes, numbers or arrays."""
        read: Any = 0
        wrote: Any = 0
        gathered: Any = 0
        for letters, itemsize, way in self.operands:
            size = math.prod([local[letter] for letter in letters]) * itemsize
            if way == 0:
                read = read + size
            elif way == 1:
                wrote = wrote + size
            else:
                gathered = gathered + size
        return read + wrote + np.minimum(gathered, wrote)


def op_cost(node: fx.Node, rule: Rule) -> OpCost:
    """Read the facts of one call; keep the result to price many strategies."""
    name = short_name(node)
    if node.op != "call_function" or name in FREE:
        return OpCost("", 0.0, "float32", {}, ())
    made, taken = values(node), [values(p)[i] for p, i in map(source, tensor_args(node))]
    gathered = GATHERED.get(name, -1)
    operands = [
        (_letters(t), v.dtype.itemsize, 2 if i == gathered else 0)
        for i, (t, v) in enumerate(zip(rule.inputs, taken, strict=True))
        if v is not None
    ]
    operands += [(_letters(t), v.dtype.itemsize, 1) for t, v in zip(rule.outputs, made, strict=True) if t is not None and v is not None]
    kind = CLASS_OF.get(name, "elementwise")
    creates = name in CREATION
    if creates:  # full_like and its kin take a tensor for its shape and read nothing of it
        operands = [o for o in operands if o[2] == 1]
    # the dtype of the first floating operand: a matmul's inputs, an attention's query
    dtype = next((v.dtype for v in (*taken, *made) if v is not None and v.dtype.is_floating_point), torch.float32)
    late = "s" if kind == "attention" and "s" in rule.sizes and _argument(node, "causal", False) else ""
    return OpCost(
        kind,
        flops(node),
        str(dtype).removeprefix("torch."),
        dict(rule.sizes),
        tuple(operands),
        _matmul_letters(name, rule),
        creates,
        late,
        f"{name}.{variant}" if (variant := _variant(node, name)) else name,
    )


def _variant(node: fx.Node, name: str) -> str:
    """What sets a call apart from others of its op in time; empty for most."""
    argument, value = VARIANTS.get(name, ("", None))
    return argument if argument and _argument(node, argument) == value else ""


def _letters(term: Term) -> tuple[str, ...]:
    return tuple(letter for dim in term.dims for letter in dim)


def _matmul_letters(name: str, rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(name)
    if first is None or not rule.known:
        return None
    a, b = rule.inputs[first], rule.inputs[first + 1]
    return a.dims[-2], b.dims[-1], a.dims[-1]


def node_seconds(node: fx.Node, rule: Rule, strategy: Strategy, mesh: Mesh) -> float:
    """Seconds of one op on the fullest device under one strategy. For many strategies of one op `node_prices` is faster."""
    return float(op_cost(node, rule).seconds((strategy,), mesh)[0])


def node_prices(node: fx.Node, rule: Rule, strategies: Sequence[Strategy], mesh: Mesh) -> np.ndarray:
    """`node_seconds` for each strategy, shape (strategies,)."""
    return op_cost(node, rule).seconds(strategies, mesh)
