"""Predicted against measured times.

    python benchmarks/validation.py --published FILE ... [--no-fit] [--seed N] [--plot FILE.png] [--json]
    python benchmarks/validation.py --local PROFILE.json [--pairs N] [--ranks N] [--json]

--published: runs that others measured (files with the header of vTrain's or torchtitan's runs) and tables of all-reduce times (as
    vTrain has them), or folders of both. Constants are fitted on half of the rows of a file, drawn by the seed, and judged on the
    others; --no-fit takes the constants that are in published.py and judges all rows.
--local: pairs of (model, plan), run on this machine with as many gloo processes as the profile was calibrated with
    (`netmind-autopar calibrate --ranks N`).
--json: a last line with the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent)]

import numpy as np
import published
import scatter
import validation_local

from netmind_autopar.ir.errors import AutoparError, InputError

MEMORY = "torchtitan, peak memory"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, ties at their mean rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if len(a) < 2:
        return 1.0
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def halves(rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """(fitted, judged): at most half is fitted."""
    order = random.Random(seed).sample(list(rows), len(rows))
    return order[: len(rows) // 2], order[len(rows) // 2 :]


def run_rows(path: Path, tables: Sequence[Any], fit: bool, seed: int) -> list[dict[str, Any]]:
    """One row per run of a file: what is predicted, what was measured, whether the fit has seen it."""
    rows = []
    runs = published.read(path)
    for group in dict.fromkeys(r.group for r in runs):
        mine, constants = [r for r in runs if r.group == group], published.FITTED[group]
        fitted, judged = halves(mine, seed)
        if fit and len(fitted) >= published.LEAST_ROWS:
            constants = published.fitted(fitted, constants, published.FREE[group], tables)
        else:
            fitted, judged = [], mine
        rows += [row(group, run.name, published.predict(run, constants, tables), run.seconds, run in fitted) for run in (*fitted, *judged)]
    return rows + memory_rows([r for r in runs if r.peak_gib], fit, seed)


def memory_rows(runs: Sequence[Any], fit: bool, seed: int) -> list[dict[str, Any]]:
    """One row per run whose peak was measured, in GiB."""
    fitted, judged = halves(runs, seed)
    kept = published.KEPT
    if fit and len(fitted) >= published.LEAST_ROWS:
        kept = published.fitted_memory(fitted)
    else:
        fitted, judged = [], list(runs)
    return [row(MEMORY, r.name, published.predict_gib(r, kept), r.peak_gib, r in fitted) for r in (*fitted, *judged)]


def row(group: str, run: str, predicted: float, measured: float, fitted: bool) -> dict[str, Any]:
    """Seconds, or GiB in the group MEMORY."""
    error = predicted / measured - 1
    return {"group": group, "run": run, "predicted": predicted, "measured": measured, "error": error, "fitted": fitted}


def table_rows(paths: Sequence[Path], fit: bool, seed: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """One row per size of the all-reduce tables, and the curves through what was fitted."""
    every = [row for path in paths for row in published.read_table(path)]
    fitted, judged = halves(every, seed) if fit else ([], every)
    curves = published.tables_of(fitted)
    rows = []
    for seen, some in ((True, fitted), (False, judged)):
        for (n, size, seconds), predicted in zip(some, published.table_seconds(some, curves), strict=True):
            rows.append(row("all-reduce tables", f"{n} GPUs, {size:.0f} B", predicted, seconds, seen))
    return rows, curves


def run_published(files: Sequence[str], fit: bool, seed: int) -> list[dict[str, Any]]:
    """One row per measured run or time of these files, and of what lies in these folders. Raises InputError for what cannot be read."""
    named = [Path(f) for f in files if not Path(f).is_dir()]
    found = [p for f in files if Path(f).is_dir() for p in sorted(Path(f).rglob("*")) if p.suffix == ".csv" or p.name.startswith("AR_GPU")]
    paths = [p for p in (*found, *named) if not p.is_dir()]
    tables = [p for p in paths if published.is_table(p)]
    rows, curves = table_rows(tables, fit, seed)
    for path in paths:
        if path not in tables:
            rows += run_rows(path, curves, fit, seed)
    if not rows:
        raise InputError("no measured run was found", where=", ".join(files), try_="files with the header of vTrain's or torchtitan's runs")
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows that no fit has seen."""
    judged = [r for r in rows if not r["fitted"]]
    errors = [abs(r["error"]) for r in judged]
    return {
        "rows": len(judged),
        "fitted": len(rows) - len(judged),
        "mape_pct": round(100 * float(np.mean(errors)), 2),
        "median_pct": round(100 * float(np.median(errors)), 2),
        "worst_pct": round(100 * max(errors), 2),
        "rank_correlation": round(rank_correlation([r["predicted"] for r in judged], [r["measured"] for r in judged]), 4),
    }


