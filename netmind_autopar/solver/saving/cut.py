"""What to keep for backward and what to make again, per class, under one choice: a linear program whose whole solutions are closures.

Per class of ops n that may run again, and per class of tensors T (values and their copies) that forward leaves:

    r[n] ∈ [0, 1]   n runs again        a[T] ∈ [0, 1]   T can be had in backward        k[T] ≥ a[T] - r[maker of T]   T is kept
    a[T] = 1            where an op of backward takes T
    r[n] ≤ a[T]         for T that n takes; r[n] ≤ k[T] when T is of another layer, so that nothing runs again layer after layer
    Σ_T bytes gap_T(m) k[T] ≤ limit - base(m)      at crowded moments m; gap_T(m): instances that at m only wait for backward

minimise Σ seconds_n r[n] + Σ price_T k[T]. Without the memory rows every row compares two variables, so vertices are whole (a
minimum cut; Picard, "Maximal closure of a graph", 1976). With them a vertex mixes as many whole solutions as rows bind, plus one;
fractions then mean shares of the layers. A copy is made again from its source by its conversion, which is a regathered collective.
A view shares its base's memory and runs again for nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import milp
from .tape import NONE, Op, Run, Saved, Tape

FAR = 1 << 60
HIDDEN = 0.9  # of a phase's seconds transfers are planned to hide behind


@dataclass
class Thing:
    """A class of tensors that forward makes: `items` are its tensors.

    maker: the part that makes it, or its source; -1 for what is given, -2 for what cannot run again.
    """

    value: int
    source: int  # the thing that a copy is converted from, -1
    maker: int
    items: list[int]
    bytes: int
    movable: bool  # a copy that `regather` can give up
    seconds: float = 0.0  # of converting all items once more
    needed: bool = False
    away: bool = False  # it waits for backward elsewhere


@dataclass(frozen=True)
class Way:
    """What is done in a layer to save memory: parts that run again, things (copies) that are converted again."""

    parts: frozenset[int]
    copies: frozenset[int]


@dataclass(frozen=True)
class Part:
    """Instances of one node whose results go the same ways, so that they are decided alike."""

    node: int
    ops: list[Op]


@dataclass(frozen=True)
class Answer:
    """A solution: shares per part that runs again and per copy that is converted again, per thing the share that is kept.

    offload: per thing the share that waits elsewhere. host: what a second more of transfers would save, out and back, in seconds.
    prices: of memory at the rows' moments, seconds per byte. links[j, i]: what part j, when it runs again, pays for having thing i,
    and what i's origin earns by being there and by being kept, seconds.
    """

    recompute: Mapping[int, float]
    again: Mapping[int, float]
    kept: np.ndarray
    seconds: float
    prices: Mapping[int, float]
    offload: Mapping[int, float]
    host: tuple[float, float]
    links: Mapping[tuple[int, int], tuple[float, float, float]]


class Cut:
    """The program for one tape. Make it once, solve it for several limits or prices."""

    def __init__(self, tape: Tape, offload: Mapping[str, frozenset[int]] | None = None) -> None:
        self.tape, self.problem, self.offload = tape, tape.problem, offload or {}
        self.least: tuple[Saved, Run] | None = None  # kept by mix.least
        self.end = tape.problem.forward_end
        self.forward = [op for op in tape.ops if op.final < 0 and op.moment <= self.end]
        self._layers()
        self._parts()
        self._reads()
        self._things()
        self._gaps()

    def _layers(self) -> None:
        """Which layer every op of forward is in: -1 for what is not repeated."""
        counts = Counter(len(node.moments) for node in self.problem.nodes if node.again and len(node.moments) > 1)
        self.layers = max(counts, key=lambda n: (counts[n], n)) if counts else 1

        self.members = [sum(1 for m in node.moments if m <= self.end) for node in self.problem.nodes]

    def layer(self, op: Op) -> int:
        count = self.members[op.node]
        return op.rank * self.layers // count if count > 1 and count % self.layers == 0 else -1

    def _parts(self) -> None:
        self.parts: list[Part] = []
        self.part: dict[int, int] = {}  # op of forward, by its moment -> part
        keys: dict[tuple[int, ...], int] = {}
        for op in self.forward:
            if not self.problem.nodes[op.node].again:
                continue
            key = (op.node, *(self.tape.value[t] for t in op.makes), *(self.is_away(t) for t in op.makes))
            if key not in keys:
                keys[key] = len(self.parts)
                self.parts.append(Part(op.node, []))
            self.part[op.moment] = keys[key]
            self.parts[keys[key]].ops.append(op)

    def is_away(self, t: int) -> bool:
        """Whether tensor t waits for backward elsewhere."""
        name = self.problem.values[self.tape.value[t]].name
        return self.tape.source[t] < 0 and self.tape.bytes[t] > 0 and self.tape.rank[t] in self.offload.get(name, NONE)

    def _reads(self) -> None:
        """Per tensor: its root (the tensor whose memory it is), last read in forward, first and last direct read in backward."""
        tape, n = self.tape, len(self.tape.value)
        self.root = list(range(n))
        self.last = [-1] * n
        self.direct = [FAR] * n  # first op of backward that takes the tensor itself
        self.first = [FAR] * n  # … or something that shares its memory, or a copy made of it
        made: set[int] = set()
        for op in tape.ops:
            for t in op.takes:
                chain = [t]
                if tape.source[t] >= 0 and t not in made:
                    made.add(t)
                    chain.append(tape.source[t])
                for u in chain:
                    at = max(op.moment, op.final if op.final <= self.end + 1 else op.moment)
                    if op.moment <= self.end:
                        self.last[self.root[u]] = max(self.last[self.root[u]], at)
                        self.last[u] = max(self.last[u], at)
                    else:
                        self.direct[u] = min(self.direct[u], op.moment)
                        self.first[self.root[u]] = min(self.first[self.root[u]], op.moment)
            for t in op.makes:
                self.last[t] = max(self.last[t], op.moment)
                if op.view and op.takes:
                    self.root[t] = self.root[op.takes[0]]

    def _things(self) -> None:
        tape = self.tape
        self.things: list[Thing] = []
        self.of: dict[int, int] = {}  # tensor -> thing
        self.copies: dict[int, list[int]] = {}  # tensor -> copies of it that forward makes
        keys: dict[tuple[int, int, int], int] = {}
        for t, v in enumerate(tape.value):
            maker, source = tape.maker[t], tape.source[t]
            if maker is not None and maker.moment > self.end:
                continue
            if source >= 0 and (source not in self.of or self.last[t] < 0):
                continue  # a copy that only backward makes, or of something made there
            made_by = tape.maker[t] if source < 0 else tape.maker[source]
            part = self.part.get(made_by.moment, -2) if made_by else -1
            key = (v, tape.target[t], part)
            if key not in keys:
                keys[key] = len(self.things)
                self.things.append(Thing(v, self.of.get(source, -1), part, [], tape.bytes[t], tape.again[t], away=self.is_away(t)))
            thing = self.things[keys[key]]
            thing.items.append(t)
            thing.seconds += tape.seconds[t]
            thing.needed |= self.direct[t] < FAR
            self.of[t] = keys[key]
            if source >= 0:
                self.copies.setdefault(source, []).append(t)

    def _gaps(self) -> None:
        """Per thing and moment how many items only wait for backward: after the last read of forward, before the first of backward."""
        tape, moments = self.tape, self.problem.moments
        need = self._needs()
        self.base = tape.run().profile(moments)
        self.gap = np.zeros((len(self.things), moments), np.int32)
        for i, thing in enumerate(self.things):
            steps, within = np.zeros(moments + 1, np.int32), np.zeros(moments + 1, np.int32)
            for t in thing.items:
                start, end = self.last[t] + 1, need[t] - 1  # the op's conversions run at the moment before it
                if self.root[t] == t and start < need[t] < FAR and end > start and thing.bytes:
                    steps[start] += 1
                    steps[end] -= 1
                    if self.first[t] < FAR:
                        within[start] += 1
                        within[end] -= 1
            self.gap[i] = 0 if thing.away else np.cumsum(steps[:-1])
            self.base -= np.cumsum(within[:-1]).astype(np.int64) * thing.bytes

    def _needs(self) -> list[int]:
        """Per tensor the first moment of backward that may want it: directly, or for an op that may run again.

        `until[t]` is the same for whatever choice, of tensors that are no copies: moments at which a kept tensor is surely there.
        """
        tape = self.tape
        origin = [t if source < 0 else source for t, source in enumerate(tape.source)]
        takers: dict[int, list[Op]] = {}
        wanted = [FAR] * len(origin)
        for op in tape.ops:
            for t in op.takes:
                if op.final < 0 and op.moment <= self.end:
                    takers.setdefault(origin[t], []).append(op)
                elif op.moment > self.end:
                    wanted[origin[t]] = min(wanted[origin[t]], op.moment - 1 if op.final < 0 else op.moment)
        soonest: dict[int, int] = {}  # per op of forward, by moment: when it may have to run again
        for op in reversed(self.forward):
            at = FAR
            for t in op.makes:
                inside = (soonest[taker.moment] for taker in takers.get(t, ()) if not self.across(op, taker))
                at = min(at, wanted[t], *inside, FAR)
            soonest[op.moment] = at
        need, self.until = list(self.first), list(wanted)
        for t, first in enumerate(self.first):
            asked = [soonest[op.moment] for op in takers.get(origin[t], ())]
            if first == FAR and self.root[t] == t:
                need[t] = min(asked, default=FAR)
            if wanted[t] == FAR and origin[t] == t:
                self.until[t] = min(asked, default=FAR)
        return need

    def across(self, maker: Op | None, taker: Op) -> bool:
        """Both are in layers, and not in the same one."""
        return maker is not None and min(self.layer(maker), self.layer(taker)) >= 0 and self.layer(maker) != self.layer(taker)

    def solve(
        self, prices: Mapping[int, float] | None = None, limit: int | None = None, rows: Sequence[int] = (), *, host: bool = False
    ) -> Answer | None:
        """The cheapest shares when a byte that waits at moment m costs `prices[m]` seconds, or when `rows` stay within `limit` bytes.

        host: things may wait elsewhere. None when no shares fit."""
        work = _Program(self, prices or {}, host and self.problem.host_bytes_s > 0)
        numbers = {m: work.memory(m, limit or 0) for m in rows}
        return work.answer(numbers, limit or 0)

    def way(self, answer: Answer) -> Way:
        """The parts that run again and the copies that are converted again: what most of the layers do."""
        parts: set[int] = set()
        for op in self.forward:
            j = self.part.get(op.moment, -1)
            if j in parts or answer.recompute.get(j, 0.0) < 0.5:
                continue
            if not op.view or any(self._gone(self.of.get(t, -1), parts, answer) for t in op.takes):
                parts.add(j)
        copies = {i for i, share in answer.again.items() if share >= 0.5 and self.things[i].maker not in parts}
        return Way(frozenset(parts), frozenset(copies))

    def _gone(self, i: int, parts: set[int], answer: Answer) -> bool:
        return i >= 0 and (self.things[i].away or self.things[i].maker in parts or answer.again.get(i, 0.0) >= 0.5)

    def layer_of(self, thing: Thing, t: int) -> int:
        """The layer of one of a thing's tensors: its maker's, or for what is given its position's."""
        source = self.tape.source[t]
        maker = self.tape.maker[t if source < 0 else source]
        if maker is not None:
            return self.layer(maker)
        count = self.tape.problem.values[thing.value].count
        return self.tape.item[t] * self.layers // count if count > 1 and count % self.layers == 0 else -1


