"""A step in time: what runs when, on the compute stream, on one communication stream per mesh axis and on the host's links.

Events come in the order in which a device is given them. A stream runs its events one after the other, in that order; an event
begins when the one before it on its stream and all that it comes `after` are over. Nothing else decides: a placed event's start is
the largest of those ends. So collectives along one axis queue, and those along different axes, compute and copies run at the same time.

    step       the end of the last event
    busy       seconds in which a stream has work
    exposed    seconds in which a stream other than compute has work and compute has none; the rest of its work is hidden
    idle       seconds of the step in which compute has no work
    critical   a chain of events, each beginning when the one before ends, that fills the step

Of every stream: busy - compute's busy ≤ exposed ≤ busy, because only as much can be hidden as there is to hide behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import GraphError, InputError

COMPUTE = "compute"


@dataclass(frozen=True)
class Event:
    """Work of `seconds` on `stream`; `after`: positions of earlier events that must be over. The rest is for people."""

    name: str
    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    kind: str = ""
    phase: str = ""
    where: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Span:
    """An event in its place."""

    event: Event
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A placed step. Streams are in the order in which they first have work; `critical`: positions of spans, first to last."""

    spans: tuple[Span, ...]
    step_s: float
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
    free: dict[str, float] = {}
    spans: list[Span] = []
    for i, event in enumerate(events):
        if not event.seconds >= 0 or any(not 0 <= j < i for j in event.after):
            raise GraphError(f"event {i}, {event.name}, cannot be placed", why=f"{event.seconds} s after {event.after}")
        begin = max([free.get(event.stream, 0.0), *(spans[j].end_s for j in event.after)])
        spans.append(Span(event, begin, begin + event.seconds))
        free[event.stream] = begin + event.seconds
    return tuple(spans)


def simulate(events: Sequence[Event]) -> Timeline:
    """Place the events and measure the step."""
    spans = place(events)
    streams = list(dict.fromkeys(e.stream for e in events))
    work = {name: [(s.start_s, s.end_s) for s in spans if s.event.stream == name] for name in streams}
    busy = {name: sum(s.event.seconds for s in spans if s.event.stream == name) for name in streams}
    computing = work.get(COMPUTE, [])
    exposed = {name: uncovered(work[name], computing) for name in streams if name != COMPUTE}
    others = sorted(pair for name in exposed for pair in work[name])
    return Timeline(spans, max((s.end_s for s in spans), default=0.0), busy, exposed, uncovered(others, computing), _critical(spans))


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

    One thread per stream; microseconds. What lies on the critical path says so.
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
    facts = {"kind": event.kind, "where": event.where, "bytes": event.bytes, "critical": critical}
    return {
        "ph": "X",
        "name": event.name,
        "cat": ",".join(filter(None, (event.stream, event.phase))),
        "pid": 0,
        "tid": thread,
        "ts": span.start_s * 1e6,
        "dur": event.seconds * 1e6,
        "args": {key: value for key, value in facts.items() if value},
    }
