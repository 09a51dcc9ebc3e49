"""Does a run survive? Ranks that are killed, stall, diverge, fail: real processes under torchrun, and how each of them ends.

    python benchmarks/failures.py                    a table
    python benchmarks/failures.py --json             a line of JSON per row: check, measured, bar, ok; as in benchmarks/results
    python benchmarks/failures.py --only kills       rows of one part: kills, faults, elastic, files or overhead

A rank is killed with SIGKILL, by itself: at a random moment of a step, or at a random call to the file system inside a save. Times are
from the fault to the end of the last other rank, of which torchrun is no part: it runs with them, and ends them itself when one is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

STEPS, EVERY = 170, 4
CALLS = ("open", "write", "fsync", "rename", "unlink", "mkdir")
Row = tuple[str, str, str, bool]  # check, measured, bar, ok


class Notes:
    """What a rank leaves behind for the one who reads: lines of JSON."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.life = folder / f"notes.{rank}", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def add(self, **what: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"life": self.life, "at": time.time(), **what}) + "\n")

    @staticmethod
    def read(folder: Path, rank: int) -> list[dict[str, Any]]:
        path = folder / f"notes.{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_worker(task: dict[str, Any]) -> None:
    """One rank of a run: `python failures.py --worker TASK.json`, under torchrun."""
    import torch
    from elastic import train

    from netmind_autopar import AutoparError

    rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(task["folder"])
    torch.set_num_threads(1)
    notes = Notes(folder, rank)
    fault = drawn(task, notes.life, world)

    def told(what: str, step: int, loss: float) -> None:
        if what == "loaded":
            fault["step"] = fault.get("step", 0) + step
            notes.add(loaded=step, world=world)
        if what == "step" and rank == 0:
            notes.add(step=step, loss=loss.hex())
        if rank == fault.get("victim") and step >= fault["step"] and what == ("save" if fault["kind"] == "kill in save" else "step"):
            strike(fault, notes)

    try:
        train(folder / "checkpoints", task["steps"], every=EVERY, stop=task["stop"], timeout_s=task["timeout_s"], told=told)
        notes.add(done=True)
    except AutoparError as e:
        named = re.search(r"rank (\d+) (died|ended|did not|runs|failed|was told)", str(e))
        rank_named = getattr(e, "rank", int(named[1]) if named else None)
        notes.add(error=type(e).__name__, rank=rank_named, collective=getattr(e, "collective", ""), text=str(e))
        raise
    except BaseException as e:
        notes.add(error=type(e).__name__, rank=None, collective="", text=str(e))
        raise


def drawn(task: dict[str, Any], life: int, world: int) -> dict[str, Any]:
    """The fault of this life: the same on every rank."""
    if life >= len(task["faults"]):
        return {}
    draw = random.Random(task["seed"] * 1000 + life)
    kind, calls = task["faults"][life], draw.randrange(1, 60)
    return {
        "kind": kind,
        "victim": draw.randrange(world),
        "step": draw.randrange(EVERY, EVERY + 6),
        "delay": draw.random() * 0.02,
        "calls": calls,
    }


def strike(fault: dict[str, Any], notes: Notes) -> None:
    kind = fault["kind"]
    if fault.get("struck"):
        return
    fault["struck"] = True
    if kind == "kill":
        threading.Timer(fault["delay"], lambda: (notes.add(fault=kind), os.kill(os.getpid(), signal.SIGKILL))).start()
    elif kind == "kill in save":
        die_at(fault["calls"], notes)
    else:
        notes.add(fault=kind)
        act(kind)


def act(kind: str) -> None:
    import torch
    from elastic import WIDTH

    if kind == "stall":
        time.sleep(600)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "error":
        raise ValueError("record 4711 cannot be read")
    elif kind == "other batch":
        module = next(o for o in _modules() if hasattr(o, "local_batch"))
        module(torch.zeros(6, WIDTH))


def _modules() -> list[Any]:
    import gc

    import torch

    return [o for o in gc.get_objects() if isinstance(o, torch.nn.Module)]


