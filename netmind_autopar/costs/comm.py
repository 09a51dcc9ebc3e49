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

Seconds are α–β: messages · latency + bytes / bandwidth, ring and pairwise algorithms (Thakur, Rabenseifner, Gropp: Optimization of
Collective Communication Operations in MPICH, 2005), plus the start of a collective and the local copies around it.
Uneven pieces travel padded to the largest in all-gather and reduce-scatter, as they are in all-to-all. Numbers are those of the
first device of the mesh, which holds the largest pieces.

Legal moves: an axis may leave a part only if no later axis splits that part, and may start to split a part only if no later axis
splits it. Partial(max) and Partial(min) can be reduced but never made.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..ir.mesh import Axis, Mesh
from ..ir.spec import Partial, Placement, Replicate, Shard, Spec, is_valid, layout, local_parts

MESSAGES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}  # times (n − 1)
MOVES = {
    (Shard, Replicate): "all_gather",
    (Partial, Shard): "reduce_scatter",
    (Partial, Replicate): "all_reduce",
    (Shard, Shard): "all_to_all",
    (Replicate, Shard): "slice",
    (Replicate, Partial): "mask",
}
BUCKET_BYTES = 25 << 20  # reductions of gradients travel together in buckets of this size (the default of PyTorch's DDP)
# Starting a collective costs as much as this many kernels: 40 µs before the first message in vTrain's tables of A100s (see presets.py).
START_LAUNCHES = 10
LEAST_S = 1e-9  # no move is free, so that of two chains with equal seconds the shorter one is taken
RANDOM_LEAST_S, RANDOM_RANGE = 1e-6, 1e3  # random prices are drawn log-uniformly from 1 µs to 1 ms


@dataclass(frozen=True)
class Move:
    """One step. `axis` is the position of the mesh axis, −1 for a recast; `bytes` are sent by one device."""

    kind: str
    axis: int
    before: Spec
    after: Spec
    bytes: int
    seconds: float


def collective_seconds(kind: str, axis: Axis, bytes: float, *, latency_share: float = 1.0) -> float:
    """Seconds of one collective in which every device sends `bytes` along `axis`; `latency_share` of the latency is paid."""
    if axis.size == 1:
        return 0.0
    return latency_share * MESSAGES[kind] * (axis.size - 1) * axis.latency_s + bytes / axis.bandwidth_bytes_s


def sent_bytes(kind: str, n: int, before_bytes: int, after_bytes: int, kept_bytes: int = 0) -> int:
    """Bytes one device sends. `before_bytes` and `after_bytes` are local; `kept_bytes` is what it keeps in an all-to-all."""
    if kind == "all_gather":
        return (n - 1) * before_bytes
    if kind == "reduce_scatter":
        return (n - 1) * after_bytes
    if kind == "all_reduce":
        return 2 * before_bytes * (n - 1) // n
    return before_bytes - kept_bytes if kind == "all_to_all" else 0


