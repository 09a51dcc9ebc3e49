"""Where the collectives of a step lie in time, and what its length hangs on.

Between flights only sums of compute seconds matter, so a step costs as much to place as it has collectives:

    start   no earlier than compute comes to `go`, than the flight before it on its stream is over; what of it cannot be hidden comes first
    wait    compute goes on when the flight is over

Flights on streams of one physical link share its bandwidth (costs/link.py): what one of them is slowed down by counts for the other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..costs.link import Link, shared_streams
from ..costs.timeline import uncovered


@dataclass
class Flight:
    """value: of the problem. at: the slot at which it stands without overlap, and its place there. after: the flight whose result it
    sends, -1 for none. busy: seconds of compute right before it. transfer_s: of its seconds, those that use its link's bandwidth."""

    value: int
    stream: str
    seconds: float
    go: int
    come: int
    at: tuple[int, int]
    after: int = -1
    backward: bool = False  # begins and is waited for there: after all that forward waits for
    busy: float = 0.0
    transfer_s: float = 0.0


class Clock:
    """The placing. Items are starts and waits in the order in which the device comes to them."""

    def __init__(self, flights: Sequence[Flight], before: np.ndarray, links: Mapping[str, str] | None = None) -> None:
        """before: seconds of compute before every slot. links: per stream what carries it, where that may carry others too."""
        self.flights, self.before = flights, before
        shared = shared_streams((f.stream, links[f.stream]) for f in flights if f.stream in links) if links else {}
        joint = {link: Link() for link in shared.values()}
        self.links = {stream: joint[link] for stream, link in shared.items()}  # of the streams that share theirs here
        items: list[tuple[tuple, int, int, bool]] = []
        for f, flight in enumerate(flights):
            own = flight.go >= flight.at[0] or (flight.after >= 0 and flights[flight.after].come >= flight.go)
            begin = (1, flight.at, 0, f) if own else (0, flight.come, flight.at, f)
            items.append(((flight.go, flight.backward, *begin), flight.go, f, True))
            items.append(((flight.come, flight.backward, 1, flight.at, 1, f), flight.come, f, False))
        self.items = sorted(items)
        self.now = self.computed = 0.0  # when the step ends, and when compute does
        self.begin, self.end = [0.0] * len(flights), [0.0] * len(flights)
        self.idle: list[tuple[float, float]] = []  # when compute waits
        self.cause: list[int] = [-1] * len(flights)  # the flight before on the stream, when that decided when it began
        self.item_of: list[int] = [0] * len(flights)
        self.stalls: list[tuple[int, int]] = []  # (item, flight) of waits that took time
        self.last = -1  # the flight that ends the step, -1 when compute does

    def run(self) -> None:
        """Place every flight, and compute between them."""
        now, at, free = 0.0, 0, dict[str, tuple[float, int]]()
        before = self.before.tolist()
        for k, (_, slot, f, begins) in enumerate(self.items):
            now += before[slot] - before[at]
            at = slot
            if begins:
                now += self.flights[f].busy
                stream, seconds = self.flights[f].stream, self.flights[f].seconds
                if stream in self.links:
                    self.item_of[f] = k
                    self.links[stream].until(now)
                    self.links[stream].give(f, stream, now, seconds, self.flights[f].transfer_s)
                    continue
                ready, other = free.get(stream, (0.0, -1))
                self.item_of[f], self.begin[f] = k, now
                if ready > now:
                    self.begin[f], self.cause[f] = ready, other
                self.end[f] = self.begin[f] + seconds
                free[stream] = self.end[f], f
                continue
            if self.flights[f].stream in self.links:
                self.end[f] = self.links[self.flights[f].stream].over(f)
            if self.end[f] > now:
                self.idle.append((now, self.end[f]))
                now = self.end[f]
                self.stalls.append((k, f))
        now += before[-1] - before[at]
        self.computed = now
        self._land(free)
        for end, f in free.values():
            if end > now:
                now, self.last = end, f
        self.now = now

    def _land(self, free: dict[str, tuple[float, int]]) -> None:
        """When the flights on shared links began and were over, and which was the last on each stream."""
        for link in dict.fromkeys(self.links.values()):
            link.until(math.inf)
            for f, end in link.end.items():
                self.begin[f], self.end[f], self.cause[f] = link.begin[f], end, link.behind.get(f, -1)
                free[self.flights[f].stream] = max(free.get(self.flights[f].stream, (end, f)), (end, f))

    def streams(self) -> dict[str, tuple[float, float]]:
        """Per stream the seconds in which it has work, and in how many of them compute has nothing to do."""
        ends = [0.0, *(end for _, end in self.idle)]
        computing = list(zip(ends, [*(begin for begin, _ in self.idle), self.computed], strict=True))
        work: dict[str, list[tuple[float, float]]] = {}
        for f, flight in enumerate(self.flights):
            work.setdefault(flight.stream, []).append((self.begin[f], self.end[f]))
        return {stream: (sum(e - b for b, e in pairs), uncovered(sorted(pairs), computing)) for stream, pairs in work.items()}

    def critical(self) -> tuple[np.ndarray, list[float], list[bool]]:
        """What is on a chain that fills the step: per slot its compute, per flight its share of itself, and what compute does before it."""
        slots, flown, passed = np.zeros(len(self.before) - 1), [0.0] * len(self.flights), np.zeros(len(self.items), bool)
        k, slot, f = len(self.items), len(self.before) - 1, self.last
        stalled = [item for item, _ in self.stalls]
        while True:
            while f >= 0:
                self._fly(f, flown)
                if self.cause[f] >= 0:
                    f = self.cause[f]
                    continue
                k, slot, f = self.item_of[f] + 1, self.flights[f].go, -1
            at = bisect_left(stalled, k) - 1
            item, f = self.stalls[at] if at >= 0 else (0, -1)
            slots[self.items[item][1] if at >= 0 else 0 : slot] = 1.0
            passed[item:k] = True
            if at < 0:
                return slots, flown, [bool(passed[i]) for i in self.item_of]
            k = item

    def _fly(self, f: int, flown: list[float]) -> None:
        """A flight is on the chain, and for their shares those that slow it down."""
        if self.flights[f].stream not in self.links:
            flown[f] = 1.0
            return
        for g, seconds in self.links[self.flights[f].stream].parts(f).items():
            flown[g] += seconds / self.flights[g].seconds if self.flights[g].seconds else 0.0
