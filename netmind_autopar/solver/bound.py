"""Lower bounds and good plans without an ILP, so that the ILP which follows is small.

The problem is relaxed to nodes and pairs: a conversion that a group of consumers shares is charged to each of them in part, which
together never exceeds its price; where one of them has no use for its part it is moved to the others. Moments of memory may carry
a price λ_m (seconds per byte), charged in the same manner, which turns the limit into a term -Σ λ_m limit. The relaxation

    min_x Σ_i θ_i(x_i) + Σ_ij θ_ij(x_i, x_j)   ≥   Σ_i min θ_i + Σ_ij min θ_ij

is tightened by moving cost between nodes and edges, sequentially and never worse (Kolmogorov, "A new look at reweighted message
passing", 2015). Whatever θ_i(k) exceeds min θ_i by is what choosing k costs at least: a strategy whose bound exceeds the price of
a plan in hand is dropped, without loss. Plans in hand come from greedy decoding and coordinate descent on the true costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .memory import Moments, Pattern
from .presolve import Kept
from .problem import Choice, Problem, Value, wanted
from .sweeps import Sweeps

Prices = Mapping[int, float]  # moment -> seconds per byte


class Local:
    """True costs around one node, for coordinate descent: weight × seconds, and priced bytes."""

    def __init__(self, problem: Problem, kept: Kept, prices: Prices, moments: Moments, weight: float = 1.0) -> None:
        self.problem, self.kept, self.weight = problem, kept, weight
        self.around: list[list[int]] = [[] for _ in problem.nodes]
        for v, value in enumerate(problem.values):
            for i in {value.node, *(c.node for c in value.consumers)}:
                self.around[i].append(v)
        total = sum(prices.values())
        self.own = [weight * node.seconds + total * node.resident for node in problem.nodes]
        self.memory: list[list[tuple[float, Pattern]]] = [[] for _ in problem.values]
        for m, price in prices.items():
            for v, pattern in moments.at(m):
                self.memory[v].append((price * pattern.count, pattern))
        self.memo: list[dict[tuple[int, ...], float]] = [{} for _ in problem.values]

    def value_cost(self, v: int, choice: list[int]) -> float:
        value = self.problem.values[v]
        key = (int(value.state[choice[value.node]]), *(int(c.state[choice[c.node]]) for c in value.consumers))
        memo = self.memo[v]
        if key not in memo:
            p, targets = wanted(value, choice)
            cost = self.weight * value.count * sum(float(value.seconds[p, q]) for q, _ in targets)
            memo[key] = cost + sum(price * live_bytes(value, p, targets, pattern) for price, pattern in self.memory[v])
        return memo[key]

    def total(self, choice: list[int]) -> float:
        return sum(float(own[k]) for own, k in zip(self.own, choice, strict=True)) + sum(
            self.value_cost(v, choice) for v in range(len(self.problem.values))
        )

    def descend(self, choice: Choice, sweeps: int = 6) -> Choice:
        """Change one node at a time while that helps."""
        now = list(choice)
        for _ in range(sweeps):
            changed = False
            for i, ks in enumerate(self.kept):
                if len(ks) == 1:
                    continue
                before, costs = now[i], []
                for k in ks:
                    now[i] = k
                    costs.append(float(self.own[i][k]) + sum(self.value_cost(v, now) for v in self.around[i]))
                best = int(np.argmin(costs))
                keep = before in ks and costs[ks.index(before)] <= costs[best] * (1 + 1e-12)
                now[i] = before if keep else ks[best]
                changed |= now[i] != before
            if not changed:
                break
        return tuple(now)


def live_bytes(value: Value, p: int, targets: list[tuple[int, list[int]]], pattern: Pattern) -> int:
    """Bytes of one instance at the moment the pattern describes: what `problem.items` counts."""
    alive, total = pattern.fresh, 0
    for q, takers in targets:
        if value.same[p, q]:
            alive |= any(pattern.holds[t] for t in takers)
        else:
            alive |= all(pattern.later[t] for t in takers)
            if value.room is not None and all(pattern.later[t] for t in takers) and any(pattern.taken[t] for t in takers):
                total += int(value.room[p, q])
            total += int(value.copy_bytes[q]) * (any(pattern.taken[t] for t in takers) and any(pattern.holds[t] for t in takers))
    return total + int(value.bytes[p]) * alive


def group_sizes(value: Value) -> list[np.ndarray]:
    """Per consumer and source state, how many consumers share a conversion with it."""
    takers = range(len(value.consumers))
    groups = [value.groups(p) for p in range(len(value.bytes))]
    return [np.array([next(len(g) for g in per_state if t in g) for per_state in groups]) for t in takers]


class Relaxed(Sweeps):
    """The pairwise relaxation, its messages and its bound. Prices of moments may change while the messages stay."""

    def __init__(self, problem: Problem, kept: Kept, moments: Moments, weight: float = 1.0) -> None:
        self.problem, self.kept, self.moments, self.constant = problem, kept, moments, 0.0
        self.prices: dict[int, float] = {}
        self.node = [weight * n.seconds[list(ks)] for n, ks in zip(problem.nodes, kept, strict=True)]
        self.edge: dict[tuple[int, int], np.ndarray] = {}
        shares = [self._shares(value, weight) for value in problem.values]
        top = sum(float(t.max(initial=0.0)) for t in self.node)
        top += sum(float(np.max(s[np.isfinite(s)], initial=0.0)) for parts in shares for s in parts)
        for value, parts in zip(problem.values, shares, strict=True):
            for t, share in enumerate(parts):
                self._add(value, t, np.where(np.isfinite(share), share, 4.0 * top + 1e-9))
        self._start_shares(weight)
        self.link()

    def _shares(self, value: Value, weight: float) -> list[np.ndarray]:
        """Per consumer the charge for every pair of states."""
        possible = np.isfinite(value.seconds)
        base = np.where(possible, np.where(possible, value.seconds, 0.0) * weight * value.count, np.inf)
        return [base / n[:, None] for n in group_sizes(value)]

    def reprice(self, prices: Prices, limit: float) -> None:
        """Charge memory at these moments, seconds per byte, instead of what was charged before."""
        source = [np.zeros(len(value.bytes)) for value in self.problem.values]
        shares = [[np.zeros(value.seconds.shape) for _ in value.consumers] for value in self.problem.values]
        touched: set[int] = set()
        for m in sorted({*prices, *self.prices}):
            change = prices.get(m, 0.0) - self.prices.get(m, 0.0)
            for v, pattern in self.moments.at(m) if change else ():
                touched.add(v)
                self._charge(self.problem.values[v], pattern, change * pattern.count, source[v], shares[v])
        more = sum(prices.values()) - sum(self.prices.values())
        for i, ks in enumerate(self.kept):
            self.node[i] = self.node[i] + more * self.problem.nodes[i].resident[list(ks)]
        for v in sorted(touched):
            value = self.problem.values[v]
            self.node[value.node] = self.node[value.node] + source[v][value.state[list(self.kept[value.node])]]
            for t, share in enumerate(shares[v]):
                self._add(value, t, share)
        self.constant = sum(prices.values()) * (self.problem.fixed_bytes - limit)
        self.prices = dict(prices)
        self.link()

    def _charge(self, value: Value, pattern: Pattern, price: float, source: np.ndarray, shares: list[np.ndarray]) -> None:
        holders = [t for t in range(len(shares)) if pattern.holds[t]]
        for p in range(len(source)):
            groups = value.groups(p)
            if pattern.fresh or any(all(pattern.later[t] for t in group) for group in groups):
                source[p] += price * value.bytes[p]
            else:
                for t in holders:
                    shares[t][p] += price * value.bytes[p] * value.same[p] / len(holders)
            for group in groups:
                both = [t for t in group if pattern.taken[t] and pattern.holds[t]]
                for t in both:
                    shares[t][p] += price * value.copy_bytes * ~value.same[p] / len(both)
                now = [t for t in pattern.now if t in group]
                if value.room is not None and now and all(pattern.later[t] for t in group):
                    for t in now:
                        shares[t][p] += price * value.room[p] * ~value.same[p] / len(now)

    def _add(self, value: Value, t: int, share: np.ndarray) -> None:
        i, j = value.node, value.consumers[t].node
        rows, cols = value.state[list(self.kept[i])], value.consumers[t].state[list(self.kept[j])]
        if i == j:
            self.node[i] = self.node[i] + share[rows, cols]
            return
        table = share[rows][:, cols]
        if not table.any():
            return
        key, table = ((i, j), table) if i < j else ((j, i), table.T)
        self.edge[key] = self.edge[key] + table if key in self.edge else table.copy()

    def _start_shares(self, weight: float) -> None:
        """What each member of a group is charged for the group's conversions; groups of one are left out."""
        self.shared: list[tuple[Value, list[np.ndarray], list[np.ndarray]]] = []
        for value in self.problem.values:
            sizes = group_sizes(value)
            if any(size.max() > 1 for size in sizes) and all(c.node != value.node for c in value.consumers):
                cost = np.where(np.isfinite(value.seconds), value.seconds, 0.0) * value.count * weight
                self.shared.append((value, [cost / n[:, None] * (n[:, None] > 1) for n in sizes], sizes))

    def _table(self, value: Value, t: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """The edge between a value's node and consumer t, source first, with the states of its rows and columns."""
        i, j = value.node, value.consumers[t].node
        rows, cols = value.state[list(self.kept[i])], value.consumers[t].state[list(self.kept[j])]
        table = self.edge.get((i, j)) if i < j else self.edge.get((j, i))
        return (table if i < j or table is None else table.T), rows, cols

    def rebalance(self) -> None:
        """Take from every member of a group what it can spare of its charge and hand it out evenly. The bound does not fall."""
        for value, charge, sizes in self.shared:
            pools = np.zeros((3, *value.seconds.shape))  # all consumers, forward, backward
            for t, consumer in enumerate(value.consumers):
                table, rows, cols = self._table(value, t)
                if table is None:
                    continue
                least = np.full(value.seconds.shape, np.inf)
                np.minimum.at(least, (rows[:, None], cols[None, :]), table)
                spare = np.minimum(np.maximum(least - max(float(table.min()), 0.0), 0.0), charge[t])
                charge[t] = charge[t] - spare
                table -= spare[rows][:, cols]
                pools[0][value.shared] += spare[value.shared]
                pools[1 + consumer.phase][~value.shared] += spare[~value.shared]
            for t, consumer in enumerate(value.consumers):
                table, rows, cols = self._table(value, t)
                if table is not None:
                    more = np.where(value.shared[:, None], pools[0], pools[1 + consumer.phase]) / sizes[t][:, None]
                    charge[t] = charge[t] + more
                    table += more[rows][:, cols]

    def restrict(self, kept: Kept) -> None:
        """Forget the strategies that are not in `kept`; the messages of the others stay."""
        at = [[old.index(k) for k in new] for old, new in zip(self.kept, kept, strict=True)]
        self.node = [theta[ks] for theta, ks in zip(self.node, at, strict=True)]
        self.edge = {(i, j): table[at[i]][:, at[j]] for (i, j), table in self.edge.items()}
        self.kept = kept

    def sweep(self) -> tuple[Choice, list[np.ndarray]]:
        """One pass there and back. Returns a decoded choice and, per node, what each strategy costs above the best at least."""
        picked, excess = self.passes()
        return tuple(int(ks[k]) for ks, k in zip(self.kept, picked, strict=True)), excess


def prune(kept: Kept, excess: list[np.ndarray], bound: float, best: float) -> Kept:
    """Drop every strategy that cannot be in a plan cheaper than `best`, given the `bound` from before the sweep."""
    room = best - bound + 1e-9 * abs(best)
    out = []
    for ks, over in zip(kept, excess, strict=True):
        stay = tuple(k for k, e in zip(ks, over, strict=True) if e <= room)
        out.append(stay or (ks[int(over.argmin())],))
    return tuple(out)
