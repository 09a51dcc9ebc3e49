"""Collectives that travel over one link at the same time: each has its latency for itself, the bandwidth is shared.

    latency    a transfer first waits for its latency, during which it does not use the link
    transfer   k transfers that are under way go on at 1/k of their speed each, until one ends or another one begins

This is the fluid model of flow-level network simulators (Velho, Legrand: Accuracy Study and Improvement of Network Simulation in the
SimGrid Framework, SIMUTools 2009) where there is one bottleneck: max-min fair shares are equal shares then. A transfer that is
alone takes exactly the seconds that it is priced at.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable


def shared_streams(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of pairs (stream, link) the streams whose link carries another stream too, and that link. "": a link of its own."""
    streams: dict[str, set[str]] = {}
    for stream, link in pairs:
        if link:
            streams.setdefault(link, set()).add(stream)
    return {stream: link for link, names in streams.items() if len(names) > 1 for stream in sorted(names)}


class Link:
    """One link, as time goes on. Transfers have numbers; those of one stream go one after the other, in the order in which they are given.

    begin, end: of every transfer so far. behind: the transfer on whose end one had to wait, where its stream was not free.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.begin: dict[int, float] = {}
        self.end: dict[int, float] = {}
        self.behind: dict[int, int] = {}
        self._queues: dict[str, deque[int]] = {}  # per stream, the first one is under way
        self._facts: dict[int, tuple[str, float, float]] = {}
        self._joins: list[tuple[float, int]] = []  # when transfers that wait for their latency use the link
        self._ends: dict[int, float] = {}  # of those that use it, at the present shares
        self._joined: dict[int, float] = {}
        self._shares: list[tuple[float, float, tuple[int, ...]]] = []  # times in which several use it

    def give(self, number: int, stream: str, at: float, seconds: float, transfer_s: float) -> None:
        """A transfer that may begin at `at`, with nothing left to happen before; alone it takes `seconds`, the last `transfer_s` of which
        use the link."""
        self._pass(at)
        self._facts[number] = stream, seconds, min(transfer_s, seconds)
        queue = self._queues.setdefault(stream, deque())
        if queue:
            self.behind[number] = queue[-1]
        queue.append(number)
        if len(queue) == 1:
            self._start(number, at)

    def next(self) -> float:
        """When something changes next; inf when nothing is under way."""
        return min(min(self._ends.values(), default=math.inf), self._joins[0][0] if self._joins else math.inf)

    def step(self) -> int:
        """Go on to the next change. The transfer that is over, -1 for none."""
        first = min(self._ends, key=lambda n: (self._ends[n], n), default=-1)
        if first >= 0 and not (self._joins and self._joins[0][0] < self._ends[first]):
            self._pass(self._ends[first])
            return self._over(first)
        at, number = heapq.heappop(self._joins)
        self._pass(at)
        self._joined[number] = at
        _, seconds, transfer_s = self._facts[number]
        alone = self.begin[number] + seconds
        if transfer_s <= 0 or not self._ends:
            self._ends[number] = alone
            return self._over(number) if transfer_s <= 0 else -1
        self._stretch(at, len(self._ends), len(self._ends) + 1)
        self._ends[number] = at + transfer_s * (len(self._ends) + 1)
        return -1

    def over(self, number: int) -> float:
        """Go on until a transfer is over, if nothing else begins meanwhile: when that is."""
        while number not in self.end:
            self.step()
        return self.end[number]

    def until(self, at: float) -> None:
        """Go on to a time, with all that happens then; inf: until all are over."""
        while self.next() < math.inf and self.next() <= at:
            self.step()

    def _start(self, number: int, at: float) -> None:
        _, seconds, transfer_s = self._facts[number]
        self.begin[number] = at
        heapq.heappush(self._joins, (at + (seconds - transfer_s), number))

    def _over(self, number: int) -> int:
        self.end[number] = at = self._ends.pop(number)
        if self._ends and self._facts[number][2] > 0:
            self._stretch(at, len(self._ends) + 1, len(self._ends))
        queue = self._queues[self._facts[number][0]]
        queue.popleft()
        if queue:
            self._start(queue[0], at)
        return number

    def _stretch(self, at: float, before: int, after: int) -> None:
        for n, end in self._ends.items():
            self._ends[n] = at + (end - at) / before * after

    def _pass(self, at: float) -> None:
        if len(self._ends) > 1 and at > self.now:
            self._shares.append((self.now, at, tuple(self._ends)))
        self.now = max(self.now, at)

    def parts(self, number: int) -> dict[int, float]:
        """Whose seconds those are in which a transfer is under way: its own, and of those with whom it shares the link. Their sum is
        its time from begin to end."""
        begin, end = self._joined[number], self.end[number]
        out = {number: end - self.begin[number]}
        at = bisect_left(self._shares, (begin, begin, ()))
        for start, stop, those in self._shares[at:]:
            if start >= end:
                break
            if number in those:
                each = (stop - start) / len(those)
                out[number] -= stop - start - each
                for other in those:
                    if other != number:
                        out[other] = out.get(other, 0.0) + each
        return out
