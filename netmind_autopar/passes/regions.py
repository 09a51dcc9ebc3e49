"""Which runs of ops a compiler may turn into one function each: everything between two places where something travels.

A collective, its start and its wait, transfers to other memory, and gradients that meet what waits of them stay lines of the emitted
file, in the order that `schedule_collectives` gave them; whatever stands between two of them is a *region*. So nothing is moved across a
start or a wait, and what is kept for backward, run again or sent away stays as planned. Ops of a region may be fused and reordered among
themselves: they are functions of the region's inputs alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ..costs.compute import FREE, short_name
from ..ir.program import is_getitem, source, tensor_args
from ..runtime.collectives import LOCAL_KINDS, MOVES

LEAST = 2  # ops that take time: with fewer there is nothing to fuse


@dataclass
class Region:
    """Ops that become one function, in order. takes: what they need from before; gives: what others need of them."""

    nodes: list[fx.Node] = field(default_factory=list)
    takes: tuple[fx.Node, ...] = ()
    gives: tuple[fx.Node, ...] = ()

    @property
    def ops(self) -> int:
        """How many of them take time."""
        return sum(map(_is_work, self.nodes))


def split_regions(body: Sequence[fx.Node], kept: Collection[fx.Node]) -> Iterator[fx.Node | Region]:
    """The ops of one function in order, runs of them as regions; a run with fewer than `LEAST` ops that take time stays as it is.

    kept: what the function gives away. An op's outputs are taken apart where it stands; constants are looked up before a region.
    """
    places: list[fx.Node | Region] = []
    home: dict[fx.Node, Region] = {}
    current: Region | None = None
    for node in body:
        if is_getitem(node) and node.args[0] in home:
            region = home[node.args[0]]  # type: ignore[index]
        elif node.op == "get_attr":
            places.insert(len(places) - (current is not None), node)
            continue
        elif not _is_pure(node):
            current = None
            places.append(node)
            continue
        else:
            if current is None:
                current = Region()
                places.append(current)
            region = current
        region.nodes.append(node)
        home[node] = region
    everything = set(body)
    for place in places:
        if isinstance(place, Region) and place.ops >= LEAST:
            _close(place, kept, everything)
            yield place
        elif isinstance(place, Region):
            yield from place.nodes
        else:
            yield place


def _close(region: Region, kept: Collection[fx.Node], body: Collection[fx.Node]) -> None:
    """Note what a region takes and gives; what only another phase of the step takes is `kept`, or nobody's business."""
    inside = set(region.nodes)
    region.takes = tuple(dict.fromkeys(a for n in region.nodes for a in tensor_args(n) if a not in inside))
    others = {n for n in region.nodes if n in kept or any(u in body and u not in inside for u in n.users)}
    region.gives = tuple(n for n in region.nodes if n in others and not _is_tuple(n))


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], (tuple, list))


def _is_pure(node: fx.Node) -> bool:
    """A function of tensors that are here: an op of a library, or a move that sends nothing."""
    if is_getitem(node):
        return _is_pure(source(node)[0])
    if node.target in MOVES:
        return node.args[1] in LOCAL_KINDS
    return isinstance(node.target, torch._ops.OpOverload)


def _is_work(node: fx.Node) -> bool:
    return not is_getitem(node) and short_name(node) not in FREE
