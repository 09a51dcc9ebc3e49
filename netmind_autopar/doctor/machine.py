"""Devices, memory, disks, limits and the names of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from ..ir import flags
from ..wording import size
from .findings import Finding

MACHINE, NETWORK = "machine", "network"
TRIAL_BYTES = 32 << 20  # written to a disk to see how fast it is
SHM_BYTES = 1 << 30
FILES = 4096
GLOO = "GLOO_SOCKET_IFNAME"


def look() -> Iterator[Finding]:
    yield from devices()
    yield from memory()
    folders = {
        "temporary folder": Path(tempfile.gettempdir()),
        "offload folder": flags.offload_folder(),
        "cache folder": flags.cache_folder(),
    }
    for name, folder in folders.items():
        if folder is not None:
            yield disk(name, folder)
    yield from limits()
    yield from network()


def devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(MACHINE, "cores", str(cores))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        text = f"{torch.cuda.get_device_name(i)}, {size(free)} free of {size(total)}"
        yield Finding(MACHINE, f"cuda:{i}", text, *(() if free > 0.9 * total else ("note", "another process uses it: look at nvidia-smi")))  # type: ignore[arg-type]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        apart = [(i, j) for i in range(count) for j in range(count) if i != j and not torch.cuda.can_device_access_peer(i, j)]
        do = "collectives go through host memory between these: look at nvidia-smi topo -m"
        yield Finding(NETWORK, "links of GPUs", f"{len(apart)} pairs without peer access" if apart else "all pairs reach each other",
                      *(("note", do) if apart else ()))  # type: ignore[arg-type]  # fmt: skip


def memory() -> Iterator[Finding]:
    known = _meminfo()
    if known:
        total, free = known
        level = () if free > 0.1 * total else ("note", "little is free: end other programs")
        yield Finding(MACHINE, "host memory", f"{size(free)} free of {size(total)}", *level)  # type: ignore[arg-type]
    shm = Path("/dev/shm")
    if shm.is_dir():
        room = shutil.disk_usage(shm)
        text = f"{size(room.free)} free of {size(room.total)}"
        if room.free < SHM_BYTES:
            do = "data loaders and NCCL use it: docker run --ipc=host, or --shm-size=8g"
            yield Finding(MACHINE, "shared memory", text, "wrong" if room.free < 64 << 20 else "note", do)
        else:
            yield Finding(MACHINE, "shared memory", text)


def _meminfo() -> tuple[int, int] | None:
    """(total, available) bytes, of this container where it has a limit."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None
    with suppress(OSError, ValueError):
        most, used = (int(Path("/sys/fs/cgroup", f).read_text()) for f in ("memory.max", "memory.current"))
        total, free = min(total, most), min(free, max(0, most - used))
    return total, free


def disk(name: str, folder: Path) -> Finding:
    """Room and speed of the disk under a folder, or why nothing can be written there."""
    there = next((p for p in (folder, *folder.parents) if p.is_dir()), folder)
    try:
        room = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            block = os.urandom(1 << 20)
            start = time.perf_counter()
            for _ in range(min(TRIAL_BYTES, room // 2) >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as e:
        return Finding(
            MACHINE, name, f"{folder}: {e.strerror or e}", "wrong", "name another folder: TMPDIR, or the variables in docs/cli.md"
        )
    text = f"{folder}: {size(room)} free, written at {TRIAL_BYTES / seconds / 1e6:,.0f} MB/s"
    return Finding(MACHINE, name, text, *(() if room > 1 << 30 else ("note", "free some space")))  # type: ignore[arg-type]


def limits() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < FILES
    yield Finding(MACHINE, "open files", str(soft), *(("note", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}") if few else ()))  # type: ignore[arg-type]
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY:
        yield Finding(MACHINE, "size of a file", size(largest), "note", "checkpoints may be larger: ulimit -f unlimited")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        yield Finding(NETWORK, "locked memory", size(locked), "note", "InfiniBand needs it: ulimit -l unlimited")


def network() -> Iterator[Finding]:
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    chosen = os.environ.get(GLOO, "")
    missing = [n for n in chosen.split(",") if n and n not in names]
    if missing:
        yield Finding(
            NETWORK, "interface of gloo", f"{GLOO}={chosen}", "wrong", f"{missing[0]} is not among {', '.join(names)}: export {GLOO}=…"
        )
    elif chosen:
        yield Finding(NETWORK, "interface of gloo", f"{GLOO}={chosen}")
    host = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError as e:
        do = f"name it in /etc/hosts, or export {GLOO}=… ({', '.join(names)})"
        yield Finding(NETWORK, "name of this host", f"{host}: {e.strerror or e}", "ok" if chosen else "wrong", "" if chosen else do)
    else:
        inside = address.startswith("127.") or address == "::1"
        do = f"enough for one machine; on several, gloo would listen where no other reaches it: export {GLOO}=… ({', '.join(names)})"
        yield Finding(NETWORK, "name of this host", f"{host} is {address}", *(("note", do) if inside and not chosen else ()))  # type: ignore[arg-type]
    if master := os.environ.get("MASTER_ADDR"):
        try:
            socket.getaddrinfo(master, None)
            yield Finding(NETWORK, "MASTER_ADDR", master)
        except OSError as e:
            yield Finding(NETWORK, "MASTER_ADDR", f"{master}: {e.strerror or e}", "wrong", "give an address that this machine resolves")
    cards = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    for card in cards:
        state = card.read_text().strip()
        do = "look at ibstat and the cable"
        yield Finding(NETWORK, card.parts[-4], state, *(() if "ACTIVE" in state else ("note", do)))  # type: ignore[arg-type]
