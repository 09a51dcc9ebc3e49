"""The processes of a run find each other: who does not come is named, and a life before a restart is not taken for this one.

As `init_process_group("env://")`, over the same variables (MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE), with two differences. torchrun
keeps one key-value store over all restarts, in which addresses of processes that are gone still stand (seen with PyTorch 2.13:
"Connection refused" after a restart); here every life has keys of its own, under a number that rank 0 draws. And who waits in vain hears
for whom.

    rank r: hello/r = a number of its own          rank 0: answers each number it sees with the number of this life
    rank r: takes it, and says so under it         rank 0: when all have: go; when time is up: who is missing
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import time
from typing import Any

import torch.distributed as dist

from ..ir.errors import MeshError

JOIN_S = 60.0
TICK_S = 0.05


def join(backend: str, *, timeout_s: float = JOIN_S) -> None:
    """Start the default process group of this process. Raises MeshError, on every rank that came, when another does not come in time."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    until = time.monotonic() + timeout_s
    store = _store(rank, timeout_s)
    try:
        prefix = _gather(store, world, until, timeout_s) if rank == 0 else _come(store, rank, until, timeout_s)
        dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)
    except (dist.DistError, RuntimeError) as e:  # the store is gone with rank 0, or a process died in between
        text = (str(e).splitlines() or [""])[0][:200]
        raise MeshError("the processes lost each other at the start", where=f"rank {rank}", why=text, try_=HINT) from None


HINT = "look at the last lines of the others; check MASTER_ADDR, MASTER_PORT, firewalls and GLOO_SOCKET_IFNAME (netmind-autopar doctor)"


def _store(rank: int, timeout_s: float) -> Any:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    wait = datetime.timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, int(port), is_master=rank == 0 and not launcher, timeout=wait, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError, ValueError) as e:
        who = "the launcher" if launcher else "rank 0"
        what = f"rank 0 cannot listen at {host}:{port}" if rank == 0 and not launcher else f"{who} cannot be reached at {host}:{port}"
        why = (str(e).splitlines() or [""])[0][:200]
        raise MeshError(what, where=f"rank {rank}", why=why, try_=HINT) from None


def _gather(store: Any, world: int, until: float, timeout_s: float) -> str:
    """Rank 0: answer everybody, also those who come again; the prefix of this life."""
    life = f"netmind-autopar/{secrets.token_hex(8)}"
    store.set(f"{life}/came/0", "")
    missing, answered = set(range(1, world)), set()
    while missing and time.monotonic() < until:
        for r in sorted(missing):
            if store.check([f"{life}/came/{r}"]):
                missing.discard(r)
            elif store.check([f"hello/{r}"]) and (token := store.get(f"hello/{r}").decode()) not in answered:
                store.set(f"welcome/{token}", life)
                answered.add(token)
        time.sleep(TICK_S * bool(missing))
    store.set(f"{life}/go", json.dumps(sorted(missing)))
    if missing:
        time.sleep(20 * TICK_S)  # the others read it before this process, and perhaps the store, ends
        raise _absent(missing, world, timeout_s)
    return life


def _come(store: Any, rank: int, until: float, timeout_s: float) -> str:
    token = secrets.token_hex(8)
    store.set(f"hello/{rank}", token)
    if not _there(store, f"welcome/{token}", until):
        raise _absent({0}, int(os.environ["WORLD_SIZE"]), timeout_s)
    life = store.get(f"welcome/{token}").decode()
    store.set(f"{life}/came/{rank}", "")
    if not _there(store, f"{life}/go", until + 2.0):
        raise _absent({0}, int(os.environ["WORLD_SIZE"]), timeout_s)
    if missing := json.loads(store.get(f"{life}/go")):
        raise _absent(set(missing), int(os.environ["WORLD_SIZE"]), timeout_s)
    return str(life)


def _there(store: Any, key: str, until: float) -> bool:
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(TICK_S)
    return True


def _absent(missing: set[int], world: int, timeout_s: float) -> MeshError:
    names = ", ".join(f"rank {r}" for r in sorted(missing)[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return MeshError(f"{names} of {world} did not come within {timeout_s:.0f} s", why="every rank must start", try_=HINT)
