"""Plans made better a forest at a time: nodes that form no cycle among themselves are chosen anew together, exactly.

The rest of the graph is held; dynamic programming finds the best choice of all nodes of the forest at once, and what was there before
is one of the candidates, so a move never makes a plan worse. A random forest covers a large part of a sparse graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .field import Field


def forest(field: Field, order: Sequence[int]) -> list[bool]:
    """Which nodes are free: taken greedily in `order` as long as they close no cycle."""
    leader = list(range(field.n))
    free = [False] * field.n

    def find(a: int) -> int:
        while leader[a] != a:
            leader[a] = leader[leader[a]]
            a = leader[a]
        return a

    for i in order:
        around = [find(j) for j, _ in field.near[i] if free[j]]
        if len(set(around)) == len(around):
            free[i] = True
            for root in around:
                leader[root] = i
    return free


def improve(field: Field, choice: Sequence[int], prices: Sequence[np.ndarray], order: Sequence[int]) -> list[int]:
    """The best choice that differs from `choice` only on a forest. prices[i]: own price of every strategy of i, memory included."""
    free, now, seen = forest(field, order), list(choice), [False] * field.n
    for root in order:
        if free[root] and not seen[root]:
            _tree(field, root, free, seen, prices, now)
    return now


def _tree(field: Field, root: int, free: list[bool], seen: list[bool], prices: Sequence[np.ndarray], now: list[int]) -> None:
    """Choose one tree anew, in place."""
    walk: list[tuple[int, int, np.ndarray | None]] = []
    stack: list[tuple[int, int, np.ndarray | None]] = [(root, -1, None)]
    seen[root] = True
    while stack:
        i, parent, table = stack.pop()
        walk.append((i, parent, table))
        for j, near in field.near[i]:
            if free[j] and not seen[j]:
                seen[j] = True
                stack.append((j, i, near))
    told: dict[int, np.ndarray] = {}
    answer: dict[int, np.ndarray] = {}
    for i, parent, table in reversed(walk):
        value = prices[i] + told.pop(i) if i in told else prices[i].copy()
        for j, near in field.near[i]:
            if not free[j]:
                value += near[:, now[j]]
        if table is None:
            now[i] = int(value.argmin())
            continue
        both = table + value  # [of the parent, of i]
        answer[i] = both.argmin(axis=1)
        best = both.min(axis=1)
        told[parent] = told[parent] + best if parent in told else best
    for i, parent, table in walk:
        if table is not None:
            now[i] = int(answer[i][now[parent]])
