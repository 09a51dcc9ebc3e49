"""Bugs that a compiler of this kind can have, planted into correct lowered programs.

A bug is a generator over the places of a program where it can sit. Each place is (the node that a developer would call wrong, a
function that plants it). Nothing here knows a model: places are found by op, move and role.

    for node, plant in BUGS["missing all-reduce"].places(draft, sizes): ...
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from netmind_autopar.ir.local import Local
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.program import Draft, Output, Program, is_getitem, op_name, source
from netmind_autopar.ir.spec import Partial, Shard, parse_spec
from netmind_autopar.passes.pipeline import spec_of
from netmind_autopar.runtime.collectives import bucket, move

aten, own = torch.ops.aten, torch.ops.autopar
Place = tuple[fx.Node, Callable[[], fx.Node | None]]
Places = Iterator[Place]


@dataclass(frozen=True)
class PerRank(Local):
    """An argument that is `value(sizes, coord)`, and where that is None what it was before."""

    value: Any = None
    before: Any = None

    def at(self, sizes: tuple[int, ...], coord: tuple[int, ...]) -> Any:
        found = self.value(sizes, coord)
        if found is None:
            return self.before.at(sizes, coord) if isinstance(self.before, Local) else self.before
        return found


def on_last(value: Any, before: Any) -> PerRank:
    """`value` on the last rank, `before` on the others."""
    return PerRank(
        "", "", value=lambda sizes, coord: value if all(c == n - 1 for c, n in zip(coord, sizes, strict=True)) else None, before=before
    )


def flag_on_last() -> PerRank:
    return on_last(True, False)


# Small surgery on a draft.


def after(draft: Draft, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Put `target(node, *args)` between a node and all who take it."""
    users = list(node.users)
    with draft.graph.inserting_after(node):
        made = draft.graph.create_node("call_function", target, (node, *args), name=f"{node.name}_bug")
    for user in users:
        user.replace_input_with(node, made)
    spec = spec_of(draft.specs, node)
    assert spec is not None
    made.meta, draft.specs[made.name], draft.expects[made.name] = dict(node.meta), spec, (spec,)
    made.meta["val"] = source(node)[0].meta["val"][source(node)[1]] if is_getitem(node) else node.meta["val"]
    return made


