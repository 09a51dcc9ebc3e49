"""Parameters that wait elsewhere, with gradient and optimizer state: the numbers are the same, and the memory is really free."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from random_plans import random_plan
from random_saving import with_saving
from test_parked import OPTIMIZERS, PerGroup, alike, held, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from two_processes import found_by_two

from netmind_autopar.api import compile_plan
from netmind_autopar.ir.errors import AutoparError, PlanError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime import mapped, parked, stowed
from netmind_autopar.runtime.module import ParallelModule
from netmind_autopar.runtime.offload import TIERS
from netmind_autopar.solver.kinds import collect
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare

STATE = (
    "param:transformer.h.*.mlp.c_fc.weight",
    "disk:param:transformer.wte.weight",
    "disk:param:transformer.h.*.attn.c_attn.weight[1:]",
    "param:transformer.h.*.ln_1.weight",
    "optimizer:transformer.h.*.mlp.c_proj.weight",
)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(parked, "BUCKET_BYTES", 6000)
    monkeypatch.setattr(mapped, "PIECE_BYTES", 4096)
    monkeypatch.setenv("AUTOPAR_OFFLOAD", str(tmp_path))
    yield
    parked._tiers.clear()
    stowed._stowed.clear()


# Files.


@pytest.mark.parametrize("offset", [0, 3, 5000])
def test_what_is_dropped_is_still_there(offset: int) -> None:
    x = torch.randn(9000, dtype=torch.float64)
    there = stowed.elsewhere(x, "disk")
    assert mapped.is_mapped(there) and not mapped.is_mapped(x)
    back = torch.empty(9000 - offset, dtype=torch.float64)
    mapped.copy(back, there[offset:])
    assert torch.equal(back, x[offset:])
    mapped.copy(there[offset:], 2 * back)
    mapped.drop(there)
    assert torch.equal(there, torch.cat([x[:offset], 2 * x[offset:]]))
    mapped.drop(x)
    assert torch.equal(x[offset:], back), "memory of other tensors is left alone"


def resident(x: Tensor) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    address, found = x.untyped_storage().data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.startswith(("VmFlags", "THP")):
            low, high = (int(part, 16) for part in line.split(" ")[0].split("-"))
            found = low <= address < high
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


def test_a_copy_leaves_nothing_in_memory() -> None:
    x = torch.randn(1 << 20)
    there = stowed.elsewhere(x, "disk")
    assert resident(there) <= 8192
    assert there.sum().isfinite() and resident(there) > 3 << 20
    mapped.copy(torch.empty_like(x), there)
    assert resident(there) <= 8192
    there.mul_(2)
    mapped.drop(there)
    assert resident(there) == 0 and torch.equal(there, 2 * x)


# Optimizers, without a plan.


def chain(waits: str = "", tier: str = "host") -> nn.Module:
    """Six linear layers, of which those whose number is in `waits` wait elsewhere."""
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    chosen = [p for i in waits for p in made[int(i)].parameters()]
    for p in chosen:
        p.data = stowed.elsewhere(p.data, tier)
    stowed.stow(dict.fromkeys(chosen, tier), torch.device("cpu"))
    parked.park(dict.fromkeys(chosen, tier))
    return made


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_bitwise_the_same(name: str, tier: str) -> None:
    plain, ours = chain(), chain("12345", tier)
    a, b = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](ours.parameters())
    memory = [p.data_ptr() for p in ours.parameters()]
    assert all(map(torch.equal, train(plain, a), train(ours, b)))
    assert alike(a, b)
    assert memory == [p.data_ptr() for p in ours.parameters()] and b.param_groups[0]["params"] == list(ours.parameters())
    assert all(mapped.is_mapped(p) == (tier == "disk") for p in ours[1:].parameters())


def test_an_optimizer_steps_on_copies_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a bucket of parameters, gradients and state is on the device at a time; 0 is there always."""
    ours, most = chain("12345"), []
    b = OPTIMIZERS["adamw"](ours.parameters())
    train(ours, b, 1)
    honest = parked._unhooked(b)
    where = {p.data_ptr() for p in ours.parameters()}

    def spied(optimizer: Optimizer) -> None:
        copies = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        assert not where & {p.data_ptr() for p in copies}
        most.append(sum(p.nbytes + p.grad.nbytes + sum(v.nbytes for v in optimizer.state[p].values() if v.dim()) for p in copies))
        honest(optimizer)  # type: ignore[misc]

    parked._drivers[b].inner = spied
    train(ours, b, 1)
    assert len(most) > 1 and max(most) <= parked.BUCKET_BYTES


