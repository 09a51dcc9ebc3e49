"""From samples to a profile: curves through what was measured, and how far they lie from what they have not seen.

The prices that are judged are those of the planner: every case is captured as a model is, and `OpCost` says what its amount is and
what a curve predicts. Residuals: the points are dealt into four parts, drawn by the seed, and curves through three of them predict the
fourth. The first and the last point of a series are always fitted, for nothing is claimed beyond them. The profile's own
curves go through all points.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..costs.compute import OpCost, op_cost
from ..costs.curves import THIN, interpolate, make, slower
from ..costs.space import MESSAGES, sent_bytes
from ..ir.mesh import Axis, Curve, Device, Mesh
from ..ir.program import source
from ..rules.bind import bind_program
from ..tracer.capture import capture
from .cases import OPS, Case, pool_for, tensors
from .measure import elements

BINS = 2  # per factor of two: amounts that are closer are one point
ANCHOR = 128  # a matmul whose smallest dim is this large is not thin
SWEEPS = 4
FOLDS = 4


@dataclass(frozen=True)
class Point:
    """One measured case with what the planner sees in it: seconds are one number, amount is operations or bytes."""

    case: str
    cost: OpCost
    amount: float
    seconds: float
    dims: tuple[int, ...] = ()  # a matmul's rows, columns, inner dim

    @property
    def series(self) -> tuple[str, str, str]:
        """Points that one curve goes through: class, op, dtype."""
        return self.cost.kind, "" if self.cost.matmul else self.cost.op, self.cost.dtype


class _Calls(nn.Module):
    """All cases as one model."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, at = [], 0
        for case in self.cases:
            count = len(OPS[case.op].shapes(*case.sizes))
            made = OPS[case.op].call(*given[at : at + count])
            out.append(made[0] if isinstance(made, tuple | list) else made)
            at += count
        return tuple(out)


def costs_of(cases: Sequence[Case]) -> dict[str, OpCost]:
    """What the planner sees in every case; cases that are not captured as one op are left out."""
    pool = pool_for(cases, torch.device("meta"))
    given = tuple(t for case in cases for t in tensors(case, pool))
    program = capture(_Calls(cases), given, mode="inference")
    rules = bind_program(program)
    results = next(n for n in program.graph.nodes if n.op == "output").args[0]
    found = {}
    for case, leaf in zip(cases, results, strict=True):
        node, _ = source(leaf)
        below = [source(a)[0] for a in node.all_input_nodes]
        costs = [op_cost(n, rules[n.name]) for n in (node, *below) if n.op == "call_function"]
        paying = [c for c in costs if c.kind]
        if len(paying) == 1 and node.name in rules:
            found[str(case)] = paying[0]
    return found


def points_of(costs: Mapping[str, OpCost], seconds: Mapping[str, float]) -> list[Point]:
    """The cases that were both captured and measured."""
    out = []
    for name, cost in costs.items():
        if name in seconds:
            dims = [math.prod(cost.sizes[letter] for letter in letters) for letters in cost.matmul or ()]
            amount = cost.flops or float(cost.moved_bytes())
            out.append(Point(name, cost, amount, seconds[name], tuple(dims)))
    return out


def curves_of(points: Iterable[Point]) -> tuple[Curve, ...]:
    """Curves of every op, and of every class from all of its ops."""
    series: dict[tuple[str, str], list[Point]] = {}
    matmuls: dict[str, list[Point]] = {}
    for p in points:
        if p.cost.matmul:
            matmuls.setdefault(p.cost.dtype, []).append(p)
        else:
            for name in (p.cost.op, p.cost.kind):
                series.setdefault((name, p.cost.dtype), []).append(p)
    out = [_curve(name, dtype, [(p.amount, p.seconds) for p in found]) for (name, dtype), found in sorted(series.items())]
    for dtype, found in sorted(matmuls.items()):
        out += _matmul_curves(dtype, found)
    return tuple(out)


