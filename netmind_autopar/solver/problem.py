"""What the solver sees, and nothing of torch: nodes with strategies, values that move between them, bytes, a limit.

A node chooses one strategy. A value is produced by a node in a layout ("source state") that follows from that choice and is
taken by consumers in layouts ("target states") that follow from theirs. Converting state p to state q costs `seconds[p, q]`,
once for all consumers of one group that want q: all consumers (`shared`: what forward converted is kept for backward), or
those of one phase (backward converts again).

Nodes and values are *folded*: one of them stands for `count` equal ones in the program (the layers of a model), which differ
only in the moments at which they live. A moment is the position of an op in the step; memory at a moment is what its op
reads, writes, and what lies waiting:

    resident     parameters and optimizer state: always
    parked       optimizer state that waits elsewhere: at the last moment, which is the optimizer's, and then a bucket of it
    stowed       parameters that wait elsewhere themselves: per phase from a block before their first use until their last, their
                 gradients until they are out, and of both and their state a bucket at the last moment
    the value    from its production until the last consumer that takes it as it is lets go of it, and until the last
                 conversion made from it
    a copy       per group and target state: from its first consumer's moment until its last consumer lets go
    a conversion what it packs and receives: at the moment at which the copy is made
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir.plan import STATE_BUCKET_BYTES

FORWARD, BACKWARD = 0, 1
Choice = tuple[int, ...]  # one strategy index per node


@dataclass(frozen=True)
class Node:
    """One decision. `seconds[k]` is the compute time of all its instances, `resident[k]` their bytes that always live.

    moments: when its instances run, ascending; empty for parameters, inputs and results. view: its results are parts of its input
    and hold it. again: its instances of forward may run a second time in backward.
    state[k]: bytes of the optimizer state of one of its parameters; `resident` holds that of `here` of them, of parked[0] it waits in
    host memory, of parked[1] on disk. None: there is none.
    size[k]: bytes of one of its parameters; None: they cannot wait elsewhere. stowed: how many do, in host memory and on disk, and
    `resident` has nothing of them; count: how many do not. trained: they have gradients.
    """

    name: str
    labels: tuple[str, ...]
    seconds: np.ndarray
    resident: np.ndarray
    moments: tuple[int, ...] = ()
    view: bool = False
    again: bool = False
    state: np.ndarray | None = None
    here: int = 0
    parked: tuple[int, int] = (0, 0)
    size: np.ndarray | None = None
    stowed: tuple[int, int] = (0, 0)
    trained: bool = False
    count: int = 0

    def park(self, host: int, disk: int = 0) -> Node:
        """The same node, with the optimizer state of that many more parameters elsewhere."""
        if self.state is None or not host + disk:
            return self
        now = self.parked[0] + host, self.parked[1] + disk
        return replace(self, resident=self.resident - (host + disk) * self.state, here=self.here - host - disk, parked=now)

    def stow(self, host: int, disk: int = 0) -> Node:
        """The same node, with that many more parameters elsewhere, whose optimizer state was not yet."""
        count = host + disk
        if self.size is None or not count:
            return self
        now, state = (self.stowed[0] + host, self.stowed[1] + disk), 0 if self.state is None else self.state
        left = self.resident - count * (self.size + state)
        return replace(self, resident=left, here=max(self.here - count, 0), stowed=now, count=self.count - count)

    def piece(self, k: int) -> int:
        """Bytes of one stowed parameter that are on the device at the optimizer's moment: itself, its gradient and its state."""
        if self.size is None or not self.trained:
            return 0
        return 2 * int(self.size[k]) + (int(self.state[k]) if self.state is not None else 0)


@dataclass(frozen=True)
class Consumer:
    """A taker of a value: `state[k]` is the target state that strategy k of `node` expects."""

    node: int
    state: np.ndarray
    phase: int


