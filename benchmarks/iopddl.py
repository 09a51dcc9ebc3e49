"""Solve an instance of the public contest on intra-operator parallelism (https://github.com/google/iopddl).

    python benchmarks/iopddl.py INSTANCE.json[.gz] --time-limit 60 --out SOLUTION.json

Writes the chosen strategy of every node as a JSON list, counts its cost and peak usage out again from the file, independently of the
solver, and prints one line of JSON: cost, bound, feasible, seconds. The time limit covers reading, solving and writing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

from netmind_autopar.ir.errors import AutoparError
from netmind_autopar.solver.pairwise.instance import FORBIDDEN, read
from netmind_autopar.solver.pairwise.solve import solve


def recount(path: Path, choice: list[int]) -> tuple[int, int, int]:
    """(cost, peak usage, limit) straight from the file, in whole numbers, with plain Python: shares no code with the solver."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        problem = json.load(file)["problem"]
    nodes, edges = problem["nodes"], problem["edges"]
    assert len(choice) == len(nodes["costs"]), "one strategy per node"
    cost = sum(row[k] for row, k in zip(nodes["costs"], choice, strict=True))
    for (i, j), row in zip(edges["nodes"], edges["costs"], strict=True):
        cost += row[choice[i] * len(nodes["costs"][j]) + choice[j]]
    change: dict[int, int] = {}
    for (start, end), row, k in zip(nodes["intervals"], nodes["usages"], choice, strict=True):
        if start < end:
            change[start] = change.get(start, 0) + row[k]
            change[end] = change.get(end, 0) - row[k]
    peak = used = 0
    for moment in sorted(change):
        used += change[moment]
        peak = max(peak, used)
    return cost, peak, problem["usage_limit"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instance", type=Path)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="wall-clock seconds, reading included")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the list of chosen strategies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start, cpu = time.monotonic(), time.process_time()
    try:
        instance = read(args.instance)
        left = args.time_limit - 1.5 * (time.monotonic() - start)  # as long again for the recount is never needed: half is
        answer = solve(instance, time_limit=max(left, 1.0), seed=args.seed)
    except AutoparError as error:
        print(error, file=sys.stderr)
        return 2
    line: dict[str, object] = {"instance": instance.name, "cost": None, "bound": answer.bound, "feasible": False, "status": answer.status}
    if answer.choice is not None:
        if args.out:
            args.out.write_text(json.dumps(answer.choice))
        solved_s = time.monotonic() - start
        cost, peak, limit = recount(args.instance, answer.choice)
        feasible = peak <= limit and cost < FORBIDDEN
        line |= {"cost": cost, "bound": min(answer.bound, cost), "feasible": feasible, "peak": peak, "limit": limit}
        line |= {"gap": round((cost - min(answer.bound, cost)) / cost, 6) if cost else 0.0, "seconds": round(solved_s, 2)}
    line["cpu_s"] = round(time.process_time() - cpu, 2)
    print(json.dumps(line))
    return 0 if line["feasible"] else 1


if __name__ == "__main__":
    sys.exit(main())
