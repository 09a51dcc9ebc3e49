"""The memory that a chain of moves needs while it runs: what runtime/collectives.py packs, receives and joins.

A wire gives a new tensor; pieces of an inner or uneven part are repacked before or after. The chains are those of `comm`.
"""

from __future__ import annotations

import weakref

import numpy as np

from .comm import Conversions, Specs
from .space import KINDS, Space, Steps

Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_tables: weakref.WeakKeyDictionary[Space, Tables] = weakref.WeakKeyDictionary()


def room(conversions: Conversions, sources: Specs, targets: Specs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pairs, shape (sources, targets), local bytes: alive at the worst moment of the chain, source and result left out;
    storage of the result, padding included. And whether the chain ends with an all-reduce. Zeros where there is no chain."""
    worst, kept, reduced = (np.zeros((len(sources), len(targets)), np.int64) for _ in range(3))
    columns = conversions.grouped(targets)
    for start, rows, states in conversions.grouped(sources):
        for end, cols, goals in columns:
            found = _between(conversions, start, states, end, goals)
            for out, value in zip((worst, kept, reduced), found, strict=True):
                out[np.ix_(rows, cols)] = value
    return np.maximum(worst - kept, 0), kept, reduced.astype(bool)


def move_room(space: Space, moves: Steps) -> tuple[np.ndarray, np.ndarray]:
    """Per move (bytes alive at its worst moment besides its input, bytes of the storage it leaves; 0 for its input's)."""
    before, after = space.bytes[moves.before], space.bytes[moves.after]
    kind = np.array(KINDS)[moves.kind]
    gather, scatter = kind == "all_gather", kind == "reduce_scatter"
    size = np.array(space.mesh.sizes, np.int64)[moves.axis]
    padded = np.where(gather, before, after) * size
    outermost = np.zeros(len(kind), bool)
    for one, whole in ((gather, moves.after), (scatter, moves.before)):
        outermost[one] = space.outermost(whole[one], moves.part[one])
    joined = np.where(padded == before, 0, padded)
    need = np.select(
        [kind == "all_to_all", gather, scatter],
        [
            np.maximum(np.maximum(2 * before, before + after), 2 * after),
            np.where(outermost, padded, 2 * padded),
            np.where(outermost, joined + after, padded + np.maximum(joined, after)),
        ],
        after,
    )
    # on one device what is masked is the input itself
    left = np.select([kind == "mask", gather & outermost], [0 * after, padded], after)
    return need, left


def tables(space: Space) -> Tables:
    """Bytes alive at the worst moment of every chain: besides its input; with the input of every move, the first too; those left.
    And 1 where the last move is an all-reduce."""
    if space not in _tables:
        _tables[space] = _walk(space)
    return _tables[space]


def _walk(space: Space) -> Tables:
    n, moves = len(space.placed), space.edges
    beside, left, reduces = (np.zeros((n, n), np.int64) for _ in range(3))
    beside[moves.before, moves.after], left[moves.before, moves.after] = move_room(space, moves)
    reduces[moves.before, moves.after] = moves.kind == KINDS.index("all_reduce")
    without, within, ends, kept = *(np.zeros((n, n), np.int64) for _ in range(3)), np.tile(space.bytes[:, None], (1, n))
    for start, at, goal, following in space.walk():
        need, have, after = beside[at, following], kept[start, goal], left[at, following]
        without[start, goal] = np.maximum(without[start, goal], need + have * (at != start))
        within[start, goal] = np.maximum(within[start, goal], need + have)
        kept[start, goal] = np.where(after > 0, after, have)
        ends[start, goal] = reduces[at, following]
    return without, within, kept, ends


def _between(conversions: Conversions, start: Space, states: np.ndarray, end: Space, goals: np.ndarray) -> tuple[np.ndarray, ...]:
    without, within, left, reduced = tables(end)
    if start is end:
        pairs = np.ix_(states, goals)
        return without[pairs], left[pairs], reduced[pairs]
    by, to = conversions.through(start, states, end, goals)
    if by.size == 0:
        return tuple(np.zeros((3, len(states), len(goals)), np.int64))
    first, _, kept, before = (table[states[:, None], by] for table in tables(start))
    stays = to == goals
    padding = kept - start.bytes[by]
    moved = np.where(by == states[:, None], without[to, goals], within[to, goals] + padding)
    return np.maximum(first, moved), np.where(stays, kept, left[to, goals]), np.where(stays, before, reduced[to, goals])
