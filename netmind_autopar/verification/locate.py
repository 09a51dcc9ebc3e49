"""The first operation that differs: every value of every rank against the captured graph's, in the order of the graph.

A value that is a small rest of large terms (the gradient of a key's bias, say) differs from rank to rank by rounding alone. So an
op is blamed only for more than its own *noise*: what becomes of the captured op's result when its inputs are off by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.mesh import coordinates
from ..ir.program import Program, is_getitem, op_name, source, tensor_args
from ..ir.spec import Partial, Replicate, Shard, Spec, shard
from ..runtime import simulate
from ..runtime.collectives import BUCKETS, MOVES, STARTS, sender
from ..runtime.offload import offload, prefetch, release
from .judge import distance, magnitude, rank_errors, tolerance, wholes, worst
from .sides import State, ranks


@dataclass(frozen=True)
class Difference:
    """Where ranks leave the right path. node: in the lowered graph; origin: the captured op whose value is wrong.

    what: the op, or the collective with its axis; where: the user's line; ranks: those that are wrong; error: the largest relative
    one; trouble: the message when it raised instead. `index` is the output of `origin` that is wrong.
    """

    node: str
    origin: str
    what: str
    spec: str
    where: str
    module: str
    ranks: tuple[int, ...]
    error: float
    index: int = 0
    trouble: str = ""
    expected: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)  # per rank, terms combined
    found: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        what = self.origin if self.what == self.origin or self.what.startswith(("aten.", "autopar.")) else f"{self.what} of {self.origin}"
        outcome = f"raised {self.trouble}" if self.trouble else f"relative error {self.error:.2g} on rank{_listed(self.ranks)}"
        return f"{what} ({self.spec}), {outcome}, at {self.where or 'an unknown line'}"


def _listed(numbers: Sequence[int]) -> str:
    return ("s " if len(numbers) > 1 else " ") + ", ".join(map(str, numbers))


def first_difference(program: Program, lowered: Program, sizes: tuple[int, ...], state: State) -> Difference | None:
    """The first difference beyond noise; None when every value of every rank is right."""
    truth: dict[str, Any] = dict(state)
    with torch.no_grad():
        results = simulate.reference(program, dict(state), lambda node, value: truth.__setitem__(node.name, value))
    suspects: list[tuple[fx.Node, str, int, Tensor, list[Tensor], Spec, tuple[int, ...]]] = []
    turns = Turns(lowered, sizes)
    reached: list[fx.Node] = []
    largest = max((magnitude(r) for r, o in zip(results, program.outputs, strict=True) if o.role == "grad"), default=0.0)

    def observe(node: fx.Node, locals_: simulate.PerRank) -> None:
        reached.append(node)
        if node.target in (offload, release, prefetch, *STARTS):  # what they give is no tensor
            return
        joined = sender(source(node)[0]).target in BUCKETS
        if node.op == "call_function" and joined == is_getitem(node):
            for origin, index, value, parts, spec in _pairs(node, locals_, lowered, truth):
                for ranks_, spec_, mesh in turns.together(node, index, parts, spec):
                    if _errors(value, ranks_, spec_, mesh, 0.01) is not None:
                        suspects.append((node, origin, index, value, ranks_, spec_, mesh))

    trouble, found = "", []
    try:
        found = ranks(lowered, sizes, state, observe)
    except Exception as error:
        trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    ends = next(n for n in lowered.graph.nodes if n.op == "output")
    for out, end, want, have, spec in zip(program.outputs, tensor_args(ends), results, found, lowered.results, strict=False):
        origin, index = source(program.node(out.node))
        suspects.append((end, origin.name, index, want, have, spec, sizes))
    for strictness in (1.0, 0.01):
        for node, origin, index, value, parts, spec, mesh in suspects:
            errors = _errors(value, parts, spec, mesh, strictness)
            if errors is not None and not _is_noise(program, origin, index, truth, value, parts, spec, mesh, largest):
                limit = strictness * tolerance(value.dtype)
                wrong = tuple(sorted({r % math.prod(sizes) for r, e in enumerate(errors) if not e <= limit}))
                report = _described(program, node, origin, index, str(spec), wrong, worst(errors))
                return replace(report, expected=tuple(_expected(value, spec, mesh)), found=tuple(_combined(parts, spec, mesh)))
    if trouble:
        order = [n for n in lowered.graph.nodes if n.op in ("call_function", "get_attr")]
        node = order[min(len(reached), len(order) - 1)]  # at the end: something is still on its way
        origin, index = origin_of(node, truth)
        return _described(program, node, origin, index, str(lowered.specs.get(node.name, "")), (), float("inf"), trouble)
    return None


class Turns:
    """What the micro-batches of a program make, seen as ranks of one more mesh axis, the outermost."""

    def __init__(self, lowered: Program, sizes: tuple[int, ...]) -> None:
        self.count, self.sizes = lowered.turns, sizes
        self.held: dict[tuple[fx.Node, int], list[Tensor]] = {}

    def together(self, node: fx.Node, index: int, parts: list[Tensor], spec: Spec) -> list[tuple[list[Tensor], Spec, tuple[int, ...]]]:
        """(local tensors, spec, mesh) of a value: at once without micro-batches, else when its last turn has come; else none."""
        if self.count == 1:
            return [(parts, spec, self.sizes)]
        held = self.held.setdefault((node, index), [])
        held += parts
        whole = _of_all_turns(node, index, spec, self.count)
        return [(held, whole, (self.count, *self.sizes))] if whole is not None and len(held) == self.count * len(parts) else []


def _of_all_turns(node: fx.Node, index: int, spec: Spec, count: int) -> Spec | None:
    """The spec of all micro-batches' values, the placement along them first; None where the dims are seen as other parts."""
    while "turn" not in node.meta:
        if is_getitem(node) and sender(source(node)[0]).target in BUCKETS:
            node = sender(source(node)[0]).args[0][source(node)[1]]  # type: ignore[index,assignment]
        elif node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return spec.with_placements([Replicate(), *spec.placements])
    found = node.meta["turn"]
    (placement,) = (found[index] if isinstance(found, tuple) else found).placements
    dims = [list(parts) for parts in spec.dims]
    if isinstance(placement, Shard):
        if placement.part >= len(dims[placement.dim]):
            return None
        dims[placement.dim][placement.part] *= count
    return Spec(tuple(map(tuple, dims)), spec.dtype, (placement, *spec.placements))


