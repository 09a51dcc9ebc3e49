"""Reduce gradients once, after the last micro-batch: what every micro-batch adds up is then reduced like the gradient of one batch.

A sum over micro-batches and a sum over devices may be taken in either order. The reductions that end a gradient's way and leave its
size as it is (all-reduces) come last; a reduce-scatter stays in each micro-batch, so that what is added up is the small piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..ir.program import Program, tensor_args
from ..runtime.collectives import move

if TYPE_CHECKING:
    from .pipeline import Lowering

FINISH = "finish"  # the phase after all micro-batches


def defer_reductions(program: Program, context: Lowering) -> Program:
    """Put the all-reduces that gradients end with into the phase "finish", at the end of the graph."""
    if program.micro is None:
        return program
    with program.edit() as new:
        ends = next(n for n in new.graph.nodes if n.op == "output")
        late: set[fx.Node] = set()
        for node, out, join in zip(tensor_args(ends), program.outputs, program.micro.joins, strict=True):
            while out.role == "grad" and join == "sum" and _last_reduction(node, late | {ends}):
                late.add(node)
                node = node.args[0]  # type: ignore[assignment]
        for node in [n for n in new.graph.nodes if n in late]:
            node.meta = {**node.meta, "phase": FINISH}
            ends.prepend(node)
    return new.program


def _last_reduction(node: fx.Node, later: set[fx.Node]) -> bool:
    is_sum = node.target is move and node.args[1] == "all_reduce" and "P(sum)" in str(node.args[3])
    return is_sum and all(user in later for user in node.users)
