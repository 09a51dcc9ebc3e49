"""Predicted against measured step times on this machine: pairs of (model, plan), run for real on gloo processes.

The plans of a model are the planner's own, the usual recipes, and odd ones (drawn by random prices, then priced by the profile). A step is
forward and backward. All plans of a model are in memory at once and take turns, in several rounds in an order drawn anew, so that a busy
moment of the machine falls on one step of many plans rather than on all steps of one. A plan's measured time is the lower quartile over its
steps of the slowest rank. Predicted is the timeline, as the step runs with communication beside computation.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from torch import nn

from netmind_autopar import AutoparError, Plan, autoparallelize

RECIPES = ("ddp", "fsdp", "zero1", "megatron-tp")
ROUNDS, STEPS, WARM = 8, 2, 3  # of every plan; the first step of a round brings its memory back, and is not counted
MODEL_TIMEOUT_S = 300.0


def mlp(width: int, hidden: int, depth: int, batch: int) -> tuple[nn.Module, Any]:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)]
    return Loss(nn.Sequential(*layers)), (torch.randn(batch, width), torch.randint(width, (batch,)))


class Loss(nn.Module):
    """A model with its cross-entropy."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.body(x), target)


def gpt2(hidden: int, layers: int, vocab: int, batch: int, seq: int) -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "vocab_size": vocab, "n_positions": seq}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLMLoss", **drops))
    tokens = torch.randint(vocab, (batch, seq))
    return model, {"input_ids": tokens, "labels": tokens}


def convnet(channels: int, batch: int, size: int) -> tuple[nn.Module, Any]:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]

    body = nn.Sequential(
        *block(3, channels), *block(channels, channels), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 100)
    )
    return Loss(body), (torch.randn(batch, 3, size, size), torch.randint(100, (batch,)))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp of many rows": lambda: mlp(256, 512, 3, 2048),
    "gpt2": lambda: gpt2(128, 2, 1024, 8, 128),
    "wide mlp": lambda: mlp(1024, 4096, 1, 32),
    "gpt2, large vocabulary": lambda: gpt2(128, 1, 16384, 2, 128),
    "convolutions": lambda: convnet(32, 16, 32),
    "deep mlp": lambda: mlp(384, 768, 8, 128),
    "gpt2, wide": lambda: gpt2(384, 2, 512, 4, 64),
}


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return MODELS[name]()


@dataclass(frozen=True)
class Pair:
    model: str
    how: str  # "planner", a recipe, or "odd" and a seed
    plan: str  # the file's text
    predicted_s: float
    sum_s: float  # one after the other


