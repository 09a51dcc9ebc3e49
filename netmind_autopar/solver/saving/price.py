"""The problem of sharding when whatever waits for backward may also be made again: a relaxation whose optimum bounds every plan.

Memory at moment m costs λ_m, so the limit becomes a term -Σ λ_m limit. What only waits for backward at m then pays the cheapest of
its ways. Per op of forward and strategy k, summed over its instances i (Λ_i: the prices of the moments in the gap of instance i):

    φ_n(k) = Σ_i min over r, kept_v, a_v ∈ {0, 1}, kept_v ≥ a_v - r  of  r (seconds_n(k) + Y_n(k)) + Σ_v (kept_v Λ_i bytes_v - z_v a_v)

with a_v = 1 for what an op of backward takes. That an op which runs again needs its inputs is a constraint between ops. It is priced:
the op pays y_t(q) for having its input in layout q, the input earns z_t(p) for being there in layout p, and the edge between both pays

    min(0, min(Λ copy, C(p, q) + z_t(p)) - y_t(q)),   for equal layouts  -max(0, y_t - z_t)

Any y, z ≥ 0, each instance its own, give a bound. Good are costs of availability: α_v(p) = min(Λ bytes_v(p), min over k of seconds(k) +
Y(k)), of which each op that may run again bears its share, z_t = share_t α_v and y_t(q) = min_p (share C(p, q) + z_t(p)). The shares
are taken from the linear program of cut.py at the choice in hand.

Optimizer state S(k) of a parameter may wait elsewhere for c seconds per byte, and is then charged nothing: its node pays
-max(0, Σ λ_m - c) S(k). At the optimizer's moment a bucket B of it is back: x bytes elsewhere free max(0, x - B) there, which is at
most x (1 - B / S) for the largest S that all parameters together can have, so that moment's λ counts with that factor. A parameter that
waits elsewhere itself is charged for neither its bytes nor its state nor, from the moment at which it is made, its gradient, and pays what
travels at the optimizer's moment: per parameter its node pays the less of both. What travels in forward and backward may hide.

Transfers out leave in forward and must be gone at its end, those back come in backward, so a step of F seconds of forward and B of
backward that sends x bytes takes at least (1 - h_o) F + (1 - h_i) B + (h_o + h_i) x / bandwidth, for any h_o, h_i in [0, 1]: seconds of a
phase count for 1 - h, and a byte that waits elsewhere costs (h_o + h_i) / bandwidth in place of Λ.

A view keeps its base while it is wanted itself, so Λ of the base reaches until then; see lent.py for views that are converted.

A conversion that both phases want is made twice or kept: C for one of them, C + e = C + min(C, Λ (copy - least bytes kept)) for
both. Charging forward e, backward e and both together C - e is the same, so two values say it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..problem import BACKWARD, FORWARD, Node, Problem, Value, parked_byte_s, stowed_s
from .cut import Cut
from .lent import Lent
from .parts import early, late, silent, times
from .shares import Shares

Host = tuple[float, float]


def priced(cut: Cut, prices: Mapping[int, float], shares: Shares, limit: int, host: Host = (0.0, 0.0)) -> tuple[Problem, float]:
    """The relaxation and the constant to add to its objective: the sum bounds the seconds of every plan within `limit`.

    host: what a second of transfers out and back costs, at most one each, when things may wait elsewhere.
    """
    problem = cut.problem
    work = _Priced(cut, prices, shares, host)
    values = [new for v in range(len(problem.values)) for new in work.split(v)]
    ordered = tuple(sorted(prices.items()))
    made = replace(problem, nodes=tuple(work.nodes), values=tuple(values), limit_bytes=None, prices=ordered)
    return made, -sum(prices.values()) * limit - work.shift


@dataclass(frozen=True)
class Levels:
    """The instances of a value by what keeping a byte of them costs: those that wait at the same crowded moments."""

    price: np.ndarray  # per level, ascending
    copy: np.ndarray  # and of a copy that an op takes which runs again
    of_instance: np.ndarray  # the level of every instance
    count: np.ndarray  # instances per level

    @classmethod
    def of(cls, gaps: np.ndarray, copies: np.ndarray) -> Levels:
        both, where, count = np.unique(np.stack([gaps, copies], axis=1), axis=0, return_inverse=True, return_counts=True)
        return cls(both[:, 0], both[:, 1], where.reshape(-1), count)


class _Priced:
    def __init__(self, cut: Cut, prices: Mapping[int, float], shares: Shares, host: Host) -> None:
        self.problem, self.choice, self.shares, self.shift = cut.problem, cut.tape.choice, shares, 0.0
        problem = cut.problem
        elsewhere = sum(host) / problem.host_bytes_s if problem.host_bytes_s > 0 else math.inf  # seconds per byte that waits there
        self.first, self.second = [1.0 - min(max(h, 0.0), 1.0) for h in host]  # what a second of forward, and of backward, counts for
        self.total = np.zeros(problem.moments + 1)  # price of the moments before m
        for m, price in prices.items():
            self.total[m + 1 :] += price
        self.made_by: dict[int, list[int]] = {}
        for v, value in enumerate(problem.values):
            self.made_by.setdefault(value.node, []).append(v)
        self.waits = self._waits(cut, cut.until)
        self.alone = [np.minimum(gap, elsewhere) for gap in self.waits]  # what keeping it anywhere costs, if no view is wanted as it is
        self.gaps = [np.minimum(gap, elsewhere) for gap in self._waits(cut, cut.viewed)]  # and if one is
        self.levels = [Levels.of(gap, less) for gap, less in zip(self.gaps, self.alone, strict=True)]
        self.lent = Lent(problem)
        self.takes: dict[int, list[tuple[int, int]]] = {}
        for v, value in enumerate(problem.values):
            for t, consumer in enumerate(value.consumers):
                if consumer.phase == FORWARD and problem.nodes[consumer.node].again:
                    self.takes.setdefault(consumer.node, []).append((v, t))
        self.pays: dict[tuple[int, int], np.ndarray] = {}  # y of one instance, per level and target state
        self.earns: dict[tuple[int, int], np.ndarray] = {}  # z of one instance, per level and source state: for being there,
        self.keeps: dict[tuple[int, int], np.ndarray] = {}  # and for being kept
        self._gain(prices)
        self.nodes = [self._parked(n, replace(node, seconds=self._spent(node))) for n, node in enumerate(problem.nodes)]
        first = sorted((node.moments[0], n) for n, node in enumerate(problem.nodes) if node.again)
        for v, value in enumerate(problem.values):
            if not problem.nodes[value.node].again:
                self._earn(v, np.zeros((len(self.levels[v].price), len(value.bytes))))
                self._pay(v, self.nodes[value.node].seconds + sum(prices.values()) * problem.nodes[value.node].resident, 1)
        for _, n in first:
            self._node(n)

    def _gain(self, prices: Mapping[int, float]) -> None:
        """freed: seconds per byte that is nowhere, at most. gradients: per node the same of every parameter's gradient, once it is made."""
        problem, last = self.problem, self.problem.moments - 1
        most = sum(node.here * float(node.state.max()) for node in problem.nodes if node.state is not None)
        stowed = [node for node in problem.nodes if node.size is not None and problem.host_bytes_s > 0]
        most += sum(2 * node.count * float(node.size.max()) for node in stowed)  # type: ignore[union-attr]
        share = max(0.0, 1.0 - problem.bucket_bytes / most) if most else 0.0
        self.freed = sum(price * (share if m == last else 1.0) for m, price in prices.items())
        self.gradients: dict[int, list[float]] = {}
        for value in problem.values if stowed else ():
            for t, consumer in enumerate(value.consumers if value.owners is not None else ()):
                for made, owner in zip(value.produced.tolist(), value.owners[:, t].tolist(), strict=True):  # type: ignore[index]
                    if owner >= 0:
                        worth = sum(price * (share if m == last else 1.0) for m, price in prices.items() if m >= made)
                        self.gradients.setdefault(consumer.node, []).append(worth)

    def _spent(self, node: Node) -> np.ndarray:
        """What the seconds of a node count for."""
        early = sum(1 for m in node.moments if m <= self.problem.forward_end)
        late = len(node.moments) - early
        return node.seconds * ((self.first * early + self.second * late) / (early + late)) if node.moments else node.seconds

    def _parked(self, n: int, node: Node) -> Node:
        """What bytes that wait elsewhere gain, taken off; the most that it can be is taken off for all alike."""
        problem, nothing = self.problem, np.zeros(len(node.labels))
        state = nothing if node.state is None else node.state.astype(float)
        alone = np.maximum((self.freed - parked_byte_s(problem)) * state, 0.0) if math.isfinite(parked_byte_s(problem)) else nothing
        gain = node.here * alone
        if node.size is not None and node.count and problem.host_bytes_s > 0:
            made = self.gradients.get(n, [])
            cost = np.array([stowed_s(problem, node, k) for k in range(len(node.labels))])
            each = self.freed * (node.size + state) - cost
            gain = sum((np.maximum(each + worth * node.size, alone) for worth in made), nothing)
            gain = gain + max(node.count - len(made), 0) * np.maximum(each + max(made, default=0.0) * node.size, alone)
        if not gain.any():
            return node
        most = float(gain.max())
        self.shift += most
        return replace(node, seconds=node.seconds + most - gain)

    def _waits(self, cut: Cut, until: Sequence[int]) -> list[np.ndarray]:
        """Per value and instance what it pays for waiting, when tensors that are kept are there until these moments."""
        ends = [np.full(value.count, -1) for value in self.problem.values]
        for t, v in enumerate(cut.tape.value):
            if cut.tape.source[t] < 0:
                ends[v][cut.tape.item[t]] = min(until[t], self.problem.moments)
        return [self._gap(value, there) for value, there in zip(self.problem.values, ends, strict=True)]

    def _gap(self, value: Value, until: np.ndarray) -> np.ndarray:
        """Per instance the prices of the moments at which it only waits for backward, whatever is chosen."""
        end = self.problem.forward_end
        start = value.produced.copy()
        for t in self._phases(value)[0]:
            held = value.held[:, t]
            start = np.maximum(start, np.where(held <= end + 1, held, value.used[:, t] + 1))
        until = np.where(until < self.problem.moments, until, 0)
        return np.where(until > start + 1, self.total[until] - self.total[np.minimum(start + 1, len(self.total) - 1)], 0.0)

    def _phases(self, value: Value) -> tuple[list[int], list[int]]:
        takers = range(len(value.consumers))
        return [t for t in takers if value.consumers[t].phase == FORWARD], [t for t in takers if value.consumers[t].phase == BACKWARD]

    def _is_saved(self, value: Value) -> bool:
        """Made in forward, by an op that may run again or given, with something to gain in between."""
        return value.kind != "gradient" and bool(value.produced.max(initial=0) <= self.problem.forward_end)

    def least(self, value: Value) -> np.ndarray:
        """Per source state the bytes that keeping it in any form needs."""
        backward = self._phases(value)[1]
        own = value.bytes.astype(float)
        if not backward:
            return own
        states = np.unique(np.concatenate([value.consumers[t].state for t in backward]))
        copies = np.where(value.same[:, states], value.bytes[:, None], value.copy_bytes[states][None, :])
        return np.minimum(own, copies.min(axis=1))

    def copied(self, value: Value) -> np.ndarray:
        """Per source state the least bytes of a copy that backward takes; inf where it takes the value as it is."""
        backward = self._phases(value)[1]
        states = np.unique(np.concatenate([value.consumers[t].state for t in backward]))
        return np.where(value.same[:, states], np.inf, value.copy_bytes[states][None, :].astype(float)).min(axis=1)

    def _node(self, n: int) -> None:
        """φ of one node, and what having its results costs."""
        node = self.problem.nodes[n]
        again = np.zeros((len(node.moments), len(node.labels))) + self.second * node.seconds[None, :] / len(node.moments)
        for v, t in self.takes.get(n, ()):
            value = self.problem.values[v]
            if (v, t) not in self.pays:  # made by a later class: in another layer, where it must be kept
                self._earn(v, np.zeros((len(self.levels[v].price), len(value.bytes))))
                self._pay(v, self.problem.nodes[value.node].seconds, 1)
            if (rows := self._rows(n, value.used[:, t] + 1)) is not None:
                np.add.at(again, rows, self.pays[v, t][:, value.consumers[t].state][self.levels[v].of_instance])
        saved = [v for v in self.made_by.get(n, ()) if self._is_saved(self.problem.values[v])]
        for v in saved:
            self._earn(v, self._having(n, v, again))
        if saved:
            ways = self._ways(node, saved, again, self.gaps)
            self.nodes[n] = replace(node, seconds=self._spent(node) + ways.sum(axis=0))
            if any((self.gaps[v] > self.alone[v]).any() for v in saved):
                self._lend(node, saved, ways - self._ways(node, saved, again, self.alone))
        for v in saved:
            self._pay(v, self.nodes[n].seconds, len(saved))

    def _rows(self, n: int, moments: np.ndarray) -> np.ndarray | None:
        """The instances of node n that run at these moments; None when one of them is no moment of it. An op takes a value one moment
        before it runs, which is when conversions run."""
        ran = np.asarray(self.problem.nodes[n].moments)
        rows = np.minimum(np.searchsorted(ran, moments), len(ran) - 1)
        return rows if bool((ran[rows] == moments).all()) else None

    def _having(self, n: int, v: int, again: np.ndarray) -> np.ndarray:
        """What having one instance of value v costs at least, per level and source state; zero when backward takes it anyway."""
        value, levels, view = self.problem.values[v], self.levels[v], self.problem.nodes[n].view
        if self._phases(value)[1]:
            return np.zeros((len(levels.price), len(value.bytes)))
        rows = self._rows(n, value.produced)
        assert rows is not None, "a value is made when its node runs"
        cost = np.full((len(levels.price), len(value.bytes)), np.inf)
        for level in range(len(levels.price)):
            mean = again[rows[levels.of_instance == level]].mean(axis=0)
            np.minimum.at(cost[level], value.state, mean)
        if not view:
            cost = np.minimum(cost, levels.price[:, None] * self.least(value)[None, :])
        return np.where(np.isfinite(cost), cost, 0.0)

    def _takers(self, v: int) -> list[int]:
        consumers = enumerate(self.problem.values[v].consumers)
        return [t for t, c in consumers if c.phase == FORWARD and self.problem.nodes[c.node].again]

    def _earn(self, v: int, cost: np.ndarray) -> None:
        """What value v earns by being there when ops run again, if being there costs this per level and source state."""
        value, levels = self.problem.values[v], self.levels[v]
        here = max(float(value.bytes[value.state[self.choice[value.node]]]), 1.0)
        dear = levels.price if levels.price.any() else np.ones(len(levels.price))
        part = (dear / float(levels.count @ dear))[:, None]  # of what all instances pay for being kept, that of one
        for t in self._takers(v):
            if (v, t) not in self.earns:
                self.earns[v, t] = self.shares.value.get((v, t), 0.0) * cost
                self.keeps[v, t] = self.shares.kept.get((v, t), 0.0) * part * np.minimum(value.bytes / here, 1.0)[None, :]

    def _pay(self, v: int, own: np.ndarray, values: int) -> None:
        """What ops that run again pay for value v. `own`: what the strategies of its node cost by themselves; states that make the node
        dearer are worth less, up to the value's part of that."""
        value, levels = self.problem.values[v], self.levels[v]
        dearer = np.full(len(value.bytes), np.inf)
        np.minimum.at(dearer, value.state, np.maximum(own - own[self.choice[value.node]], 0.0) / value.count)
        for t in self._takers(v):
            if (v, t) not in self.pays:
                having = self.earns[v, t] + self.keeps[v, t] + (self.shares.value.get((v, t), 0.0) / values * dearer)[None, :]
                part = self.shares.copy.get((v, t), 0.0)
                tables = [self._needed(value, price, part, h) for price, h in zip(levels.copy, having, strict=True)]
                least = np.stack([table.min(axis=0) for table in tables])
                told_apart = self._rows(value.consumers[t].node, value.used[:, t] + 1) is not None
                self.pays[v, t] = np.where(np.isfinite(least), least, 0.0) * told_apart

    def _needed(self, value: Value, price: float, part: float, having: np.ndarray) -> np.ndarray:
        """What one instance costs, per source and target state, that is there for `having` and whose copy bears `part` of its price."""
        seconds = np.where(np.isfinite(value.seconds), self.second * value.seconds, np.inf)
        copied = np.minimum(price * value.copy_bytes[None, :].astype(float), seconds)
        if part < 1.0:
            copied = np.where(np.isfinite(copied), copied * part, np.inf)
        return having[:, None] + np.where(value.same, 0.0, copied)

    def _lend(self, node: Node, values: list[int], more: np.ndarray) -> None:
        """What the instances pay `more` under each strategy because a view of them is wanted."""
        for v in values:
            value = self.problem.values[v]
            rows = np.searchsorted(node.moments, value.produced)
            size = np.zeros((value.count, len(value.bytes)))
            for i, row in enumerate(rows):
                np.maximum.at(size[i], value.state, more[row])
            if (self.gaps[v] > self.alone[v]).any():
                self.lent.along(v, dict(zip(value.produced.tolist(), size, strict=True)))

    def _ways(self, node: Node, values: list[int], again: np.ndarray, gaps: Sequence[np.ndarray]) -> np.ndarray:
        """φ of one node, per instance and strategy; `again` is what running each instance again costs, `gaps` what keeping its values."""
        at = {m: i for i, m in enumerate(node.moments)}
        kept = np.zeros((len(node.moments), len(node.labels)))  # cost when it does not run again
        made = again.copy()
        for v in values:
            value, level = self.problem.values[v], self.levels[v].of_instance
            rows = np.array([at[int(m)] for m in value.produced])
            price = gaps[v][:, None] * self.least(value)[value.state][None, :]
            takers = [t for u, t in self.earns if u == v]
            earn, keep = (
                np.sum([table[v, t] for t in takers], axis=0)[level][:, value.state] if takers else np.zeros_like(price)
                for table in (self.earns, self.keeps)
            )
            needed = bool(self._phases(value)[1])
            if node.view:  # its memory is its base's; but a copy of it may be kept
                copied = self.copied(value)[value.state][None, :] if needed else 0.0
                kept[rows] += np.where(np.isfinite(copied), gaps[v][:, None] * np.where(np.isfinite(copied), copied, 0.0), np.inf)
                made[rows] -= 0.0 if needed else earn
            elif needed:  # a = 1
                kept[rows] += price - keep
                made[rows] += np.minimum(0.0, price - keep)
            else:
                kept[rows] += np.minimum(0.0, price - earn - keep)
                made[rows] += np.minimum(0.0, price - keep) - earn
        return np.minimum(kept, made)

    def split(self, v: int) -> list[Value]:
        value = self.problem.values[v]
        forward, backward = self._phases(value)
        both = min(self.first if forward else 1.0, self.second if backward else 1.0)
        if not self._is_saved(value) or not self.waits[v].any():
            return [replace(value, seconds=times(value.seconds, both)), *self._edges(v)]
        out: list[Value] = []
        soon, again = times(value.seconds, self.first), times(value.seconds, self.second)
        if forward and backward:
            again = np.minimum(self._extra(v, both), again)
            rest = times(value.seconds, both) - again
            soon = soon - np.where(np.isfinite(rest), rest, 0.0)
            out.append(silent(value, rest))
        out.append(early(value, forward, soon, self.problem.forward_end))
        if backward:
            out.append(late(value, backward, again))
        return out + self._edges(v)

    def _extra(self, v: int, share: float) -> np.ndarray:
        """e of one instance on average: what a second conversion, or keeping the first, costs at least. share: what a second counts for."""
        value, out = self.problem.values[v], np.zeros(self.problem.values[v].seconds.shape)
        given = not self.problem.nodes[value.node].moments
        least = np.zeros(len(value.bytes)) if given else self.least(value)
        more = np.maximum(value.copy_bytes[None, :] - least[:, None], 0.0)
        seconds = np.where(np.isfinite(value.seconds), share * value.seconds, 0.0)
        for gap in self.gaps[v]:
            out += np.minimum(seconds, gap * more)
        return np.where(value.same, 0.0, out / max(value.count, 1))

    def _edges(self, v: int) -> list[Value]:
        """What an op that runs again pays for its input and the input does not earn; and what is lent to a copy of a view."""
        value, out = self.problem.values[v], []
        for t, consumer in enumerate(value.consumers):
            paid, table = (v, t) in self.pays and bool(self.pays[v, t].any()), np.zeros(value.seconds.shape)
            if not paid and (v, t) not in self.lent.out:
                continue
            if (v, t) in self.lent.out:
                table -= np.where(value.same, 0.0, self.lent.out[v, t][:, None])
            levels, part = self.levels[v], self.shares.copy.get((v, t), 0.0)
            having = self.earns[v, t] + self.keeps[v, t] if paid else ()
            for price, count, h, y in zip(levels.copy, levels.count, having, self.pays[v, t], strict=True) if paid else ():
                table += count * np.minimum(0.0, self._needed(value, price, part, h) - y[None, :])
            low = float(table[np.isfinite(value.seconds)].min(initial=0.0))
            if low < -1e-15:
                self.shift -= low
                table = np.where(np.isfinite(value.seconds), np.maximum(table - low, 0.0) / value.count, np.inf)
                edge = silent(replace(value, consumers=(replace(consumer, phase=FORWARD),)), table)
                out.append(replace(edge, used=value.used[:, t : t + 1], held=value.used[:, t : t + 1]))
        return out