def _curve(kind: str, dtype: str, pairs: Iterable[tuple[float, float]]) -> Curve:
    """One point per bin of amounts: the geometric means of those in it."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for amount, seconds in pairs:
        bins.setdefault(round(BINS * math.log2(amount)), []).append((math.log(amount), math.log(seconds)))
    points = [tuple(math.exp(statistics.fmean(column)) for column in zip(*found, strict=True)) for found in bins.values()]
    return make(kind, dtype, tuple((a, s) for a, s in points))


def _matmul_curves(dtype: str, points: Sequence[Point]) -> list[Curve]:
    """Seconds over operations, and how many times slower thin ones are: each found with the other held, in turn."""
    thin = [Curve(kind, dtype, ((ANCHOR, 1.0),)) for kind in THIN]
    curve = Curve("matmul", dtype, ())
    for _ in range(SWEEPS):
        plain = [p for p in points if _is_plain(p)] or points
        factors = [float(slower(thin, [np.array(n) for n in p.dims])) for p in plain]
        curve = _curve("matmul", dtype, [(p.amount, p.seconds / f) for p, f in zip(plain, factors, strict=True)])
        for way, kind in enumerate(THIN):
            ratios: dict[int, list[float]] = {}
            for p in points:
                # of a matmul that is thin in two ways nobody knows which one costs
                if p.dims[way] < ANCHOR and all(n >= 2 * p.dims[way] for i, n in enumerate(p.dims) if i != way):
                    ratios.setdefault(round(math.log2(p.dims[way])), []).append(p.seconds / interpolate(curve.points, p.amount))
            found = sorted((2.0**e, max(1.0, statistics.median(r))) for e, r in ratios.items() if 2**e < ANCHOR)
            thin[way] = Curve(kind, dtype, (*found, (float(ANCHOR), 1.0)))
    return [curve, *thin]


def _is_plain(point: Point) -> bool:
    """Whether a matmul tells what its operations cost: one matrix, not thin."""
    return point.cost.op == "mm" and (min(point.dims) >= ANCHOR // 4 or max(point.dims) <= 2 * min(point.dims))


def with_curves(device: Device, points: Iterable[Point]) -> Device:
    return replace(device, curves=curves_of(points))


def predicted(device: Device, cost: OpCost) -> float:
    """The planner's seconds of a case on one device."""
    return float(cost.seconds([("-",)], Mesh((Axis("a", 1),), device))[0])


def splits(series: Mapping[Any, Sequence[tuple[float, Any]]], seed: int) -> list[tuple[list[Any], list[Any]]]:
    """Ways to split all series into what is fitted and what is judged: every inner item is judged once. A series is a list of
    (amount, item)."""
    ends: list[Any] = []
    parts: list[list[Any]] = [[] for _ in range(FOLDS)]
    draw = random.Random(seed)
    for key in sorted(series, key=str):
        items = [item for _, item in sorted(series[key], key=lambda pair: (pair[0], str(pair[1])))]
        ends += items[:1] + items[-1:]
        inner = items[1:-1]
        draw.shuffle(inner)
        for i, item in enumerate(inner):
            parts[i % FOLDS].append(item)
    return [(ends + [x for other in parts if other is not part for x in other], part) for part in parts]


def residuals(errors: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The median and the 90th percentile of absolute relative errors, by kind."""
    return [
        {"kind": kind, "points": len(found), "median": float(np.median(found)), "p90": float(np.quantile(found, 0.9))}
        for kind, found in errors.items()
        if found
    ]


def op_errors(device: Device, points: Sequence[Point], seed: int) -> dict[str, list[float]]:
    """Relative errors of points that a fit had not seen, by class of op, and all together as "compute"."""
    series: dict[tuple, list[tuple[float, Point]]] = {}
    for p in points:
        series.setdefault(p.series, []).append((p.amount, p))
    errors: dict[str, list[float]] = {"compute": []}
    for fitted, judged in splits(series, seed):
        part = with_curves(device, fitted)
        for p in judged:
            error = abs(predicted(part, p.cost) / p.seconds - 1)
            errors["compute"].append(error)
            errors.setdefault(p.cost.kind, []).append(error)
    return errors


Sent = dict[tuple[str, int], list[tuple[float, float]]]


def sent_points(seconds: Mapping[str, float]) -> Sent:
    """(collective, group) → [(bytes that one device sends, seconds)], from names like "all_gather 2 4096"."""
    out: Sent = {}
    for name, value in seconds.items():
        kind, group, asked = name.split()
        n, before = int(group), 4 * elements(kind, int(group), int(asked))
        after, kept = np.int64(before // n), before // n if kind == "all_to_all" else 0
        sent = before if kind == "send" else int(sent_bytes(kind, n, np.int64(before), after, kept))
        out.setdefault((kind, n), []).append((float(sent), value))
    return {key: sorted(pairs) for key, pairs in sorted(out.items())}


def link_curves(sent: Sent) -> list[tuple[int, Curve]]:
    """One curve per collective and size of group."""
    return [(group, _curve(kind, "", pairs)) for (kind, group), pairs in sent.items()]


def link_errors(sent: Sent, seed: int) -> dict[str, list[float]]:
    """Relative errors of collectives that a fit had not seen, by kind, and all together as "communication"."""
    errors: dict[str, list[float]] = {"communication": []}
    for key, pairs in sent.items():
        for fitted, judged in splits({key: [(amount, (amount, s)) for amount, s in pairs]}, seed):
            points = _curve(key[0], "", fitted).points
            for amount, s in judged:
                error = abs(interpolate(points, amount) / s - 1)
                errors["communication"].append(error)
                errors.setdefault(key[0], []).append(error)
    return errors


def alpha_beta(sent: Sent) -> tuple[float, float]:
    """(latency of a message, bytes/s), for what has no curve: medians over the collectives of the shortest time and the best rate."""
    latency = [pairs[0][1] / (MESSAGES[kind] * (n - 1)) for (kind, n), pairs in sent.items() if kind in MESSAGES]
    rate = [max(amount / s for amount, s in pairs) for (kind, _), pairs in sent.items() if kind in MESSAGES]
    return statistics.median(latency), statistics.median(rate)
