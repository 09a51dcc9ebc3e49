"""The integer program over some strategies of every node, rows of memory added as they are violated.

A binary variable x per strategy, a continuous one y per pair of a table, whose sums over rows and columns are the strategies'
(the local marginal polytope):

    minimise   Σ θ_i(k) x_ik + Σ θ_ij(k, l) y_ijkl + penalty · s
    subject to Σ_k x_ik = 1,   Σ_l y_ijkl = x_ik,   Σ_k y_ijkl = x_jl,   usage_t · x - s <= limit   for the moments t added so far

θ are the costs as messages have moved them, which changes no choice's cost and keeps the numbers small. s, one for all moments, keeps
the relaxation feasible whatever strategies it is given; whole solutions have s = 0 and no forbidden pair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import milp
from .field import Field
from .messages import Messages

Keep = Sequence[np.ndarray]  # per node the strategies that may be taken, ascending

SLACK = 1e-9  # of the limit: more than HiGHS' tolerance lets a row exceed
TOLERANCE = 1e-7  # of HiGHS, on every reduced cost
UNITS = 1e4  # rows of memory are in units of this part of the limit


@dataclass(frozen=True)
class Relaxed:
    """The relaxation's optimum within `keep`: its cost, x per strategy of all nodes (flat), prices of moments, and the elastic part s."""

    cost: float
    flat: np.ndarray
    prices: dict[int, float]
    over: float


@dataclass(frozen=True)
class Found:
    """The best choice that fits, or None; its cost; what no choice within the strategies can be below."""

    choice: list[int] | None
    cost: float
    bound: float
    status: str


def pairs(field: Field, sizes: np.ndarray) -> int:
    """How many pairs a program has variables for whose nodes have so many strategies."""
    a, b = sizes[field.ends[:, 0]], sizes[field.ends[:, 1]]
    return int((a * b)[np.minimum(a, b) > 1].sum())