def _described(
    program: Program, node: fx.Node, origin: str, index: int, spec: str, wrong: tuple[int, ...], error: float, trouble: str = ""
) -> Difference:
    sent = sender(source(node)[0])
    if sent.target in MOVES:
        what = f"{sent.args[1]} over axis {sent.args[2]}"
    elif sent.target in BUCKETS:
        what = f"bucketed all_reduce over axis {sent.args[1]}"
    else:
        what = op_name(node) if node.op == "call_function" else f"{node.name}, given instead"
    made: dict[str, Any] = next((n.meta for n in program.graph.nodes if n.name == origin), {})
    where, module = (str(node.meta.get(key) or made.get(key) or "") for key in ("where", "module"))
    return Difference(node.name, origin, what, spec, where, module, wrong, error, index, trouble)


def _pairs(
    node: fx.Node, locals_: simulate.PerRank, lowered: Program, truth: Mapping[str, Any]
) -> list[tuple[str, int, Tensor, list[Tensor], Spec]]:
    """(origin, index, true global value, local values, spec) of every tensor that a lowered node gives."""
    origin, index = origin_of(node, truth)
    value = truth.get(origin)
    if value is None:
        return []
    spec: Any = lowered.specs[source(node)[0].name]
    if is_getitem(node):  # of a bucket
        spec = spec[source(node)[1]]
    if isinstance(spec, Spec):
        return [(origin, index, value[index] if isinstance(value, (tuple, list)) else value, list(locals_), spec)]
    return [
        (origin, k, v, [t[k] for t in locals_], s)
        for k, (v, s) in enumerate(zip(value, spec, strict=True))
        if isinstance(v, Tensor) and s is not None
    ]


def origin_of(node: fx.Node, known: Mapping[str, Any]) -> tuple[str, int]:
    """The op of the captured graph (or placeholder) whose value a lowered node carries: moves, buckets and copies are looked through."""
    index = 0
    while True:
        if is_getitem(node):
            producer, position = source(node)
            if sender(producer).target in BUCKETS:
                node = sender(producer).args[0][position]  # type: ignore[index,assignment]
                continue
            node, index = producer, position
        if node.meta.get("again") in known:  # runs again in backward what its original did
            return node.meta["again"], index
        if node.meta.get("piece"):  # of a value that the captured graph makes in another way: it has none like it
            return node.meta["piece"], index
        if node.name in known or not node.args or not isinstance(node.args[0], fx.Node):
            return node.name, index
        node = node.args[0]


def _expected(value: Tensor, spec: Spec, sizes: tuple[int, ...]) -> list[Tensor]:
    whole = spec.with_placements(Replicate() if isinstance(p, Partial) else p for p in spec.placements)
    return [shard(value, whole, sizes, c) for c in coordinates(sizes)]


def _combined(parts: list[Tensor], spec: Spec, sizes: tuple[int, ...]) -> list[Tensor]:
    """Every rank's tensor with terms combined; as they are when their shapes do not fit each other."""
    try:
        return wholes(parts, spec, sizes)[0]
    except RuntimeError:
        return parts


def _errors(value: Tensor, parts: list[Tensor], spec: Spec, sizes: tuple[int, ...], strictness: float) -> list[float] | None:
    """Errors per rank when any is above `strictness` tolerances, else None."""
    try:
        errors = rank_errors(value, parts, spec, sizes)
    except RuntimeError:  # terms of unlike shapes
        errors = [float("inf")] * len(parts)
    return errors if not worst(errors) <= strictness * tolerance(value.dtype) else None


def _is_noise(
    program: Program,
    origin: str,
    index: int,
    truth: Mapping[str, Any],
    value: Tensor,
    parts: list[Tensor],
    spec: Spec,
    sizes: tuple[int, ...],
    largest: float,
) -> bool:
    """True when the value is no further off than the captured op itself would be with inputs that are off by rounding."""
    node = program.node(origin)
    if node.op != "call_function" or not (value.is_floating_point() or value.is_complex()):
        return False
    pieces = _expected(value, spec, sizes)
    if any(p.shape != t.shape for p, t in zip(pieces, parts, strict=True)) or not torch.isfinite(value).all():
        return False
    generator = torch.Generator().manual_seed(0)

    def shaken(n: fx.Node) -> Any:
        producer, at = source(n)
        v = truth[producer.name]
        v = v[at] if isinstance(v, (tuple, list)) else v
        if not (isinstance(v, Tensor) and v.is_floating_point()):
            return v
        draw = torch.rand(v.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        return v * (1 + (0.1 * tolerance(v.dtype) * draw).to(v.dtype))

    with torch.no_grad():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), shaken)
        again = node.target(*args, **kwargs)  # type: ignore[operator]
    again = again[index] if isinstance(again, (tuple, list)) else again
    noise = distance(value, again)
    combined, _ = wholes(parts, spec, sizes)
    off = max(distance(p, t) for p, t in zip(pieces, combined, strict=True))
    return off <= 3 * noise or (node.meta.get("phase") == "backward" and off < 1e-3 * tolerance(value.dtype) * largest)
