"""Bugs that a compiler of this kind can have, planted into correct lowered programs.

A bug is a generator over the places of a program where it can sit. Each place is (the node that a developer would call wrong, a
function that plants it). Nothing here knows a model: places are found by op, move and role.

    for node, plant in BUGS["missing all-reduce"].places(draft, sizes): ...
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from netmind_autopar.ir.local import Local
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.program import Draft, Output, Program, is_getitem, op_name, source
from netmind_autopar.ir.spec import Partial, Replicate, Shard, Spec, parse_spec
from netmind_autopar.passes.pipeline import spec_of
from netmind_autopar.runtime.collectives import bucket, move

aten, own = torch.ops.aten, torch.ops.autopar
Place = tuple[fx.Node, Callable[[], fx.Node | None]]
Places = Iterator[Place]


@dataclass(frozen=True)
class PerRank(Local):
    """An argument that is `value(sizes, coord)`, and where that is None what it was before."""

    value: Any = None
    before: Any = None

    def at(self, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Any:
        found = self.value(sizes, coord)
        if found is None:
            return self.before.at(sizes, coord) if isinstance(self.before, Local) else self.before
        return found


def on_last(value: Any, before: Any) -> PerRank:
    """`value` on the last rank, `before` on the others."""
    return PerRank(
        "", "", value=lambda sizes, coord: value if all(c == n - 1 for c, n in zip(coord, sizes, strict=True)) else None, before=before
    )


def flag_on_last() -> PerRank:
    return on_last(True, False)


# Small surgery on a draft.


def after(draft: Draft, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Put `target(node, *args)` between a node and all who take it."""
    users = list(node.users)
    with draft.graph.inserting_after(node):
        made = draft.graph.create_node("call_function", target, (node, *args), name=f"{node.name}_bug")
    for user in users:
        user.replace_input_with(node, made)
    spec = spec_of(draft.specs, node)
    assert spec is not None
    made.meta, draft.specs[made.name], draft.expects[made.name] = dict(node.meta), spec, (spec,)
    made.meta["val"] = source(node)[0].meta["val"][source(node)[1]] if is_getitem(node) else node.meta["val"]
    return made


