"""Checkpoints of a training run in one folder: `save` and `load_latest`, on every rank alike."""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import Optimizer

from ..health.progress import HERE
from ..ir.errors import AutoparError, CheckpointError, DamagedError, InputError
from ..runtime.tensorfile import sync_folder
from .files import complete, open_folder, read_sections, remove, write_rank
from .manifest import Found, Index, Manifest, listed, problems
from .ranks import Ranks
from .state import Collected, Restoring, Run, collect
from .storage import Reading, Taking, load_planning, planned

GRACE_S = 20.0  # after SIGTERM, how long a checkpoint that is being written may take to become whole


@dataclass(frozen=True)
class Restored:
    """What was loaded. data, extra: the values saved as such. ranks, mesh, plan: of the run that saved. skipped: damage passed over."""

    step: int
    path: Path
    data: Any
    extra: Mapping[str, Any]
    ranks: int
    mesh: Mapping[str, int]
    plan: str | None
    skipped: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one training run in one folder, which every rank sees. All methods are called on all ranks alike.

    A checkpoint is whole or not there: it is written beside the others and renamed when all of it is on disk. It loads on any mesh, with
    any plan, on any number of ranks. keep_last: older ones are deleted once a newer one is whole; None keeps all. timeout_s: how long
    ranks wait for each other. Use it as a context manager, or call `close()`, so that the last save is waited for.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int | None = 3, timeout_s: float = 1800.0) -> None:
        if keep_last is not None and keep_last < 1:
            raise InputError(f"keep_last={keep_last} keeps nothing", try_="keep_last=1 or more, or None for all")
        self.folder = Path(folder).absolute()
        self.keep_last, self._timeout_s = keep_last, timeout_s
        self._known_ranks: Ranks | None = None
        self._job: _Job | None = None
        self._watching = False
        self._damaged: set[str] = set()
        atexit.register(_at_exit, weakref.ref(self))

    @property
    def _ranks(self) -> Ranks:
        if self._known_ranks is None:
            self._known_ranks = Ranks(self._timeout_s)
        return self._known_ranks

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        data: Any = None,
        extra: Mapping[str, Any] | None = None,
        rng: bool = True,
        asynchronous: bool = True,
    ) -> None:
        """Save the run as it is now. asynchronous: copy what this rank writes to host memory, and write while training goes on.

        optimizer, scheduler: one, or several by name. data: the position in the data, as a value or as an object with `state_dict()`.
        extra: more of either, by name. rng: also the generators of torch, numpy and Python.
        Waits for the save before it, and raises that one's error if it failed: CheckpointError, on every rank.
        """
        if type(step) is not int or step < 0:
            raise InputError(f"{step!r} is no step", try_="an integer, 0 or more")
        self.wait()
        self._watch()
        run = Run(model, optimizer, scheduler, data, extra, rng)
        try:
            job = self._begin(step, run, copy=asynchronous)
        except BaseException:
            self._unwatch()
            raise
        self._job = job
        if asynchronous:
            job.start()
        else:
            job.run()
            self.wait()

    def wait(self) -> None:
        """Until the save that is under way is on disk. Raises its error, once, on every rank."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            job.join()
        except BaseException:  # stopped while waiting: the save goes on, and `close` or the end of the program waits for it
            self._job = job
            raise
        self._unwatch()
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """As `wait`; call it at the end of the run."""
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif self._job is not None:  # the error under way is the one to show
            self._job.join(GRACE_S)

    def steps(self) -> list[int]:
        """The steps that were saved, the last one first, as the folder has them now."""
        return [found.step for found in listed(self.folder)]

    def load_latest(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        data: Any = None,
        extra: Mapping[str, Any] | None = None,
        rng: bool = True,
    ) -> Restored | None:
        """Load the last checkpoint that is whole into the objects given; None when there is none at all.

        A damaged one is named in a warning, and the one before it is taken. Objects that can are loaded with `load_state_dict`; data and
        extra also come back as values. Raises CheckpointError when none is whole, InputError when it is of another model.
        """
        self.wait()
        run = Run(model, optimizer, scheduler, data, extra, rng)
        found = self._ranks.zero("look for checkpoints", lambda: listed(self.folder))
        skipped: list[str] = []
        for candidate in found:
            try:
                return self._load(candidate, run, tuple(skipped))
            except DamagedError as e:
                self._damaged.add(candidate.path.name)
                skipped.append(f"{candidate.path.name}: {e.what}")
                if self._ranks.rank == 0:
                    warnings.warn(f"the checkpoint {candidate.path.name} is passed over: {e.what}", UserWarning, stacklevel=2)
        if not found:
            return None
        raise CheckpointError(
            f"none of the {len(found)} checkpoints is whole",
            where=str(self.folder),
            why="; ".join(skipped),
            try_="look at the disk, or start anew in another folder",
        )

    def load(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        data: Any = None,
        extra: Mapping[str, Any] | None = None,
        rng: bool = True,
    ) -> Restored:
        """As `load_latest`, the checkpoint of one step. Raises CheckpointError when it is not there, DamagedError when it is not whole."""
        self.wait()
        found = self._ranks.zero("look for checkpoints", lambda: listed(self.folder))
        for candidate in found:
            if candidate.step == step:
                return self._load(candidate, Run(model, optimizer, scheduler, data, extra, rng))
        have = ", ".join(str(f.step) for f in found) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step}", where=str(self.folder), try_=f"one of: {have}")

    def _begin(self, step: int, run: Run, *, copy: bool) -> _Job:
        """Everything that needs the live objects: afterwards training may go on."""
        ranks = self._ranks
        collected: list[Collected] = []
        digests = ranks.all("collect what is saved", lambda: collected.append(collect(run)) or collected[0].digests())
        mine = collected[0]
        if ranks.rank:
            mine.own({name for name, digest in digests[ranks.rank].items() if digest != digests[0][name]}, ranks.rank)
        staged = ranks.zero("begin a checkpoint", lambda: open_folder(self.folder, step, secrets.token_hex(4)))
        try:
            ranks.all("find the folder of the new checkpoint", lambda: _check_seen(staged))
            taking = Taking(copy=copy)
            table, planner = planned(mine.stored)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # DCP's word that there is one process
                act = {"storage_writer": taking, "planner": planner, "process_group": ranks.group, "no_dist": ranks.alone}
                ranks.planned("collect what is saved", lambda: dcp.save(table, **act))
        except BaseException:
            if ranks.rank == 0:
                remove(staged)
            raise
        return _Job(lambda: self._write(staged, step, run.model, mine, taking))

    def _write(self, staged: Path, step: int, model: nn.Module, mine: Collected, taking: Taking) -> None:
        """Files of all ranks, then the manifest, then the name. Nothing of the run is looked at but what was taken."""
        ranks = self._ranks
        try:
            files = ranks.all("write a checkpoint", lambda: write_rank(staged, ranks.rank, mine, taking))
            ranks.zero("write a checkpoint", lambda: complete(staged, step, files, taking.index, ranks.size, _about(model)))
        except BaseException:
            if ranks.rank == 0:
                remove(staged)
            raise
        if ranks.rank == 0 and self.keep_last is not None:
            self._prune(self.keep_last)

    def _prune(self, keep: int) -> None:
        """Delete all but the last `keep` checkpoints; those that were seen damaged do not count."""
        with suppress(AutoparError, OSError):  # another time
            kept = 0
            for found in listed(self.folder):
                if kept >= keep:
                    remove(found.path)
                elif found.path.name not in self._damaged:
                    kept += 1
            sync_folder(self.folder)

    def _load(self, found: Found, run: Run, skipped: tuple[str, ...] = ()) -> Restored:
        """All of the checkpoint is checked before anything of the run is touched."""
        ranks, path = self._ranks, found.path
        doing = f"load {path.name}"
        text = ranks.zero(doing, lambda: Manifest.read(path).dumps())
        manifest = Manifest.model_validate_json(text)
        wrong = [p for of_rank in ranks.all(doing, lambda: list(problems(path, manifest, (ranks.rank, ranks.size)))) for p in of_rank]
        if wrong:
            more = f"; and {len(wrong) - 1} more files" if len(wrong) > 1 else ""
            name, what = min(wrong)
            raise DamagedError(f"{name} is damaged: {what}{more}", where=str(path / name), try_="load an older checkpoint")
        ready: list[Restoring] = []

        def prepare() -> None:
            index = Index.read(path, manifest)
            ready.append(Restoring(run, read_sections(path, manifest, ranks.rank, ranks.size), index))

        ranks.all(doing, prepare)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act = {"storage_reader": Reading(path, ready[0].index), "planner": load_planning()}
            act |= {"process_group": ranks.group, "no_dist": ranks.alone}
            ranks.planned(doing, lambda: dcp.load(ready[0].targets, **act))
        values: list[dict[str, Any]] = []
        ranks.all(doing, lambda: values.append(ready[0].apply()))
        return Restored(manifest.step, path, values[0]["data"], values[0]["extra"], manifest.ranks, manifest.mesh, manifest.plan, skipped)

    def _watch(self) -> None:
        """While a checkpoint is being written, SIGTERM is an error in the main thread; a handler of the user's own stays as it is."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)
            self._watching = True

    def _unwatch(self) -> None:
        if self._watching and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._watching = False

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._watching = False
        if self._job is not None and self._job.done:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise CheckpointError(
            "SIGTERM arrived while a checkpoint was being written",
            why=f"older checkpoints are whole; the new one becomes so if that takes less than {GRACE_S:.0f} s",
            try_="start again with load_latest()",
        )


