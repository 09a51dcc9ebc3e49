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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .memory import Moments, Pattern
from .presolve import Kept
from .problem import Choice, Problem, Value
from .sweeps import Sweeps

Prices = Mapping[int, float]  # moment -> seconds per byte


class Local:
    """True costs around one node, for coordinate descent: weight × seconds, and priced bytes."""

    def __init__(self, problem: Problem, kept: Kept, prices: Prices, moments: Moments, weight: float = 1.0) -> None:
        self.problem, self.weight = problem, weight
        self.around: list[list[int]] = [[] for _ in problem.nodes]
        for v, value in enumerate(problem.values):
            if value.seconds.size > 1 or len(value.bytes) > 1:  # others cost the same whatever is chosen
                for i in {value.node, *(c.node for c in value.consumers)}:
                    self.around[i].append(v)
        total = sum(prices.values())
        self.own = [weight * node.seconds + total * node.resident for node in problem.nodes]
        self.memory: list[list[tuple[float, Pattern]]] = [[] for _ in problem.values]
        for m, price in prices.items():
            for v, pattern in moments.at(m):
                self.memory[v].append((price * pattern.count, pattern))
        self.kept = kept

    @property
    def kept(self) -> Kept:
        return self._kept

    @kept.setter
    def kept(self, kept: Kept) -> None:
        self._kept = kept
        self.at = [np.array(ks, np.int64) for ks in kept]
        self.memo: list[dict[tuple[int, ...], np.ndarray]] = [{} for _ in self.problem.values]

    def costs(self, i: int, choice: Sequence[int]) -> np.ndarray:
        """What every kept strategy of node i costs, the others as in `choice`: its own price and that of the values around."""
        out = self.own[i][self.at[i]]
        for v in self.around[i]:
            out = out + self.value_costs(v, i, choice)
        return out

    def value_costs(self, v: int, i: int, choice: Sequence[int]) -> np.ndarray:
        """The price of value v under every kept strategy of node i."""
        value = self.problem.values[v]
        ends = ((value.node, value.state), *((c.node, c.state) for c in value.consumers))
        key = (i, *(-1 if node == i else int(state[choice[node]]) for node, state in ends))
        if key not in self.memo[v]:
            p, *qs = (state[self.at[i]] if node == i else np.array([state[choice[node]]]) for node, state in ends)
            found = self._priced(v, p, qs)
            self.memo[v][key] = np.broadcast_to(found, self.at[i].shape)
        return self.memo[v][key]

    def _priced(self, v: int, p: np.ndarray, qs: list[np.ndarray]) -> np.ndarray:
        value = self.problem.values[v]
        if not qs:
            return sum((price * (value.bytes[p] * pattern.fresh) for price, pattern in self.memory[v]), np.zeros(1))
        served = Served(value, p, qs)
        cost = np.where(served.first, value.seconds[p, served.q], 0.0).sum(axis=0) * (self.weight * value.count)
        for price, pattern in self.memory[v]:
            cost = cost + price * live_bytes(value, p, served, pattern)
        return cost

    def descend(self, choice: Choice, sweeps: int = 6) -> Choice:
        """Change one node at a time while that helps."""
        now = list(choice)
        for _ in range(sweeps):
            changed = False
            for i, ks in enumerate(self.kept):
                if len(ks) == 1:
                    continue
                before, costs = now[i], self.costs(i, now)
                best = int(costs.argmin())
                keep = before in ks and costs[ks.index(before)] <= costs[best] * (1 + 1e-12)
                now[i] = before if keep else ks[best]
                changed |= now[i] != before
            if not changed:
                break
        return tuple(now)


