"""Lossless contraction: what the prices alone decide is decided before anything is searched.

A strategy without a possible partner goes; a node with one strategy left becomes part of its neighbours' prices; a table in which every
strategy of i leaves j exactly one choice makes j follow i, and the two become one node; a table that is a sum of one price per row
and one per column is no table. What is left are the true decisions: a few hundred of tens of thousands where ops mostly follow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .instance import Instance


@dataclass(frozen=True, eq=False)
class Contracted:
    """Nodes 0 … n-1 with more than one strategy, tables between them (i < j), and where the original nodes went.

    costs[i], edges, tables as in `Instance`, all strategies possible, tables perhaps with inf. fixed: cost of what is decided.
    base[t]: usage of what is decided. Usage of the rest, flat: stretch s adds bytes[s] at the moments start[s] ≤ t < end[s] when the
    strategy at position `at[s]` (of all strategies of all nodes in a row) is taken. feasible: False when no choice is possible.
    """

    instance: Instance
    costs: tuple[np.ndarray, ...]
    edges: tuple[tuple[int, int], ...]
    tables: tuple[np.ndarray, ...]
    fixed: float
    base: np.ndarray
    at: np.ndarray
    start: np.ndarray
    end: np.ndarray
    bytes: np.ndarray
    followers: tuple[tuple[int, int, np.ndarray], ...]  # (original node, its node here or -1, its strategy per strategy of that)
    feasible: bool = True

    def expand(self, choice: list[int]) -> list[int]:
        """The choice of all original nodes."""
        out = [0] * len(self.instance.costs)
        for original, node, strategy in self.followers:
            out[original] = int(strategy[choice[node] if node >= 0 else 0])
        return out


class _Graph:
    def __init__(self, instance: Instance) -> None:
        self.costs = [c.copy() for c in instance.costs]
        self.near: list[dict[int, np.ndarray]] = [{} for _ in self.costs]
        self.left = [np.arange(len(c)) for c in self.costs]  # positions of the strategies that are left
        self.leader: list[tuple[int, np.ndarray] | None] = [None] * len(self.costs)
        self.queue: deque[tuple[int, int]] = deque()
        self.queued: set[tuple[int, int]] = set()
        self.feasible = True
        for (i, j), table in zip(instance.edges, instance.tables, strict=True):
            if i == j:
                self.costs[i] = self.costs[i] + np.diag(table)
            else:
                self.add(i, j, table)

    def add(self, i: int, j: int, table: np.ndarray) -> None:
        self.put(i, j, self.near[i][j] + table if j in self.near[i] else table)

    def put(self, i: int, j: int, table: np.ndarray) -> None:
        self.near[i][j], self.near[j][i] = table, table.T
        edge = (i, j) if i < j else (j, i)
        if edge not in self.queued:
            self.queued.add(edge)
            self.queue.append(edge)

    def restrict(self, i: int, keep: np.ndarray) -> None:
        if not len(keep):
            self.feasible = False
            return
        self.costs[i], self.left[i] = self.costs[i][keep], self.left[i][keep]
        for j, table in list(self.near[i].items()):
            self.put(i, j, table[keep])
        if len(keep) == 1:
            self.settle(i)

    def settle(self, i: int) -> None:
        """Node i has one strategy: its tables become prices of its neighbours."""
        changed = []
        for j, table in self.near[i].items():
            self.costs[j] = self.costs[j] + table[0]
            del self.near[j][i]
            changed.append(j)
        self.near[i] = {}
        for j in changed:
            self.possible(j)

    def possible(self, i: int) -> None:
        ok = np.isfinite(self.costs[i])
        if not ok.all():
            self.restrict(i, np.flatnonzero(ok))

    def run(self) -> None:
        for i in range(len(self.costs)):
            self.possible(i)
            if self.feasible and len(self.costs[i]) == 1:
                self.settle(i)
        while self.queue and self.feasible:
            i, j = self.queue.popleft()
            self.queued.discard((i, j))
            if j in self.near[i]:
                self.look(i, j)

    def look(self, i: int, j: int) -> None:
        table = self.near[i][j]
        finite = np.isfinite(table)
        rows, cols = finite.sum(1), finite.sum(0)
        if not rows.all():
            self.restrict(i, np.flatnonzero(rows))
        elif not cols.all():
            self.restrict(j, np.flatnonzero(cols))
        elif (rows == 1).all() and ((cols != 1).any() or len(self.near[i]) >= len(self.near[j])):
            self.follow(i, j, finite.argmax(1))
        elif (cols == 1).all():
            self.follow(j, i, finite.argmax(0))
        elif finite.all():
            over = table - table[:1]
            if not np.abs(over - over[:, :1]).max():
                del self.near[i][j], self.near[j][i]
                self.costs[j], self.costs[i] = self.costs[j] + table[0], self.costs[i] + over[:, 0]

    def follow(self, i: int, j: int, strategy: np.ndarray) -> None:
        """Node j takes `strategy[k]` whenever i takes k: from now on they are one."""
        table = self.near[i].pop(j)
        del self.near[j][i]
        self.costs[i] = self.costs[i] + self.costs[j][strategy] + table[np.arange(len(strategy)), strategy]
        where = np.full(int(self.left[i].max()) + 1, -1)
        where[self.left[i]] = self.left[j][strategy]
        self.leader[j] = (i, where)
        for k, other in self.near[j].items():
            del self.near[k][j]
            self.add(i, k, other[strategy])
        self.near[j] = {}

    def resolve(self, node: int) -> tuple[int, np.ndarray]:
        """(root, strategy of `node` per strategy left of the root)."""
        maps, root = [], node
        while (up := self.leader[root]) is not None:
            root, where = up
            maps.append(where)
        strategy = self.left[root]
        for where in reversed(maps):
            strategy = where[strategy]
        return root, strategy


def contract(instance: Instance) -> Contracted:
    """Everything that is decided without a search, decided."""
    graph = _Graph(instance)
    graph.run()
    if not graph.feasible:
        none = np.zeros(0, np.int64)
        return Contracted(instance, (), (), (), 0.0, np.zeros(instance.moments), none, none, none, np.zeros(0), (), feasible=False)
    roots = [i for i in range(len(graph.costs)) if graph.leader[i] is None and len(graph.costs[i]) > 1]
    index = {root: i for i, root in enumerate(roots)}
    offset = np.concatenate([[0], np.cumsum([len(graph.costs[r]) for r in roots])]).astype(np.int64)
    fixed = sum(float(graph.costs[i][0]) for i in range(len(graph.costs)) if graph.leader[i] is None and i not in index)
    change = np.zeros(instance.moments + 1)
    followers: list[tuple[int, int, np.ndarray]] = []
    flat: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for original, ((start, end), usage) in enumerate(zip(instance.intervals, instance.usages, strict=True)):
        root, strategy = graph.resolve(original)
        node = index.get(root, -1)
        followers.append((original, node, strategy))
        if start >= end:
            continue
        used = usage[strategy]
        least = float(used.min())  # of every choice: not part of any decision
        change[start] += least
        change[end] -= least
        if node >= 0 and used.max() > least:
            n = len(used)
            flat.append((offset[node] + np.arange(n), np.full(n, start), np.full(n, end), used - least))
    edges = [(index[i], index[j], table) for i in roots for j, table in graph.near[i].items() if i < j]
    at, starts, ends, size = (
        np.concatenate(c) if flat else np.zeros(0, np.int64) for c in (zip(*flat, strict=True) if flat else ((),) * 4)
    )
    return Contracted(
        instance,
        tuple(graph.costs[r] for r in roots),
        tuple((i, j) for i, j, _ in edges),
        tuple(np.ascontiguousarray(t) for _, _, t in edges),
        fixed,
        change.cumsum()[:-1],
        at,
        starts,
        ends,
        size.astype(np.float64),
        tuple(followers),
    )
