"""A model larger than its memory: parameters, gradients and optimizer state on disk, in one process of this machine.

GPT-2 with 1 GiB of parameters (4 GiB with gradients and AdamW's state) is planned for 256 MiB, with no host memory to wait in, and
trained for a few steps; so is the same model without a limit, in a process of its own. Losses must be equal bit by bit. Resident memory
is the kernel's own high-water mark (VmHWM, mapped files included). `resident_bytes` is what training adds to a process whose weights lie
on disk; `loading_bytes` the mark of bringing them there, `program_bytes` what stays of that: graphs and code. Before, a narrow model of
as many layers has run, so that libraries are loaded.

    python benchmarks/stowed.py                 both, and the comparison
    python benchmarks/stowed.py --small --json  a minute, one line of JSON
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")  # freed tensors go back to the kernel at once, and do not count as resident

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = {"small": (24, 384, 2048, 40), "large": (40, 768, 4096, 256)}  # layers, width, vocabulary, MiB for the plan
LEARNING_RATE = 1e-3


def build(size: str, device: str, width: int = 0) -> GPT2LMHeadModel:
    layers, full, vocab, _ = SIZES[size]
    width = width or full
    drops = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": vocab, "n_positions": 64, "n_embd": width, "n_layer": layers, "n_head": 8}
    torch.manual_seed(0)
    with torch.device(device):
        return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **drops))


def memory(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def steps(pm: torch.nn.Module, batch: dict[str, torch.Tensor], count: int) -> tuple[list[float], list[float]]:
    """Losses and seconds of some steps with AdamW."""
    optimizer = torch.optim.AdamW(pm.parameters(), lr=LEARNING_RATE)
    losses, seconds = [], []
    for step in range(count):
        start = time.perf_counter()
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = pm(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def train(args: argparse.Namespace) -> dict[str, Any]:
    """One process: plan, load, train; what it measured."""
    from netmind_autopar import autoparallelize
    from netmind_autopar import plan as make_plan
    from netmind_autopar.costs.device import make_mesh
    from netmind_autopar.runtime import parked
    from netmind_autopar.solver import build as builder

    if args.size == "small":  # what comes to the device at a time while the optimizer steps, small beside a small budget too
        parked.BUCKET_BYTES = builder.STATE_BUCKET_BYTES = 4 << 20
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = build(args.size, "meta")
    tokens = torch.randint(SIZES[args.size][2], (1, 64), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}
    budget = SIZES[args.size][3] << 20
    links = make_mesh(mesh, "cpu")
    links = replace(links, device=replace(links.device, host_memory_bytes=0))
    start = time.perf_counter()
    found = make_plan(model, batch, links, memory=budget if args.limit else 1 << 40, offload=args.limit, optimizer="adamw")
    planned = time.perf_counter() - start
    narrow = autoparallelize(build(args.size, "cpu", width=32), batch, mesh)
    steps(narrow, batch, 2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    pm = autoparallelize(model, batch, mesh, plan=found, weights=args.weights)
    gc.collect()
    loaded, ready = memory("VmHWM"), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    losses, seconds = steps(pm, batch, args.steps)
    peak = memory("VmHWM")
    whole = sum(p.numel() * 4 for p in pm.parameters())
    return {
        "losses": losses,
        "parameters_bytes": whole,
        "budget_bytes": budget,
        "planned_bytes": found.cost.peak_bytes,
        "resident_bytes": peak - ready,
        "loading_bytes": loaded - before,
        "program_bytes": ready - before,
        "step_s": min(seconds),
        "plan_s": planned,
        "on_disk": len([e for e in found.state if e.startswith("disk:param:")]),
        "entries": list(found.state)[:4],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", dest="size", action="store_const", const="small", default="large")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--limit", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.weights:
        print(json.dumps(train(args)))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("AUTOPAR_OFFLOAD")) as folder:
        weights = Path(folder) / "model.safetensors"
        save_file({n: p.detach().clone() for n, p in build(args.size, "cpu").named_parameters()}, weights)
        runs = []
        for more in ([], ["--limit"]):
            command = [sys.executable, __file__, "--weights", str(weights), "--steps", str(args.steps), *more]
            done = subprocess.run(command + ["--small"] * (args.size == "small"), capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    free, limited = runs
    over = limited["resident_bytes"] / limited["budget_bytes"]
    row = {
        "check": f"a model {limited['parameters_bytes'] / limited['budget_bytes']:.1f}x its memory, on disk ({args.size})",
        "measured": round(over, 3),
        "bar": 1.1,
        "ok": over <= 1.1 and limited["losses"] == free["losses"] and limited["parameters_bytes"] >= 4 * limited["budget_bytes"],
        "losses_equal": limited["losses"] == free["losses"],
        **{
            key: limited[key]
            for key in ("losses", "parameters_bytes", "budget_bytes", "planned_bytes", "resident_bytes", "loading_bytes", "program_bytes")
        },
        "resident_without_limit_bytes": free["resident_bytes"],
        "step_s": round(limited["step_s"], 3),
        "step_without_limit_s": round(free["step_s"], 3),
        "plan_s": round(limited["plan_s"], 2),
    }
    print(json.dumps(row) if args.json else json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
