"""Bugs in ops, gradients and buffers, and the table of all. Each yields (the node at fault, how to plant it); see `planted.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from planted import (
    Bug,
    Places,
    after,
    all_counted,
    arg_of,
    before,
    ends,
    flag_on_last,
    give,
    in_pieces,
    on_last,
    ops,
    plus_if,
    reread,
    rolled,
    set_arg,
    times,
    turned,
    varies,
    zero_if,
)
from planted_moves import (
    all_to_all_in_wrong_order,
    bucket_in_wrong_order,
    doubled_all_reduce,
    gather_in_wrong_order,
    gradient_averaged,
    input_of_another_rank,
    left_out_of_the_bucket,
    local_estimate,
    local_statistics,
    mask_lost,
    mask_on_the_wrong_axis,
    maximum_summed,
    missing_all_reduce,
    off_by_one_chunk,
    padding_leaks,
    reduced_in_low_precision,
    scatter_summed_twice,
    slice_for_reduce_scatter,
    swapped_shards,
    term_taken_for_the_whole,
    wrong_dim,
)
from torch import Tensor, fx

from netmind_autopar.ir.program import Draft, Output, is_getitem, op_name, source
from netmind_autopar.ir.spec import Shard, Spec, parse_spec
from netmind_autopar.passes.pipeline import spec_of
from netmind_autopar.runtime.collectives import bucket, move


def local_mean_scale(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """A mean over a split batch divided by the local count."""
    for node in ops(draft, "aten.div"):
        count = node.args[1]
        if isinstance(count, (int, float)) and count > 1 and float(count).is_integer():

            def plant(node: fx.Node = node, count: float = count) -> None:
                node.args = (node.args[0], count / sizes[0], *node.args[2:])

            yield node, plant


def _counts(draft: Draft) -> Iterator[fx.Node]:
    """Sums of booleans: how many labels count."""
    for node in ops(draft, "aten.sum"):
        if isinstance(node.args[0], fx.Node) and spec_of(draft.specs, node.args[0]).dtype == torch.bool:  # type: ignore[union-attr]
            yield node


def count_not_reduced(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Every rank divides by what it counted itself, times the ranks: right only when all count alike."""
    for node in _counts(draft):
        for reduce in node.users:
            if reduce.target is move and reduce.args[1] == "all_reduce":
                yield reduce, lambda reduce=reduce: local_estimate(draft, reduce, sizes)


