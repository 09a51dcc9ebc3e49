"""Optimizer state that waits between steps elsewhere: the numbers are the same, and the memory is really free."""

from __future__ import annotations

import copy
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from liveness import Storages
from random_plans import random_plan
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from two_processes import found_by_two

from netmind_autopar.api import compile_plan
from netmind_autopar.ir.errors import InputError, OffloadError, PlanError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime import parked
from netmind_autopar.runtime.module import ParallelModule
from netmind_autopar.tracer.capture import capture

Make = Callable[..., Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.1, centered=True),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}
CAPTURED: dict[str, tuple] = {}
STATE = ("optimizer:transformer.h.*.mlp.c_fc.weight", "disk:optimizer:transformer.wte.weight", "optimizer:transformer.h.*.ln_1.weight[1:]")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(parked, "BUCKET_BYTES", 6000)
    monkeypatch.setenv("AUTOPAR_OFFLOAD", str(tmp_path))
    yield
    parked._tiers.clear()


def chain(waits: str = "", tier: str = "host") -> nn.Module:
    """Six linear layers; of those whose number is in `waits` the state waits elsewhere."""
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    parked.park({p: tier for i in waits for p in made[int(i)].parameters()})
    return made


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> list[Tensor]:
    """With clipping and a schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def alike(a: Optimizer, b: Optimizer) -> bool:
    """Both state dicts hold the same."""
    flat = [
        [(k, n, v) for k, held in sorted(o.state_dict()["state"].items()) for n, v in sorted(held.items())] + o.state_dict()["param_groups"]
        for o in (a, b)
    ]
    assert len(flat[0]) == len(flat[1])
    return all(
        torch.equal(x[2], y[2]) and x[:2] == y[:2] if isinstance(x, tuple) and isinstance(x[2], Tensor) else x == y
        for x, y in zip(*flat, strict=True)
    )


@pytest.mark.parametrize("tier", parked.TIERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_bitwise_the_same(name: str, tier: str) -> None:
    plain, ours = chain(), chain("12345", tier)
    a, b = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](ours.parameters())
    assert all(map(torch.equal, train(plain, a), train(ours, b)))
    assert alike(a, b)
    kinds = [isinstance(v, parked.Parked) for p in ours[1:].parameters() for v in b.state[p].values() if not _is_scalar(v)]
    assert kinds and all(kinds)
    assert not any(isinstance(v, parked.Parked) for p in ours[0].parameters() for v in b.state[p].values())


def _is_scalar(value: object) -> bool:
    return not isinstance(value, parked.Parked) and not (isinstance(value, Tensor) and value.dim())


@pytest.mark.gpu
@pytest.mark.parametrize("tier", parked.TIERS)
@pytest.mark.parametrize("name", ["adamw", "adamw fused", "sgd-momentum", "adagrad"])
def test_parameters_on_a_gpu_are_bitwise_the_same(name: str, tier: str) -> None:
    """And between steps the device has no memory for what waits."""
    results, left = [], []
    for waits in ("", "12345"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).cuda()
        parked.park({p: tier for i in waits for p in model[int(i)].parameters()})
        optimizer = OPTIMIZERS[name](model.parameters())
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).cuda()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated() - before)
        results.append([p.detach().cpu() for p in model.parameters()])
        if waits:
            assert all(
                v.memory.is_pinned() == (tier == "host")
                for p in model[1].parameters()
                for v in optimizer.state[p].values()
                if hasattr(v, "tier")
            )
    assert all(map(torch.equal, *results))
    assert left[1] < 0.5 * left[0] or name == "adagrad", "Adagrad's state is there before the first step"


def test_a_wrong_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the gradients of other buckets not hidden, parameters would step several times."""
    honest = parked._Driver._cut
    monkeypatch.setattr(parked._Driver, "_cut", lambda self, o, ps: (run + run[:1] for run in list(honest(self, o, ps)) for _ in range(2)))
    plain, ours = chain(), chain("12345")
    a, b = (OPTIMIZERS["adamw"](m.parameters()) for m in (plain, ours))
    assert not all(map(torch.equal, train(plain, a), train(ours, b)))


