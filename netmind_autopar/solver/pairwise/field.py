"""A contracted problem in the form that sweeps need: flat prices, neighbours, usage at every moment, and prices of moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .contract import Contracted

Prices = Mapping[int, float]  # moment -> cost per unit of usage


class Field:
    """`offset[i]` is where the strategies of node i begin in flat arrays; `near[i]` lists (j, table [of i, of j]); `ends` are the edges.

    `forbidden[i, j]`: where the table is inf, for tables that are inf anywhere.
    """

    def __init__(self, problem: Contracted) -> None:
        self.problem, self.n = problem, len(problem.costs)
        self.offset = np.concatenate([[0], np.cumsum([len(c) for c in problem.costs])]).astype(np.int64)
        self.size = int(self.offset[-1])
        self.costs = np.concatenate(problem.costs) if self.n else np.zeros(0)
        self.base, self.fixed = problem.base, problem.fixed
        self.limit = float("inf") if problem.instance.limit is None else float(problem.instance.limit)
        self.near: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(self.n)]
        for (i, j), table in zip(problem.edges, problem.tables, strict=True):
            self.near[i].append((j, table))
            self.near[j].append((i, np.ascontiguousarray(table.T)))
        for around in self.near:
            around.sort(key=lambda item: item[0])
        self.ends = np.array(problem.edges, np.int64).reshape(-1, 2)
        banned = ((e, ~np.isfinite(table)) for e, table in zip(problem.edges, problem.tables, strict=True))
        self.forbidden = {e: mask for e, mask in banned if mask.any()}

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """Per node its part of a flat array, as copies."""
        return [flat[a:b].copy() for a, b in zip(self.offset, self.offset[1:], strict=False)]

    def chosen(self, choice: Sequence[int]) -> np.ndarray:
        """A flat array: 1 where a strategy is taken."""
        out = np.zeros(self.size)
        out[self.offset[:-1] + np.asarray(choice, np.int64)] = 1.0
        return out

    def cost(self, choice: Sequence[int]) -> float:
        own = float(self.costs @ self.chosen(choice)) if self.n else 0.0
        pairs = zip(self.problem.edges, self.problem.tables, strict=True)
        return self.fixed + own + sum(float(t[choice[i], choice[j]]) for (i, j), t in pairs)

    def profile(self, flat: np.ndarray) -> np.ndarray:
        """Usage at every moment when strategies are taken to the extent `flat`."""
        p, weight, most = self.problem, self.problem.bytes * flat[self.problem.at], len(self.base) + 1
        return self.base + (np.bincount(p.start, weight, most) - np.bincount(p.end, weight, most)).cumsum()[:-1]

    def row(self, moment: int) -> np.ndarray:
        """Usage at one moment per strategy, flat; `base[moment]` not included."""
        p = self.problem
        alive = (p.start <= moment) & (moment < p.end)
        return np.bincount(p.at[alive], p.bytes[alive], self.size)

    def memory_costs(self, prices: Prices) -> np.ndarray:
        """What the usage of every strategy costs under these prices, flat."""
        dense = np.zeros(len(self.base) + 1)
        for moment, price in prices.items():
            dense[moment + 1] = price
        total, p = dense.cumsum(), self.problem
        return np.bincount(p.at, p.bytes * (total[p.end] - total[p.start]), self.size)

    def peaks(self, profile: np.ndarray, known: Iterable[int] = (), *, slack: float = 0.0, most: int = 8) -> list[int]:
        """The worst moment of each stretch of moments above limit + slack, worst first, without those that are known already."""
        left, out, top = profile.copy(), list[int](), self.limit + slack
        left[list(known)] = -np.inf
        while len(out) < most:
            m = int(left.argmax())
            if left[m] <= top:
                break
            out.append(m)
            over = left > top
            a = m - int(np.argmin(over[m::-1])) if not over[: m + 1].all() else -1
            b = m + int(np.argmin(over[m:])) if not over[m:].all() else len(left)
            left[a + 1 : b] = -np.inf
        return out
