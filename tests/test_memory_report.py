"""`pm.memory_report()`: what a step takes is measured as the plan counted it, category by category."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import models
import pytest
import torch
import torch.distributed as dist

from netmind_autopar import autoparallelize


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    started = not dist.is_initialized()
    yield
    if started and dist.is_initialized():
        dist.destroy_process_group()


def test_measured_beside_planned() -> None:
    model, inputs = models.gpt2(dtype=torch.float32, layers=3, hidden=128, vocab=1000, seq=64)
    pm = autoparallelize(model, inputs, "dp=1", cluster="cpu", outputs=("loss",))
    optimizer = torch.optim.AdamW(pm.parameters())

    def step() -> None:
        optimizer.zero_grad()
        pm(**inputs).loss.backward()
        optimizer.step()

    step()
    found = pm.memory_report(step, optimizer=optimizer, batch=inputs)
    sizes = {row.name: (row.planned, row.measured) for row in found.rows}
    assert sizes["parameters"][0] == sizes["parameters"][1] == sum(4 * p.numel() for p in model.parameters())
    assert sizes["optimizer state"][1] == pytest.approx(sizes["optimizer state"][0], rel=1e-3)
    assert found.measured == pytest.approx(found.planned, rel=0.05), str(found)
    assert found.planned == pm.plan.cost.peak_bytes
    assert "measured" in str(found) and "MemTracker" in str(found)
    kept = [p.detach().clone() for p in pm.parameters()]  # what lies in memory beside is not the step's
    assert pm.memory_report(step, optimizer=optimizer, batch=inputs).measured == pytest.approx(found.measured, rel=0.02)
    assert kept


def test_without_a_step() -> None:
    model, inputs = models.mlp()
    found = autoparallelize(copy.deepcopy(model), inputs, "dp=1", cluster="cpu").memory_report()
    assert found.measured is None and found.rows[0].measured and "-" in str(found)
