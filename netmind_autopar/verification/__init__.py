"""Is a plan exact? Run all of its ranks in lockstep in one process and compare with the original model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..api import lower_plan
from ..arguments import check_model
from ..ir.errors import InputError
from ..ir.mesh import coordinates
from ..ir.plan import Plan
from ..ir.program import Output, Program, is_getitem, source, values
from ..ir.spec import Spec, shard, unshard
from ..runtime import simulate
from ..runtime.collectives import bucket, move
from ..tracer.capture import capture
from ..tracer.signature import flatten, sample_call

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
VANISHING = 0.1  # times the tolerance: a gradient below this share of the step's largest is rounding noise, and judged against it

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """One comparison: `error` is max |a − b| relative to the largest magnitude of what it is judged against."""

    step: int
    kind: str  # "output", "gradient" or "buffer"
    name: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class Report:
    """What `verify` found. `first_difference` names the first operation that differs and the user's line, or is ""."""

    rows: tuple[Row, ...]
    first_difference: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.error <= row.tolerance for row in self.rows)

    @property
    def max_rel_error(self) -> float:
        return max((row.error for row in self.rows), default=float("nan"))


def verify(
    model: nn.Module,
    sample_inputs: Any,
    plan: Plan,
    *,
    steps: int = 1,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    differentiable: Sequence[str] | None = None,
) -> Report:
    """Compare a plan with the original: every output, gradient and buffer, over `steps` training steps.

    model, sample_inputs: as given to `plan`, with real values. optimizer: makes a torch optimizer from parameters, such as
    `lambda p: torch.optim.AdamW(p)`; without one the parameters stay as they are. Tolerances: 1e-9 in float64, 1e-4 in float32.
    A model that drops out is compared with its captured graph under the same random numbers. Raises PlanError when the plan was
    made for another model or mesh, InputError when the model has no values.
    """
    check_model(model)
    program = capture(model, sample_inputs, outputs=outputs, differentiable=differentiable)
    lowered = lower_plan(program, plan)
    return compare(model, sample_inputs, program, lowered, plan, steps=steps, optimizer=optimizer, seed=seed)


def compare(
    model: nn.Module,
    sample_inputs: Any,
    program: Program,
    lowered: Program,
    plan: Plan,
    *,
    steps: int = 1,
    optimizer: Optimizer | None = None,
    seed: int = 0,
) -> Report:
    """`verify` for a program that is captured and lowered already.

    A model in float64 that computes in float32 in places (Hugging Face's norms and losses do) differs from itself by float32's
    rounding as soon as a sum is split. Its ranks are therefore compared twice: with the original within float32's tolerance, and
    once more with those places in float64 too, against the captured graph, within float64's.
    """
    weak = weakest(program)
    side = _Sides(model, sample_inputs, program, lowered, plan.sizes, optimizer)
    exact = side if weak is None else _Sides(model, sample_inputs, promoted(program), promoted(lowered), plan.sizes, None)
    rows: list[Row] = []
    for step in range(steps):
        state = side.snapshot(seed + step)
        expected, found = side.reference(state), side.lockstep(state)
        rows += _compare(side, step, expected, found, weak)
        if weak is not None:
            rows += _compare(exact, step, exact.captured(state), exact.lockstep(state, fresh=True), None)
        if any(not row.error <= row.tolerance for row in rows):
            return Report(tuple(rows), exact.first_difference(state))
        side.advance(expected, found)
    return Report(tuple(rows))


def weakest(program: Program) -> torch.dtype | None:
    """The least precise float dtype inside a program whose parameters are float64; None when there is none."""
    if not any(program.node(i.node).meta["val"].dtype == torch.float64 for i in program.inputs if i.role == "param"):
        return None
    made = [v for node in program.graph.nodes if "val" in node.meta for v in values(node) if v is not None]
    found = {v.dtype for v in made if v.is_floating_point()}
    return max(found - {torch.float64}, key=lambda d: torch.finfo(d).eps, default=None)


def promoted(program: Program) -> Program:
    """The same computation with every conversion to a smaller float replaced by one to float64."""
    small = (torch.float32, torch.bfloat16, torch.float16)
    with program.edit() as new:
        for node in new.graph.nodes:
            if node.op == "call_function":
                wide = fx.node.map_aggregate((node.args, node.kwargs), lambda a: torch.float64 if a in small else a)
                node.args, node.kwargs = wide
    constants = {k: t.double() if t.dtype in small else t for k, t in program.constants.items()}
    return replace(new.program, constants=constants)


