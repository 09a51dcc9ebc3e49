"""Put the cheapest chain of collectives on every edge whose two specs differ.

One conversion serves all consumers of a group that want the same layout. A reduction of a Partial value is done once
(group "both"); everything else is converted per phase, so that what forward gathered is gathered again in backward from
the stored shards instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import fx

from ..ir.errors import GraphError
from ..ir.program import Draft, Output, Program, is_getitem, source, tensor_args
from ..ir.spec import Spec, layout, same_layout
from ..runtime.collectives import move

if TYPE_CHECKING:
    from .pipeline import Lowering


def insert_reshards(program: Program, context: Lowering) -> Program:
    """Splice moves into every edge whose producer's and consumer's layouts differ."""
    with program.edit() as new:
        done: dict[tuple, fx.Node] = {}
        for node in list(new.graph.nodes):
            if node.op == "output" or (node.op == "call_function" and not is_getitem(node)):
                replaced = [
                    _converted(new, context, done, node, arg, want, phase)
                    for arg, want, phase in _uses(program, new, node)
                ]
                _replace_args(node, replaced)
    return new.program


def _uses(program: Program, new: Draft, node: fx.Node) -> Iterator[tuple[fx.Node, Spec, str]]:
    """The tensors a node takes, the spec it expects of each, and the phase in which it takes them."""
    expected = new.expects[node.name]
    if node.op != "output":
        for arg, want in zip(tensor_args(node), expected, strict=True):
            yield arg, want, node.meta["phase"]
        return
    for arg, want, out in zip(tensor_args(node), expected, program.outputs, strict=True):
        yield arg, want, output_phase(out)


def output_phase(out: Output) -> str:
    return "backward" if out.role == "grad" else "forward"


def _converted(new: Draft, context: Lowering, done: dict, node: fx.Node, arg: fx.Node, want: Spec, phase: str) -> fx.Node:
    from .pipeline import spec_of

    have = spec_of(new.specs, arg)
    if have is None:
        raise GraphError(f"{node.name} takes {arg.name}, which has no spec")
    if same_layout(have, want, context.sizes):
        return arg
    producer, index = source(arg)
    group = "both" if have.has_partial else phase
    key = (producer.name, index, group, layout(want, context.sizes))
    if key not in done:
        done[key] = _splice(new, context, arg, have, want, node, phase)
    return done[key]


def _splice(new: Draft, context: Lowering, arg: fx.Node, have: Spec, want: Spec, before: fx.Node, phase: str) -> fx.Node:
    """The chain of moves, just before its first consumer; for a result of the program, just after its producer."""
    current = arg
    for step in context.conversions.path(have, want):
        if step.kind == "recast":
            continue
        args = (current, step.kind, step.axis, str(step.before), str(step.after))
        anchor = new.graph.inserting_after(current) if before.op == "output" else new.graph.inserting_before(before)
        with anchor:
            made = new.graph.create_node("call_function", move, args, name=f"{arg.name}_{step.kind}")
        made.meta = {key: arg.meta.get(key, "") for key in ("val", "where", "module")} | {"phase": phase}
        new.specs[made.name], new.expects[made.name] = step.after, (step.before,)
        current = made
    return current


def _replace_args(node: fx.Node, replaced: list[fx.Node]) -> None:
    it = iter(replaced)
    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(it))
