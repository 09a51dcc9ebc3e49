"""`netmind-autopar doctor`: what it looks at, what it calls wrong, and that its collective test can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from netmind_autopar import doctor
from netmind_autopar.cli import main
from netmind_autopar.doctor import Finding, machine, run, software
from netmind_autopar.doctor.collectives import KINDS, expected
from netmind_autopar.ir.errors import InputError, ProfileError


def test_software_that_does_not_fit_together_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(f.level == "ok" for f in software.look() if f.name in ("python", "torch", "gloo", "solver"))
    assert software._triton("3.6.0", "2.4.1", interpreted=True).level == "wrong"
    assert software._triton("3.6.0", "2.4.1", interpreted=False).level == "note"
    assert software._triton("3.6.0", "2.3.5", interpreted=True).level == "ok"
    assert software._triton("3.7.1", "2.4.6", interpreted=True).level == "ok"
    assert software._triton("", "2.4.6", interpreted=False).value.startswith("not installed")
    known = {"pulp": "4.0.0", "highspy": "1.15.1"}
    monkeypatch.setattr(software, "version", lambda name: known.get(name, ""))
    (found,) = software._solver()
    assert found.level == "wrong" and "pulp" in found.do
    known |= {"pulp": "3.3.2", "highspy": ""}
    assert [f.level for f in software._solver()] == ["note"]


def test_a_machine_that_lacks_something_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("MASTER_ADDR", "no such host.invalid")
    found = {f.name: f for f in machine.network()}
    assert found["interface of gloo"].level == found["MASTER_ADDR"].level == "wrong"
    assert "nowhere0" in found["interface of gloo"].do
    (tmp_path / "file").write_text("")
    assert machine.disk("offload folder", tmp_path).level in ("ok", "note")
    assert machine.disk("offload folder", Path("/proc/nothing")).level == "wrong"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Room", (), {"free": 1 << 20, "total": 64 << 20})())
    assert next(f for f in machine.memory() if f.name == "shared memory").level == "wrong"
    assert all(f.do for f in [*machine.look()] if f.level == "wrong")


def test_a_collective_that_gives_wrong_numbers_is_wrong() -> None:
    assert expected("all_reduce", 0, 3, 2).tolist() == [6.0, 6.0]
    assert expected("all_gather", 1, 2, 2).tolist() == [1.0, 1.0, 2.0, 2.0]
    assert expected("reduce_scatter", 1, 2, 4).tolist() == [3.0, 3.0]
    assert expected("all_to_all", 0, 2, 4).tolist() == [1.0, 1.0, 2.0, 2.0]
    times = [[1024, 1e-3], [8 << 20, 1e-2]]
    of_ranks = [{"kind": "all_reduce", "right": right, "times": times} for right in (True, False)]
    bad = run._finding(run._row(of_ranks, 2, None))
    assert bad.level == "wrong" and "WRONG" in bad.value
    diagnosis = doctor.Diagnosis((bad,), (), 2, "")
    assert not diagnosis.ok and not diagnosis.json()["ok"]
    slow = run._row(of_ranks[:1], 2, run.cluster_profile("h100-sxm"))
    assert run._finding(slow).level == "note" and slow["bytes_s"] == pytest.approx((8 << 20) / 1e-2)


def test_exit_code_and_what_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run.software, "look", lambda: iter([Finding("software", "torch", "1.0", "wrong", "install torch 2.11 or later")]))
    monkeypatch.setattr(run.machine, "look", lambda: iter([Finding("machine", "cores", "2")]))
    assert main(["doctor", "--ranks", "1"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG  torch: install torch 2.11 or later" in shown and "must be mended" in shown
    monkeypatch.setattr(run.software, "look", lambda: iter([]))
    assert main(["doctor", "--ranks", "1", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["findings"][0]["name"] == "cores"
    assert main(["doctor", "--cluster", "no-such-cluster"]) == 2

    def broken(*_: Any) -> Any:
        raise ProfileError("measuring this machine failed", why="process 1 of 2 ended with 1: Connection refused")

    monkeypatch.setattr(run, "measure", broken)
    assert main(["doctor", "--ranks", "2"]) == 1
    assert "Connection refused" in capsys.readouterr().out


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 ranks to test"):
        doctor.examine(ranks=2)


@pytest.mark.gloo
@pytest.mark.slow
def test_the_whole_examination() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "netmind_autopar", "doctor", "--ranks", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ok"] else 1), done.stderr
    assert [c["kind"] for c in found["collectives"]] == list(KINDS)
    assert all(c["right"] and c["bytes_s"] > 1e6 for c in found["collectives"])
