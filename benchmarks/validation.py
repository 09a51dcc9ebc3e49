"""Predicted against measured times.

    python benchmarks/validation.py --local PROFILE.json [--pairs N] [--ranks N] [--json]

--local: pairs of (model, plan), run on this machine with as many gloo processes as the profile was calibrated with
(`netmind-autopar calibrate --ranks N`). `--json`: a last line with the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent)]

import validation_local


def show_local(found: dict[str, Any]) -> None:
    print(f"{'model':<24} {'plan':<12} {'predicted':>10} {'measured':>10} {'error':>7} {'CPU time':>10}")
    for r in found["rows"]:
        error = r["predicted_ms"] / r["measured_ms"] - 1
        times = f"{r['predicted_ms']:>7.2f} ms {r['measured_ms']:>7.2f} ms {error:>+7.0%} {r['cpu_ms']:>7.2f} ms"
        print(f"{r['model']:<24} {r['plan']:<12} {times}")
    print(f"{found['pairs']} pairs, {found['failed']} failed, load average {found['load']:.1f}")
    print(f"Kendall τ {found['kendall_tau']:.2f}, mean within models {found['kendall_tau_within_models']:.2f}")
    print(f"error: mean {found['mape_pct']:.0f}%, median {found['median_error_pct']:.0f}%")
    for model, ratio in found["planner_over_fastest"].items():
        print(f"the planner's choice over the fastest, {model}: {ratio:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local", metavar="PROFILE.json", required=True, help="run plans on this machine, priced by this profile")
    parser.add_argument("--pairs", type=int, default=42, metavar="N", help="pairs of (model, plan) (42)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="gloo processes (2)")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args()
    found = validation_local.run(args.local, args.pairs, args.ranks, lambda text: print(text, file=sys.stderr, flush=True))
    show_local(found)
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
