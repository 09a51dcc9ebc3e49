"""A step in time: what runs when, on the compute stream, on one communication stream per mesh axis and on the host's links.

Events come in the order in which a device is given them. A stream runs its events one after the other, in that order; an event
begins when the one before it on its stream and all that it comes `after` are over. Nothing else decides: a placed event's start is
the largest of those ends. So collectives along one axis queue, and those along different axes, compute and copies run at the same time.
Where several axes are one physical link (`Event.link`), what travels there at the same time shares its bandwidth: see link.py.

    step       the end of the last event
    work       seconds that a stream's events take alone
    busy       seconds in which a stream has work: longer than `work` where its link is shared
    exposed    seconds in which a stream other than compute has work and compute has none; the rest of its work is hidden
    idle       seconds of the step in which compute has no work
    critical   a chain of events, each beginning when the one before ends, that fills the step

Of every stream: work - compute's busy ≤ busy - compute's busy ≤ exposed ≤ busy, because only as much can be hidden as there is to hide
behind. Of all streams of a link together: transfers - compute's busy ≤ exposed, because a link carries no more than its bandwidth.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import GraphError, InputError
from .link import Link, shared_streams

COMPUTE = "compute"


@dataclass(frozen=True)
class Event:
    """Work of `seconds` on `stream`; `after`: positions of earlier events that must be over.

    link: what carries it, "" for a link of its own; the last transfer_s of its seconds use that link's bandwidth. The rest is for people.
    """

    name: str
    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    kind: str = ""
    phase: str = ""
    where: str = ""
    bytes: int = 0
    link: str = ""
    transfer_s: float = 0.0


@dataclass(frozen=True)
class Span:
    """An event in its place."""

    event: Event
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """From start to end: more than the event's own seconds where it shares its link."""
        own = self.event.seconds
        return own if self.end_s == self.start_s + own else self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """A placed step. Streams are in the order in which they first have work; `critical`: positions of spans, first to last."""

    spans: tuple[Span, ...]
    step_s: float
    work: dict[str, float]
    busy: dict[str, float]
    exposed: dict[str, float]
    exposed_s: float
    critical: tuple[int, ...]

    @property
    def idle_s(self) -> float:
        """Seconds in which compute has no work."""
        return self.step_s - self.busy.get(COMPUTE, 0.0)

    @property
    def sequential_s(self) -> float:
        """Seconds of all work, one after the other."""
        return sum(s.event.seconds for s in self.spans)


def place(events: Sequence[Event]) -> tuple[Span, ...]:
    """Every event in its place. Raises GraphError for one that comes after itself or a later one, or takes less than no time."""
    for i, event in enumerate(events):
        if not event.seconds >= 0 or not event.transfer_s >= 0 or any(not 0 <= j < i for j in event.after):
            raise GraphError(f"event {i}, {event.name}, cannot be placed", why=f"{event.seconds} s after {event.after}")
    shared = shared_streams((event.stream, event.link) for event in events)
    links = {name: Link() for name in shared.values()}
    waits, followers = _order(events)
    begun, over = [0.0] * len(events), [0.0] * len(events)
    ends: list[tuple[float, int]] = []  # of what runs on a stream of its own
    ready, now = [i for i, n in enumerate(waits) if not n], 0.0
    while True:
        for i in ready:
            event, begun[i] = events[i], now
            if event.stream in shared:
                links[shared[event.stream]].give(i, event.stream, now, event.seconds, event.transfer_s)
            else:
                heapq.heappush(ends, (now + event.seconds, i))
        now = min([ends[0][0] if ends else math.inf, *(link.next() for link in links.values())])
        if now == math.inf:
            return tuple(Span(*one) for one in zip(events, begun, over, strict=True))
        done = []
        while ends and ends[0][0] <= now:
            done.append(heapq.heappop(ends)[1])
        for link in links.values():
            while link.next() <= now:
                done.append(link.step())
        ready = []
        for i in done:
            if i >= 0:
                over[i] = now
                for k in followers[i]:
                    waits[k] -= 1
                    if not waits[k]:
                        ready.append(k)