class _Program:
    """The linear program. Seconds and bytes are scaled to about one."""

    def __init__(self, cut: Cut, prices: Mapping[int, float], host: bool) -> None:
        self.cut, self.model, self.host = cut, milp.Model(), host
        self.o: dict[int, int] = {}
        self.waits: list[int] = []
        self.scale = sum(op.seconds for op in cut.forward) or 1.0
        self.r = {j: self.model.var(sum(op.seconds for op in p.ops) / self.scale + 1e-7, True) for j, p in enumerate(cut.parts)}
        charge = np.zeros(len(cut.things))
        for m, price in prices.items():
            charge += price * cut.gap[:, m]
        self.a: list[int | None] = []  # None: always there
        self.k: list[int | None] = []
        self.c: dict[int, int] = {}
        self.links: dict[tuple[int, int], list[int]] = {}  # rows: there, kept
        self.feeds: dict[int, int] = {}  # row by which a copy that is made again needs its source
        for i, thing in enumerate(cut.things):
            self._thing(i, thing, float(charge[i]) * thing.bytes / self.scale)
        self._takes()
        self.link = self._link() if host else ()

    def _link(self) -> tuple[int, ...]:
        """Transfers out hide behind forward, those back behind backward; what does not hide is waited for. The numbers of both rows."""
        cut, rows = self.cut, []
        speed = cut.problem.host_bytes_s * self.scale
        spent = sum(op.seconds for op in cut.tape.ops if op.final < 0) - self.scale
        for hidden in (self.scale, spent):
            wait = self.model.var(1.0)
            self.waits.append(wait)
            terms = {o: len(cut.things[i].items) * cut.things[i].bytes / speed for i, o in self.o.items()}
            self.model.row({**terms, wait: -1.0}, -math.inf, HIDDEN * hidden / self.scale)
            rows.append(len(self.model.rows) - 1)
        return tuple(rows)

    def _thing(self, i: int, thing: Thing, price: float) -> None:
        if thing.away or (thing.source < 0 and thing.maker == -1):
            self.a.append(None)
            self.k.append(None)
            return
        a = self.model.var(0.0, True)
        self.a.append(a)
        if thing.needed:
            self.model.row({a: 1.0}, 1.0, 1.0)
        if thing.source < 0:
            r = self.r.get(thing.maker)
            if r is not None and self.cut.problem.nodes[self.cut.parts[thing.maker].node].view:
                self.k.append(None)
                self._at_most(a, r)
                return
            if self.host and thing.bytes and self.cut.gap[i].any():
                self.o[i] = self.model.var(1e-7, True)
            self.k.append(self._kept(a, r, price, self.o.get(i)))
            return
        again = self.c[i] = self.model.var(thing.seconds / self.scale + 1e-7, True)
        source, r = self.a[thing.source], self.r.get(thing.maker)
        if source is not None:
            self.feeds[i] = self._at_most(again, source)
        if r is not None:  # what its source is made of goes, and so the copy goes
            self.model.row({again: 1.0, a: -1.0, r: -1.0}, -1.0, math.inf)
        if not thing.movable:
            self.model.row({again: 1.0, **({r: -1.0} if r is not None else {})}, -math.inf, 0.0)
        self.k.append(self._kept(a, again, price))

    def _kept(self, a: int, made: int | None, price: float, away: int | None = None) -> int:
        k = self.model.var(price + 1e-9, True)
        self.model.row({k: 1.0, a: -1.0, **{v: 1.0 for v in (made, away) if v is not None}}, 0.0, math.inf)
        return k

    def _at_most(self, low: int, high: int) -> int:
        self.model.row({high: 1.0, low: -1.0}, 0.0, math.inf)
        return len(self.model.rows) - 1

    def _takes(self) -> None:
        cut, seen = self.cut, set()
        for op in cut.forward:
            for t in op.takes:
                i = cut.of.get(t)
                j = cut.part.get(op.moment)
                if i is None or j is None:
                    continue
                across = cut.across(cut.tape.maker[t if cut.tape.source[t] < 0 else cut.tape.source[t]], op)
                if (j, i, across) in seen:
                    continue
                seen.add((j, i, across))
                self._take(j, i, across)

    def _take(self, j: int, i: int, across: bool) -> None:
        a, k, source = self.a[i], self.k[i], self.cut.things[i].source
        rows = self.links.setdefault((j, i), [-1, -1])
        if a is not None and rows[0] < 0:
            rows[0] = self._at_most(self.r[j], a)
        if not across:
            return
        if self.cut.things[i].away or (source >= 0 and self.cut.things[source].away):
            return  # it comes back from elsewhere
        ways = (k, self.o.get(i), *((self.k[source], self.o.get(source)) if source >= 0 else ()))
        terms = {v: 1.0 for v in ways if v is not None}
        if terms:
            self.model.row({**terms, self.r[j]: -1.0}, 0.0, math.inf)
            rows[1] = len(self.model.rows) - 1

    def memory(self, moment: int, limit: int) -> int:
        """The row of one moment. Returns its number."""
        cut, unit = self.cut, 1.0 / max(limit, 1)
        terms: dict[int, float] = {}
        for i, thing in enumerate(cut.things):
            k = self.k[i]
            if k is not None and cut.gap[i, moment]:
                terms[k] = terms.get(k, 0.0) + float(cut.gap[i, moment]) * thing.bytes * unit
        self.model.row(terms or {self.model.var(): 0.0}, -math.inf, (limit - float(cut.base[moment])) * unit)
        return len(self.model.rows) - 1

    def answer(self, rows: Mapping[int, int], limit: int) -> Answer | None:
        found = milp.solve(self.model, time_limit=60.0, gap=0.0, relax=True)
        if found.values is None:
            return None
        x = found.values
        duals = found.duals if found.duals is not None else np.zeros(len(self.model.rows))
        prices = {m: float(duals[row]) * self.scale / max(limit, 1) for m, row in rows.items() if duals[row] > 1e-12}
        kept = np.array([0.0 if k is None else x[k] for k in self.k])
        recompute = {j: float(x[v]) for j, v in self.r.items() if x[v] > 1e-6}
        again = {i: float(x[v]) for i, v in self.c.items() if x[v] > 1e-6}
        seconds = sum(self.model.cost[v] * x[v] for v in (*self.r.values(), *self.c.values())) * self.scale
        offload = {i: float(x[v]) for i, v in self.o.items() if x[v] > 1e-6}
        seconds += sum(float(x[v]) for v in self.waits) * self.scale
        host = tuple(float(duals[row]) for row in self.link) or (0.0, 0.0)
        return Answer(recompute, again, kept, float(seconds), prices, offload, host, self._links(duals * self.scale))  # type: ignore[arg-type]

    def _links(self, duals: np.ndarray) -> dict[tuple[int, int], tuple[float, float, float]]:
        out = {}
        fed: dict[int, float] = {}  # what ops pay for a copy in all
        for (_, i), (there, _) in self.links.items():
            fed[i] = fed.get(i, 0.0) + (float(duals[there]) if there >= 0 else 0.0)
        for (j, i), (there, kept) in self.links.items():
            thing = self.cut.things[i]
            pays = float(duals[there]) if there >= 0 and not thing.needed else 0.0
            if thing.source < 0:
                more = float(duals[kept]) if kept >= 0 else 0.0
                out[j, i] = pays + more, pays, more
            elif pays:
                fixed = self.cut.things[thing.source].needed or i not in self.feeds
                out[j, i] = pays, 0.0 if fixed else float(duals[self.feeds[i]]) * pays / max(fed[i], 1e-30), 0.0
        return {key: found for key, found in out.items() if found[0] > 0.0}