def test_a_step_that_is_not_written_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the copies dropped, parameters would stay as they are."""
    monkeypatch.setattr(
        stowed,
        "copy",
        lambda target, source: target.copy_(source) if not target.requires_grad and target.is_leaf and not stowed._stowed else None,
    )
    plain, ours = chain(), chain("12345")
    a, b = (OPTIMIZERS["sgd-momentum"](m.parameters()) for m in (plain, ours))
    assert not all(map(torch.equal, train(plain, a), train(ours, b)))


def test_an_optimizer_of_another_library_steps_once() -> None:
    plain, ours = chain(), chain("12345", "disk")
    a, b = PerGroup(plain.parameters()), PerGroup(ours.parameters())
    assert all(map(torch.equal, train(plain, a), train(ours, b)))
    assert b.param_groups[0]["count"] == 5 and held(b) == sum(p.nbytes for p in ours[0].parameters())


def test_an_error_in_a_step_puts_the_parameters_back() -> None:
    ours = chain("12345")
    b = OPTIMIZERS["adamw"](ours.parameters())
    train(ours, b, 1)
    before = [p.detach().clone() for p in ours.parameters()]
    ours(torch.ones(2, 16)).sum().backward()

    def broken(optimizer: Optimizer) -> None:
        raise RuntimeError("no")

    parked._drivers[b].inner = broken
    with pytest.raises(RuntimeError, match="no"):
        b.step()
    assert b.param_groups[0]["params"] == list(ours.parameters()) and all(map(torch.equal, before, ours.parameters()))
    assert all(p.grad is not None and p in b.state for p in ours.parameters())


def test_a_step_between_forward_and_backward_is_seen() -> None:
    ours = chain("12345")
    b = OPTIMIZERS["adamw"](ours.parameters())
    train(ours, b, 1)
    versions = [p._version for p in ours.parameters()]
    ours(torch.ones(2, 16)).sum().backward()
    b.step()
    assert all(p._version > v for p, v in zip(ours.parameters(), versions, strict=True))


# Through a plan.

CAPTURED: dict[str, tuple] = {}


def captured(name: str = "gpt2", **options: object) -> tuple[nn.Module, dict, Program, dict[str, Rule]]:
    key = name + repr(sorted(options.items()))
    if key not in CAPTURED:
        model, inputs = getattr(models, name)(torch.float64, **options)
        program = capture(model, inputs)
        CAPTURED[key] = model, inputs, program, bind_program(program)
    return CAPTURED[key]  # type: ignore[return-value]


def everything(program: Program, rules: dict[str, Rule], draw: random.Random | None = None) -> tuple[str, ...]:
    """Entries for all parameters, or some of them, some of those on disk."""
    kinds = collect(program, rules, (1,), "global").values()
    names = [k.name for k in kinds if k.role == "param" and (draw is None or draw.random() < 0.6)]
    return tuple((draw.choice(("", "disk:")) if draw else "") + f"param:{name}" for name in names)


@pytest.mark.parametrize("mesh", ["a=1", "a=2,b=2", pytest.param("a=3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", range(3))
def test_random_plans_are_exact(mesh: str, seed: int) -> None:
    """All ranks in lockstep; beside recomputation, regathering and values that wait elsewhere."""
    model, inputs, program, rules = captured(layers=3, dropout=0.1)
    plan = random_plan(program, rules, mesh, seed)
    plan = with_saving(plan, program, rules, seed) if seed else plan
    plan = plan.model_copy(update={"state": everything(program, rules, random.Random(seed))})
    report = compare(model, inputs, program, lower(program, rules, plan), plan)
    assert plan.state and report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def module(mesh: object, plan: Plan) -> ParallelModule:
    model, _, program, _ = captured()
    return ParallelModule(compile_plan(program, plan, training=True), model, plan, mesh)  # type: ignore[arg-type]


def plan_of(mesh: str = "dp=1", state: tuple[str, ...] = STATE, seed: int = 0) -> Plan:
    _, _, program, rules = captured()
    return random_plan(program, rules, mesh, seed).model_copy(update={"state": state})


def steps(pm: nn.Module, optimizer: Optimizer, count: int = 4, micro: int = 1, to_none: bool = True) -> list[Tensor]:
    """Losses, and parameters in the end; clipped, with a schedule, and gradients of `micro` calls added up."""
    inputs, losses = captured()[1], []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    for step in range(count):
        optimizer.zero_grad(set_to_none=to_none)
        for part in range(micro):
            torch.manual_seed(3 + 10 * step + part)
            loss = pm(**inputs)["loss"] / micro
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(pm.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    return losses + [p.to_local().detach().clone() for p in pm.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "adagrad"])
@pytest.mark.parametrize("how", [{}, {"micro": 3}, {"to_none": False}], ids=["plain", "added up", "zeros"])
def test_training_is_bitwise_the_same(name: str, how: dict, mesh: object) -> None:
    plain, pm = module(mesh, plan_of(state=())), module(mesh, plan_of())
    a, b = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](pm.parameters())
    assert all(map(torch.equal, steps(plain, a, **how), steps(pm, b, **how)))
    local = {n: p.to_local() for n, p in pm.named_parameters()}  # type: ignore[attr-defined]
    disk = {n for n, x in local.items() if mapped.is_mapped(x)}
    assert disk == {"transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"}
    assert all(mapped.is_mapped(pm.get_parameter(n).grad.to_local()) == (n in disk) for n in local)  # type: ignore[union-attr]


@pytest.mark.parametrize("open_end", [False, True])
def test_gradients_that_wait_for_their_reduction(open_end: bool, mesh: object) -> None:
    """Inside no_sync() gradients are added up on the device; completed, they leave."""
    results = []
    for state in ((), STATE):
        pm = module(mesh, plan_of(state=state))
        for _ in range(2):
            with pm.no_sync():
                pm(**captured()[1])["loss"].backward()
                pm(**captured()[1])["loss"].backward()
            if open_end:
                pm.reduce_gradients()
            else:
                pm(**captured()[1])["loss"].backward()
        results.append([p.grad.to_local().clone() for p in pm.parameters()])  # type: ignore[union-attr]
        assert mapped.is_mapped(pm.get_parameter("transformer.wte.weight").grad.to_local()) == (bool(state) and not open_end)  # type: ignore[union-attr]
    assert all(map(torch.equal, *results))


def test_gradients_of_torch_and_hooks_are_there(mesh: object) -> None:
    """torch.autograd.grad and hooks on parameters see what they see without."""
    found = []
    for state in ((), STATE):
        pm, seen = module(mesh, plan_of(state=state)), []
        torch.manual_seed(0)
        weight = pm.get_parameter("transformer.wte.weight")
        weight.register_hook(lambda g: seen.append(g.to_local().clone()))  # noqa: B023
        grads = torch.autograd.grad(pm(**captured()[1])["loss"], list(pm.parameters()))
        found.append([g.to_local().clone() for g in grads] + seen)  # type: ignore[attr-defined]
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def test_state_dicts_and_checkpoints(mesh: object, tmp_path: Path) -> None:
    """Of a module whose parameters wait, into one whose do not, and back; and through torch.distributed.checkpoint."""
    plain, pm, other = module(mesh, plan_of(state=())), module(mesh, plan_of()), module(mesh, plan_of())
    a, b, c = (OPTIMIZERS["adamw"](m.parameters()) for m in (plain, pm, other))
    steps(pm, b, 2)
    plain.load_state_dict(pm.state_dict())
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    dcp.save({"model": pm.state_dict(), "optim": get_optimizer_state_dict(pm, b)}, checkpoint_id=tmp_path / "step")
    loaded = {"model": other.state_dict(), "optim": get_optimizer_state_dict(other, c)}
    dcp.load(loaded, checkpoint_id=tmp_path / "step")
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, c, optim_state_dict=loaded["optim"])
    results = [steps(m, o, 2) for m, o in ((plain, a), (pm, b), (other, c))]
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))
    other.load_state_dict(plain.state_dict())
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    assert all(map(torch.equal, steps(plain, a, 1), steps(other, c, 1)))
    assert all(mapped.is_mapped(v.memory) for v in c.state[other.get_parameter("transformer.wte.weight")].values() if hasattr(v, "memory"))


def test_what_is_loaded_leaves_no_pages(mesh: object) -> None:
    pm = module(mesh, plan_of(state=("disk:param:transformer.wte.weight",)))
    there = pm.get_parameter("transformer.wte.weight").to_local()  # type: ignore[attr-defined]
    assert resident(there) <= 8192
    pm.load_state_dict({n: p.detach().clone() for n, p in pm.state_dict().items()})
    assert resident(there) == 0
    optimizer = OPTIMIZERS["adamw"](pm.parameters())
    for _ in range(2):
        pm(**captured()[1])["loss"].backward()
        optimizer.step()
    assert resident(there) == 0 and resident(pm.get_parameter("transformer.wte.weight").grad.to_local()) == 0  # type: ignore[union-attr]


def test_inference_reads_what_waits(mesh: object) -> None:
    plain, pm = module(mesh, plan_of(state=())), module(mesh, plan_of())
    with torch.no_grad():
        assert torch.equal(plain(**captured()[1])["loss"], pm(**captured()[1])["loss"])


def test_a_change_between_forward_and_backward_is_refused(mesh: object) -> None:
    pm = module(mesh, plan_of())
    b = OPTIMIZERS["sgd-momentum"](pm.parameters())
    steps(pm, b, 1)
    loss = pm(**captured()[1])["loss"]
    b.step()
    with pytest.raises(AutoparError, match="in place"):
        loss.backward()


def test_frozen_parameters_may_wait(mesh: object) -> None:
    model, inputs = models.gpt2(torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_("ln_" in name)
    program = capture(model, inputs)
    rules = bind_program(program)
    plan = random_plan(program, rules, "dp=1", 0)
    away = plan.model_copy(update={"state": everything(program, rules, random.Random(1))})
    found = []
    for which in (plan, away):
        pm = ParallelModule(compile_plan(program, which, training=True), model, which, mesh)  # type: ignore[arg-type]
        torch.manual_seed(0)
        pm(**inputs)["loss"].backward()
        found.append([p.grad.to_local() for p in pm.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0 and all(map(torch.equal, *found))


def test_entries_of_a_plan() -> None:
    _, _, program, rules = captured()
    plan = plan_of()
    assert Plan.loads(plan.dumps()).state == STATE
    lower(program, rules, plan)
    for wrong in (
        "param:nowhere",
        "param:",
        "host:param:transformer.wte.weight",
        "param:input_ids",
        "param:transformer.h.*.attn.c_attn.addmm",
    ):
        with pytest.raises(PlanError):
            lower(program, rules, plan.model_copy(update={"state": (wrong,)}))
    with pytest.raises(PlanError, match="micro-batches"):
        lower(program, rules, plan.model_copy(update={"micro_batches": 2}))


# Two processes.


def worker(rank: int, folder: Path) -> None:
    """Train with and without on two processes; writes what differs."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    _, _, program, rules = captured()
    parked.BUCKET_BYTES = 6000
    found = {}
    for seed, name in enumerate(("adamw", "sgd-momentum")):
        plan = plan_of("a=2", (), seed + 1)
        saving = with_saving(plan, program, rules, seed).model_copy(update={"state": everything(program, rules, random.Random(seed))})
        plain, both, pm = (module(mesh, p) for p in (plan, saving, plan.model_copy(update={"state": STATE})))
        results = [steps(m, OPTIMIZERS[name](m.parameters()), 3) for m in (plain, pm, both)]
        same = all(map(torch.equal, results[0], results[1]))
        near = all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(results[0], results[2], strict=True))
        split = any(p.numel() != p.to_local().numel() for p in pm.parameters() if isinstance(p, DTensor))
        found[name] = [same, near, split]
    (folder / f"found.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.gloo
def test_two_processes_train_alike(tmp_path: Path) -> None:
    expected = {name: [True] * 3 for name in ("adamw", "sgd-momentum")}
    assert found_by_two(__file__, tmp_path, AUTOPAR_OFFLOAD=str(tmp_path)) == [expected, expected]


@pytest.mark.slow
def test_a_model_larger_than_its_memory_trains_in_it(tmp_path: Path) -> None:
    """Four times larger, on disk: the losses of training without a limit, bit by bit, and resident memory within the budget and a tenth."""
    benchmark = Path(__file__).parent.parent / "benchmarks" / "stowed.py"
    env = {**os.environ, "AUTOPAR_OFFLOAD": str(tmp_path)}
    command = [sys.executable, str(benchmark), "--small", "--steps", "2", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["ok"] and row["losses_equal"] and row["resident_bytes"] <= 1.1 * row["budget_bytes"], row
    assert row["resident_without_limit_bytes"] > 10 * row["budget_bytes"]


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
