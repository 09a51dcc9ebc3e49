"""compile=True: regions between collectives leave the schedule as it is, and compute what is written, compiled or not."""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from two_processes import found_by_two

from netmind_autopar.api import lower_plan, plan_program
from netmind_autopar.arguments import mesh_or_devices
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes import regions as splitting
from netmind_autopar.passes.emit import emit
from netmind_autopar.runtime import threads
from netmind_autopar.runtime.compiled import Regions
from netmind_autopar.tracer import inductor, torch_private
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification.sides import Sides

Step = Callable[..., list[list[Tensor]]]


class Dropped(nn.Module):
    """Gives its dropped activations beside the loss, so that masks show."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(16, 24), nn.Linear(24, 16), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        dropped = self.drop(nn.functional.softplus(self.up(x)) + 1)
        return {"loss": torch.tanh(self.down(dropped)).square().sum(), "dropped": dropped}


def model_of(name: str) -> tuple[nn.Module, Any]:
    if name == "dropped":
        torch.manual_seed(0)
        return Dropped().double(), {"x": torch.randn(8, 16, dtype=torch.float64)}
    return getattr(models, name)(dropout=0.2)


@functools.cache
def lowered(name: str, mesh: str, seed: int) -> tuple[Program, Program, Plan]:
    model, inputs = model_of(name)
    program = capture(model, inputs)
    plan = plan_program(program, mesh_or_devices(mesh, None, "cpu"), lambda _: None, random_costs=seed)
    return program, lower_plan(program, plan), plan


def step_of(name: str, mesh: str, seed: int) -> Step:
    """Runs a source on all ranks in lockstep, always from the same state."""
    program, low, plan = lowered(name, mesh, seed)
    side = Sides(*model_of(name), program, low, plan.sizes)
    state = side.snapshot(0)
    return lambda source, regions=None: threads.run(source, low, plan.axis_names, plan.sizes, side.dealt(state), regions)


def apart(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """The worst difference over the largest number, of any output on any rank."""
    pairs = [(a.double(), b.double()) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def travels(source: str) -> list[str]:
    """The lines of forward and backward at which something travels, in order; all-reduces in place are bound by themselves, so without
    numbers."""
    bodies = re.findall(r"^    def (?:forward|backward)\(.*?(?=^    def |^    return )", source, re.M | re.S)
    call = r"= (?:(?:all_gather|all_reduce|reduce_scatter|all_to_all|bucket)_\d+(?:\.start)?\(|\w+\.wait\(\))"
    lines = [line.split("#")[0].strip() for body in bodies for line in body.splitlines() if re.search(call, line)]
    return [re.sub(r"= (all_reduce)_\d+", r"= \1", line) for line in lines]


def made(source: str) -> Counter:
    """Names that ops give, each as often as an op gives it."""
    ops = re.findall(r"^        (\w+) = ((?!\[)(?!region_).*)", source, re.M)
    return Counter(name for name, what in ops if not what.startswith("constant_"))


def as_given(function: Callable, inputs: Sequence[Tensor]) -> Callable:
    """A compiler that changes nothing."""
    return function


@pytest.mark.parametrize(("name", "mesh", "seed"), [("mlp", "a=2,b=2", 1), pytest.param("gpt2", "a=2", 2, marks=pytest.mark.slow)])
def test_regions_leave_the_schedule_and_the_numbers(name: str, mesh: str, seed: int) -> None:
    _, low, plan = lowered(name, mesh, seed)
    plain, split = emit(low, plan), emit(low, plan, regions=True)
    assert travels(plain) and travels(split) == travels(plain)
    assert made(split) == made(plain)
    assert split == emit(low, plan, regions=True)
    run = step_of(name, mesh, seed)
    expected = run(plain)
    for regions in (None, Regions(as_given)):
        for have, want in zip(run(split, regions), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_a_wait_inside_a_region_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, low, plan = lowered("mlp", "a=2,b=2", 1)
    plain = travels(emit(low, plan))
    monkeypatch.setattr(splitting, "_is_pure", lambda node: True)
    assert travels(emit(low, plan, regions=True)) != plain


def test_compiled_ranks_compute_what_is_written() -> None:
    _, low, plan = lowered("dropped", "a=2", 3)
    run, source = step_of("dropped", "a=2", 3), emit(low, plan, regions=True)
    regions = Regions(torch_private.inductor)
    expected, found = run(source), run(source, regions)
    assert regions.rows and {r.state for r in regions.rows} == {"compiled"}, [str(r) for r in regions.rows]
    assert apart(found, expected) < 1e-12
    at = next(i for i, out in enumerate(low.outputs) if out.name == "dropped")
    masks = [(a == 0, b == 0) for a, b in zip(found[at], expected[at], strict=True)]
    assert all(torch.equal(a, b) and 0.1 < float(a.double().mean()) < 0.8 for a, b in masks)


def test_a_wrong_region_is_seen() -> None:
    def wrong(function: Callable, inputs: Sequence[Tensor]) -> Callable:
        return lambda args: tuple(t * (1 + 1e-6) if t.is_floating_point() else t for t in function(args))

    _, low, plan = lowered("mlp", "a=2,b=2", 1)
    run, source = step_of("mlp", "a=2,b=2", 1), emit(low, plan, regions=True)
    assert apart(run(source, Regions(wrong)), run(source)) > 1e-8


class Notices(logging.Handler):
    """What the package says meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("netmind_autopar").addHandler(self)
        return self.said

    def __exit__(self, *_: object) -> None:
        logging.getLogger("netmind_autopar").removeHandler(self)


