"""Lower bounds by message passing under prices of memory: sequential tree-reweighted sweeps, which never make the bound worse.

Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", 2006, in the reparametrised form: every node's and
every table's minimum add up to a bound, and sweeps move cost between them. Moments of memory with a price λ_t are charged to the
strategies that use memory then, and Σ λ_t (base_t - limit) is added: by Lagrangian duality the bound holds with the limit.
"""

from __future__ import annotations

import numpy as np

from .field import Field, Prices


class Messages:
    def __init__(self, field: Field) -> None:
        self.field, self.prices, self.constant = field, {}, field.fixed
        self.memory = np.zeros(field.size)
        self.node = field.split(field.costs)
        finite = [float(t[np.isfinite(t)].max(initial=0.0)) for t in field.problem.tables]
        top = 4.0 * (float(np.abs(field.costs).max(initial=0.0)) + max(finite, default=0.0)) + 1.0  # forbidden pairs stay unattractive
        self.edge = {e: np.where(np.isfinite(t), t, top) for e, t in zip(field.problem.edges, field.problem.tables, strict=True)}
        self.before: list[list[int]] = [[] for _ in range(field.n)]
        self.after: list[list[int]] = [[] for _ in range(field.n)]
        for i, j in sorted(self.edge):
            self.after[i].append(j)
            self.before[j].append(i)

    def reprice(self, prices: Prices) -> None:
        memory = self.field.memory_costs(prices)
        for theta, more in zip(self.node, self.field.split(memory - self.memory), strict=True):
            theta += more
        self.memory, self.prices = memory, dict(prices)
        free = sum(price * (self.field.base[m] - self.field.limit) for m, price in prices.items())
        self.constant = self.field.fixed + float(free)

    def bound(self) -> float:
        return self.constant + sum(float(t.min()) for t in self.node) + sum(float(t.min()) for t in self.edge.values())

    def _collect(self, i: int) -> None:
        theta = self.node[i]
        for j in self.before[i]:
            table = self.edge[j, i]
            least = table.min(axis=0)
            theta += least
            table -= least
        for j in self.after[i]:
            table = self.edge[i, j]
            least = table.min(axis=1)
            theta += least
            table -= least[:, None]

    def sweep(self) -> list[int]:
        """There and back once. Returns a choice decoded on the way."""
        picked = [0] * self.field.n
        for i in range(self.field.n):
            self._collect(i)
            cost = self.node[i].copy()
            for j in self.before[i]:
                cost += self.edge[j, i][picked[j]]
            picked[i] = int(cost.argmin())
            if self.after[i]:
                part = self.node[i] / max(len(self.after[i]), len(self.before[i]))
                for j in self.after[i]:
                    self.edge[i, j] += part[:, None]
                self.node[i] = self.node[i] - part * len(self.after[i])
        for i in reversed(range(self.field.n)):
            self._collect(i)
            if self.before[i]:
                part = self.node[i] / max(len(self.after[i]), len(self.before[i]))
                for j in self.before[i]:
                    self.edge[j, i] += part
                self.node[i] = self.node[i] - part * len(self.before[i])
        return picked
