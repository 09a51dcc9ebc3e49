"""Where every collective is started and where it is waited for, so that it travels while other ops run.

    started     as soon as what it sends exists, and no earlier than one block ahead of its first use (a parameter always exists)
    waited for  right before its first use; results and gradients at the end of their phase

A collective that goes on with another one (a chain of moves over several axes) has its share of the time, by price. Nothing is
waited for in another phase than it was started in. All other ops stay in their order.

The peak of the step does not grow: a start comes later, or a wait earlier, where the bytes on their way would raise it above what
it is when every collective runs where it is needed. There is one graph, so all ranks start collectives in one order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from ..costs.compute import FREE, short_name
from ..ir.program import Draft, Program, is_getitem, tensor_args
from ..runtime.collectives import BUCKETS, LOCAL_KINDS, MOVES, move, start, start_bucket, wait
from ..solver.window import back, borders
from .alive import Alive, alive, owner_of

if TYPE_CHECKING:
    from .pipeline import Lowering


@dataclass(frozen=True)
class Flight:
    """A collective starts before the op at slot `go` and is waited for before the op at slot `come`; slots as in `Alive`."""

    node: fx.Node
    go: int
    come: int


def schedule_collectives(program: Program, context: Lowering) -> Program:
    """Start collectives early and wait for them late, unless the plan says that nothing overlaps."""
    if not context.plan.overlap or not any(is_collective(n, context.sizes) for n in program.graph.nodes):
        return program
    with program.edit() as new:
        work, flights = decide(replace(program, graph=new.graph, specs=new.specs, expects=new.expects), context)
        _rewrite(new, work, flights)
    return new.program


def is_collective(node: fx.Node, sizes: Sequence[int]) -> bool:
    """Whether something travels between devices."""
    if node.target in MOVES:
        return node.args[1] not in LOCAL_KINDS and sizes[node.args[2]] > 1  # type: ignore[index]
    return node.target in BUCKETS


def decide(program: Program, context: Lowering) -> tuple[Alive, Mapping[fx.Node, Flight]]:
    """The flights of all collectives, in the order of the program."""
    work = alive(program, context)
    limit = int(work.memory.max())
    ahead = _Ahead.of(work)
    flights: dict[fx.Node, Flight] = {}
    for node in work.order:
        if not is_collective(node, context.sizes) or node in flights:
            continue
        arrived = 0
        for flight in _wanted(work, ahead, node, context.sizes):
            found = _fit(work, replace(flight, go=max(flight.go, arrived)), limit)
            flights[flight.node], arrived = found, found.come
    for node, flight in flights.items():  # what goes on with it may have to start before its first use
        takers = [flights[u].go for u in _takers(node) if u in flights]
        flights[node] = replace(flight, come=min([flight.come, *takers]))
    return work, flights


@dataclass(frozen=True)
class _Ahead:
    """Slots at which the stretches of every phase begin: see solver/window.py."""

    work: Alive
    borders: Mapping[int, Sequence[int]]  # by the first slot of the phase

    @classmethod
    def of(cls, work: Alive) -> _Ahead:
        phases = itertools.pairwise(work.bounds)
        return cls(work, {first: [first + s for s in borders(work.order[first:end])] for first, end in phases})

    def earliest(self, slot: int) -> int:
        """One stretch before the one in which `slot` lies."""
        return back(self.borders[self.work.phase(slot)[0]], slot)

    def next(self, slot: int) -> int:
        """Where the stretch after the one of `slot` begins."""
        first, end = self.work.phase(slot)
        return next((b for b in self.borders[first] if b > slot), end)


def _wanted(work: Alive, ahead: _Ahead, node: fx.Node, sizes: Sequence[int]) -> list[Flight]:
    """Where a collective, and those that go on with it alone, would fly if memory did not matter."""
    chain, (_, phase) = [node], work.phase(work.slot[node])
    while len(users := list(chain[-1].users)) == 1 and chain[-1].target is move and is_collective(users[0], sizes):
        if users[0].target is not move or work.phase(work.slot[users[0]])[1] != phase:
            break
        chain.append(users[0])
    first = _first_use(work, chain[-1])
    go = min(max(_ready(work, node), ahead.earliest(min(first, phase - 1))), work.slot[node])
    seconds = np.array([float(c.meta["seconds"]) for c in chain])
    share = np.cumsum(seconds) / max(float(seconds.sum()), 1e-30)
    out, begun = [], go
    for i, current in enumerate(chain):
        come = first
        if i + 1 < len(chain):
            come = min(begun + int(share[i] * (first - begun)), ahead.next(go), work.slot[chain[i + 1]])
        out.append(Flight(current, go, max(come, go)))
        go = out[-1].come
    return out


def _ready(work: Alive, node: fx.Node) -> int:
    """The first slot of the phase at which all that a collective sends exists."""
    made = [work.slot[arg] + 1 for arg in tensor_args(node) if arg in work.slot]
    return max([work.phase(work.slot[node])[0], *made])


def _takers(node: fx.Node) -> list[fx.Node]:
    """Who takes what a collective gives."""
    return [u for v in (node, *filter(is_getitem, node.users)) for u in v.users if not is_getitem(u)]


def _first_use(work: Alive, node: fx.Node) -> int:
    """The slot of the first op that takes what a collective gives; the end of its phase for what is only handed out or kept."""
    end = work.phase(work.slot[node])[1]
    return min([end, *(work.slot[u] for u in _takers(node) if u in work.slot)])


def _fit(work: Alive, wanted: Flight, limit: int) -> Flight:
    """The flight with its start late enough, and its wait early enough, for the memory; it is counted from now on.

    Its peak is counted where it starts and where it is waited for, with the op before (which is over, and took more); `left` bytes
    are counted already from its own slot on.
    """
    node, at, room = wanted.node, work.slot[wanted.node], work.room[wanted.node]
    latest = max(wanted.come, at + 1) if node.users else at + 1
    work.add(at, at + 1, room.left - room.peak)
    work.add(at, latest, -room.left)
    held = [s for s in (owner_of(work, a) for a in tensor_args(node)) if s is not None] if room.holds else []
    begin = max(wanted.go - (wanted.go < at), work.phase(at)[0])
    over = np.flatnonzero(work.memory[begin:at] + room.peak > limit)
    if len(over):
        begin = begin + int(over[-1]) + 1
    go = max(wanted.go, min(begin + 1, at)) if len(over) else wanted.go
    begin = min(begin, go)
    beside = np.zeros(latest - at - 1, np.int64)
    for storage in held:
        beside[max(work.last[storage] - at, 0) :] += work.size[storage]
    over = np.flatnonzero(work.memory[at + 1 : latest] + beside + room.peak > limit)
    end = at + 1 + int(over[0]) if len(over) else latest
    come = max(go, wanted.come) if wanted.come <= at else end
    flown = max(come, go + 1)
    work.add(begin, flown, room.flying)
    work.add(begin, begin + 1, room.peak - room.flying)
    if flown - 1 > begin:
        work.add(flown - 1, flown, room.peak - room.flying)
    work.add(flown, max(latest, flown), room.left)
    for storage in held:
        work.add(work.last[storage] + 1, max(flown, work.last[storage] + 1), work.size[storage])
        work.last[storage] = max(work.last[storage], flown - 1)
    return Flight(node, go, come)


def _rewrite(new: Draft, work: Alive, flights: Mapping[fx.Node, Flight]) -> None:
    """All ops in emitted order, every collective where it goes and its wait where it comes."""
    busy = np.cumsum([0, *(_is_work(n, flights) for n in work.order)])
    starts: dict[int, list[tuple]] = {}
    ends: dict[int, list[tuple]] = {}
    for node, flight in flights.items():
        ends.setdefault(flight.come, []).append((work.slot[node], node))
        if busy[flight.go] < busy[flight.come]:  # else nothing runs meanwhile
            starts.setdefault(flight.go, []).append((flight.come, work.slot[node], _split(new, node), flight.go == work.slot[node]))
    last = next(n for n in new.graph.nodes if n.op == "output")
    for slot in range(len(work.order) + 1):
        _place(last, starts.get(slot, []), ends.get(slot, []))
        if slot < len(work.order) and work.order[slot] not in flights and not _comes_along(work.order[slot], flights):
            last.prepend(work.order[slot])


def _is_work(node: fx.Node, flights: Mapping[fx.Node, Flight]) -> bool:
    """Whether an op takes time, so that something can travel meanwhile."""
    return node.op == "call_function" and node not in flights and short_name(node) not in FREE


def _comes_along(node: fx.Node, flights: Mapping[fx.Node, Flight]) -> bool:
    return is_getitem(node) and node.args[0] in flights


def _place(last: fx.Node, starts: list[tuple], ends: list[tuple]) -> None:
    """What stands before one op: starts that wait for nothing here, the sooner needed first; then the rest in the program's order."""
    arriving = {node for _, node in ends}
    tied = [(at, 0, n) for _, at, n, own in starts if own or any(_made_by(a) in arriving for a in tensor_args(n))]
    free = sorted((come, at, node.name, node) for come, at, node, _ in starts if not any(node is t for _, _, t in tied))
    for node in [*(f[-1] for f in free), *(t[-1] for t in sorted([*tied, *((at, 1, n) for at, n in ends)], key=lambda t: t[:2]))]:
        last.prepend(node)
        for taker in [u for u in node.users if is_getitem(u)]:
            last.prepend(taker)


def _made_by(node: fx.Node) -> fx.Node:
    return node.args[0] if is_getitem(node) else node  # type: ignore[return-value]


def _split(new: Draft, node: fx.Node) -> fx.Node:
    """Let the node be the wait; returns a new node that starts it."""
    begin = start if node.target is move else start_bucket
    with new.graph.inserting_before(node):
        started = new.graph.create_node("call_function", begin, node.args, name=f"{node.name}_started")
    started.meta = dict(node.meta)
    spec = new.specs[node.name]
    new.specs[started.name], new.expects[started.name] = spec, new.expects[node.name]
    new.expects[node.name] = (spec[0] if isinstance(spec, tuple) else spec,)  # type: ignore[assignment]
    node.target, node.args = wait, (started,)
    node.meta = {k: v for k, v in node.meta.items() if k not in ("seconds", "specs")}
    return started
