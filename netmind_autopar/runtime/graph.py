"""One plan on this device: its emitted functions, bound when they are first needed, and what their ends mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..ir.plan import Plan
from .dtensors import as_dtensor, torch_placements
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
        self.modes: set[bool] = {executable.training}  # of the module, for which this graph is the right one
        self.trained: frozenset[str] = frozenset()  # parameters that wanted a gradient when it was captured
        self.moved: dict[int, tuple[list[Any], list[Any]]] = {}  # leading inputs that lie otherwise: placements here, and their own
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

    def place_parameters(self, owner_of: Callable[[str], Tensor]) -> None:
        """Note which parameters lie otherwise than this graph takes them."""
        for k, (item, spec) in enumerate(zip(self.roles.leading, self.roles.leading_specs, strict=True)):
            if item.role == "param":
                here, own = torch_placements(spec), list(owner_of(item.name).placements)  # type: ignore[attr-defined]
                if any(h != o and n > 1 for h, o, n in zip(here, own, self.place.sizes, strict=True)):
                    self.moved[k] = (here, own)

    def locals(self, owners: Sequence[Tensor]) -> list[Tensor]:
        """The local tensors that the emitted functions take."""
        found = [t._local_tensor if isinstance(t, DTensor) else t for t in owners]
        for k, item in enumerate(self.roles.leading):  # one that waits elsewhere by another graph's plan
            if item.role == "param" and item.name not in self.executable.stowed and found[k].device != self.place.device:
                found[k] = found[k].to(self.place.device)
        for k, (here, _) in self.moved.items():
            found[k] = owners[k].detach().redistribute(self.mesh, here)._local_tensor  # type: ignore[attr-defined]
        return found

    def gradient(self, slot: int, local: Tensor) -> Tensor:
        """The gradient of a leading input, as its owner lies."""
        item, spec = self.roles.leading[slot], self.roles.leading_specs[slot]
        if item.role != "param":
            return local
        grad = as_dtensor(local, self.mesh, torch_placements(spec), spec.shape)
        return grad.redistribute(self.mesh, self.moved[slot][1]) if slot in self.moved else grad

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
