"""Ranks that stay: real processes with a gloo group, started once for each number of ranks and given one piece of work after another.

Starting a process, importing torch and the libraries of models and tracing for the first time takes 10 s of CPU a rank, most of what
a small test on real processes costs. Every piece of work gets a process group of its own; after an error new processes are started.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "gloo_worker.py"
MOST = 5  # processes that wait for work
_waiting: dict[int, Ranks] = {}


class Ranks:
    """`world` processes of gloo_worker.py, which read their work from stdin."""

    def __init__(self, world: int) -> None:
        self.logs = Path(tempfile.mkdtemp(prefix="netmind-autopar-ranks-"))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.processes = []
        for r in range(world):
            with (self.logs / str(r)).open("w") as log:
                command = [sys.executable, str(WORKER), str(r), str(world)]
                self.processes.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True))

    def run(self, work: list[dict], folder: Path, timeout_s: float) -> list[dict]:
        """Rank 0's results. Of a rank that failed: its error, with what every rank wrote and how it ended."""
        line = json.dumps({"folder": str(folder), "cases": work}) + "\n"
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.write(line)
            p.stdin.flush()
        until, broken = time.monotonic() + timeout_s, 0.0
        while not all((folder / f"done.{r}").exists() for r in range(len(self.processes))) and time.monotonic() < until:
            time.sleep(0.02)
            if not broken and any(p.poll() is not None for p in self.processes):
                broken, until = 1.0, min(until, time.monotonic() + 20)  # the others say what they see of it
        found = {r: json.loads(path.read_text()) for r in range(len(self.processes)) if (path := folder / f"results.{r}").exists()}
        failed = [r for r in found if found[r] and "error" in found[r][-1]]
        if not failed and 0 in found and time.monotonic() < until:
            return found[0]
        self.end()
        text = [f"rank {r}: {found[r][-1]['error']}" for r in failed] + ["no result in time"] * (time.monotonic() >= until and not broken)
        for r, p in enumerate(self.processes):
            text.append(f"rank {r} ended with {p.returncode}\n{(self.logs / str(r)).read_text()[-3000:]}")
        return [*found.get(failed[0] if failed else 0, [{}])[:-1], {"error": "\n".join(text)}]

    def end(self) -> None:
        """No more work: they end by themselves, or are ended."""
        for p in self.processes:
            if p.stdin is not None and not p.stdin.closed:
                with contextlib.suppress(OSError):  # it is gone
                    p.stdin.close()
        until = time.monotonic() + 10
        for p in self.processes:
            try:
                p.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()


def launch(world: int, work: list[dict], folder: Path, *, timeout_s: float = 600) -> list[dict]:
    """Run `work` on `world` processes; rank 0's results, one a case. The last has an "error" where a rank failed."""
    for other in [w for w in _waiting if w != world]:
        if world + sum(w for w in _waiting if w != world) > MOST:
            _waiting.pop(other).end()
    ranks = _waiting.pop(world, None) or Ranks(world)
    if any(p.poll() is not None for p in ranks.processes):
        ranks.end()
        ranks = Ranks(world)
    results = ranks.run(work, folder, timeout_s)
    if all(p.poll() is None for p in ranks.processes):
        _waiting[world] = ranks
    return results


@atexit.register
def _end() -> None:
    while _waiting:
        _waiting.popitem()[1].end()


def serve(run: Any) -> None:
    """What such a process does. run: from a case to its result."""
    import traceback

    import torch
    import torch.distributed as dist

    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    for line in sys.stdin:
        work = json.loads(line)
        folder, cases, results = Path(work["folder"]), work["cases"], []
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
        for case in cases:
            try:
                results.append(run(case))
            except Exception:
                results.append({"error": traceback.format_exc()})
                break
        if rank == 0 or "error" in results[-1] or "refusal" in cases[0]:
            (folder / f"results.{rank}").write_text(json.dumps(results))
        if "error" not in results[-1]:
            dist.destroy_process_group()
        (folder / f"done.{rank}").write_text("")
        if "error" in results[-1]:
            break