class Served:
    """Which consumers one conversion serves, for arrays of states: source states p[k] or p[0], target states qs[t][k] or qs[t][0].

    q[t, k]: the target states; first[t, k]: consumer t is the first of those that its conversion serves.
    """

    def __init__(self, value: Value, p: np.ndarray, qs: list[np.ndarray]) -> None:
        self.at = np.arange(max(len(p), *map(len, qs)))
        self.q = np.stack([np.broadcast_to(q, self.at.shape) for q in qs])
        phases = np.array([c.phase for c in value.consumers])
        self.group = 2 * self.q + np.where(value.shared[p][None, :], 0, phases[:, None])  # of one number: one conversion
        self.shape = (len(self.at), 2 * value.seconds.shape[1])
        earliest = np.zeros(self.shape, np.int32)
        for t in reversed(range(len(qs))):
            earliest[self.at, self.group[t]] = t
        self.first = earliest[self.at, self.group] == np.arange(len(qs))[:, None]

    def some(self, flags: Sequence[bool]) -> np.ndarray:
        """Whether any of those that t's conversion serves has its flag set, [t, k]."""
        marked = np.zeros(self.shape, bool)
        for t, flag in enumerate(flags):
            if flag:
                marked[self.at, self.group[t]] = True
        return marked[self.at, self.group]


def live_bytes(value: Value, p: np.ndarray, served: Served, pattern: Pattern) -> np.ndarray:
    """Bytes of one instance at the moment the pattern describes: what `problem.items` counts, for arrays of states."""
    same = value.same[p, served.q]
    later, taken, holds = ~served.some([not f for f in pattern.later]), served.some(pattern.taken), served.some(pattern.holds)
    alive = pattern.fresh | (served.first & np.where(same, holds, later)).any(axis=0)
    copied = served.first & ~same & taken
    total = (value.copy_bytes[served.q] * (copied & holds)).sum(axis=0)
    if value.room is not None:
        total = total + (value.room[p, served.q] * (copied & later)).sum(axis=0)
    return total + value.bytes[p] * alive


def group_sizes(value: Value) -> list[np.ndarray]:
    """Per consumer and source state, how many consumers share a conversion with it."""
    phases = [c.phase for c in value.consumers]
    per_phase = {phase: np.where(value.shared, len(phases), phases.count(phase)) for phase in set(phases)}
    return [per_phase[phase] for phase in phases]


