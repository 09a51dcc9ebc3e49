"""Lower bounds by message passing under prices of memory: sequential tree-reweighted sweeps, which never make the bound worse.

Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", 2006. Moments of memory with a price λ_t are charged
to the strategies that use memory then, and Σ λ_t (base_t - limit) is added: by Lagrangian duality the bound holds with the limit.

The order of the nodes is free. Here it is one of few ranks, no two nodes of a rank being neighbours, so that a whole rank is visited at
once: tables of like size are stacked, and a sweep over some ten thousand tables takes hundredths of a second.

Every edge has a message up, to its node of higher rank, and one down: up(l) = min_k (γ_i θ_i(k) - down(k) + table(k, l)), where
θ_i is the node's cost with all its messages and γ_i = 1 / the larger of its numbers of edges up and down; down(k) likewise, on the way
back. After it, every node keeps (1 - γ_i · edges down) θ_i, whose minima add up to the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .field import Field, Prices

STEPS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Tables of one rank and one way, padded to one size: [edges, strategies of the near node, of the far node], inf where padded.

    near, target: flat positions of the near and the far node's strategies; toward, away: of the messages to them; padded alike.
    """

    edges: np.ndarray
    tables: np.ndarray
    near: np.ndarray
    toward: np.ndarray
    away: np.ndarray
    target: np.ndarray


def _padded(size: int) -> int:
    return next((step for step in STEPS if size <= step), int(size))


