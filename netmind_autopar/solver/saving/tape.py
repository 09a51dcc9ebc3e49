"""One choice of strategies, run in thought: every op, conversion and tensor of every layer, in the order in which the step runs.

What is not kept for backward is made again there, as late as possible and once: an op that runs again first has its inputs made
available in the same way. Running the tape counts seconds and bytes out exactly as the rewritten program (solver/replay.py) would.

    recompute[n]      the instances of node n, by position, that run again in backward when something there needs them
    regather[name]    the values of this name, by position, that are converted again in backward
    offload[name]     the values of this name, by position, that wait for backward elsewhere

Optimizer state may wait elsewhere too: what does is given (`placed`), or as little as makes a run fit (`within`). Which of the values
that wait elsewhere do so on disk is given.
"""

from __future__ import annotations

import copy
import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..problem import Choice, Problem, link_s, parking_s, resident_bytes, step_bytes
from .place import Places, places

Counts = Mapping[int, frozenset[int]]
Names = Mapping[str, frozenset[int]]
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Saved:
    """What is done to save memory. Empty: every tensor that backward needs is kept."""

    recompute: Counts = field(default_factory=dict)
    regather: Names = field(default_factory=dict)
    offload: Names = field(default_factory=dict)


@dataclass
class Op:
    """One op at one moment. takes, makes: tensor numbers. final: the moment until which a result of the program is held, -1 for ops."""

    moment: int
    node: int
    rank: int
    seconds: float
    view: bool
    takes: list[int] = field(default_factory=list)
    makes: list[int] = field(default_factory=list)
    final: int = -1


@dataclass(frozen=True)
class Run:
    """What a run of the tape counts: seconds of everything, of what runs a second time, of waiting for transfers; bytes at every event.

    The last event is the optimizer's step. places: the optimizer state that waits elsewhere so that the run fits (`Tape.within`)."""

    seconds: float
    again_s: float
    waits_s: float
    memory: np.ndarray
    moments: np.ndarray
    places: Places = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return int(self.memory.max(initial=0))

    @property
    def peak_moment(self) -> int:
        return int(self.moments[int(self.memory.argmax())]) if len(self.memory) else 0

    def profile(self, moments: int) -> np.ndarray:
        """Most bytes at each of the moments 0 … moments-1; where nothing happens, as at the moment before."""
        out = np.full(moments, -1, np.int64)
        np.maximum.at(out, np.minimum(self.moments, moments - 1), self.memory)
        last = np.maximum.accumulate(np.where(out >= 0, np.arange(moments), 0))
        return np.maximum(out[last], 0)


