"""Real processes that train, save, die and load: shared by tests/test_checkpoints.py and benchmarks/checkpoints.py.

Models are captured once, here; every process is a fork, so that two hundred of them cost seconds. Started by the tests as
`python checkpoint_kit.py FOLDER CASES`: one JSON list of cases in, one of results out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import resource
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import models
import torch
import torch.distributed as dist
from random_plans import random_plan
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from netmind_autopar import AutoparError, Checkpoints
from netmind_autopar.api import compile_plan
from netmind_autopar.ir.mesh import parse_axes
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.module import ParallelModule
from netmind_autopar.runtime.parked import Parked
from netmind_autopar.tracer.capture import capture

BUILDS: dict[str, Callable[[], tuple]] = {
    "gpt2": lambda: models.gpt2(torch.float32, 0.1),
    "mlp": lambda: models.mlp(torch.float32),
    "resnet": lambda: models.resnet50(torch.float32),
}
STATE = (  # what waits in host memory or on disk: of some parameters the optimizer's state, of others all
    "optimizer:transformer.h.*.mlp.c_fc.weight",
    "disk:optimizer:transformer.wte.weight",
    "param:transformer.h.*.attn.c_attn.weight",
    "disk:param:transformer.wpe.weight",
)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@functools.cache
def captured(name: str) -> tuple:
    model, inputs = BUILDS[name]()
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


@functools.cache
def prepared(name: str, mesh: str, seed: int, parked: bool = False) -> tuple:
    """A random plan and what a device needs to run it."""
    _, _, program, rules = captured(name)
    plan = random_plan(program, rules, mesh, seed)
    plan = plan.model_copy(update={"state": STATE}) if parked else plan
    return plan, compile_plan(program, plan, training=True)


class Run:
    """One training run of this process: module, optimizer, schedule, position in the data."""

    def __init__(self, name: str, mesh: str, seed: int, optimizer: str = "adamw", parked: bool = False) -> None:
        plan, executable = prepared(name, mesh, seed, parked)
        model, self.inputs, _, _ = captured(name)
        axes = parse_axes(mesh)
        devices = init_device_mesh("cpu", tuple(n for _, n in axes), mesh_dim_names=tuple(a for a, _ in axes))
        self.pm = ParallelModule(executable, model, plan, devices)
        decay = [p for p in self.pm.parameters() if p.dim() > 1]
        rest = [p for p in self.pm.parameters() if p.dim() <= 1]
        self.optimizer = OPTIMIZERS[optimizer]([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.at = 0
        torch.manual_seed(5)

    def loss(self) -> Tensor:
        found = self.pm(**self.inputs) if isinstance(self.inputs, dict) else self.pm(self.inputs)
        found = found if isinstance(found, Tensor) else found["loss"]
        return found.full_tensor().square().mean() if isinstance(found, DTensor) else found

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.at += 1
        return loss.item()

    def parts(self) -> dict[str, Any]:
        """What `save` and `load_latest` take."""
        return {"model": self.pm, "optimizer": self.optimizer, "scheduler": self.scheduler, "data": {"at": self.at}}

    def full(self) -> dict[str, Tensor]:
        """Every tensor of the run, whole, gathered without the code that is tested."""
        names = {id(p): n for n, p in self.pm.named_parameters()}
        found = {**dict(self.pm.named_parameters()), **dict(self.pm.named_buffers())}
        for p, state in self.optimizer.state.items():
            found |= {f"{names[id(p)]} {k}": v.tensor() if isinstance(v, Parked) else torch.as_tensor(v) for k, v in state.items()}
        found |= {f"group {i} lr": torch.tensor(g["lr"], dtype=torch.float64) for i, g in enumerate(self.optimizer.param_groups)}
        return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in found.items()}

    def digest(self) -> str:
        """One hash of all of it."""
        out = hashlib.sha256()
        for name, tensor in sorted(self.full().items()):
            out.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return out.hexdigest()


def fork(world: int, work: Callable[[int], Any], folder: Path, *, timeout_s: float = 120.0) -> list[dict[str, Any]]:
    """`work` in `world` processes joined by gloo: of each {status, result or error}; status None: it did not end in time."""
    token = f"{time.monotonic_ns():x}"
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _child(rank, world, work, folder, token)
        pids.append(pid)
    ended = waited(pids, timeout_s)
    out = []
    for rank, pid in enumerate(pids):
        path = folder / f"result.{token}.{rank}"
        out.append({"status": ended.get(pid), **(json.loads(path.read_text()) if path.exists() else {})})
        path.unlink(missing_ok=True)
    (folder / f"store.{token}").unlink(missing_ok=True)
    return out


def waited(pids: list[int], timeout_s: float) -> dict[int, int]:
    """The exit status of each process, negative for a signal; those that do not end in time are killed and left out."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(ended) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in ended:
                gone, status = os.waitpid(pid, os.WNOHANG)
                if gone:
                    ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    for pid in set(pids) - set(ended):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return ended


