"""Checkpoints: what is loaded is what was saved, on any mesh; what is damaged, refused or cut short is named and survived."""

from __future__ import annotations

import ast
import collections
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_kit as kit
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

import netmind_autopar.checkpoint
from netmind_autopar import AutoparError, Checkpoints
from netmind_autopar.checkpoint import manifest as manifests
from netmind_autopar.checkpoint.tree import Encoder, decode
from netmind_autopar.ir.errors import CheckpointError, DamagedError, InputError

Parts = dict[str, Any]

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda s: 1 / (s + 1)),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20),
    "steps": lambda o: schedules.MultiStepLR(o, [2, 4]),
    "in turn": lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.CosineAnnealingLR(o, 5)], [3]),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.register_buffer("hidden", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.nn.functional.dropout(self.norm(self.a(x)), 0.2)).square().mean()


def trained(steps: int = 0, optimizer: str = "adamw", schedule: str = "lambda") -> Parts:
    torch.manual_seed(0)
    model = Small()
    made = kit.OPTIMIZERS[optimizer](model.parameters())
    parts = {"model": model, "optimizer": made, "scheduler": SCHEDULES[schedule](made)}
    train(parts, steps)
    return parts


def train(parts: Parts, steps: int) -> list[float]:
    """Losses on random data: every generator counts."""
    out = []
    for _ in range(steps):
        x = torch.randn(5, 6) + random.random() + float(np.random.rand())
        loss = parts["model"](x)
        loss.backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        plateau = isinstance(parts["scheduler"], schedules.ReduceLROnPlateau)
        parts["scheduler"].step(loss.item()) if plateau else parts["scheduler"].step()
        out.append(loss.item())
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_as_if_nothing_had_been(optimizer: str, schedule: str, tmp_path: Path) -> None:
    parts = trained(3, optimizer, schedule)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, **parts, data={"at": 3, "seen": (1, 2.5)}, extra={"best": math.inf})
        want = train(parts, 3)
    again = trained(0, optimizer, schedule)
    found = Checkpoints(tmp_path).load_latest(**again)
    assert found is not None and (found.step, found.data, found.extra) == (3, {"at": 3, "seen": (1, 2.5)}, {"best": math.inf})
    assert train(again, 3) == want
    assert torch.equal(again["model"].norm.running_var, parts["model"].norm.running_var)


