"""Lossless reductions: strategies that no optimal plan needs, before anything is solved.

Two strategies of a node that give all its values the same source states and want the same target states are alike for the rest of
the problem, memory included. Of such a set only those stay that no other one beats in both seconds and resident bytes.
A strategy that forces an impossible conversion goes too. Consumers of a value that always want the same are one consumer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .problem import Problem, Value

Kept = tuple[tuple[int, ...], ...]


def merged(problem: Problem) -> Problem:
    """The same problem with consumers of one value that are of the same node and phase and always want the same state made one, which
    takes it when the first of them does and lets go with the last: what every block takes (a mask, cosines) has one per block."""
    return replace(problem, values=tuple(map(_merged, problem.values)))


def _merged(value: Value) -> Value:
    alike: dict[tuple[int, int, bytes], list[int]] = {}
    for t, consumer in enumerate(value.consumers):
        alike.setdefault((consumer.node, consumer.phase, consumer.state.tobytes()), []).append(t)
    if len(alike) == len(value.consumers):
        return value
    groups = list(alike.values())
    used = np.stack([value.used[:, ts].min(axis=1) for ts in groups], axis=1)
    held = np.stack([value.held[:, ts].max(axis=1) for ts in groups], axis=1)
    return replace(value, consumers=tuple(value.consumers[ts[0]] for ts in groups), used=used, held=held)


def reduce(problem: Problem, allowed: Kept | None = None) -> Kept:
    """Per node the strategies worth looking at, ascending. `allowed` restricts them first (pins)."""
    columns: list[list[np.ndarray]] = [[] for _ in problem.nodes]
    for value in problem.values:
        columns[value.node].append(value.state)
        for consumer in value.consumers:
            columns[consumer.node].append(consumer.state)
    start = allowed or tuple(tuple(range(len(node.labels))) for node in problem.nodes)
    kept = [_undominated(problem, i, start[i], columns[i]) for i in range(len(problem.nodes))]
    while _drop_impossible(problem, kept):
        pass
    return tuple(tuple(ks) for ks in kept)


def _undominated(problem: Problem, i: int, allowed: tuple[int, ...], columns: list[np.ndarray]) -> list[int]:
    node = problem.nodes[i]
    ks = np.array(allowed, dtype=np.int64)
    ks = ks[np.isfinite(node.seconds[ks])]
    alike = np.zeros(len(ks), dtype=np.int64)  # equal where all states are
    for column in columns:
        alike = np.unique(alike * (int(column.max(initial=0)) + 1) + column[ks], return_inverse=True)[1].reshape(-1)
        if alike.max(initial=0) == len(ks) - 1:
            return sorted(ks.tolist())
    seconds, resident = node.seconds[ks], node.resident[ks]
    out: list[int] = []
    least, group = np.inf, -1
    for at in np.lexsort((ks, resident, seconds, alike)).tolist():
        least = least if alike[at] == group else np.inf
        group = alike[at]
        if resident[at] < least:
            out.append(int(ks[at]))
            least = resident[at]
    return sorted(out)


def _drop_impossible(problem: Problem, kept: list[list[int]]) -> bool:
    """Drop strategies all of whose partners on some edge are impossible; True when something went."""
    changed = False
    for value in problem.values:
        if np.isfinite(value.seconds).all():
            continue
        for consumer in value.consumers:
            i, j = value.node, consumer.node
            fine = np.isfinite(value.seconds)[value.state[kept[i]]][:, consumer.state[kept[j]]]
            if i == j:
                fine = np.where(np.eye(len(kept[i]), dtype=bool), fine, False)
            for node, ok in ((i, fine.any(axis=1)), (j, fine.any(axis=0))):
                if not ok.all() and len(ok) == len(kept[node]):
                    kept[node] = [k for k, good in zip(kept[node], ok, strict=True) if good]
                    changed = True
    return changed


def cells(problem: Problem, kept: Kept) -> int:
    """How many pairs of states the flows of the ILP would have: what its size goes by."""
    total = 0
    for value in problem.values:
        p = len(np.unique(value.state[list(kept[value.node])]))
        for consumer in value.consumers:
            q = len(np.unique(consumer.state[list(kept[consumer.node])]))
            total += p * q if p > 1 and q > 1 and consumer.node != value.node else 0
    return total
