"""A loss over classes that a mesh axis splits: one collective of twelve bytes a row where three all-reduces stood.

    amax → all-reduce(max) ─┬→ sum_exp → all-reduce → log ─┐
                            └──────────────────────────────┴→ add = lse
    pick → all-reduce

becomes `vocab_stats` (maximum, sum of exponentials, the label's logit of this device's classes, one reading of the logits), an all-gather
of [3, rows] and `vocab_combine`. Only in plans with fused ops: elsewhere the three read the logits as often as before.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.program import Draft, Program
from ..ir.spec import Partial, Replicate, Shard, Spec, parse_spec
from ..runtime.collectives import move

if TYPE_CHECKING:
    from .pipeline import Lowering

_aten, _own = torch.ops.aten, torch.ops.autopar


@dataclass(frozen=True)
class _Loss:
    """The nodes of one loss, and the axis over which its classes are split."""

    largest: fx.Node
    sums: fx.Node
    log: fx.Node
    lse: fx.Node
    pick: fx.Node
    moves: tuple[fx.Node, fx.Node, fx.Node]  # behind largest, sums and pick
    axis: int


def fuse_losses(program: Program, context: Lowering) -> Program:
    """Rewrite every loss whose statistics are reduced over one axis each, and read by nothing else."""
    if not context.plan.fuse or not any(n.target is _own.sum_exp.default for n in program.graph.nodes):
        return program
    with program.edit() as new:
        for node in list(new.graph.nodes):
            if node.target is _own.sum_exp.default and (found := _loss(node)):
                _rewrite(new, context, found)
    return new.program


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _reduced(node: fx.Node | None, op: str) -> fx.Node | None:
    """The all-reduce that a node goes into, and into nothing else."""
    user = _only_user(node) if node is not None else None
    if user is None or user.target is not move or user.args[1] != "all_reduce":
        return None
    before, after = parse_spec(user.args[3]), parse_spec(user.args[4])
    axis = user.args[2]
    left = [p for i, p in enumerate(before.placements) if i != axis]
    plain = not any(isinstance(p, Partial) for p in left) and after.placements[axis] == Replicate()
    return user if plain and before.placements[axis] == Partial(op) else None


def _loss(sums: fx.Node) -> _Loss | None:
    x, first = sums.args
    largest = first.args[0] if first.target is move else None
    if largest is None or largest.target is not _aten.amax.default or largest.args[0] is not x or list(largest.args[1]) != [1]:
        return None
    picks = [n for n in x.users if n.target is _own.pick.default and n.args[0] is x]
    moves = (_reduced(largest, "max"), _reduced(sums, "sum"), _reduced(picks[0], "sum") if len(picks) == 1 else None)
    if moves[0] is not first or moves[1] is None or moves[2] is None or len({m.args[2] for m in moves if m}) != 1:
        return None
    log = _only_user(moves[1])
    lse = _only_user(log) if log is not None and log.target is _aten.log.default else None
    if lse is None or lse.target is not _aten.add.Tensor or set(lse.args) != {log, first} or set(first.users) != {sums, lse}:
        return None
    order = {node: i for i, node in enumerate(sums.graph.nodes)}
    if any(order[user] < order[picks[0]] for user in lse.users):
        return None
    return _Loss(largest, sums, log, lse, picks[0], moves, moves[1].args[2])  # type: ignore[arg-type]


def _rewrite(new: Draft, context: Lowering, loss: _Loss) -> None:
    reduced = parse_spec(loss.moves[1].args[4])
    count = context.sizes[loss.axis]
    split = _stats_spec(reduced, loss.axis, count)
    whole = split.with_placements(Replicate() if i == loss.axis else p for i, p in enumerate(split.placements))
    made = _Writer(new, loss)
    rows = reduced.shape[0]
    stats = made.call(
        _own.vocab_stats.default, loss.pick.args, loss.sums.name + "_stats", (count, 3, rows), split, new.expects[loss.pick.name]
    )
    path = context.conversions.path(split, whole)
    for step in path:
        if step.kind != "recast":
            args = (stats, step.kind, step.axis, str(step.before), str(step.after))
            stats = made.call(move, args, f"{stats.name}_{step.kind}", (count, 3, rows), step.after, (step.before,))
            stats.meta |= {"seconds": step.seconds, "transfer": step.transfer_s(context.conversions.mesh)}
    exact = replace(reduced, dtype=torch.float64)
    both = made.call(_own.vocab_combine.default, (stats,), loss.sums.name + "_combine", (rows,), (exact, reduced), (whole,))
    lse, picked = made.item(both, 0), made.item(both, 1)
    if reduced.dtype != torch.float64:
        lse = made.call(_aten._to_copy.default, (lse,), loss.lse.name + "_lse", (rows,), reduced, (exact,), {"dtype": reduced.dtype})
        lse.meta["again"] = loss.lse.name  # the same value: a check may compare them
    loss.lse.replace_all_uses_with(lse)
    loss.moves[2].replace_all_uses_with(picked)
    for node in (loss.lse, loss.log, loss.moves[1], loss.sums, loss.moves[0], loss.largest, loss.moves[2], loss.pick):
        new.graph.erase_node(node)
        del new.specs[node.name], new.expects[node.name]


def _stats_spec(rows: Spec, axis: int, count: int) -> Spec:
    """[devices, 3, rows]: rows lie as before, every device of the axis has its own statistics."""
    placements = [replace(p, dim=2) if isinstance(p, Shard) else p for p in rows.placements]
    placements[axis] = Shard(0)
    return Spec(((count,), (3,), rows.dims[0]), rows.dtype, tuple(placements))


class _Writer:
    """Puts nodes before the label's logit: all that they take is there, and nothing that takes them."""

    def __init__(self, new: Draft, loss: _Loss) -> None:
        self.new, self.place = new, loss.pick
        self.meta = {key: loss.pick.meta.get(key) for key in ("where", "module", "phase")} | {"piece": f"{loss.sums.name} in pieces"}
        self.like = loss.sums.meta["val"]

    def call(
        self, target: Any, args: tuple, name: str, shape: tuple[int, ...], made: Any, takes: tuple[Spec, ...], kwargs: dict | None = None
    ) -> fx.Node:
        with self.new.graph.inserting_before(self.place):
            node = self.new.graph.create_node("call_function", target, args, kwargs or {}, name=name)
        specs = made if isinstance(made, tuple) else (made,)
        values = tuple(self.like.new_empty(shape, dtype=s.dtype) for s in specs)
        node.meta = {"val": values if isinstance(made, tuple) else values[0], **self.meta}
        self.new.specs[node.name], self.new.expects[node.name] = made, takes
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        with self.new.graph.inserting_before(self.place):
            out = self.new.graph.create_node("call_function", operator.getitem, (node, index), name=f"{node.name}_{index}")
        out.meta = {**self.meta, "val": node.meta["val"][index]}
        return out
