"""One of the processes that measure: `python -m netmind_autopar.calibrate.measure TASK.json RANK`.

All processes run the ops at the same time, because that is how a step runs: on a CPU they share its memory bandwidth. Then groups of them
run collectives, on a CPU each behind some work as in a step: devices that come from work do not meet at the same moment, and threads that
slept wake up late, which costs a small collective more than what it sends. Last, how much work can run beside a collective.
Cases are visited in rounds, in an order drawn anew each time, until the time is up: a moment in which the machine is busy with something
else then spoils one sample of many cases rather than all samples of one.

Clocks: CUDA by events around many calls; a CPU with one thread by the thread's own CPU time, which other programs do not lengthen;
everything else, collectives too, by the wall clock, less what the work before them took.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..costs.space import MESSAGES
from .cases import OPS, Case, cases_for, pool_for, tensors

SAMPLE_S = 2e-4  # calls are repeated until a sample takes this long
MOST_CALLS = 64  # in a sample
ROUNDS = 12  # at most
REFUSED = -1  # calls of a case that does not run here
BETWEEN_S = 5e-4  # of work before every collective on a CPU: about what a step has between two of them
MEETINGS = 6  # collectives in a sample there
BESIDE = ("all_reduce", "all_gather")  # started before some work and waited for behind it
BESIDE_BYTES = (2**14, 2**18, 2**21)
LONG_S, FEW = 0.01, 4  # calls that take longer are visited in so many rounds only
COLLECTIVES = (*MESSAGES, "send")
TIMEOUT_S = 30.0  # of one collective: a lost process is noticed after this long at the latest
Samples = dict[str, list[float]]


class Clock:
    """Seconds of one call: the mean of `calls` in a row."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self._now = time.thread_time if threads == 1 else time.perf_counter

    def cpu(self, call: Callable[[], Any], calls: int, now: Callable[[], float]) -> float:
        start = now()
        for _ in range(calls):
            call()
        return (now() - start) / calls

    def op(self, call: Callable[[], Any], calls: int) -> float:
        if self.device.type != "cuda":
            return self.cpu(call, calls, self._now)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def wall(self, call: Callable[[], Any], calls: int) -> float:
        if self.device.type == "cuda":
            return self.op(call, calls)
        return self.cpu(call, calls, time.perf_counter)

    def behind(self, work: Callable[[], Any], call: Callable[[], Any], calls: int) -> float:
        """Seconds by which one call makes a step longer in which `work` precedes every call. CUDA: of the calls alone, which its stream
        runs one after the other in any case."""
        if self.device.type == "cuda":
            return self.op(call, calls)
        worked, start = 0.0, time.perf_counter()
        for _ in range(calls):
            begin = self._now()
            work()
            worked += self._now() - begin
            call()
        return (time.perf_counter() - start - worked) / calls


def calls_for(seconds: float) -> int:
    """How many calls make one sample, when one call takes this long."""
    return max(1, min(MOST_CALLS, round(SAMPLE_S / max(seconds, 1e-9))))


def meetings_for(seconds: float, device: torch.device) -> int:
    """How many collectives make one sample: on a CPU enough that neither device is always the one that waits."""
    return calls_for(seconds) if device.type == "cuda" else max(MEETINGS, calls_for(seconds)) if seconds < LONG_S else 2


