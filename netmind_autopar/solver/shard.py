"""The integer program. Minimise

    Σ_i Σ_k  seconds[i,k] x[i,k]  +  Σ_v Σ_g Σ_pq  count_v seconds_v[p,q] y[v,g,p,q]

    x[i,k] ∈ {0,1},  Σ_k x[i,k] = 1                          node i takes strategy k                         _choices
    f[v,t,p,q] ≥ 0                                           value v has source state p, consumer t wants q  _flow
        Σ_q f[v,t,p,q] = Σ_{k: state_v(k)=p} x[i,k]              marginals: source node i = node(v),         _free_flow
        Σ_p f[v,t,p,q] = Σ_{k: state_t(k)=q} x[j,k]              consumer node j = node(t)
    f[v,t,p,q] = 0  where seconds_v[p,q] = ∞                                                                 _forbid
    y[v,g,p,q] ≥ f[v,t,p,q]  for t in group g                a conversion serves its group once              _price
    Σ bytes · live(m) + resident ≤ limit                     at violated moments m only, see memory.py       memory_row

f and y are continuous: with whole x they are whole. A flow with one possible state at either end is the other end's x, so it
costs no variable; a group of one needs no y. Ties between equal plans are broken by a price of bytes, at most TIE × scale in all,
which is not part of any reported number and is subtracted from the proven bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from . import milp
from .memory import Pattern, crowded, patterns
from .problem import Choice, Problem, Value, evaluate, profile

TIE = 1e-6
ONE = -1  # the key of the constant in an expression
Expr = dict[int, float]
Keep = Sequence[Sequence[int]]  # per node the strategies that are still possible


def add(*parts: tuple[float, Expr]) -> Expr:
    out: Expr = {}
    for factor, expr in parts:
        for var, a in expr.items():
            out[var] = out.get(var, 0.0) + factor * a
    return out


@dataclass(frozen=True)
class Solution:
    """`choice` is None when there is none; then `status` is "infeasible" (proven) or "unknown" (out of time).

    When nothing fits the limit, `choice` has the least peak that was found, and no choice has a peak below `least_bytes`.
    """

    choice: Choice | None
    seconds: float
    bound: float
    status: str
    variables: int = 0
    rows: int = 0
    rounds: int = 0
    least_bytes: int = 0


class Shard:
    """The ILP of `problem` over the strategies in `keep`, ready for memory rows."""

    def __init__(self, problem: Problem, keep: Keep, scale: float = 1.0, *, tie: float = TIE, peak_only: bool = False) -> None:
        self.problem, self.keep, self.scale, self.tie = problem, keep, scale, tie
        self.model = milp.Model()
        self.constant = 0.0
        self.flows: dict[tuple[int, int], dict[tuple[int, int], Expr]] = {}
        self.x = [self._choices(i) for i in range(len(problem.nodes))]
        self.peak = self.model.var(1.0) if peak_only else None
        self._forbidden = {v for v, value in enumerate(problem.values) if not np.isfinite(value.seconds).all()}
        for v in sorted(self._forbidden):
            self._forbid(v)
        if not peak_only:
            for i, node in enumerate(problem.nodes):
                for k, expr in self.x[i].items():
                    self._charge(float(node.seconds[k]), expr)
            for v in range(len(problem.values)):
                self._price(v)
            for m, price in problem.prices:
                self._charge(price, self.memory(m))
            self._break_ties()

    def _choices(self, i: int) -> dict[int, Expr]:
        ks = [int(k) for k in self.keep[i]]
        if len(ks) == 1:
            return {ks[0]: {ONE: 1.0}}
        out = {k: {self.model.var(binary=True): 1.0} for k in ks}
        self._row(add(*((1.0, e) for e in out.values())), 1.0, 1.0)
        return out

    def _row(self, expr: Expr, low: float, high: float) -> None:
        c = expr.get(ONE, 0.0)
        terms = {var: a for var, a in expr.items() if var != ONE and a}
        if terms or low - c > 1e-9 or high - c < -1e-9:  # an empty row that fails keeps the model infeasible
            self.model.row(terms or {self.model.var(): 0.0}, low - c, high - c)

    def _charge(self, cost: float, expr: Expr) -> None:
        for var, a in expr.items():
            if var == ONE:
                self.constant += cost * a
            else:
                self.model.cost[var] += cost * a / self.scale

    def ends(self, node: int, state: np.ndarray) -> dict[int, Expr]:
        """Per state the expression that is 1 when the node's choice gives it."""
        out: dict[int, Expr] = {}
        for k, expr in self.x[node].items():
            p = int(state[k])
            out[p] = add((1.0, out.get(p, {})), (1.0, expr))
        return out

    def flow(self, v: int, t: int) -> dict[tuple[int, int], Expr]:
        """f[v,t,·,·], made when first asked for."""
        if (v, t) not in self.flows:
            self.flows[v, t] = self._flow(self.problem.values[v], t)
        return self.flows[v, t]

    def _flow(self, value: Value, t: int) -> dict[tuple[int, int], Expr]:
        consumer = value.consumers[t]
        if consumer.node == value.node:
            out: dict[tuple[int, int], Expr] = {}
            for k, expr in self.x[value.node].items():
                pq = int(value.state[k]), int(consumer.state[k])
                out[pq] = add((1.0, out.get(pq, {})), (1.0, expr))
            return out
        left, right = self.ends(value.node, value.state), self.ends(consumer.node, consumer.state)
        if len(left) == 1:
            (p,) = left
            return {(p, q): expr for q, expr in right.items()}
        if len(right) == 1:
            (q,) = right
            return {(p, q): expr for p, expr in left.items()}
        return self._free_flow(value, left, right)

    def _free_flow(self, value: Value, left: dict[int, Expr], right: dict[int, Expr]) -> dict[tuple[int, int], Expr]:
        out = {(p, q): {self.model.var(): 1.0} for p in left for q in right if value.seconds[p, q] < math.inf}
        for p, expr in left.items():
            self._row(add((-1.0, expr), *((1.0, out[p, q]) for q in right if (p, q) in out)), 0.0, 0.0)
        for q, expr in right.items():
            self._row(add((-1.0, expr), *((1.0, out[p, q]) for p in left if (p, q) in out)), 0.0, 0.0)
        return out

    def _forbid(self, v: int) -> None:
        value = self.problem.values[v]
        for t in range(len(value.consumers)):
            for (p, q), expr in self.flow(v, t).items():
                if value.seconds[p, q] == math.inf:
                    self._row(expr, 0.0, 0.0)

    def _price(self, v: int) -> None:
        value = self.problem.values[v]
        states = sorted(self.ends(value.node, value.state))
        targets = [sorted({int(c.state[k]) for k in self.keep[c.node]}) for c in value.consumers]
        for p in states:
            for group in value.groups(p):
                for q in sorted({q for t in group for q in targets[t]}):
                    cost = float(value.seconds[p, q]) * value.count
                    if 0.0 < cost < math.inf:
                        self._charge_once(cost, [self.flow(v, t)[p, q] for t in group if (p, q) in self.flow(v, t)])

    def _charge_once(self, cost: float, exprs: list[Expr]) -> None:
        different = {tuple(sorted(e.items())): e for e in exprs}
        if {ONE: 1.0} in different.values():
            different = {(): {ONE: 1.0}}
        if len(different) == 1:
            self._charge(cost, next(iter(different.values())))
        elif different:
            self._charge(cost, self._at_least(list(different.values())))

    def _at_least(self, exprs: list[Expr]) -> Expr:
        """A variable that is no less than any of `exprs`."""
        y = {self.model.var(): 1.0}
        for expr in exprs:
            self._row(add((1.0, y), (-1.0, expr)), 0.0, math.inf)
        return y

    def _break_ties(self) -> None:
        weight = np.zeros(1)
        total, weights = 0.0, []
        for i, node in enumerate(self.problem.nodes):
            weight = np.asarray(node.resident, float).copy()
            for value in self.problem.values:
                if value.node == i:
                    weight += value.bytes[value.state] * float(value.count)
            weights.append(weight)
            total += float(weight[list(self.keep[i])].max())
        if total > 0:
            for i, weight in enumerate(weights):
                for k, expr in self.x[i].items():
                    for var in expr.keys() - {ONE}:
                        self.model.cost[var] += self.tie * float(weight[k]) / total

    def memory(self, moment: int) -> Expr:
        """Bytes at `moment`."""
        parts: list[tuple[float, Expr]] = [(1.0, {ONE: float(self.problem.fixed_bytes)})]
        for i, node in enumerate(self.problem.nodes):
            parts += [(float(node.resident[k]), expr) for k, expr in self.x[i].items() if node.resident[k]]
        for v, value in enumerate(self.problem.values):
            for pattern in patterns(value, moment):
                found = (*self._source_bytes(v, pattern), *self._copy_bytes(v, pattern), *self._room_bytes(v, pattern))
                parts += [(pattern.count * b, e) for b, e in found]
        return add(*parts)

    def memory_row(self, moment: int, limit: float) -> int:
        """Memory at `moment` stays within `limit` (or within the peak variable). Returns the row's number."""
        expr = self.memory(moment)
        unit = 1.0 / max(limit, 1.0)
        if self.peak is not None:
            expr[self.peak] = -float(limit)
            limit = 0.0
        self._row(add((unit, expr)), -math.inf, limit * unit)
        return len(self.model.rows) - 1

    def _source_bytes(self, v: int, pattern: Pattern) -> list[tuple[float, Expr]]:
        value, out = self.problem.values[v], []
        for p, whole in self.ends(value.node, value.state).items():
            if not value.bytes[p]:
                continue
            lower: list[Expr] = [whole] if pattern.fresh else []
            for group in value.groups(p):
                before = [t for t in group if not pattern.later[t]]
                if len(before) < len(group) and not before:  # nothing of the group has happened yet
                    lower = [whole]
                lower += [] if lower == [whole] else self._after(v, p, group, before, pattern)
            if whole in lower:
                lower = [whole]
            if lower:
                out.append((float(value.bytes[p]), lower[0] if len(lower) == 1 else self._at_least(lower)))
        return out

    def _after(self, v: int, p: int, group: list[int], before: list[int], pattern: Pattern) -> list[Expr]:
        value, out = self.problem.values[v], []
        for t in group:
            pairs = {q: e for (s, q), e in self.flow(v, t).items() if s == p}
            same = [(1.0, e) for q, e in pairs.items() if value.same[p, q]]
            if pattern.holds[t] and same:
                out.append(add(*same))
            if pattern.later[t]:
                for q, e in pairs.items():
                    if not value.same[p, q]:
                        out.append(add((1.0, e), *((-1.0, self.flow(v, u).get((p, q), {})) for u in before)))
        # one plain term with nothing subtracted is its own maximum; negative terms need the variable's floor of 0
        return [*out, {}] if len(out) == 1 and any(a < 0 for a in out[0].values()) else out

    def _copy_bytes(self, v: int, pattern: Pattern) -> list[tuple[float, Expr]]:
        value, out = self.problem.values[v], []
        sides: dict[bool, list[int]] = {}
        for p in self.ends(value.node, value.state):
            sides.setdefault(bool(value.shared[p]), []).append(p)
        for ps in sides.values():
            for group in value.groups(ps[0]):
                taken, holds = [t for t in group if pattern.taken[t]], [t for t in group if pattern.holds[t]]
                if not taken or not holds:
                    continue
                states = {q for t in taken for (_, q) in self.flow(v, t)} & {q for t in holds for (_, q) in self.flow(v, t)}
                for q in sorted(states):
                    lower = self._copy_live(v, ps, q, taken, holds)
                    if lower and value.copy_bytes[q]:
                        out.append((float(value.copy_bytes[q]), lower[0] if len(lower) == 1 else self._at_least(lower)))
        return out

    def _room_bytes(self, v: int, pattern: Pattern) -> list[tuple[float, Expr]]:
        """What conversions that run at this moment need besides source and copy."""
        value, out = self.problem.values[v], []
        if value.room is None or not pattern.now:
            return []
        for p in self.ends(value.node, value.state):
            for group in value.groups(p):
                now, before = [t for t in group if t in pattern.now], [t for t in group if not pattern.later[t]]
                for q in np.flatnonzero(value.room[p] * ~value.same[p]).tolist():
                    exprs = [self.flow(v, t)[p, q] for t in now if (p, q) in self.flow(v, t)]
                    if not exprs:
                        continue
                    made = [(-1.0, self.flow(v, u).get((p, q), {})) for u in before]
                    lower = [add((1.0, e), *made) for e in exprs]
                    plain = len(lower) == 1 and not before
                    out.append((float(value.room[p, q]), lower[0] if plain else self._at_least(lower)))
        return out

    def _copy_live(self, v: int, ps: list[int], q: int, taken: list[int], holds: list[int]) -> list[Expr]:
        value = self.problem.values[v]
        wants = {}
        for t in {*taken, *holds}:
            flow = self.flow(v, t)
            wants[t] = add(*((1.0, flow[p, q]) for p in ps if (p, q) in flow and not value.same[p, q]))
        both = [t for t in taken if t in holds]
        out = [wants[t] for t in both if wants[t]]
        for t in taken:
            for u in holds:
                if t not in both and u not in both and wants[t] and wants[u]:
                    out.append(add((1.0, wants[t]), (1.0, wants[u]), (-1.0, {ONE: 1.0})))
        return [*out, {}] if len(out) == 1 and not any(t in holds and wants[t] for t in taken) else out

    def read(self, values: np.ndarray) -> Choice:
        """The strategy of every node in a solution."""

        def level(expr: Expr) -> float:
            return sum(a if var == ONE else a * values[var] for var, a in expr.items())

        return tuple(max(self.x[i], key=lambda k: level(self.x[i][k])) for i in range(len(self.problem.nodes)))


