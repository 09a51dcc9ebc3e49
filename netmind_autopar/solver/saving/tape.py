"""One choice of strategies, run in thought: every op, conversion and tensor of every layer, in the order in which the step runs.

What is not kept for backward is made again there, as late as possible and once: an op that runs again first has its inputs made
available in the same way. Running the tape counts seconds and bytes out exactly as the rewritten program (solver/replay.py) would.

    recompute[n]      the instances of node n, by position, that run again in backward when something there needs them
    regather[name]    the values of this name, by position, that are converted again in backward
    offload[name]     the values of this name, by position, that wait for backward elsewhere

Optimizer state may wait elsewhere too: what does is given (`placed`), or as little as makes a run fit (`within`). Which of the values
that wait elsewhere do so on disk is given, and which parameters wait there themselves (`stowed`): these are fetched in each phase, views
of them are taken again in backward, and their gradients leave.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from ..problem import Choice, Problem, parking_s, resident_bytes, step_bytes
from .place import Places, places, room_left
from .record import NONE, Counts, Names, Op, Run, Saved
from .runner import Runner

__all__ = ["NONE", "Counts", "Names", "Op", "Run", "Saved", "Tape"]


class Tape:
    """The step under one choice. Tensors are numbered; `source[t]` is the tensor that copy t is converted from, -1 for a value itself."""

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.choice = problem, choice
        self.value: list[int] = []
        self.item: list[int] = []  # which instance of the value it is,
        self.rank: list[int] = []  # and of all values of that name
        self.target: list[int] = []
        self.source: list[int] = []
        self.bytes: list[int] = []
        self.room: list[int] = []
        self.seconds: list[float] = []
        self.maker: list[Op | None] = []
        self.again: list[bool] = []  # a copy that `regather` can give up
        self.holds: dict[int, int] = {}  # tensors that the caller holds until a moment, whatever happens
        self.disk: Names = {}
        self.stowed: Places = {}  # node -> how many of its parameters wait in host memory, the first ones, and how many on disk
        self.limit: int | None = None  # what optimizer state leaves for, and the room of host memory for it
        self.host_room: int | None = None
        self._resident()
        ops: dict[int, Op] = {}
        for n, node in enumerate(problem.nodes):
            each = float(node.seconds[choice[n]]) / max(len(node.moments), 1)
            for rank, m in enumerate(node.moments):
                ops[m] = Op(m, n, rank, each, node.view)
        finals: list[Op] = []
        for v in range(len(problem.values)):
            self._value(v, ops, finals)
        self.ops = sorted([*ops.values(), *finals], key=lambda op: (op.moment, op.final))

    def _resident(self) -> None:
        """What is always there, what the optimizer's moment needs besides, and the seconds that waiting for that takes."""
        self.resident = resident_bytes(self.problem, self.choice)
        self.step, self.parking_s = step_bytes(self.problem, self.choice), parking_s(self.problem, self.choice)

    def placed(self, found: Places, disk: Names | None = None) -> Tape:
        """The tape when this optimizer state waits elsewhere; disk: of the values that wait for backward, those on disk."""
        out = copy.copy(self)
        nodes = tuple(node.park(*found[n]) if n in found else node for n, node in enumerate(self.problem.nodes))
        out.problem, out.disk = replace(self.problem, nodes=nodes), self.disk if disk is None else disk
        out._resident()
        return out

    def stow(self, found: Places) -> Tape:
        """The tape when these parameters wait elsewhere themselves."""
        out = copy.copy(self)
        nodes = tuple(node.stow(*found[n]) if n in found else node for n, node in enumerate(self.problem.nodes))
        out.problem, out.stowed = replace(self.problem, nodes=nodes), {**self.stowed, **found}
        out._resident()
        return out

    def tier(self, node: int, rank: int) -> str:
        """Where a parameter waits; "" when it stays."""
        host, disk = self.stowed.get(node, (0, 0))
        if rank < 0 or rank >= host + disk:
            return ""
        return "host" if rank < host else "disk"

    def within(self, limit: int, disk: Names | None = None, room: int | None = None) -> Tape:
        """The tape whose runs have as little optimizer state elsewhere as makes them fit. room: bytes of host memory for it."""
        out = copy.copy(self)
        out.limit, out.host_room, out.disk = limit, room, disk or {}
        return out

    def _value(self, v: int, ops: dict[int, Op], finals: list[Op]) -> None:
        value, choice = self.problem.values[v], self.choice
        p = int(value.state[choice[value.node]])
        qs = [int(c.state[choice[c.node]]) for c in value.consumers]
        is_op = [bool(self.problem.nodes[c.node].moments) for c in value.consumers]
        made = bool(self.problem.nodes[value.node].moments)
        shared = bool(value.shared[p])
        used, held, produced = value.used.tolist(), value.held.tolist(), value.produced.tolist()
        for i in range(value.count):
            rank = value.rank[i] if value.rank else i
            maker = ops[produced[i]] if made else None
            first = self._tensor(v, i, rank, -1, -1, int(value.bytes[p]), 0, 0.0, maker)
            if maker is not None:
                maker.makes.append(first)
            copies: dict[tuple[int, int], int] = {}
            for t, q in enumerate(qs):
                tensor = first
                if not value.same[p, q]:
                    key = (q, -1 if shared else value.consumers[t].phase)
                    if key not in copies:
                        room = int(value.room[p, q]) if value.room is not None else 0
                        copies[key] = self._tensor(v, i, rank, q, first, int(value.copy_bytes[q]), room, float(value.seconds[p, q]), None)
                        self.again[-1] = shared and not (value.partial is not None and bool(value.partial[p]))
                    tensor = copies[key]
                self._use(tensor, value.consumers[t].node if is_op[t] else -1, used[i][t], held[i][t], ops, finals)
                if value.kind == "gradient" and not is_op[t]:
                    finals[-1].owner = value.consumers[t].node, int(value.owners[i, t]) if value.owners is not None else -1

    def _tensor(
        self, v: int, item: int, rank: int, target: int, source: int, size: int, room: int, seconds: float, maker: Op | None
    ) -> int:
        for column, entry in (
            (self.value, v),
            (self.item, item),
            (self.rank, rank),
            (self.target, target),
            (self.source, source),
            (self.bytes, size),
            (self.room, room),
            (self.seconds, seconds),
            (self.maker, maker),
            (self.again, False),
        ):
            column.append(entry)  # type: ignore[attr-defined,arg-type]
        return len(self.value) - 1

    def _use(self, tensor: int, node: int, used: int, held: int, ops: dict[int, Op], finals: list[Op]) -> None:
        if node < 0:
            finals.append(Op(used, -1, 0, 0.0, False, [tensor], [], held))
            return
        op = ops[used + 1]
        op.takes.append(tensor)
        if held > op.moment and not op.view:
            self.holds[tensor] = max(self.holds.get(tensor, 0), held)

    def run(self, saved: Saved | None = None) -> Run:
        """Seconds and memory of the step when this is done to save memory."""
        run = Runner(self, saved or Saved()).run()
        return run if self.limit is None or run.peak <= self.limit else self._fitted(run, self.limit)

    def _fitted(self, run: Run, limit: int) -> Run:
        """The run with optimizer state elsewhere, all of it when that is not enough."""
        before, last = int(run.memory[:-1].max(initial=0)), int(run.memory[-1])
        for need in (before - limit, max(before, last + self.problem.bucket_bytes) - limit, math.inf):
            room = room_left(self.problem, self.choice) if self.host_room is None else self.host_room
            found = places(self.problem, self.choice, need, room)
            there = self.placed(found)
            memory = run.memory + (there.resident - self.resident)
            memory[-1] += there.step - self.step
            if memory.max() <= limit:
                break
        waits = there.parking_s - self.parking_s
        return replace(run, seconds=run.seconds + waits, waits_s=run.waits_s + waits, memory=memory, places=found)
