"""Every model of the zoo: captured, planned, proven in lockstep; writes docs/models.md.

    python benchmarks/zoo.py                  all models, in full; continues where an interrupted run stopped
    python benchmarks/zoo.py gpt2 t5          these models; the table keeps what is known of the others
    python benchmarks/zoo.py --quick          ten models, two meshes, float64; writes nothing

A proof is one plan, all ranks in lockstep against the original model over two training steps: every output, gradient and buffer.
Per mesh there are in float64 the solver's plan, the solver's under random prices (up to two axes), and a random legal strategy for
every op; in float32 the solver's, on three axes a random one.
Results are kept per model in benchmarks/results/zoo.json and used again while the sources of package and model are unchanged.
Every model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
CACHE, TABLE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "models.md"
MESHES, DTYPES, PLANS = ("a=4", "a=3", "a=2,b=2", "a=2,b=2,c=2"), ("float64", "float32"), ("solved", "random prices", "random")
QUICK = "gpt2 t5 clip mixtral_grouped unet2d_condition resnet14 dlrm lstm custom_op choices"
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
SOLVER_S, GAP, UNLIMITED = 20.0, 0.05, 1 << 60

Row = dict[str, Any]


def sources() -> str:
    """A hash of everything that a result depends on."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("netmind_autopar/**/*.py"), *ROOT.glob("tests/zoo*.py"), ROOT / "tests/models.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kinds(mesh: str, dtype: str) -> tuple[str, ...]:
    """The plans that are proven. Solving for three axes takes most of the time, so it is done once."""
    deep = mesh.count("=") > 2
    if dtype == "float64":
        return (PLANS[0], PLANS[2]) if deep else PLANS
    return PLANS[2:] if deep else PLANS[:1]


def prove(name: str, meshes: tuple[str, ...], dtypes: tuple[str, ...]) -> Row:
    """One model in this process: the row of the table with all its proofs."""
    import torch
    from zoo import ZOO

    from netmind_autopar.ir.program import op_name
    from netmind_autopar.rules.bind import bind_program
    from netmind_autopar.tracer.capture import capture

    torch.set_num_threads(1)
    capture(torch.nn.Linear(2, 2), torch.zeros(2, 2))  # imports what a first capture imports
    entry, row = ZOO[name], {"note": ZOO[name].note, "proofs": []}
    for dtype in dtypes:
        model, inputs = entry.make(getattr(torch, dtype))
        start = time.process_time()
        program = capture(model, inputs, **entry.options)
        row.setdefault("capture_s", round(time.process_time() - start, 2))
        rules = bind_program(program)
        row.setdefault("nodes", len(rules))
        row.setdefault("replicated", Counter(op_name(program.node(n)) for n, rule in rules.items() if not rule.known))
        for mesh in meshes:
            for kind in kinds(mesh, dtype):
                row["proofs"].append({"dtype": dtype, "mesh": mesh, "plan": kind, **proof(model, inputs, program, rules, mesh, kind)})
    return row


def proof(model: Any, inputs: Any, program: Any, rules: Any, mesh: str, kind: str) -> Row:
    """One plan against the original: largest error by tolerance, and what differs first when it is too large."""
    import torch
    from random_plans import random_plan

    from netmind_autopar.costs.device import make_mesh
    from netmind_autopar.passes.pipeline import lower
    from netmind_autopar.solver.solve import solve
    from netmind_autopar.tracer.hash import graph_hash
    from netmind_autopar.verification import compare

    start = time.process_time()
    try:
        if kind == "random":
            plan = random_plan(program, rules, mesh, seed=1)
        else:
            options: Row = {
                "memory_limit": UNLIMITED,
                "time_limit": SOLVER_S,
                "gap": GAP,
                "random_costs": 1 if kind == "random prices" else None,
            }
            plan = solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=graph_hash(program), **options)
        lowered = lower(program, rules, plan)
        report = compare(
            model, inputs, program, lowered, plan, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), emitted=True
        )
    except Exception as error:
        return {"ok": False, "errors": {}, "difference": f"{type(error).__name__}: {error}"[:500], "cpu_s": time.process_time() - start}
    errors: dict[str, float] = {}
    for one in report.rows:
        judge = min((n for n, t in TOLERANCES.items() if one.tolerance <= t), key=TOLERANCES.__getitem__, default="bfloat16")
        errors[judge] = max(errors.get(judge, 0.0), one.error)
    slow = sum(r.seconds for r in plan.replicated) / plan.cost.step_s if plan.cost.step_s else 0.0
    return {
        "ok": report.ok,
        "errors": errors,
        "difference": report.first_difference,
        "replicated_time": slow if kind == "solved" else 0.0,
        "cpu_s": round(time.process_time() - start, 2),
    }


