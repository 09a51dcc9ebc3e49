"""Random modules × meshes × odd plans: are losses, gradients and buffers of every one those of the original?

    make fuzz                                          200 modules, 3 meshes, solved plans under random prices and drawn plans
    python benchmarks/fuzz.py --only 17 --drawn 4      one module

Prints a line a module, for every failure the smallest module and plan that still fail, and at the end one JSON line, which also goes
to benchmarks/results/. Exit code 1 when something failed. The same arguments check the same modules and plans.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import logging

import torch
from random_check import Case, Subject, smallest, story
from random_modules import recipe_of

BAR = 1e-9
REDRAWN_BAR = 0.2  # share of draws that eager PyTorch may refuse, where there are enough modules to tell
ENOUGH = 20
MESHES = ("a=4", "a=2,b=2", "a=3")


@dataclass(frozen=True)
class Found:
    """What one module gave."""

    seed: int
    cases: int
    solved: int
    attempts: int
    steps: int
    nodes: int
    worst: float
    cpu_s: float
    failures: tuple[str, ...]


def check(seed: int, meshes: tuple[str, ...], solved: int, drawn: int, ops: int, shrink: bool) -> Found:
    """One module under all its plans."""
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    start, recipe = time.process_time(), recipe_of(seed, ops)
    subject = Subject(recipe)
    worst, failures, nodes = 0.0, [], 0
    kinds = [("solved", k) for k in range(solved)] + [("drawn", k) for k in range(drawn)]
    cases = [Case(mesh, kind, 1000 * seed + k) for mesh in meshes for kind, k in kinds]
    for case in cases:
        verdict = subject.judge(case)
        if verdict.ok:
            worst, nodes = max(worst, verdict.error), len(subject.program.graph.nodes)
            continue
        text = f"module {seed}, {case}: {verdict.text}"
        if shrink and not failures:
            text += "\n" + story(*_small(seed, ops, case))
        failures.append(text)
    cpu = time.process_time() - start
    return Found(
        seed, len(cases), sum(c.kind == "solved" for c in cases), recipe.attempts, len(recipe.steps), nodes, worst, cpu, tuple(failures)
    )


def _small(seed: int, ops: int, case: Case) -> tuple:
    recipe, least = smallest(recipe_of(seed, ops), case)
    return recipe, case, least


def walk(seeds: list[int], args: argparse.Namespace) -> Iterator[Found]:
    """Every module's result in order, as soon as it is there."""
    job = partial(check, meshes=tuple(args.meshes), solved=args.solved, drawn=args.drawn, ops=args.ops, shrink=not args.no_shrink)
    if args.jobs == 1:
        yield from map(job, seeds)
        return
    with ProcessPoolExecutor(args.jobs) as pool:
        yield from pool.map(job, seeds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="number of the first module")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the modules, instead of --modules and --seed")
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--solved", type=int, default=1, help="plans of the solver under random prices, a module and mesh")
    parser.add_argument("--drawn", type=int, default=2, help="plans drawn without prices, a module and mesh")
    parser.add_argument("--ops", type=int, default=10, help="ops a module, on average")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--no-shrink", action="store_true", help="name failures, do not look for smaller ones")
    parser.add_argument("--no-save", action="store_true", help="write nothing to benchmarks/results/")
    args = parser.parse_args()
    seeds = args.only if args.only else list(range(args.seed, args.seed + args.modules))
    found: list[Found] = []
    for one in walk(seeds, args):
        found.append(one)
        verdict = "FAILED" if one.failures else f"exact, {one.worst:.1e}"
        print(f"module {one.seed}: {one.steps} steps, {one.nodes} nodes, {one.cases} plans, {one.cpu_s:.1f} CPU s: {verdict}", flush=True)
        for text in one.failures:
            print(text, flush=True)
    result = summary(found, args)
    print(json.dumps(result))
    if not args.no_save:
        save(result)
    return 0 if result["ok"] else 1


def summary(found: list[Found], args: argparse.Namespace) -> dict:
    cases, failed = sum(f.cases for f in found), sum(len(f.failures) for f in found)
    draws = sum(f.attempts for f in found)
    redrawn = (draws - len(found)) / draws
    worst = max(f.worst for f in found)
    return {
        "check": f"random modules × {' / '.join(args.meshes)}",
        "measured": f"{cases - failed} of {cases} exact",
        "bar": "all",
        "ok": not failed and worst <= BAR and (redrawn <= REDRAWN_BAR or len(found) < ENOUGH),
        "modules": len(found),
        "first_seed": found[0].seed,
        "solved_plans": sum(f.solved for f in found),
        "drawn_plans": cases - sum(f.solved for f in found),
        "failed": failed,
        "failing_modules": [f.seed for f in found if f.failures],
        "worst_relative_error": worst,
        "redrawn_share": round(redrawn, 4),
        "nodes": sum(f.nodes for f in found),
        "cpu_s": round(sum(f.cpu_s for f in found), 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def save(result: dict) -> None:
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{result['date']}-fuzz.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
