"""The original model and the ranks of its plan, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import InputError
from ..ir.mesh import coordinates
from ..ir.program import Output, Program, values
from ..ir.spec import Partial, Replicate, Spec, shard
from ..runtime import simulate
from ..tracer.signature import flatten, sample_call
from .perturb import noisy, noisy_input, varied_indices

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
State = Mapping[str, Tensor]

_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64, torch.complex64: torch.complex128}


def weakest(program: Program) -> torch.dtype | None:
    """The least precise float dtype inside a program; None when all of it is float64."""
    made = [v for node in program.graph.nodes if "val" in node.meta for v in values(node) if v is not None]
    found = {v.dtype for v in made if v.is_floating_point()} - {torch.float64}
    return max(found, key=lambda d: torch.finfo(d).eps, default=None)


def promoted(program: Program) -> Program:
    """The same computation with every conversion to a smaller float replaced by one to float64."""
    with program.edit() as new:
        for node in new.graph.nodes:
            if node.op == "call_function":
                wide = fx.node.map_aggregate((node.args, node.kwargs), lambda a: _WIDER[a] if a in _DTYPES else a)
                node.args, node.kwargs = wide
    return replace(new.program, constants={k: widened(t) for k, t in program.constants.items()})


class _Dtypes:
    """Is something one of the dtypes to widen? A test that asks no node and no tensor whether it is equal to one."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, torch.dtype) and value in _WIDER


_DTYPES = _Dtypes()


def widened(value: Tensor) -> Tensor:
    """A float tensor in float64, a complex one in complex128, another as it is."""
    return value.to(_WIDER.get(value.dtype, value.dtype))


class Sides:
    """Both computations and their states. `perturb` moves parameters, buffers and inputs of both off the values that hide bugs.

    stand_in: the captured graph on one device is the reference, since the model itself draws other random numbers, or computes in
    other dtypes than the policy says.
    """

    def __init__(
        self,
        model: nn.Module,
        sample_inputs: Any,
        program: Program,
        lowered: Program,
        sizes: tuple[int, ...],
        optimizer: Optimizer | None = None,
        *,
        perturb: float = 0.0,
        seed: int = 0,
    ) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise InputError("the model lies on the meta device and has no values", try_="build it on the CPU to verify a plan")
        self.program, self.lowered, self.sizes = program, lowered, sizes
        self.coords = tuple(coordinates(sizes))
        self.model = copy.deepcopy(model)
        self.call = call = sample_call(self.model.forward, sample_inputs)
        trained = program.mode == "training"
        given = [t.detach().clone().requires_grad_(t.requires_grad and trained) for _, t in call.leaves]
        self.arguments = call.arguments(given)
        if perturb:
            self._perturb(call, given, perturb, seed)
        self.users = program.signature.pack(*self.arguments)
        self.specs: dict[str, Spec] = {i.node: lowered.specs[i.node] for i in lowered.inputs}  # type: ignore[misc]
        self.locals = {i.node: self.split(i.node, self.original(i.name)) for i in program.inputs if i.role in ("param", "buffer")}
        self.nodes = {(i.role, i.name): i.node for i in program.inputs}
        self.stand_in = program.precision is not None or any(i.role == "seed" for i in program.inputs)
        self.scale = 1024.0 if program.precision is not None and program.precision.dtype is torch.float16 else 1.0
        self.optimizers: list[torch.optim.Optimizer] = []
        if optimizer:
            tuned = [i for i in program.inputs if i.role == "param" and self.original(i.name).requires_grad]
            self.optimizers = [optimizer([self.locals[i.node][r] for i in tuned]) for r in range(len(self.coords))]
            self.optimizers.append(optimizer([self.original(i.name) for i in tuned]))

    def _perturb(self, call: Any, given: list[Tensor], amount: float, seed: int) -> None:
        mutated = {o.name for o in self.program.outputs if o.role == "mutation"}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(noisy(p, amount, seed, name))
            for name, b in self.model.named_buffers():
                b.copy_(noisy(b, amount, seed, name, mask_like=name not in mutated))
        users = {id(t): i for t, i in zip(self.program.signature.pack(*self.arguments), self._user_inputs(), strict=True)}
        fresh = []
        for (path, _), value in zip(call.leaves, given, strict=True):
            moved = noisy_input(value.detach(), amount, seed, path)
            if id(value) in users:
                moved = varied_indices(moved, self.program, users[id(value)], seed, path)
            fresh.append(moved.detach().clone().requires_grad_(value.requires_grad))
        self.arguments = call.arguments(fresh)

    def _user_inputs(self) -> list[str]:
        """Nodes of the user's tensors, in the order of `signature.pack`."""
        return [i.node for i in sorted((i for i in self.program.inputs if i.role == "input"), key=lambda i: i.index)]

    def original(self, name: str) -> Tensor:
        """The parameter or buffer of the copy of the model."""
        path, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf)

    def split(self, node: str, value: Tensor) -> list[Tensor]:
        return [shard(value.detach(), self.specs[node], self.sizes, c).clone() for c in self.coords]

    def snapshot(self, seed: int) -> dict[str, Tensor]:
        """Global value of every placeholder at the start of a step."""
        noise = torch.Generator().manual_seed(seed)
        state: dict[str, Tensor] = {}
        for item in self.program.inputs:
            value = self.program.node(item.node).meta["val"]
            if item.role in ("param", "buffer"):
                state[item.node] = self.original(item.name).detach().clone()
            elif item.role == "input":
                state[item.node] = self.users[item.index].detach().clone()  # in inference the model may write into it
            elif item.role == "seed":
                state[item.node] = torch.randint(0, 2**62, (), generator=noise)
            else:  # a scalar's tangent is near one and not one, which would hide a factor too many; float16 is scaled, as it is trained
                drawn = torch.randn(value.shape, generator=noise, dtype=torch.float64)
                state[item.node] = self.scale * (drawn if value.shape else 1 + 0.1 * drawn).to(value.dtype)
        return state

    def reference(self, state: State) -> list[Tensor]:
        """The program's results as the original model computes them (the captured graph, where that stands in for it)."""
        if self.stand_in:
            return captured(self.program, state)
        args, kwargs = self.call.arguments(list(self.users))  # made anew: a cache among them grows as the model runs
        for user in self.users:
            user.grad = None
        result = self.model(*args, **kwargs)
        leaves = {name or "output": leaf for name, leaf in flatten(result)[1]}
        tangents = [(leaves[i.name], state[i.node]) for i in self.program.inputs if i.role == "tangent"]
        self.model.zero_grad(set_to_none=True)
        if tangents:
            torch.autograd.backward([t for t, _ in tangents], [g for _, g in tangents])
        return [self._result(out, leaves) for out in self.program.outputs]

    def _result(self, out: Output, leaves: Mapping[str, Tensor]) -> Tensor:
        if out.role == "output":
            return leaves[out.name].detach()
        if out.role == "mutation":
            return (self.original(out.name) if out.index < 0 else self.users[out.index]).detach().clone()
        owner = self.original(out.name) if out.index < 0 else self.users[out.index]
        return torch.zeros_like(owner) if owner.grad is None else owner.grad.detach().clone()

    def ungiven(self) -> list[str]:
        """Parameters to which the original gives a gradient and the program none, or the other way round; after `reference`."""
        if self.stand_in:
            return []
        given = {self.program.tied.get(n, n) for n, p in self.model.named_parameters() if p.grad is not None}
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        found = {o.name for o in self.lowered.outputs if o.role == "grad" and o.index < 0}
        return sorted((given - found) | (found - trained))

    def unkept(self, state: State) -> list[str]:
        """Buffers that the original changed and of which the program hands out no new value; after `reference`."""
        if self.stand_in:
            return []
        kept = {o.name for o in self.program.outputs if o.role == "mutation"}
        held = [(i.name, state[i.node]) for i in self.program.inputs if i.role == "buffer" and i.name not in kept]
        return [name for name, before in held if not _same(before, self.original(name))]

    def lockstep(self, state: State, observe: simulate.Observer | None = None) -> list[list[Tensor]]:
        """The program's results as every rank computes them from its own parameters, local tensors in rank order."""
        with torch.no_grad():
            return simulate.run(self.lowered, self.sizes, self.dealt(state), observe)

    def dealt(self, state: State) -> dict[str, list[Tensor]]:
        """The local tensors of every placeholder, in rank order: parameters and buffers as the ranks have them by now."""
        return {name: self.locals.get(name) or self.split(name, value) for name, value in state.items()}

    def advance(self, expected: Sequence[Tensor], found: Sequence[Sequence[Tensor]]) -> None:
        """New buffers and, with an optimizer, new parameters on both sides, each from its own results."""
        for out, want, have in zip(self.program.outputs, expected, found, strict=True):
            if out.role == "mutation" and out.index >= 0:
                self.users[out.index].copy_(want)
            elif out.role == "mutation":
                self.locals[self.nodes["buffer", out.name]] = [t.clone() for t in have]
                if self.stand_in:
                    self.original(out.name).data.copy_(want)
            elif out.role == "grad" and out.index < 0:
                for local, grad in zip(self.locals[self.nodes["param", out.name]], have, strict=True):
                    local.grad = grad.detach().reshape(local.shape).clone()
                if self.stand_in:
                    self.original(out.name).grad = want.clone()
        for optimizer in self.optimizers:
            optimizer.step()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def captured(program: Program, state: State) -> list[Tensor]:
    """The program's results as the captured graph computes them on one device."""
    with torch.no_grad():
        return simulate.reference(program, dict(state))