def before(draft: Draft, node: fx.Node, position: int, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Put `target(argument, *args)` before one tensor argument of a node, for this node alone."""
    arg = node.args[position]
    assert isinstance(arg, fx.Node)
    with draft.graph.inserting_before(node):
        made = draft.graph.create_node("call_function", target, (arg, *args), name=f"{node.name}_bug")
    node.update_arg(position, made)
    spec = spec_of(draft.specs, arg)
    assert spec is not None
    made.meta, draft.specs[made.name], draft.expects[made.name] = {**node.meta, "val": arg.meta["val"]}, spec, (spec,)
    return made


def moves(draft: Draft, *kinds: str) -> list[fx.Node]:
    return [n for n in draft.graph.nodes if n.target is move and n.args[1] in kinds]


def sums(draft: Draft, *kinds: str) -> list[fx.Node]:
    """Reductions of sums whose terms an op made: what a mask made lies on one rank alone, and its sum is easily right by chance."""

    def own_terms(node: fx.Node) -> bool:
        x, _, axis, a, _ = node.args
        maker = source(x)[0]
        split = any(isinstance(s.placements[axis], Shard) for s in draft.expects.get(maker.name, ()))
        return parse_spec(a).placements[axis] == Partial("sum") and maker.target is not move and split

    return [n for n in moves(draft, *kinds) if own_terms(n)]


def ops(draft: Draft, *names: str) -> list[fx.Node]:
    return [n for n in draft.graph.nodes if n.op == "call_function" and op_name(n).rsplit(".", 1)[0] in names]


def ends(draft: Draft, role: str) -> list[tuple[Output, fx.Node]]:
    """Results of one role, with the nodes that give them."""
    out = next(n for n in draft.graph.nodes if n.op == "output")
    return [(o, n) for o, n in zip(draft.program.outputs, tree_leaves(out.args), strict=True) if o.role == role]


def give(draft: Draft, end: Output, node: fx.Node) -> None:
    """Let another node be a result."""
    out = next(n for n in draft.graph.nodes if n.op == "output")
    leaves = list(tree_leaves(out.args))
    leaves[draft.program.outputs.index(end)] = node
    out.args = (tuple(leaves),)


def set_arg(node: fx.Node, name: str, change: Callable[[Any], Any]) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    i = names.index(name)
    if i < len(node.args):
        node.args = (*node.args[:i], change(node.args[i]), *node.args[i + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: change(node.kwargs.get(name))}


def arg_of(node: fx.Node, name: str) -> Any:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    i = names.index(name)
    return node.args[i] if i < len(node.args) else node.kwargs.get(name)


def _varies(value: Any, sizes: tuple[int, ...]) -> bool:
    """True for an argument that differs from rank to rank."""
    return isinstance(value, Local) and len({str(value.at(sizes, c)) for c in coordinates(sizes)}) > 1


# What wrong programs compute.


def times(x: Tensor, factor: float) -> Tensor:
    return x * factor


def rolled(x: Tensor, shift: int, dim: int) -> Tensor:
    return torch.roll(x, shift, dim)


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous()


def coarse(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def zero_if(x: Tensor, here: bool) -> Tensor:
    return torch.zeros_like(x) if here else x


def plus_if(x: Tensor, here: bool, amount: int) -> Tensor:
    return x + amount if here else x


def last_lost(x: Tensor) -> Tensor:
    y = x.clone()
    y.reshape(-1)[-1] = 0
    return y


def in_pieces(x: Tensor, dim: int, half: bool, pieces: int, log: bool) -> Tensor:
    f = torch.log_softmax if log else torch.softmax
    return torch.cat([f(c, dim) for c in x.chunk(pieces, dim)], dim)


def piece(x: Tensor, dims: tuple[int, ...], part: int, start: int, length: int, shape: list[int]) -> Tensor:
    return x.reshape(dims).narrow(part, start, length).reshape(shape).contiguous()


def reread(x: Tensor, shape: list[int], dim: int) -> Tensor:
    """The view of the same size whose dims `dim` and `dim + 1` are read in the wrong order."""
    other = [*shape[:dim], shape[dim + 1], shape[dim], *shape[dim + 2 :]]
    return x.reshape(other).transpose(dim, dim + 1).contiguous()


def all_counted(count: Tensor, target: Tensor) -> Tensor:
    return torch.full_like(count, target.numel())


# The bugs. Each yields (the node at fault, how to plant it).


def missing_all_reduce(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "all_reduce"):

        def plant(node: fx.Node = node) -> None:
            node.args = (node.args[0], "recast", node.args[2], node.args[4], node.args[4])

        yield node, plant


def doubled_all_reduce(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in sums(draft, "all_reduce"):
        yield node, lambda node=node: after(draft, node, move, *node.args[1:])


def slice_for_reduce_scatter(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "reduce_scatter"):

        def plant(node: fx.Node = node) -> None:
            x, _, axis, a, b = node.args
            spec = parse_spec(a)
            whole = spec.with_placements(Replicate() if i == axis else p for i, p in enumerate(spec.placements))
            node.args = (x, "slice", axis, str(whole), b)

        yield node, plant


def _gathered_dim(node: fx.Node, sizes: tuple[int, ...], to: bool = False) -> tuple[int, int] | None:
    """(dim, piece) that a gather joins, where the dim is one part that only this axis splits, evenly."""
    spec, axis = parse_spec(node.args[4 if to else 3]), node.args[2]
    p = spec.placements[axis]
    if len(spec.dims[p.dim]) != 1 or sum(isinstance(q, Shard) and q.dim == p.dim for q in spec.placements) != 1:
        return None
    size = spec.shape[p.dim]
    return (p.dim, size // sizes[axis]) if size % sizes[axis] == 0 else None


def gather_in_wrong_order(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "all_gather"):
        if found := _gathered_dim(node, sizes):
            yield node, lambda node=node, found=found: after(draft, node, rolled, found[1], found[0])


def all_to_all_in_wrong_order(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "all_to_all"):
        if found := _gathered_dim(node, sizes):
            yield node, lambda node=node, found=found: after(draft, node, rolled, found[1], found[0])


def _slice_as(draft: Draft, node: fx.Node, start: Callable[[tuple, tuple], int | None]) -> None:
    """Replace a slice by one that begins elsewhere, in the coordinates that `start` changes."""
    x, _, axis, a, b = node.args
    part = parse_spec(b).index(parse_spec(b).placements[axis])
    have = Local("lengths", a)
    right = Local("start", b, (part,))
    node.target = piece
    node.args = (x, have, part, PerRank("", "", value=start, before=right), Local("size", b, (part,)), Local("shape", b))


def _plain_slices(draft: Draft, sizes: tuple[int, ...]) -> Iterator[fx.Node]:
    for node in moves(draft, "slice"):
        spec, axis = parse_spec(node.args[4]), node.args[2]
        if sum(p == spec.placements[axis] for p in spec.placements) == 1:
            yield node


def swapped_shards(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in _plain_slices(draft, sizes):
        axis, spec = node.args[2], node.args[4]
        part = parse_spec(spec).index(parse_spec(spec).placements[axis])
        if parse_spec(spec).parts[part] % sizes[axis]:
            continue

        def start(sizes: tuple, coord: tuple, axis: int = axis, spec: str = spec, part: int = part) -> int | None:
            other = {0: 1, 1: 0}.get(coord[axis])
            return None if other is None else Local("start", spec, (part,)).at(sizes, (*coord[:axis], other, *coord[axis + 1 :]))

        yield node, lambda node=node, start=start: _slice_as(draft, node, start)


def off_by_one_chunk(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Uneven pieces cut as if the longer ones came last."""
    for node in _plain_slices(draft, sizes):
        axis, spec = node.args[2], node.args[4]
        part = parse_spec(spec).index(parse_spec(spec).placements[axis])
        if parse_spec(spec).parts[part] % sizes[axis] == 0:
            continue

        def start(sizes: tuple, coord: tuple, axis: int = axis, spec: str = spec, part: int = part) -> int | None:
            right = Local("start", spec, (part,)).at(sizes, coord)
            return right - 1 if right else None

        yield node, lambda node=node, start=start: _slice_as(draft, node, start)


def wrong_dim(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Columns of a square matrix where rows were meant."""
    for node in moves(draft, "slice", "all_gather"):
        kind, spec = node.args[1], parse_spec(node.args[3 if node.args[1] == "slice" else 4])
        if len(spec.shape) == 2 and spec.shape[0] == spec.shape[1] and spec == spec.replicated:
            yield node, lambda node=node, kind=kind: before(draft, node, 0, turned) if kind == "slice" else after(draft, node, turned)


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
                yield reduce, lambda reduce=reduce: _local_estimate(draft, reduce, sizes)


def ignored_labels_counted(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in _counts(draft):
        yield node, lambda node=node: after(draft, node, all_counted, node.args[0])


def _local_estimate(draft: Draft, node: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
    factor = sizes[node.args[2]]
    node.args = (node.args[0], "recast", node.args[2], node.args[4], node.args[4])
    return after(draft, node, times, factor)


def local_statistics(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """The sum of one rank times the number of ranks, instead of the sum over ranks: a batch norm that looks at its own batch."""
    for node in sums(draft, "all_reduce"):
        if node.meta["phase"] == "forward" and parse_spec(node.args[3]).shape:
            yield node, lambda node=node: _local_estimate(draft, node, sizes)


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
        if _varies(arg_of(node, "starts"), sizes):
            yield node, lambda node=node: set_arg(node, "starts", lambda old: [0] * len(parse_spec(old.spec).parts))
    for node in ops(draft, "autopar.attention"):
        for name in ("b_start", "h_start"):
            if arg_of(node, "p") and _varies(arg_of(node, name), sizes):
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


def gradient_averaged(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "all_reduce", "reduce_scatter"):
        if node.meta["phase"] == "backward":
            yield node, lambda node=node: after(draft, node, times, 1 / sizes[node.args[2]])


def left_out_of_the_bucket(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """One gradient of a bucket is handed out as the rank has it."""
    for node in [n for n in draft.graph.nodes if n.target is bucket]:
        for taker in list(node.users):
            yield taker, lambda node=node, taker=taker: taker.replace_all_uses_with(node.args[0][taker.args[1]])


def bucket_in_wrong_order(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in [n for n in draft.graph.nodes if n.target is bucket]:
        specs, takers = node.meta["specs"], {t.args[1]: t for t in node.users}
        for i, a in enumerate(specs):
            for j in range(i + 1, len(specs)):
                if a == specs[j] and {i, j} <= takers.keys():

                    def plant(node: fx.Node = node, i: int = i, j: int = j) -> None:
                        order = list(node.args[0])
                        order[i], order[j] = order[j], order[i]
                        node.args = (order, *node.args[1:])

                    yield node, plant


def vocabulary_offset(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.embedding"):
        if _varies(arg_of(node, "start"), sizes):
            yield node, lambda node=node: set_arg(node, "start", lambda old: 0)


def vocabulary_offset_in_backward(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in ops(draft, "autopar.embedding_backward"):
        if _varies(arg_of(node, "start"), sizes):
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


def term_taken_for_the_whole(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Everyone takes what rank 0 has, as if it were not Partial."""
    for node in sums(draft, "all_reduce"):

        def plant(node: fx.Node = node) -> None:
            _, _, axis, a, _ = node.args
            spec = parse_spec(a)
            whole = spec.with_placements(Replicate() if i == axis else p for i, p in enumerate(spec.placements))
            before(draft, node, 0, move, "mask", axis, str(whole), a)

        yield node, plant


def mask_on_the_wrong_axis(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Zeros for all but coordinate 0 of another axis."""
    for node in moves(draft, "mask"):
        if len(sizes) > 1:

            def plant(node: fx.Node = node) -> None:
                axis = node.args[2]
                node.args = (node.args[0], "mask", 1 - axis, *node.args[3:])

            yield node, plant


def mask_lost(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """All ranks keep the value: their sum is so many times too much."""
    for node in moves(draft, "mask"):

        def plant(node: fx.Node = node) -> None:
            node.args = (node.args[0], "recast", node.args[2], node.args[4], node.args[4])

        yield node, plant


def reduced_in_low_precision(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "all_reduce", "reduce_scatter"):
        if (dtype := parse_spec(node.args[3]).dtype) in (torch.float64, torch.float32):
            small = torch.float32 if dtype == torch.float64 else torch.bfloat16
            yield node, lambda node=node, small=small: before(draft, node, 0, coarse, small)


def input_of_another_rank(draft: Draft, sizes: tuple[int, ...]) -> Places:
    users = {i.node for i in draft.program.inputs if i.role == "input"}
    for node, plant in swapped_shards(draft, sizes):
        if node.args[0].name in users:
            yield node, plant


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


def maximum_summed(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "all_reduce", "reduce_scatter"):
        if "P(max)" in node.args[3]:

            def plant(node: fx.Node = node) -> None:
                node.args = (*node.args[:3], node.args[3].replace("P(max)", "P(sum)"), node.args[4])

            yield node, plant


def padding_leaks(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """The last element of an uneven dim comes from the padding of the short piece."""
    for node in moves(draft, "all_gather"):
        spec, axis = parse_spec(node.args[3]), node.args[2]
        if spec.parts[spec.index(spec.placements[axis])] % sizes[axis]:
            yield node, lambda node=node: after(draft, node, last_lost)


def position_off_by_one(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Indices begin one too far on the last rank."""
    for node in ops(draft, "autopar.embedding", "aten.embedding"):
        table = spec_of(draft.specs, node.args[0])  # type: ignore[arg-type]
        if table is None or table != table.replicated:
            continue
        rows = table.shape[0]
        yield node, lambda node=node, rows=rows: before(draft, node, 1, next_row, flag_on_last(), rows)


def next_row(x: Tensor, here: bool, rows: int) -> Tensor:
    return (x + 1) % rows if here else x


def scatter_summed_twice(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "reduce_scatter"):
        yield node, lambda node=node: after(draft, node, times, float(sizes[node.args[2]]))


@dataclass(frozen=True)
class Bug:
    """`models`: where it is planted; `meshes`: on what; `count`: in how many places."""

    places: Callable[[Draft, tuple[int, ...]], Places]
    models: tuple[str, ...] = ("gpt2", "llama")
    meshes: tuple[str, ...] = ("a=4", "a=2,b=2")
    count: int = 2


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
    "reduce-scatter scaled by its ranks": Bug(scatter_summed_twice),
}


def planted(lowered: Program, bug: Bug, sizes: tuple[int, ...], which: int) -> tuple[Program, fx.Node, list[str]] | None:
    """The program with the bug at its `which`-th place, the node at fault, and the names of its neighbourhood; None: no such place."""
    with lowered.edit() as draft:
        places = list(bug.places(draft, sizes))
        if which >= len(places):
            return None
        node, plant = places[which]
        near = _near(node)
        plant()
        draft.graph.eliminate_dead_code()
        near |= _near(node)
        names = {n.name for n in draft.graph.nodes}
        draft.specs = {k: v for k, v in draft.specs.items() if k in names}
    return draft.program, node, sorted(near)


def place_count(lowered: Program, bug: Bug, sizes: tuple[int, ...]) -> int:
    with lowered.edit() as draft:
        return len(list(bug.places(draft, sizes)))


def _near(node: fx.Node) -> set[str]:
    """The node, what it takes and who takes it; through buckets, moves and `getitem` as far as it goes."""
    found = {node.name}
    for direction in ("all_input_nodes", "users"):
        queue = [(n, 0) for n in getattr(node, direction)]
        while queue:
            n, far = queue.pop()
            if n.name in found and far:
                continue
            found.add(n.name)
            if n.target in (move, bucket, operator.getitem) or n.name.endswith("_bug"):
                queue += [(m, far + 1) for m in getattr(n, direction)]
    return found


def with_frozen_gradient(lowered: Program, name: str) -> Program:
    """The program hands out a gradient for a parameter that is frozen: an optimizer would move it."""
    holder = next(i for i in lowered.inputs if i.role == "param" and i.name == name)
    with lowered.edit() as draft:
        out = next(n for n in draft.graph.nodes if n.op == "output")
        node = next(n for n in draft.graph.nodes if n.name == holder.node)
        out.args = ((*tree_leaves(out.args), node),)
        draft.expects["output"] = (*draft.expects["output"], draft.specs[holder.node])  # type: ignore[assignment]
    return replace(draft.program, outputs=(*lowered.outputs, Output(holder.node, "grad", name)))


def with_baked_parameter(lowered: Program, name: str, value: Tensor) -> Program:
    """One parameter is a constant in the program: the value it had once."""
    holder = next(i for i in lowered.inputs if i.role == "param" and i.name == name)
    with lowered.edit() as draft:
        node = next(n for n in draft.graph.nodes if n.name == holder.node)
        with draft.graph.inserting_after(next(n for n in reversed(draft.graph.nodes) if n.op == "placeholder")):
            baked = draft.graph.get_attr("stale")
        baked.meta, draft.specs[baked.name] = dict(node.meta), draft.specs[node.name]
        node.replace_all_uses_with(baked)
    return replace(draft.program, constants={**lowered.constants, "stale": value})
