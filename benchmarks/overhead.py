"""What the emitted module costs on one device: a training step of it against the same model run eagerly, alternated in one run.

Prints one JSON line. `measured` is the median over rounds of (emitted / eager) for forward and backward together; `with_adamw`
is the same with the optimizer's step, whose parameters are then DTensors. The order within a round alternates, so that a drift
of the machine's speed falls on both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

BAR = 1.03


def build(vocab: int, seq: int, dropout: float) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(vocab_size=vocab, n_positions=seq, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0, **drops)
    return GPT2LMHeadModel(config)


def stepper(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], float], Callable[[], float]]:
    """Two functions: seconds of one forward and backward, seconds of one step of AdamW after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def gradients() -> float:
        optimizer.zero_grad()
        start = time.perf_counter()
        model(**batch).loss.backward()
        return time.perf_counter() - start

    def update() -> float:
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    return gradients, update


def parallel(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The emitted module on a mesh of one device."""
    from torch.distributed.device_mesh import init_device_mesh

    from netmind_autopar import autoparallelize

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return autoparallelize(model, batch, init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.1, help="0.1 is GPT-2's own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(args.vocab, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}
    eager = stepper(build(args.vocab, args.seq, args.dropout), batch)
    ours = stepper(parallel(build(args.vocab, args.seq, args.dropout), batch), batch)
    ratios, with_adamw, eager_s = [], [], []
    for i in range(args.warmup + args.rounds):
        times: dict[str, tuple[float, float]] = {}
        order = (("eager", eager), ("ours", ours))
        for name, (gradients, update) in order if i % 2 else order[::-1]:
            times[name] = (gradients(), update())
        if i >= args.warmup:
            ratios.append(times["ours"][0] / times["eager"][0])
            with_adamw.append(sum(times["ours"]) / sum(times["eager"]))
            eager_s.append(times["eager"][0])
    measured = statistics.median(ratios)
    result = {
        "check": "one-rank step over eager, GPT-2 4 layers d=256",
        "measured": round(measured, 4),
        "bar": BAR,
        "ok": measured <= BAR,
        "with_adamw": round(statistics.median(with_adamw), 4),
        "eager_s": round(statistics.median(eager_s), 4),
        "rounds": args.rounds,
        "dropout": args.dropout,
    }
    print(json.dumps(result))
    torch.distributed.destroy_process_group()
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
