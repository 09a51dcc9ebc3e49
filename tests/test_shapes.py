"""Calls unlike the one that was planned: other shapes, eval mode, other arguments, other parameters that want gradients."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import launch
from test_training import agree
from torch import Tensor, nn

from netmind_autopar import autoparallelize
from netmind_autopar.ir.errors import InputError, ShapeError
from netmind_autopar.runtime import graphs


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    started = not dist.is_initialized()
    yield
    if started and dist.is_initialized():
        dist.destroy_process_group()


class Net(nn.Module):
    """Dropout and batch norm: eval mode is another function. A flag and a missing label are other calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor | None = None, twice: bool = False) -> dict[str, Tensor]:
        z = self.down(self.drop(torch.relu(self.norm(self.up(x)))))
        z = 2 * z if twice else z
        return {"z": z} if y is None else {"loss": (z - y).square().mean(), "z": z}


def made(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net().double()
    model.norm.running_mean.uniform_()
    return autoparallelize(copy.deepcopy(model), batch(4), "a=1", cluster="h100-sxm", **options), model


def batch(n: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 6, generator=draw, dtype=torch.float64), "y": torch.randn(n, 3, generator=draw, dtype=torch.float64)}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def test_eval_mode_is_planned_when_it_is_first_used() -> None:
    pm, model = made()
    assert len(pm.plans) == 1
    for module in (pm, model):
        module.eval()
    for n in (4, 4, 2):
        with torch.no_grad():
            torch.testing.assert_close(whole(pm(**batch(n))["z"]), model(**batch(n))["z"])
    assert [p.mode for p in pm.plans] == ["inference", "inference", "training"]
    for module in (pm, model):  # gradients in eval mode, as when batch norm is frozen
        module(**batch(4))["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole(pm.get_parameter(name).grad), p.grad)
    before = {n: b.clone() for n, b in pm.named_buffers()}
    pm.train()
    pm(**batch(4))
    assert len(pm.plans) == 4 and pm.plans[0].mode == "training"
    assert any(not torch.equal(before[n], b) for n, b in pm.named_buffers())


def test_one_plan_serves_both_modes_where_they_are_one_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    pm = autoparallelize(model, x, "a=1", cluster="h100-sxm")
    pm.eval()
    whole(pm(x)).sum().backward()
    assert len(pm.plans) == 1
    torch.testing.assert_close(whole(pm(x)), model(x))


class Notices(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def test_other_arguments() -> None:
    pm, model = made()
    notices = Notices()
    logging.getLogger("netmind_autopar").addHandler(notices)
    for module in (pm, model):
        module.eval()
    x = batch(5)["x"]
    with torch.no_grad():
        for call in ({"x": x}, {"x": x, "twice": True}, {"x": x.float().double(), "twice": True}):
            torch.testing.assert_close(whole(pm(**call)["z"]), model(**call)["z"])
        torch.testing.assert_close(whole(pm(x)["z"]), model(x)["z"])
    logging.getLogger("netmind_autopar").removeHandler(notices)
    assert len(notices.found) == 2 and "eval mode, x (5, 6)" in notices.found[0]


def test_parameters_that_want_gradients() -> None:
    """Frozen before, frozen after, thawed, all frozen: gradients are those of one device, and none is missing or left over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model[0].weight.requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64)
    pm = autoparallelize(copy.deepcopy(model), x, "a=1", cluster="h100-sxm")
    for change in ({}, {"0.weight": True}, {"2.weight": False, "2.bias": False}, {"0.weight": False}):
        for module in (pm, model):
            for name, wants in change.items():
                module.get_parameter(name).requires_grad_(wants)
            module.zero_grad()
            whole(module(x)).square().sum().backward()
        for name, p in model.named_parameters():
            mine = pm.get_parameter(name).grad
            assert (mine is None) == (p.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(whole(mine), p.grad)
    assert len(pm.plans) == 4
    for module in (pm, model):
        for p in module.parameters():
            p.requires_grad_(False)
    torch.testing.assert_close(whole(pm(x)), model(x))
    assert len(pm.plans) == 4
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()  # and an input
    whole(pm(ours)).square().sum().backward()
    model(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_strict_shapes() -> None:
    pm, _ = made(strict_shapes=True)
    with pytest.raises(ShapeError, match="the plan was made for"):
        pm(**batch(3))
    with pytest.raises(ShapeError):
        pm(x=batch(4)["x"])
    pm.eval()
    with pytest.raises(InputError, match="captured in train mode"):
        pm(**batch(4))
    model = nn.Linear(3, 3).requires_grad_(False)
    model.bias.requires_grad_(True)
    pm = autoparallelize(model, torch.randn(2, 3), "a=1", cluster="h100-sxm", strict_shapes=True)
    pm.get_parameter("weight").requires_grad_(True)
    with pytest.raises(InputError, match="'weight' wants a gradient"):
        pm(torch.randn(2, 3))


def test_there_is_an_end_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    pm, _ = made()
    pm(**batch(3))
    with pytest.raises(ShapeError, match="unlike the 2 that were planned"):
        pm(**batch(5))
    pm(**batch(3))
    monkeypatch.undo()
    with pytest.raises(ShapeError, match="does not take"):
        pm(nothing=batch(3)["x"])


def test_micro_steps_of_unequal_shapes() -> None:
    """Each shape has gradients of its own that wait; the last call brings all of them together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    pm = autoparallelize(copy.deepcopy(model), batch(4)["x"], "a=1", cluster="h100-sxm")
    for sizes in ((4, 4, 3), (4, 3, 4), (3, 2, 4)):
        for module in (pm, model):
            module.zero_grad()
        for k, n in enumerate(sizes):
            with pm.no_sync(k < 2):
                whole(pm(batch(n, k)["x"])).sum().backward()
            model(batch(n, k)["x"]).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(whole(pm.get_parameter(name).grad), p.grad)


THREE = ((4, 8), (3, 8), (4, 6), (4, 8), (3, 8))  # batch, sequence
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("gpt2", {"baseline": "ddp", "inputs": "local"}, ((4, 8), (3, 8), (4, 8))),
    ("gpt2", {"random_costs": 4, "inputs": "local"}, THREE),
    ("gpt2", {"baseline": "fsdp"}, THREE),
    ("bert", {"random_costs": 2}, THREE),
    ("gpt2", {}, THREE),
]


@pytest.mark.gloo
@pytest.mark.parametrize("cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.slow)], ids=["local", "others"])
def test_real_processes(tmp_path: Path, cases: list[tuple[str, dict, Any]]) -> None:
    """Training over batches of several shapes, with evaluation between, on two processes."""
    work = [{"training": "shapes", "model": model, "mesh": (2,), "options": options, "shapes": shapes} for model, options, shapes in cases]
    agree(work, launch(2, work, tmp_path))
