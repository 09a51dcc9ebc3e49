"""The memory that a chain of moves needs while it runs: what runtime/collectives.py packs, receives and joins.

A wire gives a new tensor; pieces of an inner or uneven part are repacked before or after. The chains are those of `comm`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np

from ..ir.spec import Spec
from .comm import MOVES, Conversions, _Space

Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_tables: weakref.WeakKeyDictionary[_Space, Tables] = weakref.WeakKeyDictionary()


def room(conversions: Conversions, sources: Sequence[Spec], targets: Sequence[Spec]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pairs, shape (sources, targets), local bytes: alive at the worst moment of the chain, source and result left out;
    storage of the result, padding included. And whether the chain ends with an all-reduce. Zeros where there is no chain."""
    worst, kept, reduced = (np.zeros((len(sources), len(targets)), np.int64) for _ in range(3))
    columns = conversions._grouped(targets)
    for start, rows, states in conversions._grouped(sources):
        for end, cols, goals in columns:
            for i in sorted(set(states)):
                found = _from_state(conversions, start, i, end, goals)
                at = [row for row, state in zip(rows, states, strict=True) if state == i]
                for out, value in zip((worst, kept, reduced), found, strict=True):
                    out[np.ix_(at, cols)] = value
    return np.maximum(worst - kept, 0), kept, reduced.astype(bool)


def move_room(space: _Space, i: int, j: int) -> tuple[int, int]:
    """(bytes alive at the worst moment of the move from state i to state j besides its input, bytes of the storage it leaves; 0 for its
    input's)."""
    kind, axis = _kind(space, i, j)
    before, after = _bytes(space, i), _bytes(space, j)
    if kind == "all_to_all":
        return max(2 * before, before + after, 2 * after), after
    if kind not in ("all_gather", "reduce_scatter"):
        return after, after if kind != "mask" else 0  # on one device what is masked is the input itself
    whole, piece = (j, i) if kind == "all_gather" else (i, j)
    at = space.where[space.specs[piece].placements[axis]]  # type: ignore[index]
    padded = (before if kind == "all_gather" else after) * space.mesh.axes[axis].size
    outermost = math.prod(space.local[whole][:at]) == 1
    if kind == "all_gather":
        return (padded, padded) if outermost else (2 * padded, after)
    joined = 0 if padded == before else padded
    return (joined + after if outermost else padded + max(joined, after)), after


def _bytes(space: _Space, i: int) -> int:
    return math.prod(space.local[i]) * space.dtype.itemsize


def _kind(space: _Space, i: int, j: int) -> tuple[str, int]:
    """What the move from state i to state j is, and over which axis."""
    old, new = space.specs[i].placements, space.specs[j].placements
    axis = next(a for a, (p, q) in enumerate(zip(old, new, strict=True)) if p != q)
    return MOVES[type(old[axis]), type(new[axis])], axis


def tables(space: _Space) -> Tables:
    """Bytes alive at the worst moment of every chain: besides its input; with the input of every move, the first too; those left.
    And 1 where the last move is an all-reduce."""
    if space not in _tables:
        _tables[space] = _walk(space)
    return _tables[space]


def _walk(space: _Space) -> Tables:
    n = len(space.specs)
    beside, left, reduces = (np.zeros((n, n), np.int64) for _ in range(3))
    for i, edges in enumerate(space.edges):
        for j, *_ in edges:
            beside[i, j], left[i, j] = move_room(space, i, j)
            reduces[i, j] = _kind(space, i, j)[0] == "all_reduce"
    size = np.array([_bytes(space, i) for i in range(n)], np.int64)
    goal, start = np.broadcast_to(np.arange(n)[None, :], (n, n)), np.broadcast_to(np.arange(n)[:, None], (n, n))
    at = np.where(np.isfinite(space.seconds), start, goal)
    without, within, ends, kept = *(np.zeros((n, n), np.int64) for _ in range(3)), np.tile(size[:, None], (1, n))
    while (at != goal).any():
        moving = at != goal
        following = np.where(moving, space.first[at, goal], goal)
        need = beside[at, following]
        without = np.maximum(without, moving * (need + kept * (at != start)))
        within = np.maximum(within, moving * (need + kept))
        kept = np.where(moving & (left[at, following] > 0), left[at, following], kept)
        ends = np.where(moving, reduces[at, following], ends)
        at = following
    return without, within, kept, ends


def _from_state(conversions: Conversions, start: _Space, i: int, end: _Space, goals: list[int]) -> tuple[np.ndarray, ...]:
    without, within, left, reduced = tables(end)
    if start is end:
        return without[i, goals], left[i, goals], reduced[i, goals]
    u, v = conversions._common(start, end)
    if not len(u):
        return tuple(np.zeros((3, len(goals)), np.int64))
    best = np.argmin(start.seconds[i, u][:, None] + end.seconds[v][:, goals], axis=0)
    by, to = u[best], v[best]
    first, _, kept, before = (table[i, by] for table in tables(start))
    stays = to == goals
    padding = kept - np.array([_bytes(start, int(state)) for state in by])
    worst = np.maximum(first, np.where(by == i, without[to, goals], within[to, goals] + padding))
    return worst, np.where(stays, kept, left[to, goals]), np.where(stays, before, reduced[to, goals])
