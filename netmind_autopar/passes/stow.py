"""Copy in the parameters that wait elsewhere where they are used, and send their gradients out.

    forward    fetch … reload ─ users          the copy starts a block ahead, and is dropped after its last use
    backward   fetch … reload ─ users          the same again
               gradient ─ offload … release … settle

`fetch` and `release` stand where solver/window.py says, for pricing and for lowering alike. `settle` is at the end: what the step gives
is the tensor elsewhere. A fetched parameter is a value like any other: what collectives and views make of it holds or frees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from ..ir.program import Draft, Program, is_getitem, source, tensor_args
from ..ir.spec import Spec
from ..runtime.offload import fetch, offload, release, reload, settle
from ..solver.replay import is_late
from ..solver.window import back, borders, gone

if TYPE_CHECKING:
    from .pipeline import Lowering


def stow_parameters(program: Program, context: Lowering) -> Program:
    """Put fetch and reload before the users of a stowed parameter in each phase, and offload, release and settle behind its gradient."""
    if not context.stowed:
        return program
    with program.edit() as new:
        step = _Step(new, context)
        nodes = {node.name: node for node in new.graph.nodes}
        for name, tier in context.stowed.items():
            users = [u for u in nodes[name].users if u.op == "call_function"]
            for late in (False, True):
                _copy_in(step, nodes[name], [u for u in users if is_late(u) == late], tier)
        ends = next(n for n in new.graph.nodes if n.op == "output")
        wanted = {program.owner(o).node: i for i, o in enumerate(program.outputs) if o.role == "grad"}
        for name, tier in context.stowed.items():
            if name in wanted and context.gradients != "waiting":  # those are complete, and leave, when the last step is over
                _send_out(step, ends, wanted[name], tier)
    return new.program


class _Step:
    """The ops of the captured program in each phase, where their stretches begin, and the position of every op among them."""

    def __init__(self, new: Draft, context: Lowering) -> None:
        self.new = new
        self.orders: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        self.position: dict[fx.Node, int] = {}  # of what passes put in: that of the next op
        self.place = {node: i for i, node in enumerate(new.graph.nodes)}
        for node in new.graph.nodes:
            if node.op == "call_function":
                order = self.orders[is_late(node)]
                self.position[node] = len(order)
                if node.name in context.strategies and not is_getitem(node):
                    order.append(node)
        self.starts: tuple[Sequence[int], Sequence[int]] = (borders(self.orders[0]), borders(self.orders[1]))

        self.at = {node: i for i, node in enumerate(self.orders[1])}

    def made(self, value: fx.Node) -> int:
        """The position of the op of backward that a value comes from, moves looked through; 0 for what was there before."""
        node = source(value)[0]
        while node not in self.at:
            args = tensor_args(node)
            if not args:
                return 0
            node = source(args[0])[0]
        return self.at[node]

    def mark(self, like: fx.Node, name: str, target: Callable[..., Any], args: tuple[Any, ...], phase: str, lies: Spec) -> fx.Node:
        made = self.new.graph.create_node("call_function", target, args, name=name)
        made.meta = {"val": like.meta["val"], **{key: like.meta.get(key) or "" for key in ("where", "module")}, "phase": phase}
        self.new.specs[made.name], self.new.expects[made.name] = lies, (lies,)
        return made


def _copy_in(step: _Step, parameter: fx.Node, users: list[fx.Node], tier: str) -> None:
    if not users:
        return
    users.sort(key=step.place.__getitem__)
    late = is_late(users[0])
    phase, order = ("backward" if late else "forward"), step.orders[late]
    come = order[back(step.starts[late], min(step.position[users[0]], len(order) - 1))]
    come = min(come, users[0], key=step.place.__getitem__)
    lies = step.new.specs[parameter.name]
    assert isinstance(lies, Spec)
    with step.new.graph.inserting_before(come):
        coming = step.mark(parameter, f"{parameter.name}_{phase}_fetch", fetch, (parameter, tier), phase, lies)
    with step.new.graph.inserting_before(users[0]):
        there = step.mark(users[0], f"{parameter.name}_{phase}", reload, (coming,), phase, lies)
    there.meta["val"] = parameter.meta["val"]
    for user in users:
        user.replace_input_with(parameter, there)


def _send_out(step: _Step, ends: fx.Node, at: int, tier: str) -> None:
    """The gradient at position `at` of the results goes out."""
    gradient, order = tensor_args(ends)[at], step.orders[1]
    lies = step.new.expects["output"][at]
    made = step.made(gradient)
    users = [step.position[u] for u in gradient.users if u in step.position and is_late(u)]
    leave = gone(step.starts[1], made, max(users, default=made))
    early = step.new.graph.inserting_before(order[0] if order else ends)
    with step.new.graph.inserting_after(gradient) if is_late(gradient) else early:
        out = step.mark(gradient, f"{gradient.name}_{at}_out", offload, (gradient, tier, True), "backward", lies)
    with step.new.graph.inserting_before(order[leave] if leave < len(order) else ends):
        left = step.mark(gradient, f"{gradient.name}_{at}_left", release, (out,), "backward", lies)
    with step.new.graph.inserting_before(ends):
        settled = step.mark(gradient, f"{gradient.name}_{at}_settled", settle, (left,), "backward", lies)
    seen = -1

    def swap(old: fx.Node) -> fx.Node:
        nonlocal seen
        seen += 1
        return settled if seen == at else old

    ends.args = fx.node.map_arg(ends.args, swap)