def _runs(offset: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Flat positions of the nodes' strategies, one node after the other."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(offset[i], offset[i + 1]) for i in nodes)])


def ranks(n: int, ends: np.ndarray) -> np.ndarray:
    """A rank per node, neighbours in different ranks: sets of independent nodes are taken off, those of few neighbours first."""
    near: list[set[int]] = [set() for _ in range(n)]
    for i, j in ends.tolist():
        near[i].add(j)
        near[j].add(i)
    rank, left, now = np.zeros(n, np.int64), list(range(n)), 0
    while left:
        left.sort(key=lambda i: (len(near[i]), i))
        most, taken = len(near[left[(len(left) - 1) // 2]]), set[int]()
        for i in left:
            if len(near[i]) > most:
                break
            if near[i].isdisjoint(taken):
                taken.add(i)
                rank[i] = now
        for i in taken:
            for j in near[i]:
                near[j].discard(i)
        left, now = [i for i in left if i not in taken], now + 1
    return rank


class Messages:
    """bound: as of the last sweep. excess: per strategy, flat, what the bound *before* the last sweep rises by if it is taken, at least."""

    def __init__(self, field: Field) -> None:
        self.field, self.constant, self.bound = field, field.fixed, -np.inf
        self.memory = np.zeros(field.size)
        self.rank = ranks(field.n, field.ends)
        finite = [float(t[np.isfinite(t)].max(initial=0.0)) for t in field.problem.tables]
        self.top = 4.0 * (float(np.abs(field.costs).max(initial=0.0)) + max(finite, default=0.0)) + 1.0  # of forbidden pairs
        self._index()
        self.down, self.up = np.zeros(len(self.low_to) + 1), np.zeros(len(self.high_to) + 1)  # the last is for what is padded
        self.excess = np.zeros(field.size)
        self.theta = np.r_[field.costs, 0.0]  # with all messages, as of the last visit

    def _index(self) -> None:
        """Edges by the ranks of their ends, where their messages lie, and by rank which messages arrive where."""
        field, ends, size = self.field, self.field.ends, np.diff(self.field.offset)
        first = self.rank[ends[:, 0]] < self.rank[ends[:, 1]]
        self.low, self.high = np.where(first, ends[:, 0], ends[:, 1]), np.where(first, ends[:, 1], ends[:, 0])
        self.low_at = np.concatenate([[0], size[self.low].cumsum()]).astype(np.int64)  # where messages down begin, by edge
        self.high_at = np.concatenate([[0], size[self.high].cumsum()]).astype(np.int64)
        ahead, behind = np.bincount(self.low, minlength=field.n), np.bincount(self.high, minlength=field.n)
        gamma = 1.0 / np.maximum(np.maximum(ahead, behind), 1)
        self.gamma, self.kept = np.r_[np.repeat(gamma, size), 0.0], np.repeat(1.0 - gamma * behind, size)
        self.levels = int(self.rank.max(initial=0)) + 1
        self.members = [np.flatnonzero(self.rank == r) for r in range(self.levels)]
        self.places = [_runs(field.offset, nodes) for nodes in self.members]
        self.starts = [np.concatenate([[0], size[nodes].cumsum()[:-1]]).astype(np.int64) for nodes in self.members]
        self.low_to, self.high_to = _runs(field.offset, self.low), _runs(field.offset, self.high)  # the strategy of every message
        local, level = np.zeros(field.size, np.int64), np.repeat(self.rank, size)
        for place in self.places:
            local[place] = np.arange(len(place))
        self.arrive = []
        for r in range(self.levels):
            a, b = np.flatnonzero(level[self.low_to] == r), np.flatnonzero(level[self.high_to] == r)
            self.arrive.append((a, local[self.low_to[a]], b, local[self.high_to[b]]))
        self.forward = [self._stacks(np.flatnonzero(self.rank[self.low] == r), True) for r in range(self.levels)]
        self.backward = [self._stacks(np.flatnonzero(self.rank[self.high] == r), False) for r in range(self.levels)]

    def _stacks(self, edges: np.ndarray, ahead: bool) -> list[_Stack]:
        """Tables of these edges, which all begin (ahead) or end at one rank, by their padded size."""
        field, size = self.field, np.diff(self.field.offset)
        near, far, near_at, far_at = self.low, self.high, self.low_at, self.high_at
        if not ahead:
            near, far, near_at, far_at = far, near, far_at, near_at
        groups: dict[tuple[int, int], list[int]] = {}
        for e in edges.tolist():
            groups.setdefault((_padded(size[near[e]]), _padded(size[far[e]])), []).append(e)
        out = []
        for (a, b), group in sorted(groups.items()):
            tables = np.full((len(group), a, b), np.inf)
            places, toward, away, target = (
                np.full((len(group), n), last) for n, last in ((a, field.size), (a, -1), (b, -1), (b, field.size))
            )
            for g, e in enumerate(group):
                i, j = near[e], far[e]
                table = field.problem.tables[e] if field.ends[e, 0] == i else field.problem.tables[e].T
                tables[g, : size[i], : size[j]] = np.minimum(table, self.top)
                places[g, : size[i]] = np.arange(field.offset[i], field.offset[i + 1])
                toward[g, : size[i]] = np.arange(near_at[e], near_at[e + 1])
                away[g, : size[j]] = np.arange(far_at[e], far_at[e + 1])
                target[g, : size[j]] = np.arange(field.offset[j], field.offset[j + 1])
            out.append(_Stack(np.array(group), tables, places, toward, away, target))
        return out

    def reprice(self, prices: Prices) -> None:
        memory = self.field.memory_costs(prices)
        self.theta[:-1] += memory - self.memory
        self.memory = memory
        self.constant = self.field.fixed + sum(price * (self.field.base[m] - self.field.limit) for m, price in prices.items())
        self.bound = -np.inf

    def _collect(self, r: int) -> np.ndarray:
        """Costs with all messages of the strategies of rank r, also into `theta`."""
        a, to_a, b, to_b = self.arrive[r]
        place = self.places[r]
        theta = self.field.costs[place] + self.memory[place]
        theta += np.bincount(to_a, self.down[a], len(place)) + np.bincount(to_b, self.up[b], len(place))
        self.theta[place] = theta
        return theta

    def _send(self, stacks: list[_Stack], into: np.ndarray, back: np.ndarray) -> None:
        for s in stacks:
            part = self.theta[s.near] * self.gamma[s.near] - back[s.toward]
            into[s.away] = (s.tables + part[:, :, None]).min(axis=1)
        into[-1] = 0.0

    def sweep(self) -> float:
        """There and back once; the bound."""
        for r in range(self.levels):
            self._collect(r)
            self._send(self.forward[r], self.up, self.down)
        total = self.constant
        for r in reversed(range(self.levels)):
            theta, place, start = self._collect(r), self.places[r], self.starts[r]
            total += float(np.minimum.reduceat(theta * self.kept[place], start).sum())
            least = np.minimum.reduceat(theta, start)
            self.excess[place] = theta - np.repeat(least, np.diff(np.r_[start, len(place)]))
            self._send(self.backward[r], self.down, self.up)
        self.bound = total
        return total

    def decode(self) -> list[int]:
        """A choice: nodes from the last rank to the first, each for the best given those before it and the messages of those to come."""
        field = self.field
        cost = field.costs + self.memory + np.bincount(self.high_to, self.up[:-1], field.size)
        choice = np.zeros(field.n, np.int64)
        for r in reversed(range(self.levels)):
            place, start, nodes = self.places[r], self.starts[r], self.members[r]
            here = cost[place]
            length = np.diff(np.r_[start, len(place)])
            first = np.flatnonzero(here == np.repeat(np.minimum.reduceat(here, start), length))
            choice[nodes] = first[np.searchsorted(first, start)] - start
            for s in self.backward[r]:
                rows, real = s.tables[np.arange(len(s.edges)), choice[self.high[s.edges]]], s.target < field.size
                np.add.at(cost, s.target[real], rows[real])
        return [int(k) for k in choice]

    def reduced(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cost per strategy, flat, and what has left the tables, per strategy of their node of lower and of higher rank).

        Taken from the tables and put into the nodes, messages leave no table anything below 0, and every choice costs what it did.
        """
        node = self.theta[:-1] * self.kept
        return node, self.down[:-1], self.up[:-1] - (self.gamma * self.theta)[self.high_to]
