"""Put the cheapest chain of collectives on every edge whose two specs differ.

Which conversions there are is not decided here: `needed_conversions` says it for pricing and for lowering alike. Every move knows
its price, `meta["seconds"]`, of gradients that travel in buckets their part of it, and how many of these seconds use the bandwidth of
a link, `meta["transfer"]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from ..ir.program import Draft, Program, source
from ..ir.spec import Spec
from ..runtime.collectives import move
from ..solver.conversions import Needed, Use, needed_conversions

if TYPE_CHECKING:
    from .pipeline import Lowering


def insert_reshards(program: Program, context: Lowering) -> Program:
    """Splice moves into every edge whose producer's and consumer's layouts differ."""
    needed = needed_conversions(program, context.rules, context.strategies, context.sizes, context.again, context.stowed)
    if not needed:
        return program
    with program.edit() as new:
        nodes = {node.name: node for node in new.graph.nodes}
        replaced: dict[str, dict[int, fx.Node]] = {}
        known: dict[tuple[Spec, Spec, bool], list[_Step]] = {}  # repeated blocks ask for the same again
        for need in needed:
            key = (need.source, need.target, need.is_gradient)
            if key not in known:
                known[key] = _steps(context, need)
            converted = _splice(new, nodes, need, known[key])
            for use in need.uses:
                replaced.setdefault(use.node, {})[use.position] = converted
        for name, positions in replaced.items():
            _replace_args(nodes[name], positions)
    return new.program


@dataclass(frozen=True)
class _Step:
    """One move of a chain: what `move` takes besides the tensor, both specs, seconds, and those of them that use a link's bandwidth."""

    args: tuple[str, int, str, str]
    before: Spec
    after: Spec
    seconds: float
    transfer_s: float


def _steps(context: Lowering, need: Needed) -> list[_Step]:
    """The chain of a conversion; recasts are only other words for a layout."""
    path = context.conversions.path(need.source, need.target)
    whole = sum(step.seconds for step in path)
    share = context.conversions.seconds(need.source, need.target, bucketed=need.is_gradient) / whole if whole else 1.0
    mesh = context.conversions.mesh
    return [
        _Step(
            (m.kind, m.axis, str(m.before), str(m.after)), m.before, m.after, m.seconds * share, min(m.transfer_s(mesh), m.seconds * share)
        )
        for m in path
        if m.kind != "recast"
    ]


def _splice(new: Draft, nodes: dict[str, fx.Node], need: Needed, steps: Sequence[_Step]) -> fx.Node:
    """The chain of moves, just before its first use; for a mere result of the program, just after its producer."""
    current = value = _handle(nodes[need.producer], need.index)
    first = _first_use(need)
    for step in steps:
        anchor = new.graph.inserting_after(current) if first.result else new.graph.inserting_before(nodes[first.node])
        with anchor:
            made = new.graph.create_node("call_function", move, (current, *step.args), name=f"{value.name}_{step.args[0]}")
        made.meta = {"val": value.meta["val"], **_origin(value, nodes[first.node]), "phase": first.phase}
        made.meta |= {"seconds": step.seconds, "transfer": step.transfer_s}
        new.specs[made.name], new.expects[made.name] = step.after, (step.before,)
        current = made
    return current


def _first_use(need: Needed) -> Use:
    """The use that runs first. Results stand last in the graph, but those of forward are handed out before backward starts."""
    return next((use for use in need.uses if use.phase == "forward"), need.uses[0])


def _origin(value: fx.Node, taker: fx.Node) -> dict[str, str]:
    """Line and module of a move: where its value was made, or for an input where it is first taken."""
    owner = value if value.op == "call_function" else taker
    return {key: owner.meta.get(key) or "" for key in ("where", "module")}


def _handle(producer: fx.Node, index: int) -> fx.Node:
    """The node that stands for output `index` of a producer: its `getitem`, or the producer itself."""
    if not isinstance(producer.meta["val"], (tuple, list)):
        return producer
    return next(user for user in producer.users if source(user) == (producer, index))


def _replace_args(node: fx.Node, positions: dict[int, fx.Node]) -> None:
    at = -1

    def swap(old: fx.Node) -> fx.Node:
        nonlocal at
        at += 1
        return positions.get(at, old)

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), swap)
