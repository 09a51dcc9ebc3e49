"""What it costs to plan GPT-2 XL (48 layers, meta device) on dp=4,tp=8: CPU seconds beyond imports, and memory.

Prints one JSON line. `measured` is the CPU time of `plan` in this process; modules are imported before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from netmind_autopar import plan

BAR_S, BAR_BYTES = 20.0, 2 << 30


def model(layers: int) -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=1600, n_head=25))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--mesh", default="dp=4,tp=8")
    parser.add_argument("--cluster", default="h100-sxm")
    parser.add_argument("--memory", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.zeros(8, 1024, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "labels": tokens}
    tiny = torch.nn.Linear(8, 8, device="meta")
    plan(tiny, torch.zeros(8, 8), args.mesh, cluster=args.cluster)  # imports what a first plan imports
    subject = model(args.layers)
    stages: list[tuple[str, float]] = []
    start = time.process_time()
    found = plan(
        subject, inputs, args.mesh, cluster=args.cluster, memory=args.memory, progress=lambda s: stages.append((s, time.process_time()))
    )
    end = time.process_time()
    ends = [t for _, t in stages[1:]] + [end]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "check": f"planning GPT-2 XL, {args.layers} layers, {args.mesh}",
        "measured": round(end - start, 2),
        "bar": BAR_S,
        "ok": end - start <= BAR_S and peak <= BAR_BYTES,
        "stages_s": {name: round(b - a, 2) for (name, a), b in zip(stages, ends, strict=True)},
        "process_peak_bytes": peak,
        "status": found.status,
        "gap": found.gap,
        "step_s": found.cost.step_s,
        "predicted_peak_bytes": found.cost.peak_bytes,
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
