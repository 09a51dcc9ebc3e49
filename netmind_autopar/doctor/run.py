"""The whole examination: look at everything, then let processes talk to each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..calibrate.run import measure
from ..costs.device import ClusterProfile, cluster_profile, default_cluster
from ..ir.errors import AutoparError, InputError, MeshError
from ..wording import rate, seconds
from . import machine, software
from .findings import Finding

TEST_S = 10.0
GRACE_S = 45.0  # for processes to start, on a busy machine
SLOW = 0.5  # of what the profile says
PART = "collectives"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Diagnosis:
    """All that was found. collectives: kind, right, seconds of a small message, bytes/s of a large one, and what the profile says."""

    findings: tuple[Finding, ...]
    collectives: tuple[dict[str, Any], ...]
    ranks: int
    cluster: str

    @property
    def ok(self) -> bool:
        return all(f.level != "wrong" for f in self.findings)

    def json(self) -> dict[str, Any]:
        found = {"ok": self.ok, "ranks": self.ranks, "cluster": self.cluster}
        return {**found, "findings": [asdict(f) for f in self.findings], "collectives": list(self.collectives)}


def examine(*, ranks: int | None = None, cluster: str | None = None, test_s: float = TEST_S, say: Say = lambda _: None) -> Diagnosis:
    """Examine this machine in about 15 seconds. ranks: processes of the test, one per GPU where there are any; two by default.

    cluster: a preset or profile to compare with; the present machine's where one is known. Raises InputError for arguments that cannot be
    met, MeshError and ProfileError for a profile that cannot be read.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = ranks if ranks is not None else max(gpus, 1) if gpus else 2
    if ranks < 1 or (gpus and ranks > gpus):
        raise InputError(f"{ranks} ranks to test", why=f"this machine has {gpus or 'no'} GPUs", try_="leave --ranks out")
    profile, note = _profile(cluster)
    say("looking at the software")
    findings = list(software.look())
    say("looking at the machine")
    findings += machine.look()
    collectives: list[dict[str, Any]] = []
    if ranks > 1:
        say(f"testing collectives with {ranks} processes")
        tested, collectives = _test(ranks, gpus, test_s, profile)
        findings += tested
    else:
        findings.append(Finding(PART, "test", "one process has nobody to talk to", "note", "--ranks 2"))
    return Diagnosis((*findings, *note), tuple(collectives), ranks, profile.name if profile else "")


def _profile(cluster: str | None) -> tuple[ClusterProfile | None, list[Finding]]:
    if cluster is not None:
        return cluster_profile(cluster), []
    try:
        return cluster_profile(default_cluster()), []
    except MeshError as e:
        return None, [Finding("machine", "profile", e.what, "note", "netmind-autopar calibrate --out my.json, then --cluster my.json")]


def _test(ranks: int, gpus: int, test_s: float, profile: ClusterProfile | None) -> tuple[list[Finding], list[dict[str, Any]]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    task = {"ranks": ranks, "device": "cuda" if gpus else "cpu", "backend": "nccl" if gpus else "gloo"}
    task |= {"threads": max(1, cores // ranks), "seconds": test_s, "deadline_s": test_s + GRACE_S}
    try:
        found = measure(task, lambda *_: None, ("-m", "netmind_autopar.doctor.collectives"))
    except AutoparError as e:
        names = "NCCL_DEBUG=INFO shows more" if gpus else f"look at {machine.GLOO} and at the name of this host"
        return [Finding(PART, "test", f"{ranks} processes: {e.why}", "wrong", names)], []
    rows = [_row([of_rank[i] for of_rank in found], ranks, profile) for i in range(len(found[0]))]
    return [_finding(row) for row in rows], rows


def _row(of_ranks: Sequence[dict[str, Any]], ranks: int, profile: ClusterProfile | None) -> dict[str, Any]:
    """One collective: the slowest rank counts."""
    (small, latency), (large, took) = (max(times, key=lambda t: t[1]) for times in zip(*(r["times"] for r in of_ranks), strict=True))
    row = {"kind": of_ranks[0]["kind"], "right": all(r["right"] for r in of_ranks), "latency_s": latency, "bytes_s": large / took}
    row |= {"small_bytes": small, "large_bytes": large, "profile_bytes_s": None}
    if profile is not None and ranks <= profile.node_size:
        link = profile.links.intra
        row["profile_bytes_s"] = large / (link.latency_s * (ranks - 1) + large / link.bandwidth_bytes_s)
    return row


def _finding(row: dict[str, Any]) -> Finding:
    name = row["kind"].replace("_", "-")
    if not row["right"]:
        return Finding(PART, name, "gives WRONG numbers", "wrong", "do not train on this machine: look at its memory, links and drivers")
    text = f"right; {seconds(row['latency_s'])} at least, {rate(row['bytes_s'])} of a large one"
    said = row["profile_bytes_s"]
    if said is None:
        return Finding(PART, name, text)
    text += f", {row['bytes_s'] / said:.0%} of the profile's"
    if row["bytes_s"] < SLOW * said:
        return Finding(PART, name, text, "note", "netmind-autopar calibrate measures it, for better plans")
    return Finding(PART, name, text)