class Program:
    """`row` adds a moment; `relax` and `whole` solve; `corrections` are the relaxation's messages."""

    def __init__(self, messages: Messages, keep: Keep, penalty: float, *, most: float = math.inf) -> None:
        """most: pairs that cost more above the messages' bound count as if they cost so much."""
        self.most, self.messages, self.field, self.keep, self.penalty = most, messages, messages.field, keep, penalty
        field = self.field
        self.sizes = np.array([len(k) for k in keep])
        self.begin = np.concatenate([[0], self.sizes.cumsum()])
        self.at = np.concatenate([field.offset[i] + k for i, k in enumerate(keep)])  # flat position per x
        self.moments: dict[int, int] = {}  # moment -> its row
        self.unit = max(self.field.limit, 1.0) / UNITS if self.field.limit < math.inf else 1.0
        self.banned: list[np.ndarray] = []  # variables of forbidden choices
        self.dead = False  # a pair that is both forbidden and decided
        self._build()

    def _build(self) -> None:
        field, begin, sizes, theta = self.field, self.begin, self.sizes, self.messages
        node, low, high = theta.reduced()
        own = (node - theta.memory)[self.at]
        count, height = len(own), field.n
        cost, index, value, length = [own], [np.arange(count)], [np.ones(count)], [sizes]
        for n, (e, table) in enumerate(zip(field.problem.edges, field.problem.tables, strict=True)):
            i, j = e
            a, b = int(sizes[i]), int(sizes[j])
            first, second = low[theta.low_at[n] : theta.low_at[n + 1]], high[theta.high_at[n] : theta.high_at[n + 1]]
            if theta.low[n] != i:
                first, second = second, first
            part = np.minimum(table[self.keep[i][:, None], self.keep[j]], theta.top) - first[self.keep[i]][:, None] - second[self.keep[j]]
            part = np.minimum(part, self.most)
            ban = field.forbidden[e][self.keep[i][:, None], self.keep[j]] if e in field.forbidden else None
            if min(a, b) == 1:
                own[begin[j] if a == 1 else begin[i] :][: max(a, b)] += part.ravel()
                if ban is not None and ban.any():
                    self.dead |= max(a, b) == 1
                    self.banned.append((begin[j] if a == 1 else begin[i]) + np.flatnonzero(ban.ravel()))
                continue
            pair = count + np.arange(a * b).reshape(a, b)
            count, height = count + a * b, height + a + b - 1
            cost.append(part.ravel())
            if ban is not None:
                self.banned.append(pair[ban])
            rows = np.concatenate([pair, begin[i] + np.arange(a)[:, None]], 1)
            cols = np.concatenate([pair.T, begin[j] + np.arange(b)[:, None]], 1)[:-1]  # the last one follows from the others
            index += [rows.ravel(), cols.ravel()]
            value += [np.tile(np.r_[np.ones(b), -1.0], a), np.tile(np.r_[np.ones(a), -1.0], b - 1)]
            length += [np.full(a, b + 1), np.full(b - 1, a + 1)]
        flat = np.concatenate(cost)
        self.slack, self.scale = count, max(float(np.abs(flat).max(initial=0.0)) / 1e4, 1e-12)
        upper = np.r_[np.ones(count), math.inf]
        self.live = milp.Live(np.r_[flat, self.penalty / UNITS] / self.scale, upper, field.fixed / self.scale)
        right = np.r_[np.ones(field.n), np.zeros(height - field.n)]
        self.live.rows(np.r_[0, np.concatenate(length).cumsum()], np.concatenate(index), np.concatenate(value), right, right)
        self.terms = field.n + len(field.problem.edges)

    def row(self, moment: int) -> None:
        """Memory at one moment within the limit."""
        use, unit = self.field.row(moment)[self.at], self.unit
        some = np.flatnonzero(use)
        self.moments[moment] = self.live.height
        high = (self.field.limit - self.field.base[moment]) / unit
        index, value = np.r_[some, self.slack], np.r_[use[some] / unit, -1.0]
        self.live.rows(np.array([0, len(index)]), index, value, np.array([-math.inf]), np.array([high]))

    def flat(self, values: np.ndarray) -> np.ndarray:
        out = np.zeros(self.field.size)
        out[self.at] = values[: len(self.at)]
        return out

    def relax(self, deadline: float, rounds: int = 20) -> Relaxed | None:
        """The optimum with fractions, moments added until none is violated or time is up. None: not solved in time."""
        out = None
        for _ in range(rounds):
            result = self.live.relax(deadline - time.monotonic())
            if result.values is None or result.duals is None:
                return out
            flat = self.flat(result.values)
            prices = {m: -float(result.duals[r]) * self.scale / self.unit for m, r in self.moments.items() if result.duals[r] < 0.0}
            out = Relaxed(result.objective * self.scale, flat, prices, float(result.values[self.slack]) / UNITS)
            fresh = self.field.peaks(self.field.profile(flat), self.moments, slack=(out.over + 1e-6) * UNITS * self.unit)
            if not fresh or time.monotonic() > deadline:
                break
            for m in fresh:
                self.row(m)
        return out

    def whole(self, deadline: float, *, gap: float, nodes: int | None = None, start: Sequence[int] | None = None) -> Found:
        """The best choice of whole strategies. gap: relative; nodes: branch at most this often; start: a choice within `keep`."""
        if self.dead:
            return Found(None, math.inf, math.inf, milp.INFEASIBLE)
        banned = np.concatenate([*self.banned, [self.slack]]).astype(np.int64)
        free = np.flatnonzero(np.repeat(self.sizes > 1, self.sizes))
        self.live.limit_columns(banned, 0.0)
        try:
            return self._whole(free, deadline, gap, nodes, start)
        finally:
            self.live.limit_columns(banned[:-1], 1.0)
            self.live.limit_columns(banned[-1:], math.inf)

    def _whole(self, free: np.ndarray, deadline: float, gap: float, nodes: int | None, start: Sequence[int] | None) -> Found:
        field, bound, first = self.field, -math.inf, None
        if start is not None:
            first = field.chosen(start)[self.at][free]
        exact = True
        while True:
            result = self.live.whole(free, time_limit=deadline - time.monotonic(), gap=gap, nodes=nodes, first=first)
            if exact:
                bound = max(bound, result.bound * self.scale - TOLERANCE * self.terms * self.scale)
            if result.values is None:
                status = result.status if exact else milp.UNKNOWN
                return Found(None, math.inf, math.inf if status == milp.INFEASIBLE else bound, status)
            choice = [int(k[np.argmax(result.values[a : a + len(k)])]) for k, a in zip(self.keep, self.begin, strict=False)]
            profile = field.profile(field.chosen(choice))
            if float(profile.max(initial=0.0)) <= field.limit:
                status = result.status if exact else milp.FEASIBLE
                return Found(choice, field.cost(choice), min(bound, field.cost(choice)), status)
            if time.monotonic() > deadline:
                return Found(None, math.inf, bound, milp.UNKNOWN)
            fresh = field.peaks(profile, self.moments)
            for m in fresh:
                self.row(m)
            if not fresh:  # a row within the solver's tolerance: a little less room there, and the bound stays what it was
                exact = False
                for m, row in self.moments.items():
                    if profile[m] > field.limit:
                        room = field.limit * (1.0 - SLACK) - field.base[m]
                        self.live.limit_row(row, room / self.unit)


def settle(messages: Messages, keep: Keep, moments: Iterable[int], deadline: float, *, gap: float, cost: float = math.inf) -> Found:
    """The integer program over `keep` to its end: an optimum, a proof that there is none, or what there is at the deadline.

    cost: of a choice that is known. Pairs in no cheaper choice are made less dear, which keeps the numbers small.
    """
    field = messages.field
    most = 2.0 * (cost - messages.bound) + 1e-6 * abs(cost) if math.isfinite(cost) and math.isfinite(messages.bound) else math.inf
    program = Program(messages, keep, 0.0, most=most)
    program.live.limit_columns(np.array([program.slack]), 0.0)
    for m in sorted(moments):
        program.row(m)
    if field.limit < math.inf:
        program.relax(deadline)
    return program.whole(deadline, gap=gap)
