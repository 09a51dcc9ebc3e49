"""The compile gate: every registered configuration compiles for a Hopper GPU without spills, with 128-bit accesses; and it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the gate compiles with Triton")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_gate
import kernel_timing

from netmind_autopar.kernels.fused import gated, norm_launch
from netmind_autopar.kernels.fused.launch import KERNELS, Config

BF16 = torch.bfloat16


def gate(*args: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of the gate, run in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--compile-gate", "--json", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000, check=False)
    assert done.stdout, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (1 if any(row["why"] for row in rows) else 0), done.stderr
    return rows


def judge(rows: list[dict[str, Any]]) -> None:
    assert [f"{r['kernel']} {r['call']} {r['dtype']} {r['config']}: {r['why']}" for r in rows if r["why"]] == []
    assert all(0 < r["registers"] <= 255 and not r["spills"] for r in rows)


def test_every_kernel_is_described() -> None:
    assert set(kernel_gate.CALLS) == set(KERNELS)


def test_some_kernels_pass_the_gate(tmp_path: Path) -> None:
    rows = gate("--first", "gated.forward", "cross_entropy.backward", "norm.weights", folder=tmp_path)
    judge(rows)
    assert {r["kernel"] for r in rows} == {"gated.forward", "cross_entropy.backward", "norm.weights_wide"}


@pytest.mark.slow
def test_every_configuration_passes_the_gate(tmp_path: Path) -> None:
    rows = gate(folder=tmp_path)
    judge(rows)
    seen = {(r["kernel"], *r["config"]) for r in rows}
    assert seen == {(name, c.block, c.rows, c.warps, c.stages) for name, k in KERNELS.items() for c in k.configs}


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row of 32768 elements does not fit into the registers of four warps."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = Config(32768, 1, 4)
    greedy = dataclasses.replace(norm_launch.FORWARD, configs=(config,))
    monkeypatch.setattr(norm_launch, "FORWARD", greedy)
    monkeypatch.setitem(KERNELS, "norm.forward", greedy)
    _, launch = next(kernel_gate.launches("norm.forward", config, torch.float32))
    facts = kernel_gate.compiled(launch)
    assert facts["spills"] and "spills" in kernel_gate.verdict(facts)


def test_narrow_accesses_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row stride that is not known to be a multiple of 16 leaves no access of 128 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def call(n: int, new: Any) -> object:
        x = new(64, 2 * n + 1)
        return gated.gated(x[:, :n], x[:, n : 2 * n], "silu")

    monkeypatch.setitem(kernel_gate.CALLS, "gated.forward", {"": call})
    _, launch = next(kernel_gate.launches("gated.forward", gated.FORWARD.configs[0], BF16))
    facts = kernel_gate.compiled(launch)
    assert 16 in facts["loads"] and "accesses of 16" in kernel_gate.verdict(facts)


def test_a_dot_needs_wgmma() -> None:
    good = {"spills": 0, "loads": {128: 1}, "stores": {128: 1}, "dot": True, "wgmma": 4}
    assert kernel_gate.verdict(good) == "" and "wgmma" in kernel_gate.verdict({**good, "wgmma": 0})


def test_the_contenders_of_a_timing_compute_the_same() -> None:
    """What would be timed on a GPU, small and on the CPU."""
    torch.manual_seed(0)
    kernels = set()
    for case in kernel_timing.cases(scale=1 << 16):
        given = {k: v.float() if v.is_floating_point() else v for k, v in case.make(torch.device("cpu")).items()}
        found = []
        for fn in (case.ours, case.eager):
            x = {k: v.detach().requires_grad_(k in case.leaves) for k, v in given.items()}
            y = fn(**x)
            found.append([y, *torch.autograd.grad(y, [x[k] for k in case.leaves], torch.full_like(y, 0.5))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        kernels |= set(case.kernels)
        assert all(m > 0 for m in case.moved)
    assert kernels >= {"norm.forward", "norm.backward", "gated.forward", "gated.backward", "rope", "cross_entropy.forward"}


def test_without_a_device_nothing_is_timed() -> None:
    if torch.cuda.is_available():
        pytest.skip("the refusal on a machine without a CUDA device is what is tested, and this one has a device")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--time"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@pytest.mark.gpu
def test_timing_runs_and_says_what_it_measured() -> None:
    device = torch.device("cuda", 0)
    copy = kernel_timing.copy_bandwidth(device)
    case = next(c for c in kernel_timing.cases(scale=8) if c.name.startswith("rms_norm"))
    rows = list(kernel_timing.time_case(case, device, copy))
    assert [r["direction"] for r in rows] == ["forward", "backward"]
    assert all(r["ms"]["ours"] > 0 and r["ms"]["eager"] > 0 and 0 < r["of_copy"] < 1.5 for r in rows)
