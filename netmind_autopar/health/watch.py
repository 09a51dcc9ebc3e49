"""A thread on every rank that tells the others what this one is doing, and ends it when one of them is in trouble.

Once a second each rank writes a record (`peers.py`); rank 0 reads all of them and judges (`judge.py`), every rank reads rank 0's and the
verdict. Whether a process of the same machine is there, every rank asks the system. So a store takes two small messages a second and
rank, of any number of ranks. What training pays is `progress.py`.

A verdict ends this rank in steps: the main thread, if it runs Python, gets the error by a signal; one that waits in a collective is
woken by cutting the process group's connections; and a process that is still there `GRACE_S` later prints the error and ends.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ..ir.errors import RankError
from .ending import Ending
from .frames import place_of
from .judge import Verdict, awaited, judge, lost
from .peers import Peers
from .progress import HERE
from .work import Work

BEAT_S = 1.0
STILL_S = 0.9  # without progress, after which a rank looks where it is
EXPLAIN_S = 6.0  # how long a failed collective waits for a word about its cause
WAKE_S = 1.0  # after a verdict, how long the main thread may take to come by
SAVING_S = 12.0  # and how long a checkpoint on its way to the disk may take before connections are cut
GRACE_S = 22.0  # after a verdict the process ends, come what may
BROKEN = re.compile(r"connection|socket|broken pipe|reset by|closed|timed? ?out|peer|nccl|abort|gloo", re.IGNORECASE)
_starts = itertools.count()
_now: Watch | None = None


def start(timeout_s: float, device: str = "cpu") -> None:
    """Begin to watch over the ranks of the default group; on all ranks alike. Again: only the timeout changes."""
    global _now
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if _now is not None and _now.of(dist.group.WORLD):
        _now.timeout_s = timeout_s
        return
    if _now is not None:
        _now.stop()
    _now = Watch(dist.group.WORLD, timeout_s, device)


def stop() -> None:
    """End watching, on this rank."""
    global _now
    if _now is not None:
        _now.stop()
        _now = None


def explained(error: BaseException, collective: str, *, sure: bool = True) -> BaseException:
    """The typed error for an exception of a collective: which rank is the cause. The exception itself when it is about something else.

    sure: it came out of a collective; otherwise it is explained only by a rank that is known to be in trouble.
    """
    if _now is None or not isinstance(error, RuntimeError) or not BROKEN.search(str(error)):
        return error
    return _now.explain(error, collective, sure)


def word(wait_s: float) -> str:
    """What is known about a rank in trouble, in words, waiting so long for it; for whoever talks to ranks over a group of its own."""
    found = _now.cause(wait_s) if _now is not None else None
    return "" if found is None else found.what + (f" ({found.why})" if found.why else "")


class Watch:
    """Watches from one rank. Made in the thread that trains."""

    def __init__(self, world: Any, timeout_s: float, device: str) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout_s, self._cuda = timeout_s, device == "cuda"
        self._world = weakref.ref(world)
        prefix = f"netmind-autopar/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_starts)}"
        store = world.get_group_store()
        self.peers = Peers(store.clone(), prefix, self.rank, self.size)
        self._mine = Peers(store.clone(), prefix, self.rank, self.size)  # for the thread that trains
        self.main = threading.get_ident()
        self.verdict: Verdict | None = None
        self._since = 0.0  # when the verdict came
        self._still = (("", 0), 0.0)
        self._last_look = False
        self._work, self._told = Work(), ""
        self._stopped = threading.Event()
        self.peers.say(self._saying())
        self.ending = Ending(self)
        HERE.stop = None
        self._thread = threading.Thread(target=self._run, name="netmind-autopar watch", daemon=True)
        self._thread.start()

    def of(self, world: Any) -> bool:
        return self._world() is world and not self._stopped.is_set()

    def stop(self) -> None:
        """This rank's program is over, or its process group."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self.ending.restore()
        self.ending.wake()
        self._thread.join(2.0)
        HERE.stop = None
        with suppress(Exception):
            self._mine.beat = self.peers.beat
            self._mine.say({**self._saying(), "left": True})

    def tell(self, verdict: Verdict) -> Verdict:
        """Make a verdict known to all, from the thread that trains; the one that counts."""
        with suppress(Exception):  # the store is gone: everyone finds out
            verdict = self._mine.pronounce(verdict)
        self._hear(verdict)
        return verdict

    def error(self, verdict: Verdict) -> RankError:
        """The typed error as this rank raises it: with the collective that it is in, where the verdict names none."""
        if verdict.collective or verdict.rank == self.rank or not (HERE.waiting or HERE.recent):
            return verdict.error()
        op = place_of(self.main).op
        here = (HERE.waiting or f"behind {HERE.recent[-1][2]}") + (f" ({op})" if op else "")
        where = "; ".join(t for t in (verdict.where, f"rank {self.rank} is {'in ' * bool(HERE.waiting)}{here}") if t)
        return replace(verdict, where=where, collective=here).error()

    def explain(self, error: BaseException, collective: str, sure: bool) -> BaseException:
        """Called where a collective failed: wait a little for a word about the cause, and look for it."""
        self.ending.raised = True  # from here on the main thread is on its way out
        until = time.monotonic() + EXPLAIN_S
        here = place_of(self.main)
        named = collective + (f" ({here.op})" if here.op else "")
        while time.monotonic() < until:
            found = self.verdict or self._cause(named)
            if found is not None:
                return self.error(self.tell(found))
            time.sleep(0.1)
        if not sure:
            return error
        text = (str(error).splitlines() or [""])[0][:300]
        others = [s.rank for s in self._mine.seen() if s.silent_s > 2 * BEAT_S + EXPLAIN_S / 2 and s.rank != self.rank]
        rank = others[0] if others else -1
        what = f"{f'rank {rank}' if others else 'another rank'} broke off in {named}"
        return self.error(self.tell(Verdict("lost", rank, what, here.where, text, named)))

    def _cause(self, collective: str) -> Verdict | None:
        """What this rank itself can find out about a broken connection."""
        during = f" while others are in {collective}" if collective else ""
        with suppress(Exception):
            known = self._mine.verdict()
            if known is not None:
                return known
            ranks = self._mine.look(list(range(self.size)))
            for s in ranks:
                if s.left and s.rank != self.rank:
                    what = f"rank {s.rank} ended{during}"
                    return Verdict("lost", s.rank, what, s.said.get("where", ""), "its program was over", collective)
        for rank in self._mine.gone():
            found = lost(rank, [s for s in self._mine.seen() if s.rank == rank], "its process is gone")
            return Verdict(found.kind, rank, f"rank {rank} died{during}", found.where, found.why, collective)
        return None

    def cause(self, wait_s: float) -> Verdict | None:
        """Why this process might be told to end: what is wrong with another rank, if that comes out within `wait_s`."""
        until = time.monotonic() + wait_s
        while True:
            found = self.verdict or self._cause(HERE.waiting)
            if found is not None or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._beat()
            except Exception:  # the store is gone with its process: a collective will fail, and `explain` says why
                self._alone()
            if self.verdict is not None:
                self.ending.press(self.verdict, time.monotonic() - self._since)
            if self._world() is not getattr(dist.group, "WORLD", None) or not dist.is_initialized():
                self._over()
                return
            pause = 0.1 if self.verdict else max(0.05, BEAT_S - (time.monotonic() - began))
            if self.ending.told_to_end(pause) and self.verdict is None:
                self._terminated()

    def _beat(self) -> None:
        self.peers.say(self._saying())
        found = self.peers.verdict()
        if found is None:
            ranks = self.peers.look(list(range(self.size)) if self.rank == 0 else [0, self.rank])
            found = judge(ranks, self.timeout_s) if self.rank == 0 else self._over_zero(ranks[0])
            if self.rank == 0 and found is None and (text := awaited(ranks, self.timeout_s)) and text != self._told:
                self._told = text
                say(f"netmind-autopar: {text}")
            if found is None and self.rank:
                self.peers.meet(_neighbours(self.rank, self.size))
                gone = [r for r in self.peers.gone() if not self.peers._said.get(r, {}).get("left")]
                found = lost(gone[0], ranks, "its process is gone") if gone else None
            if found is not None and found.kind == "lost" and not self._last_look:
                self._last_look = True  # a rank may have said why it ends right before it did: look once more
                return
            self._last_look = False
            found = self.peers.pronounce(found) if found is not None else None
        if found is not None:
            self._hear(found)

    def _over_zero(self, zero: Any) -> Verdict | None:
        """Rank 0 watches over the others, and they over it."""
        return judge([zero], self.timeout_s) if zero.gone or zero.silent_s > self.timeout_s else None

    def _alone(self) -> None:
        """Nothing can be read: end only when a collective does not come back."""
        place, since = self._still
        if place[0] and time.monotonic() - since > self.timeout_s and self.verdict is None:
            kept = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            rank = -1 if kept == "the launcher" else 0
            self._saying()
            self._hear(Verdict("lost", rank, f"{kept} is gone, which kept the store of the run", "", "nothing is heard of it", place[0]))

    def _hear(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict, self._since = verdict, time.monotonic()
            HERE.stop = self._raise

    def _raise(self) -> None:
        HERE.stop = None
        self.ending.raised = True
        assert self.verdict is not None
        raise self.error(self.verdict)

    def _terminated(self) -> None:
        """SIGTERM while the main thread may be unable to look at it."""
        found = self.cause(1.5)
        if self.verdict is None:
            at = place_of(self.main)
            mine = Verdict("terminated", self.rank, f"rank {self.rank} was told to end (SIGTERM)", at.where, "", HERE.waiting)
            with suppress(Exception):
                found = self.peers.pronounce(found or mine)
            self._hear(found or mine)

    def _over(self) -> None:
        """The process group is gone; whoever made it ended it."""
        self._stopped.set()
        with suppress(Exception):
            self.peers.say({**self._saying(), "left": True})

    def _saying(self) -> dict[str, Any]:
        """What this rank is doing. Where it is is looked up when it stands still."""
        waiting, busy = HERE.waiting, HERE.busy
        said: dict[str, Any] = {"count": HERE.count, "recent": HERE.last(), "waiting": waiting, "busy": busy}
        said["idle_s"] = self._work.idle_s()
        now = time.monotonic()
        if self._still[0] != (waiting, HERE.count):
            self._still = ((waiting, HERE.count), now)
        if now - self._still[1] > STILL_S or self.verdict is not None:
            at = place_of(self.main)
            said |= {"where": at.where, "op": at.op, "busy": busy or ("compiling" if at.compiling else "")}
            said["waiting"] = waiting or at.collective
            if self._cuda and not said["waiting"] and not said["busy"] and HERE.recent:  # the host runs ahead of what travels there:
                said |= {"waiting": HERE.recent[-1][2], "ahead": True}  # where it stands still, it may wait for the last collective
        return said


def _neighbours(rank: int, size: int) -> list[int]:
    """Ranks that may run on the same machine."""
    at, count = (int(os.environ.get(name, "-1")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if at >= 0 and count > 0:
        return [r for r in range(rank - at, rank - at + count) if 0 <= r < size]
    return list(range(size)) if size <= 64 else [0]


def say(text: str) -> None:
    """A line on stderr, all at once, so that those of several ranks do not mix."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), (text + "\n").encode())
