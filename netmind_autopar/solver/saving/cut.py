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

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .linear import Answer, Program
from .place import Places, stowable
from .tape import NONE, Names, Op, Run, Saved, Tape

FAR = 1 << 60
SMALL = 2e-3  # of all that may wait elsewhere, what a class of parameters must have to be worth a thought


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


class Cut:
    """The program for one tape. Make it once, solve it for several limits or prices."""

    def __init__(self, tape: Tape, offload: Mapping[str, frozenset[int]] | None = None) -> None:
        self.tape, self.problem, self.offload = tape, tape.problem, offload or {}
        self.least: tuple[Saved, Run] | None = None  # kept by mix.least
        self.gains: dict[int, np.ndarray] | None = None  # see freed
        self.end = tape.problem.forward_end
        self.forward = [op for op in tape.ops if op.final < 0 and op.moment <= self.end]
        self._layers()
        self._parts()
        self._reads()
        self._things()
        self._gaps()
        copies = {t for op in self.forward for t in op.takes if tape.source[t] >= 0}
        self.forward_s = sum(op.seconds for op in self.forward) + sum(tape.seconds[t] for t in copies)

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
        run = tape.run()
        self.seconds, self.base = run.seconds, run.profile(moments)
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

        `until[t]` is the same for whatever choice, of tensors that are no copies: moments at which a kept tensor is surely there. With
        views of it that are wanted themselves, and not as copies in another layout, it is there until `viewed[t]`.
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
        self._views(wanted)
        return need

    def _views(self, wanted: Sequence[int]) -> None:
        """See `until`: what a view of a tensor is wanted for keeps that tensor."""
        sure, self.viewed = list(wanted), list(self.until)
        for op in reversed(self.forward):
            if op.view and op.takes:
                t = op.takes[0]
                sure[t] = min(sure[t], *(sure[u] for u in op.makes))
                if self.tape.source[t] < 0 and wanted[t] == FAR > sure[t]:
                    self.viewed[t] = max(self.until[t] if self.until[t] < FAR else -1, sure[t])

    def across(self, maker: Op | None, taker: Op) -> bool:
        """Both are in layers, and not in the same one."""
        return maker is not None and min(self.layer(maker), self.layer(taker)) >= 0 and self.layer(maker) != self.layer(taker)

    def placed(self, places: Places, disk: Names | None = None) -> Cut:
        """The program for the tape when this optimizer state waits elsewhere."""
        out = copy.copy(self)
        out.tape, out.least, out.gains = self.tape.placed(places, disk), None, None
        out.problem = out.tape.problem
        out.base = self.base + (out.tape.resident - self.tape.resident)
        out.base[-1] += out.tape.step - self.tape.step
        return out

    def freed(self) -> dict[int, np.ndarray]:
        """Per node whose parameters may wait elsewhere themselves the bytes that this frees at every moment, of all of them.

        At the optimizer's moment a bucket comes back, which is counted as shared among all.
        """
        if self.gains is None:
            tape, self.gains = self.tape, {}
            may = stowable(tape.problem, tape.choice)
            total = sum(count * size for count, size in may.values())
            before = tape.run().profile(self.problem.moments)
            for n, (count, size) in may.items():
                if count * size < SMALL * total:
                    continue
                gain = before - tape.stow({n: (count, 0)}).run().profile(self.problem.moments)
                gain[-1] = (
                    int(count * size * max(0.0, 1.0 - self.problem.bucket_bytes / total)) if self.problem.nodes[n].trained else gain[-1]
                )
                self.gains[n] = gain
        return self.gains

    def solve(
        self,
        prices: Mapping[int, float] | None = None,
        limit: int | None = None,
        rows: Sequence[int] = (),
        *,
        host: bool = False,
        park: bool = False,
        room: int | None = None,
        stow: bool = False,
    ) -> Answer | None:
        """The cheapest shares when a byte that waits at moment m costs `prices[m]` seconds, or when `rows` stay within `limit` bytes.

        host: things may wait elsewhere. park: optimizer state may. stow: parameters may. room: bytes that all may take there, None for no
        limit.
        None when no shares fit."""
        work = Program(self, prices or {}, host and self.problem.host_bytes_s > 0, park, room, stow)
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
