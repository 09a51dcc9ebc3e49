"""Reduce gradients once, after the last micro-batch: what every micro-batch adds up is then reduced like the gradient of one batch.

A sum over micro-batches and a sum over devices may be taken in either order. The reductions that end a gradient's way and leave its
size as it is (all-reduces) come last; a reduce-scatter stays in each micro-batch, so that what is added up is the small piece.

The same for steps whose gradients the user adds up (runtime/accumulate.py): there all collectives that end a parameter gradient's way
come after the last step, with the linear ops of one operand among them ("waiting"), or the last step has a place in front of them where
what waits is added ("closing").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..ir.program import Draft, Output, Program, source, tensor_args
from ..ir.spec import Spec
from ..runtime.accumulate import HALF, meet
from ..runtime.collectives import LOCAL_KINDS, move

if TYPE_CHECKING:
    from .pipeline import Lowering

FINISH = "finish"  # the phase after all micro-batches


def defer_reductions(program: Program, context: Lowering) -> Program:
    """Put the all-reduces that gradients end with into the phase "finish", at the end of the graph."""
    if program.micro is None and context.gradients == "whole":
        return program
    with program.edit() as new:
        ends = next(n for n in new.graph.nodes if n.op == "output")
        if context.gradients == "whole":
            late = _last_reductions(ends, program)
        else:
            late = _last_collectives(ends, program, context)
        if context.gradients == "closing":
            _meet(new, ends, program, late)
        else:
            for node in [n for n in new.graph.nodes if n in late]:
                node.meta = {**node.meta, "phase": FINISH}
                ends.prepend(node)
    return new.program


def _joins(program: Program) -> tuple[str, ...]:
    return program.micro.joins if program.micro else ("sum",) * len(program.outputs)


def _last_reductions(ends: fx.Node, program: Program) -> set[fx.Node]:
    late: set[fx.Node] = set()
    for node, out, join in zip(tensor_args(ends), program.outputs, _joins(program), strict=True):
        while out.role == "grad" and join == "sum" and _last_reduction(node, late | {ends}):
            late.add(node)
            node = node.args[0]  # type: ignore[assignment]
    return late


def waits(out: Output) -> bool:
    """Whether a result is a parameter's gradient: an input's belongs to its own step."""
    return out.role == "grad" and out.index < 0


def _last_collectives(ends: fx.Node, program: Program, context: Lowering) -> set[fx.Node]:
    """Every collective at the end of a parameter gradient's way, and what lies behind it."""
    pairs = list(zip(tensor_args(ends), program.outputs, strict=True))
    now = {node for node, out in pairs if not waits(out)}
    late: set[fx.Node] = set()
    for (node, out), join in zip(pairs, _joins(program), strict=True):
        way: list[fx.Node] = []
        while waits(out) and join == "sum" and node not in now and _may_wait(node, late | {*way, ends}, context):
            way.append(node)
            node = node.args[0]  # type: ignore[assignment]
        while way and not _sends(way[-1], context):
            way.pop()
        late |= set(way)
    return late


def _may_wait(node: fx.Node, later: set[fx.Node], context: Lowering) -> bool:
    """A sum may be taken before this op as well as behind it, and only what comes later takes its result."""
    if node.op != "call_function" or any(user not in later for user in node.users):
        return False
    if node.target is move:
        return "P(max)" not in str(node.args[3]) and "P(min)" not in str(node.args[3])
    rule, taken = context.rules.get(node.name), tensor_args(node)
    linear = rule is not None and rule.reduce == "sum" and len(rule.inputs) == 1 and rule.inputs[0].mark == "+"
    if not linear or len(taken) != 1 or not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    made, given = node.meta["val"], taken[0].meta["val"]
    if not isinstance(made, torch.Tensor) or node.args[0] is not taken[0]:
        return False
    return made.dtype == given.dtype or (given.dtype in HALF and made.dtype == torch.float32)  # sums of halves wait in float32


def _sends(node: fx.Node, context: Lowering) -> bool:
    return node.target is move and node.args[1] not in LOCAL_KINDS and context.sizes[int(node.args[2])] > 1  # type: ignore[call-overload]


def _meet(new: Draft, ends: fx.Node, program: Program, late: set[fx.Node]) -> None:
    """In front of the first of these ops, or of the result where there is none, a parameter's gradient meets what waits of it."""
    made: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(new.graph.nodes)}
    for node in [n for n in new.graph.nodes if n in late and n.args[0] not in late]:
        node.args = (_met(new, made, node.args[0], node, order), *node.args[1:])  # type: ignore[arg-type]
    results = list(tensor_args(ends))
    for i, (node, out) in enumerate(zip(results, program.outputs, strict=True)):
        if waits(out) and node not in late:
            behind = node.next if node.op == "call_function" and node.meta["phase"] == "backward" else ends
            results[i] = _met(new, made, node, behind, order)
    ends.args = (tuple(results),)


def _met(new: Draft, made: dict[fx.Node, fx.Node], point: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    if point not in made:
        with new.graph.inserting_before(before):
            met = new.graph.create_node("call_function", meet, (point,), name=f"{point.name}_total")
        met.meta = {"val": point.meta["val"], "where": "", "module": point.meta.get("module") or "", "phase": "backward"}
        producer, index = source(point)
        spec = new.specs[producer.name]
        spec = spec[index] if isinstance(spec, tuple) else spec
        assert isinstance(spec, Spec)
        new.specs[met.name], new.expects[met.name] = spec, (spec,)
        made[point] = met
    elif before in order and made[point] in order and order[before] < order[made[point]]:
        before.prepend(made[point])
    return made[point]


def _last_reduction(node: fx.Node, later: set[fx.Node]) -> bool:
    is_sum = node.target is move and node.args[1] == "all_reduce" and "P(sum)" in str(node.args[3])
    return is_sum and all(user in later for user in node.users)
