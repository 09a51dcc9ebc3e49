"""The planned peak against torch's `MemTracker` on the emitted step, which really runs: keeping everything, and two limits that bind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

import models

from netmind_autopar import Plan
from netmind_autopar.api import compile_plan, plan_program
from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.program import Program
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.module import ParallelModule
from netmind_autopar.solver.saving.cut import Cut
from netmind_autopar.solver.saving.decide import Task
from netmind_autopar.solver.saving.mix import least
from netmind_autopar.solver.saving.tape import Tape
from netmind_autopar.solver.search import solve_problem
from netmind_autopar.tracer.capture import capture

SIZES = {"dtype": torch.float32, "layers": 4, "hidden": 256, "heads": 8, "vocab": 2000, "seq": 256}
SHARES = (1.0, 0.6, 0.2)  # of what can be saved at most, kept


def tracked(model: torch.nn.Module, inputs: dict[str, torch.Tensor], program: Program, plan: Plan, mesh: DeviceMesh) -> int:
    """Bytes at the peak of a step of the emitted module, as torch tells it."""
    module = ParallelModule(compile_plan(program, plan, training=True), model, plan, mesh)
    module(**inputs)["loss"].backward()  # what is looked up once
    module.zero_grad()
    tracker = MemTracker()
    tracker.track_external(module, *inputs.values())
    with tracker:
        out = module(**inputs)
        out["loss"].backward()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def plans(program: Program) -> Iterator[tuple[float, Plan]]:
    """Plans for one device at the shares above: 0 is the least peak that the planner knows, 1 keeps everything."""
    mesh = make_mesh("dp=1", "cpu")
    task = Task(program, bind_program(program), mesh, Conversions(mesh, None), "global", 0)
    problem = task.build().problem
    first = solve_problem(problem).choice
    assert first is not None
    tape = Tape(problem, first)
    low, high = least(tape, Cut(tape))[1].peak, tape.run().peak
    for share in SHARES:
        limit = int(low + share * (high - low)) if share < 1 else None
        yield share, plan_program(program, mesh, lambda _: None, memory=limit, optimizer="none")


def rows() -> Iterator[dict[str, Any]]:
    """Per model and limit: the peak that was planned, the peak that was tracked, bytes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        for name in ("gpt2", "llama"):
            sizes = SIZES if name == "gpt2" else {k: v for k, v in SIZES.items() if k != "heads"}
            model, inputs = getattr(models, name)(**sizes)
            program = capture(model, inputs)
            for share, plan in plans(program):
                peak = tracked(model, inputs, program, plan, mesh)
                yield {"model": name, "share": share, "planned": plan.cost.peak_bytes, "tracked": peak, "recomputed": len(plan.recompute)}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in rows():
        print(found, f"off by {found['planned'] / found['tracked'] - 1:.3%}", flush=True)
