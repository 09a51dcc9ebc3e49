"""All layouts of one tensor as states of a graph, its moves as edges, and the cheapest way between any two: arrays throughout.

A state is a row of option numbers, one per mesh axis; what depends on it (local sizes, layouts, prices, legality) is looked up
per (part, subset of axes that split it) and computed for all states or all moves at once.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..ir.mesh import Axis, Mesh
from ..ir.spec import Partial, Placement, Replicate, Shard, Spec, cuts
from .algorithms import MESSAGES as MESSAGES
from .algorithms import Amount, fastest
from .curves import interpolate

MOVES = {
    (Shard, Replicate): "all_gather",
    (Partial, Shard): "reduce_scatter",
    (Partial, Replicate): "all_reduce",
    (Shard, Shard): "all_to_all",
    (Replicate, Shard): "slice",
    (Replicate, Partial): "mask",
}
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "slice", "mask")
LOCAL = (KINDS.index("slice"), KINDS.index("mask"))  # nothing travels
BUCKET_BYTES = 25 << 20  # reductions of gradients travel together in buckets of this size (the default of PyTorch's DDP)
# Starting a collective costs as much as this many kernels: 40 µs before the first message in vTrain's tables of A100s (see presets.py).
START_LAUNCHES = 10
LEAST_S = 1e-9  # no move is free, so that of two chains with equal seconds the shorter one is taken
RANDOM_LEAST_S, RANDOM_RANGE = 1e-6, 1e3  # random prices are drawn log-uniformly from 1 µs to 1 ms


def collective_seconds(kind: str, axis: Axis, bytes: Amount, *, latency_share: Amount | float = 1.0) -> Amount | float:
    """Seconds of one collective in which every device sends `bytes` along `axis`, by a ring; `latency_share` of the latency is paid.

    Where the axis was measured its curve tells, the start of the collective included; its first point is the latency. Elsewhere the
    fastest of the algorithms that a library chooses from: a ring, for an all-reduce a double binary tree, and across nodes of several
    devices the two in turns (costs/algorithms.py)."""
    if axis.size == 1:
        return 0.0
    if points := axis.measured(kind):
        return interpolate(points, bytes) - (1.0 - latency_share) * points[0][1]
    return fastest(kind, axis, bytes, latency_share)


def shares(mesh: Mesh, axis: int, bytes: np.ndarray) -> np.ndarray:
    """The part of its latency that an all-reduce of a gradient of so many local bytes pays: its share of a bucket. All of it when it
    travels alone, because copying it into a bucket takes longer than the bucket saves."""
    link, device = mesh.axes[axis], mesh.device
    share = np.minimum(1.0, bytes / BUCKET_BYTES)
    latency = float(collective_seconds("all_reduce", link, 0.0)) + (
        0.0 if link.measured("all_reduce") else START_LAUNCHES * device.launch_s
    )
    return np.where((1.0 - share) * latency > 2 * bytes / device.memory_bandwidth_bytes_s, share, 1.0)


def sent_bytes(kind: str, n: int, before_bytes: np.ndarray, after_bytes: np.ndarray, kept_bytes: np.ndarray | int = 0) -> np.ndarray:
    """Bytes one device sends. `before_bytes` and `after_bytes` are local; `kept_bytes` is what it keeps in an all-to-all."""
    if kind == "all_gather":
        return (n - 1) * before_bytes
    if kind == "reduce_scatter":
        return (n - 1) * after_bytes
    if kind == "all_reduce":
        return 2 * before_bytes * (n - 1) // n
    return before_bytes - kept_bytes if kind == "all_to_all" else 0 * before_bytes


@dataclass(frozen=True)
class Steps:
    """Moves, one per entry of every array: states before and after, the mesh axis, the kind (a position in KINDS), the part that is
    split before or after (of an all-to-all: after), bytes that one device sends, seconds alone and in a bucket."""

    before: np.ndarray
    after: np.ndarray
    axis: np.ndarray
    kind: np.ndarray
    part: np.ndarray
    sent: np.ndarray
    seconds: np.ndarray
    bucketed: np.ndarray


class Space:
    """All layouts of one tensor whose dims are seen as the same parts, and the cheapest way between any two of them.

    placed[i, axis]: state i's option on an axis; local[i, part]: local size; layouts[i]: a number that states of any space have in
    common when their layouts are equal; seconds[i, j]: the cheapest price, first[i, j]: the state after the first move of that chain
    (−1: there is none). `names` gives numbers to layouts, and is shared by all spaces of a mesh.
    """

    def __init__(
        self, mesh: Mesh, dims: tuple[tuple[int, ...], ...], dtype: torch.dtype, op: str, random_costs: int | None, names: dict
    ) -> None:
        self.mesh, self.dims, self.dtype, self.op, self.random_costs = mesh, dims, dtype, op, random_costs
        shards = [(Shard(d, p), n) for d, parts in enumerate(dims) for p, n in enumerate(parts) if n > 1]
        self.options: list[Placement] = [Replicate(), *(s for s, _ in shards), Partial(op)]
        self.parts = tuple(n for parts in dims for n in parts)
        at = [i for i, n in enumerate(self.parts) if n > 1]
        self.where = {shard: part for (shard, _), part in zip(shards, at, strict=True)}
        self.part_of = np.array([-1, *at, -1], dtype=np.int64)  # of an option
        self._states()
        self._lay_out(names)
        self.bytes = self.local.prod(axis=1, dtype=np.int64) * dtype.itemsize
        self.partial = (self.placed == len(self.options) - 1).any(axis=1)
        # A Partial sum of booleans has no meaning: `mask` could make it, but no reduction could end it.
        self.dead = self.partial & (dtype == torch.bool and op == "sum")
        self.edges = self._edges()
        self.seconds, self.first = self._shortest()

    def _states(self) -> None:
        sizes, options = self.mesh.sizes, len(self.options)
        counts = [options if n > 1 else 1 for n in sizes]
        self.strides = np.array([math.prod(counts[a + 1 :]) for a in range(len(sizes))], dtype=np.int64)
        codes = np.arange(math.prod(counts))
        placed = codes[:, None] // self.strides[None, :] % np.array(counts)[None, :]
        masks = np.zeros((len(codes), len(self.parts)), dtype=np.int64)
        for axis in range(len(sizes)):
            split = self.part_of[placed[:, axis]]
            rows = np.flatnonzero(split >= 0)
            masks[rows, split[rows]] |= 1 << axis
        fine = np.ones(len(codes), dtype=bool)
        for part, n in enumerate(self.parts):
            fine &= np.array(cuts(n, sizes)[1])[masks[:, part]]
        self.number = np.where(fine, np.cumsum(fine) - 1, -1)  # of the state with this code
        self.placed, self.masks = placed[fine], masks[fine]
        local = [np.array(cuts(n, sizes)[0])[self.masks[:, part]] for part, n in enumerate(self.parts)]
        self.local = np.stack(local, axis=1) if local else np.ones((len(self.placed), 0), dtype=np.int64)
        self.lead = np.concatenate([np.ones((len(self.placed), 1), np.int64), np.cumprod(self.local, axis=1)], axis=1)

    def _lay_out(self, names: dict) -> None:
        """See `ir.spec.layout`: per axis what is known from the option and from the earlier axes that split the same part."""
        found = np.zeros(self.placed.shape, dtype=np.int64)
        partial = len(self.options) - 1
        for axis in range(self.placed.shape[1]):
            earlier = np.zeros(len(self.placed), dtype=np.int64)
            part = self.part_of[self.placed[:, axis]]
            rows = np.flatnonzero(part >= 0)
            earlier[rows] = self.masks[rows, part[rows]] & ((1 << axis) - 1)
            keys, inverse = np.unique(self.placed[:, axis] << len(self.mesh.axes) | earlier, return_inverse=True)
            numbers = [names.setdefault(self._cut(key, axis, partial), len(names)) for key in keys.tolist()]
            found[:, axis] = np.array(numbers, dtype=np.int64)[inverse]
        self.layouts = np.array([names.setdefault(("layout", *row), len(names)) for row in found.tolist()], dtype=np.int64)

    def _cut(self, key: int, axis: int, partial: int) -> tuple:
        option, earlier = key >> len(self.mesh.axes), key & ((1 << len(self.mesh.axes)) - 1)
        if option == 0 or option == partial:
            return ("R" if option == 0 else str(self.options[option]),)
        shard = self.options[option]
        assert isinstance(shard, Shard)
        parts = self.dims[shard.dim]
        blocks, inner = math.prod(parts[: shard.part]), math.prod(parts[shard.part + 1 :])
        left = cuts(parts[shard.part], self.mesh.sizes)[0]
        return (shard.dim, blocks, left[earlier | 1 << axis] * inner, left[earlier] * inner)

    @functools.cached_property
    def specs(self) -> list[Spec]:
        return [Spec(self.dims, self.dtype, tuple(self.options[o] for o in row)) for row in self.placed.tolist()]

    @functools.cached_property
    def index(self) -> dict[tuple[Placement, ...], int]:
        """State by placements, of those that moves can reach."""
        return {spec.placements: i for i, spec in enumerate(self.specs) if not self.dead[i]}

    def _edges(self) -> Steps:
        """Every legal move, by state, then axis, then option."""
        n, options = len(self.placed), len(self.options)
        kinds = np.array(
            [[KINDS.index(MOVES[a, b]) if (a, b) in MOVES else -1 for b in map(type, self.options)] for a in map(type, self.options)]
        )
        if self.op != "sum":
            kinds[:, -1] = -1  # reduced, never made
        codes, rows = self.placed @ self.strides, np.arange(n)
        found: list[np.ndarray] = []
        later = np.zeros((n, options), dtype=bool)  # split by a later axis
        for axis in reversed(range(len(self.mesh.axes))):
            if self.mesh.axes[axis].size == 1:
                continue
            old = self.placed[:, axis]
            known = np.where(np.isin(kinds, LOCAL), kinds, -1) if self.mesh.axes[axis].in_turn else kinds
            ok = (known[old] >= 0) & ~later & ~(later[rows, old] | self.dead)[:, None]
            i, new = np.nonzero(ok)
            j = self.number[codes[i] + (new - old[i]) * self.strides[axis]]
            good = (j >= 0) & (j != i)
            good[good] = ~self.dead[j[good]]
            i, j, new = i[good], j[good], new[good]
            found.append(np.stack([i, np.full(len(i), axis), new, j]))
            split = np.flatnonzero(self.part_of[old] >= 0)
            later[split, old[split]] = True
        table = np.concatenate(found, axis=1) if found else np.zeros((4, 0), dtype=np.int64)
        i, axes, new, j = table[:, np.lexsort(table[:3][::-1])]
        return self.steps(i, j, axes, kinds[self.placed[i, axes], new])

    def steps(self, i: np.ndarray, j: np.ndarray, axis: np.ndarray, kind: np.ndarray) -> Steps:
        """The moves of these kinds from states i to states j, priced."""
        old, new = self.part_of[self.placed[i, axis]], self.part_of[self.placed[j, axis]]
        part = np.where((kind == KINDS.index("all_gather")) | (new < 0), old, new)
        sent, seconds, bucketed = np.zeros(len(i), np.int64), np.zeros(len(i)), np.zeros(len(i))
        for code, name in enumerate(KINDS):
            for a in range(len(self.mesh.axes)):
                at = np.flatnonzero((kind == code) & (axis == a))
                if len(at):
                    sent[at], seconds[at], bucketed[at] = self._prices(name, a, i[at], j[at], part[at])
        return Steps(i, j, axis, kind, part, sent, seconds, bucketed)

    def _prices(self, kind: str, axis: int, i: np.ndarray, j: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes sent, seconds, seconds when bucketed) of moves of one kind along one axis."""
        link, device = self.mesh.axes[axis], self.mesh.device
        before, after = self.bytes[i], self.bytes[j]
        kept = before // np.maximum(self.local[i, part], 1) * self.local[j, part] if kind == "all_to_all" else 0
        sent = sent_bytes(kind, link.size, before, after, kept)
        if self.random_costs is not None:
            pairs = zip(i.tolist(), j.tolist(), strict=True)
            drawn = np.array([_random_price(self.random_costs, kind, self.specs[a], self.specs[b]) for a, b in pairs])
            return sent, drawn, drawn
        copied, copies = self._copies(kind, i, j, axis, part)
        local = copied / device.memory_bandwidth_bytes_s + copies * device.launch_s
        if kind not in MESSAGES:
            return sent, np.maximum(local, LEAST_S), np.maximum(local, LEAST_S)
        # passes/bucket.py joins all-reduces alone: of everything else each pays all of its latency
        share = shares(self.mesh, axis, np.maximum(before, after)) if kind == "all_reduce" else np.ones(len(i))
        start = 0.0 if link.measured(kind) else START_LAUNCHES * device.launch_s
        whole = local + start + collective_seconds(kind, link, sent)
        bucketed = local + share * start + collective_seconds(kind, link, sent, latency_share=share)
        return sent, np.maximum(whole, LEAST_S), np.maximum(bucketed, LEAST_S)

    def _copies(self, kind: str, i: np.ndarray, j: np.ndarray, axis: int, part: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
        """(bytes read and written, kernels) of the local copies around a move. A collective joins pieces along the outermost dim
        only: pieces of an inner or uneven part are repacked."""
        before, after = self.bytes[i], self.bytes[j]
        if kind == "mask":
            return before, 1
        if kind == "all_reduce":
            return 0 * before, 0
        if kind == "all_to_all":
            return 2 * (before + after), 2
        if kind == "slice":
            return 2 * after, 1
        whole, piece = (j, i) if kind == "all_gather" else (i, j)
        even = self.local[whole, part] == self.local[piece, part] * self.mesh.axes[axis].size
        smooth = self.outermost(whole, part) & even
        return np.where(smooth, 0, 2 * np.maximum(before, after)), np.where(smooth, 0, 1)

    def outermost(self, i: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Whether the local pieces along a part are whole runs of the tensor in state i."""
        return self.lead[i, part] == 1

    def price(self, i: int, j: int, axis: int) -> tuple[str, int, float, float]:
        """(kind, bytes sent, seconds, seconds when bucketed) of the move from state i to state j along one axis."""
        kind = MOVES[type(self.options[self.placed[i, axis]]), type(self.options[self.placed[j, axis]])]
        one = self.steps(np.array([i]), np.array([j]), np.array([axis]), np.array([KINDS.index(kind)]))
        return kind, int(one.sent[0]), float(one.seconds[0]), float(one.bucketed[0])

    def axis_of(self, i: int, j: int) -> int:
        """The axis along which two neighbours differ."""
        return int(np.flatnonzero(self.placed[i] != self.placed[j])[0])

    def _shortest(self) -> tuple[np.ndarray, np.ndarray]:
        """Bellman–Ford for all targets at once: a chain from i is a move to k and the best chain from k. A sweep tries the s-th move
        of every state together; only strict gains count, so ties fall to the first in a fixed order."""
        n, edges = len(self.placed), self.edges
        seconds = np.full((n, n), np.inf)
        first = np.full((n, n), -1, dtype=np.int32)
        np.fill_diagonal(seconds, 0.0)
        first[np.arange(n), np.arange(n)] = np.arange(n)
        rank = np.arange(len(edges.before)) - np.searchsorted(edges.before, edges.before)
        width = int(rank.max(initial=-1)) + 1
        after = np.tile(np.arange(n)[:, None], (1, width))
        price = np.full((n, width), np.inf)
        after[edges.before, rank], price[edges.before, rank] = edges.after, edges.seconds
        changed = width > 0
        while changed:
            changed = False
            for s in range(width):
                candidate = seconds[after[:, s]]
                candidate += price[:, s, None]
                better = candidate < seconds
                if better.any():
                    changed = True
                    np.copyto(seconds, candidate, where=better)
                    np.copyto(first, after[:, s, None], where=better)
        return seconds, first

    @functools.cached_property
    def bucketed(self) -> np.ndarray:
        """The bucketed price of the same chains."""
        n = len(self.placed)
        direct = np.zeros((n, n))
        direct[self.edges.before, self.edges.after] = self.edges.bucketed
        out = np.where(np.isfinite(self.seconds), 0.0, np.inf)
        for start, at, goal, following in self.walk():
            out[start, goal] += direct[at, following]
        return out

    @functools.cached_property
    def tail(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the same chains the bucketed price of the all-reduces that they end with, and whether they are nothing else."""
        n, moves = len(self.placed), self.edges
        direct, reduces = np.zeros((n, n)), np.zeros((n, n), dtype=bool)
        direct[moves.before, moves.after] = moves.bucketed
        reduces[moves.before, moves.after] = moves.kind == KINDS.index("all_reduce")
        out, pure = np.zeros((n, n)), np.ones((n, n), dtype=bool)
        for start, at, goal, following in self.walk():
            reduced = reduces[at, following]
            out[start, goal] = np.where(reduced, out[start, goal] + direct[at, following], 0.0)
            pure[start, goal] &= reduced
        return out, pure

    def walk(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """All chains at once, move by move: (where they began, where they are, where they go, the next state), of those not there yet."""
        start, goal = np.nonzero(np.isfinite(self.seconds) & ~np.eye(len(self.placed), dtype=bool))
        at = start
        while len(at):
            following = self.first[at, goal]
            yield start, at, goal, following
            going = following != goal
            start, at, goal = start[going], following[going], goal[going]


def _random_price(seed: int, kind: str, before: Spec, after: Spec) -> float:
    digest = hashlib.blake2b(f"{seed}|{kind}|{before}|{after}".encode(), digest_size=8).digest()
    return RANDOM_LEAST_S * RANDOM_RANGE ** (int.from_bytes(digest, "big") / 2**64)
