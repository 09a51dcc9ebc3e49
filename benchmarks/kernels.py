"""The fused kernels: compiled for a Hopper GPU without one, timed on one, tuned on one.

    kernels.py --compile-gate [--json] [--first] [NAME ...]     no GPU needed: registers, spills, widths of accesses, wgmma
    kernels.py --time [--json] [NAME ...]                       against eager, torch.compile and Liger-Kernel where it is installed
    kernels.py --tune FILE                                      times every registered configuration, writes the fastest

The exit status is 1 when a configuration fails the gate, 2 when there is no CUDA device to time on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def show(rows: Iterable[dict[str, Any]], as_json: bool, bad: str = "why") -> int:
    """Print rows as they come; how many of them have something in the field `bad`."""
    count = 0
    for row in rows:
        count += bool(row.get(bad))
        print(json.dumps(row) if as_json else "  ".join(f"{k} {v}" for k, v in row.items() if v not in ("", {})), flush=True)
    return count


def gate(args: argparse.Namespace) -> int:
    import kernel_gate

    from netmind_autopar.kernels.fused import language

    if language.triton is None or language.INTERPRETED:
        print("the gate compiles with Triton: install it, and leave TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    dtypes = (torch.bfloat16,) if args.first else (torch.bfloat16, torch.float32)
    return int(show(kernel_gate.rows(args.names, dtypes, every=not args.first), args.json) > 0)


def timed(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    import kernel_timing as timing

    device = torch.device("cuda", torch.cuda.current_device())
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "date": datetime.now(UTC).date().isoformat()}
    if args.tune:
        from netmind_autopar.kernels.fused.tuned import write_tuned

        found, rows = timing.tune(device)
        show(rows, args.json)
        write_tuned(args.tune, about["device"], found)
        return 0
    copy = timing.copy_bandwidth(device)
    show([{**about, "copy_bytes_s": round(copy)}], args.json)
    for case in timing.cases():
        if not args.names or any(n in case.name for n in args.names):
            show(timing.time_case(case, device, copy), args.json)
            torch.cuda.empty_cache()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--compile-gate", action="store_true")
    what.add_argument("--time", action="store_true")
    what.add_argument("--tune", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    parser.add_argument("--first", action="store_true", help="only each kernel's first configuration, in bfloat16")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only kernels or cases whose name contains one of these")
    args = parser.parse_args()
    return gate(args) if args.compile_gate else timed(args)


if __name__ == "__main__":
    sys.exit(main())