def work_of(device: torch.device, clock: Clock) -> Callable[[], Any]:
    """About BETWEEN_S of work as a step has it: matrix products and additions that walk through memory. Equal on all processes."""
    side = 2048 if device.type == "cuda" else 256
    pool = torch.rand(16, side, side, device=device)
    turn = itertools.cycle(pool.unbind())

    def once() -> None:
        a = next(turn)
        torch.add(torch.mm(a, a[:, : side // 2])[:, :1], a)

    clock.op(once, 4)
    times = _agreed(max(1, round(BETWEEN_S / max(clock.op(once, 16), 1e-7))), None, device)

    def work() -> None:
        for _ in range(times):
            once()

    return work


def measure_beside(task: dict, groups: dict[int, Any], work: Callable[[], Any], clock: Clock) -> Samples:
    """The part of a collective, 0 to 1, beside which work can run: what it saves to start the collective before the work rather than behind
    it, over the shorter one of both. Samples for the group of all processes."""
    world, device = task["ranks"], clock.device
    samples: Samples = {}
    jobs = [(kind, sent) for sent in BESIDE_BYTES for kind in BESIDE if sent * world <= task["memory_bytes"] // 32]
    times: dict[tuple[str, int], int] = {}
    until = time.monotonic() + task["beside_s"]
    for _ in range(2 * ROUNDS):
        for kind, sent in jobs:
            if not _all_go_on(until, device):
                return samples
            start, finish = _halves(kind, world, sent, groups[world], device)
            if (kind, sent) not in times:
                finish(start())
                whole = clock.wall(_collective(kind, world, sent, 0, groups[world], device), MEETINGS)
                times[kind, sent] = _agreed(max(1, round(whole / max(clock.wall(work, MEETINGS), 1e-9))), groups[world], device)
            worked, apart, together = _three_ways(start, finish, work, times[kind, sent], clock)
            if min(worked, apart - worked) > 0:
                part = (apart - together) / min(worked, apart - worked)
                samples.setdefault(f"{kind} {world} {sent}", []).append(min(max(part, 0.0), 1.0))
    return samples


def _three_ways(
    start: Callable[[], Any], finish: Callable[[Any], Any], work: Callable[[], Any], times: int, clock: Clock
) -> tuple[float, float, float]:
    """Seconds of the work alone, of work and collective one after the other, and of both at once."""

    def worked() -> None:
        for _ in range(times):
            work()

    def apart() -> None:
        worked()
        finish(start())

    def together() -> None:
        sent = start()
        worked()
        finish(sent)

    out = []
    for call in (worked, apart, together):
        dist.barrier()
        out.append(clock.wall(call, MEETINGS))
    return out[0], out[1], out[2]


def measure_ops(task: dict, device: torch.device, clock: Clock, say: Callable[[str, float], None]) -> Samples:
    """Samples of every case that fits into the time."""
    cases, until = cases_for(device.type, task["seed"], task["memory_bytes"]), time.monotonic() + task["ops_s"]
    pool = pool_for(cases, device)
    draw, calls, samples = random.Random(task["seed"]), dict.fromkeys(map(str, cases), 0), {str(c): [] for c in cases}
    for turn in range(ROUNDS):
        order = cases if turn == 0 else draw.sample(cases, len(cases))  # cheap ones first: were the time short, they are there
        for case in order:
            if time.monotonic() > until:
                return samples
            if turn >= FEW and min(samples[str(case)], default=0.0) > LONG_S:
                continue
            if calls[str(case)] == REFUSED:
                continue
            try:
                samples[str(case)].append(_sampled(case, tensors(case, pool), clock, calls))
            except (RuntimeError, NotImplementedError):  # no kernel for this dtype here, or no memory: the case is left out
                calls[str(case)] = REFUSED
            say("ops", 1 - (until - time.monotonic()) / task["ops_s"])
    return samples


def _sampled(case: Case, given: tuple, clock: Clock, calls: dict[str, int]) -> float:
    run = OPS[case.op].call

    def call() -> Any:
        return run(*given)

    first = clock.op(call, 1)  # warms caches, and tells how long a call takes
    if not calls[str(case)]:
        calls[str(case)] = calls_for(first)
    return clock.op(call, calls[str(case)])


def measure_rest(device: torch.device, clock: Clock) -> Samples:
    """Seconds per launch of a tiny op, and of copies: across the host link, and within the memory where a collective repacks."""
    tiny = torch.ones(1, device=device)
    size = 64 << 20 if device.type == "cuda" else 8 << 20
    here, pieces = torch.ones(size // 4, device=device), torch.ones(4, 64, size // 1024, device=device)
    there = torch.empty_like(here, device="cpu", pin_memory=device.type == "cuda")
    todo: dict[str, Callable[[], Any]] = {
        "launch": lambda: torch.ops.aten.add.Tensor(tiny, tiny),
        "host.out": lambda: there.copy_(here, non_blocking=True),
        "host.back": lambda: here.copy_(there, non_blocking=True),
        "copy": lambda: pieces.movedim(0, 1).contiguous(),
    }
    found: Samples = {}
    for name, call in todo.items():
        calls = MOST_CALLS if name == "launch" else 4
        clock.op(call, calls)
        found[name] = [clock.op(call, calls) for _ in range(9)]
    found["amounts"] = [1.0, float(size), float(size), 2.0 * size]
    return found


def measure_collectives(
    task: dict, rank: int, groups: dict[int, Any], work: Callable[[], Any], clock: Clock, say: Callable[[str, float], None]
) -> Samples:
    """Samples of every collective over sizes, for every size of group; the same ones on every process."""
    world, device = task["ranks"], clock.device
    samples: Samples = {}
    until = time.monotonic() + task["collectives_s"]
    jobs = list(_jobs(task, device))
    calls: dict[tuple, int] = {}
    draw = random.Random(task["seed"])
    for turn in range(2 * ROUNDS):
        for at, (kind, group, sent) in enumerate(jobs if turn == 0 else draw.sample(jobs, len(jobs))):
            if at % 8 == 0 and not _all_go_on(until, device):
                return samples
            if rank < group:
                key = (kind, group, sent)
                call = _collective(kind, group, sent, rank, groups[group], device)
                clock.behind(work, call, 1)
                if key not in calls:
                    calls[key] = _agreed(meetings_for(clock.wall(call, 1), device), groups[group], device)
                samples.setdefault(f"{kind} {group} {sent}", []).append(clock.behind(work, call, calls[key]))
            if group < world:
                dist.barrier()
            say("collectives", 1 - (until - time.monotonic()) / task["collectives_s"])
    return samples


def _jobs(task: dict, device: torch.device) -> Iterator[tuple[str, int, int]]:
    """(collective, size of the group, bytes that one device sends): about what is asked for, whole elements per piece."""
    sizes = [2**e for e in (range(10, 31, 2) if device.type == "cuda" else range(8, 25))]
    for sent in sizes:
        for group in task["groups"]:
            for kind in COLLECTIVES:
                if (kind != "send" or group == 2) and sent * group <= task["memory_bytes"] // 32:
                    yield kind, group, sent


def elements(kind: str, group: int, sent: int) -> int:
    """Elements of 4 bytes that go in, such that one device sends about `sent` bytes."""
    share = {"all_gather": 1 / (group - 1), "reduce_scatter": group / (group - 1), "all_reduce": group / (2 * (group - 1)), "send": 1.0}
    count = max(1, round(sent / 4 * share.get(kind, group / (group - 1))))
    return -(-count // group) * group if kind in ("reduce_scatter", "all_to_all", "all_reduce") else count


def _collective(kind: str, group: int, sent: int, rank: int, process_group: Any, device: torch.device) -> Callable[[], Any]:
    if kind != "send":
        start, finish = _halves(kind, group, sent, process_group, device)
        return lambda: finish(start())
    x = torch.ones(elements(kind, group, sent), device=device)

    def call() -> None:
        if rank == 0:
            dist.send(x, 1, group=process_group)
        elif rank == 1:
            dist.recv(x, 0, group=process_group)

    return call


def _halves(kind: str, group: int, sent: int, process_group: Any, device: torch.device) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How a collective is started and waited for, as `runtime.collectives.ProcessWire` does it."""
    x = torch.ones(elements(kind, group, sent), device=device)
    ops, name, pieces = torch.ops._c10d_functional, process_group.group_name, [x.numel() // group] * group
    start: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: ops.all_gather_into_tensor(x, group, name),
        "reduce_scatter": lambda: ops.reduce_scatter_tensor(x, "sum", group, name),
        "all_reduce": lambda: ops.all_reduce(x, "sum", name),
        "all_to_all": lambda: ops.all_to_all_single(x, pieces, pieces, name),
    }
    return start[kind], ops.wait_tensor


def _all_go_on(until: float, device: torch.device) -> bool:
    """Whether rank 0 has time left; all processes learn the same."""
    flag = torch.tensor([1.0 if time.monotonic() < until else 0.0], device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def _agreed(calls: int, group: Any, device: torch.device) -> int:
    most = torch.tensor([float(calls)], device=device)
    dist.all_reduce(most, dist.ReduceOp.MIN, group=group)
    return int(most.item())


def _die_with_parent() -> None:
    """End when the process that started this one is gone: its end of our standard input closes."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    task, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    folder = Path(sys.argv[1]).parent
    threading.Thread(target=_die_with_parent, daemon=True).start()
    deadline = threading.Timer(task["deadline_s"], lambda: os._exit(2))
    deadline.daemon = True
    deadline.start()
    if task["device"] == "cuda":
        torch.cuda.set_device(rank)
    device = torch.device(task["device"], rank) if task["device"] == "cuda" else torch.device("cpu")
    torch.set_num_threads(task["threads"])
    torch.manual_seed(task["seed"])
    clock = Clock(device, task["threads"])
    last = [0.0]

    def say(what: str, part: float) -> None:
        if rank == 0 and time.monotonic() - last[0] > 0.2:
            last[0] = time.monotonic()
            staged = folder / "progress.new"
            staged.write_text(json.dumps([what, min(part, 1.0)]))
            staged.replace(folder / "progress")

    if task["ranks"] > 1:
        wait = datetime.timedelta(seconds=TIMEOUT_S + task["ops_s"])
        store = dist.FileStore(str(folder / "store"), task["ranks"])
        dist.init_process_group(task["backend"], store=store, rank=rank, world_size=task["ranks"], timeout=wait)
    with torch.no_grad():
        found = {"ops": measure_ops(task, device, clock, say), "rest": measure_rest(device, clock), "collectives": {}, "beside": {}}
        if task["ranks"] > 1:
            dist.barrier()
            groups = {g: dist.new_group(list(range(g))) for g in task["groups"]}
            work = work_of(device, clock)
            found["collectives"] = measure_collectives(task, rank, groups, work, clock, say)
            found["beside"] = measure_beside(task, groups, work, clock)
    (folder / f"found.{rank}").write_text(json.dumps(found))
    if task["ranks"] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