class Tape:
    """The step under one choice. Tensors are numbered; `source[t]` is the tensor that copy t is converted from, -1 for a value itself."""

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.choice = problem, choice
        self.value: list[int] = []
        self.item: list[int] = []  # which instance of the value it is,
        self.rank: list[int] = []  # and of all values of that name
        self.target: list[int] = []
        self.source: list[int] = []
        self.bytes: list[int] = []
        self.room: list[int] = []
        self.seconds: list[float] = []
        self.maker: list[Op | None] = []
        self.again: list[bool] = []  # a copy that `regather` can give up
        self.holds: dict[int, int] = {}  # tensors that the caller holds until a moment, whatever happens
        self.disk: Names = {}
        self.limit: int | None = None  # what optimizer state leaves for, and the room of host memory for it
        self.host_room: int | None = None
        self._resident()
        ops: dict[int, Op] = {}
        for n, node in enumerate(problem.nodes):
            each = float(node.seconds[choice[n]]) / max(len(node.moments), 1)
            for rank, m in enumerate(node.moments):
                ops[m] = Op(m, n, rank, each, node.view)
        finals: list[Op] = []
        for v in range(len(problem.values)):
            self._value(v, ops, finals)
        self.ops = sorted([*ops.values(), *finals], key=lambda op: (op.moment, op.final))

    def _resident(self) -> None:
        """What is always there, what the optimizer's moment needs besides, and the seconds that waiting for that takes."""
        self.resident = resident_bytes(self.problem, self.choice)
        self.step, self.parking_s = step_bytes(self.problem, self.choice), parking_s(self.problem, self.choice)

    def placed(self, found: Places, disk: Names | None = None) -> Tape:
        """The tape when this optimizer state waits elsewhere; disk: of the values that wait for backward, those on disk."""
        out = copy.copy(self)
        nodes = tuple(node.park(*found[n]) if n in found else node for n, node in enumerate(self.problem.nodes))
        out.problem, out.disk = replace(self.problem, nodes=nodes), self.disk if disk is None else disk
        out._resident()
        return out

    def within(self, limit: int, disk: Names | None = None, room: int | None = None) -> Tape:
        """The tape whose runs have as little optimizer state elsewhere as makes them fit. room: bytes of host memory for it."""
        out = copy.copy(self)
        out.limit, out.host_room, out.disk = limit, room, disk or {}
        return out

    def _value(self, v: int, ops: dict[int, Op], finals: list[Op]) -> None:
        value, choice = self.problem.values[v], self.choice
        p = int(value.state[choice[value.node]])
        qs = [int(c.state[choice[c.node]]) for c in value.consumers]
        is_op = [bool(self.problem.nodes[c.node].moments) for c in value.consumers]
        made = bool(self.problem.nodes[value.node].moments)
        shared = bool(value.shared[p])
        used, held, produced = value.used.tolist(), value.held.tolist(), value.produced.tolist()
        for i in range(value.count):
            rank = value.rank[i] if value.rank else i
            maker = ops[produced[i]] if made else None
            first = self._tensor(v, i, rank, -1, -1, int(value.bytes[p]), 0, 0.0, maker)
            if maker is not None:
                maker.makes.append(first)
            copies: dict[tuple[int, int], int] = {}
            for t, q in enumerate(qs):
                tensor = first
                if not value.same[p, q]:
                    key = (q, -1 if shared else value.consumers[t].phase)
                    if key not in copies:
                        room = int(value.room[p, q]) if value.room is not None else 0
                        copies[key] = self._tensor(v, i, rank, q, first, int(value.copy_bytes[q]), room, float(value.seconds[p, q]), None)
                        self.again[-1] = shared and not (value.partial is not None and bool(value.partial[p]))
                    tensor = copies[key]
                self._use(tensor, value.consumers[t].node if is_op[t] else -1, used[i][t], held[i][t], ops, finals)

    def _tensor(
        self, v: int, item: int, rank: int, target: int, source: int, size: int, room: int, seconds: float, maker: Op | None
    ) -> int:
        for column, entry in (
            (self.value, v),
            (self.item, item),
            (self.rank, rank),
            (self.target, target),
            (self.source, source),
            (self.bytes, size),
            (self.room, room),
            (self.seconds, seconds),
            (self.maker, maker),
            (self.again, False),
        ):
            column.append(entry)  # type: ignore[attr-defined,arg-type]
        return len(self.value) - 1

    def _use(self, tensor: int, node: int, used: int, held: int, ops: dict[int, Op], finals: list[Op]) -> None:
        if node < 0:
            finals.append(Op(used, -1, 0, 0.0, False, [tensor], [], held))
            return
        op = ops[used + 1]
        op.takes.append(tensor)
        if held > op.moment and not op.view:
            self.holds[tensor] = max(self.holds.get(tensor, 0), held)

    def run(self, saved: Saved | None = None) -> Run:
        """Seconds and memory of the step when this is done to save memory."""
        run = _Runner(self, saved or Saved()).run()
        return run if self.limit is None or run.peak <= self.limit else self._fitted(run, self.limit)

    def _fitted(self, run: Run, limit: int) -> Run:
        """The run with optimizer state elsewhere, all of it when that is not enough."""
        before, last = int(run.memory[:-1].max(initial=0)), int(run.memory[-1])
        for need in (before - limit, max(before, last + self.problem.bucket_bytes) - limit, math.inf):
            found = places(self.problem, self.choice, need, self.host_room)
            there = self.placed(found)
            memory = run.memory + (there.resident - self.resident)
            memory[-1] += there.step - self.step
            if memory.max() <= limit:
                break
        waits = there.parking_s - self.parking_s
        return replace(run, seconds=run.seconds + waits, waits_s=run.waits_s + waits, memory=memory, places=found)


