"""Bugs in what is sent, cut and joined. Each yields (the node at fault, how to plant it); see `planted.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from planted import PerRank, Places, after, before, coarse, last_lost, moves, piece, rolled, sums, times, turned
from torch import fx

from netmind_autopar.ir.local import Local
from netmind_autopar.ir.program import Draft
from netmind_autopar.ir.spec import Replicate, Shard, parse_spec
from netmind_autopar.runtime.collectives import bucket, move


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


def local_estimate(draft: Draft, node: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
    factor = sizes[node.args[2]]
    node.args = (node.args[0], "recast", node.args[2], node.args[4], node.args[4])
    return after(draft, node, times, factor)


def local_statistics(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """The sum of one rank times the number of ranks, instead of the sum over ranks: a batch norm that looks at its own batch."""
    for node in sums(draft, "all_reduce"):
        if node.meta["phase"] == "forward" and parse_spec(node.args[3]).shape:
            yield node, lambda node=node: local_estimate(draft, node, sizes)


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


def scatter_summed_twice(draft: Draft, sizes: tuple[int, ...]) -> Places:
    for node in moves(draft, "reduce_scatter"):
        yield node, lambda node=node: after(draft, node, times, float(sizes[node.args[2]]))
