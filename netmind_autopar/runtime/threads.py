"""All ranks of an emitted file in one process, a thread for each: the code that processes run, without processes.

`simulate` runs the graph that the file was written from; this runs the file itself, with everything around it that real ranks have:
what is bound per rank, what is started and waited for, micro-batches and the adding up of their gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import GraphError
from ..ir.local import ONE
from ..ir.mesh import coordinates
from ..ir.program import Program
from .collectives import Stage, exchanged, groups_along
from .compiled import Regions
from .place import Place, load
from .turns import Turns

PATIENCE_S = 120.0  # for a rank that does not come to a collective


class Meeting:
    """Where the ranks of a mesh leave what they send, and find what the others of their group sent."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self._changed = threading.Condition()
        self._left: dict[tuple, dict[int, tuple[Stage, Tensor]]] = {}
        self._given: dict[tuple, dict[int, Tensor]] = {}
        self._failed = False

    def leave(self, key: tuple, rank: int, step: Stage, packed: Tensor) -> None:
        """A rank sends; it does not wait."""
        with self._changed:
            self._left.setdefault(key, {})[rank] = (step, packed)
            self._changed.notify_all()

    def find(self, key: tuple, members: Sequence[int], rank: int) -> Tensor:
        """What a rank receives, once all of its group have sent. Raises GraphError when one of them failed or does not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._failed or key in self._given or len(self._left[key]) == len(members), PATIENCE_S):
                missing = sorted(set(members) - set(self._left[key]))
                raise GraphError(f"rank {rank} waits for ranks {missing}", why="they do not come to the collective that it is in")
            if key not in self._given and len(self._left[key]) < len(members):
                raise _Elsewhere
            if key not in self._given:
                left = self._left.pop(key)
                given = exchanged([left[m][0] for m in members], [left[m][1] for m in members])
                self._given[key] = dict(zip(members, given, strict=True))
            found = self._given[key].pop(rank)
            if not self._given[key]:
                del self._given[key]
                self._left.pop(key, None)
            return found

    def fail(self) -> None:
        """A rank will not come any more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class _Elsewhere(Exception):
    """Another rank failed; what it raised says why."""


class ThreadWire:
    """A `ProcessWire` between threads."""

    def __init__(self, meeting: Meeting, coord: tuple[int, ...], rank: int) -> None:
        self.meeting, self.sizes, self.coord, self.rank = meeting, meeting.sizes, coord, rank
        self._count = [0] * len(self.sizes)

    def send(self, step: Stage, packed: Tensor) -> tuple[tuple, Tensor]:
        """Leave one stage's packed tensor for the others of the group. Returns what `arrive` takes."""
        group = next(k for k, members in enumerate(groups_along(step.axis, self.sizes)) if self.rank in members)
        key = (step.axis, group, self._count[step.axis])
        self._count[step.axis] += 1
        self.meeting.leave(key, self.rank, step, packed)
        return key, packed

    def arrive(self, sent: tuple[tuple, Tensor]) -> Tensor:
        """Wait for the others of the group."""
        axis, group, _ = sent[0]
        return self.meeting.find(sent[0], groups_along(axis, self.sizes)[group], self.rank)


def run(
    source: str,
    program: Program,
    axes: Sequence[str],
    sizes: tuple[int, ...],
    inputs: Mapping[str, Sequence[Tensor]],
    regions: Regions | None = None,
) -> list[list[Tensor]]:
    """Run the emitted file of a lowered program on every rank; as `simulate.run`, which runs the program.

    Returns one list of local tensors per program output. Raises what the first rank raised.
    """
    meeting, results, errors = Meeting(sizes), {}, {}  # type: ignore[var-annotated]

    def work(rank: int, coord: tuple[int, ...]) -> None:
        try:
            wire = ThreadWire(meeting, coord, rank)
            place = Place(axes, sizes, coord, torch.device("cpu"), wire, program.constants, ONE, regions)
            with torch.no_grad():
                results[rank] = _step(source, program, place, {name: tensors[rank] for name, tensors in inputs.items()})
        except _Elsewhere:
            pass
        except BaseException as error:
            errors[rank] = error
            meeting.fail()

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(coordinates(sizes))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[min(errors)]
    return [[results[rank][k] for rank in range(len(threads))] for k in range(len(program.outputs))]


def _step(source: str, program: Program, place: Place, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Results and gradients of one rank, in the order of the program's outputs."""
    given = [inputs[i.node] for i in program.inputs if i.role != "tangent"]
    tangents = [inputs[i.node] for i in program.inputs if i.role == "tangent"]
    gradients: Sequence[Tensor]
    if program.mode == "inference":
        forward: Callable[..., Any] = load(source, place)
        results, gradients = forward(*given)[0], ()
    elif program.micro:
        joins = [join for join, out in zip(program.micro.joins, program.outputs, strict=True) if out.role != "grad"]
        results, gradients = Turns(source, place, program.turns, joins).step(given, tangents)
    else:
        forward, backward = load(source, place)
        results, saved = forward(*given)
        gradients = backward(saved, *tangents)
    made, found = iter(results), iter(gradients)
    return [next(found) if out.role == "grad" else next(made) for out in program.outputs]