def ranks(lowered: Program, sizes: tuple[int, ...], state: State, observe: simulate.Observer | None = None) -> list[list[Tensor]]:
    """The program's results as every rank computes them from its piece of `state`."""
    pieces = {name: deal(value, lowered.specs[name], sizes) for name, value in state.items()}  # type: ignore[arg-type]
    with torch.no_grad():
        return simulate.run(lowered, sizes, pieces, observe)


def deal(value: Tensor, spec: Spec, sizes: tuple[int, ...]) -> list[Tensor]:
    """The local tensors of all ranks. Of a Partial every rank gets a term of its own, none of them zero or alike."""
    partial = [(axis, p.op) for axis, p in enumerate(spec.placements) if isinstance(p, Partial) and sizes[axis] > 1]
    out = []
    for coord in coordinates(sizes):
        piece = shard(
            value.detach(), spec.with_placements(Replicate() if isinstance(p, Partial) else p for p in spec.placements), sizes, coord
        )
        for axis, op in partial:
            piece = _term(piece, op, coord[axis], sizes[axis])
        out.append(piece.clone())
    return out


def _term(x: Tensor, op: str, i: int, n: int) -> Tensor:
    exact = not (x.is_floating_point() or x.is_complex())
    if op != "sum":  # the last one has the maximum or minimum itself
        off = (n - 1 - i) if exact else (n - 1 - i) / n
        return x - off if op == "max" else x + off
    if exact:
        return torch.full_like(x, i) if i else x - n * (n - 1) // 2
    weights = [(-1.0) ** j * (1 + j / 4) / n for j in range(1, n)]
    return x * (weights[i - 1] if i else 1 - sum(weights))
