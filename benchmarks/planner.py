"""What planning costs and what it is worth: one line per check with what was measured, the bar, and whether it is met.

    python benchmarks/planner.py [--only llama8b,growth] [--json] [--out FILE]

CPU seconds are those of this process, capture included, beyond imports. Every check runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import large_models
import small_problems

from netmind_autopar import AutoparError, Plan, plan
from netmind_autopar.api import plan_program
from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.baselines import compare_baselines
from netmind_autopar.solver.saving.cut import Cut
from netmind_autopar.solver.saving.decide import Task
from netmind_autopar.solver.saving.joint import solve_joint
from netmind_autopar.solver.saving.mix import fit
from netmind_autopar.solver.saving.tape import Tape
from netmind_autopar.solver.search import solve_problem
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash

GIB = 2**30
Row = dict[str, Any]


def row(check: str, measured: Any, bar: Any, ok: bool, **more: Any) -> Row:
    return {"check": check, "measured": measured, "bar": bar, "ok": bool(ok), **more}


def warm() -> None:
    """Import what a first plan imports."""
    tiny = torch.nn.Linear(8, 8, device="meta")
    plan(tiny, torch.zeros(8, 8), "dp=2,tp=2", cluster="h100-sxm")
    large_models.llama(1, hidden=64, wide=128, heads=4, kv=2, vocab=128)


def planned(name: str, make: Callable[[], tuple[torch.nn.Module, Any]], mesh: str, bar_s: float, gap: float | None, **options: Any) -> Row:
    """gap: its bar; None where there is none."""
    model, inputs = make()
    start = time.process_time()
    found = plan(model, inputs, mesh, cluster="h100-sxm", outputs=("loss",), **options)
    spent = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row(
        name,
        {"cpu_s": round(spent, 2), "gap": float(f"{found.gap:.3g}"), "process_gib": round(memory, 2)},
        {"cpu_s": bar_s, "gap": gap, "process_gib": 1.5},
        spent <= bar_s and (gap is None or found.gap <= gap) and memory <= 1.5,
        **summary(found),
    )


def summary(found: Plan) -> Row:
    return {
        "step_s": found.cost.step_s,
        "timeline_s": found.cost.timeline_s,
        "timeline_gap": round(found.timeline_gap, 4),
        "least_sum_s": found.least_sum_s,
        "peak_gib": round(found.cost.peak_bytes / GIB, 2),
        "recomputed": len(found.recompute),
        "offloaded": len(found.offload),
        "status": found.status,
    }


def llama8b() -> Iterator[Row]:
    yield planned("Llama-3-8B, 32 layers, batch 64 x 8192, dp=32,tp=8", lambda: large_models.llama_8b(32, 64), "dp=32,tp=8", 8.0, 1e-3)


def three_axes() -> Iterator[Row]:
    for batch in (16, 64):
        name = f"Llama-3-8B, batch {batch}, a=4,b=4,c=2, 70 GB"
        yield planned(name, lambda b=batch: large_models.llama_8b(32, b), "a=4,b=4,c=2", 15.0, 5e-3, memory="70GB")  # type: ignore[misc]


def large() -> Iterator[Row]:
    yield planned("Llama-3-70B, 80 layers, dp=64,tp=8", lambda: large_models.llama_70b(80, 64), "dp=64,tp=8", 15.0, None)
    name = "Llama-3-405B, 126 layers, a=128,b=16,c=8"
    yield planned(name, lambda: large_models.llama_405b(126, 2048), "a=128,b=16,c=8", 25.0, None)


def growth() -> Iterator[Row]:
    spent = {}
    for layers in (8, 126):
        model, inputs = large_models.llama_8b(layers, 64)
        start = time.process_time()
        plan(model, inputs, "dp=32,tp=8", cluster="h100-sxm", outputs=("loss",), memory="10TB")
        spent[layers] = time.process_time() - start
    ratio = spent[126] / spent[8]
    yield row("growth from 8 to 126 layers", round(ratio, 2), 1.3, ratio <= 1.3, cpu_s={k: round(v, 2) for k, v in spent.items()})


def task(model: torch.nn.Module, inputs: Any, mesh: str, *, offload: bool = False) -> Task:
    program = capture(model, inputs, outputs=("loss",))
    links = make_mesh(mesh, "h100-sxm")
    return Task(program, bind_program(program), links, Conversions(links, None), "global", 2, offload)


def joint() -> Iterator[Row]:
    """80 blocks: the joint solve against sharding first and recomputation after, at shares of what keeping everything needs."""
    work = task(*large_models.llama_70b(80, 64), "dp=64,tp=8", offload=True)
    built = work.build()
    free = solve_problem(built.problem)
    assert free.choice is not None
    tape = Tape(built.problem, free.choice)
    whole = tape.run().peak
    for share in (0.5, 0.2, 0.08):
        limit = int(tape.resident + share * (whole - tape.resident))
        start = time.process_time()
        found = solve_joint(built.problem, free.choice, limit, allowed=None, bound=free.bound, gap=1e-3, time_limit=60.0)
        spent = time.process_time() - start
        alone = fit(tape, Cut(tape), limit)
        gap = 1 - found.bound / found.seconds
        later = alone.run.seconds if alone else None
        ok = found.fits and spent <= 10 and gap <= 0.01 and (later is None or found.seconds <= later * (1 + 1e-12))
        yield row(
            f"joint solve, 80 blocks, {share:.0%} of keeping all activations",
            {"cpu_s": round(spent, 2), "gap": round(gap, 4), "sequential_over_joint": round(later / found.seconds, 4) if later else None},
            {"cpu_s": 10, "gap": 0.01, "sequential_over_joint": ">= 1, somewhere > 1"},
            ok,
            step_s=found.seconds,
            free_s=free.seconds,
            waits_s=found.waits_s,
        )


def folded() -> Iterator[Row]:
    """The same objective when every layer is decided for itself."""
    from netmind_autopar.solver import kinds as module
    from netmind_autopar.solver.saving import decide

    usual = module.classes
    for binding in (False, True):
        model, inputs = large_models.llama_8b(4, 64)
        work = task(model, inputs, "dp=8,tp=4")
        free = solve_problem(work.build().problem, gap=1e-6)
        limit = None
        if binding:
            assert free.choice is not None
            tape = Tape(work.build().problem, free.choice)
            limit = int(tape.resident + 0.6 * (tape.run().peak - tape.resident))
        steps = {}
        for fold in (True, False):
            names = usual if fold else (lambda program, rules=None: dict(unfolded(usual(program, rules))))
            module.classes = decide.classes = names  # type: ignore[assignment]
            try:
                mesh = make_mesh("dp=8,tp=4", "h100-sxm")
                mesh = replace(mesh, device=replace(mesh.device, fragmentation=0.0))  # the limit is of tensors
                found = solve_problem(work.build().problem, gap=1e-6) if limit is None else None
                steps[fold] = (
                    found.seconds if found else plan_program(work.program, mesh, lambda _: None, memory=limit, micro_batches=1).cost.step_s
                )
            finally:
                module.classes = decide.classes = usual
        off = steps[True] / steps[False] - 1
        name = f"folded against unfolded, 4 layers, memory {'binding' if binding else 'loose'}"
        yield row(name, float(f"{off:.3g}"), 1e-5, abs(off) <= 1e-5, folded_s=steps[True], unfolded_s=steps[False])


def unfolded(names: dict[str, str]) -> Iterator[tuple[str, str]]:
    for node, name in names.items():
        yield node, name if name.startswith(("output.", "input.")) else node.removesuffix("_again")


def baselines() -> Iterator[Row]:
    for name, make in large_models.FIVE.items():
        for devices, mesh in ((8, "tp=8"), (64, "dp=8,tp=8"), (256, "dp=32,tp=8")):
            model, inputs = make(devices)
            program = capture(model, inputs, outputs=("loss",))
            links = make_mesh(mesh, "h100-sxm")
            try:
                ours = plan_program(program, links, lambda _: None)
            except AutoparError as e:
                yield row(f"{name} on {devices} H100", e.what, "a plan", False)
                continue
            rules = bind_program(program)
            options = {"graph_hash": graph_hash(program), "cluster": "h100-sxm", "time_limit": 30.0}
            rows = [c.row for c in compare_baselines(program, rules, links, **options)]
            planned = {r.name: r for r in rows if r.status == "planned"}
            times = {k: r.timeline_s for k, r in planned.items()}
            sums = {k: r.step_s or 0.0 for k, r in planned.items()}
            won = {"wins_by": least_above(ours.cost.timeline_s, times), "sum_wins_by": least_above(ours.least_sum_s, sums)}
            best = min(times, key=lambda k: times[k], default="")
            yield row(
                f"{name} on {devices} H100 ({mesh})",
                {k: round(w, 4) if w is not None else "no baseline fits" for k, w in won.items()} | {"over": best},
                ">= 0 against every baseline, on the timeline and, for the least sum, one after the other",
                all(w is None or w >= -1e-9 for w in won.values()),
                baselines_s={k: float(f"{v:.6g}") for k, v in sorted(times.items(), key=lambda kv: kv[1])},
                others={r.name: r.status for r in rows if r.status != "planned"},
                **summary(ours),
            )


def least_above(ours: float, others: dict[str, float]) -> float | None:
    """By what share `ours` is below the least of the others."""
    return 1 - ours / min(others.values()) if others else None


def small() -> Iterator[Row]:
    equal, worse, checked = small_problems.compare(50)
    yield row("50 small problems against brute force", {"equal": equal, "worst_excess": worse}, {"equal": checked}, equal == checked)


def partitioner() -> Iterator[Row]:
    """Recomputation at the peaks of torch's own partitioner, and over limits; bars for the time as priced, the fused one beside them."""
    import partitioner as against

    for fused in (False, True):
        for name, make in against.MODELS.items():
            on = against.subject(*make(), fused=fused)
            found = against.verdict(list(against.against_torch(on, against.BUDGETS)), list(against.sweep(on)))
            bars = {"least_ratio": 1.0, "least_middle_ratio": 1.3, "least_used": 0.98, "planned, monotone, never_above": True}
            title = f"torch's partitioner, {name}" + (", fused ops free (no bar)" if fused else "")
            shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
            yield row(title, shown, None if fused else bars, fused or against.fine(found))


