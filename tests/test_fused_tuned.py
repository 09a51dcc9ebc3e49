"""Tuned launch configurations: written, read strictly, left alone when they cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from netmind_autopar.ir.errors import ProfileError
from netmind_autopar.kernels.fused import launch, tuned
from netmind_autopar.kernels.fused.launch import KERNELS, Config
from netmind_autopar.kernels.fused.tuned import nearest, read_tuned, tuned_path, write_tuned

DEVICE = "NVIDIA H200"
ENTRY = {"width": 4096, "bytes": 2, "block": 4096, "rows": 1, "warps": 4, "stages": 1}


def text(**change: Any) -> str:
    entry = {**ENTRY, **{k: v for k, v in change.items() if k in ENTRY}}
    rest = {k: v for k, v in change.items() if k not in ENTRY}
    return json.dumps({"format": 1, "device": DEVICE, "kernels": {"norm.forward": [entry]}, **rest})


def test_written_and_read(tmp_path: Path) -> None:
    found = {"norm.forward": {(2, 4096): Config(4096, 1, 4)}, "norm.backward": {(4, 8192): Config(8192, 1, 32, only=4)}}
    path = tmp_path / "made" / "x.json"
    write_tuned(path, DEVICE, found)
    assert read_tuned(path.read_text(), DEVICE) == found
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


BAD = {
    "no JSON": ("{", "no JSON"),
    "a key twice": ('{"format": 1, "format": 1}', "twice"),
    "not a number": (text(width=float("nan")), "NaN is not a number"),
    "a list": ("[]", "nothing else"),
    "something more": (text(more=1), "nothing else"),
    "another format": (text(format=2), "format 2"),
    "another device": (text(device="NVIDIA A100"), "NVIDIA A100"),
    "an unknown kernel": (text(kernels={"norm.sideways": []}), "norm.sideways"),
    "entries that are no list": (text(kernels={"norm.forward": {"a": 1}}), "all positive integers"),
    "a fraction": (text(warps=4.5), "all positive integers"),
    "truth for a number": (text(rows=True), "all positive integers"),
    "a negative width": (text(width=-1), "all positive integers"),
    "outside of the table": (text(warps=2), "no configuration (4096, 1, 2, 1)"),
    "a block below the width": (text(width=5000), "for rows of 5000"),
    "a size of elements that it is not for": (
        text(kernels={"norm.backward": [{**ENTRY, "width": 8192, "block": 8192, "warps": 32}]}),
        "no configuration (8192, 1, 32, 1)",
    ),
    "an entry twice": (text(kernels={"norm.forward": [ENTRY, ENTRY]}), "two entries"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused(name: str) -> None:
    content, why = BAD[name]
    with pytest.raises(ProfileError) as caught:
        read_tuned(content, DEVICE, "x.json")
    assert why in str(caught.value) and caught.value.where == "x.json"


def test_every_cut_of_a_file_is_refused() -> None:
    whole = text()
    for n in range(len(whole)):
        with pytest.raises(ProfileError):
            read_tuned(whole[:n], DEVICE)


def test_the_next_wider_entry_counts() -> None:
    entries = {(2, 1024): Config(1024, 1, 4), (2, 4096): Config(4096, 1, 4), (4, 2048): Config(2048, 1, 4)}
    assert nearest(entries, 1000, 2) == Config(1024, 1, 4) and nearest(entries, 1025, 2) == Config(4096, 1, 4)
    assert nearest(entries, 4097, 2) is None and nearest(entries, 1000, 1) is None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(launch, "_SAID", set())
    tuned.tuned_for.cache_clear()
    yield SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    tuned.tuned_for.cache_clear()


def test_what_was_tuned_is_launched(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["norm.forward"]
    heuristic = launch.choose(kernel, 3000, device)
    tuned.tuned_for.cache_clear()
    path = tmp_path / "tuned.json"
    path.write_text(text())
    monkeypatch.setenv("AUTOPAR_TUNED", str(path))
    assert launch.choose(kernel, 3000, device) == Config(4096, 1, 4) != heuristic
    assert launch.choose(kernel, 2000, device) == launch.choose(
        kernel, 2000, SimpleNamespace(**{**device.__dict__, "device": torch.device("cpu")})
    )


def test_a_damaged_file_is_left_alone_with_one_notice(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("{")
    monkeypatch.setenv("AUTOPAR_TUNED", str(path))
    with pytest.warns(UserWarning, match="left alone") as seen:
        found = [launch.choose(KERNELS["norm.forward"], 3000, device) for _ in range(2)]
    assert found == [Config(4096, 1, 8)] * 2 and len(seen) == 1


def test_where_a_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    assert tuned_path(DEVICE) == tmp_path / "kernels-nvidia-h200.json"
    monkeypatch.setenv("AUTOPAR_CACHE", "off")
    assert tuned_path(DEVICE) is None
    monkeypatch.setenv("AUTOPAR_TUNED", str(tmp_path / "x.json"))
    assert tuned_path(DEVICE) == tmp_path / "x.json"
