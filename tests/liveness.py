"""The memory of a lowered program, counted by walking it: what `Plan.cost.peak_bytes` predicts, found in another way.

Every op of one device runs on the meta device, in the order of the emitted code, and every name is dropped after its last use
as the emitted code does, which also writes over operands where it may (passes/reuse.py). A storage counts from the op that makes it until
the last tensor on it is gone, so views, tuples, slices that keep their base, what collectives pack and receive, and what forward hands to
backward count for what they are. The user holds the outputs, and gradients stay, until the step's end. Not counted: what a kernel uses
inside one op.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netmind_autopar.costs.compute import FREE, short_name
from netmind_autopar.costs.memory import optimizer_states
from netmind_autopar.ir.local import resolve
from netmind_autopar.ir.plan import Memory, Plan
from netmind_autopar.ir.program import Program, is_getitem, tensor_args
from netmind_autopar.ir.spec import Spec, local_bytes, local_shape, parse_spec
from netmind_autopar.passes.reuse import Reuse, reuse
from netmind_autopar.runtime.collectives import BUCKETS, MOVES, STARTS, Stage, bucket_stage, stage, wait
from netmind_autopar.runtime.offload import MARKS, settle


class Storages(TorchDispatchMode):
    """Counts the bytes of storages that ops make while it is active: `now`, `peak`, and the op at the peak.

    A storage counts until no tensor holds it. `made[key]` is its size, `born` and `died` the positions of the ops meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.step = self.peak_step = 0
        self.size: list[int] = []
        self.born: list[int] = []
        self.died: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.sending = False  # a move or a bucket runs
        self.sent: set[int] = set()  # storages that are there for one alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.step += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):  # whose local tensor is counted for itself
                self.add(tensor)
        if self.now > self.peak:
            self.peak, self.peak_step = self.now, self.step
        return out

    def add(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which is counted from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            number = self.known[key] = len(self.size)
            self.size.append(storage.nbytes())
            self.sent |= {number} if self.sending else set()
            self.born.append(self.step)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key, number).atexit = False
        return self.known[key]

    def ignore(self, tensor: Tensor) -> None:
        """Count this tensor's storage as nothing: it is somebody else's."""
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = -1
        weakref.finalize(storage, self.known.pop, storage._cdata, None).atexit = False

    def _drop(self, key: int, number: int) -> None:
        self.now -= self.size[number]
        self.died[number] = self.step
        del self.known[key]

    def alive(self, step: int) -> Iterator[int]:
        """The storages that were alive just after the op at `step`."""
        return (n for n, born in enumerate(self.born) if born <= step and self.died.get(n, math.inf) >= step)


