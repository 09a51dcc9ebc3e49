"""Does communication beside computation shorten a real step? The same plan with and without it, on gloo processes of this machine.

GPT-2 (6 layers, d=512) trained by a hand-made recipe: forward and backward of both modules alternate within one run, so that a
drift of the machine's speed falls on both alike; the ratio is the median over rounds. gloo sends with the processor that computes:
where there are no more cores than processes, little can be won, and the threads that send take their turn from those that compute.

    python benchmarks/overlap.py                       data parallel, 2 processes
    python benchmarks/overlap.py --recipe fsdp --json  one line of JSON, as in benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": args.vocab, "n_positions": args.seq, "n_embd": 512, "n_layer": args.layers, "n_head": 8}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **drops))
    tokens = torch.randint(args.vocab, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": tokens, "labels": tokens}


def step_s(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward, all processes starting together."""
    module.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    module(**batch).loss.backward()
    return time.perf_counter() - start


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One process; rank 0 writes the result."""
    from netmind_autopar import Plan, autoparallelize, plan

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", args.world), rank=rank, world_size=args.world)
    mesh = init_device_mesh("cpu", (args.world,), mesh_dim_names=("dp",))
    model, batch = build(args)
    found = [plan(model, batch, mesh, baseline=args.recipe, timeline=True).dumps() if rank == 0 else ""]
    dist.broadcast_object_list(found)
    beside = Plan.loads(found[0])
    modules: dict[str, Any] = {
        "beside": autoparallelize(model, batch, mesh, plan=beside),
        "alone": autoparallelize(model, batch, mesh, plan=beside.model_copy(update={"overlap": False})),
    }
    times: dict[str, list[float]] = {name: [] for name in modules}
    for i in range(args.warmup + args.rounds):
        for name in list(modules)[:: 1 if i % 2 else -1]:
            seconds = step_s(modules[name], batch)
            if i >= args.warmup:
                times[name].append(seconds)
    if rank == 0:
        ratios = [a / b for a, b in zip(times["beside"], times["alone"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        cost = beside.cost
        result = {
            "check": f"step with communication beside computation over without, GPT-2 {args.layers} layers d=512, {args.recipe}",
            "processes": args.world,
            "cores": os.cpu_count(),
            "measured": round(statistics.median(ratios), 4),
            "quartiles": [round(quarters[0], 4), round(quarters[2], 4)],
            "predicted": round(cost.timeline_s / cost.step_s, 4),
            "alone_s": round(statistics.median(times["alone"]), 4),
            "beside_s": round(statistics.median(times["beside"]), 4),
            "started": modules["beside"].code().count(".start("),
            "batch": args.batch,
            "seq": args.seq,
            "vocab": args.vocab,
            "rounds": args.rounds,
            "load": round(os.getloadavg()[0], 1),
        }
        Path(folder, "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="ddp", help="a baseline of docs/baselines.md (ddp)")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="global")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--json", action="store_true", help="the result alone, as one line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (args, folder), nprocs=args.world, start_method="spawn")
        result = json.loads(Path(folder, "result").read_text())
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['check']}, {args.world} processes on {result['cores']} cores")
        print(f"  without {result['alone_s']:.3f} s, with {result['beside_s']:.3f} s: ratio {result['measured']:.3f}", end="")
        print(f" (quartiles {result['quartiles'][0]:.3f} to {result['quartiles'][1]:.3f}), predicted {result['predicted']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