def pairs(profile: str, count: int, ranks: int) -> list[Pair]:
    """About equally many plans of every model, no plan twice; `count` in all, fewer when there are no more."""
    from netmind_autopar.api import plan_program
    from netmind_autopar.costs.device import make_mesh
    from netmind_autopar.passes.timing import with_timeline
    from netmind_autopar.rules.bind import bind_program
    from netmind_autopar.tracer.capture import capture

    mesh = make_mesh(f"a={ranks}", profile)
    names = list(MODELS)[: max(2, min(len(MODELS), count // 5))]
    each = -(-count // len(names))
    found: list[Pair] = []
    for name in names:
        model, inputs = build(name)
        program = capture(model, inputs)
        seen: set[str] = set()
        ways = ["planner", *RECIPES, *(f"odd {seed}" for seed in range(40))]
        for way in ways:
            options: dict[str, Any] = {"baseline": way} if way in RECIPES else {}
            if way.startswith("odd"):
                options = {"random_costs": int(way.split()[1])}
            try:
                plan = plan_program(program, mesh, lambda _: None, **options)
                plan = repriced(program, plan, mesh)
            except AutoparError:
                continue
            key = json.dumps([plan.choices, plan.regather], sort_keys=True)
            if key not in seen and len(seen) < each:
                seen.add(key)
                plan, line = with_timeline(program, bind_program(program), plan, mesh)
                found.append(Pair(name, way, plan.dumps(), line.step_s, line.sequential_s))
    return found[:count]


def repriced(program: Any, plan: Plan, mesh: Any) -> Plan:
    """The same shardings, with the mesh's own prices and the conversions that are cheapest by them."""
    if plan.random_costs is None:
        return plan
    from netmind_autopar.costs.comm import Conversions
    from netmind_autopar.costs.memory import optimizer_states
    from netmind_autopar.rules.bind import bind_program
    from netmind_autopar.solver.problem import evaluate
    from netmind_autopar.solver.saving.decide import Task

    task = Task(program, bind_program(program), mesh, Conversions(mesh), plan.inputs, optimizer_states(plan.optimizer))
    built = task.build()
    choice = []
    for kind, node in zip(built.kinds, built.problem.nodes, strict=True):
        choice.append(node.labels.index(plan.choices[kind.name]) if kind.name in plan.choices else 0)
    cost = plan.cost.model_copy(update={"step_s": evaluate(built.problem, choice)[0]})
    return plan.model_copy(update={"random_costs": None, "cost": cost})


def measure(todo: Sequence[Pair], ranks: int, say: Callable[[str], None]) -> list[tuple[float, float] | None]:
    """(seconds, CPU seconds of rank 0) of a step of every pair; None for those that did not run in time or failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs").write_text(json.dumps([asdict(p) for p in todo]))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(folder)]
        workers = [subprocess.Popen([*command, str(r), str(ranks)], env=env, stdin=subprocess.PIPE) for r in range(ranks)]
        try:
            deadline, done = time.monotonic() + MODEL_TIMEOUT_S, 0
            while any(w.poll() is None for w in workers) and time.monotonic() < deadline:
                ready = len(list(folder.glob("time.*")))
                if ready > done:
                    deadline, done = time.monotonic() + MODEL_TIMEOUT_S, ready
                    say(f"{done} of {len(todo)} measured")
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        out: list[tuple[float, float] | None] = []
        for i in range(len(todo)):
            file = folder / f"time.{i}"
            out.append(json.loads(file.read_text()) if file.exists() else None)
        return out


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's τ: concordant minus discordant pairs, over all pairs."""
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    return float(np.sum(signs)) / len(signs) if signs else 1.0


def run(profile: str, count: int, ranks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The table and its summary."""
    todo = pairs(profile, count, ranks)
    say(f"{len(todo)} plans made")
    measured = measure(todo, ranks, say)
    rows = [
        {
            "model": p.model,
            "plan": p.how,
            "predicted_ms": 1e3 * p.predicted_s,
            "sum_ms": 1e3 * p.sum_s,
            "measured_ms": 1e3 * m[0],
            "cpu_ms": 1e3 * m[1],
        }
        for p, m in zip(todo, measured, strict=True)
        if m is not None
    ]
    errors = [abs(r["predicted_ms"] / r["measured_ms"] - 1) for r in rows]
    best: dict[str, float] = {}
    for r in rows:
        best[r["model"]] = min(best.get(r["model"], float("inf")), r["measured_ms"])
    chosen = {r["model"]: r["measured_ms"] / best[r["model"]] for r in rows if r["plan"] == "planner"}
    within = [kendall(*zip(*((r["predicted_ms"], r["measured_ms"]) for r in rows if r["model"] == m), strict=True)) for m in best]
    return {
        "rows": rows,
        "pairs": len(rows),
        "failed": len(todo) - len(rows),
        "kendall_tau": kendall([r["predicted_ms"] for r in rows], [r["measured_ms"] for r in rows]),
        "kendall_tau_of_cpu_time": kendall([r["predicted_ms"] for r in rows], [r["cpu_ms"] for r in rows]),
        "kendall_tau_of_sums": kendall([r["sum_ms"] for r in rows], [r["measured_ms"] for r in rows]),
        "load": os.getloadavg()[0],
        "kendall_tau_within_models": statistics.fmean(within) if within else None,
        "mape_pct": 100 * statistics.fmean(errors) if errors else None,
        "cpu_mape_pct": 100 * statistics.fmean(abs(r["predicted_ms"] / r["cpu_ms"] - 1) for r in rows) if rows else None,
        "median_error_pct": 100 * statistics.median(errors) if errors else None,
        "planner_over_fastest": chosen,
    }


def in_turns(modules: dict[int, nn.Module], inputs: Any) -> dict[int, list[tuple[float, float]]]:
    """(seconds of the slowest rank, CPU seconds of this one) of the steps of every module."""
    draw, found = random.Random(0), {i: [] for i in modules}
    for turn in range(ROUNDS):
        for i in draw.sample(list(modules), len(modules)):
            for step in range(STEPS + (WARM if turn == 0 else 1)):
                took = one_step(modules[i], inputs)
                if step >= (WARM if turn == 0 else 1):
                    found[i].append(took)
            modules[i].zero_grad()
    return found


def one_step(module: nn.Module, inputs: Any) -> tuple[float, float]:
    """Forward and backward: seconds of the slowest rank, CPU seconds of this one."""
    import torch.distributed as dist

    module.zero_grad()
    dist.barrier()
    start, before = time.perf_counter(), time.process_time()
    out = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    (out if isinstance(out, torch.Tensor) else out.loss).backward()
    spent, used = torch.tensor([time.perf_counter() - start]), time.process_time() - before
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent), used


def worker(folder: Path, rank: int, ranks: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("a",))
    todo = list(enumerate(json.loads((folder / "pairs").read_text())))
    for name, some in itertools.groupby(todo, key=lambda item: item[1]["model"]):
        model, inputs = build(name)
        plans = {i: Plan.loads(pair["plan"]) for i, pair in some}
        modules = {i: autoparallelize(copy.deepcopy(model), inputs, mesh, plan=plan) for i, plan in plans.items()}
        for i, times in in_turns(modules, inputs).items():
            if rank == 0:
                staged = folder / f"staged.{i}"
                staged.write_text(json.dumps([float(np.quantile(x, 0.25)) for x in zip(*times, strict=True)]))
                staged.replace(folder / f"time.{i}")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
