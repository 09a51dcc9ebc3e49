"""The step of one choice on the overlapping timeline, from the folded problem alone: what passes/schedule.py and passes/timing.py
make of the lowered program, without lowering it.

Slots are positions of ops, as moments are: op m runs at moment 2m + 1. A flight is one collective: it starts before the op at slot
`go` and is waited for before the op at slot `come`. `clock.py` places them.

The rules for `go` and `come` are those of the schedule, except that memory is not looked at (there a flight that would raise the
peak is shortened) and that chains of moves are cut at ops, not at single moves. tests/test_overlap.py holds both against each other.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..costs.comm import BUCKET_BYTES, Conversions
from ..costs.link import shared_streams
from ..costs.timeline import COMPUTE
from ..ir.plan import Entry
from ..ir.spec import local_bytes
from .build import Built
from .clock import Clock, Flight
from .explain import summed_bytes
from .problem import Choice, link_s, parking_s, wanted
from .stowing import travels
from .window import back

LOCAL = ("slice", "mask")
OUT, IN, STATE = "to the host", "from the host", "optimizer state"  # streams


class Step(NamedTuple):
    """One move: the stream that carries it, "" for a copy on the device itself; seconds there; bytes of what it takes; bucket: its group;
    busy: seconds more, of compute. transfer_s: of the seconds there, those that use the bandwidth of the stream's link."""

    stream: str
    seconds: float
    bytes: int
    bucket: tuple
    busy: float = 0.0
    transfer_s: float = 0.0


@dataclass
class _Bucket:
    """All-reduces of gradients that travel together. members: value, instance, the moves before, slot."""

    stream: str
    members: list[tuple[int, int, tuple[Step, ...], int]] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0
    transfer_s: float = 0.0
    bytes: int = 0

    def add(self, step: Step) -> None:
        self.seconds, self.bytes = self.seconds + step.seconds, self.bytes + step.bytes
        self.busy, self.transfer_s = self.busy + step.busy, self.transfer_s + step.transfer_s


@dataclass(frozen=True)
class Sketch:
    """step_s: the simulated step. sum_s: everything one after the other. work: seconds by stream, "compute" among them, of what each does,
    alone; busy: in which it does it; exposed: of the other streams, those of `busy` in which compute has nothing to do.

    value_critical, node_critical: of the seconds of each value's collectives, and of each node's ops, the share that lies on the critical
    path; NaN where there are none.
    """

    step_s: float
    sum_s: float
    work: Mapping[str, float]
    busy: Mapping[str, float]
    exposed: Mapping[str, float]
    value_critical: np.ndarray
    node_critical: np.ndarray


