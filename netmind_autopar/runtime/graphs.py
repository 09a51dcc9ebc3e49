"""The graphs of one module: the one it was made for, and those for other calls, planned when such a call is first seen.

Another graph is needed for other shapes, another way to call, `train()` or `eval()`, and where other parameters or inputs want gradients.
Parameters stay as they lie; where a graph had to be planned for another layout of one, it is moved for each call.
All ranks must make the same calls, so all of them come to a new one at the same time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ir.errors import InputError, ShapeError
from ..ir.plan import Plan
from ..ir.spec import local_shape
from .dtensors import torch_placements
from .executable import Executable
from .graph import Graph

if TYPE_CHECKING:
    from .module import ParallelModule

LIMIT = 32  # graphs of one module: more are a call that differs every time, and each is planned
_log = logging.getLogger("netmind_autopar")


@dataclass(frozen=True)
class Asked:
    """A call that no graph is for. gradients: whether some are wanted; layouts: parameter → its placements, such as ("S(0)", "R")."""

    args: tuple
    kwargs: dict[str, Any]
    training: bool
    gradients: bool
    trained: frozenset[str]
    layouts: Mapping[str, tuple[str, ...]]


# Captures a call on every rank: the hash of its graph, and how to plan and compile it.
Planner = Callable[[Asked], tuple[str, Callable[[], tuple[Executable, Plan]]]]


class Graphs:
    """All graphs of a module, the one that was used last first."""

    def __init__(self, pm: ParallelModule, all_: Sequence[Graph], planner: Planner | None) -> None:
        self.first, self.all, self.planner = all_[0], list(all_), planner
        self.slots = [(m._parameters, leaf, f"{path}.{leaf}".lstrip(".")) for path, m in pm.named_modules() for leaf in m._parameters]

    def of(self, pm: ParallelModule) -> Graphs:
        """The same graphs for a copy of the module."""
        return Graphs(pm, [self.first, *(g for g in self.all if g is not self.first)], self.planner)

    def trained(self) -> frozenset[str]:
        """The names of parameters that want a gradient."""
        return frozenset(name for owner, leaf, name in self.slots if owner[leaf] is not None and owner[leaf].requires_grad)  # type: ignore[union-attr]

    def find(self, pm: ParallelModule, args: tuple, kwargs: dict[str, Any]) -> tuple[Graph, list[Tensor]]:
        """The graph for a call and the call's tensors. Raises ShapeError when there is none and none may be planned."""
        if self.planner is None:
            return self._only(pm, args, kwargs)
        enabled = self.first.trains and torch.is_grad_enabled()
        trained = self.trained() if enabled else frozenset()
        found = self._seen(pm, args, kwargs, enabled, trained)
        if found is None and self.first.plan.inputs == "local":
            args, kwargs = self._global(args, kwargs)
            found = self._seen(pm, args, kwargs, enabled, trained)
        if found is not None:
            return found
        return self._plan(pm, args, kwargs, enabled, trained)

    def _seen(
        self, pm: ParallelModule, args: tuple, kwargs: dict[str, Any], enabled: bool, trained: frozenset[str]
    ) -> tuple[Graph, list[Tensor]] | None:
        for at, graph in enumerate(self.all):
            given = _fitting(graph, pm.training, args, kwargs, enabled, trained)
            if given is not None:
                self.all.insert(0, self.all.pop(at))
                return graph, given
        return None

    def _only(self, pm: ParallelModule, args: tuple, kwargs: dict[str, Any]) -> tuple[Graph, list[Tensor]]:
        e = self.first.executable
        depends = any(i.role == "seed" for i in e.inputs) or any(o.role == "mutation" for o in e.outputs) or e.mode == "inference"
        if depends and pm.training != e.training:
            had, now = ("train", "eval") if e.training else ("eval", "train")
            raise InputError(
                f"the module was captured in {had} mode and is called in {now} mode",
                why="dropout and batch norm compute something else there, and strict_shapes=True forbids another graph",
                try_=f"strict_shapes=False, or call autoparallelize again after model.{now}() and load this module's state_dict into it",
            )
        if self.first.trains and torch.is_grad_enabled() and (late := sorted(self.trained() - self.first.trained)):
            raise InputError(
                f"the parameter {late[0]!r} wants a gradient and did not when the plan was made",
                why="its gradient is not part of the plan, and strict_shapes=True forbids another graph",
                try_="strict_shapes=False, or call autoparallelize after requires_grad_(True)",
            )
        return self.first, self.first.executable.signature.pack(args, kwargs)

    def _global(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A call with local pieces of another size, as DTensors that lie as the first plan has them; equal pieces on all ranks."""
        first = self.first
        given = first.executable.signature.pack(args, kwargs)
        pairs = zip(given, first.roles.user_specs, strict=True)
        whole = [t if isinstance(t, DTensor) else DTensor.from_local(t, first.mesh, torch_placements(s), run_check=False) for t, s in pairs]
        return first.executable.signature.rebuild(whole)  # type: ignore[arg-type]

    def _plan(
        self, pm: ParallelModule, args: tuple, kwargs: dict[str, Any], enabled: bool, trained: frozenset[str]
    ) -> tuple[Graph, list[Tensor]]:
        if len(self.all) >= LIMIT:
            raise ShapeError(
                f"a call unlike the {LIMIT} that were planned",
                why="every new combination of shapes and arguments is planned, which takes time and memory",
                try_="pad batches to a few sizes, and keep numbers that change with every call out of the arguments",
            )
        assert self.planner is not None
        start = time.perf_counter()
        gradients = enabled and (bool(trained) or any(isinstance(t, Tensor) and t.requires_grad for t in _leaves((args, kwargs))))
        layouts = {name: tuple(map(_word, owner[leaf].placements)) for owner, leaf, name in self.slots if owner[leaf] is not None}  # type: ignore[union-attr]
        hash_, make = self.planner(Asked(args, kwargs, pm.training, gradients, trained, layouts))
        graph = next((g for g in self.all if g.plan.graph_hash == hash_ and g.trains == gradients and g.trained == trained), None)
        if graph is None:
            graph = pm._bind(*make())
            graph.trained = trained
            self.all.insert(0, graph)
            if not dist.is_initialized() or dist.get_rank() == 0:
                seconds, count = time.perf_counter() - start, len(self.all)
                _log.warning("%s: planned in %.1f s, %d graphs", _told(self.first, graph, pm.training), seconds, count)
        graph.modes.add(pm.training)
        given = _fitting(graph, pm.training, args, kwargs, enabled, trained)
        assert given is not None
        return graph, given


def _told(first: Graph, graph: Graph, training: bool) -> str:
    """What is new about a call."""
    shapes = {i.name: s.shape for i, s in zip(first.roles.users, first.roles.user_specs, strict=True)}
    others = {i.name: s.shape for i, s in zip(graph.roles.users, graph.roles.user_specs, strict=True)}
    mode = "" if training in first.modes else "train mode, " if training else "eval mode, "
    new = [f"{name} {tuple(shape)}" for name, shape in others.items() if shapes.get(name) != shape]
    return f"a call in another way than planned ({mode}{', '.join(new) or 'other gradients or arguments'})"


def _word(placement: Any) -> str:
    return f"S({placement.dim})" if placement.is_shard() else "R"


def _leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def _fitting(
    graph: Graph, training: bool, args: tuple, kwargs: dict[str, Any], enabled: bool, trained: frozenset[str]
) -> list[Tensor] | None:
    """The tensors of a call if a graph is for it. enabled: gradients are on; trained: the parameters that want one."""
    if training not in graph.modes:
        return None
    try:
        given = graph.executable.signature.pack(args, kwargs)
    except ShapeError:
        return None
    for spec, value in zip(graph.roles.user_specs, given, strict=True):
        want = spec.shape if isinstance(value, DTensor) else local_shape(spec, graph.place.sizes, graph.place.coord)
        if tuple(value.shape) != tuple(want) or value.dtype != spec.dtype:
            return None
    if not enabled:
        return given
    wanting = {i.index for i, t in zip(graph.roles.users, given, strict=True) if t.requires_grad}
    if not trained and not wanting:
        return given
    return given if graph.trains and graph.trained == trained and wanting <= graph.roles.given else None