class _Space:
    """All layouts of one tensor whose dims are seen as the same parts, and the cheapest way between any two of them.

    `seconds[i, j]` is the cheapest price, `first[i, j]` the state after the first move of that chain (−1: there is none).
    """

    def __init__(self, mesh: Mesh, dims: tuple[tuple[int, ...], ...], dtype: torch.dtype, op: str, random_costs: int | None) -> None:
        self.mesh, self.dtype, self.op, self.random_costs = mesh, dtype, op, random_costs
        shards = [Shard(d, p) for d, parts in enumerate(dims) for p, n in enumerate(parts) if n > 1]
        # A Partial sum of booleans has no meaning: `mask` could make it, but no reduction could end it.
        partial = [] if dtype == torch.bool and op == "sum" else [Partial(op)]
        options: list[Placement] = [Replicate(), *shards, *partial]
        per_axis = [options if axis.size > 1 else options[:1] for axis in mesh.axes]
        made = (Spec(dims, dtype, placements) for placements in itertools.product(*per_axis))
        self.specs = [spec for spec in made if is_valid(spec, mesh.sizes)]
        self.index = {spec.placements: i for i, spec in enumerate(self.specs)}
        self.where = {shard: self.specs[0].index(shard) for shard in shards}
        self.local = [local_parts(spec, mesh.sizes) for spec in self.specs]
        self.layouts = [layout(spec, mesh.sizes) for spec in self.specs]
        self.options = options
        self.edges = [self._edges(i) for i in range(len(self.specs))]
        self.seconds, self.first = self._shortest()

    def _edges(self, i: int) -> list[tuple[int, float, float]]:
        """(state after, seconds, seconds when bucketed) of every move that leaves state i."""
        out: list[tuple[int, float, float]] = []
        placements = self.specs[i].placements
        for axis, old in enumerate(placements):
            inner = zip(placements[axis + 1 :], self.mesh.axes[axis + 1 :], strict=True)
            later = {p for p, link in inner if link.size > 1 and isinstance(p, Shard)}
            if old in later:
                continue
            for new in self.options:
                j = self.index.get((*placements[:axis], new, *placements[axis + 1 :]))
                if j is None or j == i or new in later or (type(old), type(new)) not in MOVES or new in (Partial("max"), Partial("min")):
                    continue
                out.append((j, *self.price(i, j, axis)[2:]))
        return out

    def price(self, i: int, j: int, axis: int) -> tuple[str, int, float, float]:
        """(kind, bytes sent, seconds, seconds when bucketed) of the move from state i to state j along one axis."""
        old, new = self.specs[i].placements[axis], self.specs[j].placements[axis]
        kind, link, device = MOVES[type(old), type(new)], self.mesh.axes[axis], self.mesh.device
        size = self.dtype.itemsize
        before, after = math.prod(self.local[i]) * size, math.prod(self.local[j]) * size
        kept = 0
        if kind == "all_to_all":
            at = self.where[new]  # type: ignore[index]
            kept = before // max(self.local[i][at], 1) * self.local[j][at]
        sent = sent_bytes(kind, link.size, before, after, kept)
        if self.random_costs is not None:
            seconds = _random_price(self.random_costs, kind, self.specs[i], self.specs[j])
            return kind, sent, seconds, seconds
        copied, copies = self._copies(kind, i, j, axis, before, after)
        local = copied / device.memory_bandwidth_bytes_s + copies * device.launch_s
        if kind not in MESSAGES:
            return kind, sent, max(local, LEAST_S), max(local, LEAST_S)
        share = min(1.0, max(before, after) / BUCKET_BYTES)
        start = START_LAUNCHES * device.launch_s
        whole = local + start + collective_seconds(kind, link, sent)
        bucketed = local + share * start + collective_seconds(kind, link, sent, latency_share=share)
        return kind, sent, max(whole, LEAST_S), max(bucketed, LEAST_S)

    def _copies(self, kind: str, i: int, j: int, axis: int, before: int, after: int) -> tuple[int, int]:
        """(bytes read and written, kernels) of the local copies around a move. A collective joins pieces along the outermost dim
        only: pieces of an inner or uneven part are repacked."""
        if kind == "mask":
            return before, 1
        if kind == "all_reduce":
            return 0, 0
        if kind == "all_to_all":
            return 2 * (before + after), 2
        whole, piece = (j, i) if kind == "all_gather" else (i, j)
        at = self.where[self.specs[piece].placements[axis]]  # type: ignore[index]
        outermost = math.prod(self.local[whole][:at]) == 1
        if kind == "slice":
            return 2 * after, 1
        even = self.local[whole][at] == self.local[piece][at] * self.mesh.axes[axis].size
        return (0, 0) if outermost and even else (2 * max(before, after), 1)

    def _shortest(self) -> tuple[np.ndarray, np.ndarray]:
        """Bellman–Ford for all targets at once: a chain from i is a move to k and the best chain from k. A sweep tries the s-th move
        of every state together; only strict gains count, so ties fall to the first in a fixed order."""
        n, width = len(self.specs), max(map(len, self.edges), default=0)
        seconds = np.full((n, n), np.inf)
        first = np.full((n, n), -1, dtype=np.int32)
        np.fill_diagonal(seconds, 0.0)
        first[np.arange(n), np.arange(n)] = np.arange(n)
        after = np.array([[e[0] for e in es] + [i] * (width - len(es)) for i, es in enumerate(self.edges)], dtype=np.int32)
        price = np.array([[e[1] for e in es] + [np.inf] * (width - len(es)) for es in self.edges])
        changed = width > 0
        while changed:
            changed = False
            for s in range(width):
                candidate = seconds[after[:, s]] + price[:, s, None]
                better = candidate < seconds
                if better.any():
                    changed = True
                    np.copyto(seconds, candidate, where=better)
                    np.copyto(first, after[:, s, None], where=better)
        return seconds, first

    @functools.cached_property
    def bucketed(self) -> np.ndarray:
        """The bucketed price of the same chains."""
        n = len(self.specs)
        direct = np.zeros((n, n))
        for i, edges in enumerate(self.edges):
            for j, _, bucketed in edges:
                direct[i, j] = bucketed
        goal = np.broadcast_to(np.arange(n)[None, :], (n, n))
        at = np.where(np.isfinite(self.seconds), np.arange(n)[:, None], goal)
        out = np.where(np.isfinite(self.seconds), 0.0, np.inf)
        while (at != goal).any():
            following = self.first[at, goal]
            out += direct[at, following]
            at = following
        return out

    def chain(self, i: int, j: int) -> list[Move]:
        """The moves of the cheapest chain from state i to state j."""
        moves: list[Move] = []
        while i != j:
            k = int(self.first[i, j])
            axis = next(a for a, (p, q) in enumerate(zip(self.specs[i].placements, self.specs[k].placements, strict=True)) if p != q)
            kind, sent, seconds, _ = self.price(i, k, axis)
            moves.append(Move(kind, axis, self.specs[i], self.specs[k], sent, seconds))
            i = k
        return moves


