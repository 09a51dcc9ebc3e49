"""Ranks in trouble: the verdict over what each said of itself, and real processes that die, stall and diverge (the slow tests, and
benchmarks/failures.py)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from netmind_autopar.health.frames import place_of
from netmind_autopar.health.judge import BUSY_S, Seen, Verdict, awaited, judge
from netmind_autopar.health.progress import EVERY, Progress, mark_of
from netmind_autopar.health.work import Work
from netmind_autopar.ir.errors import (
    DivergedRankError,
    FailedRankError,
    InputError,
    LostRankError,
    MeshError,
    RankError,
    StalledRankError,
    TerminatedError,
)
from netmind_autopar.runtime.alike import NAN, fingerprints

ROOT = Path(__file__).parents[1]
GATHER, REDUCE = "all-gather over dp", "all-reduce over dp"


def said(names: str, waiting: str = "", **more: Any) -> dict[str, Any]:
    """The record of a rank that entered these collectives, a letter each."""
    here = Progress()
    for letter in names:
        here.enter(letter, mark_of(letter))
    return {"count": here.count, "recent": here.last(), "waiting": waiting, **more}


def test_ranks_that_are_well_are_left_alone() -> None:
    assert judge([], 30) is None
    assert judge([Seen(0, said("ab")), Seen(1, said("abc", GATHER), still_s=29)], 30) is None
    waits, works = Seen(0, said("abc", GATHER), still_s=100), Seen(1, said("ab"), still_s=20)
    assert judge([waits, works], 30) is None  # rank 1 got ahead 20 s ago: it may still come
    assert judge([waits, Seen(1, said("ab", busy="planning"), still_s=100)], 30) is None  # the others know that they wait
    assert judge([Seen(0, said("abc"), still_s=500), Seen(1, said("ab"), still_s=500)], 30) is None  # nobody waits
    ahead = [Seen(r, said("abc", GATHER, ahead=True), still_s=500) for r in range(2)]
    assert judge(ahead, 30) is None  # on CUDA: all stand still alike, such as on their data
    assert judge([Seen(0, said("abc", left=True), silent_s=900, gone=True), Seen(1, said("abc"))], 30) is None


def test_one_that_does_not_come_is_named_with_its_line_and_the_collective() -> None:
    waits = [Seen(r, said("abc", GATHER, op="all_gather_0, model.py:41"), still_s=31) for r in (0, 1, 3)]
    found = judge([*waits, Seen(2, said("ab", where="train.py:7  time.sleep(9)"), still_s=32)], 30)
    assert found is not None and (found.kind, found.rank) == ("stalled", 2)
    assert found.collective == f"{GATHER} (all_gather_0, model.py:41)" and "train.py:7" in found.where and "3 of 4" in found.why
    error = found.error()
    assert isinstance(error, StalledRankError) and error.rank == 2 and "timeout_s" in error.try_
    every = judge([Seen(r, said("abc", GATHER), still_s=31) for r in range(2)], 30)
    assert every is not None and every.kind == "stalled" and "nothing arrives" in every.why
    save = "a checkpoint: collect what is saved"
    apart = judge([Seen(0, said("abc", save), still_s=31), Seen(1, said("abcd", "d"), still_s=31)], 30)
    assert apart is not None and (apart.kind, apart.rank) == ("diverged", 1) and save in apart.what
    late = judge([waits[0], Seen(1, said("ab", busy="planning"), still_s=BUSY_S + 1)], 30)
    assert late is not None and late.rank == 1  # work of which one knows must end some time too


def test_one_at_work_is_waited_for_until_it_is_idle() -> None:
    waits = Seen(0, said("abc", GATHER), still_s=100)
    works, idle = (Seen(1, said("ab", where="eval.py:9") | {"idle_s": s}, still_s=100) for s in (2.0, 31.0))
    assert judge([waits, works], 30) is None
    assert "rank 1 is at work at eval.py:9" in awaited([waits, works], 30) and GATHER in awaited([waits, works], 30)
    found = judge([waits, idle], 30)
    assert found is not None and (found.kind, found.rank) == ("stalled", 1)
    forever = judge([waits, Seen(1, works.said, still_s=BUSY_S + 1)], 30)
    assert forever is not None and forever.kind == "stalled"
    assert not awaited([Seen(0, said("abc", GATHER), still_s=9), works], 30)


def test_work_shows_in_processor_time_and_files(tmp_path: Path) -> None:
    work = Work()
    time.sleep(0.7)
    assert work.idle_s() >= 0.6
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        sum(range(1000))
    assert work.idle_s() == 0.0


def test_one_that_runs_other_collectives_is_named_at_once() -> None:
    found = judge([Seen(0, said("abcd", "d")), Seen(1, said("abce", "e", where="train.py:9")), Seen(2, said("abcd", "d"))], 30)
    assert found is not None and (found.kind, found.rank) == ("diverged", 1)
    assert "collective 4 is e there, and d on rank 0" in found.what and found.collective == "d" and "train.py:9" in found.where
    assert isinstance(found.error(), DivergedRankError)
    long = "ab" * EVERY
    behind = [Seen(0, said(long + "a" * 300)), Seen(1, said("aa" + long[2:] + "a" * 500))]
    assert judge(behind, 30) is not None  # they were heard of at other moments: milestones are compared
    assert judge([Seen(0, said(long + "a" * 300)), Seen(1, said(long + "a" * 500))], 30) is None


def test_one_that_is_gone_or_silent_is_named() -> None:
    waits = Seen(0, said("abc", GATHER), still_s=3)
    found = judge([waits, Seen(1, said("ab"), gone=True)], 30)
    assert found is not None and (found.kind, found.rank, found.collective) == ("lost", 1, GATHER)
    assert isinstance(found.error(), LostRankError)
    silent = judge([waits, Seen(1, said("ab"), silent_s=31)], 30)
    assert silent is not None and "has not answered for 31 s" in silent.why
    over = judge([Seen(0, said("abc", GATHER), still_s=9), Seen(1, said("ab", left=True), silent_s=99)], 30)
    assert over is not None and over.rank == 1 and "program was over" in over.why


def test_every_verdict_is_an_error_that_crosses_ranks() -> None:
    kinds = {"failed": FailedRankError, "terminated": TerminatedError, "lost": LostRankError}
    for kind, error in kinds.items():
        verdict = Verdict(kind, 3, "rank 3 …", "train.py:1", "because", GATHER)
        assert Verdict(**verdict.json()) == verdict
        assert type(verdict.error()) is error and issubclass(error, RankError) and verdict.error().rank == 3


def test_progress_stops_where_a_verdict_is_known_and_costs_next_to_nothing() -> None:
    here = Progress()

    def stop() -> None:
        raise LostRankError("rank 1 died", rank=1)

    here.stop = stop
    with pytest.raises(LostRankError), here.wait(GATHER):
        pass
    here, mark, count = Progress(), mark_of(REDUCE), 20000
    start = time.thread_time()
    for _ in range(count):
        here.enter(REDUCE, mark)
    assert (time.thread_time() - start) / count < 2e-6  # 150 of them in a step of 50 ms: 0.6%; about 0.5 µs on a quiet machine
    assert len(here.last()) <= 32


def test_where_a_thread_is() -> None:
    import threading

    here = place_of(threading.get_ident())  # this line
    assert here.where.startswith("test_failures.py:") and "# this line" in here.where
    assert not here.op and not here.collective


def test_fingerprints_see_one_bit_and_no_difference_in_nan() -> None:
    x = torch.randn(5, 3)
    y, z = x.clone(), x.clone()
    y.view(torch.int32)[2, 1] ^= 1
    z[0, 0] = float("nan")
    tensors = [x, x.clone(), y, z, torch.tensor([True, False]), torch.ones(2, dtype=torch.complex64), x.bfloat16(), torch.ones(0)]
    found = fingerprints(tensors)
    assert found[0] == found[1] != found[2] and found[3] == NAN and found[4] == 1 and len(found) == len(tensors)


def test_a_timeout_that_is_none_is_refused(mesh: Any) -> None:
    from netmind_autopar.arguments import running_mesh
    from netmind_autopar.runtime.alike import compare_every

    with pytest.raises(InputError, match="no time to wait"):
        running_mesh(mesh, None, 0.0)
    with pytest.raises(InputError, match="check_every"):
        compare_every(torch.nn.Linear(1, 1), -1)  # type: ignore[arg-type]


def started(code: str, ranks: list[int], world: int, **env: str) -> list[subprocess.Popen]:
    """Some of the processes of a run, without a launcher."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-c", code]
    return [
        subprocess.Popen(command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for r in ranks
    ]


def ended(processes: list[subprocess.Popen], timeout_s: float = 150) -> list[str]:
    """What each wrote to stderr; AssertionError when one does not end."""
    try:
        return [p.communicate(timeout=timeout_s)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()


@pytest.mark.gloo
def test_who_does_not_come_at_the_start_is_named() -> None:
    code = "from netmind_autopar.runtime.join import join; join('gloo', timeout_s=4)"
    two, alone = started(code, [0, 1], 3), started(code, [1], 2)
    for text in ended(two):
        assert "MeshError: rank 2 of 3 did not come within 4 s" in text
    assert "MeshError: rank 0 cannot be reached at 127.0.0.1:" in ended(alone)[0]


TRAIN = """
import os, signal, sys, time, torch
from netmind_autopar import autoparallelize
FAULT, AT = os.environ["FAULT"], 6
rank = int(os.environ["RANK"])
torch.manual_seed(0)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
    def forward(self, x):
        return (self.down(self.up(x).relu()) - x).square().mean()
baseline = "ddp" if FAULT == "value" else "fsdp"  # values can differ where both ranks hold them
every = 2 * (FAULT in ("value", "batch"))
pm = autoparallelize(Net(), torch.zeros(8, 16), "dp=2", baseline=baseline, timeout_s=4, check_every=every)
optimizer = torch.optim.SGD(pm.parameters(), lr=0.1)
for step in range(4000):
    if rank == 1 and step == AT:
        if FAULT == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "stop": os.kill(os.getpid(), signal.SIGSTOP)
        if FAULT == "stall": time.sleep(600)
        if FAULT == "SIGTERM": os.kill(os.getpid(), signal.SIGTERM)
        if FAULT == "error": raise ValueError("bad record")
        if FAULT == "exit": sys.exit(0)
        if FAULT == "shape": pm(torch.zeros(4, 16))
        if FAULT == "value": next(b for b in pm.parameters() if b.dim() == 1)._local_tensor.view(torch.int32)[0] ^= 1
        until = time.monotonic() + 10 * (FAULT == "work")
        while time.monotonic() < until: sum(range(1000))
    if FAULT == "work" and step == AT + 3: break
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step + 1000 * rank * (FAULT == "batch" and step > AT)))
    pm(x).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
FAULTS = {  # what each of the two ranks raises; None: it cannot
    "kill": ("LostRankError: rank 1 died", None),
    "stop": ("LostRankError: rank 1 died while others wait in", None),
    "stall": ("StalledRankError: rank 1 did not come to", "StalledRankError: rank 1 did not come to"),
    "SIGTERM": ("TerminatedError: rank 1 was told to end (SIGTERM)", "TerminatedError: rank 1 was told to end (SIGTERM)"),
    "error": ("FailedRankError: rank 1 failed with ValueError: bad record", "ValueError: bad record"),
    "exit": ("LostRankError: rank 1 ended", ""),
    "shape": ("DivergedRankError: rank 1 runs another program", "DivergedRankError: rank 1 runs another program"),
    "value": ("DivergedRankError: up.bias is not the same on rank 1 as on rank 0", "DivergedRankError: up.bias is not the same on rank 1"),
    "batch": ("DivergedRankError: tensor 0 of the batch is not the same on rank 1", "DivergedRankError: tensor 0 of the batch"),
}


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_on_one_rank_is_a_typed_error_on_every_rank(fault: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    processes = started(f"exec(compile(open({str(script)!r}).read(), {str(script)!r}, 'exec'))", [0, 1], 2, FAULT=fault)
    if fault == "stop":
        first = ended(processes[:1])
        processes[1].kill()
        processes[1].wait()
        texts = [*first, ""]
    else:
        texts = ended(processes)
    for text, want in zip(texts, FAULTS[fault], strict=True):
        assert want is None or want in text, text[-1500:]
    if fault not in ("value", "batch"):
        assert "all-gather over dp" in texts[0] or "all-reduce over dp" in texts[0] or "reduce-scatter over dp" in texts[0], texts[0][
            -1500:
        ]


@pytest.mark.slow
@pytest.mark.gloo
def test_a_rank_at_work_between_steps_is_waited_for(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    processes = started(f"exec(compile(open({str(script)!r}).read(), {str(script)!r}, 'exec'))", [0, 1], 2, FAULT="work")
    texts = ended(processes)
    assert [p.returncode for p in processes] == [0, 0], texts
    assert "rank 1 is at work at train.py:" in texts[0]


@pytest.mark.slow
@pytest.mark.gloo
def test_a_plan_of_another_mesh_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    code = (
        "import os, torch\nfrom netmind_autopar import autoparallelize, plan\n"
        "m, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.zeros(4, 8)\n"
        "p = plan(m, x, 'dp=2' if os.environ['RANK'] == '0' else 'dp=4', cluster='cpu')\n"
        "autoparallelize(m, x, 'dp=2', plan=p)\n"
    )
    texts = ended(started(code, [0, 1], 2))
    assert all("PlanError: " in t and "the plan was made for the mesh" in t for t in texts), texts
    assert "PlanError: rank 1: " in texts[0] and issubclass(MeshError, Exception)
