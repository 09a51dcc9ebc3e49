"""What a step takes on this device, measured, beside what the plan said."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .module import ParallelModule

# Runs a step on a CPU: bytes at its peak, of what it makes and of these modules, optimizers and tensors that are there before.
PeakOf = Callable[[Callable[[], Any], Sequence[Any]], int]
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one category. None: it was not measured."""

    name: str
    planned: int
    measured: int | None


@dataclass(frozen=True)
class MemoryReport:
    """Planned and measured bytes at the peak of a step. planned: of the device that holds the most; measured: of this device.

    communication_buffers: planned, a part of the row with gradients; nothing measures it apart."""

    rows: tuple[MemoryRow, ...]
    planned: int
    measured: int | None
    how: str
    communication_buffers: int = 0

    def __str__(self) -> str:
        lines = [f"{'memory at the peak of a step':<42}{'planned':>12}{'measured':>12}"]
        lines += [f"  {r.name:<40}{_size(r.planned):>12}{_size(r.measured):>12}" for r in self.rows]
        if self.communication_buffers:
            lines.insert(-1, f"    {'of it communication buffers':<38}{_size(self.communication_buffers):>12}{'-':>12}")
        lines.append(f"{'peak':<42}{_size(self.planned):>12}{_size(self.measured):>12}")
        return "\n".join([*lines, f"measured: {self.how}"])


def report(pm: ParallelModule, step: Callable[[], Any] | None, optimizer: torch.optim.Optimizer | None, batch: Any) -> MemoryReport:
    """See `ParallelModule.memory_report`."""
    device = pm._place.device
    how, peak = "no step was given", None
    if step is not None:
        peak, how = _peak(pm, step, [pm, *([optimizer] if optimizer else []), *_tensors(batch)], device)
    elif device.type == "cuda":
        peak, how = torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated since the process began, or was reset"
    planned = pm._graphs.all[0].plan.cost.memory
    parameters = _bytes(pm.parameters())
    state = _bytes(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)) if optimizer else None
    rest = None if peak is None else max(peak - parameters - (state or 0), 0)
    rows = (
        MemoryRow("parameters", planned.parameters, parameters),
        MemoryRow("optimizer state", planned.optimizer, state),
        MemoryRow(
            "gradients, activations, transients, inputs",
            planned.gradients + planned.activations + planned.transients + planned.inputs + planned.communication_buffers,
            rest,
        ),
        MemoryRow("fragmentation", planned.fragmentation, _lost(device)),
    )
    return MemoryReport(rows, sum(r.planned for r in rows), peak, how, planned.communication_buffers)


def _lost(device: torch.device) -> int | None:
    """What the caching allocator has reserved beyond what was allocated at the peak, since the process began or the peak was reset."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def _peak(pm: ParallelModule, step: Callable[[], Any], held: list[Any], device: torch.device) -> tuple[int | None, str]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated of one step, all of the process"
    if pm._peak_of is None:
        step()
        return None, "on this device nothing counts tensors"
    return pm._peak_of(step, held), "tensors alive in one step, counted by torch's MemTracker"


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the local pieces, shared memory once."""
    storages = {}
    for t in tensors:
        storage = (t._local_tensor if isinstance(t, DTensor) else t).untyped_storage()
        storages[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in _tensors(item)]


def _size(n: int | None) -> str:
    if n is None:
        return "-"
    unit, scale = next((u, s) for u, s in _UNITS if n >= s or s == 1)
    return f"{n / scale:.3g} {unit}"
