"""Send values that backward needs late to host memory or to disk, and have them back in time.

Around every tensor that a chosen value leaves for backward (the value as it lies, and what forward's moves made of it):

    forward    x ─ offload … release        the copy out starts where x is made; its memory is given back after forward's last use
    backward   prefetch … reload ─ users    the copy back starts a block ahead

When `release` and `prefetch` stand is decided in solver/window.py, for pricing and for lowering alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from ..ir.program import Draft, Program, is_getitem, source
from ..runtime.collectives import move
from ..runtime.offload import offload, prefetch, release, reload
from ..solver.replay import is_late
from ..solver.window import back, borders, gone

if TYPE_CHECKING:
    from .pipeline import Lowering


def offload_values(program: Program, context: Lowering) -> Program:
    """Put offload, release, prefetch and reload around the chosen values that backward takes."""
    if not context.away:
        return program
    with program.edit() as new:
        step = _Step.of(new, context)
        nodes = {node.name: node for node in new.graph.nodes}
        for (name, index), tier in context.away.items():
            if name in nodes:
                for value in list(_left(nodes[name], index)):
                    _send(new, step, value, tier)
    return new.program


def _left(producer: fx.Node, index: int) -> Iterator[fx.Node]:
    """The tensors that an output leaves for backward: itself, and what moves of forward make of it."""
    handles = [producer]
    if isinstance(producer.meta["val"], (tuple, list)):
        handles = [u for u in producer.users if is_getitem(u) and source(u)[1] == index]
    while handles:
        value = handles.pop(0)
        if any(is_late(u) for u in value.users):
            yield value
        handles += [u for u in value.users if u.target is move and not is_late(u)]


@dataclass(frozen=True)
class _Step:
    """The ops of the captured program in each phase, where their stretches begin, and the position of every op among them."""

    orders: tuple[Sequence[fx.Node], Sequence[fx.Node]]
    starts: tuple[Sequence[int], Sequence[int]]
    position: dict[fx.Node, int]  # of what passes put in: that of the next op
    place: dict[fx.Node, int]  # in the graph

    @classmethod
    def of(cls, new: Draft, context: Lowering) -> _Step:
        orders: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        position: dict[fx.Node, int] = {}
        for node in new.graph.nodes:
            if node.op == "call_function":
                order = orders[is_late(node)]
                position[node] = len(order)
                if node.name in context.strategies and not is_getitem(node):
                    order.append(node)
        place = {node: i for i, node in enumerate(new.graph.nodes)}
        return cls(orders, (borders(orders[0]), borders(orders[1])), position, place)


def _send(new: Draft, step: _Step, value: fx.Node, tier: str) -> None:
    late = sorted((u for u in value.users if is_late(u)), key=step.place.__getitem__)
    early = [u for u in value.users if u.op == "call_function" and not is_late(u)]
    made = step.position[source(value)[0]]
    leave = gone(step.starts[0], made, max((step.position[u] for u in early), default=made))
    come = step.orders[1][back(step.starts[1], step.position[late[0]])]
    come = min(come, late[0], key=step.place.__getitem__)
    last = step.orders[0][leave] if leave < len(step.orders[0]) else None
    with new.graph.inserting_after(value):
        out = _mark(new, value, offload, (value, tier), "forward")
    at = last if last is not None and step.place[last] < step.place[come] else come
    with new.graph.inserting_before(at):
        left = _mark(new, value, release, (out,), "forward")
    with new.graph.inserting_before(come):
        coming = _mark(new, value, prefetch, (left,), "backward")
    with new.graph.inserting_before(late[0]):
        there = _mark(new, value, reload, (coming,), "backward")
    for user in late:
        user.replace_input_with(value, there)


def _mark(new: Draft, value: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], phase: str) -> fx.Node:
    made = new.graph.create_node("call_function", target, args, name=f"{value.name}_{target.__name__}")
    made.meta = {"val": value.meta["val"], **{key: value.meta.get(key) or "" for key in ("where", "module")}, "phase": phase}
    producer, index = source(value)
    spec = new.specs[producer.name]
    lies = spec[index] if isinstance(spec, tuple) else spec
    assert lies is not None
    new.specs[made.name], new.expects[made.name] = lies, (lies,)
    return made