def _order(events: Sequence[Event]) -> tuple[list[int], list[list[int]]]:
    """Per event how many others it waits for, and which wait for it: the next one of its stream among them."""
    waits, followers = [0] * len(events), [list[int]() for _ in events]
    last: dict[str, int] = {}
    for i, event in enumerate(events):
        before = {*event.after, *((last[event.stream],) if event.stream in last else ())}
        waits[i], last[event.stream] = len(before), i
        for j in before:
            followers[j].append(i)
    return waits, followers


def simulate(events: Sequence[Event]) -> Timeline:
    """Place the events and measure the step."""
    spans = place(events)
    streams = list(dict.fromkeys(e.stream for e in events))
    work = {name: [(s.start_s, s.end_s) for s in spans if s.event.stream == name] for name in streams}
    alone = {name: sum(s.event.seconds for s in spans if s.event.stream == name) for name in streams}
    busy = {name: sum(s.seconds for s in spans if s.event.stream == name) for name in streams}
    computing = work.get(COMPUTE, [])
    exposed = {name: uncovered(work[name], computing) for name in streams if name != COMPUTE}
    others = sorted(pair for name in exposed for pair in work[name])
    step_s = max((s.end_s for s in spans), default=0.0)
    return Timeline(spans, step_s, alone, busy, exposed, uncovered(others, computing), _critical(spans))


def uncovered(some: Sequence[tuple[float, float]], cover: Sequence[tuple[float, float]]) -> float:
    """Length of the union of `some` that lies outside the union of `cover`; both are sorted by their starts."""
    total, reached, at = 0.0, 0.0, 0
    for begin, end in some:
        begin = max(begin, reached)
        reached = max(reached, end)
        while at < len(cover) and cover[at][1] <= begin:
            at += 1
        k = at
        while begin < end:
            if k == len(cover) or cover[k][0] >= end:
                total += end - begin
                break
            total += max(0.0, cover[k][0] - begin)
            begin = max(begin, cover[k][1])
            k += 1
    return total


def _critical(spans: Sequence[Span]) -> tuple[int, ...]:
    """Backwards from the last event to end: always to what it had to wait for, compute first."""
    if not spans:
        return ()
    before: list[int] = []
    last: dict[str, int] = {}
    for i, span in enumerate(spans):
        before.append(last.get(span.event.stream, -1))
        last[span.event.stream] = i
    at = max(range(len(spans)), key=lambda i: (spans[i].end_s, -i))
    path = [at]
    while spans[at].start_s > 0.0:
        causes = [j for j in (before[at], *spans[at].event.after) if j >= 0 and spans[j].end_s == spans[at].start_s]
        at = min(causes, key=lambda j: (spans[j].event.stream != COMPUTE, -j))
        path.append(at)
    return tuple(reversed(path))


def trace(timeline: Timeline, title: str = "") -> str:
    """The timeline as JSON in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

    One thread per stream; microseconds. What lies on the critical path says so; what shared its link says how long it takes alone.
    """
    threads = {name: k for k, name in enumerate(dict.fromkeys([COMPUTE, *timeline.busy]))}
    rows: list[dict[str, object]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title or "step"}}]
    for name, k in threads.items():
        rows.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": k, "args": {"name": name}})
        rows.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": k, "args": {"sort_index": k}})
    critical = set(timeline.critical)
    rows += [_row(span, threads[span.event.stream], i in critical) for i, span in enumerate(timeline.spans)]
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    return f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n'


def save_trace(path: str | os.PathLike[str], timeline: Timeline, title: str = "") -> None:
    """Write `trace` to a file. Raises InputError when it cannot be written."""
    try:
        Path(path).write_text(trace(timeline, title), encoding="utf-8")
    except OSError as e:
        raise InputError(f"cannot write the trace to {path}", why=str(e), try_="name a folder that exists and can be written") from None


def _row(span: Span, thread: int, critical: bool) -> dict[str, object]:
    event = span.event
    alone = event.seconds * 1e6 if span.seconds > event.seconds else 0.0
    facts = {"kind": event.kind, "where": event.where, "bytes": event.bytes, "critical": critical, "alone": alone}
    return {
        "ph": "X",
        "name": event.name,
        "cat": ",".join(filter(None, (event.stream, event.phase))),
        "pid": 0,
        "tid": thread,
        "ts": span.start_s * 1e6,
        "dur": span.seconds * 1e6,
        "args": {key: value for key, value in facts.items() if value},
    }
