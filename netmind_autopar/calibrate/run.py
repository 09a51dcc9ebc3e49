"""Calibration from start to end: start the processes that measure, watch over them, fit, and put the profile together.

Nothing here can hang: processes end themselves at a deadline, when this process is gone, and when a collective waits too long;
this process ends them when one fails, when time is up, and when it is interrupted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..costs.device import ClusterProfile
from ..costs.presets import FRAGMENTATION, host_memory_bytes
from ..ir.errors import InputError, ProfileError
from ..ir.mesh import Device
from . import fit
from .cases import cases_for

Quartiles = dict[str, tuple[list[float], int]]
Say = Callable[[str, float], None]  # what is being done, and which part of it is done

DEFAULT_S, LEAST_S, MOST_S = 90.0, 20.0, 120.0
STARTING_S, FITTING_S = 8.0, 8.0  # about what starting the processes and fitting take
SHARES = (0.5, 0.44, 0.06)  # of the rest: ops, collectives, work beside collectives
GRACE_S = 60.0  # beyond the time asked for, on a busy machine, before measuring is given up
MOST_RANKS = 64
POLL_S = 0.05


def calibrate(*, ranks: int | None = None, seconds: float = DEFAULT_S, seed: int = 0, say: Say = lambda *_: None) -> ClusterProfile:
    """Measure this machine in about `seconds` and return its profile.

    ranks: processes that measure at once, one per CUDA device where there are any; by default all devices, or one per core (8 at most).
    seed: which points are fitted and which are judged, and the order of measuring.
    Raises InputError for arguments that cannot be met, ProfileError when measuring fails.
    """
    task = make_task(ranks, seconds, seed)
    start = time.monotonic()
    found = measure(task, say)
    say("fitting", 0.0)
    profile = profile_of(task, found, time.monotonic() - start)
    say("fitting", 1.0)
    return profile


def make_task(ranks: int | None, seconds: float, seed: int) -> dict[str, Any]:
    """What the processes are told: a JSON object."""
    if not LEAST_S <= seconds <= MOST_S:
        raise InputError(f"{seconds:g} seconds to calibrate", why=f"it takes {LEAST_S:g} to {MOST_S:g} seconds", try_="--seconds 60")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = ranks if ranks is not None else gpus or min(cores, 8)
    most = gpus or MOST_RANKS
    if not 1 <= ranks <= most:
        raise InputError(f"{ranks} ranks to calibrate", why=f"this machine takes 1 to {most}", try_="leave --ranks out")
    groups = [g for g in (2, 4, 8, 16, 32) if g < ranks] + [ranks] * (ranks > 1)
    work = seconds - STARTING_S - FITTING_S
    ops, meeting, beside = SHARES if groups else (1.0, 0.0, 0.0)
    return {
        "device": "cuda" if gpus else "cpu",
        "backend": "nccl" if gpus else "gloo",
        "ranks": ranks,
        "groups": groups,
        "threads": max(1, min(torch.get_num_threads(), cores // ranks)),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpus else host_memory_bytes() // ranks,
        "seed": seed,
        "ops_s": work * ops,
        "collectives_s": work * meeting,
        "beside_s": work * beside,
        "deadline_s": seconds + GRACE_S,
    }


def measure(task: Mapping[str, Any], say: Say, worker: Sequence[str] = ("-m", "netmind_autopar.calibrate.measure")) -> list[dict]:
    """Run the processes of a task; what each found. Raises ProfileError when one fails or time is up."""
    with tempfile.TemporaryDirectory(prefix="netmind-autopar-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task))
        env = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
        root = str(Path(__file__).parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
        processes: list[subprocess.Popen] = []
        try:
            for rank in range(task["ranks"]):
                with open(folder / f"log.{rank}", "wb") as log:
                    command = [sys.executable, *worker, str(folder / "task.json"), str(rank)]
                    # a session of its own: an interrupt from the keyboard reaches this process alone, which then ends them
                    processes.append(
                        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
                    )
            _watch(processes, task, folder, say)
            return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(task["ranks"])]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
                if process.stdin:
                    process.stdin.close()


def _watch(processes: Sequence[subprocess.Popen], task: Mapping[str, Any], folder: Path, say: Say) -> None:
    until = time.monotonic() + task["deadline_s"]
    say("starting", 0.0)
    while True:
        codes = [p.poll() for p in processes]
        if failed := [rank for rank, code in enumerate(codes) if code not in (None, 0)]:
            text = (folder / f"log.{failed[0]}").read_text(errors="replace").strip().splitlines()
            raise _failure(f"process {failed[0]} of {len(processes)} ended with {codes[failed[0]]}", text)
        if None not in codes:
            return
        if time.monotonic() > until:
            raise _failure(f"no result after {task['deadline_s']:.0f} s", [])
        if (folder / "progress").exists():
            say(*json.loads((folder / "progress").read_text()))
        time.sleep(POLL_S)


def _failure(why: str, log: Sequence[str]) -> ProfileError:
    last = f": {log[-1][:300]}" if log else ""
    return ProfileError("measuring this machine failed", why=why + last, try_="--ranks 1, or run it while the machine does nothing else")


def _quartiles(found: Sequence[Mapping[str, Any]], part: str) -> Quartiles:
    """Name → (the quartiles of the samples of all processes, how many samples)."""
    pooled: dict[str, list[float]] = {}
    for one in found:
        for name, samples in one[part].items():
            pooled.setdefault(name, []).extend(samples)
    return {name: ([float(q) for q in np.quantile(s, (0.25, 0.5, 0.75))], len(s)) for name, s in pooled.items() if s}


def profile_of(task: Mapping[str, Any], found: Sequence[Mapping[str, Any]], seconds: float) -> ClusterProfile:
    """Fit the samples of all processes: on CUDA their median; on a CPU, where other programs can only lengthen what they share caches
    and cores with, the lower quartile."""
    seed, quartile = task["seed"], 1 if task["device"] == "cuda" else 0
    ops, sent = _quartiles(found, "ops"), _quartiles(found, "collectives")
    cases = [c for c in cases_for(task["device"], seed, task["memory_bytes"]) if str(c) in ops]
    points = fit.points_of(fit.costs_of(cases), {name: q[quartile] for name, (q, _) in ops.items()})
    device = device_of(task, points, found)
    known = fit.with_curves(device, points)
    collectives = fit.sent_points({name: q[quartile] for name, (q, _) in sent.items()})
    errors = {**fit.op_errors(device, points, seed), **fit.link_errors(collectives, seed)}
    latency, rate = fit.alpha_beta(collectives) if collectives else (device.launch_s, device.memory_bandwidth_bytes_s)
    data = {
        "name": f"{device.name}, calibrated on {task['ranks']} rank{'s' * (task['ranks'] > 1)}",
        "node_size": task["ranks"],
        "device": {
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "fragmentation": device.fragmentation,
            "memory_bandwidth_bytes_s": device.memory_bandwidth_bytes_s,
            "host_bandwidth_bytes_s": device.host_bandwidth_bytes_s,
            "host_memory_bytes": host_memory_bytes() // task["ranks"],
            "launch_s": device.launch_s,
            "peak_flops": dict(device.peak_flops),
            "curves": [{"kind": c.kind, "dtype": c.dtype, "points": [list(p) for p in c.points]} for c in known.curves],
        },
        "links": {
            "intra": {
                "bandwidth_bytes_s": rate,
                "latency_s": latency,
                "hideable": hideable(found),
                "curves": [{"kind": c.kind, "group": g, "points": [list(p) for p in c.points]} for g, c in fit.link_curves(collectives)],
            }
        },
        "calibration": {
            "torch": torch.__version__,
            "backend": task["backend"],
            "ranks": task["ranks"],
            "threads": task["threads"],
            "seconds": seconds,
            "seed": seed,
            "residuals": fit.residuals(errors),
            "measured": _measured(points, ops, sent),
        },
    }
    return ClusterProfile.model_validate(data)


def hideable(found: Sequence[Mapping[str, Any]]) -> float:
    """The part of a collective's seconds beside which work ran, median over collectives and samples; 1 where nothing was measured."""
    medians = [quartiles[1] for quartiles, _ in _quartiles(found, "beside").values()]
    return statistics.median(medians) if medians else 1.0


