"""What it costs to bring a tensor from one layout to another, and by which chain of moves.

The layouts of one tensor are the nodes of a graph; a move changes the placement along one mesh axis and is an edge. A conversion is
a shortest path: greedy choices miss the cheapest chain often, and S,S → R,S is a chain although it looks like one gather.

    kind            change       bytes one device sends (n devices, b local bytes)       messages in a row
    all_gather      S → R        (n − 1) · b of the largest piece                        n − 1
    reduce_scatter  P → S        (n − 1) · b of the largest piece that results           n − 1
    all_reduce      P → R        2 (n − 1) / n · b                                       2 (n − 1)
    all_to_all      S → S'       (n − 1) / n · b                                         n − 1
    slice           R → S        0
    mask            R → P(sum)   0
    recast          none         0: the dims are seen as other parts

Seconds are α–β: messages · latency + bytes / bandwidth of a ring, or of a tree or a hierarchical algorithm where those are faster
(algorithms.py), plus the start of a collective and the local copies around it.
Uneven pieces travel padded to the largest in all-gather and reduce-scatter, as they are in all-to-all. Numbers are those of the
first device of the mesh, which holds the largest pieces.

Legal moves: an axis may leave a part only if no later axis splits that part, and may start to split a part only if no later axis
splits it. Partial(max) and Partial(min) can be reduced but never made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..ir.mesh import Mesh
from ..ir.spec import Partial, Placement, Replicate, Spec
from .space import BUCKET_BYTES as BUCKET_BYTES
from .space import MESSAGES as MESSAGES
from .space import Space
from .space import collective_seconds as collective_seconds

Specs = Sequence[Spec] | np.ndarray  # specs, or their numbers


@dataclass(frozen=True)
class Move:
    """One step. `axis` is the position of the mesh axis, −1 for a recast; `bytes` are sent by one device."""

    kind: str
    axis: int
    before: Spec
    after: Spec
    bytes: int
    seconds: float

    def transfer_s(self, mesh: Mesh) -> float:
        """Of its seconds those that use the bandwidth of its axis's link, without latency and local copies: none of what was measured to be
        over before the latency is."""
        if self.kind not in MESSAGES:
            return 0.0
        seconds = float(collective_seconds(self.kind, mesh.axes[self.axis], self.bytes, latency_share=0.0))
        return min(max(seconds, 0.0), self.seconds)


class Conversions:
    """Cheapest conversions between any two layouts of a tensor on one mesh.

    Every spec that comes up has a number: the first number of its space plus its state there. Tables of many specs are tables of numbers.
    random_costs: a seed; every move then costs a random price that depends on the seed and the move alone, so that odd but legal
    chains are chosen. What is legal does not change.
    """

    def __init__(self, mesh: Mesh, random_costs: int | None = None) -> None:
        self.mesh, self.random_costs = mesh, random_costs
        self._spaces: dict[tuple, int] = {}
        self._all: list[Space] = []
        self._bases: list[int] = [0]
        self._names: dict = {}
        self._known: dict[str, np.ndarray] = {}
        self._links: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._through: tuple[tuple, tuple[np.ndarray, np.ndarray]] | None = None

    def space(self, dims: tuple[tuple[int, ...], ...], dtype: torch.dtype, op: str) -> tuple[Space, int]:
        """All layouts of a tensor whose Partial placements are of one reduction, and the number of the first one."""
        key = (dims, dtype, op)
        if key not in self._spaces:
            self._spaces[key] = len(self._all)
            self._all.append(Space(self.mesh, *key, self.random_costs, self._names))
            self._bases.append(self._bases[-1] + len(self._all[-1].placed))
            self._known = {}
        at = self._spaces[key]
        return self._all[at], self._bases[at]

    def number(self, spec: Spec) -> int:
        """The number of a spec; −1 for one that leaves a device empty or mixes reductions."""
        if len(spec.placements) != len(self.mesh.axes):
            raise ValueError(f"{spec} does not have one placement for each axis of the mesh {self.mesh}")
        used = tuple(p if axis.size > 1 else Replicate() for p, axis in zip(spec.placements, self.mesh.axes, strict=True))
        ops = {p.op for p in used if isinstance(p, Partial)}
        space, base = self.space(spec.dims, spec.dtype, ops.pop() if len(ops) == 1 else "sum")
        return base + space.index[used] if used in space.index else -1

    def numbers(self, dims: tuple[tuple[int, ...], ...], dtype: torch.dtype, options: Sequence[Placement], codes: np.ndarray) -> np.ndarray:
        """The numbers of the specs with the placements options[codes[k, axis]], which leave no device empty; codes: (specs, axes)."""
        reductions = ["sum", *sorted({p.op for p in options if isinstance(p, Partial)} - {"sum"})]
        which = np.array([reductions.index(p.op) if isinstance(p, Partial) else 0 for p in options])[codes].max(axis=1)
        out = np.empty(len(codes), dtype=np.int64)
        for w, op in enumerate(reductions):
            rows = np.flatnonzero(which == w)
            space, base = self.space(dims, dtype, op)
            at = np.array([space.options.index(p) if p in space.options else -1 for p in options])[codes[rows]]
            states = space.number[at @ space.strides]
            assert (at >= 0).all() and (states >= 0).all(), f"a spec of {dims} has no place on {self.mesh}"
            out[rows] = base + states
        return out

    def spec(self, number: int) -> Spec:
        at = bisect_right(self._bases, number) - 1
        return self._all[at].specs[number - self._bases[at]]

    def layouts(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers that are equal where layouts of one tensor are."""
        return self._facts("layouts")[numbers]

    def local_bytes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes that the fullest device holds."""
        return self._facts("bytes")[numbers]

    def partial(self, numbers: np.ndarray) -> np.ndarray:
        """Whether some placement is Partial."""
        return self._facts("partial")[numbers]

    def _facts(self, name: str) -> np.ndarray:
        if name not in self._known:
            self._known[name] = np.concatenate([getattr(space, name) for space in self._all])
        return self._known[name]

    def seconds(self, a: Spec, b: Spec, *, bucketed: bool = False) -> float:
        """Seconds of the cheapest chain; 0 when the layouts are equal, inf when there is no chain.

        bucketed: small all-reduces share one collective: each pays its part, bytes / 25 MiB, of the latency.
        """
        if a == b:
            return 0.0
        return float(self.matrix((a,), (b,), bucketed=bucketed)[0, 0])

    def path(self, a: Spec, b: Spec) -> tuple[Move, ...]:
        """The cheapest chain, from exactly `a` to exactly `b`: every move begins with the spec with which the one before ended.

        Raises ValueError when there is none: other shapes or dtypes, an empty shard, a Partial(max) asked for.
        """
        if a == b:
            return ()
        moves: list[Move] = []
        for space, i, j in self._chain(a, b):
            if moves:
                moves.append(_recast(moves[-1].after, space.specs[i]))
            moves += [_recast(space.specs[i], space.specs[i]), *_moves(space, i, j)]
        return _joined([_recast(a, moves[0].before), *moves, _recast(moves[-1].after, b)])

    def _chain(self, a: Spec, b: Spec) -> list[tuple[Space, int, int]]:
        """The spaces that the cheapest chain passes, and from which state to which."""
        numbers = np.array([self.number(a), self.number(b)])
        if (numbers >= 0).all() and np.isfinite(self.matrix(numbers[:1], numbers[1:])[0, 0]):
            (start, _, (i,)), (end, _, (j,)) = self.grouped(numbers[:1])[0], self.grouped(numbers[1:])[0]
            if start is end:
                return [(start, int(i), int(j))]
            by, to = self.through(start, np.array([i]), end, np.array([j]))
            return [(start, int(i), int(by[0, 0])), (end, int(to[0, 0]), int(j))]
        raise ValueError(f"no chain of moves leads from {a} to {b} on the mesh {self.mesh}")

    def matrix(self, sources: Specs, targets: Specs, *, bucketed: bool = False) -> np.ndarray:
        """`seconds` of all pairs, shape (sources, targets)."""
        out = np.full((len(sources), len(targets)), np.inf)
        columns = self.grouped(targets)
        for start, rows, states in self.grouped(sources):
            for end, cols, goals in columns:
                out[np.ix_(rows, cols)] = self._block(start, states, end, goals, bucketed)
        return out

    def tail(self, sources: Specs, targets: Specs) -> np.ndarray:
        """Bucketed seconds of the all-reduces that the chains end with, shape (sources, targets)."""
        out = np.zeros((len(sources), len(targets)))
        columns = self.grouped(targets)
        for start, rows, states in self.grouped(sources):
            for end, cols, goals in columns:
                if start is end:
                    out[np.ix_(rows, cols)] = start.tail[0][np.ix_(states, goals)]
                    continue
                by, to = self.through(start, states, end, goals)
                if by.size:
                    last, pure = (table[to, goals] for table in end.tail)
                    out[np.ix_(rows, cols)] = last + pure * start.tail[0][states[:, None], by]
        return out

    def grouped(self, specs: Specs) -> list[tuple[Space, np.ndarray, np.ndarray]]:
        """(space, positions in `specs`, states) for every space that occurs."""
        numbers = specs if isinstance(specs, np.ndarray) else np.array([self.number(spec) for spec in specs], dtype=np.int64)
        at = np.searchsorted(np.array(self._bases), numbers, side="right") - 1
        out = []
        for k in np.unique(at[numbers >= 0]).tolist():
            rows = np.flatnonzero(at == k)
            out.append((self._all[k], rows, numbers[rows] - self._bases[k]))
        return out

    def _block(self, start: Space, states: np.ndarray, end: Space, goals: np.ndarray, bucketed: bool) -> np.ndarray:
        if start is end:
            return (start.bucketed if bucketed else start.seconds)[np.ix_(states, goals)]
        by, to = self.through(start, states, end, goals)
        if by.size == 0:
            return np.full((len(states), len(goals)), np.inf)
        first, second = (start.bucketed, end.bucketed) if bucketed else (start.seconds, end.seconds)
        return first[states[:, None], by] + second[to, goals]

    def through(self, start: Space, states: np.ndarray, end: Space, goals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the cheapest chains pass from one space to the other: states there and here, each of shape (states, goals); empty when
        the spaces have no layout in common."""
        key = (id(start), states.tobytes(), id(end), goals.tobytes())
        if self._through is None or self._through[0] != key:
            u, v = self._common(start, end)
            left, right = start.seconds[np.ix_(states, u)], np.ascontiguousarray(end.seconds[np.ix_(v, goals)].T)
            best = np.zeros((len(states), len(goals) if len(u) else 0), np.int64)
            for r in range(len(states) if len(u) else 0):
                best[r] = np.argmin(left[r] + right, axis=1)  # the first of equals
            self._through = key, (u[best], v[best])
        return self._through[1]

    def _common(self, start: Space, end: Space) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of states of two spaces that have the same layout."""
        key = (id(start), id(end))
        if key not in self._links:
            alike = start.dtype == end.dtype and start.specs[0].shape == end.specs[0].shape
            pairs = np.nonzero(start.layouts[:, None] == end.layouts[None, :]) if alike else (np.zeros(0, np.int64),) * 2
            self._links[key] = (pairs[0], pairs[1])
        return self._links[key]


def _moves(space: Space, i: int, j: int) -> list[Move]:
    """The moves of the cheapest chain from state i to state j."""
    moves: list[Move] = []
    while i != j:
        k = int(space.first[i, j])
        axis = space.axis_of(i, k)
        kind, sent, seconds, _ = space.price(i, k, axis)
        moves.append(Move(kind, axis, space.specs[i], space.specs[k], sent, seconds))
        i = k
    return moves


def _recast(before: Spec, after: Spec) -> Move:
    return Move("recast", -1, before, after, 0, 0.0)


def _joined(moves: Sequence[Move]) -> tuple[Move, ...]:
    """The same chain with recasts in a row made one, and those that change nothing left out."""
    out: list[Move] = []
    for move in moves:
        if move.kind == "recast" and out and out[-1].kind == "recast":
            move = _recast(out.pop().before, move.after)
        if move.before != move.after:
            out.append(move)
    return tuple(out)