class _Runner:
    """One run. An episode is one stay of a tensor in memory: its first event, its last event, what it is a view of."""

    def __init__(self, tape: Tape, saved: Saved) -> None:
        self.tape, self.saved = tape, saved
        n = len(tape.value)
        self.now = [-1] * n  # the present episode of every tensor
        self.fresh = [True] * n  # False: backward must make it again before it takes it
        self.start: list[int] = []
        self.last: list[int] = []
        self.size: list[int] = []
        self.base: list[tuple[int, ...]] = []
        self.moment: list[int] = []
        self.room: list[tuple[int, int]] = []
        self.until: list[tuple[int, int]] = []
        self.seconds = self.again_s = 0.0
        self.time: list[float] = []  # when an event ends
        self.waits = self.out_free = self.in_free = 0.0
        self.link_s = {tier: link_s(tape.problem, tier) for tier in ("host", "disk")}
        self.leaving: list[tuple[int, float]] = []  # until when (moment) a copy out must have arrived, and when it does
        self.away = [False] * n
        values = tape.problem.values
        self.sent = {
            t
            for t, v in enumerate(tape.value if self.saved.offload else ())
            if tape.bytes[t] > 0 and tape.rank[t] in self.saved.offload.get(values[v].name, NONE)
        }

    def run(self) -> Run:
        tape, end = self.tape, self.tape.problem.forward_end
        values = tape.problem.values
        backward = False
        for t, v in enumerate(tape.value):
            if tape.source[t] < 0 and tape.maker[t] is None and values[v].produced.max(initial=0) <= 0:
                self._begin(t, 0)
        for op in tape.ops:
            self._arrive(op.moment)
            if not backward and op.moment > end and op.final < 0:
                self._let_go()
                backward = True
            for t in op.takes:
                self._ensure(t, op.moment - 1 if op.final < 0 else op.moment)
            self._emit(op, op.moment)
            if op.final >= 0:
                self.until += [(self.now[t], op.final) for t in op.takes]
        self._event(tape.problem.moments - 1, 0.0)  # the optimizer's
        return self._count()

    def _event(self, moment: int, seconds: float) -> int:
        self.moment.append(moment)
        self.seconds += seconds
        self.time.append(self.seconds + self.waits)
        return len(self.moment) - 1

    def _wait(self, until: float) -> None:
        self.waits += max(0.0, until - self.seconds - self.waits)

    def _send(self, t: int, event: int, moment: int) -> None:
        """The copy out starts; the memory is given back at a border of blocks."""
        borders, end = self.tape.problem.borders, self.tape.problem.forward_end
        self.out_free = max(self.out_free, self.seconds + self.waits) + self._travel(t)
        after = bisect_right(borders, moment) + 1
        arrived = borders[after] if after < len(borders) and borders[after] <= end else end + 1
        heapq.heappush(self.leaving, (arrived, self.out_free))
        self.until.append((self.now[t], arrived - 1))

    def _travel(self, t: int) -> float:
        """Seconds of a copy in one direction."""
        away = self.tape.rank[t] in self.tape.disk.get(self.tape.problem.values[self.tape.value[t]].name, NONE)
        return self.tape.bytes[t] * self.link_s["disk" if away else "host"]

    def _arrive(self, moment: int) -> None:
        while self.leaving and self.leaving[0][0] <= moment:
            self._wait(heapq.heappop(self.leaving)[1])

    def _fetch(self, t: int, moment: int) -> None:
        """The copy back started a block ahead; wait until it is there."""
        borders, end = self.tape.problem.borders, self.tape.problem.forward_end
        first = bisect_right(borders, end)
        come = borders[max(bisect_right(borders, moment + 1) - 2, first)] if first < len(borders) else moment
        event = min(bisect_left(self.moment, come), len(self.moment) - 1)
        self.in_free = max(self.in_free, self.time[event]) + self._travel(t)
        self._begin(t, event)
        self._wait(self.in_free)
        self.last[self.now[t]] = len(self.moment) - 1

    def _begin(self, t: int, event: int, base: tuple[int, ...] = ()) -> None:
        self.now[t] = len(self.start)
        self.start.append(event)
        self.last.append(event)
        self.size.append(self.tape.bytes[t])
        self.base.append(base)
        if t in self.tape.holds:
            self.until.append((self.now[t], self.tape.holds[t]))

    def _emit(self, op: Op, moment: int) -> None:
        if op.final >= 0:
            event = max(len(self.moment) - 1, 0) if self.moment else self._event(moment, 0.0)
        else:
            event = self._event(moment, op.seconds)
        for t in op.takes:
            self.last[self.now[t]] = event
        base = tuple(self.now[t] for t in op.takes) if op.view else ()
        for t in op.makes:
            self._begin(t, event, base)
            if t in self.sent and moment == op.moment <= self.tape.problem.forward_end:
                self._send(t, event, moment)

    def _let_go(self) -> None:
        """Backward begins: forget what is not kept."""
        tape, values, nodes = self.tape, self.tape.problem.values, self.tape.problem.nodes
        for t, v in enumerate(tape.value):
            maker = tape.maker[t]
            name = values[v].name
            if maker is not None:
                if maker.moment <= tape.problem.forward_end and nodes[maker.node].again:
                    self.fresh[t] = maker.rank not in self.saved.recompute.get(maker.node, NONE)
                if self.fresh[t] and t in self.sent:
                    self.fresh[t], self.away[t] = False, True
            elif tape.source[t] >= 0 and self.now[t] >= 0:
                source = tape.source[t]
                given_up = tape.again[t] and tape.rank[t] in self.saved.regather.get(name, NONE)
                self.fresh[t] = self.fresh[source] and not given_up

    def _ensure(self, t: int, moment: int) -> None:
        """Make tensor t available for an op."""
        tape = self.tape
        if self.now[t] >= 0 and self.fresh[t]:
            return
        source = tape.source[t]
        known = self.now[t] >= 0
        if source >= 0:
            self._ensure(source, moment)
            event = self._event(moment, tape.seconds[t])
            self.last[self.now[source]] = event
            self._begin(t, event)
            if tape.room[t]:
                self.room.append((event, tape.room[t]))
            self.again_s += tape.seconds[t] if known else 0.0
        elif (op := tape.maker[t]) is not None and op.rank in self.saved.recompute.get(op.node, NONE):
            for taken in op.takes:
                self._ensure(taken, moment)
            self._emit(op, moment)
            self.again_s += op.seconds
            for made in op.makes:
                self.fresh[made] = True
        elif self.away[t]:
            self._fetch(t, moment)
        else:  # the caller's: a tangent
            self._begin(t, max(len(self.moment) - 1, 0))
        self.fresh[t] = True

    def _count(self) -> Run:
        moments = np.array(self.moment, np.int64)
        last = self.last
        for episode, moment in self.until:
            last[episode] = max(last[episode], int(np.searchsorted(moments, moment, side="right")) - 1)
        for episode in range(len(self.base) - 1, -1, -1):
            for base in self.base[episode]:
                last[base] = max(last[base], last[episode])
        steps = np.zeros(len(moments) + 1, np.int64)
        size = np.array(self.size, np.int64)
        np.add.at(steps, np.array(self.start, np.int64), size)
        np.subtract.at(steps, np.array(last, np.int64) + 1, size)
        memory = np.cumsum(steps[:-1]) + self.tape.resident
        for event, room in self.room:
            memory[event] += room
        memory[-1] += self.tape.step
        waits = self.waits + self.tape.parking_s
        return Run(self.seconds + waits, self.again_s, waits, memory, moments)