class _Sides:
    """The original model and the ranks of its plan, trained side by side."""

    def __init__(
        self, model: nn.Module, sample_inputs: Any, program: Program, lowered: Program, sizes: tuple[int, ...], optimizer: Optimizer | None
    ) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise InputError("the model lies on the meta device and has no values", try_="build it on the CPU to verify a plan")
        self.program, self.lowered, self.sizes = program, lowered, sizes
        self.model = copy.deepcopy(model)
        call = sample_call(self.model.forward, sample_inputs)
        self.arguments = call.arguments([t.detach().clone().requires_grad_(t.requires_grad) for _, t in call.leaves])
        self.users = program.signature.pack(*self.arguments)
        self.specs: dict[str, Spec] = {i.node: lowered.specs[i.node] for i in lowered.inputs}  # type: ignore[misc]
        self.coords = tuple(coordinates(sizes))
        self.locals = {i.node: self._split(i.node, self._original(i.name)) for i in program.inputs if i.role in ("param", "buffer")}
        self.nodes = {(i.role, i.name): i.node for i in program.inputs}
        self.optimizers: list[torch.optim.Optimizer] = []
        if optimizer:
            trained = [i for i in program.inputs if i.role == "param" and self._original(i.name).requires_grad]
            self.optimizers = [optimizer([self.locals[i.node][r] for i in trained]) for r in range(len(self.coords))]
            self.optimizers.append(optimizer([self._original(i.name) for i in trained]))

    def _original(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf)

    def _split(self, node: str, value: Tensor) -> list[Tensor]:
        return [shard(value.detach(), self.specs[node], self.sizes, c).clone() for c in self.coords]

    def snapshot(self, seed: int) -> dict[str, Tensor]:
        """Global value of every placeholder at the start of a step."""
        noise = torch.Generator().manual_seed(seed)
        state: dict[str, Tensor] = {}
        for item in self.program.inputs:
            value = self.program.node(item.node).meta["val"]
            if item.role in ("param", "buffer"):
                state[item.node] = self._original(item.name).detach().clone()
            elif item.role == "input":
                state[item.node] = self.users[item.index].detach()
            elif item.role == "seed":
                state[item.node] = torch.randint(0, 2**62, (), generator=noise)
            else:
                state[item.node] = (
                    torch.ones((), dtype=value.dtype) if not value.shape else torch.randn(value.shape, generator=noise, dtype=value.dtype)
                )
        return state

    def reference(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The program's results as the original model computes them (the captured graph, where random numbers are drawn)."""
        if any(i.role == "seed" for i in self.program.inputs):
            return self.captured(state)
        args, kwargs = self.arguments
        for user in self.users:
            user.grad = None
        result = self.model(*args, **kwargs)
        leaves = {name or "output": leaf for name, leaf in flatten(result)[1]}
        tangents = [(leaves[i.name], state[i.node]) for i in self.program.inputs if i.role == "tangent"]
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward([t for t, _ in tangents], [g for _, g in tangents])
        return [self._result(out, leaves) for out in self.program.outputs]

    def captured(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The program's results as the captured graph computes them on one device."""
        with torch.no_grad():
            return simulate.reference(self.program, {k: _like(v, self.program.node(k)) for k, v in state.items()})

    def _result(self, out: Output, leaves: Mapping[str, Tensor]) -> Tensor:
        if out.role == "output":
            return leaves[out.name].detach()
        if out.role == "mutation":
            return self._original(out.name).detach().clone()
        owner = self._original(out.name) if out.index < 0 else self.users[out.index]
        return torch.zeros_like(owner) if owner.grad is None else owner.grad.detach().clone()

    def lockstep(self, state: Mapping[str, Tensor], observe: simulate.Observer | None = None, *, fresh: bool = False) -> list[list[Tensor]]:
        """The program's results as every rank computes them, local tensors in rank order. `fresh` splits `state` anew."""
        kept = {} if fresh else self.locals
        inputs = {name: kept.get(name) or self._split(name, value) for name, value in state.items()}
        with torch.no_grad():
            return simulate.run(self.lowered, self.sizes, inputs, observe)

    def advance(self, expected: Sequence[Tensor], found: Sequence[Sequence[Tensor]]) -> None:
        """New buffers and, with an optimizer, new parameters on both sides, each from its own results."""
        random = any(i.role == "seed" for i in self.program.inputs)
        for out, want, have in zip(self.program.outputs, expected, found, strict=True):
            if out.role == "mutation":
                self.locals[self.nodes["buffer", out.name]] = [t.clone() for t in have]
                if random:
                    self._original(out.name).data.copy_(want)
            elif out.role == "grad" and out.index < 0:
                for local, grad in zip(self.locals[self.nodes["param", out.name]], have, strict=True):
                    local.grad = grad.detach().reshape(local.shape).clone()
                if random:
                    self._original(out.name).grad = want.clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def first_difference(self, state: Mapping[str, Tensor]) -> str:
        """The first op, in the order of the graph, whose value differs from the captured graph's, and the user's line."""
        truth: dict[str, Any] = {}
        state = {k: _like(v, self.program.node(k)) for k, v in state.items()}
        with torch.no_grad():
            simulate.reference(self.program, state, lambda node, value: truth.__setitem__(node.name, value))
        found: list[str] = []

        def observe(node: fx.Node, locals_: simulate.PerRank) -> None:
            if not found and (text := self._differs(node, locals_, truth, state)):
                found.append(text)

        self.lockstep(state, observe, fresh=True)
        return found[0] if found else "no operation: the captured graph itself differs from the model"

    def _differs(self, node: fx.Node, locals_: simulate.PerRank, truth: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
        if node.op != "call_function" or is_getitem(node) or node.target is bucket:
            return ""
        origin, index = node, None
        while origin.target is move:
            origin = origin.args[0]
        if node.target is move:
            origin, index = source(origin)
        value = truth.get(origin.name, state.get(origin.name))
        if value is None:  # made by a pass: a copy in dense memory
            return ""
        if index is not None and isinstance(value, (tuple, list)):
            value = value[index]
        specs = self.lowered.specs[node.name]
        pairs = (
            [(value, specs, locals_)]
            if isinstance(specs, Spec)
            else [
                (v, s, [t[k] for t in locals_])
                for k, (v, s) in enumerate(zip(value, specs, strict=True))
                if s is not None and v is not None
            ]
        )
        for want, spec, parts in pairs:
            error = relative_error(want, unshard(parts, spec, self.sizes))
            if not error <= tolerance(want.dtype) * 10:
                what = f"{node.args[1]} over axis {node.args[2]} of " if node.target is move else ""
                return f"{what}{origin.name} ({spec}), relative error {error:.2g}, at {node.meta.get('where') or 'an unknown line'}"
        return ""


def _compare(side: _Sides, step: int, expected: Sequence[Tensor], found: Sequence[Sequence[Tensor]], weak: torch.dtype | None) -> list[Row]:
    kinds = {"output": "output", "grad": "gradient", "mutation": "buffer"}
    outputs = side.program.outputs
    largest = max((_size(w) for o, w in zip(outputs, expected, strict=True) if o.role == "grad"), default=0.0)
    rows: list[Row] = []
    for out, spec, want, have in zip(outputs, side.lowered.expects["output"], expected, found, strict=True):
        error = relative_error(want, unshard(have, spec, side.sizes), largest if out.role == "grad" else 0.0)
        rows.append(Row(step, kinds[out.role], out.name, error, max(tolerance(want.dtype), tolerance(weak) if weak else 0.0)))
    return rows


def _like(value: Tensor, node: fx.Node) -> Tensor:
    """Placeholders keep their dtype: only conversions inside the graph are promoted."""
    return value.to(node.meta["val"].dtype)


def relative_error(want: Tensor, have: Tensor, largest: float = 0.0) -> float:
    """max |want − have| / max |want|; a `want` that vanishes beside `largest` is judged against that. Not a number fails."""
    if want.shape != have.shape or want.dtype != have.dtype:
        return float("inf")
    if not want.numel() or torch.equal(want, have):
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return float("inf")
    scale = _size(want)
    if scale < VANISHING * tolerance(want.dtype) * largest:
        scale = largest
    difference = float((want - have).abs().max())
    return difference / scale if scale else difference


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error by which results of this dtype may differ; integers must be equal."""
    return TOLERANCE.get(dtype, 0.0)


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() and tensor.dtype != torch.bool else 0.0