def held(optimizer: Optimizer) -> int:
    """Bytes of state tensors that are on the device."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim())


@pytest.mark.parametrize("tier", parked.TIERS)
def test_between_steps_only_the_state_of_others_is_there(tier: str) -> None:
    model = chain("12345", tier)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(2):
        train(model, optimizer, 1)
        assert held(optimizer) == 2 * sum(p.nbytes for p in model[0].parameters())


def test_at_most_a_bucket_is_there_in_a_step() -> None:
    """The memory that a step takes, by storages: a bucket, not all of the state."""
    model = chain("012345")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    train(model, optimizer, 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    whole = sum(p.nbytes for p in model.parameters())
    for bucket, least, most in ((3000, 2000, 3000), (1 << 20, whole, whole)):
        parked.BUCKET_BYTES = bucket
        seen = Storages()
        for p in model.parameters():
            homes = (v.memory for v in optimizer.state[p].values())
            for tensor in (p, p.grad, *homes):
                seen.ignore(tensor.detach())
        with seen:
            optimizer.step()
        assert least <= seen.peak <= most and seen.now == 0


def test_hooks_and_schedules_count_one_step() -> None:
    """Hooks of the user run once each, before them all gradients are there, after them all parameters are new."""
    model = chain("345")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    log: list[object] = []

    def before(*_: object) -> None:
        log.append(all(p.grad is not None for p in model.parameters()))
        for p in model.parameters():
            p.grad.mul_(0.5)  # type: ignore[union-attr]

    def after(*_: object) -> None:
        log.append(not any(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)))
        log.append(all(p.grad is not None for p in model.parameters()))
        optimizer.zero_grad()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    other = chain()
    reference = OPTIMIZERS["adamw"](other.parameters())
    reference.register_step_pre_hook(lambda *_: [p.grad.mul_(0.5) for p in other.parameters()] and None)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        old = [p.detach().clone() for p in model.parameters()]
        for m, o in ((model, optimizer), (other, reference)):
            m(torch.ones(2, 16)).square().sum().backward()
            o.step()
        reference.zero_grad()
        schedule.step()
        reference.param_groups[0]["lr"] = schedule.get_last_lr()[0]
        assert all(p.grad is None for p in model.parameters()), "what a hook clears stays cleared"
    assert log == [True, True, True] * 3
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_closure_is_called_once_and_first() -> None:
    model, other = chain("2345"), chain()
    a, b = (OPTIMIZERS["adamw"](m.parameters()) for m in (model, other))
    calls: list[int] = []

    def closure(m: nn.Module, o: Optimizer) -> Tensor:
        calls.append(1)
        o.zero_grad()
        loss = m(torch.ones(2, 16)).square().sum()
        loss.backward()
        return loss

    for step in range(3):
        pass_it = {"closure": functools.partial(closure, model, a)} if step else None
        ours = a.step(**pass_it) if pass_it else a.step(functools.partial(closure, model, a))
        assert torch.equal(ours, b.step(functools.partial(closure, other, b)))
    assert len(calls) == 6 and all(map(torch.equal, model.parameters(), other.parameters()))


class PerGroup(Optimizer):
    """Counts steps per group and scales by the norm of all gradients, as optimizers outside of torch may."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"lr": 1.0, "count": 0})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = state.get("sum", torch.zeros_like(p)) + p.grad / norm
                p.sub_(state["sum"] / group["count"])


def test_an_optimizer_of_another_library_steps_once() -> None:
    plain, ours = chain(), chain("12345")
    a, b = PerGroup(plain.parameters()), PerGroup(ours.parameters())
    assert all(map(torch.equal, train(plain, a), train(ours, b)))
    assert b.param_groups[0]["count"] == 5 and held(b) == sum(p.nbytes for p in ours[0].parameters())


def test_lbfgs_is_refused() -> None:
    model = chain("1")
    with pytest.raises(InputError, match="LBFGS"):
        torch.optim.LBFGS(model.parameters()).step(lambda: model(torch.ones(1, 16)).sum())


def test_parameters_without_a_gradient_are_left_alone() -> None:
    results = []
    for waits in ("", "0245"):
        model = chain(waits)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        for p in model[2].parameters():
            p.requires_grad_(False)
        results.append(train(model, optimizer))
        assert len(optimizer.state) == 10
    assert all(map(torch.equal, *results))


def test_an_error_in_a_step_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = chain("12345", "disk")
    b = OPTIMIZERS["adamw"](ours.parameters())
    ours(torch.ones(2, 16)).sum().backward()
    with monkeypatch.context() as patch:
        patch.setenv("AUTOPAR_OFFLOAD", "/nowhere")
        with pytest.raises(OffloadError, match="cannot keep"):
            b.step()
    assert all(p.grad is not None for p in ours.parameters())