@dataclass(frozen=True, eq=False)
class Value:
    """A value of `node`, converted for each of its consumers.

    state[k]          source state under strategy k of `node`
    seconds[p, q]     of one conversion; inf where there is none
    same[p, q]        True where both states are one layout: no copy is made
    shared[p]         True where a conversion from p serves both phases
    bytes[p], copy_bytes[q]   of one instance in a source state, and of a copy in a target state
    room[p, q]        bytes that a conversion needs while it runs, source and copy left out; None for none
    produced[i]       the moment at which instance i is produced
    used[i, t], held[i, t]    when consumer t of instance i takes it, and when it lets go (views hold their base)
    gone[i]           (moment at which instance i has left for elsewhere, moment at which it comes back), -1 when it stays; None: all stay
    partial[p]        True where the state holds Partial sums, which are always reduced once
    rank[i]           position of instance i among all instances of values with this name, in program order
    stowed            a parameter that waits elsewhere, in all instances
    owners[i, t]      of a gradient, the position of its parameter in its class, -1 for other uses; None: no gradient
    """

    name: str
    node: int
    state: np.ndarray
    consumers: tuple[Consumer, ...]
    seconds: np.ndarray
    same: np.ndarray
    shared: np.ndarray
    bytes: np.ndarray
    copy_bytes: np.ndarray
    produced: np.ndarray
    used: np.ndarray
    held: np.ndarray
    kind: str = "activation"
    room: np.ndarray | None = None
    rank: tuple[int, ...] = ()
    partial: np.ndarray | None = None
    gone: np.ndarray | None = None
    stowed: bool = False
    owners: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.produced)

    def groups(self, p: int) -> list[list[int]]:
        """The consumers that share conversions when the source state is p, as positions in `consumers`."""
        if self.shared[p]:
            return [list(range(len(self.consumers)))]
        by_phase = [[t for t, c in enumerate(self.consumers) if c.phase == phase] for phase in (FORWARD, BACKWARD)]
        return [group for group in by_phase if group]


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise seconds subject to `limit_bytes` at each of the moments 0 … moments-1.

    prices: (moment, seconds per byte) pairs; what memory costs there is part of the objective.
    forward_end: the last moment of forward; -1 when there is no backward. borders: where stretches of ops begin, see window.py.
    host_bytes_s: what a link to host memory carries in one direction; 0 when nothing may wait there. host_limit_bytes: what may wait
    there at a time, None for no limit; what is more waits on disk, which takes disk_bytes_s.
    bucket_bytes: of parked optimizer state, what is on the device at a time.
    turns: the problem is one of so many micro-batches of a step; all seconds are those of one.
    """

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    moments: int = 1
    fixed_bytes: int = 0
    limit_bytes: int | None = None
    forward_end: int = -1
    borders: tuple[int, ...] = ()
    host_bytes_s: float = 0.0
    host_limit_bytes: int | None = None
    disk_bytes_s: float = 0.0
    bucket_bytes: int = STATE_BUCKET_BYTES
    prices: tuple[tuple[int, float], ...] = ()
    turns: int = 1


@dataclass(frozen=True)
class Conversion:
    """One conversion that a choice needs: value, consumers served, source and target state, seconds of all instances."""

    value: int
    consumers: tuple[int, ...]
    p: int
    q: int
    seconds: float


@dataclass(frozen=True)
class Item:
    """Bytes that live in [start[i], end[i]], for every instance i. `target` is -1 for the value itself, else the copy's state.

    staging: what a conversion packs and receives while it runs."""

    value: int
    bytes: int
    start: np.ndarray
    end: np.ndarray
    target: int
    consumers: tuple[int, ...]
    staging: bool = False


def wanted(value: Value, choice: Sequence[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """The source state under `choice`, and per group and distinct target state the consumers that want it."""
    p = int(value.state[choice[value.node]])
    out: list[tuple[int, list[int]]] = []
    for group in value.groups(p):
        by_state: dict[int, list[int]] = {}
        for t in group:
            consumer = value.consumers[t]
            by_state.setdefault(int(consumer.state[choice[consumer.node]]), []).append(t)
        out.extend(by_state.items())
    return p, out


def conversions(problem: Problem, choice: Sequence[int]) -> Iterator[Conversion]:
    """Every conversion that `choice` needs, free ones between different layouts included."""
    for v, value in enumerate(problem.values):
        p, targets = wanted(value, choice)
        for q, takers in targets:
            if not value.same[p, q]:
                yield Conversion(v, tuple(takers), p, q, float(value.seconds[p, q]) * value.count)


def seconds(problem: Problem, choice: Sequence[int]) -> float:
    """The objective: compute and conversions, in seconds; inf when a conversion is impossible."""
    total = sum(float(node.seconds[k]) for node, k in zip(problem.nodes, choice, strict=True))
    for value in problem.values:
        p, targets = wanted(value, choice)
        total += value.count * sum(float(value.seconds[p, q]) for q, _ in targets)
    return total


def items(problem: Problem, choice: Sequence[int]) -> Iterator[Item]:
    """Every stretch of memory under `choice`, besides what is fixed or resident."""
    for v, value in enumerate(problem.values):
        p, targets = wanted(value, choice)
        if value.stowed:
            yield Item(v, int(value.bytes[p]), *_fetched(problem, value, p, targets), -1, ())
        end = value.produced.copy()
        for q, takers in targets:
            start, last = value.used[:, takers].min(axis=1), value.held[:, takers].max(axis=1)
            end = np.maximum(end, last if value.same[p, q] else start)
            if not value.same[p, q]:
                yield Item(v, int(value.copy_bytes[q]), *_present(value, start, last), q, tuple(takers))
                if value.room is not None and value.room[p, q]:
                    yield Item(v, int(value.room[p, q]), start, start, q, tuple(takers), True)
        if not value.stowed:
            yield Item(v, int(value.bytes[p]), *_present(value, value.produced, end), -1, ())


def _fetched(problem: Problem, value: Value, p: int, targets: list[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """The stretches in which a parameter that waits elsewhere is on the device, as passes/stow.py makes them."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for late, (first, last) in stays_by_phase(value, p, targets).items():
        starts.append(fetched_at(problem, first, late))
        ends.append(last)
    return np.concatenate(starts), np.concatenate(ends)


