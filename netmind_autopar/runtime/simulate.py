"""All ranks of a lowered program in lockstep, in one process: one list of local tensors per value.

The ops, the local sizes and the packing of every collective are those that real processes run; only the wire is a list. A collective
that was started has nothing to give until it is waited for: an op that takes it before, a second wait, and one that nobody
waits for are errors that name the line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import GraphError
from ..ir.local import ONE, resolve
from ..ir.mesh import coordinates
from ..ir.program import Program, is_getitem
from ..ir.spec import local_shape, parse_spec
from .collectives import BUCKETS, MOVES, STARTS, Started, bucket_stage, lockstep, stage, wait
from .turns import join

PerRank = list[Any]  # one entry per rank: a tensor, or a tuple of tensors
Observer = Callable[[fx.Node, PerRank], None]
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def run(
    program: Program, sizes: tuple[int, ...], inputs: Mapping[str, Sequence[Tensor]], observe: Observer | None = None
) -> list[list[Tensor]]:
    """Run every rank of a lowered program, all of its micro-batches one after the other.

    inputs:  per placeholder name the local tensors of all ranks, in rank order.
    observe: called with each op and its per-rank results, in graph order.
    Returns one list of local tensors per program output. Values are freed after their last use.
    Raises GraphError where a value is taken before it is made or has arrived, and for a collective that is never waited for.
    """
    if program.micro is None:
        return _turn(program, sizes, inputs, observe, ONE)
    turns = [_turn(program, sizes, inputs, observe, (program.turns, t)) for t in range(program.turns)]
    results = zip(program.micro.joins, *turns, strict=True)
    return [[join(how, pieces) for pieces in zip(*ranks, strict=True)] for how, *ranks in results]


def _turn(
    program: Program, sizes: tuple[int, ...], inputs: Mapping[str, Sequence[Tensor]], observe: Observer | None, turn: tuple[int, int]
) -> list[list[Tensor]]:
    """One micro-batch."""
    coords = tuple(coordinates(sizes))
    env: dict[fx.Node, PerRank] = {}
    uses = {node: len(node.users) for node in program.graph.nodes}
    on_its_way: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = list(inputs[node.name])
            continue
        _check_taken(node, env, on_its_way)
        if node.op == "output":
            return [env[n] for n in _nodes(node)]
        env[node] = _compute(program, node, env, sizes, coords, turn)
        if node.target in STARTS:
            on_its_way.add(node)
        elif node.target is wait:
            on_its_way.remove(node.args[0])
        if observe:
            observe(node, env[node])
        for arg in node.all_input_nodes:
            uses[arg] -= 1
            if not uses[arg]:
                del env[arg]
    return []


def _check_taken(node: fx.Node, env: Mapping[fx.Node, PerRank], on_its_way: set[fx.Node]) -> None:
    """What a node takes is made, and has arrived where it was sent; at the end nothing is on its way."""
    where = node.meta.get("where") or ""
    for arg in node.all_input_nodes:
        if arg not in env:
            raise GraphError(f"{node.name} takes {arg.name} before it is made", where=where)
        if arg.target in STARTS and (node.target is not wait or arg not in on_its_way):
            what = "a second time" if node.target is wait else "before it was waited for"
            raise GraphError(f"{node.name} takes {arg.name} {what}", where=where or arg.meta.get("where") or "")
    if node.op == "output" and on_its_way:
        first = next(n for n in node.graph.nodes if n in on_its_way)
        raise GraphError(f"{first.name} is started and never waited for", where=first.meta.get("where") or "")


def _nodes(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(node.args, lambda n: found.append(n) or n)
    return found


def _compute(
    program: Program, node: fx.Node, env: dict[fx.Node, PerRank], sizes: tuple[int, ...], coords: tuple, turn: tuple[int, int]
) -> PerRank:
    if node.op == "get_attr":
        return [program.constants[str(node.target)]] * len(coords)
    if is_getitem(node):
        return [value[node.args[1]] for value in env[node.args[0]]]
    if node.target is wait:
        return [started.wait() for started in env[node.args[0]]]  # type: ignore[index]
    if node.target in MOVES or node.target in BUCKETS:
        arrived = (_move if node.target in MOVES else _bucket)(node, env, sizes, coords)
        return arrived if node.target not in STARTS else [Started(functools.partial(_given, value)) for value in arrived]
    out: PerRank = []
    for rank, coord in enumerate(coords):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n, rank=rank: env[n][rank])
        args, kwargs = resolve((args, kwargs), sizes, coord, turn)
        out.append(node.target(*args, **kwargs))
    return out


def _given(value: Any) -> Any:
    return value


def _move(node: fx.Node, env: dict[fx.Node, PerRank], sizes: tuple[int, ...], coords: tuple) -> PerRank:
    x, kind, axis, before, after = node.args
    steps = [stage(kind, axis, before, after, sizes, coord) for coord in coords]
    packed = [step.pack(t) for step, t in zip(steps, env[x], strict=True)]
    carried = packed if steps[0].wire is None else lockstep(steps, packed, sizes)
    return [step.unpack(t) for step, t in zip(steps, carried, strict=True)]


def _bucket(node: fx.Node, env: dict[fx.Node, PerRank], sizes: tuple[int, ...], coords: tuple) -> PerRank:
    tensors, axis, op = node.args
    shapes = [tuple(local_shape(parse_spec(s), sizes, c) for s in node.meta["specs"]) for c in coords]
    bound = [bucket_stage(s, axis, op) for s in shapes]
    packed = [step.pack([env[t][rank] for t in tensors]) for rank, (step, _) in enumerate(bound)]
    carried = lockstep([step for step, _ in bound], packed, sizes)
    return [unbundle(t) for (_, unbundle), t in zip(bound, carried, strict=True)]


def reference(program: Program, inputs: Mapping[str, Tensor], observe: Callable[[fx.Node, Any], None] | None = None) -> list[Tensor]:
    """Run a captured (not lowered) program on one device: what its lowered form must reproduce."""
    env: dict[fx.Node, Any] = {}
    uses = {node: len(node.users) for node in program.graph.nodes}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = inputs[node.name]
            continue
        if node.op == "output":
            return [env[n] for n in _nodes(node)]
        if node.op == "get_attr":
            env[node] = program.constants[str(node.target)]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            # capture drops copies that only made a tensor dense: what was a view may need one
            env[node] = torch.ops.aten.reshape.default(*args) if node.target in _VIEWS else node.target(*args, **kwargs)
        if observe:
            observe(node, env[node])
        for arg in node.all_input_nodes:
            uses[arg] -= 1
            if not uses[arg]:
                del env[arg]
    return []


def no_grad_run(*args: Any, **kwargs: Any) -> list[list[Tensor]]:
    """`run` without autograd."""
    with torch.no_grad():
        return run(*args, **kwargs)