def _measured(points: Sequence[fit.Point], ops: Quartiles, sent: Quartiles) -> list[dict[str, Any]]:
    """All that was measured, as it was measured."""
    out: list[dict[str, Any]] = []
    for p in points:
        seconds, repeats = ops[p.case]
        one = {"name": p.case, "kind": p.cost.kind, "dtype": p.cost.dtype, "amount": p.amount}
        out.append({**one, "seconds": seconds, "repeats": repeats})
    for name, (seconds, repeats) in sent.items():
        (((kind, group), [(amount, _)]),) = fit.sent_points({name: 0.0}).items()
        out.append({"name": name, "kind": kind, "group": group, "amount": amount, "seconds": seconds, "repeats": repeats})
    return out


def device_of(task: Mapping[str, Any], points: Sequence[fit.Point], found: Sequence[Mapping[str, Any]]) -> Device:
    """The device without its curves: the best rates seen, the copies, the launch."""
    rest = {name: statistics.median(s for one in found for s in one["rest"][name]) for name in ("launch", "host.out", "host.back", "copy")}
    amounts = dict(zip(("launch", "host.out", "host.back", "copy"), found[0]["rest"]["amounts"], strict=True))
    peak: dict[str, float] = {}
    for p in points:
        if p.cost.flops:
            peak[p.cost.dtype] = max(peak.get(p.cost.dtype, 0.0), p.amount / p.seconds)
    if "float32" not in peak:
        raise ProfileError("too few ops could be measured in the time", why="no matrix product was", try_="more --seconds")
    name = torch.cuda.get_device_name() if task["device"] == "cuda" else "cpu"
    host = min(amounts[way] / rest[way] for way in ("host.out", "host.back"))
    lost = FRAGMENTATION if task["device"] == "cuda" else 0.0
    rates = amounts["copy"] / rest["copy"], host, rest["launch"]
    return Device(name, tuple(sorted(peak.items())), task["memory_bytes"], *rates, fragmentation=lost)


def save(profile: ClusterProfile, path: str | Path) -> None:
    """Write a profile; the file is replaced whole or not at all."""
    target = Path(path)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staged.write_text(json.dumps(profile.model_dump(mode="json", exclude_unset=True), indent=1, allow_nan=False) + "\n")
        staged.replace(target)
    except OSError as e:
        staged.unlink(missing_ok=True)
        raise ProfileError(f"cannot write the profile to {target}", why=str(e), try_="name a folder that can be written") from None


def check_writable(path: str | Path) -> None:
    """Raises InputError now rather than after two minutes."""
    target = Path(path)
    if target.suffix != ".json":
        raise InputError(f"cannot write a profile to {target}", why="a profile that is calibrated is a .json file", try_="--out my.json")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        why = f"{target.parent} is no folder that can be written"
        raise InputError(f"cannot write a profile to {target}", why=why, try_="--out my.json")