def picked(table: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """`table[rows][:, cols]`, without copies where that is the table itself."""
    for axis, at in enumerate((rows, cols)):
        if len(at) != table.shape[axis] or (at != np.arange(len(at))).any():
            table = table.take(at, axis=axis)
    return table


class States:
    """Which state each strategy has: `states[k]` of `n`."""

    def __init__(self, states: np.ndarray, n: int) -> None:
        self.states, self.n = states, n
        self.plain = len(states) == n and bool((states == np.arange(n)).all())  # strategy k has state k
        self.order = np.argsort(states, kind="stable")
        self.present, self.starts = np.unique(states[self.order], return_index=True)

    def least(self, table: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
        """Per state the least row of `table`, inf where no strategy has it. Never `source` itself or a view of it."""
        if self.plain:
            return table.copy() if source is not None and np.may_share_memory(table, source) else table
        out = np.full((self.n, table.shape[1]), np.inf)
        out[self.present] = np.minimum.reduceat(table[self.order], self.starts, axis=0)
        return out

    def spread(self, table: np.ndarray) -> np.ndarray:
        """Per strategy the row of its state."""
        return table if self.plain else table[self.states]


@dataclass
class Group:
    """A value whose consumers share conversions. charge[t][p, q]: what consumer t is charged; all[p]: whether all consumers share, or
    those of one phase; sizes[t][p]: how many they are; state[k], wants[t][k]: source and target state under strategy k, -1 for
    states that no strategy left has."""

    value: Value
    all: np.ndarray
    charge: list[np.ndarray]
    sizes: list[np.ndarray]
    state: np.ndarray
    wants: tuple[np.ndarray, ...]
    ends: dict[int, tuple[States, States]] = field(default_factory=dict)

    def restricted(self, kept: Kept) -> Group:
        """The same over the states that strategies in `kept` have."""
        rows = np.unique(self.state[list(kept[self.value.node])])
        cols = np.unique(np.concatenate([w[list(kept[c.node])] for w, c in zip(self.wants, self.value.consumers, strict=True)]))
        row_at, col_at = np.full(len(self.all) + 1, -1), np.full(self.charge[0].shape[1] + 1, -1)  # the last one is the -1 of before
        row_at[rows], col_at[cols] = np.arange(len(rows)), np.arange(len(cols))
        return Group(
            self.value,
            self.all[rows],
            [c[rows][:, cols] for c in self.charge],
            [n[rows] for n in self.sizes],
            row_at[self.state],
            tuple(col_at[w] for w in self.wants),
        )


class Relaxed(Sweeps):
    """The pairwise relaxation, its messages and its bound. Prices of moments may change while the messages stay."""

    def __init__(self, problem: Problem, kept: Kept, moments: Moments, weight: float = 1.0) -> None:
        self.problem, self.kept, self.moments, self.constant = problem, kept, moments, 0.0
        self.prices: dict[int, float] = {}
        self.node = [weight * n.seconds[list(ks)] for n, ks in zip(problem.nodes, kept, strict=True)]
        self.edge: dict[tuple[int, int], np.ndarray] = {}
        bases = [self._base(value, weight) for value in problem.values]
        top = sum(float(t.max(initial=0.0)) for t in self.node)
        sizes = [group_sizes(value) for value in problem.values]
        for base, numbers in zip(bases, sizes, strict=True):
            most = base.max(axis=1, initial=0.0)
            top += sum(float((most / n).max(initial=0.0)) for n in numbers)
        for value, base, numbers in zip(problem.values, bases, sizes, strict=True):
            possible = np.isfinite(value.seconds)
            for t, n in enumerate(numbers):
                share = base if (n == 1).all() else base / n[:, None]
                self._add(value, t, share if possible.all() else np.where(possible, share, 4.0 * top + 1e-9))
        self._start_shares(weight)
        self.link()

    def _base(self, value: Value, weight: float) -> np.ndarray:
        """The price of every pair of states, of all instances; 0 where it is impossible."""
        return np.where(np.isfinite(value.seconds), value.seconds, 0.0) * weight * value.count

    def reprice(self, prices: Prices, limit: float) -> None:
        """Charge memory at these moments, seconds per byte, instead of what was charged before."""
        found: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}  # per value what its source pays, and what its consumers do
        for m in sorted({*prices, *self.prices}):
            change = prices.get(m, 0.0) - self.prices.get(m, 0.0)
            for v, pattern in self.moments.at(m) if change else ():
                value = self.problem.values[v]
                if v not in found:
                    found[v] = np.zeros(len(value.bytes)), [np.zeros(value.seconds.shape) for _ in value.consumers]
                self._charge(value, pattern, change * pattern.count, *found[v])
        more = sum(prices.values()) - sum(self.prices.values())
        for i, ks in enumerate(self.kept):
            self.node[i] = self.node[i] + more * self.problem.nodes[i].resident[list(ks)]
        for v in sorted(found):
            value, (source, shares) = self.problem.values[v], found[v]
            self.node[value.node] = self.node[value.node] + source[value.state[list(self.kept[value.node])]]
            for t, share in enumerate(shares):
                self._add(value, t, share)
        self.constant = sum(prices.values()) * (self.problem.fixed_bytes - limit)
        self.prices = dict(prices)
        self.link()

    def _charge(self, value: Value, pattern: Pattern, price: float, source: np.ndarray, shares: list[np.ndarray]) -> None:
        holders = [t for t in range(len(shares)) if pattern.holds[t]]
        for rows in (np.flatnonzero(value.shared), np.flatnonzero(~value.shared)):
            if not len(rows):
                continue
            groups, same = value.groups(int(rows[0])), value.same[rows]
            if pattern.fresh or any(all(pattern.later[t] for t in group) for group in groups):
                source[rows] += price * value.bytes[rows]
            else:
                for t in holders:
                    shares[t][rows] += price * value.bytes[rows, None] * same / len(holders)
            for group in groups:
                both = [t for t in group if pattern.taken[t] and pattern.holds[t]]
                for t in both:
                    shares[t][rows] += price * value.copy_bytes * ~same / len(both)
                now = [t for t in pattern.now if t in group]
                if value.room is not None and now and all(pattern.later[t] for t in group):
                    for t in now:
                        shares[t][rows] += price * value.room[rows] * ~same / len(now)

    def _add(self, value: Value, t: int, share: np.ndarray) -> None:
        i, j = value.node, value.consumers[t].node
        rows, cols = value.state[list(self.kept[i])], value.consumers[t].state[list(self.kept[j])]
        if i == j:
            self.node[i] = self.node[i] + share[rows, cols]
            return
        table = picked(share, rows, cols)
        if not table.any():
            return
        key, table = ((i, j), table) if i < j else ((j, i), table.T)
        self.edge[key] = self.edge[key] + table if key in self.edge else table.copy()

    def _start_shares(self, weight: float) -> None:
        """What each member of a group is charged for the group's conversions; groups of one are left out."""
        self.shared: list[Group] = []
        for value in self.problem.values:
            sizes = group_sizes(value)
            if any(size.max() > 1 for size in sizes) and all(c.node != value.node for c in value.consumers):
                cost = np.where(np.isfinite(value.seconds), value.seconds, 0.0) * value.count * weight
                charge = [cost / n[:, None] * (n[:, None] > 1) for n in sizes]
                self.shared.append(Group(value, value.shared, charge, sizes, value.state, tuple(c.state for c in value.consumers)))

    def _table(self, value: Value, t: int) -> np.ndarray | None:
        """The edge between a value's node and consumer t, source first."""
        i, j = value.node, value.consumers[t].node
        if i < j:
            return self.edge.get((i, j))
        table = self.edge.get((j, i))
        return None if table is None else table.T

    def rebalance(self) -> None:
        """Take from every member of a group what it can spare of its charge and hand it out evenly. The bound does not fall."""
        for group in self.shared:
            value, mixed = group.value, not group.all.all()
            ends = [(self._table(value, t), *self._ends(group, t)) for t in range(len(value.consumers))]
            pools = np.zeros((2 if mixed else 1, *group.charge[0].shape))  # of all consumers, or per phase
            for t, (table, rows, cols) in enumerate(ends):
                if table is None:
                    continue
                least = cols.least(rows.least(table).T, table).T
                least -= max(float(table.min()), 0.0)
                spare = np.minimum(np.maximum(least, 0.0, out=least), group.charge[t], out=least)
                group.charge[t] -= spare
                table -= cols.spread(rows.spread(spare).T).T
                pools[value.consumers[t].phase if mixed else 0] += spare
            if mixed:
                pools = np.where(group.all[:, None], pools.sum(axis=0), pools)
            for t, (table, rows, cols) in enumerate(ends):
                if table is not None:
                    more = pools[value.consumers[t].phase if mixed else 0] / group.sizes[t][:, None]
                    group.charge[t] += more
                    table += cols.spread(rows.spread(more).T).T

    def _ends(self, group: Group, t: int) -> tuple[States, States]:
        """How the strategies of a value's node and of consumer t's fall on the group's states."""
        value = group.value
        if t not in group.ends:
            rows, cols = group.state[list(self.kept[value.node])], group.wants[t][list(self.kept[value.consumers[t].node])]
            group.ends[t] = States(rows, len(group.charge[t])), States(cols, group.charge[t].shape[1])
        return group.ends[t]

    def restrict(self, kept: Kept) -> None:
        """Forget the strategies that are not in `kept`; the messages of the others stay."""
        at = [np.searchsorted(old, new) for old, new in zip(self.kept, kept, strict=True)]  # strategies ascend
        self.node = [theta[ks] for theta, ks in zip(self.node, at, strict=True)]
        self.edge = {(i, j): picked(table, at[i], at[j]) for (i, j), table in self.edge.items()}
        self.kept = kept
        self.shared = [group.restricted(kept) for group in self.shared]

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