@dataclass(frozen=True)
class _Walk:
    program: Program
    sizes: tuple[int, ...]
    coord: tuple[int, ...]
    storages: Storages
    reuse: Reuse

    def run(self, nodes: Sequence[fx.Node], env: dict[fx.Node, Any], keep: set[fx.Node]) -> None:
        """Run `nodes`, dropping every name after its last use unless it is in `keep`."""
        last = {arg: node for node in nodes for arg in tensor_args(node)}
        dead: dict[fx.Node, list[fx.Node]] = {}
        for arg, node in last.items():
            dead.setdefault(node, []).append(arg)
        for node in nodes:
            self.storages.sending = node.target in (*MOVES, *BUCKETS, wait)
            env[node] = self.value(node, env)
            if self.storages.sending and node.target not in STARTS and not self.gathers(node):
                self.storages.sent -= {self.storages.add(t) for t in tree_leaves(env[node])}  # a result like any other
            for arg in (*dead.get(node, ()), *(() if node in last else (node,))):
                if arg not in keep:
                    env.pop(arg, None)

    def gathers(self, node: fx.Node) -> bool:
        """Whether a move, or the wait for one, makes a parameter larger, or a view or a cast of one."""
        at, sent = node, []
        while at.op == "call_function" and (at.target in (*MOVES, wait) or short_name(at) in {*FREE, "_to_copy"}):
            sent += [at.args[1]] if at.target in MOVES else []
            at = tensor_args(at)[0]
        roles = {i.node: i.role for i in self.program.inputs}
        return roles.get(at.name) == "param" and any(kind == "all_gather" for kind in sent)

    def value(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return _empty(self.program.constants[str(node.target)])
        if is_getitem(node):
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if node.target is wait:
            return env[node.args[0]].wait()  # type: ignore[index]
        if node.target is settle:  # it lies elsewhere
            return torch.empty(0, device="meta")
        if node.target in MOVES or node.target in BUCKETS:
            flight = (self.move if node.target in MOVES else self.bucket)(node, env)
            return flight if node.target in STARTS else flight.wait()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        args, kwargs = resolve((args, kwargs), self.sizes, self.coord)
        target, written = self.reuse.instead.get(node, (node.target, None))
        if node.target not in MARKS and any(a.name == "device" for a in target._schema.arguments):  # type: ignore[union-attr]
            kwargs = {**kwargs, "device": "meta"}
        if written:
            kwargs = {**kwargs, written: env[self.reuse.over[node]]}
        return target(*args, **kwargs)  # type: ignore[operator]

    def move(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> _Flight:
        x, kind, axis, before, after = node.args
        step = stage(kind, axis, before, after, self.sizes, self.coord)  # type: ignore[arg-type]
        packed = step.pack(env[x])  # type: ignore[index]
        if node in self.reuse.within:
            return _Flight(step.unpack, packed)
        if step.wire is None:
            return _Flight(step.unpack, packed)
        return _Flight(step.unpack, _carried(step, packed, self.sizes), None if step.wire == "all_reduce" else packed)

    def bucket(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> _Flight:
        tensors, axis, op = node.args
        shapes = tuple(local_shape(parse_spec(s), self.sizes, self.coord) for s in node.meta["specs"])
        step, unbundle = bucket_stage(shapes, axis, op)  # type: ignore[arg-type]
        return _Flight(unbundle, _carried(step, step.pack([env[t] for t in tensors]), self.sizes))  # type: ignore[union-attr, index]


class _Flight:
    """A collective on its way: what it fills, and what it reads (an all-reduce reads a copy, in which it reduces)."""

    def __init__(self, unpack: Callable[[Tensor], Any], fills: Tensor, reads: Tensor | None = None) -> None:
        self.unpack, self.fills, self.reads = unpack, fills, reads

    def wait(self) -> Any:
        unpack, fills, self.fills, self.reads = self.unpack, self.fills, None, None  # type: ignore[assignment]
        return unpack(fills)


def _carried(step: Stage, packed: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """What a wire gives back: a new tensor, or the packed one, reduced in place."""
    if step.fresh:
        return packed
    n = sizes[step.axis]
    size = {"all_gather": packed.numel() * n, "reduce_scatter": packed.numel() // n, "all_to_all": sum(step.receive)}
    return packed.new_empty(packed.shape if step.wire == "all_reduce" else (size[str(step.wire)],))


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="meta")


def lowered_peak(
    program: Program, plan: Plan, coord: tuple[int, ...] | None = None, stowed: Collection[str] = (), over: bool = True
) -> Memory:
    """Bytes at the peak of a lowered program by category, on the device at `coord` (the first, and fullest, when None).

    stowed: the placeholders of parameters that wait elsewhere. over: ops write over their operands where they may, as the emitted code
    does; else each takes new memory, as the planner counts it. `sum(...)` of the fields is the peak. Independent of the solver: only the
    program, its specs and the optimizer's state count.
    """
    at = coord or (0,) * len(plan.sizes)
    storages = Storages()
    env: dict[fx.Node, Any] = {}
    tensors: dict[str, Tensor] = {}
    nodes = {node.name: node for node in program.graph.nodes}
    ends = tensor_args(next(n for n in program.graph.nodes if n.op == "output"))
    results = {n for n, o in zip(ends, program.outputs, strict=True) if o.role == "output"}
    grads = {n for n, o in zip(ends, program.outputs, strict=True) if o.role == "grad"}
    phases = [
        [n for n in program.graph.nodes if n.op in ("call_function", "get_attr") and n.meta["phase"] == phase]
        for phase in ("forward", "backward")
    ]
    walk = _Walk(program, plan.sizes, at, storages, reuse([*phases[0], *phases[1]], ends) if over else Reuse())
    saved = {arg for node in phases[1] for arg in tensor_args(node)} | grads
    for item in program.inputs:
        spec = program.specs[item.node]
        assert isinstance(spec, Spec)
        tensors[item.node] = torch.empty(local_shape(spec, plan.sizes, at), dtype=spec.dtype, device="meta")
        if item.role != "tangent":
            storages.ignore(tensors[item.node])
            env[nodes[item.node]] = tensors[item.node]
    with torch.no_grad(), storages:
        walk.run(phases[0], env, saved | set(ends))
        env = {n: env[n] for n in (*results, *saved) if n in env}
        boundary = storages.step
        for item in program.inputs:
            if item.role == "tangent":
                storages.add(env.setdefault(nodes[item.node], tensors[item.node]))
        tangents = {nodes[i.node] for i in program.inputs if i.role == "tangent"}
        walk.run(phases[1], env, results | grads | tangents)
    made = _categories(storages, boundary, [env[n] for n in grads if n in env])
    return _with_residents(program, plan, made, stowed)


def _categories(storages: Storages, boundary: int, grads: Sequence[Tensor]) -> dict[str, int]:
    """Bytes at the peak: gradients, communication buffers, activations (made in forward, alive in backward) and transients."""
    final = {storages.add(t) for t in grads}
    out = dict.fromkeys(Memory.model_fields, 0)
    for n in storages.alive(storages.peak_step):
        kept = storages.born[n] <= boundary < storages.died.get(n, math.inf)
        name = "communication_buffers" if n in storages.sent else "activations" if kept else "transients"
        out["gradients" if n in final else name] += storages.size[n]
    return out


def _with_residents(program: Program, plan: Plan, out: dict[str, int], stowed: Collection[str]) -> Memory:
    """Add what always lives: parameters, buffers and constants, optimizer state, inputs."""
    states = optimizer_states(plan.optimizer)
    trained = {o.name for o in program.outputs if o.role == "grad"}
    for item in program.inputs:
        spec = program.specs[item.node]
        assert isinstance(spec, Spec)
        size = local_bytes(spec, plan.sizes) * (item.node not in stowed)
        if item.role == "param":
            out["parameters"] += size
            out["optimizer"] += states * size * (item.name in trained)
        elif item.role != "tangent":
            out["parameters" if item.role == "buffer" else "inputs"] += size
    return Memory(**out)
