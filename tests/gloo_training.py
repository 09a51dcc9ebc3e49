"""What training loops do, on one process of a gloo run, compared with one device. Cases of tests/test_accumulate.py and others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import models
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from netmind_autopar import ParallelModule, Plan, autoparallelize
from netmind_autopar.optim import LAMB, LARS, GradScaler
from netmind_autopar.runtime import norms
from netmind_autopar.runtime.dtensors import torch_placements
from netmind_autopar.verification import relative_error


def mesh_of(case: dict) -> DeviceMesh:
    sizes = tuple(case["mesh"])
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def loss_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return full(result).square().mean() if result.shape else result
    return result["loss"]


def call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def part(inputs: Any, start: int, end: int) -> Any:
    return {k: v[start:end] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[start:end]


def gradient_error(pm: nn.Module, original: nn.Module) -> float:
    largest = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
    pairs = [(p.grad, full(pm.get_parameter(n).grad)) for n, p in original.named_parameters() if p.grad is not None]  # type: ignore[arg-type]
    return max(relative_error(want, have, largest) for want, have in pairs)


def accumulate(case: dict) -> dict[str, float]:
    """Four micro-steps against one step of the whole batch; bytes that both send; and the same once more, after an ordinary step."""
    count = 4
    model, inputs = getattr(models, case["model"])(batch=16)
    original = copy.deepcopy(model)
    pm = autoparallelize(model, part(inputs, 0, 4), mesh_of(case), **case["options"])
    original_loss = loss_of(call(original, inputs))
    original_loss.backward()
    found: dict[str, float] = {}

    def sent(run: Callable[[], None]) -> int:
        before = sum(pm.sent_bytes.values())
        run()
        return sum(pm.sent_bytes.values()) - before

    def steps() -> None:
        for k in range(count):
            with pm.no_sync(k < count - 1):
                (loss_of(call(pm, part(inputs, 4 * k, 4 * k + 4))) / count).backward()

    found["one step"] = sent(lambda: loss_of(call(pm, part(inputs, 0, 4))).backward())
    pm.zero_grad()
    found["sent"] = sent(steps)
    found["gradient"] = gradient_error(pm, original)
    pm.zero_grad()
    loss_of(call(pm, part(inputs, 0, 4))).backward()  # gradients that are there already
    steps()
    loss_of(call(original, part(inputs, 0, 4))).backward()
    found["same"] = gradient_error(pm, original)
    return found


class Odd(nn.Module):
    """Sizes that no axis divides, a parameter of 0 dims and one that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(7, 11), nn.LayerNorm(11), nn.Linear(11, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.down(torch.tanh(self.norm(self.up(x)))) * self.scale
        return {"loss": (z - y).square().mean()}


def odd() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Odd().double(), {"x": torch.randn(6, 7, dtype=torch.float64), "y": torch.randn(6, 5, dtype=torch.float64)}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "lamb": lambda p: LAMB(p, lr=0.05),
    "lars": lambda p: LARS(p, lr=1.0, trust=0.05),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "warm up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: (k + 1) / 4),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
}


_plans: dict[str, Plan] = {}


def planned(case: dict, model: nn.Module, inputs: Any) -> ParallelModule:
    """Cases with the same options share a plan."""
    key = json.dumps([case["model"], case["mesh"], case["options"]])
    options = {"plan": _plans[key]} if key in _plans else case["options"]
    pm = autoparallelize(model, inputs, mesh_of(case), **options)
    _plans[key] = pm.plan
    return pm


def clipped(how: str, module: nn.Module) -> Tensor:
    kind, _, norm = how.partition(" ")
    if kind == "own" and hasattr(module, "clip_grad_norm_"):
        return module.clip_grad_norm_(0.2, float(norm))  # type: ignore[operator]
    return torch.nn.utils.clip_grad_norm_(module.parameters(), 0.2, float(norm), foreach=True if kind == "foreach" else None)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    flat = [p for p in module.parameters() if p.dim() < 2]
    return [{"params": [p for p in module.parameters() if p.dim() >= 2]}, {"params": flat, "weight_decay": 0.0, "lr": 0.02}]


def loop(case: dict) -> dict[str, Any]:
    """Four steps with an optimizer, clipping and a schedule against one device: parameters, norms, and EMA of the parameters."""
    model, inputs = odd() if case["model"] == "odd" else getattr(models, case["model"])()
    original = copy.deepcopy(model)
    pm = planned(case, model, inputs)
    sides = []
    for module in (pm, original):
        optimizer = OPTIMIZERS[case["optimizer"]](groups(module))
        sides.append((module, optimizer, SCHEDULERS[case["scheduler"]](optimizer)))
    found = {"norm": 0.0, "parameter": 0.0}
    for _ in range(4):
        both = []
        for module, optimizer, scheduler in sides:
            optimizer.zero_grad()
            loss_of(call(module, inputs)).backward()
            if case["clip"]:
                both.append(float(full(clipped(case["clip"], module))))
            optimizer.step()
            scheduler.step()
        if both:
            found["norm"] = max(found["norm"], abs(both[0] - both[1]) / both[1])
    for name, p in original.named_parameters():
        found["parameter"] = max(found["parameter"], relative_error(p.detach(), full(pm.get_parameter(name).detach())))
    return found


def with_bug(case: dict) -> dict[str, Any]:
    """A case with something planted into the norms."""
    kept = norms.reduced, norms.counts_here
    if case["bug"] == "local":
        norms.reduced = lambda x, mesh, op: x  # type: ignore[assignment]
    else:
        norms.counts_here = lambda like: True  # type: ignore[assignment]
    try:
        return loop(case)
    finally:
        norms.reduced, norms.counts_here = kept