def memtracker() -> Iterator[Row]:
    import memtracker as tracker

    for found in tracker.rows():
        off = found["planned"] / found["tracked"] - 1
        title = f"planned peak against MemTracker, {found['model']}, {found['share']:.0%} of what can be saved kept"
        yield row(title, float(f"{off:.3g}"), 0.01, abs(off) <= 0.01, **found)


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    f.__name__: f for f in (llama8b, three_axes, large, growth, folded, joint, baselines, small, partitioner, memtracker)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, separated by commas")
    parser.add_argument("--json", action="store_true", help="one line of JSON per check")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fine = True
    for name in args.only.split(","):
        if name not in CHECKS:
            parser.error(f"no check {name!r}; there are {', '.join(CHECKS)}")
        if not args.here:  # caches, memory and the first use of imports of one check do not help another
            command = [sys.executable, __file__, "--only", name, "--here", *(["--json"] * args.json)]
            fine &= subprocess.run([*command, *(["--out", str(args.out)] if args.out else [])], check=False).returncode == 0
            continue
        warm()
        for found in CHECKS[name]():
            fine &= found["ok"]
            line = json.dumps(found)
            print(
                line if args.json else f"{'ok  ' if found['ok'] else 'MISS'} {found['check']}: {found['measured']} (bar {found['bar']})",
                flush=True,
            )
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
