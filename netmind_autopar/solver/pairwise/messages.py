"""Lower bounds by message passing under prices of memory: sequential tree-reweighted sweeps, which never make the bound worse.

Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", 2006, in the reparametrised form: every node's and
every table's minimum add up to a bound, and sweeps move cost between them. Moments of memory with a price λ_t are charged to the
strategies that use memory then, and Σ λ_t (base_t - limit) is added: by Lagrangian duality the bound holds with the limit.
"""

from __future__ import annotations

import numpy as np

from ..sweeps import Sweeps
from .field import Field, Prices


class Messages(Sweeps):
    def __init__(self, field: Field) -> None:
        self.field, self.prices, self.constant = field, {}, field.fixed
        self.memory = np.zeros(field.size)
        self.node = field.split(field.costs)
        finite = [float(t[np.isfinite(t)].max(initial=0.0)) for t in field.problem.tables]
        top = 4.0 * (float(np.abs(field.costs).max(initial=0.0)) + max(finite, default=0.0)) + 1.0  # forbidden pairs stay unattractive
        self.edge = {e: np.where(np.isfinite(t), t, top) for e, t in zip(field.problem.edges, field.problem.tables, strict=True)}
        self.link()

    def reprice(self, prices: Prices) -> None:
        memory = self.field.memory_costs(prices)
        for theta, more in zip(self.node, self.field.split(memory - self.memory), strict=True):
            theta += more
        self.memory, self.prices = memory, dict(prices)
        free = sum(price * (self.field.base[m] - self.field.limit) for m, price in prices.items())
        self.constant = self.field.fixed + float(free)

    def sweep(self) -> list[int]:
        """There and back once. Returns a choice decoded on the way."""
        return self.passes()[0]
