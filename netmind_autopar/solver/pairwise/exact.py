"""The integer program over some strategies of every node, rows of memory added as they are violated.

A binary variable per strategy, a continuous one per possible pair of a table, whose sums over rows and columns are the strategies'
(the local marginal polytope); nodes with one strategy are constants.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import milp
from .field import Field

Keep = Sequence[np.ndarray]  # per node the strategies that may be taken


@dataclass(frozen=True)
class Found:
    """The best choice that fits, or None; its cost; what no choice within the strategies can be below; prices of moments (relaxed)."""

    choice: list[int] | None
    cost: float
    bound: float
    prices: dict[int, float]
    moments: tuple[int, ...]
    status: str
    fractional: np.ndarray | None = None  # flat, of the relaxation


def pairs(field: Field, keep: Keep) -> int:
    """How many pairs the program over `keep` has variables for."""
    return sum(len(keep[i]) * len(keep[j]) for i, j in field.problem.edges if min(len(keep[i]), len(keep[j])) > 1)


class Program:
    """The integer program; `row` adds a moment, `solve` and `relax` run it."""

    def __init__(self, field: Field, keep: Keep) -> None:
        self.field, self.keep = field, keep
        own = [field.costs[field.offset[i] + ks] for i, ks in enumerate(keep)]
        own = [c.copy() for c in own]
        self.constant, self.moments = field.fixed, set[int]()
        self.rows_of: dict[int, int] = {}
        tables = []
        for (i, j), table in zip(field.problem.edges, field.problem.tables, strict=True):
            part = table[np.ix_(keep[i], keep[j])]
            if part.shape[0] == 1:
                own[j] += part[0]
            elif part.shape[1] == 1:
                own[i] += part[:, 0]
            else:
                tables.append((i, j, part))
        finite = [float(a[np.isfinite(a)].max(initial=0.0)) for a in (*own, *(part for _, _, part in tables))]
        self.scale = max(max(finite, default=0.0) / 1e4, 1e-12)
        self.model = milp.Model()
        self.x: list[list[int]] = []
        self.position: list[tuple[int, int]] = []  # (variable, flat position)
        for i, (ks, cost) in enumerate(zip(keep, own, strict=True)):
            if len(ks) == 1:
                self.constant += float(cost[0])
                self.x.append([])
                continue
            vars_ = [self.model.var(self._price(c), binary=True) for c in cost]
            self.model.row(dict.fromkeys(vars_, 1.0), 1.0, 1.0)
            for v, k, c in zip(vars_, ks, cost, strict=True):
                self.position.append((v, int(field.offset[i] + k)))
                if not math.isfinite(c):
                    self.model.row({v: 1.0}, 0.0, 0.0)
            self.x.append(vars_)
        for i, j, part in tables:
            self._table(i, j, part)
        self.settled = np.zeros(field.size)
        for i, ks in enumerate(keep):
            if len(ks) == 1:
                self.settled[field.offset[i] + ks[0]] = 1.0

    def _price(self, cost: float) -> float:
        return float(cost) / self.scale if math.isfinite(cost) else 0.0

    def _table(self, i: int, j: int, part: np.ndarray) -> None:
        rows: list[dict[int, float]] = [{v: -1.0} for v in self.x[i]]
        cols: list[dict[int, float]] = [{v: -1.0} for v in self.x[j]]
        for a, b in np.argwhere(np.isfinite(part)):
            y = self.model.var(float(part[a, b]) / self.scale)
            rows[a][y] = cols[b][y] = 1.0
        for row in (*rows, *cols):
            self.model.row(row, 0.0, 0.0)

    def row(self, moment: int) -> None:
        """Memory at one moment within the limit."""
        use, limit = self.field.row(moment), self.field.limit
        spent = float(use @ self.settled) + float(self.field.base[moment])
        self.moments.add(moment)
        terms = {v: float(use[at]) / limit for v, at in self.position if use[at]}
        self.rows_of[moment] = len(self.model.rows)
        self.model.row(terms or {self.position[0][0]: 0.0}, -math.inf, 1.0 - spent / limit)

    def flat(self, values: np.ndarray) -> np.ndarray:
        out = self.settled.copy()
        for v, at in self.position:
            out[at] = values[v]
        return out

    def read(self, values: np.ndarray) -> list[int]:
        return [int(ks[0]) if not vars_ else int(ks[int(np.argmax(values[vars_]))]) for ks, vars_ in zip(self.keep, self.x, strict=True)]


def run(field: Field, keep: Keep, moments: Iterable[int], deadline: float, *, gap: float, relax_only: bool = False) -> Found:
    """Relax, adding violated moments; then, unless `relax_only`, the same with whole numbers. `deadline`: of time.monotonic()."""
    program = Program(field, keep)
    if not program.position:  # every node is decided
        choice = [int(ks[0]) for ks in keep]
        fits = float(field.profile(field.chosen(choice)).max(initial=0.0)) <= field.limit
        cost = field.cost(choice)
        return Found(choice if fits else None, cost, cost if fits else math.inf, {}, (), milp.OPTIMAL if fits else milp.INFEASIBLE)
    for m in sorted(moments) if field.limit < math.inf else ():
        program.row(m)
    relaxed, prices, flat = _relax(field, program, deadline)
    if relaxed.status == milp.INFEASIBLE:
        return Found(None, math.inf, math.inf, {}, tuple(program.moments), milp.INFEASIBLE)
    bound = program.constant + relaxed.bound * program.scale if relaxed.values is not None else -math.inf
    if relax_only or relaxed.values is None:
        return Found(None, math.inf, bound, prices, tuple(program.moments), milp.UNKNOWN, flat)
    return _whole(field, program, bound, prices, deadline, gap)


def _relax(field: Field, program: Program, deadline: float, rounds: int = 20) -> tuple[milp.Result, dict[int, float], np.ndarray | None]:
    flat, prices = None, {}
    for _ in range(rounds):
        result = milp.solve(program.model, time_limit=max(deadline - time.monotonic(), 1.0), gap=0.0, relax=True)
        if result.values is None or result.duals is None:
            return result, prices, flat
        flat = program.flat(result.values)
        duals = {m: float(result.duals[r]) * program.scale / field.limit for m, r in program.rows_of.items()}
        prices = {m: price for m, price in duals.items() if price > 0}
        fresh = field.peaks(field.profile(flat), program.moments) if field.limit < math.inf else []
        if not fresh or time.monotonic() > deadline:
            break
        for m in fresh:
            program.row(m)
    return result, prices, flat


def _whole(field: Field, program: Program, bound: float, prices: dict[int, float], deadline: float, gap: float) -> Found:
    for _ in range(12):
        result = milp.solve(program.model, time_limit=max(deadline - time.monotonic(), 1.0), gap=gap)
        moments = tuple(program.moments)
        if result.status == milp.INFEASIBLE:
            return Found(None, math.inf, math.inf, prices, moments, milp.INFEASIBLE)
        if result.bound > -math.inf:
            bound = max(bound, program.constant + result.bound * program.scale)
        if result.values is None:
            return Found(None, math.inf, bound, prices, moments, milp.UNKNOWN)
        choice = program.read(result.values)
        profile = field.profile(field.chosen(choice))
        fresh = field.peaks(profile, program.moments) if field.limit < math.inf else []
        if not fresh and float(profile.max(initial=0.0)) <= field.limit:
            return Found(choice, field.cost(choice), bound, prices, moments, result.status)
        if not fresh or time.monotonic() > deadline:
            break
        for m in fresh:
            program.row(m)
    return Found(None, math.inf, bound, prices, moments, milp.UNKNOWN)
