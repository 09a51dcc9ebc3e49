"""What ranks tell each other about themselves: small records in the key-value store of the process group, over a connection of its own."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .judge import Seen, Verdict


class Peers:
    """The records of all ranks under one prefix. store: a clone, so that a call of it never waits for one of somebody else."""

    def __init__(self, store: Any, prefix: str, rank: int, size: int) -> None:
        self.store, self.prefix, self.rank, self.size = store, prefix, rank, size
        self.beat = 0
        self.homes: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, tuple[Any, float]] = {}  # of each rank the last beat, and when it was new
        self._moved: dict[int, tuple[Any, float]] = {}  # the same of its progress
        self._said: dict[int, dict[str, Any]] = {}
        store.compare_set(f"{prefix}/verdict", "", "{}")  # so that no read of it waits
        self._put(f"home/{rank}", _home())

    def say(self, said: Mapping[str, Any]) -> None:
        """Tell what this rank is doing."""
        self.beat += 1
        self._put(f"said/{self.rank}", {**said, "beat": self.beat})

    def verdict(self) -> Verdict | None:
        """The verdict over the run, once there is one."""
        found = self._get(["verdict"])[0]
        return Verdict(**found) if found else None

    def pronounce(self, verdict: Verdict) -> Verdict:
        """Make a verdict known, unless there is one already; the one that counts."""
        raw = self.store.compare_set(f"{self.prefix}/verdict", "{}", json.dumps(verdict.json()))
        found = json.loads(raw)
        return Verdict(**found) if found else verdict

    def look(self, ranks: list[int]) -> list[Seen]:
        """These ranks as they are now."""
        self.meet(ranks)
        known = [r for r in ranks if r in self.homes]
        for r, said in zip(known, self._get([f"said/{r}" for r in known]), strict=True):
            self._said[r] = said
        now = time.monotonic()
        return [self._seen(r, now) for r in ranks]

    def meet(self, ranks: list[int]) -> None:
        """Learn where these ranks live, those that have said so."""
        new = [r for r in ranks if r not in self.homes]
        ready = [r for r in new if self.store.check([f"{self.prefix}/home/{r}", f"{self.prefix}/said/{r}"])]
        for r, home in zip(ready, self._get([f"home/{r}" for r in ready]), strict=True):
            if home:
                self.homes[r] = home

    def gone(self) -> list[int]:
        """Ranks of this machine whose process is not there any more. Asks the system, not the store."""
        return [r for r, home in tuple(self.homes.items()) if r != self.rank and _gone(home)]

    def seen(self) -> list[Seen]:
        """All ranks as they were when they were last looked at."""
        now = time.monotonic()
        return [self._seen(r, now) for r in range(self.size) if r in self._said]

    def _seen(self, r: int, now: float) -> Seen:
        said = self._said.get(r, {})
        ahead = [said.get(k) for k in ("count", "waiting", "busy")]
        silent = now - _since(self._heard, r, said.get("beat"), now)
        still = now - _since(self._moved, r, ahead, now)
        return Seen(r, said, silent, still, r in self.homes and r != self.rank and _gone(self.homes[r]))

    def _put(self, key: str, value: Mapping[str, Any]) -> None:
        self.store.set(f"{self.prefix}/{key}", json.dumps(value))

    def _get(self, keys: list[str]) -> list[dict[str, Any]]:
        return [json.loads(raw) for raw in self.store.multi_get([f"{self.prefix}/{k}" for k in keys])] if keys else []


def _since(known: dict[int, tuple[Any, float]], rank: int, value: Any, now: float) -> float:
    before = known.get(rank)
    if before is None or before[0] != value:
        known[rank] = (value, now)
        return now
    return before[1]


def _home() -> dict[str, Any]:
    """Where this process lives. Numbers of processes mean something within one machine and one namespace only."""
    return {"host": _host(), "pid": os.getpid(), "born": _stat(os.getpid())[1]}


def _host() -> str:
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}"


def _gone(home: Mapping[str, Any]) -> bool:
    if home.get("host") != _host():
        return False
    if Path("/proc/self/stat").exists():
        state, born = _stat(home["pid"])
        return state in ("", "Z", "X") or born != home["born"]
    try:
        os.kill(home["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _stat(pid: int) -> tuple[str, str]:
    """(state, time of birth) of a process; empty when it is not there, or nothing is known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    rest = text.rpartition(")")[2].split()
    return rest[0], rest[19]
