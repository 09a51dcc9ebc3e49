"""One plan on this device: its emitted functions, bound when they are first needed, and what their ends mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ir.plan import Plan
from .executable import Executable, Roles
from .place import Place, load
from .turns import Turns


class Graph:
    """An executable bound to a device of a mesh."""

    def __init__(self, executable: Executable, plan: Plan, mesh: DeviceMesh, place: Place) -> None:
        self.executable, self.plan, self.mesh, self.place = executable, plan, mesh, place
        self.roles = Roles(executable)
        self._bound: dict[str, Any] = {}
        self._shared: dict[str, list[list[int]]] = {}
        self.trains = executable.mode != "inference"
        self.bind("whole" if self.trains else "inference")

    def __deepcopy__(self, memo: Any) -> Graph:
        return self  # a copy of a module runs the same functions

    def bind(self, kind: str) -> Any:
        """The emitted functions of one kind, micro-batches as `Turns`: "whole" (forward, backward), "inference" (forward), and those
        of gradients that wait, see runtime/accumulate.py: "waiting" (forward, backward, finish, names, behind) and "closing"."""
        if kind not in self._bound:
            self._bound[kind] = self._load(kind)
        return self._bound[kind]

    def _load(self, kind: str) -> Any:
        e = self.executable
        own = kind == "whole" or not self.trains
        source = e.source if own else e.variant(kind)  # type: ignore[arg-type]
        if e.turns == 1:
            return load(source, self.place, "emitted" if kind == "whole" else kind)
        joins = [join for join, out in zip(e.joins, e.outputs, strict=True) if out.role != "grad"]
        return Turns(source, self.place, e.turns, joins, inference=kind == "inference")

    def infer(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Results of forward alone, of local tensors."""
        bound = self.bind("inference")
        run: Callable[..., Any] = bound.infer if isinstance(bound, Turns) else bound
        return list(run(*inputs)[0])

    def keep_from_changing(self, kind: str, buffers: Sequence[Tensor], values: list[Tensor], saved: list[Any]) -> None:
        """Copy results and saved values that share memory with a buffer which this step writes: they mean its old value.

        Which ones do is the same in every step, so it is looked up once for each kind of functions.
        """
        if not buffers:
            return
        if kind not in self._shared:
            memory = {t.untyped_storage().data_ptr() for t in buffers if t.numel()}
            self._shared[kind] = [
                [k for k, t in enumerate(ts) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in memory]
                for ts in (values, saved)
            ]
        for tensors, found in zip((values, saved), self._shared[kind], strict=True):
            for k in found:
                tensors[k] = tensors[k].clone()