class Sketcher:
    """Sketches of choices of one problem. What is found out about conversions serves all of them."""

    def __init__(self, built: Built, conversions: Conversions, offload: Sequence[str] = ()) -> None:
        """offload: as in `Plan.offload`, for what waits on disk."""
        self.built, self.problem, self.conversions = built, built.problem, conversions
        problem = built.problem
        self.ops = (problem.moments - 2) // 2  # the last moment is the optimizer's
        self.split = (problem.forward_end + 1) // 2
        starts = [(m - 1) // 2 for m in problem.borders]
        self.starts = [s for s in starts if s < self.split] or [0], [s for s in starts if s >= self.split] or [self.split]
        self.is_op = [bool(node.moments) for node in problem.nodes]
        self.slots = [(np.array(node.moments, np.int64) - 1) // 2 for node in problem.nodes]
        self.through = self._views()
        self.paths: dict[tuple[int, int, int, bool], tuple[Step, ...]] = {}
        self.names = conversions.mesh.names
        self.links = {axis.name: axis.link for axis in conversions.mesh.axes if axis.link}
        counts: dict[str, int] = {}
        for value in problem.values:
            counts[value.name] = counts.get(value.name, 0) + value.count
        on_disk = [e for e in map(Entry.parse, offload) if e.tier == "disk"]
        self.disk = {(e.name, rank) for e in on_disk for rank in e.of(range(counts.get(e.name, 0)))}

    def _views(self) -> dict[int, tuple[int, int]]:
        """Per slot of an op that gives a view: the value and its instance that the op takes."""
        out: dict[int, tuple[int, int]] = {}
        for v, value in enumerate(self.problem.values):
            for t, consumer in enumerate(value.consumers):
                if self.problem.nodes[consumer.node].view:
                    for i, moment in enumerate(value.used[:, t].tolist()):
                        out.setdefault(moment // 2, (v, i))
        return out

    def steps(self, v: int, p: int, q: int) -> tuple[Step, ...]:
        """The moves of a conversion at the problem's price."""
        sources, targets = self.built.specs[v]
        value = self.problem.values[v]
        gradient = value.kind == "gradient"
        a, b = sources[p], targets[q]
        key = (self.conversions.number(a), self.conversions.number(b), v if min(map(self.conversions.number, (a, b))) < 0 else -1, gradient)
        if key not in self.paths:
            path = [m for m in self.conversions.path(a, b) if m.kind != "recast"]
            whole = sum(m.seconds for m in path)
            share = self.conversions.seconds(a, b, bucketed=gradient) / whole if whole else 1.0
            sizes = self.conversions.mesh.sizes
            steps = []
            for m in path:
                stream = "" if m.kind in LOCAL else self.names[m.axis]
                group = (m.axis, str(m.before.placements[m.axis]), m.before.dtype) if m.kind == "all_reduce" else ()
                hidden = self.conversions.mesh.axes[m.axis].hideable if stream else 1.0
                seconds = m.seconds * share
                carried = min(m.transfer_s(self.conversions.mesh), seconds) * hidden
                steps.append(Step(stream, seconds * hidden, local_bytes(m.before, sizes), group, seconds * (1 - hidden), carried))
            self.paths[key] = tuple(steps)
        return self.paths[key]

    def sketch(self, choice: Choice) -> Sketch:
        """One step under a choice."""
        return _Step(self, choice).run()


@dataclass
class _Step:
    """The flights of one choice. local: seconds that the device spends on moves, by slot. late: all-reduces after the last turn, by stream
    their seconds, and those that use the link; after: what the device works for those itself."""

    work: Sketcher
    choice: Choice
    flights: list[Flight] = field(default_factory=list)
    local: dict[int, float] = field(default_factory=dict)
    late: dict[str, tuple[float, float]] = field(default_factory=dict)
    after: float = 0.0
    raw: list[tuple[int, int, tuple[Step, ...], int, int, int, bool]] = field(default_factory=list)
    sole: dict[int, bool] = field(default_factory=dict)

    def run(self) -> Sketch:
        work = self.work
        for v in range(len(work.problem.values)):
            self._value(v)
        self._fly()
        self._transfers()
        return _placed(self)

    def _value(self, v: int) -> None:
        """What a value is converted to, instance by instance."""
        work, value = self.work, self.work.problem.values[v]
        p, targets = wanted(value, self.choice)
        moved = [(q, takers) for q, takers in targets if not value.same[p, q]]
        self.sole[v] = len(moved) == 1 == len(targets)
        for q, takers in moved:
            steps = work.steps(v, p, q)
            if not steps:
                continue
            ops = [t for t in takers if work.is_op[value.consumers[t].node]]
            used = value.used[:, takers].min(axis=1) // 2
            first = value.used[:, ops].min(axis=1) // 2 if ops else np.full(value.count, -1)
            gradient = value.kind == "gradient" and not ops
            for i, (at, use) in enumerate(zip(used.tolist(), first.tolist(), strict=True)):
                self.raw.append((v, i, steps, at, use, int(value.produced[i]), gradient))

    def _fly(self) -> None:
        """Flights in the order of the program, gradients' all-reduces in buckets."""
        turns = self.work.problem.turns
        open_: dict[tuple, _Bucket] = {}
        for v, i, steps, at, use, _, gradient in sorted(self.raw, key=lambda r: (r[3], r[4] >= 0, r[5], r[0])):
            tail = 0
            while gradient and turns > 1 and tail < len(steps) and steps[-1 - tail].bucket:
                tail += 1
            for step in steps[len(steps) - tail :]:
                seconds, transfer_s = self.late.get(step.stream, (0.0, 0.0))
                self.late[step.stream] = seconds + step.seconds, transfer_s + step.transfer_s
                self.after += step.busy
            steps = steps[: len(steps) - tail]
            if not (gradient and turns == 1 and steps and steps[-1].bucket):
                self._chain(v, i, steps, at, use)
                continue
            bucket = open_.setdefault(steps[-1].bucket, _Bucket(steps[-1].stream))
            bucket.members.append((v, i, steps[:-1], at))
            bucket.add(steps[-1])
            if bucket.bytes >= BUCKET_BYTES:
                self._bucket(open_.pop(steps[-1].bucket))
        for bucket in open_.values():
            self._bucket(bucket)

    def _bucket(self, bucket: _Bucket) -> None:
        """What its members need before it is waited for where it starts."""
        at, last = bucket.members[-1][3], -1
        for v, i, steps, begins in bucket.members:
            last = self._chain(v, i, steps, begins, at if len(bucket.members) > 1 else -1)
        v = bucket.members[-1][0]
        place = (at, len(self.flights))
        what = bucket.busy, bucket.transfer_s
        self.flights.append(Flight(v, bucket.stream, bucket.seconds, at, self.work.ops, place, last, True, *what))

    def _chain(self, v: int, i: int, steps: Sequence[Step], at: int, use: int) -> int:
        """The flights of one conversion, one after the other, the last one's position, -1 without any. use: -1 for the end of the phase."""
        work = self.work
        forward = self._made(v, i) < work.split if use < 0 else use < work.split
        begin, end = (0, work.split) if forward else (work.split, work.ops)
        starts = work.starts[not forward]
        first = end if use < 0 else use
        flying = [s for s in steps if s.stream]
        for step in steps:
            if not step.stream:
                self.local[at] = self.local.get(at, 0.0) + step.seconds
        if not flying:
            return -1
        go = min(max(self._ready(v, i, begin), back(starts, min(first, end - 1))), at)
        whole = sum(s.seconds for s in flying) or 1e-30
        share, begun, last = 0.0, go, -1
        for k, step in enumerate(flying):
            share += step.seconds / whole
            come = first
            if k + 1 < len(flying):
                after = bisect_right(starts, go)
                come = min(begun + int(share * (first - begun)), starts[after] if after < len(starts) else end, at)
            come = max(come, go)
            place = (at, len(self.flights))
            what = step.busy, step.transfer_s
            self.flights.append(Flight(v, step.stream, step.seconds, go, come, place, last, not forward, *what))
            last, go = len(self.flights) - 1, come
        return last

    def _made(self, v: int, i: int) -> int:
        return (int(self.work.problem.values[v].produced[i]) - 1) // 2

    def _ready(self, v: int, i: int, begin: int) -> int:
        """The first slot at which what is sent exists, or could: views that nothing else takes go along."""
        problem = self.work.problem
        while True:
            value = problem.values[v]
            if not self.work.is_op[value.node]:
                return begin
            made = self._made(v, i)
            if made < begin:
                return begin
            if not (problem.nodes[value.node].view and self.sole.get(v) and made in self.work.through):
                return made + 1
            v, i = self.work.through[made]
            if any(not problem.values[v].same[p, q] for p, q in self._pair(v, made)):
                return made + 1

    def _pair(self, v: int, slot: int) -> list[tuple[int, int]]:
        """Source and target state of a value as the op at `slot` takes it."""
        value = self.work.problem.values[v]
        p = int(value.state[self.choice[value.node]])
        out = []
        for t, consumer in enumerate(value.consumers):
            if (value.used[:, t] // 2 == slot).any():
                out.append((p, int(consumer.state[self.choice[consumer.node]])))
        return out

    def _transfers(self) -> None:
        """Copies to and from the host, of values that wait for backward there."""
        problem = self.work.problem
        if problem.host_bytes_s <= 0:
            return
        for v, inward, seconds, go, come in travels(problem, self.choice) if any(any(n.stowed) for n in problem.nodes) else ():
            self.flights.append(Flight(v, IN if inward else OUT, seconds, go, come, (come if inward else go, len(self.flights))))
        for v, value in enumerate(problem.values):
            if value.gone is None:
                continue
            p, _ = wanted(value, self.choice)
            size = local_bytes(self.work.built.specs[v][0][p], self.work.conversions.mesh.sizes)
            for i, (left, there) in enumerate(value.gone.tolist()):
                tier = "disk" if (value.name, value.rank[i]) in self.work.disk else "host"
                seconds = size * link_s(problem, tier) if left >= 0 else 0.0
                if not seconds:
                    continue
                made, out, come = self._made(v, i) + 1, (left - 1) // 2, (there - 1) // 2
                use = min((int(m) // 2 for m in value.used[i].tolist() if m >= there - 1), default=self.work.ops)
                self.flights.append(Flight(v, OUT, seconds, made, max(out, made), (made, len(self.flights))))
                self.flights.append(Flight(v, IN, seconds, come, max(use, come), (use, len(self.flights)), -1, True))


def _placed(step: _Step) -> Sketch:
    """Place the flights of a step, and walk its critical path."""
    work, problem, choice = step.work, step.work.problem, step.choice
    compute, turns = np.zeros(work.ops + 1), step.work.problem.turns
    for node, slots, k in zip(problem.nodes, work.slots, choice, strict=True):
        if len(slots):
            compute[slots] = float(node.seconds[k]) / len(slots)
    for slot, seconds in step.local.items():
        compute[slot] += seconds
    compute[-1] += 3 * summed_bytes(work.built, choice) / work.conversions.mesh.device.memory_bandwidth_bytes_s  # as cost_of has it
    clock = Clock(step.flights, np.concatenate([[0.0], np.cumsum(compute)]), work.links)
    clock.run()
    waits = turns * parking_s(problem, choice)
    working = turns * (float(compute.sum()) + sum(f.busy for f in step.flights)) + step.after
    done, busy, exposed = {COMPUTE: working}, {COMPUTE: working}, dict[str, float]()
    for stream, (seconds, alone) in sorted(clock.streams().items()):
        own = sum(f.seconds for f in step.flights if f.stream == stream) if stream in clock.links else seconds
        done[stream], busy[stream], exposed[stream] = turns * own, turns * seconds, turns * alone
    last = _together(step.late, work.links)
    for stream, seconds in [*sorted(last.items()), *([(STATE, waits)] if waits else [])]:
        busy[stream], exposed[stream] = busy.get(stream, 0.0) + seconds, exposed.get(stream, 0.0) + seconds
        done[stream] = done.get(stream, 0.0) + (step.late[stream][0] if stream in last else seconds)
    slots, flown, worked = clock.critical()
    total, critical = np.zeros(len(problem.values)), np.zeros(len(problem.values))
    for flight, on, too in zip(step.flights, flown, worked, strict=True):
        total[flight.value] += flight.seconds + flight.busy
        critical[flight.value] += flight.seconds * on + flight.busy * too
    node_critical = [
        float(slots[at].mean()) if len(at) and node.seconds[k] > 0 else math.nan
        for node, at, k in zip(problem.nodes, work.slots, choice, strict=True)
    ]
    value_critical = np.divide(critical, total, out=np.full(len(total), np.nan), where=total > 0)
    step_s = turns * clock.now + step.after + max(last.values(), default=0.0) + waits
    return Sketch(step_s, sum(done.values()), done, busy, exposed, value_critical, np.array(node_critical))


def _together(late: Mapping[str, tuple[float, float]], links: Mapping[str, str]) -> dict[str, float]:
    """How long streams take that begin at once, from (seconds, those that use the link): what is not sent by the time that one is over
    is no matter to it."""
    shared = shared_streams((stream, links.get(stream, "")) for stream in late)
    out = {}
    for stream, (seconds, transfer_s) in late.items():
        others = [late[s][1] for s, link in shared.items() if link == shared.get(stream) and s != stream]
        out[stream] = seconds + sum(min(transfer_s, other) for other in others)
    return out
