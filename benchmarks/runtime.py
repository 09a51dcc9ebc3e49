"""The emitted module against what people write by hand: both train in the same processes, in turns, a line of JSON per check.

    python benchmarks/runtime.py --json                  all checks
    python benchmarks/runtime.py --only ddp fsdp         some of them

Time: forward, backward and AdamW's step. In every round both sides make one step, in an order that alternates, each after a barrier;
`measured` is the median over rounds of (ours / peer), so that a drift of the machine's speed falls on both alike; `cpu` is the same of the
seconds of CPU that all processes spent, which other programs on the machine hardly change. Both begin with the same weights and see the
same batch; the losses of every round must be equal within rounding, else the row is not ok.

Memory: each side alone, in processes of its own, after two steps: bytes of what is there between steps (parameters, optimizer state, the
batch, DDP's buckets) and, over one more step, the most that torch's CPU allocator gave out beyond that, as its own events say. This
counts C++ and Python alike and nothing of the interpreter or of gloo. The process with the larger peak counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import runtime_exact
import runtime_peers as peers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

RTOL = 2e-4  # of losses: both sides take their own steps, whose roundings add up


@dataclass(frozen=True)
class Check:
    """Ours, the peer, how many processes; bars for the ratios of time and of peak memory (None: not asked)."""

    name: str
    ours: Callable[[argparse.Namespace], peers.Side]
    peer: Callable[[argparse.Namespace], peers.Side]
    world: int
    step: float | None
    peak: float | None = None
    limited: bool = False  # ours is planned for the memory that the peer takes
    options: dict[str, Any] = field(default_factory=dict)


def _ours(args: argparse.Namespace, make: Any = peers.gpt2, **options: Any) -> peers.Side:
    limit = {"memory": args.memory} if args.memory else {}
    return peers.ours(make, args, **limit, **options)


CHECKS = {
    "ddp": Check("GPT-2, against DistributedDataParallel", functools.partial(_ours, baseline="ddp"), peers.ddp, 2, 1.0, 1.0),
    "fsdp": Check("GPT-2, planned for the memory of fully_shard, against it", _ours, peers.fsdp, 2, 1.0, 1.05, limited=True),
    "tp": Check(
        "GPT-2, tensor parallel, against parallelize_module",
        functools.partial(_ours, make=peers.linears, axis="tp", baseline="megatron-tp"),
        peers.megatron,
        2,
        0.95,
    ),
    "compiled": Check(
        "one rank, compile=True, against torch.compile",
        functools.partial(_ours, compile=True),
        functools.partial(peers.eager, compiled=True),
        1,
        1.0,
    ),
    "eager": Check("one rank, against eager", _ours, peers.eager, 1, 1.0),
}


def timed(side: peers.Side) -> tuple[float, float, Tensor]:
    """Seconds of one step, all processes starting together; seconds of CPU that this process spent on it, all threads; its loss."""
    if dist.get_world_size() > 1:
        dist.barrier()
    start, spent = time.perf_counter(), time.process_time()
    loss = side.step()
    return time.perf_counter() - start, time.process_time() - spent, loss


def whole(side: peers.Side, loss: Tensor) -> float:
    """The loss of the whole batch."""
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    if side.mean:
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return float(loss)


def alternate(args: argparse.Namespace, check: Check) -> dict[str, Any]:
    """Steps of both sides in turns, by side: seconds of the slower process, seconds of CPU of all processes, and losses."""
    sides = {"ours": check.ours(args), "peer": check.peer(args)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.warmup + args.rounds):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            seconds, cpu, loss = timed(sides[name])
            losses[name].append(whole(sides[name], loss))
            if i >= args.warmup:
                times[name].append(seconds)
                spent[name].append(cpu)
    slower = torch.tensor([times["ours"], times["peer"]], dtype=torch.float64)
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    together = torch.tensor([spent["ours"], spent["peer"]], dtype=torch.float64)
    dist.all_reduce(together)
    found = {name: {"seconds": slower[i].tolist(), "cpu": together[i].tolist()} for i, name in enumerate(sides)}
    return {**found, "losses": losses}


def held_bytes(side: peers.Side) -> int:
    """Bytes that are there between steps: parameters, buffers, optimizer state, the batch, and the buckets of DDP's reducer."""
    state = [t for s in side.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    found = [*side.module.parameters(), *side.module.buffers(), *state, *side.batch.values()]
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in found]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}
    reducer = getattr(side.module, "reducer", None)
    buckets = reducer._get_zeros_like_grad_buckets() if reducer is not None else []
    return sum(storages.values()) + sum(b.buffer().untyped_storage().nbytes() for b in buckets)


