"""Where every collective is started and where it is waited for, so that it travels while other ops run.

    started     as soon as what it sends exists, and no earlier than one block ahead of its first use (a parameter always exists)
    waited for  right before its first use; results and gradients at the end of their phase

Views and slices that only a collective takes go with it, so that what is made of a parameter is gathered ahead, too. A collective
that goes on with another one (a chain of moves over several axes) has its share of the time, by price. Nothing is waited for in
another phase than it was started in. All other ops stay in their order.

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
    """A collective starts before the op at slot `go` and is waited for before the op at slot `come`; slots as in `Alive`.

    along: the views and slices before it that go with it, first to last; those that stand before `go` already stay there.
    """

    node: fx.Node
    go: int
    come: int
    along: tuple[fx.Node, ...] = ()


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
    slots = {n: min(f.go, work.slot[n]) for f in flights.values() for n in (*f.along, f.node)}
    for node, flight in flights.items():  # what goes on with it may have to start before its first use
        flights[node] = replace(flight, come=min([flight.come, *(slots[u] for u in _takers(node) if u in slots)]))
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
    while chain[-1].target is move and (following := _goes_on(work, chain[-1], sizes)) is not None:
        chain.append(following)
    first = _first_use(work, chain[-1])
    go = min(max(_ready(work, node), ahead.earliest(min(first, phase - 1))), work.slot[node])
    seconds = np.array([float(c.meta["seconds"]) for c in chain])
    share = np.cumsum(seconds) / max(float(seconds.sum()), 1e-30)
    out, begun = [], go
    for i, current in enumerate(chain):
        come = first
        if i + 1 < len(chain):
            come = min(begun + int(share[i] * (first - begun)), ahead.next(go), work.slot[chain[i + 1]])
        out.append(Flight(current, go, max(come, go), tuple(_along(work, current))))
        go = out[-1].come
    return out


def _goes_on(work: Alive, node: fx.Node, sizes: Sequence[int]) -> fx.Node | None:
    """The collective that alone takes what this one gives, maybe through views and slices."""
    taker = node
    while len(taker.users) == 1:
        taker = next(iter(taker.users))
        if taker.op != "call_function" or work.phase(work.slot[taker]) != work.phase(work.slot[node]):
            return None
        if is_collective(taker, sizes):
            return taker if taker.target is move else None
        if not _is_light(taker):
            return None
    return None


def _is_light(node: fx.Node) -> bool:
    """A view, or a move that sends nothing: of one tensor."""
    local = node.target in MOVES and node.args[1] in LOCAL_KINDS
    return node.op == "call_function" and not is_getitem(node) and (local or short_name(node) in FREE) and len(tensor_args(node)) == 1


def _along(work: Alive, node: fx.Node) -> list[fx.Node]:
    """What can go with a collective: light ops of its phase whose results nothing else takes, in order."""
    found: list[fx.Node] = []
    at = node
    while len(args := tensor_args(at)) == 1 and args[0] in work.slot:
        at = args[0]
        if len(at.users) > 1 or not _is_light(at) or work.phase(work.slot[at]) != work.phase(work.slot[node]):
            break
        found.append(at)
    return found[::-1]


def _ready(work: Alive, node: fx.Node) -> int:
    """The first slot of the phase at which all that a collective sends exists, or could."""
    first = next(iter(_along(work, node)), node)
    made = [work.slot[arg] + 1 for arg in tensor_args(first) if arg in work.slot]
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
    cut = sum(work.room[n].peak for n in wanted.along if n in work.room)  # what slices take
    latest = max(wanted.come, at + 1) if node.users else at + 1
    work.add(at, at + 1, room.left - room.peak)
    work.add(at, latest, -room.left)
    held = [s for s in (owner_of(work, a) for a in tensor_args(node)) if s is not None] if room.holds else []
    begin = max(wanted.go - (wanted.go < at), work.phase(at)[0])
    over = np.flatnonzero(work.memory[begin:at] + room.peak + cut > limit)
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
    work.add(begin, at, cut)  # where they stood they are counted already
    if flown - 1 > begin:
        work.add(flown - 1, flown, room.peak - room.flying)
    work.add(flown, max(latest, flown), room.left)
    for storage in held:
        work.add(work.last[storage] + 1, max(flown, work.last[storage] + 1), work.size[storage])
        work.last[storage] = max(work.last[storage], flown - 1)
    return replace(wanted, go=go, come=come)


def _rewrite(new: Draft, work: Alive, flights: Mapping[fx.Node, Flight]) -> None:
    """All ops in emitted order, every collective where it goes and its wait where it comes."""
    along = {node: [n for n in f.along if work.slot[n] >= f.go] for node, f in flights.items()}
    fixed = [n for n in work.order if n not in flights and not (is_getitem(n) and n.args[0] in flights)]
    gone = {n for nodes in along.values() for n in nodes}
    busy = np.cumsum([0, *(_is_work(n) and n not in flights and n not in gone for n in work.order)])
    starts: dict[int, list[_Begin]] = {}
    ends: dict[int, list[_Begin]] = {}
    for node, flight in flights.items():
        at, head = work.slot[node], along[node]
        if busy[flight.go] == busy[flight.come]:  # nothing runs meanwhile
            ends.setdefault(min(at, flight.come), []).append(_Begin(node, at, head, flight.come, True))
            continue
        starts.setdefault(flight.go, []).append(_Begin(_split(new, node), at, head, flight.come, flight.go == at))
        ends.setdefault(flight.come, []).append(_Begin(node, at, (), flight.come, True))
    last, stays = next(n for n in new.graph.nodes if n.op == "output"), set(fixed) - gone
    for slot in range(len(work.order) + 1):
        for item in _in_order(starts.get(slot, []), ends.get(slot, [])):
            for node in (*item.along, item.node, *filter(is_getitem, item.node.users)):
                last.prepend(node)
        if slot < len(work.order) and work.order[slot] in stays:
            last.prepend(work.order[slot])


@dataclass(frozen=True)
class _Begin:
    """A start, a wait, or a collective that runs at once, with what comes along; `at`: its old slot. own: it starts there."""

    node: fx.Node
    at: int
    along: Sequence[fx.Node]
    come: int
    own: bool

    def takes(self) -> set[fx.Node]:
        """The ops that make what it begins with."""
        return {a.args[0] if is_getitem(a) else a for a in tensor_args((*self.along, self.node)[0])}  # type: ignore[misc]


def _in_order(starts: list[_Begin], ends: list[_Begin]) -> list[_Begin]:
    """What stands before one op: starts that wait for nothing here, the sooner needed first; then the rest in the program's order."""
    arriving = {item.node for item in ends}
    free = [item for item in starts if not item.own and arriving.isdisjoint(item.takes())]
    rest = [item for item in starts if item not in free] + ends
    return sorted(free, key=lambda i: (i.come, i.at)) + sorted(rest, key=lambda i: (i.at, i in ends))


def _is_work(node: fx.Node) -> bool:
    """Whether an op takes time, so that something can travel meanwhile."""
    return node.op == "call_function" and not is_getitem(node) and short_name(node) not in FREE


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
