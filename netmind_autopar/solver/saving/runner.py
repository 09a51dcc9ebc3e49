"""One run of a tape: see tape.py."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import numpy as np

from ..problem import link_s
from .record import NONE, Op, Run, Saved

if TYPE_CHECKING:
    from .tape import Tape


class Runner:
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
        self.bytes, self.stowed, self.views = tape.bytes, {}, set[int]()
        if tape.stowed:
            self._stow()
        self.sent = {
            t
            for t, v in enumerate(tape.value if self.saved.offload else ())
            if tape.bytes[t] > 0 and tape.rank[t] in self.saved.offload.get(values[v].name, NONE)
        }

    def _stow(self) -> None:
        """The parameters that wait elsewhere, what they take when they are here, and the ops of forward that view them, by moment."""
        tape, values, nodes = self.tape, self.tape.problem.values, self.tape.problem.nodes
        self.bytes, self.stowed = list(tape.bytes), {}
        given = [False] * len(tape.value)
        for t, v in enumerate(tape.value):
            node, source = values[v].node, tape.source[t]
            if source < 0 and tape.maker[t] is None and (tier := tape.tier(node, tape.rank[t])):
                self.stowed[t] = tier
                self.bytes[t] = int(nodes[node].size[tape.choice[node]])  # type: ignore[index]
            given[t] = t in self.stowed or (source >= 0 and given[source])
        for op in tape.ops:
            if op.view and op.final < 0 and op.takes and nodes[op.node].again and all(given[t] for t in op.takes):
                self.views.add(op.moment)
                for t, source in enumerate(tape.source):
                    given[t] = given[t] or t in op.makes or source in op.makes

    def _again(self, op: Op) -> bool:
        """Whether an op of forward runs again where backward needs it."""
        return op.moment in self.views or op.rank in self.saved.recompute.get(op.node, NONE)

    def run(self) -> Run:
        tape, end = self.tape, self.tape.problem.forward_end
        values = tape.problem.values
        backward = False
        for t, v in enumerate(tape.value):
            if tape.source[t] < 0 and tape.maker[t] is None and values[v].produced.max(initial=0) <= 0 and t not in self.stowed:
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
                tier = tape.tier(*op.owner)
                self.until += [(self.now[t], self._leave(op, tier) if tier else op.final) for t in op.takes]
        self._arrive(tape.problem.moments)
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

    def _leave(self, op: Op, tier: str) -> int:
        """A gradient goes out for good: the last moment at which it is here."""
        borders, last = self.tape.problem.borders, self.tape.problem.moments - 2
        size = float(self.tape.problem.nodes[op.owner[0]].size[self.tape.choice[op.owner[0]]])  # type: ignore[index]
        self.out_free = max(self.out_free, self.seconds + self.waits) + size * self.link_s[tier]
        after = bisect_right(borders, op.moment) + 1
        out = borders[after] - 1 if after < len(borders) else last
        heapq.heappush(self.leaving, (out + 1, self.out_free))
        return out

    def _travel(self, t: int) -> float:
        """Seconds of a copy in one direction."""
        if t in self.stowed:
            return self.bytes[t] * self.link_s[self.stowed[t]]
        away = self.tape.rank[t] in self.tape.disk.get(self.tape.problem.values[self.tape.value[t]].name, NONE)
        return self.tape.bytes[t] * self.link_s["disk" if away else "host"]

    def _arrive(self, moment: int) -> None:
        while self.leaving and self.leaving[0][0] <= moment:
            self._wait(heapq.heappop(self.leaving)[1])

    def _fetch(self, t: int, moment: int) -> None:
        """The copy back started a block ahead; wait until it is there."""
        borders, end = self.tape.problem.borders, self.tape.problem.forward_end
        if not self.moment:
            self._event(moment, 0.0)
        first = bisect_right(borders, end) if moment > end else 0
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
        self.size.append(self.bytes[t])
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
                    self.fresh[t] = not self._again(maker)
                if self.fresh[t] and t in self.sent:
                    self.fresh[t], self.away[t] = False, True
            elif tape.source[t] >= 0 and self.now[t] >= 0:
                source = tape.source[t]
                given_up = tape.again[t] and tape.rank[t] in self.saved.regather.get(name, NONE)
                self.fresh[t] = (self.fresh[source] or source in self.stowed) and not given_up
            elif t in self.stowed:
                self.fresh[t], self.away[t] = False, True

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
        elif (op := tape.maker[t]) is not None and self._again(op):
            for taken in op.takes:
                self._ensure(taken, moment)
            self._emit(op, moment)
            self.again_s += op.seconds
            for made in op.makes:
                self.fresh[made] = True
        elif self.away[t] or t in self.stowed:
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
