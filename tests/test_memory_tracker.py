"""The counted peak of lowered programs against torch's own `MemTracker` on the emitted step: kept, recomputed, offloaded."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from liveness import lowered_peak
from random_saving import made_in_forward, replayable
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from netmind_autopar.api import compile_plan
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.module import ParallelModule
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash


@functools.cache
def captured(family: str) -> tuple[nn.Module, dict, Program, dict, Plan]:
    model, inputs = getattr(models, family)(dtype=torch.float32, layers=3, hidden=128, vocab=1000, seq=64)
    program = capture(model, inputs)
    rules = bind_program(program)
    return model, inputs, program, rules, solve(program, rules, make_mesh("dp=1", "cpu"), graph_hash=graph_hash(program), optimizer="none")


def saving(program: Program, rules: dict, how: str) -> dict[str, tuple[str, ...]]:
    """What the plan says of memory. Blocks alone are recomputed: what runs again of the loss is alive at the peak in any case."""
    blocks = tuple(n for n in replayable(program, rules) if ".*." in n)
    away = tuple(n for n in made_in_forward(program, rules) if ".*." in n)
    return {
        "kept": {},
        "recomputed": {"recompute": blocks},
        "offloaded": {"offload": away},
        "both": {"recompute": blocks[::2], "offload": away},
    }[how]


@pytest.mark.parametrize("how", ["kept", "recomputed", "offloaded", "both"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_counted_peak_is_what_torch_tracks(family: str, how: str, mesh: object) -> None:
    model, inputs, program, rules, plan = captured(family)
    chosen = plan.model_copy(update=saving(program, rules, how))
    counted = sum(lowered_peak(lower(program, rules, chosen), chosen).model_dump().values())
    pm = ParallelModule(compile_plan(program, chosen, training=True), model, chosen, mesh)  # type: ignore[arg-type]
    pm(**inputs)["loss"].backward()  # what is looked up once
    pm.zero_grad()
    tracker = MemTracker()
    tracker.track_external(pm, *inputs.values())
    with tracker:
        out = pm(**inputs)
        out["loss"].backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    print(f"{family} {how}: counted {counted}, tracked {peak}, ratio {counted / peak:.4f}")
    assert counted == pytest.approx(peak, rel=0.01)