def as_rank_has_it(pm: ParallelModule, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A batch as a rank gives it: whole, or with inputs="local" its piece; as a DTensor where pieces are unequal."""
    if pm.plan.inputs == "global":
        return inputs
    specs = dict(zip((i.name for i in pm._graph.roles.users), pm._graph.roles.user_specs, strict=True))
    out = {}
    for name, value in inputs.items():
        dealt = distribute_tensor(value, pm._mesh, torch_placements(specs[name]))
        even = all(not p.is_shard() or value.shape[p.dim] % n == 0 for p, n in zip(dealt.placements, pm._mesh.shape, strict=True))
        out[name] = dealt.to_local() if even else dealt
    return out


def shapes(case: dict) -> dict[str, Any]:
    """Steps over batches of several shapes, an evaluation after each; losses and parameters against one device."""
    model, inputs = getattr(models, case["model"])()
    original = copy.deepcopy(model)
    pm = planned(case, model, inputs)
    sides = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (pm, original)]
    found = {"loss": 0.0, "parameter": 0.0}
    for batch, seq in case["shapes"]:
        given = {k: v[:batch, :seq].contiguous() for k, v in inputs.items()}
        for train in (True, False):
            both = []
            for module, optimizer in sides:
                module.train(train)
                optimizer.zero_grad()
                with torch.set_grad_enabled(train):
                    loss = loss_of(call(module, as_rank_has_it(pm, given) if module is pm else given))
                if train:
                    loss.backward()
                    optimizer.step()
                both.append(float(loss))
            found["loss"] = max(found["loss"], abs(both[0] - both[1]) / abs(both[1]))
    largest = max(float(p.abs().max()) for p in original.parameters())  # a bias that has no effect moves by rounding alone
    for name, p in original.named_parameters():
        found["parameter"] = max(found["parameter"], relative_error(p.detach(), full(pm.get_parameter(name).detach()), largest))
    assert len(pm.plans) == 2 * len({tuple(s) for s in case["shapes"]}), [p.mode for p in pm.plans]
    return found


AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "swa": AveragedModel,
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ema one by one": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9)),
}


def overflow(grad: Tensor) -> None:
    whole = torch.zeros(grad.shape, dtype=grad.dtype)
    whole[-1, -1] = float("inf")
    grad += distribute_tensor(whole, grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else whole


def averages(case: dict) -> dict[str, Any]:
    """Three steps with averaged parameters, loss scaling on and off, and a step that overflows; everything against one device."""
    model, inputs = odd()
    original = copy.deepcopy(model)
    pm = planned(case, model, inputs)
    sides = []
    for module in (pm, original):
        optimizer = OPTIMIZERS[case["optimizer"]](module.parameters())
        sides.append(
            (
                module,
                optimizer,
                AVERAGES[case["average"]](module),
                (GradScaler if module is pm else torch.amp.GradScaler)("cpu", init_scale=8.0),
            )
        )
    scales = []
    for step in range(4):
        for module, optimizer, average, scaler in sides:
            optimizer.zero_grad()
            loss = loss_of(call(module, inputs))
            scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            if step == 2:  # one element of all, on one device alone where the plan splits it
                overflow(module.get_parameter("up.weight").grad)  # type: ignore[arg-type]
            if step != 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(module)
            scales.append(scaler.get_scale())
    assert scales[::2] == scales[1::2] and min(scales) < 8.0, scales
    found = {"parameter": 0.0, "average": 0.0}
    for kind, (ours, theirs) in {"parameter": (pm, original), "average": (sides[0][2].module, sides[1][2].module)}.items():
        for name, p in theirs.named_parameters():
            found[kind] = max(found[kind], relative_error(p.detach(), full(ours.get_parameter(name).detach())))
    with torch.no_grad():
        both = [float(loss_of(call(average, inputs))) for _, _, average, _ in sides]
    found["loss"] = abs(both[0] - both[1]) / both[1]
    return found


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x, self.y = torch.randn(21, 7, generator=draw).double(), torch.randn(21, 5, generator=draw).double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "y": self.y[i]}


def epoch(case: dict) -> dict[str, Any]:
    """One and a half epochs over 21 samples in batches of six; left and taken up again in the middle."""
    model, inputs = odd()
    original, samples = copy.deepcopy(model), Samples()
    pm = planned(case, model, inputs)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (pm, original))
    batches = pm.batches(len(samples), seed=5)
    read = batches.read(DataLoader(samples, batch_sampler=batches))
    losses: list[float] = []
    for step in range(6):
        batch = next(read, None)
        if batch is None or step == 2:  # an epoch ends; or the run is left, and another one goes on
            state = batches.state_dict() if batch is not None else None
            batches = batches if state is None else pm.batches(len(samples), seed=5)
            if state:
                batches.load_state_dict({**state, "position": state["position"] - 6})
            read = batches.read(DataLoader(samples, batch_sampler=batches))
            batch = next(read)
        ours.zero_grad()
        loss = pm(**batch)["loss"]
        loss.backward()
        ours.step()
        losses.append(float(loss))
    wanted: list[float] = []
    for number in range(2):
        order = torch.randperm(21, generator=torch.Generator().manual_seed(5 + number))
        for rows in order.split(6)[: 4 if number == 0 else 2]:
            theirs.zero_grad()
            loss = original(samples.x[rows], samples.y[rows])["loss"]
            loss.backward()
            theirs.step()
            wanted.append(float(loss))
    whole = pm.local_batch(**inputs)
    error = abs(float(pm(**whole)["loss"]) - float(original(**inputs)["loss"]))
    return {"loss": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)), "whole": error}


CASES: dict[str, Callable[[dict], dict[str, Any]]] = {
    "accumulate": accumulate,
    "loop": loop,
    "bug": with_bug,
    "shapes": shapes,
    "averages": averages,
    "epoch": epoch,
}
