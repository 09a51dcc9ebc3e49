"""Sweeps that tighten the bound of a pairwise relaxation: cost moves between nodes and edges, one node after the other.

Every node's and every edge's minimum add up to the bound, which no sweep makes worse (Kolmogorov, "A new look at reweighted message
passing", 2015).
"""

from __future__ import annotations

import numpy as np


class Sweeps:
    """node[i]: cost per strategy; edge[i, j], i < j: cost per pair; constant: cost of everything else."""

    node: list[np.ndarray]
    edge: dict[tuple[int, int], np.ndarray]
    constant: float

    def link(self) -> None:
        """To be called when edges have come or gone."""
        self.before: list[list[int]] = [[] for _ in self.node]
        self.after: list[list[int]] = [[] for _ in self.node]
        for i, j in sorted(self.edge):
            self.after[i].append(j)
            self.before[j].append(i)

    def bound(self) -> float:
        return self.constant + sum(float(t.min()) for t in self.node) + sum(float(t.min()) for t in self.edge.values())

    def _collect(self, i: int) -> None:
        """Bring everything that the edges around i say about i into its node."""
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

    def passes(self) -> tuple[list[int], list[np.ndarray]]:
        """There and back once. Returns a decoded choice, as positions, and per node what each of them costs above the best at least."""
        n = len(self.node)
        picked = [0] * n
        for i in range(n):
            self._collect(i)
            cost = self.node[i].copy()
            for j in self.before[i]:
                cost += self.edge[j, i][picked[j]]
            picked[i] = int(cost.argmin())
            self._spread(i, self.after[i], len(self.before[i]), forward=True)
        excess: list[np.ndarray] = [np.zeros(0)] * n
        for i in reversed(range(n)):
            self._collect(i)
            excess[i] = self.node[i] - self.node[i].min()
            self._spread(i, self.before[i], len(self.after[i]), forward=False)
        return picked, excess

    def _spread(self, i: int, ahead: list[int], behind: int, *, forward: bool) -> None:
        if not ahead:
            return
        part = self.node[i] / max(len(ahead), behind)
        for j in ahead:
            if forward:
                self.edge[i, j] += part[:, None]
            else:
                self.edge[j, i] += part
        self.node[i] = self.node[i] - part * len(ahead)
