"""One device's place in the mesh: binds what an emitted file leaves open (collectives, local sizes, device, constants)."""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.local import ONE, Local
from ..ir.spec import local_shape, parse_spec
from .collectives import LOCAL_KINDS, Collective, Wire, bucket_stage, stage
from .compiled import Regions


class Place:
    """What `build(place)` of an emitted file gets."""

    def __init__(
        self,
        axes: Sequence[str],
        sizes: tuple[int, ...],
        coord: tuple[int, ...],
        device: torch.device,
        wire: Wire,
        constants: Mapping[str, Tensor],
        turn: tuple[int, int] = ONE,
        regions: Regions | None = None,
    ) -> None:
        self.axes, self.sizes, self.coord, self.device, self.wire = tuple(axes), sizes, coord, device, wire
        self.turn, self.regions = turn, regions
        self._constants = {name: t.to(device) for name, t in constants.items()}

    def move(self, kind: str, axis: str, before: str, after: str, own: bool = False) -> Callable[[Tensor], Tensor]:
        """One move, bound to this device. own: an all-reduce may reduce in the memory of what it is given."""
        step = stage(kind, self.axes.index(axis), before, after, self.sizes, self.coord)
        if kind in LOCAL_KINDS:
            return step.pack
        name = f"{kind.replace('_', '-')} over {axis}, {before} → {after.rpartition(']')[2].strip(' ,')}"
        step = dataclasses.replace(step, name=name, fresh=own)
        return Collective(self.wire, step, step.unpack)

    def bucket(self, axis: str, op: str, specs: Sequence[str]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
        """One all-reduce of several tensors, bound to this device."""
        shapes = tuple(local_shape(parse_spec(s), self.sizes, self.coord) for s in specs)
        step, unbundle = bucket_stage(shapes, self.axes.index(axis), op)
        step = dataclasses.replace(step, name=f"all-reduce over {axis} of {len(shapes)} tensors, the first {specs[0]}")
        return Collective(self.wire, step, unbundle)

    def local(self, what: str, spec: str, parts: tuple[int, ...], times: int, repeat: int) -> Any:
        """A number, or list of numbers, that depends on the rank and the micro-batch."""
        return Local(what, spec, parts, times, repeat).at(self.sizes, self.coord, self.turn)

    def turns(self, count: int) -> list[Place]:
        """This device's place in each of `count` micro-batches."""
        shared = (self.axes, self.sizes, self.coord, self.device, self.wire, self._constants)
        return [Place(*shared, (count, t), self.regions) for t in range(count)]

    def region(self, function: Callable[[list[Tensor]], Any], ops: int) -> Callable[[list[Tensor]], Any]:
        """A function of a list of tensors, which it empties: compiled where there is a compiler."""
        return self.regions.region(function, ops) if self.regions else function

    def constant(self, name: str) -> Tensor:
        """A constant tensor of the captured model."""
        return self._constants[name]


def load(source: str, place: Place, name: str = "emitted") -> Any:
    """Execute an emitted file and bind it; tracebacks show its lines."""
    filename = f"<netmind-autopar {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["build"](place)