def _child(rank: int, world: int, work: Callable[[int], Any], folder: Path, token: str) -> None:
    """The whole life of a forked process: it never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store.{token}"), world), rank=rank, world_size=world)
        result: dict[str, Any] = {"result": work(rank)}
        code = 0
    except AutoparError as e:
        result = {"error": type(e).__name__, "text": str(e), "in": traceback.format_exc()[-1500:]}
    except BaseException:
        result = {"error": "other", "text": traceback.format_exc()[-3000:]}
    try:
        staged = folder / f"partial.{token}.{rank}"
        staged.write_text(json.dumps(result))
        staged.rename(folder / f"result.{token}.{rank}")
    finally:
        os._exit(code)


# Save on one mesh, load on another.


def save_and_load(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Three steps on mesh a, save, go on; load on mesh b and go on there. How many tensors differ in a bit, and the losses."""
    place = folder / "pair"
    a, b = case["a"], case["b"]
    for name, mesh, seed, *rest in (a, b):
        prepared(name, mesh, seed, rest[1] if len(rest) > 1 else False)
    worlds = [functools.reduce(lambda n, axis: n * axis[1], parse_axes(mesh), 1) for _, mesh, *_ in (a, b)]

    def saving(rank: int) -> Any:
        run = Run(*a)
        for _ in range(3):
            run.step()
        with Checkpoints(place) as checkpoints:
            checkpoints.save(run.at, **run.parts())
            whole = run.full()
            losses = [run.step(), run.step()]  # while the files are being written
        if rank == 0:
            torch.save(whole, folder / "whole.pt")
        return losses

    def loading(rank: int) -> Any:
        run = Run(*b)
        torch.manual_seed(99 + rank)
        with torch.no_grad():
            for p in run.pm.parameters():
                p.add_(1.0)
        found = Checkpoints(place).load_latest(**run.parts())
        assert found is not None
        whole, mine = torch.load(folder / "whole.pt", weights_only=True), run.full()
        run.at = found.data["at"]
        differ = [k for k in whole.keys() | mine.keys() if k not in mine or k not in whole or not torch.equal(whole[k], mine[k])]
        return {"differ": differ, "tensors": len(whole), "step": found.step, "at": run.at, "losses": [run.step(), run.step()]}

    saved = fork(worlds[0], saving, folder)
    loaded = fork(worlds[1], loading, folder)
    for one in (*saved, *loaded):
        assert one["status"] == 0, one.get("text")
    want, got = saved[0]["result"], loaded[0]["result"]
    error = [abs(x - y) / abs(x) for x, y in zip(want, got["losses"], strict=True)]
    return {
        **got,
        "ranks": worlds,
        "loss_error": error[0],
        "later_loss_error": error[1],
        "all_equal": not any(r["result"]["differ"] for r in loaded),
    }


# Killed while saving.


