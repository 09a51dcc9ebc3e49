"""The linear program of cut.py: shares of layers that run again, are converted again, wait elsewhere, or are kept.

With `park` there is one more column, s ∈ [0, 1], the share of all optimizer state S that waits elsewhere between steps: it costs
2 S / bandwidth, and every moment's row gets -S s, the optimizer's -(S - a bucket) s.

With `stow` there is a column for each class of parameters, the share of it that waits elsewhere itself, with gradient and state: the
rows get what that frees (`Cut.freed`), links what travels in both phases, and it costs what travels at the optimizer's moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .. import milp
from ..problem import parked_byte_s, stowed_s
from .place import parkable_bytes, stowable

if TYPE_CHECKING:
    from .cut import Cut, Thing

HIDDEN = 0.9  # of a phase's seconds transfers are planned to hide behind


@dataclass(frozen=True)
class Answer:
    """A solution: shares per part that runs again and per copy that is converted again, per thing the share that is kept.

    offload: per thing the share that waits elsewhere. host: what a second more of transfers would save, out and back, in seconds.
    prices: of memory at the rows' moments, seconds per byte. links[j, i]: what part j, when it runs again, pays for having thing i,
    and what i's origin earns by being there and by being kept, seconds. parked: bytes of optimizer state that wait elsewhere.
    """

    recompute: Mapping[int, float]
    again: Mapping[int, float]
    kept: np.ndarray
    seconds: float
    prices: Mapping[int, float]
    offload: Mapping[int, float]
    host: tuple[float, float]
    links: Mapping[tuple[int, int], tuple[float, float, float]]
    parked: float = 0.0
    stowed: Mapping[int, float] = field(default_factory=dict)  # per node the share of its parameters that wait elsewhere themselves


class Program:
    """The linear program. Seconds and bytes are scaled to about one."""

    def __init__(
        self, cut: Cut, prices: Mapping[int, float], host: bool, park: bool = False, room: int | None = None, stow: bool = False
    ) -> None:
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
        self.freed, self.may = (cut.freed(), stowable(cut.problem, cut.tape.choice)) if stow else ({}, {})
        self.x = {n: self.model.var(self._stowing_s(n) / self.scale + 1e-7, True) for n in self.freed}
        self.link = self._link() if host or self.x else ()
        self.state = parkable_bytes(cut.problem, cut.tape.choice) if park else 0
        self.s = self.model.var(self.state * parked_byte_s(cut.problem) / self.scale + 1e-7, True) if self.state else None
        if self.s is not None and self.x:  # of one parameter it waits elsewhere once
            self.model.row({self.s: 1.0, **{x: self._state(n) / self.state for n, x in self.x.items()}}, -math.inf, 1.0)
        if room is not None:
            terms = {o: len(cut.things[i].items) * cut.things[i].bytes / max(room, 1) for i, o in self.o.items()}
            terms |= {self.s: self.state / max(room, 1)} if self.s is not None else {}
            terms |= {x: math.prod(self.may[n]) / max(room, 1) for n, x in self.x.items()}
            self.model.row(terms or {self.model.var(): 0.0}, -math.inf, 1.0)

    def _stowing_s(self, n: int) -> float:
        """Seconds at the optimizer's moment when all of a class waits elsewhere."""
        problem = self.cut.problem
        return self.may[n][0] * stowed_s(problem, problem.nodes[n], self.cut.tape.choice[n])

    def _state(self, n: int) -> float:
        """Optimizer state of all of a class that is on the device."""
        node = self.cut.problem.nodes[n]
        return node.here * float(node.state[self.cut.tape.choice[n]]) if node.state is not None else 0.0

    def _parameters(self, trained: bool = False) -> dict[int, float]:
        """Terms of the bytes that travel once, of all classes of parameters or those that are trained."""
        nodes, choice, out = self.cut.problem.nodes, self.cut.tape.choice, {}
        for n, x in self.x.items():
            if nodes[n].trained or not trained:
                out[x] = self.may[n][0] * float(nodes[n].size[choice[n]])  # type: ignore[index]
        return out

    def _link(self) -> tuple[int, ...]:
        """Transfers out hide behind forward, those back behind backward; what does not hide is waited for. The numbers of both rows.

        Parameters come in both phases and their gradients leave in backward: of these links there are two more rows.
        """
        cut, rows = self.cut, []
        speed = cut.problem.host_bytes_s * self.scale
        first, spent = cut.forward_s, cut.seconds - cut.forward_s
        values = {o: float(len(cut.things[i].items) * cut.things[i].bytes) for i, o in self.o.items()}
        links = [(first, values), (spent, values | self._parameters())]
        links += [(first, self._parameters()), (spent, self._parameters(trained=True))] if self.x else []
        for hidden, sizes in links:
            wait = self.model.var(1.0)
            self.waits.append(wait)
            terms = {v: size / speed for v, size in sizes.items()}
            self.model.row({**terms, wait: -1.0}, -math.inf, HIDDEN * hidden / self.scale)
            rows.append(len(self.model.rows) - 1)
        return tuple(rows[:2])

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
        if self.s is not None:
            bucket = min(self.state, cut.problem.bucket_bytes) if moment == cut.problem.moments - 1 else 0
            terms[self.s] = -float(self.state - bucket) * unit
        terms |= {x: -float(self.freed[n][moment]) * unit for n, x in self.x.items()}
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
        share = 0.0 if self.s is None else float(x[self.s])
        seconds += share * self.state * parked_byte_s(self.cut.problem) if share else 0.0
        links = self._links(duals * self.scale)
        stowed = {n: float(x[v]) for n, v in self.x.items() if x[v] > 1e-6}
        seconds += sum(part * self._stowing_s(n) for n, part in stowed.items())
        return Answer(recompute, again, kept, float(seconds), prices, offload, host, links, share * self.state, stowed)  # type: ignore[arg-type]

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
            else:
                fixed = self.cut.things[thing.source].needed or i not in self.feeds
                out[j, i] = pays, 0.0 if fixed else float(duals[self.feeds[i]]) * pays / max(fed[i], 1e-30), 0.0
        return out
