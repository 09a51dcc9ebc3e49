"""One of the processes of the test: `python -m netmind_autopar.doctor.collectives TASK.json RANK`.

Every collective is run with numbers whose result is known, over sizes, and timed. Nothing hangs: a timer ends the process, a collective
has a timeout, and so has the meeting at the start.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..calibrate.measure import COLLECTIVES, elements

SMALL, LARGE = 1 << 10, 8 << 20  # bytes that one device sends
WAIT_S = 20.0
KINDS = tuple(k for k in COLLECTIVES if k != "send")


def expected(kind: str, rank: int, world: int, count: int) -> torch.Tensor:
    """What a collective must bring to a rank when each gives its number plus one, as often as `count` says."""
    each = torch.arange(1.0, world + 1)
    if kind == "all_reduce":
        return torch.full((count,), float(each.sum()))
    if kind == "reduce_scatter":
        return torch.full((count // world,), float(each.sum()))
    if kind == "all_gather":
        return each.repeat_interleave(count)
    return each.repeat_interleave(count // world)


def call_of(kind: str, x: torch.Tensor, world: int, group: str) -> Callable[[], torch.Tensor]:
    ops, pieces = torch.ops._c10d_functional, [x.numel() // world] * world
    begin: dict[str, Callable[[], torch.Tensor]] = {
        "all_gather": lambda: ops.all_gather_into_tensor(x, world, group),
        "reduce_scatter": lambda: ops.reduce_scatter_tensor(x, "sum", world, group),
        "all_reduce": lambda: ops.all_reduce(x, "sum", group),
        "all_to_all": lambda: ops.all_to_all_single(x, pieces, pieces, group),
    }
    return lambda: ops.wait_tensor(begin[kind]())


def timed(call: Callable[[], Any], device: torch.device, until: float, most: int) -> float:
    """The shortest of some calls, seconds; the same number of calls on every rank."""
    best = float("inf")
    for _ in range(most):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        flag = torch.tensor([float(time.monotonic() > until)], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag.item():
            break
    return best


def test(task: dict[str, Any], rank: int, device: torch.device) -> list[dict[str, Any]]:
    """Of every collective: whether it is right, and seconds by bytes sent."""
    world, found = task["ranks"], []
    until = time.monotonic() + task["seconds"]
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for at, kind in enumerate(KINDS):
        times, right = [], True
        for sent in (SMALL, LARGE):
            count = elements(kind, world, sent)
            count = -(-count // world) * world
            call = call_of(kind, torch.full((count,), rank + 1.0, device=device), world, group)
            right &= bool(torch.equal(call().cpu(), expected(kind, rank, world, count)))
            share = until - (len(KINDS) - at - 1) * task["seconds"] / len(KINDS)
            times.append([sent, timed(call, device, share, 50 if sent == SMALL else 30)])
        found.append({"kind": kind, "right": right, "times": times})
    return found


def main() -> None:
    task, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    folder = Path(sys.argv[1]).parent
    deadline = threading.Timer(task["deadline_s"], lambda: os._exit(2))
    deadline.daemon = True
    deadline.start()
    torch.set_num_threads(task["threads"])
    device = torch.device("cuda", rank) if task["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), task["ranks"])
    wait = datetime.timedelta(seconds=WAIT_S)
    dist.init_process_group(task["backend"], store=store, rank=rank, world_size=task["ranks"], timeout=wait)
    (folder / f"found.{rank}").write_text(json.dumps(test(task, rank, device)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