def stays_by_phase(value: Value, p: int, targets: list[tuple[int, list[int]]]) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """Per phase in which a parameter is taken (True: backward) when it is first, and when it is let go of."""
    taken: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {False: [], True: []}
    for q, takers in targets:
        if value.same[p, q]:
            for t in takers:
                taken[value.consumers[t].phase == BACKWARD].append((value.used[:, t], value.held[:, t]))
        else:
            made = value.used[:, takers].min(axis=1)
            taken[all(value.consumers[t].phase == BACKWARD for t in takers)].append((made, made))
    return {
        late: (np.min([use for use, _ in pairs], axis=0), np.max([held for _, held in pairs], axis=0))
        for late, pairs in taken.items()
        if pairs
    }


def fetched_at(problem: Problem, use: np.ndarray, late: bool) -> np.ndarray:
    """The moments at which parameters that wait elsewhere are fetched for uses at these moments: a stretch before."""
    borders = np.array(problem.borders or (0,), np.int64)
    least = int(np.searchsorted(borders, problem.forward_end, side="right")) if late else 0
    at = np.maximum(np.searchsorted(borders, use + 1, side="right") - 2, min(least, len(borders) - 1))
    return np.minimum(borders[at], use)


def _present(value: Value, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stretches in which tensors that live from `start` to `end` are on the device."""
    if value.gone is None:
        return start, end
    left, back = value.gone.T
    away = (left > start) & (left <= end) & (back >= left)
    first = np.where(away, left - 1, end)
    return np.concatenate([start, back[away]]), np.concatenate([first, end[away]])


def resident_bytes(problem: Problem, choice: Sequence[int]) -> int:
    return problem.fixed_bytes + sum(int(node.resident[k]) for node, k in zip(problem.nodes, choice, strict=True))


def parked_bytes(problem: Problem, choice: Sequence[int]) -> tuple[int, int]:
    """Optimizer state that waits in host memory, and on disk."""
    pairs = [(n.parked, int(n.state[k])) for n, k in zip(problem.nodes, choice, strict=True) if n.state is not None and any(n.parked)]
    return sum(host * size for (host, _), size in pairs), sum(disk * size for (_, disk), size in pairs)


def stowed_bytes(problem: Problem, choice: Sequence[int]) -> tuple[int, int]:
    """Of parameters that wait elsewhere what is in host memory, and on disk: with gradients and optimizer state."""
    pairs = [(n.stowed, n.piece(k) or int(n.size[k])) for n, k in zip(problem.nodes, choice, strict=True) if n.size is not None]
    return sum(host * size for (host, _), size in pairs), sum(disk * size for (_, disk), size in pairs)


def step_bytes(problem: Problem, choice: Sequence[int]) -> int:
    """What the optimizer has on the device of what waits elsewhere, at most."""
    total = sum(parked_bytes(problem, choice))
    sizes = [int(n.state[k]) for n, k in zip(problem.nodes, choice, strict=True) if n.state is not None and any(n.parked)]
    for n, k in zip(problem.nodes, choice, strict=True):
        if any(n.stowed):
            total += sum(n.stowed) * n.piece(k)
            sizes.append(n.piece(k))
    return min(total, max(problem.bucket_bytes, *sizes, 0))


def link_s(problem: Problem, tier: str = "host") -> float:
    """Seconds per byte from the device to a tier, or back: over the host's link, and for the disk from there on. inf: no link."""
    rates = (problem.host_bytes_s, problem.disk_bytes_s) if tier == "disk" else (problem.host_bytes_s,)
    return sum(1.0 / rate for rate in rates) if min(rates) > 0 else math.inf


def parked_byte_s(problem: Problem, tier: str = "host") -> float:
    """Seconds that a byte of optimizer state which waits elsewhere takes: once a step it travels out and back, and nothing hides that."""
    return 2 * link_s(problem, tier) / problem.turns


def parking_s(problem: Problem, choice: Sequence[int]) -> float:
    """Seconds in which the step waits for optimizer state, and at the optimizer's moment for parameters and gradients."""
    pairs = zip(parked_bytes(problem, choice), ("host", "disk"), strict=True)
    waits = sum(size * parked_byte_s(problem, tier) for size, tier in pairs if size)
    for n, k in zip(problem.nodes, choice, strict=True):
        for count, tier in zip(n.stowed, ("host", "disk"), strict=True):
            waits += count * stowed_s(problem, n, k, tier) if count else 0.0
    return waits


def stowed_s(problem: Problem, node: Node, k: int, tier: str = "host") -> float:
    """Seconds at the optimizer's moment for one parameter that waits elsewhere: it and its gradient come, state comes and goes, it goes."""
    if node.size is None or not node.trained:
        return 0.0
    state = float(node.state[k]) if node.state is not None else 0.0
    return (3 * float(node.size[k]) + 2 * state) * link_s(problem, tier) / problem.turns


def profile(problem: Problem, choice: Sequence[int]) -> np.ndarray:
    """Bytes of the fullest device at every moment, `[moments]`."""
    steps = np.zeros(problem.moments + 1, np.int64)
    for item in items(problem, choice):
        np.add.at(steps, item.start, item.bytes)
        np.subtract.at(steps, item.end + 1, item.bytes)
    steps[-2:] += np.array([1, -1]) * step_bytes(problem, choice)
    return np.cumsum(steps[:-1]) + resident_bytes(problem, choice)


def evaluate(problem: Problem, choice: Sequence[int]) -> tuple[float, int, int]:
    """(objective, peak bytes, first moment of the peak) of one choice, counted out exactly and independently of any ILP."""
    memory = profile(problem, choice)
    moment = int(memory.argmax())
    priced = sum(price * float(memory[m]) for m, price in problem.prices)
    return seconds(problem, choice) + priced, int(memory[moment]), moment