def before(draft: Draft, node: fx.Node, position: int, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Put `target(argument, *args)` before one tensor argument of a node, for this node alone."""
    arg = node.args[position]
    assert isinstance(arg, fx.Node)
    with draft.graph.inserting_before(node):
        made = draft.graph.create_node("call_function", target, (arg, *args), name=f"{node.name}_bug")
    node.update_arg(position, made)
    spec = spec_of(draft.specs, arg)
    assert spec is not None
    made.meta, draft.specs[made.name], draft.expects[made.name] = {**node.meta, "val": arg.meta["val"]}, spec, (spec,)
    return made


def moves(draft: Draft, *kinds: str) -> list[fx.Node]:
    return [n for n in draft.graph.nodes if n.target is move and n.args[1] in kinds]


def sums(draft: Draft, *kinds: str) -> list[fx.Node]:
    """Reductions of sums whose terms an op made: what a mask made lies on one rank alone, and its sum is easily right by chance."""

    def own_terms(node: fx.Node) -> bool:
        x, _, axis, a, _ = node.args
        maker = source(x)[0]
        split = any(isinstance(s.placements[axis], Shard) for s in draft.expects.get(maker.name, ()))
        return parse_spec(a).placements[axis] == Partial("sum") and maker.target is not move and split

    return [n for n in moves(draft, *kinds) if own_terms(n)]


def ops(draft: Draft, *names: str) -> list[fx.Node]:
    return [n for n in draft.graph.nodes if n.op == "call_function" and op_name(n).rsplit(".", 1)[0] in names]


def ends(draft: Draft, role: str) -> list[tuple[Output, fx.Node]]:
    """Results of one role, with the nodes that give them."""
    out = next(n for n in draft.graph.nodes if n.op == "output")
    return [(o, n) for o, n in zip(draft.program.outputs, tree_leaves(out.args), strict=True) if o.role == role]


def give(draft: Draft, end: Output, node: fx.Node) -> None:
    """Let another node be a result."""
    out = next(n for n in draft.graph.nodes if n.op == "output")
    leaves = list(tree_leaves(out.args))
    leaves[draft.program.outputs.index(end)] = node
    out.args = (tuple(leaves),)


def set_arg(node: fx.Node, name: str, change: Callable[[Any], Any]) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    i = names.index(name)
    if i < len(node.args):
        node.args = (*node.args[:i], change(node.args[i]), *node.args[i + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: change(node.kwargs.get(name))}


def arg_of(node: fx.Node, name: str) -> Any:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    i = names.index(name)
    return node.args[i] if i < len(node.args) else node.kwargs.get(name)


def varies(value: Any, sizes: tuple[int, ...]) -> bool:
    """True for an argument that differs from rank to rank."""
    return isinstance(value, Local) and len({str(value.at(sizes, c)) for c in coordinates(sizes)}) > 1


# What wrong programs compute.


def times(x: Tensor, factor: float) -> Tensor:
    return x * factor


def rolled(x: Tensor, shift: int, dim: int) -> Tensor:
    return torch.roll(x, shift, dim)


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous()


def coarse(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def zero_if(x: Tensor, here: bool) -> Tensor:
    return torch.zeros_like(x) if here else x


def plus_if(x: Tensor, here: bool, amount: int) -> Tensor:
    return x + amount if here else x


def last_lost(x: Tensor) -> Tensor:
    y = x.clone()
    y.reshape(-1)[-1] = 0
    return y


def in_pieces(x: Tensor, dim: int, half: bool, pieces: int, log: bool) -> Tensor:
    f = torch.log_softmax if log else torch.softmax
    return torch.cat([f(c, dim) for c in x.chunk(pieces, dim)], dim)


def piece(x: Tensor, dims: tuple[int, ...], part: int, start: int, length: int, shape: list[int]) -> Tensor:
    return x.reshape(dims).narrow(part, start, length).reshape(shape).contiguous()


def reread(x: Tensor, shape: list[int], dim: int) -> Tensor:
    """The view of the same size whose dims `dim` and `dim + 1` are read in the wrong order."""
    other = [*shape[:dim], shape[dim + 1], shape[dim], *shape[dim + 2 :]]
    return x.reshape(other).transpose(dim, dim + 1).contiguous()


def all_counted(count: Tensor, target: Tensor) -> Tensor:
    return torch.full_like(count, target.numel())


@dataclass(frozen=True)
class Bug:
    """`models`: where it is planted; `meshes`: on what; `count`: in how many places."""

    places: Callable[[Draft, tuple[int, ...]], Places]
    models: tuple[str, ...] = ("gpt2", "llama")
    meshes: tuple[str, ...] = ("a=4", "a=2,b=2")
    count: int = 2


def planted(lowered: Program, bug: Bug, sizes: tuple[int, ...], which: int) -> tuple[Program, fx.Node, list[str]] | None:
    """The program with the bug at its `which`-th place, the node at fault, and the names of its neighbourhood; None: no such place."""
    with lowered.edit() as draft:
        places = list(bug.places(draft, sizes))
        if which >= len(places):
            return None
        node, plant = places[which]
        near = _near(node)
        plant()
        draft.graph.eliminate_dead_code()
        near |= _near(node)
        names = {n.name for n in draft.graph.nodes}
        draft.specs = {k: v for k, v in draft.specs.items() if k in names}
    return draft.program, node, sorted(near)


def place_count(lowered: Program, bug: Bug, sizes: tuple[int, ...]) -> int:
    with lowered.edit() as draft:
        return len(list(bug.places(draft, sizes)))


def _near(node: fx.Node) -> set[str]:
    """The node, what it takes and who takes it; through buckets, moves and `getitem` as far as it goes."""
    found = {node.name}
    for direction in ("all_input_nodes", "users"):
        queue = [(n, 0) for n in getattr(node, direction)]
        while queue:
            n, far = queue.pop()
            if n.name in found and far:
                continue
            found.add(n.name)
            if n.target in (move, bucket, operator.getitem) or n.name.endswith("_bug"):
                queue += [(m, far + 1) for m in getattr(n, direction)]
    return found


def with_frozen_gradient(lowered: Program, name: str) -> Program:
    """The program hands out a gradient for a parameter that is frozen: an optimizer would move it."""
    holder = next(i for i in lowered.inputs if i.role == "param" and i.name == name)
    with lowered.edit() as draft:
        out = next(n for n in draft.graph.nodes if n.op == "output")
        node = next(n for n in draft.graph.nodes if n.name == holder.node)
        out.args = ((*tree_leaves(out.args), node),)
        draft.expects["output"] = (*draft.expects["output"], draft.specs[holder.node])  # type: ignore[assignment]
    return replace(draft.program, outputs=(*lowered.outputs, Output(holder.node, "grad", name)))


def with_baked_parameter(lowered: Program, name: str, value: Tensor) -> Program:
    """One parameter is a constant in the program: the value it had once."""
    holder = next(i for i in lowered.inputs if i.role == "param" and i.name == name)
    with lowered.edit() as draft:
        node = next(n for n in draft.graph.nodes if n.name == holder.node)
        with draft.graph.inserting_after(next(n for n in reversed(draft.graph.nodes) if n.op == "placeholder")):
            baked = draft.graph.get_attr("stale")
        baked.meta, draft.specs[baked.name] = dict(node.meta), draft.specs[node.name]
        node.replace_all_uses_with(baked)
    return replace(draft.program, constants={**lowered.constants, "stale": value})