def run_one(name: str, args: argparse.Namespace) -> Row:
    """`prove` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, *(["--quick"] if args.quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, env=environment, check=False)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr.strip()[-800:]}
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {args.timeout:.0f} s"}


def summary(row: Row) -> tuple[bool, str]:
    """Whether all is proven, and the text that says so."""
    if "failed" in row:
        return False, row["failed"].splitlines()[-1][:200] if row["failed"] else "died"
    good = sum(p["ok"] for p in row["proofs"])
    worst = ", ".join(f"{kind} {error:.1g}" for kind, error in worst_errors(row).items() if error is not None)
    text = f"{row['capture_s']} s, {row['nodes']} nodes, {good} of {len(row['proofs'])} plans exact, largest error {worst}"
    bad = next((f"; {p['dtype']} {p['mesh']} {p['plan']}: {p['difference']}" for p in row["proofs"] if not p["ok"]), "")
    return good == len(row["proofs"]), text + bad


def worst_errors(row: Row) -> dict[str, float | None]:
    return {kind: max((p["errors"][kind] for p in row["proofs"] if kind in p["errors"]), default=None) for kind in TOLERANCES}


def table(rows: dict[str, Row]) -> str:
    """docs/models.md."""
    done = {name: row for name, row in rows.items() if "failed" not in row}
    nodes = sum(r["nodes"] for r in done.values())
    without = sum(sum(r["replicated"].values()) for r in done.values())
    proofs = [p for r in done.values() for p in r["proofs"]]
    exact = sum(p["ok"] for p in proofs)
    head = f"""# Models

Written by `benchmarks/zoo.py`; the models are those of `tests/zoo.py`, small, built from configs or by hand, unmodified.

{len(done)} of {len(rows)} models are captured. {exact} of {len(proofs)} plans are exact: all ranks in lockstep against the original, every
output, gradient and buffer over two steps of SGD with momentum; in float64 the solver's plan, one under random
prices (up to two axes) and a random legal one, in float32 one plan per mesh.
{without} of {nodes} nodes ({_percent(without, nodes)}) are replicated for lack of a rule.

Errors are relative to the largest magnitude of the tensor; allowed are {", ".join(f"{t:g} in {n}" for n, t in TOLERANCES.items())}.
A float64 model that computes in float32 in places (norms, losses) is judged there as float32 against the original, and as float64 with
those places widened. "Time" is the share of the predicted step that ops without a rule take, on the mesh where it is largest.
"""
    lines = ["| model | what it has | capture, CPU s | nodes | no rule | time | meshes proven | float64 | float32 | bfloat16 |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    lines += [_line(name, row) for name, row in rows.items()]
    missing = Counter[str]()
    for row in done.values():
        missing.update(row["replicated"])
    listed = "\n".join(f"- `{op}`: {n}" for op, n in sorted(missing.items()))
    wrong = "\n".join(f"- {name}: {summary(row)[1]}" for name, row in rows.items() if not summary(row)[0])
    tail = (f"\nOps without a rule, with the number of their nodes:\n\n{listed}\n" if listed else "") + (
        f"\nNot proven:\n\n{wrong}\n" if wrong else ""
    )
    return head + "\n" + "\n".join(lines) + "\n" + tail


def _line(name: str, row: Row) -> str:
    if "failed" in row:
        return f"| {name} | {row.get('note', '')} | – | – | – | – | none | – | – | – |"
    without = sum(row["replicated"].values())
    time_share = max((p.get("replicated_time", 0.0) for p in row["proofs"]), default=0.0)
    proven = [m for m in dict.fromkeys(p["mesh"] for p in row["proofs"]) if all(p["ok"] for p in row["proofs"] if p["mesh"] == m)]
    meshes = " ".join(f"({','.join(axis.split('=')[1] for axis in m.split(','))})" for m in proven) or "none"
    errors = ["–" if e is None else f"{e:.0e}" for e in worst_errors(row).values()]
    share = f"{without} ({_percent(without, row['nodes'])})" if without else "0"
    spent = f"{100 * time_share:.1f}%" if without else "0"
    return f"| {name} | {row['note']} | {row['capture_s']:.1f} | {row['nodes']} | {share} | {spent} | {meshes} | {' | '.join(errors)} |"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"


def walk(names: list[str], args: argparse.Namespace, kept: dict[str, Row]) -> Iterator[tuple[str, Row]]:
    """Rows of the models that have none, as they come."""
    missing = [n for n in names if n not in kept]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(run_one, name, args): name for name in missing}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all by default")
    parser.add_argument("--quick", action="store_true", help="ten models, two meshes, float64; writes nothing")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at once")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one model")
    parser.add_argument("--stale", action="store_true", help="keep results of older sources")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(prove(args.one, *((("a=4", "a=2,b=2"), DTYPES[:1]) if args.quick else (MESHES, DTYPES)))))
        return 0
    from zoo import ZOO

    names = args.names or (QUICK.split() if args.quick else list(ZOO))
    if unknown := [n for n in names if n not in ZOO]:
        parser.error(f"no model {unknown[0]!r} in the zoo; there are {', '.join(ZOO)}")
    now = sources()
    cache: dict[str, Row] = json.loads(CACHE.read_text()) if CACHE.exists() and not args.quick else {}
    current = {n: r for n, r in cache.items() if n in ZOO and (args.stale or r["sources"] == now) and "failed" not in r}
    rows = dict(current)
    for name, row in walk(names, args, current if not args.names else {}):
        rows[name] = row
        cache[name] = {**row, "sources": now, "note": ZOO[name].note}
        rows[name] = cache[name]
        print(f"{len([n for n in names if n in rows])}/{len(names)} {name}: {summary(row)[1]}", flush=True)
        if not args.quick:
            CACHE.write_text(json.dumps(cache, indent=1, sort_keys=True) + "\n")
    text = table({name: rows.get(name) or cache[name] for name in ZOO if name in rows or (name in cache and not args.quick)})
    if args.quick:
        print(text)
    else:
        TABLE.write_text(text, encoding="utf-8")
    return 0 if all(summary(rows[name])[0] for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