def ignored_labels_counted(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in _counts(draft):
        yield node, lambda node=node: after(draft, node, all_counted, node.args[0])


def stale_buffer(draft: Draft, sizes: tuple[int, ...]) -> Places:
    holders = {i.name: i.node for i in draft.program.inputs if i.role == "buffer"}
    nodes = {n.name: n for n in draft.graph.nodes}
    for end, node in ends(draft, "mutation"):
        yield node, lambda end=end: give(draft, end, nodes[holders[end.name]])


def buffer_updated_twice(draft: Draft, sizes: tuple[int, ...]) -> Places:
    holders = {i.name: i.node for i in draft.program.inputs if i.role == "buffer"}
    nodes = {n.name: n for n in draft.graph.nodes}
    for end, node in ends(draft, "mutation"):
        if node.op == "call_function":

            def plant(end: Output = end, node: fx.Node = node) -> None:
                made = after(draft, node, torch.lerp, nodes[holders[end.name]], -1.0)
                give(draft, end, made)

            yield node, plant


def buffer_of_one_rank(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """The new value is wrong on the last rank alone: replicas drift apart."""
    for end, node in ends(draft, "mutation"):
        if node.op == "call_function":
            yield node, lambda end=end, node=node: give(draft, end, after(draft, node, plus_if, flag_on_last(), 1))


def causal_lost(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.attention"):
        if arg_of(node, "causal") is True:
            yield node, lambda node=node: set_arg(node, "causal", lambda old: on_last(False, old))


def mask_shifted(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """The mask of the keys is one off on the last rank."""
    for node in ops(draft, "autopar.attention", "autopar.attention_backward"):
        position = [a.name for a in node.target._schema.arguments].index("mask")
        if isinstance(node.args[position], fx.Node):
            yield node, lambda node=node, position=position: before(draft, node, position, rolled, on_last(1, 0), -1)


def dropout_offset(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.dropout"):
        if varies(arg_of(node, "starts"), sizes):
            yield node, lambda node=node: set_arg(node, "starts", lambda old: [0] * len(parse_spec(old.spec).parts))
    for node in ops(draft, "autopar.attention"):
        for name in ("b_start", "h_start"):
            if arg_of(node, "p") and varies(arg_of(node, name), sizes):
                yield node, lambda node=node, name=name: set_arg(node, name, lambda old: 0)


def _droppers(draft: Draft, phase: str = "") -> Iterator[fx.Node]:
    for node in ops(draft, "autopar.dropout", "autopar.attention", "autopar.attention_backward"):
        if arg_of(node, "p") and node.meta["phase"].startswith(phase):
            yield node


def dropout_salt(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in _droppers(draft):
        yield node, lambda node=node: set_arg(node, "salt", lambda old: on_last(old + 1, old))


def dropout_seed(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in _droppers(draft):
        position = [a.name for a in node.target._schema.arguments].index("seed")
        yield node, lambda node=node, position=position: before(draft, node, position, plus_if, flag_on_last(), 1)


def another_mask_in_backward(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in _droppers(draft, "backward"):
        yield node, lambda node=node: set_arg(node, "salt", lambda old: old + 1)


def _gradients(draft: Draft) -> Iterator[tuple[Output, fx.Node]]:
    """Gradients of parameters that no constant shift makes vanish (a key's bias gets none)."""
    for end, node in ends(draft, "grad"):
        if end.index < 0:
            yield end, node


def tied_use_lost(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """One of the gradients that a parameter of several uses collects is dropped."""
    tied = set(draft.program.tied.values())
    for end, node in _gradients(draft):
        if end.name in tied:
            queue, seen = [node], set()
            while queue:
                current = queue.pop()
                if current in seen or current.meta.get("phase") != "backward":
                    continue
                seen.add(current)
                if op_name(current) == "aten.add.Tensor":
                    for keep in (0, 1):
                        yield current, lambda current=current, keep=keep: current.replace_all_uses_with(current.args[keep])
                elif current.target is move or is_getitem(current) or current.target is bucket:
                    queue += current.all_input_nodes if not is_getitem(current) else [source(current)[0].args[0][source(current)[1]]]


def gradient_doubled(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for end, node in _gradients(draft):
        yield node, lambda end=end, node=node: give(draft, end, after(draft, node, times, 2.0))


def vocabulary_offset(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.embedding"):
        if varies(arg_of(node, "start"), sizes):
            yield node, lambda node=node: set_arg(node, "start", lambda old: 0)


def vocabulary_offset_in_backward(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.embedding_backward"):
        if varies(arg_of(node, "start"), sizes):
            yield node, lambda node=node: set_arg(node, "start", lambda old: 0)


def view_misread(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "aten.reshape", "aten.view"):
        shape = node.args[1]
        dims = range(len(shape) - 1) if isinstance(shape, (list, tuple)) else ()
        for dim in dims:
            if shape[dim] > 1 and shape[dim + 1] > 1 and shape[dim] != shape[dim + 1]:

                def plant(node: fx.Node = node, shape: Any = shape, dim: int = dim) -> None:
                    node.target, node.args = reread, (node.args[0], list(shape), dim)

                yield node, plant
                break


def softmax_of_a_piece(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "aten._softmax", "aten._log_softmax"):

        def plant(node: fx.Node = node) -> None:
            node.args = (*node.args[:3], sizes[0], "log" in op_name(node))
            node.target = in_pieces

        yield node, plant


def transposed_gradient(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "aten.mm"):
        spec = draft.specs[node.name]
        square = isinstance(spec, Spec) and len(set(spec.shape)) == 1 and not any(isinstance(p, Shard) for p in spec.placements)
        if node.meta["phase"] == "backward" and square:
            yield node, lambda node=node: after(draft, node, turned)


def update_missed_on_a_rank(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for end, node in _gradients(draft):
        yield node, lambda end=end, node=node: give(draft, end, after(draft, node, zero_if, flag_on_last()))


def output_not_gathered(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for end, node in ends(draft, "output"):
        if node.target is move and node.args[1] == "all_gather":
            yield node, lambda end=end, node=node: give(draft, end, node.args[0])


def epsilon_on_one_rank(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "aten.native_layer_norm", "aten._fused_rms_norm", "aten.native_group_norm"):
        yield node, lambda node=node: set_arg(node, "eps", lambda old: on_last(0.1 * (old or 1e-6), old))


def scale_on_one_rank(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.attention", "autopar.attention_backward"):
        yield node, lambda node=node: set_arg(node, "scale", lambda old: on_last(old * 1.01, old))


def position_off_by_one(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Indices begin one too far on the last rank."""
    for node in ops(draft, "autopar.embedding", "aten.embedding"):
        table = spec_of(draft.specs, node.args[0])  # type: ignore[arg-type]
        if table is None or table != table.replicated:
            continue
        rows = table.shape[0]
        yield node, lambda node=node, rows=rows: before(draft, node, 1, next_row, flag_on_last(), rows)


def swapped_operands(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "aten.sub", "aten.div"):
        if all(isinstance(a, fx.Node) for a in node.args[:2]):

            def plant(node: fx.Node = node) -> None:
                node.args = (node.args[1], node.args[0], *node.args[2:])

            yield node, plant


def next_row(x: Tensor, here: bool, rows: int) -> Tensor:
    return (x + 1) % rows if here else x


ODD = ("a=3", "a=2,b=3")

BUGS: dict[str, Bug] = {
    "missing all-reduce": Bug(missing_all_reduce),
    "doubled all-reduce": Bug(doubled_all_reduce),
    "slice instead of reduce-scatter": Bug(slice_for_reduce_scatter),
    "all-gather in the wrong order": Bug(gather_in_wrong_order),
    "all-to-all in the wrong order": Bug(all_to_all_in_wrong_order),
    "swapped shards": Bug(swapped_shards),
    "sharding of the wrong dim": Bug(wrong_dim),
    "mean by the local count": Bug(local_mean_scale, ("mlp", "norms")),
    "count of the loss not reduced": Bug(count_not_reduced, ("labels",)),
    "ignored labels counted": Bug(ignored_labels_counted, ("labels",)),
    "stale buffer": Bug(stale_buffer, ("norms",)),
    "buffer updated twice": Bug(buffer_updated_twice, ("norms",)),
    "buffer wrong on one rank": Bug(buffer_of_one_rank, ("norms",)),
    "statistics of the local batch": Bug(local_statistics, ("norms",)),
    "causal mask lost on a rank": Bug(causal_lost),
    "attention mask shifted": Bug(mask_shifted, ("bert",)),
    "dropout at the wrong offset": Bug(dropout_offset, ("bert",)),
    "dropout with another salt": Bug(dropout_salt, ("bert",)),
    "dropout with another seed": Bug(dropout_seed, ("bert",)),
    "dropout differs in backward": Bug(another_mask_in_backward, ("bert",)),
    "gradient of one use of a tied weight lost": Bug(tied_use_lost, ("gpt2",)),
    "gradient doubled": Bug(gradient_doubled),
    "gradient averaged instead of summed": Bug(gradient_averaged),
    "gradient left out of its bucket": Bug(left_out_of_the_bucket, ("gpt2", "norms")),
    "bucket in the wrong order": Bug(bucket_in_wrong_order, ("gpt2", "norms")),
    "vocabulary offset": Bug(vocabulary_offset),
    "vocabulary offset in backward": Bug(vocabulary_offset_in_backward),
    "view reads dims in the wrong order": Bug(view_misread),
    "softmax of a piece": Bug(softmax_of_a_piece, ("experts",)),
    "weight gradient transposed": Bug(transposed_gradient),
    "rank 0's term taken for the whole": Bug(term_taken_for_the_whole),
    "mask on the wrong axis": Bug(mask_on_the_wrong_axis, meshes=("a=2,b=2",)),
    "mask lost": Bug(mask_lost),
    "reduced in low precision": Bug(reduced_in_low_precision),
    "uneven pieces cut one off": Bug(off_by_one_chunk, meshes=ODD),
    "padding leaks into an uneven piece": Bug(padding_leaks, meshes=ODD),
    "input slice of another rank": Bug(input_of_another_rank, ("gpt2", "norms")),
    "update missed on a rank": Bug(update_missed_on_a_rank),
    "output left ungathered": Bug(output_not_gathered),
    "epsilon on one rank": Bug(epsilon_on_one_rank),
    "scale on one rank": Bug(scale_on_one_rank),
    "maximum summed": Bug(maximum_summed, ("experts",)),
    "positions one off on a rank": Bug(position_off_by_one),
    "operands of a difference swapped": Bug(swapped_operands, ("mlp", "norms")),
    "reduce-scatter scaled by its ranks": Bug(scatter_summed_twice),
}
