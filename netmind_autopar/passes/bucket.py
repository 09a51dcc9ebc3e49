"""Join the all-reduces of gradients into buckets, so that latency is paid once for many small tensors."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from ..costs.space import BUCKET_BYTES, shares
from ..ir.program import Draft, Program, tensor_args
from ..ir.spec import local_bytes, parse_spec
from ..runtime.collectives import bucket, move

if TYPE_CHECKING:
    from .pipeline import Lowering


def bucket_gradients(program: Program, context: Lowering) -> Program:
    """Replace runs of gradient all-reduces over one axis, with one dtype, by one all-reduce each.

    Only an all-reduce whose sole consumer is the program's output is moved: nothing in the step waits for it. A bucket stands
    where its last member stood. One that is so large that copying it into a bucket takes longer than the latency travels alone.
    """
    groups = _buckets(program, context)
    if not any(len(names) > 1 for _, names in groups):
        return program
    with program.edit() as new:
        nodes = {node.name: node for node in new.graph.nodes}
        for (axis, op, *_), names in groups:
            if len(names) > 1:
                _join(new, [nodes[name] for name in names], axis, op)
    return new.program


def _buckets(program: Program, context: Lowering) -> list[tuple[tuple, list[str]]]:
    """Names of the all-reduces that travel together, in graph order."""
    ends = tensor_args(next(n for n in program.graph.nodes if n.op == "output"))
    roles: dict[fx.Node, set[str]] = {}
    for node, end in zip(ends, program.outputs, strict=True):
        roles.setdefault(node, set()).add(end.role)
    open_: dict[tuple, tuple[list[str], int]] = {}
    out: list[tuple[tuple, list[str]]] = []
    for node in program.graph.nodes:
        waited_for = roles.get(node) != {"grad"} or any(user.op != "output" for user in node.users)
        if node.target is not move or node.args[1] != "all_reduce" or node.meta["phase"] == "forward" or waited_for:
            continue
        spec = parse_spec(node.args[3])
        own = local_bytes(spec, context.sizes)
        if shares(context.conversions.mesh, node.args[2], np.array(own)) == 1.0:
            continue
        key = (node.args[2], spec.placements[node.args[2]].op, spec.dtype, node.meta["phase"])
        names, size = open_.pop(key, ([], 0))
        names, size = [*names, node.name], size + own
        if size >= BUCKET_BYTES:
            out.append((key, names))
        else:
            open_[key] = (names, size)
    return out + [(key, names) for key, (names, _) in open_.items()]


def _join(new: Draft, members: list[fx.Node], axis: int, op: str) -> None:
    specs = tuple(parse_spec(m.args[3]) for m in members)
    sources = [m.args[0] for m in members]
    with new.graph.inserting_after(members[-1]):
        joined = new.graph.create_node("call_function", bucket, (sources, axis, op), name=f"bucket_{members[0].name}")
    joined.meta = {
        "val": tuple(m.meta["val"] for m in members),
        "where": "",
        "module": "",
        "phase": members[0].meta["phase"],
        "specs": tuple(m.args[3] for m in members),
        "seconds": sum(m.meta["seconds"] for m in members),
        "transfer": sum(m.meta["transfer"] for m in members),
    }
    new.expects[joined.name] = specs
    new.specs[joined.name] = tuple(parse_spec(m.args[4]) for m in members)
    at = joined
    for i, member in enumerate(members):
        with new.graph.inserting_after(at):
            at = new.graph.call_function(operator.getitem, (joined, i))
        at.meta = dict(member.meta)
        member.replace_all_uses_with(at)
        new.graph.erase_node(member)
        del new.specs[member.name], new.expects[member.name]