def die_at(call: int, notes: Notes) -> None:
    """Count this process's calls to the file system from now on, and die at one of them, or at the end of the save at the latest."""
    left = [call]

    def counted(real: Any) -> Any:
        def one(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                for name in CALLS:
                    setattr(os, name, REAL[name])
                notes.add(fault="kill in save")
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(10)
            return real(*args, **kwargs)

        return one

    for name in CALLS:
        setattr(os, name, counted(REAL[name]))


REAL = {name: getattr(os, name) for name in CALLS}


def launched(folder: Path, faults: list[str], *, world: int = 2, seed: int = 1, steps: int = STEPS, stop: int | None = None) -> int:
    """One torchrun of as many lives as there are faults, and one more. Its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    task = folder / "task.json"
    task.write_text(json.dumps({"folder": str(folder), "faults": faults, "seed": seed, "steps": steps, "stop": stop, "timeout_s": 30.0}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*torchrun, "--max-restarts", str(len(faults)), __file__, "--worker", str(task)]
    with (folder / "log").open("ab") as log:
        return subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def losses(folder: Path) -> tuple[dict[int, str], int]:
    """Of every step its loss, and how many steps gave another one when they ran again."""
    found: dict[int, str] = {}
    differ = 0
    for note in Notes.read(folder, 0):
        if "step" in note:
            differ += found.setdefault(note["step"], note["loss"]) != note["loss"]
    return found, differ


def kills(folder: Path, count: int) -> Iterator[Row]:
    draw = random.Random(3)
    inside = count * 2 // 5
    faults = ["kill in save"] * inside + ["kill"] * (count - inside)
    draw.shuffle(faults)
    launched(folder / "whole", [])
    want, _ = losses(folder / "whole")
    code = launched(folder / "killed", faults)
    have, differ = losses(folder / "killed")
    notes = [Notes.read(folder / "killed", r) for r in range(2)]
    struck = {n["life"]: n for of in notes for n in of if "fault" in n}
    saves = sum(n["fault"] == "kill in save" for n in struck.values())
    resumed = len({n["life"] for n in notes[0] if "loaded" in n and n["life"]})
    same = len(want) == STEPS and want == have and not differ
    text = f"{len(struck)} killed, {saves} of them in a save; {resumed} lives went on; "
    text += f"losses of {len(have)} steps {'bit-identical' if same else 'DIFFER'}; exit {code}"
    ok = same and code == 0 and len(struck) == resumed == count and saves == inside
    yield f"a rank killed (SIGKILL) at {count} random moments, 2 ranks, torchrun", text, f"{count} of {count} resume, losses equal", ok
    ends = [(r, n, struck[n["life"]]) for r, of in enumerate(notes) for n in of if "error" in n and n["life"] in struck]
    seconds = sorted(n["at"] - s["at"] for _, n, s in ends)
    kinds = sorted({n["error"] for _, n, _ in ends})
    named = sum(n["rank"] == 1 - by for by, n, _ in ends)
    text = f"{len(ends)} survivors raised {', '.join(kinds)}, {named} name the rank; median {seconds[len(seconds) // 2]:.1f} s, "
    text += f"longest {seconds[-1]:.1f} s"
    yield "from the kill to the other rank's typed error", text, "≤60 s, typed", len(ends) == named == count and seconds[-1] <= 60


def faults(folder: Path) -> Iterator[Row]:
    expected = {
        "stall": ("StalledRankError", "StalledRankError"),
        "error": ("FailedRankError", "ValueError"),
        "other batch": ("DivergedRankError", "DivergedRankError"),
        "SIGTERM": ("TerminatedError", "TerminatedError"),
        "stop": ("LostRankError", None),
    }
    for kind, (others, own) in expected.items():
        place = folder / kind.replace(" ", "-")
        code = launched(place, [kind], steps=30, seed=5)
        notes = [Notes.read(place, r) for r in range(2)]
        hit = next((r for r in range(2) if any("fault" in n for n in notes[r])), 0)
        began = next((n["at"] for n in notes[hit] if "fault" in n), 0.0)
        said = {r: next((n for n in notes[r] if "error" in n), {}) for r in range(2)}
        seconds = max((n["at"] - began for n in said.values() if n), default=999.0)
        ok = said[1 - hit].get("error") == others and (own is None or said[hit].get("error") == own)  # an error of its own: as it is
        ok = ok and said[1 - hit].get("rank") == hit and bool(said[1 - hit].get("collective")) and seconds <= 60 and code == 0
        have, differ = losses(place)
        ok = ok and len(have) == 30 and not differ
        text = f"rank {hit}: {said[hit].get('error')}, rank {1 - hit}: {said[1 - hit].get('error')} of rank {said[1 - hit].get('rank')} in "
        text += f"{said[1 - hit].get('collective')} after {seconds:.1f} s; the next life ends the run, {differ} losses differ"
        yield f"{kind} on one of 2 ranks", text, "typed error naming rank and collective ≤60 s, resumes", ok


def elastic(folder: Path) -> Iterator[Row]:
    launched(folder / "two", [], steps=24)
    want, _ = losses(folder / "two")
    for world, stop in ((2, 8), (1, 16), (3, 24)):
        launched(folder / "changing", [], world=world, steps=24, stop=stop)
    have, _ = losses(folder / "changing")
    worlds = [n["world"] for n in Notes.read(folder / "changing", 0) if "loaded" in n]
    error = max((abs(float.fromhex(have[s]) / float.fromhex(x) - 1) for s, x in want.items() if s in have and s < 8), default=9.0)
    later = max((abs(float.fromhex(have.get(s, "inf")) / float.fromhex(x) - 1) for s, x in want.items()), default=9.0)
    text = f"{' → '.join(map(str, worlds))} processes, losses of the first life off by {error:.1e}, of all by {later:.1e}"
    yield "stopped and started on other numbers of processes", text, "replans, losses ≤1e-4", worlds == [2, 1, 3] and later <= 1e-4


def files(folder: Path) -> Iterator[Row]:
    from checkpoints import troubles

    yield from troubles(folder)


def overhead() -> Iterator[Row]:
    from netmind_autopar.health.progress import Progress, mark_of

    here, mark, count, best = Progress(), mark_of("all-reduce over dp"), 20000, 9.0
    for _ in range(7):
        start = time.thread_time()
        for _ in range(count):
            here.enter("all-reduce over dp", mark)
            here.waiting = "all-reduce over dp"
            here.waiting = ""
        best = min(best, (time.thread_time() - start) / count)
    beat, share = one_beat(), best * 150 / 0.05
    text = f"{best * 1e6:.2f} µs each, {share:.2%} of the step; {beat * 1e3:.2f} ms of the watching thread a second, {beat:.2%}"
    yield "the watch, 150 collectives in a step of 50 ms", text, "<0.5% together", share + beat < 0.005


def one_beat() -> float:
    """CPU seconds of what the watch on rank 0 does once a second."""
    import torch.distributed as dist

    from netmind_autopar.health.judge import judge
    from netmind_autopar.health.peers import Peers
    from netmind_autopar.health.progress import Progress, mark_of

    here, name, count = Progress(), "all-gather over dp, f32[256,64] S(0) → R", 200
    for _ in range(5000):
        here.enter(name, mark_of(name))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Peers(store.clone(), "beat", rank, 2) for rank in range(2)]
    said = {"count": here.count, "waiting": "", "busy": ""}
    ranks[1].say({**said, "recent": here.last()})
    start = time.thread_time()
    for _ in range(count):
        ranks[0].say({**said, "recent": here.last()})
        ranks[0].verdict()
        judge(ranks[0].look([0, 1]), 30.0)
    return (time.thread_time() - start) / count


def main() -> int:
    parser = argparse.ArgumentParser(description="What a run survives.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kills, faults, elastic, files or overhead")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(json.loads(args.worker.read_text()))
        return 0
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        parts = {"overhead": overhead(), "kills": kills(folder, args.kills), "faults": faults(folder), "elastic": elastic(folder)}
        parts["files"] = files(folder)
        for part, rows in parts.items():
            if args.only not in part:
                continue
            start = time.monotonic()
            for check, measured, bar, ok in rows:
                good &= ok
                row = {"check": check, "measured": measured, "bar": bar, "ok": ok, "seconds": round(time.monotonic() - start, 1)}
                print(json.dumps(row, ensure_ascii=False) if args.json else f"{'ok  ' if ok else 'FAIL'} {check}: {measured}", flush=True)
                start = time.monotonic()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
