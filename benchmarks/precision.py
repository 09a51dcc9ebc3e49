"""GPT-2 under a policy of precision on two gloo processes, beside torch.autocast on one device: losses, bytes sent, skipped steps.

python benchmarks/precision.py          a table
python benchmarks/precision.py --json   a line per row: check, measured, bar, ok
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

from netmind_autopar import autoparallelize
from netmind_autopar.optim import GradScaler

STEPS, BATCH, LENGTH = 20, 8, 64
CLOSE = 0.01  # largest relative difference of a loss
POLICIES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16 overflowing": torch.float16}
SCALES = {"fp16": 2.0**12, "fp16 overflowing": 2.0**24}  # from the latter the first steps overflow, on each device by its own rows


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=1024, n_positions=LENGTH, bos_token_id=0, eos_token_id=0, **drops)
    return GPT2LMHeadModel(config)


def batches() -> list[dict[str, torch.Tensor]]:
    """Rows that count on from random starts: something to learn."""
    draw = torch.Generator().manual_seed(1)
    rows = [(torch.randint(0, 1024, (BATCH, 1), generator=draw) + torch.arange(LENGTH)) % 1024 for _ in range(STEPS)]
    return [{"input_ids": r, "labels": r} for r in rows]


def train(module: torch.nn.Module, scaler: Any, context: Any) -> tuple[list[float], int]:
    """Losses, and how many steps were left out."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses, skipped = [], 0
    for batch in batches():
        optimizer.zero_grad()
        with context():
            loss = module(**batch).loss
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        losses.append(float(loss.detach()))
    return losses, skipped


def alone() -> dict[str, Any]:
    """One process, without this package."""
    found = {}
    for name, dtype in POLICIES.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALES.get(name, 1.0), enabled=name in SCALES)
        context = contextlib.nullcontext if dtype is None else lambda dtype=dtype: torch.autocast("cpu", dtype)
        losses, skipped = train(build(), scaler, context)
        found[name] = {"losses": losses, "skipped": skipped}
    return found


def worker(folder: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    found: dict[str, Any] = {}
    for name in POLICIES:
        pm = autoparallelize(build(), batches()[0], mesh, precision=name.split()[0], baseline="fsdp", outputs=("loss",))
        scaler = GradScaler("cpu", init_scale=SCALES.get(name, 1.0), enabled=name in SCALES)
        losses, skipped = train(pm, scaler, contextlib.nullcontext)
        peak = pm.plan.cost.peak_bytes
        found[name] = {"losses": losses, "skipped": skipped, "sent": sum(pm.sent_bytes.values()), "peak": peak}
    (Path(folder) / f"found.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def two() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--rank"]
        started = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")
        return [json.loads((Path(folder) / f"found.{rank}").read_text()) for rank in (0, 1)]


def rows() -> list[dict[str, Any]]:
    """Every check with what was measured and the bar."""
    single, (ours, other) = alone(), two()
    out: list[dict[str, Any]] = []

    def row(check: str, measured: Any, bar: str, ok: bool) -> None:
        out.append({"check": check, "measured": measured, "bar": bar, "ok": ok})

    for name in POLICIES:
        pairs = zip(ours[name]["losses"], single[name]["losses"], strict=True)
        worst = max(abs(a - b) / b for a, b in pairs)
        if name != "fp16 overflowing":  # how many steps overflow depends on how many rows a device sums up in float16
            row(f"{name}: losses of {STEPS} steps, 2 processes against one device", worst, f"<= {CLOSE}", worst <= CLOSE)
        alike = ours[name]["losses"] == other[name]["losses"]
        row(f"{name}: both processes have the same losses", alike, "true", alike)
        first, last = ours[name]["losses"][0], ours[name]["losses"][-1]
        row(f"{name}: loss at first and last step", [first, last], "falls", last < first)
    skipped = [found["fp16 overflowing"]["skipped"] for found in (ours, other)]
    row("fp16: steps left out from a scale of 2^24, both processes", skipped, "equal, > 0", skipped[0] == skipped[1] > 0)
    ratio = ours["bf16"]["sent"] / ours["fp32"]["sent"]
    row("bf16: bytes sent, of fp32's, FSDP (2/3 but for norms and embeddings)", ratio, "<= 0.75", ratio <= 0.75)
    peak = ours["bf16"]["peak"] / ours["fp32"]["peak"]
    row("bf16: planned peak memory, of fp32's", peak, "<= 1.00", peak <= 1.0)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--rank", type=int, default=0)
    args = parser.parse_args()
    if args.folder:
        worker(args.folder, args.rank)
        return
    for found in rows():
        print(
            json.dumps(found) if args.json else f"{'ok' if found['ok'] else 'NO':3} {found['check']}: {found['measured']} ({found['bar']})"
        )


if __name__ == "__main__":
    main()