def show_published(rows: Sequence[dict[str, Any]], show_all: bool) -> dict[str, Any]:
    """The error table; its numbers."""
    for r in rows if show_all else ():
        mark = "fitted" if r["fitted"] else ""
        unit, scale = ("GiB", 1.0) if r["group"] == MEMORY else ("ms", 1e3)
        numbers = f"{r['predicted'] * scale:>12.3f} {unit:<3} {r['measured'] * scale:>12.3f} {unit:<3} {r['error']:>+7.1%}"
        print(f"{numbers} {mark:<7} {r['run']}")
    found = {group: summary([r for r in rows if r["group"] == group]) for group in dict.fromkeys(r["group"] for r in rows)}
    if len(both := [group for group in found if group.startswith("vtrain, ")]) > 1:
        found["vtrain, all"] = summary([r for r in rows if r["group"] in both])
    print(f"{'judged rows of':<24} {'rows':>5} {'fitted':>6} {'mean':>7} {'median':>7} {'worst':>7} {'ranks':>7}")
    for group, s in found.items():
        numbers = f"{s['mape_pct']:>6.1f}% {s['median_pct']:>6.1f}% {s['worst_pct']:>6.1f}% {s['rank_correlation']:>7.3f}"
        print(f"{group:<24} {s['rows']:>5} {s['fitted']:>6} {numbers}")
    return {**summary([r for r in rows if r["group"] != MEMORY]), "groups": found}


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """The judged rows as a PNG; colours as the groups come: blue, red, green, violet."""
    judged = [r for r in rows if not r["fitted"] and r["group"] != MEMORY]
    groups = dict.fromkeys(r["group"] for r in judged)
    pairs = [tuple([r[key] for r in judged if r["group"] == g] for key in ("measured", "predicted")) for g in groups]
    scatter.write_png(scatter.scatter(pairs), path)  # type: ignore[arg-type]


def show_local(found: dict[str, Any]) -> None:
    print(f"{'model':<24} {'plan':<12} {'predicted':>10} {'measured':>10} {'error':>7} {'CPU time':>10}")
    for r in found["rows"]:
        error = r["predicted_ms"] / r["measured_ms"] - 1
        times = f"{r['predicted_ms']:>7.2f} ms {r['measured_ms']:>7.2f} ms {error:>+7.0%} {r['cpu_ms']:>7.2f} ms"
        print(f"{r['model']:<24} {r['plan']:<12} {times}")
    print(f"{found['pairs']} pairs, {found['failed']} failed, load average {found['load']:.1f}")
    sums = f"of the sum of all work {found['kendall_tau_of_sums']:.2f}"
    print(f"Kendall τ {found['kendall_tau']:.2f}, mean within models {found['kendall_tau_within_models']:.2f}; {sums}")
    print(f"error: mean {found['mape_pct']:.0f}%, median {found['median_error_pct']:.0f}%")
    print(f"of CPU time: Kendall τ {found['kendall_tau_of_cpu_time']:.2f}, mean error {found['cpu_mape_pct']:.0f}%")
    for model, ratio in found["planner_over_fastest"].items():
        print(f"the planner's choice over the fastest, {model}: {ratio:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--published", metavar="FILE", nargs="+", help="measured runs and all-reduce tables, or folders of them")
    which.add_argument("--local", metavar="PROFILE.json", help="run plans on this machine, priced by this profile")
    parser.add_argument("--no-fit", action="store_true", help="with --published: fit nothing, judge every row")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="with --published: which rows are fitted (0)")
    parser.add_argument("--all", action="store_true", help="with --published: a line for every row")
    parser.add_argument("--plot", metavar="FILE.png", help="with --published: predicted over measured times of the judged rows")
    parser.add_argument("--pairs", type=int, default=42, metavar="N", help="with --local: pairs of (model, plan) (42)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="with --local: gloo processes (2)")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args()
    try:
        if args.published:
            rows = run_published(args.published, not args.no_fit, args.seed)
            found = show_published(rows, args.all)
            if args.plot:
                plot(rows, args.plot)
        else:
            found = validation_local.run(args.local, args.pairs, args.ranks, lambda text: print(text, file=sys.stderr, flush=True))
            show_local(found)
    except (AutoparError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
