"""The distributed trainable module: DTensor parameters under the original names around the emitted code."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate

from ..ir.errors import InputError, ShapeError
from ..ir.plan import Plan
from ..ir.program import Input
from ..ir.spec import local_shape
from . import data, infer, memory, norms
from .accumulate import Waiting
from .agree import collective, together
from .collectives import ProcessWire
from .compiled import CompiledRegion, Compiler, Regions
from .dtensors import as_dtensor, torch_placements
from .executable import Executable
from .export import configuration, save_pretrained
from .graph import Graph
from .graphs import Graphs, Planner
from .materialise import Bare, Cut, Init, materialise
from .parked import park
from .place import Place
from .step import Step
from .stowed import drop_after_loading, elsewhere, stow


class ParallelModule(nn.Module):
    """The original model running on every device of a mesh; takes and returns what the original does, with global meaning.

    Parameters are DTensors, buffers whole tensors. Parameters and buffers start as rank 0's. Call it on all ranks alike.
    """

    def __init__(
        self,
        executable: Executable,
        model: nn.Module,
        plan: Plan,
        device_mesh: DeviceMesh,
        *,
        gather_outputs: bool = False,
        planner: Planner | None = None,
        peak_of: memory.PeakOf | None = None,
        weights: Any = None,
        init: Init | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        super().__init__()
        self._executable, self._plan, self._mesh, self._gather = executable, plan, device_mesh, gather_outputs
        sizes, coord = tuple(device_mesh.shape), tuple(device_mesh.get_coordinate() or ())
        groups = [device_mesh.get_group(axis).group_name for axis in range(len(sizes))]
        device = _device(device_mesh)
        self._wire = ProcessWire(groups, sizes, coord)
        self._regions = Regions(compiler) if compiler else None
        self._place = self._placed(executable, plan, sizes, coord, device)
        self._waiting, self._peak_of = Waiting(), peak_of
        self._adopt(model, sizes, coord, device, weights, init)
        self._config = configuration(model)
        self._graph = self._bind(executable, plan)
        stow({self.get_parameter(name): tier for name, tier in executable.stowed.items()}, device)
        park({self.get_parameter(name): tier for name, tier in {**executable.parked, **executable.stowed}.items()})
        drop_after_loading(self)
        self.train(executable.training)
        self._graphs = Graphs(self, [self._graph], planner)
        self._graph.trained = self._graphs.trained()

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """A module with parameters and buffers of its own, on the same mesh with the same plans; for averages of parameters."""
        for p in self.parameters():
            memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        shared = ("_executable", "_plan", "_mesh", "_wire", "_place", "_graph")
        memo.update({id(self.__dict__[name]): self.__dict__[name] for name in shared})
        memo[id(self._graphs)] = None  # made anew
        new = memo[id(self)] = object.__new__(type(self))
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        new._graphs = self._graphs.of(new)
        return new

    def _bind(self, executable: Executable, plan: Plan) -> Graph:
        """Another graph, or the first, on this device."""
        place = self._placed(executable, plan, self._place.sizes, self._place.coord, self._place.device)
        graph = Graph(executable, plan, self._mesh, place)
        graph.place_parameters(self.get_parameter)
        return graph

    def _placed(self, executable: Executable, plan: Plan, sizes: tuple[int, ...], coord: tuple[int, ...], device: torch.device) -> Place:
        return Place(plan.axis_names, sizes, coord, device, self._wire, executable.constants, regions=self._regions)

    @property
    def compiled(self) -> tuple[CompiledRegion, ...]:
        """With compile=True what became of every region of the emitted functions that were needed so far; else nothing."""
        return tuple(self._regions.rows) if self._regions else ()

    @property
    def plan(self) -> Plan:
        """The plan that the module was made for."""
        return self._plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans so far, the one that ran last first: other shapes, and eval mode, are planned when they are first seen."""
        return tuple(graph.plan for graph in self._graphs.all)

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes this device has sent so far, by "collective over axis"."""
        return {f"{wire} over {self._plan.axis_names[axis]}": n for (wire, axis), n in sorted(self._wire.sent.items())}

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 << 30) -> None:
        """Write the weights as Hugging Face does: safetensors, tied ones once, and the model's configuration. On all ranks alike.

        Tensors are gathered one at a time, and rank 0 writes them. Raises CheckpointError on every rank when it cannot.
        """
        save_pretrained(self, folder, self._config, max_shard_bytes)

    def code(self) -> str:
        """The emitted Python source, the same on every rank."""
        return self._executable.source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's forward. A call unlike those so far is planned first; with strict_shapes it raises ShapeError."""
        graph, given = self._graphs.find(self, args, kwargs)
        if not graph.trains:
            return self._unpacked(graph, infer.run(self, graph, given))
        tensors = self._user_inputs(graph, given)
        owners = [self._tensor_of(item, tensors) for item in graph.roles.leading]
        results = Step.apply(self, graph, *owners)
        leaves = [None] * graph.roles.leaves
        for out, value in zip(graph.roles.results, results, strict=True):
            if out.role == "mutation":
                with torch.no_grad():
                    self.get_buffer(out.name).copy_(value)
            else:
                leaves[out.index] = value
        return self._unpacked(graph, leaves)

    def _unpacked(self, graph: Graph, leaves: Sequence[Any]) -> Any:
        """What the original returns, around its tensors; gathered where every output is wanted whole."""
        whole = [v.full_tensor() if self._gather and isinstance(v, DTensor) else v for v in leaves]
        return graph.executable.signature.unpack(whole)

    def shard_inputs(self, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) of a call with its tensors, whole on every device, as DTensors that lie as the plan has them.

        For a cache that stays split from call to call: give it to the first call so, and what comes back to the next.
        """
        signature = self._executable.signature
        return signature.rebuild(list(infer.shard_inputs(self._graph, signature.pack(args, kwargs))))

    def local_batch(self, *args: Any, **kwargs: Any) -> Any:
        """A call's tensors, whole on every device and of any number of rows, as this device's pieces: `pm(**pm.local_batch(**batch))`.

        DTensors that lie as the plan has its inputs; the tensors themselves with inputs="global". Arguments all by name or all by position.
        """
        if args and kwargs:
            raise InputError("arguments by position and by name", where="local_batch", try_="all of them by name")
        batch: Any = kwargs if kwargs else args
        total = next(t.shape[0] for t in self._graph.executable.signature.pack(args, kwargs) if t.dim())
        return data.placed(self._graphs.first, batch, total, (0, total))

    def batches(self, size: int, **options: Any) -> data.Batches:
        """A batch sampler over a data set of `size` samples, by which each device reads its own rows; options of `data.Batches`."""
        return data.Batches(self._graphs.first, size, **options)

    def memory_report(
        self, step: Callable[[], Any] | None = None, *, optimizer: torch.optim.Optimizer | None = None, batch: Any = None
    ) -> memory.MemoryReport:
        """Planned beside measured bytes. step: a function that makes one training step, run once while memory is watched; on CUDA it may
        be left out. optimizer, batch: what else lies in memory during it."""
        return memory.report(self, step, optimizer, batch)

    def no_sync(self, active: bool = True) -> AbstractContextManager[None]:
        """Calls of the module inside keep their gradients back on each device: they are added up, and the first call outside reduces
        them together with its own. Does nothing with active=False. See docs/training.md."""
        return self._waiting.block(active)

    def reduce_gradients(self) -> None:
        """Reduce now what calls inside `no_sync` kept back, without another call. On all ranks alike."""
        self._waiting.reduce(self)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ of all parameters, which does as well, with one collective for all of them."""
        self._waiting.check(self.parameters())
        return norms.clip_grad_norm(self.parameters(), max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any module; what waits for its reduction is thrown away too."""
        self._waiting.clear()
        super().zero_grad(set_to_none)

    def _user_inputs(self, graph: Graph, given: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        for item, spec, value in zip(graph.roles.users, graph.roles.user_specs, given, strict=True):
            if isinstance(value, DTensor):
                value = value.redistribute(self._mesh, torch_placements(spec)).to_local()
            want = local_shape(spec, self._place.sizes, self._place.coord)
            if tuple(value.shape) != want or value.dtype != spec.dtype:
                raise ShapeError(
                    f"the input {item.name!r} is {_show(value.shape, value.dtype)}, the plan was made for {_show(want, spec.dtype)}",
                    why="a plan fixes every shape",
                    try_="pad the batch to the planned shape, or strict_shapes=False, which plans another graph for it",
                )
            out.append(value.to(self._place.device))
        return out

    def _tensor_of(self, item: Input, users: list[Tensor]) -> Tensor:
        if item.role == "param":
            return self.get_parameter(item.name)
        if item.role == "buffer":
            return self.get_buffer(item.name)
        if item.role == "seed":
            return self._draw_seed()
        return users[item.index]

    def _draw_seed(self) -> Tensor:
        """The step's random seed: rank 0's torch generator decides, so that `torch.manual_seed` governs every mesh alike."""
        seed = torch.randint(0, 2**62, (), dtype=torch.int64).to(self._place.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            collective("the random seed of the step", lambda: dist.broadcast(seed, src=0))
        return seed

    def _adopt(
        self, model: nn.Module, sizes: tuple[int, ...], coord: tuple[int, ...], device: torch.device, weights: Any, init: Init | None
    ) -> None:
        """Take over the model's parameters (local pieces) and buffers (whole) under their names: rank 0's values, or new ones."""
        parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers(remove_duplicate=False))
        specs = {i.name: s for i, s in zip(self._executable.inputs, self._executable.input_specs, strict=True) if i.role == "param"}
        laid = {id(p): s for n, p in parameters.items() if (s := specs.get(n) or specs.get(self._executable.tied.get(n, n)))}
        hidden = {f"{prefix}.{name}".lstrip(".") for prefix, m in model.named_modules() for name in m._non_persistent_buffers_set}
        tiers = {id(p): self._executable.stowed[n] for n, p in parameters.items() if n in self._executable.stowed}
        cut = Cut(laid, sizes, coord, {at: functools.partial(elsewhere, tier=tier, device=device) for at, tier in tiers.items()})
        bare = Bare.of(model)
        made: Any = together(lambda: materialise(model, cut, bare, weights=weights, init=init))
        adopted: dict[int, nn.Parameter] = {}  # one tensor that has two names stays one
        for name, parameter in parameters.items():
            key = id(parameter)
            if key not in adopted:
                local = made.pop(key) if key in made else cut.of(parameter, _broadcast(parameter, device))
                local = local if key in cut.keep else local.to(device)
                placements = torch_placements(laid[key]) if key in laid else [TorchReplicate()] * len(sizes)  # one that is never used
                dtensor = as_dtensor(local, self._mesh, placements, parameter.shape)
                adopted[key] = nn.Parameter(dtensor, requires_grad=parameter.requires_grad)
            _attach(self, name, adopted[key], persistent=True)
        kept: dict[int, Tensor] = {}
        for name, buffer in buffers.items():
            key = id(buffer)
            if key not in kept:
                kept[key] = made.pop(key).to(device) if key in made else _broadcast(buffer, device)
            _attach(self, name, kept[key], persistent=name not in hidden)


def _broadcast(tensor: Tensor, device: torch.device) -> Tensor:
    """Rank 0's values of a parameter or buffer, as a fresh tensor on `device`; other ranks need not have any."""
    bare = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor
    full = bare.detach().to(device, copy=True).contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(full.view(torch.uint8) if full.dtype == torch.bool else full, src=0)
    return full


def _attach(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool) -> None:
    """Register a parameter or buffer under its dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent=persistent)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _show(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
