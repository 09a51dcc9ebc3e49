"""Do checkpoints survive? Runs that are killed while they save, files that are damaged, other meshes, full disks: real gloo processes.

    python benchmarks/checkpoints.py                    a table
    python benchmarks/checkpoints.py --json             a line of JSON per row: check, measured, bar, ok; as in benchmarks/results
    python benchmarks/checkpoints.py --only pairs       rows whose name has this in it

A killed process leaves what it wrote in the page cache of a machine that goes on: that the bytes are on the disk too (fsync) is in the
code, and not shown here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

import checkpoint_kit as kit
import torch

PAIRS = (
    ("a=1", "a=2", "adamw"),
    ("a=2", "a=1", "adamw foreach"),
    ("a=2", "a=4", "adamw fused"),
    ("a=4", "a=2", "sgd"),
    ("a=3", "a=4", "adamw"),
    ("a=4", "a=3", "adamw"),
    ("a=2,b=2", "a=3", "adamw"),
    ("a=1", "a=2,b=2", "adamw parked"),
    ("a=8", "a=4", "adamw"),
    ("a=3", "a=2,b=4", "adamw"),
    ("a=2,b=4", "a=1", "adamw parked"),
    ("a=4,b=2", "a=2,b=4", "adamw"),
)

Row = tuple[str, str, str, bool]  # check, measured, bar, ok


def kills(count: int, folder: Path) -> Iterator[Row]:
    """Four of five lives are of one process, the others of two, of which one is killed."""
    for world, number in ((1, count * 4 // 5), (2, count - count * 4 // 5)):
        found = kit.kills({"mesh": f"a={world}", "world": world, "kills": number, "seed": world}, folder)
        moments = ", ".join(f"{n} {name}" for name, n in found["moments"].items())
        left = f"{found['torn']} left a save unfinished"
        text = f"{found['right']} of {found['loads']} loads right, {found['hung']} hung, {left} ({moments}) {'; '.join(found['bad'])}"
        ok = found["right"] == found["loads"] and not found["hung"]
        yield f"kill -9 in save, {number} times, {world} process{'es' * (world > 1)}", text.strip(), "all right", ok


def damage(count: int, folder: Path) -> Iterator[Row]:
    found = kit.corruptions({"mesh": "a=2", "world": 2, "count": count, "seed": 1}, folder)
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(found["kinds"].items()))
    text = f"{found['named']} named, {found['fell_back']} loaded the one before ({kinds}) {'; '.join(found['bad'])}".strip()
    yield f"{count} damaged checkpoints", text, f"{count} of {count} named", found["named"] == found["fell_back"] == count


def pairs(folder: Path) -> Iterator[Row]:
    for number, (a, b, optimizer) in enumerate(PAIRS):
        place = folder / f"pair-{number}"
        place.mkdir()
        name, parked = optimizer.removesuffix(" parked"), optimizer.endswith(" parked")
        case = {"a": ("gpt2", a, number, name, parked), "b": ("gpt2", b, number + 1, name, parked)}
        found = kit.save_and_load(case, place)
        text = f"{len(found['differ'])} of {found['tensors']} tensors differ, next loss {found['loss_error']:.1e}"
        ok = found["all_equal"] and found["loss_error"] <= 1e-6
        yield f"save on {a}, load on {b} ({optimizer})", text, "0 differ, loss ≤1e-6", ok


def troubles(folder: Path) -> Iterator[Row]:
    for kind in ("disk full", "no space", "read-only", "gone"):
        ranks = kit.trouble({"world": 2, "trouble": kind}, folder)["ranks"]
        same = [r.get("kind") for r in ranks] == ["CheckpointError"] * 2
        ok = same and all(r["same"] and r["step"] == 1 and not r["left"] and r["seconds"] < 30 for r in ranks)
        text = f"{', '.join(str(r.get('kind')) for r in ranks)} in {max(r['seconds'] for r in ranks):.2f} s; step {ranks[0]['step']} loads"
        yield f"{kind} in save, 2 ranks", text, "typed error on every rank, older one loads", ok
    for victims in (1, 2):
        found = kit.terminated({"world": 2, "victims": victims}, folder)
        errors = [one.get("error") for one in found["said"]]
        ok = errors == ["CheckpointError"] * 2 and found["seconds"] < 60 and set(found["steps"]) <= {1, 2}
        text = f"{', '.join(map(str, errors))} in {found['seconds']:.2f} s; step {found['steps'][0]} loads"
        yield f"SIGTERM in save for {victims} of 2 ranks", text, "typed error on every rank, older one loads", ok


def main() -> int:
    parser = argparse.ArgumentParser(description="What checkpoints survive.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kills, damage, pairs or troubles")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damaged", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        parts: dict[str, Any] = {"pairs": pairs(folder), "troubles": troubles(folder), "damage": damage(args.damaged, folder)}
        parts["kills"] = kills(args.kills, folder)
        for part, rows in parts.items():
            if args.only not in part:
                continue
            start = time.monotonic()
            for check, measured, bar, ok in rows:
                good &= ok
                seconds = round(time.monotonic() - start, 1)
                row = {"check": check, "measured": measured, "bar": bar, "ok": ok, "seconds": seconds}
                print(json.dumps(row, ensure_ascii=False) if args.json else f"{'ok  ' if ok else 'FAIL'} {check}: {measured}", flush=True)
                start = time.monotonic()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