def test_what_cannot_be_compiled_runs_as_written() -> None:
    def fails(function: Callable, inputs: Sequence[Tensor]) -> Callable:
        raise RuntimeError("no such kernel\nmore")

    _, low, plan = lowered("mlp", "a=2,b=2", 1)
    run, source, regions = step_of("mlp", "a=2,b=2", 1), emit(low, plan, regions=True), Regions(fails)
    with Notices() as said:
        assert apart(run(source, regions), run(source)) == 0
    assert {(r.state, r.why) for r in regions.rows} == {("as written", "RuntimeError: no such kernel")}
    assert len(said) == len(regions.rows)


def test_without_a_compiler_there_is_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "inductor_lacks", lambda device: "no C++ compiler")
    with Notices() as said:
        assert inductor.compiler_for("cpu") is None
    assert said == ["compile=True has no effect here, everything runs as it is written: no C++ compiler"]


def test_other_strides_and_what_is_let_go_of() -> None:
    seen: list[tuple[int, ...]] = []

    def note(function: Callable, inputs: Sequence[Tensor]) -> Callable:
        return lambda args: (seen.append(args[0].stride()), function(args))[1]

    def double(args: list[Tensor]) -> tuple[Tensor, ...]:
        (x,) = args
        args.clear()
        return (x * 2,)

    region, x = Regions(note).region(double, 1), torch.arange(6.0).reshape(2, 3)
    for given in (x, x.t().contiguous().t()):
        args = [given]
        assert torch.equal(region(args)[0], x * 2) and not args
    assert seen == [(3, 1), (3, 1)]


@pytest.mark.slow
@pytest.mark.gloo
def test_two_processes_compiled_and_not(tmp_path: Path) -> None:
    for found in found_by_two(__file__, tmp_path):
        assert set(found["states"]) <= {"compiled", "waits"} and "compiled" in found["states"], found  # some are never called here
        assert found["apart"] < 1e-9 and found["regions"] > 4 and found["graphs"] == 2
        assert found["sent"][0] == found["sent"][1]


def _steps(pm: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Losses and gradients of a plain step, one of two micro-steps, and a call of another shape without gradients."""
    found = []
    for micro in (1, 2):
        torch.manual_seed(micro)
        for k in range(micro):
            with pm.no_sync(k + 1 < micro):
                loss = pm(**batch).loss / micro
                loss.backward()
            found.append(loss.detach())
        found += [p.grad.full_tensor() for p in pm.parameters()]
        pm.zero_grad()
    with torch.no_grad():
        found.append(pm(**{k: t[:2] for k, t in batch.items()}).loss)
    return found


def _worker(folder: Path, rank: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from netmind_autopar import autoparallelize

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    model, batch = models.gpt2(dropout=0.2, layers=1)
    plain = autoparallelize(copy.deepcopy(model), batch, mesh, random_costs=1)
    ours = autoparallelize(model, batch, mesh, plan=plain.plan, random_costs=1, compile=True)  # the plan of another shape is drawn alike
    have, want = _steps(ours, batch), _steps(plain, batch)
    result = {
        "apart": apart([have], [want]),
        "states": sorted({r.state for r in ours.compiled}),
        "regions": len(ours.compiled),
        "graphs": len(ours.plans),
        "sent": [ours.sent_bytes, plain.sent_bytes],
    }
    (folder / f"found.{rank}").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _worker(Path(sys.argv[1]), int(sys.argv[2]))