@pytest.mark.parametrize("tiers", ["", "parked"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw foreach", "adamw fused", "sgd"])
def test_a_parallel_module_goes_on(optimizer: str, tiers: str, tmp_path: Path, mesh: object) -> None:
    """With dropout, whose masks follow from torch's generator; and with optimizer state that waits in host memory and on disk."""
    run = kit.Run("gpt2", "a=1", 0, optimizer, bool(tiers))
    [run.step() for _ in range(2)]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run.at, **run.parts())
        want = [run.step() for _ in range(2)]
    other = kit.Run("gpt2", "a=1", 0, optimizer, not tiers)
    found = Checkpoints(tmp_path).load_latest(**other.parts())
    assert found is not None and found.mesh == {"a": 1} and found.plan == run.pm.plan.hash()
    assert [other.step() for _ in range(2)] == want
    assert other.digest() == run.digest()
    weights = {n: p.detach().clone() for n, p in other.pm.named_parameters()}
    alone = kit.captured("gpt2")[0]  # the model itself, on one device, without a plan
    before = {n: p.detach().clone() for n, p in alone.named_parameters()}
    Checkpoints(tmp_path).load(2, model=alone)
    assert all(p.shape == weights[n].shape and not torch.equal(p, before[n]) for n, p in alone.named_parameters())
    with torch.no_grad():
        [p.copy_(before[n]) for n, p in alone.named_parameters()]


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the files are written; nothing of it gets into them. The next save waits."""
    parts = trained(2)
    before = {k: v.clone() for k, v in parts["model"].state_dict().items()}
    momentum = {k: v.clone() for k, v in parts["optimizer"].state_dict()["state"][0].items()}
    go, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: go.wait(20) and real(fd))
    checkpoints = Checkpoints(tmp_path)
    start = time.monotonic()
    checkpoints.save(2, **parts, data={"at": (at := [2])})
    train(parts, 2)
    at[0] = 4
    assert time.monotonic() - start < 10 and checkpoints.steps() == [], "not there before all of it is on disk"
    threading.Timer(0.2, go.set).start()
    checkpoints.save(4, **parts)
    assert go.is_set() and 2 in checkpoints.steps()
    checkpoints.close()
    again = trained()
    found = checkpoints.load(2, **again)
    assert found.data == {"at": [2]}
    assert all(torch.equal(before[k], v) for k, v in again["model"].state_dict().items())
    assert all(torch.equal(momentum[k], v) for k, v in again["optimizer"].state_dict()["state"][0].items())


def test_errors_of_the_background_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = trained(1)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, **parts, asynchronous=False)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    for surfaces in (checkpoints.wait, checkpoints.close, lambda: checkpoints.save(3, **parts), lambda: checkpoints.load(1, **parts)):
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", full)
            checkpoints.save(2, **parts)
            checkpoints._job.join()  # type: ignore[union-attr]
        with pytest.raises(CheckpointError, match="cannot write a checkpoint") as e:
            surfaces()
        assert "No space left" in e.value.why and "free some space" in e.value.try_
        checkpoints.wait()
        assert checkpoints.steps() == [1] and [p.name for p in tmp_path.iterdir()] == ["000001-step-1"], "the older one stays"
    checkpoints.save(5, **parts)
    checkpoints.close()
    assert checkpoints.steps() == [5]


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    parts = trained(1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".000009-step-9.x1.partial").mkdir()
    for keep, steps in ((2, [4, 3]), (None, [4, 3, 2, 1])):
        folder = tmp_path / str(keep)
        with Checkpoints(folder, keep_last=keep) as checkpoints:
            for step in (1, 2, 3, 4):
                checkpoints.save(step, **parts)
        assert checkpoints.steps() == steps
    with Checkpoints(tmp_path / "2", keep_last=2) as checkpoints:  # gone back in time: what was written last is the newest
        checkpoints.load(3, **parts)
        checkpoints.save(3, **parts)
    assert checkpoints.steps() == [3, 4]
    assert (checkpoints.load_latest(**parts) or checkpoints).step == 3  # type: ignore[union-attr]
    assert not list((tmp_path / "2").glob(".*"))
    with Checkpoints(tmp_path) as above:
        above.save(1, **parts)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "notes.txt").exists()
    for wrong in (0, -1):
        with pytest.raises(InputError):
            Checkpoints(tmp_path, keep_last=wrong)


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    parts = trained(1)
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(1, **parts)
        checkpoints.save(2, **parts)
    (tmp_path / "000002-step-2" / "state.json").unlink()
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        with pytest.warns(UserWarning, match=r"000002-step-2 is passed over: state\.json is damaged: it is missing"):
            found = checkpoints.load_latest(**parts)
        assert found is not None and found.step == 1 and "state.json" in found.skipped[0]
        with pytest.raises(DamagedError, match=r"state\.json"):
            checkpoints.load(2, **parts)
        checkpoints.save(3, **parts)
    assert checkpoints.steps() == [3, 2, 1]


def test_every_byte_is_checked(tmp_path: Path) -> None:
    """Also where the change would make sense, and in the manifest itself. Buffers that a state_dict leaves out are not there."""
    parts = trained(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **parts)
    folder = tmp_path / "000001-step-1"
    assert not any("hidden" in name for name in json.loads((folder / "tensors.json").read_text())["tensors"])
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        where = raw.index(b"torch") + 10 if path.name == "manifest.json" else len(raw) // 2  # the version of torch, or whatever is there
        path.write_bytes(raw[:where] + (b"7" if raw[where : where + 1] != b"7" else b"8") + raw[where + 1 :])
        with pytest.raises(DamagedError, match=f"{path.name} is damaged: .*SHA-256"):
            checkpoints.load(1, **parts)
        path.write_bytes(raw)
    checkpoints.load(1, **parts)


def test_nothing_there_and_nothing_whole(tmp_path: Path) -> None:
    parts = trained(1)
    assert Checkpoints(tmp_path / "nowhere").load_latest(**parts) is None
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    with pytest.raises(CheckpointError, match="no checkpoint of step 7") as e:
        Checkpoints(tmp_path).load(7, **parts)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **parts)
    whole = {k: v.clone() for k, v in parts["model"].state_dict().items()}
    train(parts, 1)
    (tmp_path / "000001-step-1" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="none of the 1 checkpoints is whole") as e:
        Checkpoints(tmp_path).load_latest(**parts)
    assert "rank-00000.safetensors is damaged: it has 0 bytes" in e.value.why
    assert not torch.equal(whole["a.weight"], parts["model"].a.weight), "the run itself was not touched"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and hash it again: what somebody with bad intentions would do."""
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    change(found)
    found["sha256"] = ""
    found["sha256"] = __import__("hashlib").sha256((json.dumps(found, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/b", ".hidden", "x\0y", "Ä", ""])
def test_no_name_leaves_the_folder(name: str, tmp_path: Path) -> None:
    parts = trained(1)
    (tmp_path / "outside").write_text("secret")
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, **parts)
    folder = tmp_path / "run" / "000001-step-1"
    rewritten(folder, lambda m: m["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}))
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged: files"):
        checkpoints.load(1, **parts)


def test_links_are_not_followed(tmp_path: Path) -> None:
    parts = trained(1)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, **parts)
    folder = tmp_path / "run" / "000001-step-1"
    for name in ("state.json", "manifest.json", "rank-00000.safetensors"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(DamagedError, match=f"{name} is damaged: it cannot be read: it is a link"):
            checkpoints.load(1, **parts)
        (folder / name).unlink()
        shutil.move(tmp_path / name, folder / name)
    os.mkfifo(folder / "pipe")
    rewritten(folder, lambda m: m["files"].update({"pipe": {"bytes": 6, "sha256": "0" * 64}}))
    with pytest.raises(DamagedError, match="pipe is damaged: it cannot be read: it is no ordinary file"):
        checkpoints.load(1, **parts)
    (tmp_path / "run" / "000002-step-2").symlink_to(folder)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(step=2),
        lambda m: m.update(step="1"),
        lambda m: m.update(more=1),
        lambda m: m["files"]["state.json"].update(bytes=-1),
        lambda m: m["files"]["state.json"].update(sha256="x"),
        lambda m: m["files"].pop("state.json"),
        lambda m: m["files"].pop("tensors.json"),
        lambda m: m["files"].pop("rank-00000.safetensors"),
    ],
)
def test_manifests_that_lie(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    parts = trained(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **parts)
    rewritten(tmp_path / "000001-step-1", change)
    with pytest.raises(DamagedError, match="is damaged"):
        checkpoints.load(1, **parts)
    (tmp_path / "000001-step-1" / "manifest.json").write_text('{"step": 1, "step": 2}')
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged: it is no JSON: the key 'step' appears twice"):
        checkpoints.load(1, **parts)


@pytest.mark.parametrize(
    "text",
    ['{"$float": "1"}', '{"$tensor": ["F32", [3], "AAAA"]}', '{"$tensor": ["F99", [0], ""]}', '{"$call": "os.system"}', '{"$stored": "x"}',
     '{"$array": ["O", [1], "AAAAAAAAAAA="]}', '{"$tuple": 3}', '{"$dict": [[[1], 2]]}', '{"$device": "nowhere"}', '{"$bytes": "%%"}'],
)  # fmt: skip
def test_values_that_cannot_be_read(text: str) -> None:
    with pytest.raises(DamagedError, match="cannot be read"):
        decode(json.loads(text), {}, "state.json")


def test_values_come_back(tmp_path: Path) -> None:
    value = {
        "plain": [None, True, 3, -2.5, "x", [], {}],
        "numbers": (math.inf, -math.inf, 1e-320, 2**80),
        "kinds": {"s": {1, 2}, "c": collections.Counter("aab"), 3: (4,), "$odd": 1, (1, 2): b"\0\xff"},
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
        "numpy": [np.float64(0.1), np.int32(3), np.arange(6).reshape(2, 3), np.bool_(True)],
    }
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "x"), allow_nan=False)
    back = decode(json.loads(text), {}, "x")
    assert repr(back) == repr({**value, "torch": [torch.float16, torch.device("cpu"), (2, 3)], "numpy": [0.1, *value["numpy"][1:]]})
    tensors = {"small": torch.randn(3).bfloat16(), "large": torch.randn(300, 300), "zero": torch.empty(0, 2), "bit": torch.tensor([True])}
    encoder = Encoder()
    back = decode(json.loads(json.dumps(encoder.encode(tensors, "t"))), encoder.stored, "t")  # type: ignore[arg-type]
    assert list(encoder.stored) == ["t/large"] and all(
        torch.equal(tensors[k], back[k]) and tensors[k].dtype == back[k].dtype for k in tensors
    )
    with pytest.raises(InputError, match=r"x/1/deep holds an object of builtins\.object") as e:
        Encoder().encode([1, {"deep": object()}], "x")
    assert "nothing pickled" in e.value.why
    twice = Encoder(lambda t: False)
    named = twice.encode({"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}, "x")
    assert decode(named, twice.stored, "x")["a/b"] == 1 and decode(named, twice.stored, "x")["a"]["b"] == 0  # type: ignore[arg-type]


def test_nothing_is_pickled() -> None:
    """Neither by us nor, on disk, by torch.distributed.checkpoint."""
    for path in Path(netmind_autopar.checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Import | ast.ImportFrom) or "pickle" not in ast.dump(node), path
            assert not isinstance(node, ast.Attribute) or ast.unparse(node) not in ("torch.load", "torch.save"), path


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    parts = trained(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **parts)

    def refused(match: str, **others: Any) -> str:
        with pytest.raises(InputError, match=match) as e:
            Checkpoints(tmp_path).load_latest(**{**parts, **others})
        return e.value.where

    other = nn.Linear(6, 8)
    assert "weight is not in the checkpoint" in refused("another model", model=other, optimizer=None, scheduler=None)
    wide = Small()
    wide.a = nn.Linear(7, 8)
    assert refused("another model", model=wide, optimizer=None, scheduler=None) == "a.weight has the shape (8, 7), in the checkpoint (8, 6)"
    model = parts["model"]
    groups = torch.optim.AdamW([{"params": model.a.parameters()}, {"params": model.b.parameters()}], lr=0.1)
    assert refused("groups are not those", optimizer=groups) == "2 groups here, 1 there"
    fewer = torch.optim.AdamW([*model.a.parameters()], lr=0.1)
    assert "there only" in refused("groups are not those", optimizer=fewer)
    refused("no optimizer called 'two'", optimizer={"two": parts["optimizer"]})
    refused("does not have", optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(InputError, match=r"extra/x holds an object"):
        Checkpoints(tmp_path).save(2, **parts, extra={"x": object()})
    with pytest.raises(InputError, match="no step"):
        Checkpoints(tmp_path).save(-1, **parts)
    with pytest.raises(InputError, match="meta device"):
        Checkpoints(tmp_path).save(1, model=nn.Linear(2, 2, device="meta"))


def test_several_optimizers_and_other_objects(tmp_path: Path) -> None:
    """By name; state of a dtype that torch's own load_state_dict would cast; and an order of parameters of its own."""
    torch.manual_seed(0)
    model = Small().to(torch.bfloat16)
    one, two = torch.optim.SGD(model.a.parameters(), lr=0.1, momentum=0.5), torch.optim.Adam([*model.b.parameters()], lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    one.step(), two.step()
    one.state[model.a.weight]["momentum_buffer"] = torch.randn(8, 6)  # float32, beside a bfloat16 parameter
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model=model, optimizer={"one": one, "two": two}, extra={"scaler": scaler, "n": 3})
    a, b = torch.optim.SGD([model.a.bias, model.a.weight], lr=0.7, momentum=0.5), torch.optim.Adam([*model.b.parameters()], lr=0.1)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    found = Checkpoints(tmp_path).load(1, model=model, optimizer={"one": a, "two": b}, extra={"scaler": other})
    assert found.extra["n"] == 3 and other.get_scale() == 64.0 and a.param_groups[0]["lr"] == 0.1
    for p in (model.a.weight, model.a.bias):
        assert torch.equal(a.state[p]["momentum_buffer"], one.state[p]["momentum_buffer"])
    assert a.state[model.a.weight]["momentum_buffer"].dtype == torch.float32
    assert all(torch.equal(v, two.state[p][k]) for p, held in b.state.items() for k, v in held.items())


# Whole programs.

PROGRAM = """
import os, sys, time, torch
from netmind_autopar import Checkpoints
model = torch.nn.Linear(4, 4)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, model=model, asynchronous=False)
real = os.fsync
os.fsync = lambda fd: (time.sleep(0.3), real(fd))
checkpoints.save(2, model=model)
print("saving", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("told", ["ends", "is told to end"])
def test_the_end_of_a_program_waits_for_the_last_save(told: str, tmp_path: Path) -> None:
    """Which here called neither `wait` nor `close`."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "0" if told == "ends" else "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
        if told != "ends":
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert Checkpoints(tmp_path).steps() == [2, 1]
    assert (process.returncode, "CheckpointError: SIGTERM arrived while" in said) == ((0, False) if told == "ends" else (1, True)), said


# Several processes.


def launched(cases: list[dict[str, Any]], folder: Path, timeout_s: float = 300) -> list[dict[str, Any]]:
    """The results of cases of `checkpoint_kit.py`, in a process of its own: it forks."""
    command = [sys.executable, kit.__file__, str(folder), json.dumps(cases)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert not any("error" in r for r in results), results
    return results


@pytest.mark.gloo
def test_another_mesh_loads_the_same_bits(tmp_path: Path) -> None:
    pairs = [(("gpt2", "a=2", 0, "adamw", True), ("gpt2", "a=3", 1)), (("gpt2", "a=3", 1, "sgd"), ("gpt2", "a=1", 0, "sgd"))]
    for number, found in enumerate(launched([{"kind": "pair", "a": a, "b": b} for a, b in pairs], tmp_path)):
        assert found["all_equal"] and not found["differ"] and found["tensors"] > 50 and found["at"] == 3, found
        assert found["loss_error"] <= 1e-6 and found["later_loss_error"] <= 1e-5, (number, found)


@pytest.mark.gloo
def test_damage_trouble_and_death_on_two_processes(tmp_path: Path) -> None:
    troubles = [{"kind": "trouble", "world": 2, "trouble": t} for t in ("disk full", "no space", "read-only", "gone")]
    cases = [{"kind": "corruptions", "mesh": "a=2", "world": 2, "count": 12, "seed": 3}, {"kind": "terminated", "world": 2, "victims": 1}]
    cases += [
        {"kind": "kills", "mesh": "a=2", "world": 2, "kills": 6, "seed": 5},
        {"kind": "kills", "mesh": "a=1", "world": 1, "kills": 12, "seed": 6},
    ]
    damage, terminated, two, one, *found = launched([*cases, *troubles], tmp_path)
    assert damage["named"] == damage["fell_back"] == 12, damage
    assert [s["error"] for s in terminated["said"]] == ["CheckpointError"] * 2 and terminated["seconds"] < 30, terminated
    assert terminated["steps"] in ([1, 1], [2, 2])
    for kills in (one, two):
        assert kills["right"] == kills["loads"] and not kills["hung"], kills
    for case, result in zip(troubles, found, strict=True):
        for rank in result["ranks"]:
            assert rank["kind"] == "CheckpointError" and rank["same"] and rank["step"] == 1, (case, rank)
            assert not rank["left"] and rank["steps"] == [7, 1] and rank["seconds"] < 30, (case, rank)
        assert len({rank["text"].replace("rank 0: ", "").replace("rank 1: ", "") for rank in result["ranks"]}) == 1


@pytest.mark.gloo
def test_what_belongs_to_a_rank(tmp_path: Path) -> None:
    alike, different = launched([{"kind": "by rank", "differs": 0}, {"kind": "by rank", "differs": 1}], tmp_path)
    for found in (alike, different):
        saved = [one["result"] for one in found["saved"]]
        assert saved[0] != saved[1], "generators that differ"
        for rank, one in enumerate(found["loaded"]["2"]):
            assert one["result"]["drawn"] == saved[rank] and one["result"]["doubled"] and one["result"]["note"] == ["x", 0], one
            assert one["result"]["seen"] == 10 + (rank if found is different else 0) == one["result"]["order"] + 10
    for world in ("1", "3"):
        drawn = [one["result"]["drawn"] for one in alike["loaded"][world]]
        assert drawn == [[one["result"] for one in alike["saved"]][r % 2] for r in range(int(world))]
        assert all(one["result"]["seen"] == 10 for one in alike["loaded"][world])
        assert {one["error"] for one in different["loaded"][world]} == {"InputError"}
        assert "'data' differed from rank to rank when 2 ranks saved it" in different["loaded"][world][0]["text"]


def test_names_of_checkpoints(tmp_path: Path) -> None:
    for name in (
        "000001-step-1",
        "1-step-1",
        "000002-step-02",
        "000003-step-",
        "x000004-step-4",
        "0000005-step-5",
        "000006-step-6.partial",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "000007-step-7").write_text("")
    assert [f.path.name for f in manifests.listed(tmp_path)] == ["000001-step-1"]
    with pytest.raises(AutoparError):
        manifests.Manifest.read(tmp_path / "000001-step-1")