def test_state_dicts_hold_tensors_and_load_anywhere() -> None:
    plain, ours = chain(), chain("12345", "disk")
    a, b = (OPTIMIZERS["adamw"](m.parameters()) for m in (plain, ours))
    train(plain, a, 2)
    train(ours, b, 2)
    file = io.BytesIO()
    torch.save(b.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = copy.deepcopy(saved)
    c = OPTIMIZERS["adamw"](plain.parameters())
    c.load_state_dict(saved)
    assert alike(a, c)
    b.load_state_dict(saved)
    assert held(b) == 2 * sum(p.nbytes for p in ours[0].parameters()), "what is loaded leaves at once"
    assert alike(a, b)
    assert all(map(torch.equal, train(plain, a, 2), train(ours, b, 2)))
    for key, held_ in kept["state"].items():
        assert all(torch.equal(v, saved["state"][key][n]) for n, v in held_.items() if n != "step" and int(key) > 1), "and is a copy"
    again = copy.deepcopy(b)
    assert all(isinstance(v, Tensor) for state in again.state.values() for v in state.values())


# Through a plan.


def captured() -> tuple:
    if not CAPTURED:
        model, inputs = models.gpt2(torch.float64)
        program = capture(model, inputs)
        CAPTURED["gpt2"] = model, inputs, program, bind_program(program)
    return CAPTURED["gpt2"]


def module(mesh: object, plan: Plan) -> ParallelModule:
    model, _, program, _ = captured()
    return ParallelModule(compile_plan(program, plan, training=True), model, plan, mesh)  # type: ignore[arg-type]


def steps(pm: nn.Module, optimizer: Optimizer, count: int = 5) -> list[Tensor]:
    inputs = captured()[1]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(count):
        optimizer.zero_grad()
        torch.manual_seed(3)
        pm(**inputs)["loss"].backward()
        nn.utils.clip_grad_norm_(pm.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    return [p.to_local().detach().clone() for p in pm.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "adagrad"])
def test_a_plan_says_what_waits(name: str, mesh: object) -> None:
    _, _, program, rules = captured()
    plan = random_plan(program, rules, "dp=1", 0)
    waiting = plan.model_copy(update={"state": STATE})
    assert Plan.loads(waiting.dumps()).state == STATE
    plain, pm = module(mesh, plan), module(mesh, waiting)
    a, b = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](pm.parameters())
    assert all(map(torch.equal, steps(plain, a), steps(pm, b)))
    found = {n: {v.tier for v in b.state[p].values() if isinstance(v, parked.Parked)} for n, p in pm.named_parameters()}
    away = {n: tiers for n, tiers in found.items() if tiers}
    layers = [n for n in found if n.endswith("mlp.c_fc.weight")]
    expected = {n: {"host"} for n in (*layers, "transformer.h.1.ln_1.weight")}
    assert len(layers) == 2 and away == expected | {"transformer.wte.weight": {"disk"}}


def test_checkpoints_of_torch_hold_what_waits(mesh: object, tmp_path: Path) -> None:
    _, _, program, rules = captured()
    plan = random_plan(program, rules, "dp=1", 0).model_copy(update={"state": STATE})
    pm, other = module(mesh, plan), module(mesh, plan)
    a, b = (OPTIMIZERS["adamw"](m.parameters()) for m in (pm, other))
    steps(pm, a, 2)
    dcp.save({"model": pm.state_dict(), "optim": get_optimizer_state_dict(pm, a)}, checkpoint_id=tmp_path / "step")
    loaded = {"model": other.state_dict(), "optim": get_optimizer_state_dict(other, b)}
    dcp.load(loaded, checkpoint_id=tmp_path / "step")
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, b, optim_state_dict=loaded["optim"])
    assert all(map(torch.equal, steps(pm, a, 2), steps(other, b, 2)))


def test_entries_of_a_plan() -> None:
    _, _, program, rules = captured()
    plan = random_plan(program, rules, "dp=1", 0)
    lower(program, rules, plan.model_copy(update={"state": STATE}))
    for wrong in (
        "optimizer:nowhere",
        "transformer.wte.weight",
        "optimizer:",
        "host:optimizer:transformer.wte.weight",
        "optimizer:input_ids",
    ):
        with pytest.raises(PlanError):
            lower(program, rules, plan.model_copy(update={"state": (wrong,)}))
    for field in ("recompute", "regather", "offload"):
        with pytest.raises(PlanError, match="cannot read"):
            lower(program, rules, plan.model_copy(update={field: ("optimizer:transformer.h.*.mlp.c_fc.addmm",)}))


# Two processes.


def worker(rank: int, folder: Path) -> None:
    """Train with and without parking on two processes; writes what differs."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    _, _, program, rules = captured()
    parked.BUCKET_BYTES = 6000
    found = {}
    for name in ("adamw", "sgd-momentum"):
        plan = random_plan(program, rules, "a=2", 1)
        plain, pm = module(mesh, plan), module(mesh, plan.model_copy(update={"state": STATE}))
        a, b = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](pm.parameters())
        same = all(map(torch.equal, steps(plain, a), steps(pm, b)))
        split = any(p.numel() != p.to_local().numel() for p in pm.parameters() if isinstance(p, DTensor))
        found[name] = [same, split, held(a) > held(b)]
    (folder / f"found.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.gloo
def test_two_processes_train_alike(tmp_path: Path) -> None:
    expected = {name: [True] * 3 for name in ("adamw", "sgd-momentum")}
    assert found_by_two(__file__, tmp_path, AUTOPAR_OFFLOAD=str(tmp_path)) == [expected, expected]


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
