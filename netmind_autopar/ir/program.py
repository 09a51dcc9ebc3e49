"""The captured computation: one FX graph of ATen ops for forward and backward together, and what its ends mean.

A node's facts are in `node.meta`, written once at capture and never decided upon:

    val      the fake tensor (or tuple of them) with *global* shape
    where    "model.py:41  x = self.fc(x)", the user's own line, or ""
    module   "transformer.h.0.attn", or ""
    phase    "forward" or "backward"

Passes put an op's shardings beside the graph, in `specs` (what a node produces) and `expects` (what it takes).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from .errors import GraphError
from .precision import Precision
from .spec import Spec


@dataclass(frozen=True)
class Input:
    """A placeholder. role: "param", "buffer", "input" (the user's), "tangent" (d loss / d output `index`) or "seed".

    `name` is the parameter's or buffer's qualified name, the path of the user's argument, or the output's path.
    """

    node: str
    role: str
    name: str
    index: int = -1


@dataclass(frozen=True)
class Output:
    """A result. role: "output" (the user's leaf `index`), "mutation" (new value of buffer `name`) or "grad".

    A gradient has name and index of its `Input`: a parameter's index is -1, so an input may be called like a parameter. In inference
    a mutation may also be of an input, whose name and index it has: the model wrote into it, as into a cache.
    """

    node: str
    role: str
    name: str
    index: int = -1


@dataclass(frozen=True)
class Signature:
    """How the user calls the model. `pack` turns (args, kwargs) into the list of tensors of role "input", `unpack` turns
    the list of tensors of role "output" into what the model returns, `rebuild` makes (args, kwargs) around other tensors; all are pure."""

    pack: Callable[[tuple, dict], list[torch.Tensor]]
    unpack: Callable[[list[Any]], Any]
    rebuild: Callable[[list[torch.Tensor]], tuple[tuple, dict[str, Any]]]


@dataclass(frozen=True)
class Unfused:
    """`count` sites of the user's line `where` that a fused op would fit but for `why`; `fusion` is its name."""

    fusion: str
    where: str
    why: str
    count: int


@dataclass(frozen=True)
class Micro:
    """The program is one of `count` micro-batches, run one after the other with gradients added up.

    joins: what each output of the step is made of: "sum" or "same" of the micro-batches, or "cat:0", joined along dim 0.
    graph_hash: of the program for the whole batch.
    """

    count: int
    joins: tuple[str, ...]
    graph_hash: str


class Taken(NamedTuple):
    """What a call takes: `nodes` in the order of the call, one entry per occurrence; `rest` is everything else, as text."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]
    rest: str


@dataclass(frozen=True)
class Program:
    """`constants` are the tensors that `get_attr` nodes name. `tied` maps a second name of a parameter to its first."""

    graph: fx.Graph
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    signature: Signature
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    specs: Mapping[str, Spec | tuple[Spec | None, ...]] = field(default_factory=dict)
    expects: Mapping[str, tuple[Spec, ...]] = field(default_factory=dict)
    mode: str = "training"  # or "inference": forward alone, no tangents and no gradients
    micro: Micro | None = None
    fused: bool = False  # fused ops were put in the places of what they compute
    unfused: tuple[Unfused, ...] = ()  # and where that nearly was so
    precision: Precision | None = None  # the policy that wrote casts into it
    owned: bool = False  # nobody else holds the graph: `edit` changes it in place

    @property
    def turns(self) -> int:
        """How often the program runs in a step."""
        return self.micro.count if self.micro else 1

    @property
    def results(self) -> tuple[Spec, ...]:
        """How the results of a whole step lie, of a lowered program."""
        specs = self.expects["output"]
        if self.micro is None:
            return specs
        return tuple(_joined(spec, join, self.turns) for spec, join in zip(specs, self.micro.joins, strict=True))

    @contextmanager
    def edit(self) -> Iterator[Draft]:
        """A copy to change; the program itself stays as it is, unless it is `owned`. Read `draft.program` after the block."""
        draft = Draft(self)
        yield draft
        if not self.owned:
            draft.graph.lint()
        draft.program = replace(self, graph=draft.graph, specs=draft.specs, expects=draft.expects)

    def copied(self) -> Program:
        """A copy whose graph nobody else holds: every edit changes it, so that many edits cost one copy. Check it after each."""
        draft = Draft(self)
        return replace(self, graph=draft.graph, specs=draft.specs, expects=draft.expects, owned=True)

    def node(self, name: str) -> fx.Node:
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise GraphError(f"no node {name!r} in the graph")

    def owner(self, item: Output) -> Input:
        """The parameter or input that a gradient, or an input's new value, belongs to. Two may share a name, not an index too."""
        return self._owners[item.name, item.index]

    @functools.cached_property
    def _owners(self) -> dict[tuple[str, int], Input]:
        return {(i.name, i.index): i for i in reversed(self.inputs) if i.role in ("param", "input")}

    def taken(self, node: fx.Node) -> Taken:
        """`taken_by`, looked up where it is known and still true."""
        known = self._taken.get(node)
        if known is None or known.args is not node.args or known.kwargs is not node.kwargs:
            known = self._taken[node] = taken_by(node)
        return known

    @functools.cached_property
    def _taken(self) -> dict[fx.Node, Taken]:
        return {}

    def placeholders(self) -> dict[str, Input]:
        return {item.node: item for item in self.inputs}


class Draft:
    """A program being edited: its own copy of the graph (node names kept; the graph itself of a program that is `owned`), and of the
    specs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph if program.owned else _copy(program.graph)
        self.specs = dict(program.specs)
        self.expects = dict(program.expects)


def _copy(graph: fx.Graph) -> fx.Graph:
    out, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        copies[node] = out.node_copy(node, lambda n: copies[n])
        if copies[node].name != node.name:
            raise GraphError(f"copying the graph renamed {node.name!r} to {copies[node].name!r}")
    return out


def _joined(spec: Spec, join: str, count: int) -> Spec:
    """The spec of a result that is made of `count` such ones; a dim along which they are joined is one part."""
    if not join.startswith("cat:"):
        return spec
    at = int(join[4:])
    return replace(spec, dims=tuple(tuple(n * count for n in parts) if d == at else parts for d, parts in enumerate(spec.dims)))


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments in the order of the call, one entry per occurrence."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found


def taken_by(node: fx.Node) -> Taken:
    """What a node takes. Two calls of one op with equal `rest`, on equal tensors, are equal."""
    found: list[fx.Node] = []
    rest = fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or _HOLE)  # type: ignore[arg-type,return-value]
    return Taken(node.args, node.kwargs, tuple(found), repr(rest))


class _Hole:
    def __repr__(self) -> str:
        return "%"


_HOLE = _Hole()


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def source(node: fx.Node) -> tuple[fx.Node, int]:
    """The node that really computes a value and the position of the value among its outputs."""
    if is_getitem(node):
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, 0


def values(node: fx.Node) -> tuple[torch.Tensor | None, ...]:
    """The (fake) tensors a node produces, global shapes; None where an output is switched off."""
    val = node.meta["val"]
    items = val if isinstance(val, (tuple, list)) else (val,)
    return tuple(v if isinstance(v, torch.Tensor) else None for v in items)


def op_name(node: fx.Node) -> str:
    """`aten.mm.default`, `autopar.attention.default`, or the plain name of a Python function."""
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