def train_and_save(place: Path, log: Path, mesh: str, die: tuple[int, int, str] | None, steps: int, rank: int) -> dict[str, Any]:
    """Load the newest checkpoint, say which and whether its bits are right, then train and save after every step until killed."""
    run = Run("mlp", mesh, 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checkpoints = Checkpoints(place, keep_last=2, timeout_s=30)
        found = checkpoints.load_latest(**run.parts())
    run.at = found.data["at"] if found else 0
    digest = run.digest()
    note(log.with_suffix(f".{rank}"), "loaded", run.at, digest, "; ".join(str(w.message).splitlines()[0] for w in said))
    if die:
        die_at(*die)
    for _ in range(steps):
        run.step()
        checkpoints.save(run.at, **run.parts(), asynchronous=run.at % 3 > 0)
        if run.at % 2:
            checkpoints.wait()
            note(log.with_suffix(f".{rank}"), "saved", run.at)
    checkpoints.close()
    return {"at": run.at}


def note(path: Path, *words: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(words) + "\n")


CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir", "scandir")


def die_at(call: int, rank_seed: int, where: str) -> None:
    """From now on count calls that change or look at files; at this one die, before it, after it, or half way through a write."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def one(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count != call:
                return real(*args, **kwargs)
            if where == "after":
                real(*args, **kwargs)
            elif where == "half" and real is REAL["write"]:
                real(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)
            return None

        return one

    for name in CALLS:
        setattr(os, name, counted(REAL[name]))


REAL = {name: getattr(os, name) for name in CALLS}


def kills(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """So many runs that are killed with -9 while they save, each going on from what the one before it left."""
    mesh, world = case["mesh"], case["world"]
    prepared("mlp", mesh, 1)
    place, log, draw = folder / f"kills{world}", folder / f"log{world}", random.Random(case["seed"])
    expected = fork(world, lambda rank: reference(mesh, 4 + case["kills"] * 8), folder)[0]["result"]
    survived, hung, moments, at, known = 0, 0, {"timer": 0, "before": 0, "after": 0, "half": 0}, 0, 0
    bad: list[str] = []
    torn = 0  # lives that left an unfinished folder
    for number in range(case["kills"] + 1):
        for rank in range(world):
            log.with_suffix(f".{rank}").unlink(missing_ok=True)
        last = number == case["kills"]
        how = "end" if last else draw.choice(("timer", "timer", "before", "after", "half"))
        victim, call = draw.randrange(world), draw.randrange(1, 120)
        ended = one_life(
            place, log, mesh, world, None if how in ("timer", "end") else (call, 0, how), victim, draw.random() * 0.25, folder, last
        )
        notes = [json.loads(line) for line in log.with_suffix(".0").read_text().splitlines()] if log.with_suffix(".0").exists() else []
        if not notes:  # killed before it could load anything: what is on disk is as before
            moments[how] = moments.get(how, 0) + 1
            survived += 1
            continue
        _, at, digest, said = notes[0]
        right = digest == expected[at] and at >= known and not said
        if not right:
            bad.append(f"life {number}: loaded step {at}, at least {known} was on disk; bits right: {digest == expected[at]}; {said}")
        torn += any(place.glob(".*"))
        known = max([at, *(n[1] for n in notes if n[0] == "saved")])
        hung += sum(status is None for status in ended)
        if not last:
            moments[how] += 1
        survived += right
    return {"loads": case["kills"] + 1, "right": survived, "hung": hung, "torn": torn, "moments": moments, "step": at, "bad": bad[:5]}


def one_life(
    place: Path, log: Path, mesh: str, world: int, die: Any, victim: int, delay: float, folder: Path, last: bool
) -> list[int | None]:
    """One run of all ranks. The victim dies by itself at a call, or is killed some time after it has loaded."""
    token = f"{time.monotonic_ns():x}"
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            mine = die if rank == victim else None
            _child(rank, world, lambda r, mine=mine: train_and_save(place, log, mesh, mine, 0 if last else 8, r), folder, token)
        pids.append(pid)
    if die is None and not last:
        start = time.monotonic()
        while not log.with_suffix(f".{victim}").exists() and time.monotonic() - start < 20:
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(pids[victim], signal.SIGKILL)
    ended = waited(pids, 60)
    for leftover in [*folder.glob(f"*.{token}.*"), *folder.glob(f"*.{token}")]:
        leftover.unlink()
    return [ended.get(pid) for pid in pids]


def reference(mesh: str, steps: int) -> list[str]:
    """The state after every step of a run that is never stopped."""
    run = Run("mlp", mesh, 1)
    out = [run.digest()]
    for _ in range(steps):
        run.step()
        out.append(run.digest())
    return out


# Damaged on disk.


def corrupt(path: Path, draw: random.Random) -> tuple[str, str]:
    """Damage one file of a checkpoint: (its name, how)."""
    victim = draw.choice(sorted(p for p in path.iterdir()))
    raw = victim.read_bytes()
    how = draw.choice(("cut", "cut", "bit", "bit", "bit", "missing", "longer", "link", "swapped"))
    if how == "cut":
        victim.write_bytes(raw[: draw.randrange(len(raw))])
    elif how == "bit":
        at = draw.randrange(len(raw) * 8)
        victim.write_bytes(raw[: at // 8] + bytes([raw[at // 8] ^ 1 << at % 8]) + raw[at // 8 + 1 :])
    elif how == "missing":
        victim.unlink()
    elif how == "longer":
        victim.write_bytes(raw + b"\n")
    elif how == "link":
        outside = path.parent.parent / f"outside-{victim.name}"
        outside.write_bytes(raw)
        victim.unlink()
        victim.symlink_to(outside)
    else:
        at = draw.randrange(len(raw) - 8)
        victim.write_bytes(raw[:at] + bytes(255 - b for b in raw[at : at + 8]) + raw[at + 8 :])
    return victim.name, how


def corruptions(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Damage the newest of two checkpoints, again and again: is the file named, and is the older one loaded bit by bit?"""
    import shutil

    mesh, world = case["mesh"], case["world"]
    prepared("mlp", mesh, 1)
    place = folder / "whole"

    def work(rank: int) -> Any:
        run = Run("mlp", mesh, 1)
        digests = []
        with Checkpoints(place) as checkpoints:
            for _ in range(2):
                run.step()
                checkpoints.save(run.at, **run.parts())
                digests.append(run.digest())
        draw, named, fell_back, kinds, bad = random.Random(case["seed"]), 0, 0, {}, []
        for number in range(case["count"]):
            copy = folder / "copies" / str(number)
            found = [("", "")]
            if rank == 0:
                shutil.copytree(place, copy)
                found = [corrupt(copy / "000002-step-2", draw)]
            dist.broadcast_object_list(found)
            name, how = found[0]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                restored = Checkpoints(copy).load_latest(**run.parts())
            text = "".join(restored.skipped)
            kinds[how] = kinds.get(how, 0) + 1
            named += (right := f"000002-step-2: {name} is damaged: " in text and (rank > 0 or len(said) == 1))
            fell_back += (same := restored.step == 1 and run.digest() == digests[0])
            if not (right and same):
                bad.append(f"{name} {how}: {text}, loaded {restored.step}")
            if rank == 0:
                shutil.rmtree(copy)
        return {"named": named, "fell_back": fell_back, "kinds": kinds, "bad": bad[:5]}

    found = fork(world, work, folder, timeout_s=600)
    assert all(one["status"] == 0 for one in found), found
    return found[0]["result"]


# What the world around does.


def trouble(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A save that cannot work, on every rank; what each rank got, and whether the checkpoint before it still loads."""
    world, kind = case["world"], case["trouble"]
    mesh = f"a={world}"
    prepared("mlp", mesh, 1)
    place = folder / f"trouble-{kind}"

    def work(rank: int) -> Any:
        run = Run("mlp", mesh, 1)
        run.step()
        checkpoints, got = Checkpoints(place, timeout_s=30), {}
        checkpoints.save(run.at, **run.parts(), asynchronous=False)
        digest = run.digest()
        run.step()
        make_trouble(kind, place, rank)
        start = time.monotonic()
        try:
            checkpoints.save(run.at, **run.parts())
            checkpoints.wait()
        except AutoparError as e:
            got = {"kind": type(e).__name__, "text": str(e)}
        seconds = time.monotonic() - start
        undo_trouble(kind, place, rank)
        dist.barrier()
        found = Checkpoints(place).load_latest(**run.parts())
        left = [p.name for p in place.iterdir() if p.name.startswith(".")]
        dist.barrier()
        later = Checkpoints(place)
        later.save(7, **run.parts(), asynchronous=False)  # and afterwards all is well again
        return {
            **got,
            "seconds": seconds,
            "same": run.digest() == digest,
            "step": found and found.step,
            "left": left,
            "steps": later.steps(),
        }

    found = fork(world, work, folder)
    assert all(one["status"] == 0 for one in found), found
    return {"ranks": [one["result"] for one in found]}


def make_trouble(kind: str, place: Path, rank: int) -> None:
    """On one rank alone, but for the folder, which all share."""
    if kind == "disk full" and rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # a write beyond fails, as it does on a full disk
    elif kind == "no space" and rank == 0:

        def full(fd: int, data: Any) -> int:
            raise OSError(28, "No space left on device")

        os.write = full  # type: ignore[assignment]
    elif kind == "read-only":
        dist.barrier()
        if rank == 0:
            place.chmod(stat.S_IRUSR | stat.S_IXUSR)
            os.seteuid(65534) if os.geteuid() == 0 else None
        dist.barrier()
    elif kind == "gone":
        real = os.fsync

        def removed(fd: int) -> None:  # somebody deletes the folder while it is being written
            for p in place.glob(".*partial"):
                for inside in p.iterdir():
                    inside.unlink()
                p.rmdir()
            real(fd)

        if rank == 0:
            os.fsync = removed  # type: ignore[assignment]


def undo_trouble(kind: str, place: Path, rank: int) -> None:
    if kind == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write, os.fsync = REAL["write"], REAL["fsync"]
    if kind == "read-only" and rank == 0:
        os.seteuid(os.getuid())
        place.chmod(0o755)


def terminated(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """SIGTERM for all ranks, or one, in the middle of a save that is slow: what each says, how long it takes, and what is on disk."""
    world = case["world"]
    mesh, place = f"a={world}", folder / f"terminated-{case['victims']}"
    prepared("mlp", mesh, 1)

    def work(rank: int) -> Any:
        run = Run("mlp", mesh, 1)
        run.step()
        checkpoints = Checkpoints(place, timeout_s=30)
        checkpoints.save(1, **run.parts(), asynchronous=False)
        real = os.fsync

        def slow(fd: int) -> None:
            (folder / f"saving.{rank}").touch()
            time.sleep(1.0)
            real(fd)

        os.fsync = slow  # type: ignore[assignment]
        checkpoints.save(2, **run.parts())
        checkpoints.wait()
        return "saved"

    token = f"{time.monotonic_ns():x}"
    for rank in range(world):
        (folder / f"saving.{rank}").unlink(missing_ok=True)
    pids = []
    for rank in range(world):
        if not (pid := os.fork()):
            _child(rank, world, work, folder, token)
        pids.append(pid)
    while not all((folder / f"saving.{rank}").exists() for rank in range(world)):
        time.sleep(0.01)
    start = time.monotonic()
    for pid in pids[: case["victims"]]:
        os.kill(pid, signal.SIGTERM)
    ended = waited(pids, 60)
    seconds = time.monotonic() - start
    said = [json.loads((folder / f"result.{token}.{rank}").read_text()) for rank in range(world)]

    def after(rank: int) -> Any:
        run = Run("mlp", mesh, 1)
        found = Checkpoints(place).load_latest(**run.parts())
        return found and found.step

    steps = [one.get("result") for one in fork(world, after, folder)]
    return {"status": [ended.get(pid) for pid in pids], "said": said, "seconds": seconds, "steps": steps}


def by_rank(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """State that differs from rank to rank, averaged weights that lie as the parameters do, and who may load them."""
    place = folder / "by-rank"
    for world in (1, 2, 3):
        prepared("mlp", f"a={world}", 1)

    def averaged(run: Run) -> torch.nn.Module:
        out = torch.nn.Module()
        for name, p in run.pm.named_parameters():
            out.register_parameter(name.replace(".", "_"), torch.nn.Parameter(p.detach() * 2))
        out.register_buffer("count", torch.tensor(7))
        return out

    def saving(rank: int) -> Any:
        run = Run("mlp", "a=2", 1)
        run.step()
        for _ in range(rank):
            torch.rand(1), random.random()
        parts = {**run.parts(), "data": {"seen": 10 + case["differs"] * rank, "order": torch.arange(40000) + case["differs"] * rank}}
        with Checkpoints(place) as checkpoints:
            checkpoints.save(1, **parts, extra={"ema": averaged(run), "note": ("x", rank * 0)})
        return [torch.rand(1).item(), random.random()]

    def loading(world: int) -> Callable[[int], Any]:
        def work(rank: int) -> Any:
            run = Run("mlp", f"a={world}", 1)
            ema = averaged(run)
            found = Checkpoints(place).load_latest(**{**run.parts(), "data": None}, extra={"ema": ema})
            assert found is not None
            drawn = [torch.rand(1).item(), random.random()]
            doubled = [torch.equal(a.to_local(), b.to_local() * 2) for a, b in zip(ema.parameters(), run.pm.parameters(), strict=True)]
            return {
                "seen": found.data["seen"],
                "order": found.data["order"][0].item(),
                "drawn": drawn,
                "doubled": all(doubled),
                "note": found.extra["note"],
            }

        return work

    saved = fork(2, saving, folder)
    return {"saved": saved, "loaded": {world: fork(world, loading(world), folder) for world in (2, 1, 3)}}


CASES = {
    "by rank": by_rank,
    "pair": save_and_load,
    "kills": kills,
    "corruptions": corruptions,
    "trouble": trouble,
    "terminated": terminated,
}


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    results = []
    for case in cases:
        try:
            kind = case["kind"]
            results.append(CASES[kind](case, folder))
        except Exception:
            results.append({"error": traceback.format_exc()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
