"""Gradients that wait for their last reduction, so that devices talk once for several steps (gradient accumulation).

Inside `pm.no_sync()` a call runs the "waiting" functions: their backward gives away every parameter's gradient before its last
collectives, and `Held.add` adds it up. The first backward of a call outside runs the "closing" functions: the usual ones, in which
each gradient meets what waits right before it is reduced, so that reductions still travel beside backward. Where that cannot be (the
call ran other functions, as for a batch of another shape), `finish` of the waiting functions reduces what waits by itself.

Meanwhile `parameter.grad` of one that had none is nan without memory; it says that there is something, and a `zero_grad` shows in it.
Sums are float32 where gradients are smaller floats, and take the gradient's dtype again before they travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..ir.errors import AutoparError
from .dtensors import as_dtensor, owned
from .stowed import beside
from .turns import Turns

if TYPE_CHECKING:
    from .graph import Graph
    from .module import ParallelModule

HALF = (torch.bfloat16, torch.float16)
_waiting: weakref.WeakSet[Waiting] = weakref.WeakSet()
_hooked: list[object] = []


def meet(x: Tensor) -> Tensor:
    """Graph marker: here a gradient meets what waits of it. In lockstep, where nothing waits, x itself."""
    return x


class Held:
    """What waits of one graph's gradients: a sum for each value that `finish` takes."""

    def __init__(self, graph: Graph) -> None:
        bound = graph.bind("waiting")
        functions = bound.bound[0] if isinstance(bound, Turns) else bound
        self.finish, names, self.behind = functions[2:]  # behind: of each parameter's gradient, the position of its sum
        self.at = {name: i for i, name in enumerate(names)}
        self.owners = [graph.roles.leading[slot].name for slot in graph.roles.grad_slots if graph.roles.leading[slot].role == "param"]
        self.reached = [r for slot, r in zip(graph.roles.grad_slots, graph.roles.reached, strict=True) if _is_param(graph, slot)]
        self.sums: dict[int, Tensor] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.arrived: set[int] = set()  # outputs whose gradient is in the sums
        self.dropped: set[str] = set()  # parameters whose part was thrown away

    def add(self, i: int, gradient: Tensor, once: bool = False) -> None:
        """Add a gradient to what waits. The first one is copied: it may be memory that is not its own."""
        if i in self.sums:
            self.sums[i] += gradient
        else:
            wide = torch.float32 if gradient.dtype in HALF else gradient.dtype
            self.sums[i] = gradient.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
            self.dtypes[i] = gradient.dtype

    def meet(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient and what waits of it, which is let go of."""
        waits = self.sums.pop(self.at[name], None)
        return gradient if waits is None else waits.add_(gradient).to(gradient.dtype)

    def finished(self) -> list[Tensor]:
        """All gradients, reduced, in the order of the parameters in the program's results."""
        sums = [self.sums.pop(i).to(self.dtypes[i]) for i in range(len(self.at))]
        return list(self.finish(*sums))

    def arrive(self, outputs: set[int]) -> None:
        """What was added last comes from a backward of these outputs."""
        self.arrived |= outputs
        self.dropped -= {n for n, behind in zip(self.owners, self.reached, strict=True) if behind & outputs}

    def names(self) -> set[str]:
        """Parameters of which something waits."""
        return {n for n, behind in zip(self.owners, self.reached, strict=True) if behind & self.arrived} - self.dropped

    def drop(self, name: str) -> None:
        """Throw away what waits of a parameter."""
        self.dropped.add(name)
        for at in {i for n, i in zip(self.owners, self.behind, strict=True) if n == name}:
            if {n for n, i in zip(self.owners, self.behind, strict=True) if i == at} <= self.dropped:
                self.sums[at].zero_()
            else:
                raise AutoparError(
                    f"the gradient of {name!r} was set to zero while it waits for its reduction",
                    why="it is one tensor with that of another parameter, which was not",
                    try_="pm.zero_grad(), which throws away all that waits",
                )


def _as_it_is(name: str, gradient: Tensor) -> Tensor:
    return gradient


def _is_param(graph: Graph, slot: int) -> bool:
    return graph.roles.leading[slot].role == "param"


class Waiting:
    """What a module's gradients wait for, by graph."""

    def __init__(self) -> None:
        self.depth = 0  # of open `no_sync` blocks
        self.held: dict[Graph, Held] = {}
        self.marks: dict[str, _Mark] = {}

    def __deepcopy__(self, memo: Any) -> Waiting:
        return Waiting()

    @contextmanager
    def block(self, active: bool) -> Iterator[None]:
        """Calls of the module inside keep their gradients back."""
        if not _hooked:
            _hooked.append(register_optimizer_step_pre_hook(_before_step))
        self.depth += active
        try:
            yield
        finally:
            self.depth -= active

    def kind(self, graph: Graph) -> str:
        """The functions that a call runs whose gradients are wanted."""
        if not self.depth and not self.held:
            return "whole"
        self.look()
        if self.depth or (graph in self.held and graph.executable.turns > 1):
            return "waiting"
        return "closing" if graph in self.held else "whole"

    def of(self, graph: Graph) -> Held:
        """What waits of a graph, an empty one if nothing does."""
        if graph not in self.held:
            self.held[graph] = Held(graph)
            _waiting.add(self)
        return self.held[graph]

    def keep(
        self, pm: ParallelModule, graph: Graph, saved: Any, tangents: Sequence[Tensor], arrived: set[int], sums: list[Tensor], *, last: bool
    ) -> tuple[Sequence[Tensor], list[bool | None]]:
        """Run the waiting backward, or take the `sums` of micro-batches. Returns what `step` wants: parameters' gradients wait, the
        inputs' do not; with `last` none does."""
        self.look()
        held = self.of(graph)
        results: Sequence[Tensor] = ()
        if sums:
            for i, gradient in enumerate(sums):
                held.add(i, gradient)
        else:
            results = graph.bind("waiting")[1](saved, held.add, *tangents) or ()
        held.arrive(arrived)
        if last:
            names = held.names()
            del self.held[graph]
            return held.finished(), [name in names for name in held.owners]
        self._mark(pm, held)
        params = [_is_param(graph, slot) for slot in graph.roles.grad_slots]
        return results, [None if p else bool(behind & arrived) for p, behind in zip(params, graph.roles.reached, strict=True)]

    def close(self, graph: Graph, saved: Any, tangents: Sequence[Tensor], arrived: set[int]) -> tuple[Sequence[Tensor], list[bool | None]]:
        """Run the closing backward, in which all gradients meet what waits of them. Returns what `step` wants."""
        self.look()
        held = self.held.pop(graph, None)
        names = held.names() if held else set()
        results = graph.bind("closing")[1](saved, held.meet if held else _as_it_is, *tangents)
        owners = [graph.roles.leading[slot].name if _is_param(graph, slot) else "" for slot in graph.roles.grad_slots]
        return results, [bool(behind & arrived) or owner in names for behind, owner in zip(graph.roles.reached, owners, strict=True)]

    def _mark(self, pm: ParallelModule, held: Held) -> None:
        """Something waits from now on: note how the parameters' gradients look."""
        for name in held.names():
            p = pm.get_parameter(name)
            own = p.grad is None or (name in self.marks and self.marks[name].own)
            if p.grad is None:
                p.grad = _nothing(p)
            self.marks[name] = _Mark(p, p.grad, _version(p.grad), own)

    def look(self) -> None:
        """Throw away what waits of parameters whose gradients were set to None or zero meanwhile, as `zero_grad` does.

        Raises AutoparError where one was changed in another way.
        """
        for name, mark in list(self.marks.items()):
            if mark.stands:
                continue
            grad = mark.parameter.grad
            if grad is not None and bool(_local(grad).count_nonzero()):
                raise AutoparError(
                    f"the gradient of {name!r} was changed while a part of it waits for its reduction",
                    why="only a call of the module outside of no_sync() completes it",
                    try_="clip and unscale gradients after the last backward of a step",
                )
            mark.remove()
            del self.marks[name]
            for held in self.held.values():
                held.drop(name)
        if not self.marks:
            self.held.clear()

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raises AutoparError when a part of one of these parameters' gradients waits."""
        if not self.marks:
            return
        self.look()
        marked = {id(mark.parameter): name for name, mark in self.marks.items()}
        name = next((marked[id(p)] for p in parameters if id(p) in marked), None)
        if name is not None:
            raise AutoparError(
                f"the gradient of {name!r} still waits for its reduction over devices",
                why="the last call of the module before was inside of no_sync()",
                try_="run the last micro-step outside of no_sync(), or call pm.reduce_gradients()",
            )

    def unmark(self) -> None:
        """Nothing waits any more: gradients that were only marks are gone."""
        for mark in self.marks.values():
            mark.remove()
        self.marks.clear()

    def clear(self) -> None:
        """Throw away all that waits."""
        self.unmark()
        self.held.clear()

    @torch.no_grad()
    def reduce(self, pm: ParallelModule) -> None:
        """Reduce what waits, of every graph, into `.grad`. On all ranks alike."""
        if not self.held and not self.marks:
            return
        self.look()
        self.unmark()
        for graph, held in list(self.held.items()):
            wanted, slots = held.names(), [s for s in graph.roles.grad_slots if _is_param(graph, s)]
            for slot, name, local in zip(slots, held.owners, owned(held.finished(), []), strict=True):
                if name in wanted:
                    p = pm.get_parameter(name)
                    grad = beside(p, graph.gradient(slot, local))
                    p.grad = grad if p.grad is None else p.grad + grad
        self.held.clear()


@dataclass
class _Mark:
    """A parameter of which something waits: its gradient as it was left, and whether that says nothing but this."""

    parameter: Tensor
    grad: Tensor
    version: tuple[int, int]
    own: bool

    @property
    def stands(self) -> bool:
        return self.parameter.grad is self.grad and _version(self.grad) == self.version

    def remove(self) -> None:
        if self.own and self.parameter.grad is self.grad:
            self.parameter.grad = None


def _local(t: Tensor) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def _version(grad: Tensor) -> tuple[int, int]:
    return grad._version, _local(grad)._version  # of a DTensor: who writes through it counts there, who writes into its piece here


def _nothing(p: Tensor) -> Tensor:
    """A gradient of p's shape that is nan and takes no memory."""
    local = _local(p)
    nan = torch.full((), torch.nan, dtype=local.dtype, device=local.device).expand(local.shape)
    return as_dtensor(nan, p.device_mesh, p.placements, p.shape) if isinstance(p, DTensor) else nan


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """No optimizer steps on gradients of which a part waits."""
    for waiting in list(_waiting):
        waiting.check(p for group in optimizer.param_groups for p in group["params"])