def peak_bytes(side: peers.Side) -> int:
    """Bytes at the peak of a step: what is there between steps, and the most that the allocator gave out beyond it."""
    for _ in range(2):
        side.step()
    held = held_bytes(side)
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as found:
        side.step()
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return held + most


def work(rank: int, args: argparse.Namespace, folder: str, name: str, what: str) -> None:
    """One process. what: "time", or the side whose memory is measured. Rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", args.world), rank=rank, world_size=args.world)
    if what == "exact":
        found = runtime_exact.EXACT[name][1]()
    elif what == "time":
        found = alternate(args, CHECKS[name])
    else:
        check = CHECKS[name]
        peak = torch.tensor(peak_bytes((check.ours if what == "ours" else check.peer)(args)))
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        found = {"peak": int(peak)}
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(args: argparse.Namespace, name: str, what: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (args, folder, name, what), nprocs=args.world, start_method="spawn")
        return json.loads(Path(folder, "found").read_text())


def rows(args: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """The row of a check of numbers; or one for the time and one for the memory."""
    if name in runtime_exact.EXACT:
        found = run(argparse.Namespace(**{**vars(args), "world": 2}), name, "exact")
        yield {"check": runtime_exact.EXACT[name][0], **found, "processes": 2}
        return
    check = CHECKS[name]
    args = argparse.Namespace(**{**vars(args), "world": check.world, "memory": None})
    peaks: dict[str, int] = {}
    if check.peak is not None:
        peaks["peer"] = run(args, name, "peer")["peak"]
        args.memory = peaks["peer"] if check.limited else None
        peaks["ours"] = run(args, name, "ours")["peak"]
    found = run(args, name, "time")
    ratios, cpu = ([a / b for a, b in zip(found["ours"][k], found["peer"][k], strict=True)] for k in ("seconds", "cpu"))
    quarters = statistics.quantiles(ratios, n=4)
    losses = zip(found["losses"]["ours"], found["losses"]["peer"], strict=True)
    off = max(abs(a - b) / abs(b) for a, b in losses)
    about = {"processes": check.world, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    about |= {k: getattr(args, k) for k in ("layers", "batch", "seq", "vocab", "rounds")}
    measured = statistics.median(ratios)
    yield {
        "check": f"{check.name}: step time",
        "measured": round(measured, 4),
        "bar": check.step,
        "ok": measured <= check.step and off <= RTOL,
        "quartiles": [round(quarters[0], 4), round(quarters[2], 4)],
        "cpu": round(statistics.median(cpu), 4),
        "ours_s": round(statistics.median(found["ours"]["seconds"]), 4),
        "peer_s": round(statistics.median(found["peer"]["seconds"]), 4),
        "losses_apart": float(f"{off:.2g}"),
        **about,
    }
    if peaks:
        ratio = peaks["ours"] / peaks["peer"]
        yield {
            "check": f"{check.name}: peak memory",
            "measured": round(ratio, 4),
            "bar": check.peak,
            "ok": ratio <= check.peak,
            "ours_bytes": peaks["ours"],
            "peer_bytes": peaks["peer"],
            **about,
        }


def main() -> int:
    names = [*CHECKS, *runtime_exact.EXACT]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="checks (all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="global")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--json", action="store_true", help="one line of JSON per row")
    args = parser.parse_args()
    good = True
    for name in args.only:
        for row in rows(args, name):
            good &= row["ok"]
            shown = f"{'ok  ' if row['ok'] else 'MISS'} {row['check']}: {row['measured']} (bar {row['bar']})"
            print(json.dumps(row) if args.json else shown, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