class _Job:
    """One save on its way to the disk."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.done = False

    def start(self) -> None:
        """In the background. The thread does not keep a process alive that is told to end."""
        self._thread = threading.Thread(target=self.run, name="netmind-autopar checkpoint", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Here and now; an error is kept."""
        assert self._act is not None
        HERE.saving += 1
        try:
            self._act()
        except BaseException as e:
            self.error = e
        self._act = None  # what was copied is free again
        HERE.saving -= 1
        self.done = True

    def join(self, timeout_s: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)


def _check_seen(staged: Path) -> None:
    if not staged.is_dir():
        raise CheckpointError(
            "the folder of the new checkpoint is not there on every rank",
            where=str(staged),
            why="all ranks write into one folder",
            try_="name a folder on a file system that all machines share",
        )


def _about(model: nn.Module) -> dict[str, Any]:
    plan = getattr(model, "plan", None)
    if plan is None or not hasattr(plan, "graph_hash"):
        return {}
    return {
        "plan": plan.hash(),
        "graph": plan.graph_hash,
        "mesh": dict(zip(plan.axis_names, plan.sizes, strict=True)),
        "text": plan.dumps(),
    }


def _at_exit(known: weakref.ref[Checkpoints]) -> None:
    """The end of a program that did not call `close`: wait for the last save, for a while, and say what became of it."""
    checkpoints = known()
    job = checkpoints._job if checkpoints is not None else None
    if job is None:
        return
    ending, start = getattr(sys, "last_value", None) is not None, time.monotonic()
    job.join(GRACE_S if ending else None)
    if not job.done:
        print(f"netmind-autopar: a checkpoint was not finished within {time.monotonic() - start:.0f} s and is dropped", file=sys.stderr)
    elif job.error is not None:
        print(job.error, file=sys.stderr)
