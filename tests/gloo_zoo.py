"""Models of the zoo in real processes, three steps of SGD with momentum, every rank compared with one process that trains alone.

The one process is eager PyTorch on rank 0. A model that drops out is compared with its captured graph on one device, under the
same seeds: eager's dropout draws other numbers. What libraries compute in float32 is float64 here, on both sides (`widen.py`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from random_plans import random_plan
from random_saving import with_saving
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from widen import float32_is_float64
from zoo import ZOO

from netmind_autopar import autoparallelize
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime import simulate
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.signature import flatten, sample_call
from netmind_autopar.verification import relative_error

STEPS = 3
RATE, MOMENTUM = 0.02, 0.9
RATES = {"resnet14": 1e-4}  # normalised over few images, larger steps leave the range where float64 is a judge


def train(case: dict) -> dict[str, float]:
    """The worst relative error of losses, and of parameters and buffers after the last step, over all ranks."""
    entry = ZOO[case["zoo"]]
    start = time.process_time()
    model, inputs = entry.make(torch.float64)  # imports the library's modules, which are then widened
    with float32_is_float64():
        alone = copy.deepcopy(model) if dist.get_rank() == 0 else None
        if dist.get_rank():
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)  # rank 0's weights must win
        sizes = tuple(case["mesh"])
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))
        prices = {"random_costs": case["random_costs"], "gap": 0.05, "time_limit": 20.0} if "random_costs" in case else {}
        if "saving" in case:
            prices = {"plan": _saving(model, inputs, case)}
        pm = autoparallelize(model, inputs, mesh, cluster="h100-sxm", **prices, **entry.options)
        losses = _train(pm, inputs, case["zoo"])
        random = any(i.role == "seed" for i in pm._executable.inputs)
        expected = [_alone(alone, inputs, case["zoo"], random)] if alone is not None else [None]
    dist.broadcast_object_list(expected, src=0)
    seconds = time.process_time() - start
    errors = _errors(expected[0], losses, pm)
    worst = torch.tensor([*errors.values(), seconds], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip((*errors, "cpu_s"), worst.tolist(), strict=True))


def _saving(model: nn.Module, inputs: Any, case: dict) -> Plan:
    """An odd plan that recomputes, gathers again and offloads about half of all that it could."""
    program = capture(model, inputs, **ZOO[case["zoo"]].options)
    rules = bind_program(program)
    plan = random_plan(program, rules, ",".join(f"{a}={n}" for a, n in zip("abc", case["mesh"], strict=False)), case["saving"])
    return with_saving(plan, program, rules, case["saving"])


def _train(module: nn.Module, inputs: Any, name: str) -> list[Tensor]:
    """The losses of three steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=RATES.get(name, RATE), momentum=MOMENTUM)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = _loss(_call(module, inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _loss(result: Any) -> Tensor:
    """The losses that a model returns; of one that returns none, the mean square of what it returns."""
    leaves = [t for _, t in flatten(result)[1] if t.requires_grad and t.is_floating_point()]
    scalars: list[Tensor] = [t for t in leaves if not t.shape]
    if scalars:
        return torch.stack(scalars).sum()
    return torch.stack([_full(t).square().mean() for t in leaves]).sum()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _alone(model: nn.Module, inputs: Any, name: str, random: bool) -> dict[str, Any]:
    """What one process gets: losses, parameters and buffers after three steps."""
    trained = _Captured(model, capture(model, inputs, **ZOO[name].options), inputs) if random else model
    losses = _train(trained, inputs, name)
    return {"losses": losses, "parameters": _named(model.named_parameters()), "buffers": _named(model.named_buffers())}


def _named(tensors: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors}


class _Captured(nn.Module):
    """The captured graph as a module, on one device: its losses are those of the graph, its gradients too."""

    def __init__(self, model: nn.Module, program: Program, inputs: Any) -> None:
        super().__init__()
        self.model, self.program = model, program
        call = sample_call(model.forward, inputs)
        self.users = program.signature.pack(*call.arguments([t for _, t in call.leaves]))

    def forward(self, *_: Any, **__: Any) -> Any:
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        leaves = _Graph.apply(self, *trained.values())
        return {str(k): leaf for k, leaf in enumerate(leaves)}

    def compute(self) -> list[Tensor]:
        """Every result of the graph for the present parameters, a seed that torch's generator draws, and tangents of one."""
        state: dict[str, Tensor] = {}
        for item in self.program.inputs:
            if item.role in ("param", "buffer"):
                owner, _, leaf = item.name.rpartition(".")
                state[item.node] = getattr(self.model.get_submodule(owner), leaf).detach()
            elif item.role == "input":
                state[item.node] = self.users[item.index].detach()
            elif item.role == "seed":
                state[item.node] = torch.randint(0, 2**62, (), dtype=torch.int64)
            else:
                state[item.node] = torch.ones((), dtype=self.program.node(item.node).meta["val"].dtype)
        return simulate.reference(self.program, state)


class _Graph(torch.autograd.Function):
    """Losses forward; the gradients that the graph made with tangents of one backward."""

    @staticmethod
    def forward(ctx: Any, module: _Captured, *parameters: Tensor) -> tuple[Tensor, ...]:
        program = module.program
        assert all(not program.node(i.node).meta["val"].shape for i in program.inputs if i.role == "tangent"), "needs a loss"
        with torch.no_grad():
            results = module.compute()
        grads, losses = {}, []
        carrying = {i.name for i in program.inputs if i.role == "tangent"}
        for out, value in zip(program.outputs, results, strict=True):
            if out.role == "grad" and out.index < 0:
                grads[out.name] = value
            elif out.role == "output" and out.name in carrying:
                losses.append(value.clone())
            elif out.role == "mutation":
                owner, _, leaf = out.name.rpartition(".")
                getattr(module.model.get_submodule(owner), leaf).copy_(value)
        names = [n for n, p in module.model.named_parameters() if p.requires_grad]
        ctx.grads = [grads.get(n) for n in names]
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


def _errors(expected: dict[str, Any], losses: Sequence[Tensor], pm: nn.Module) -> dict[str, float]:
    """This rank's errors. A parameter or buffer that one side lacks counts as wrong without bound.

    One that starts at zero and only gets rounding for a gradient (the bias of attention's keys) is judged beside the largest.
    """
    found = {"parameters": {n: _full(p.detach()) for n, p in pm.named_parameters()}, "buffers": _named(pm.named_buffers())}
    errors = {"losses": max(relative_error(a, _full(b)) for a, b in zip(expected["losses"], losses, strict=True))}
    for kind, mine in found.items():
        theirs = expected[kind]
        same = theirs.keys() == mine.keys()
        largest = max((float(t.abs().max()) for t in theirs.values() if t.is_floating_point()), default=0.0)
        errors[kind] = max((relative_error(theirs[n], mine[n], largest) for n in theirs), default=0.0) if same else float("inf")
    return errors