class Conversions:
    """Cheapest conversions between any two layouts of a tensor on one mesh.

    random_costs: a seed; every move then costs a random price that depends on the seed and the move alone, so that odd but legal
    chains are chosen. What is legal does not change.
    """

    def __init__(self, mesh: Mesh, random_costs: int | None = None) -> None:
        self.mesh, self.random_costs = mesh, random_costs
        self._spaces: dict[tuple, _Space] = {}
        self._states: dict[Spec, tuple[_Space, int] | None] = {}
        self._links: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def seconds(self, a: Spec, b: Spec, *, bucketed: bool = False) -> float:
        """Seconds of the cheapest chain; 0 when the layouts are equal, inf when there is no chain.

        bucketed: small reductions share one collective: each pays its part, bytes / 25 MiB, of the latency.
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
        source, target = self._state(a), self._state(b)
        found = self._joint(source, target) if source and target else None
        if source is None or target is None or found is None:
            raise ValueError(f"no chain of moves leads from {a} to {b} on the mesh {self.mesh}")
        (start, i), (end, j), (u, v) = source, target, found
        moves = [*start.chain(i, u), _recast(start.specs[u], end.specs[v]), *end.chain(v, j)]
        return _joined([_recast(a, moves[0].before), *moves, _recast(moves[-1].after, b)])

    def matrix(self, sources: Sequence[Spec], targets: Sequence[Spec], *, bucketed: bool = False) -> np.ndarray:
        """`seconds` of all pairs, shape (sources, targets)."""
        out = np.full((len(sources), len(targets)), np.inf)
        columns = self._grouped(targets)
        for start, rows, states in self._grouped(sources):
            for end, cols, goals in columns:
                out[np.ix_(rows, cols)] = self._block(start, states, end, goals, bucketed)
        return out

    def _grouped(self, specs: Sequence[Spec]) -> list[tuple[_Space, list[int], list[int]]]:
        """(space, positions in `specs`, states) for every space that occurs."""
        groups: dict[int, tuple[_Space, list[int], list[int]]] = {}
        for position, spec in enumerate(specs):
            if found := self._state(spec):
                _, positions, states = groups.setdefault(id(found[0]), (found[0], [], []))
                positions.append(position)
                states.append(found[1])
        return list(groups.values())

    def _block(self, start: _Space, states: list[int], end: _Space, goals: list[int], bucketed: bool) -> np.ndarray:
        if start is end:
            return (start.bucketed if bucketed else start.seconds)[np.ix_(states, goals)]
        rows, row_at = np.unique(states, return_inverse=True)
        cols, col_at = np.unique(goals, return_inverse=True)
        u, v = self._common(start, end)
        if not len(u):
            return np.full((len(states), len(goals)), np.inf)
        left, right = start.seconds[np.ix_(rows, u)], end.seconds[np.ix_(v, cols)].T
        best = [np.argmin(left[r] + right, axis=1) for r in range(len(rows))]  # the first of equals
        if bucketed:
            left, right = start.bucketed[np.ix_(rows, u)], end.bucketed[np.ix_(v, cols)].T
        at = np.arange(len(cols))
        out = np.array([left[r, best[r]] + right[at, best[r]] for r in range(len(rows))])
        return out[np.ix_(row_at.ravel(), col_at.ravel())]

    def _joint(self, source: tuple[_Space, int], target: tuple[_Space, int]) -> tuple[int, int] | None:
        """Where the cheapest chain passes from the source's parts to the target's: (state there, state here)."""
        (start, i), (end, j) = source, target
        if start is end:
            return (j, j) if np.isfinite(start.seconds[i, j]) else None
        u, v = self._common(start, end)
        if not len(u):
            return None
        through = start.seconds[i, u] + end.seconds[v, j]
        best = int(np.argmin(through))
        return (int(u[best]), int(v[best])) if np.isfinite(through[best]) else None

    def _common(self, start: _Space, end: _Space) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of states of two spaces that have the same layout."""
        key = (id(start), id(end))
        if key not in self._links:
            pairs: list[tuple[int, int]] = []
            if start.dtype == end.dtype and start.specs[0].shape == end.specs[0].shape:
                there: dict[object, list[int]] = {}
                for v, lay in enumerate(end.layouts):
                    there.setdefault(lay, []).append(v)
                pairs = [(u, v) for u, lay in enumerate(start.layouts) for v in there.get(lay, ())]
            table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
            self._links[key] = (table[:, 0], table[:, 1])
        return self._links[key]

    def _state(self, spec: Spec) -> tuple[_Space, int] | None:
        """The space and the state of a spec; None for a spec that leaves a device empty or mixes reductions."""
        if spec not in self._states:
            if len(spec.placements) != len(self.mesh.axes):
                raise ValueError(f"{spec} does not have one placement for each axis of the mesh {self.mesh}")
            used = tuple(p if axis.size > 1 else Replicate() for p, axis in zip(spec.placements, self.mesh.axes, strict=True))
            ops = {p.op for p in used if isinstance(p, Partial)}
            op = ops.pop() if len(ops) == 1 else "sum"
            key = (spec.dims, spec.dtype, op)
            if key not in self._spaces:
                self._spaces[key] = _Space(self.mesh, *key, self.random_costs)
            space = self._spaces[key]
            self._states[spec] = (space, space.index[used]) if used in space.index else None
        return self._states[spec]


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


def _random_price(seed: int, kind: str, before: Spec, after: Spec) -> float:
    digest = hashlib.blake2b(f"{seed}|{kind}|{before}|{after}".encode(), digest_size=8).digest()
    return RANDOM_LEAST_S * RANDOM_RANGE ** (int.from_bytes(digest, "big") / 2**64)
