"""Memory rows: the bytes alive at one moment, as linear terms over the flows of the ILP in shard.py.

At moment m, with f[t, p, q] the flow of consumer t (1 when the value has source state p and t wants q):

    a value in state p lives      live ≥ Σ_q same f[t, p, q]             for t that holds on at m
                                  live ≥ f[t, p, q] - Σ_u f[u, p, q]     for a copy first made at m or later; u took it before m
    a copy in state q lives       live ≥ Σ_p f[t, p, q]                  for t with used ≤ m ≤ held
                                  live ≥ Σ_p f[t, p, q] + f[u, p, q] - 1 for t that took it before m and u that takes it after
    a conversion runs             live ≥ f[t, p, q] - Σ_u f[u, p, q]     for t that takes it at m; u took it before m

which is exactly what `problem.items` counts, whenever the flows are whole. Instances of a folded value with the same pattern of
"took it" and "holds it" share their terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .problem import Problem, Value, items


@dataclass(frozen=True)
class Pattern:
    """`count` instances of a value that look alike at a moment. taken[t]: used before or at it; later[t]: used at or after it."""

    count: int
    fresh: bool  # produced at this very moment
    taken: tuple[bool, ...]
    later: tuple[bool, ...]
    holds: tuple[bool, ...]

    @property
    def now(self) -> list[int]:
        """The consumers that take it at this very moment."""
        return [t for t, (taken, later) in enumerate(zip(self.taken, self.later, strict=True)) if taken and later]


def patterns(value: Value, moment: int) -> Iterator[Pattern]:
    """The ways in which instances of `value` can be alive at `moment`."""
    born = value.produced <= moment
    if not born.any():
        return
    used, held = value.used[born], value.held[born]
    fresh = value.produced[born] == moment
    alive = fresh | (held >= moment).any(axis=1)
    if not alive.any():
        return
    n = len(value.consumers)
    flags = np.concatenate([fresh[:, None], used <= moment, used >= moment, held >= moment], axis=1)[alive]
    rows, counts = np.unique(flags, axis=0, return_counts=True)
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        yield Pattern(count, row[0], tuple(row[1 : 1 + n]), tuple(row[1 + n : 1 + 2 * n]), tuple(row[1 + 2 * n :]))


class Moments:
    """The patterns alive at a moment, (value, pattern) pairs, worked out once per moment."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.known: dict[int, tuple[tuple[int, Pattern], ...]] = {}

    def at(self, moment: int) -> tuple[tuple[int, Pattern], ...]:
        if moment not in self.known:
            self.known[moment] = tuple((v, p) for v, value in enumerate(self.problem.values) for p in patterns(value, moment))
        return self.known[moment]


def crowded(memory: np.ndarray, limit: int, known: set[int], most: int = 4) -> list[int]:
    """Up to `most` violated moments that are far apart: the peak first, then the peaks of what is left around it."""
    over = np.where(memory > limit, memory, -1)
    for m in known:
        over[m] = -1
    span = max(1, len(memory) // (8 * most))
    found: list[int] = []
    while len(found) < most and over.max(initial=-1) >= 0:
        m = int(over.argmax())
        found.append(m)
        over[max(0, m - span) : m + span + 1] = -1
    return found


def largest(problem: Problem, choice: tuple[int, ...], moment: int, most: int = 3) -> list[tuple[str, int]]:
    """The names and bytes of the largest tensors alive at `moment`, all instances of one together."""
    found = [(node.name, int(node.resident[k])) for node, k in zip(problem.nodes, choice, strict=True)]
    for item in items(problem, choice):
        alive = int(((item.start <= moment) & (item.end >= moment)).sum())
        found.append((problem.values[item.value].name, alive * item.bytes))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:most]