def dual_prices(problem: Problem, keep: Keep, moments: Sequence[int], *, scale: float, time_limit: float) -> dict[int, float]:
    """What memory at each of `moments` is worth, seconds per byte, in the relaxation with continuous x; {} when that fails."""
    limit = float(problem.limit_bytes or 0)
    shard = Shard(problem, keep, scale)
    rows = {m: shard.memory_row(m, limit) for m in moments}
    result = milp.solve(shard.model, time_limit=time_limit, gap=0.0, relax=True)
    if result.duals is None:
        return {}
    return {m: float(result.duals[row]) * scale / max(limit, 1.0) for m, row in rows.items() if result.duals[row] > 1e-9}


def solve_ilp(
    problem: Problem,
    keep: Keep,
    *,
    time_limit: float,
    gap: float,
    moments: Iterable[int] = (),
    scale: float = 1.0,
    incumbent: Choice | None = None,
    rounds: int = 40,
    nodes: int | None = None,
    crowd: set[int] | None = None,
) -> Solution:
    """Solve over the strategies in `keep`, adding memory rows until the exact evaluation agrees.

    scale: seconds that the objective is divided by, so that the solver's tolerances fit. incumbent: a feasible choice, returned if
    time runs out first. nodes: a limit to branching, per round. crowd: gets every moment at which a plan had too much.
    The bound holds for every choice within `keep`.
    """
    start = time.monotonic()
    shard = Shard(problem, keep, scale, tie=min(TIE, gap / 10))
    limit, slack = problem.limit_bytes, 0.0
    known: set[int] = set()
    for m in moments if limit is not None else ():
        shard.memory_row(m, limit or 0)
        known.add(m)
    best, bound = incumbent, -math.inf
    best_s = evaluate(problem, incumbent)[0] if incumbent is not None else math.inf
    for round_ in range(1, rounds + 1):
        left = time_limit - (time.monotonic() - start)
        result = milp.solve(shard.model, time_limit=left, gap=gap / 2, nodes=nodes)
        size = len(shard.model.cost), len(shard.model.rows), round_
        if result.status == milp.INFEASIBLE:
            return Solution(best, best_s, min(best_s, math.inf), milp.OPTIMAL if best else milp.INFEASIBLE, *size)
        bound = max(bound, shard.constant + (result.bound - shard.tie) * scale)
        if result.values is None:
            break
        choice = shard.read(result.values)
        now_s, peak, _ = evaluate(problem, choice)
        if limit is None or peak <= limit:
            if now_s <= best_s:
                best, best_s = choice, now_s
            break
        fresh = crowded(profile(problem, choice), limit, known)
        if not fresh:  # only rows that are there are violated, by the solver's tolerance: ask for a little more
            slack += 2.0 * (peak - limit) + 1.0
            fresh = crowded(profile(problem, choice), limit, set())
        for m in fresh:
            shard.memory_row(m, limit - slack)
            known.add(m)
        if crowd is not None:
            crowd.update(fresh)
        if time.monotonic() - start > time_limit:
            break
    bound = min(bound, best_s)
    if best is None:
        return Solution(None, math.inf, bound, milp.UNKNOWN, *size)
    done = best_s - bound <= gap * abs(best_s) + 1e-15
    return Solution(best, best_s, bound, milp.OPTIMAL if done else milp.FEASIBLE, *size)
