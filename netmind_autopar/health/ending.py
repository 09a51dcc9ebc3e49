"""How a rank ends: errors that reach the top, SIGTERM, a main thread that sits in a collective, and the last resort."""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ..ir.errors import AutoparError, RankError
from .frames import place_in, place_of
from .judge import Verdict
from .progress import HERE

if TYPE_CHECKING:
    from .watch import Watch

EXIT_CODE = 1


class Ending:
    """The hooks of one watch in this process: the handler of SIGTERM where the program has none, the hook for errors nobody caught."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.pid = watch, os.getpid()
        self.raised = False  # the error is on its way up in the main thread
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._handles, self._old_wakeup = False, -1
        self._cut = self._signalled = False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_term)
            self._handles = True
            self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            if self._old_wakeup != -1:  # somebody's event loop has it
                signal.set_wakeup_fd(self._old_wakeup, warn_on_full_buffer=False)
        self._old_hook, sys.excepthook = sys.excepthook, self._on_error
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=self._forked)

    def restore(self) -> None:
        """As it was before."""
        if sys.excepthook == self._on_error:
            sys.excepthook = self._old_hook
        atexit.unregister(self._at_exit)
        if self._handles and os.getpid() == self.pid and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) == self._on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._old_wakeup == -1:
                signal.set_wakeup_fd(-1)
            self._handles = False

    def wake(self) -> None:
        """End a `told_to_end` in another thread."""
        with suppress(OSError):
            self._write.send(b"\0")

    def told_to_end(self, wait_s: float) -> bool:
        """Whether SIGTERM arrived; waits so long at most. Works while the main thread sits in a collective."""
        with suppress(OSError, ValueError):
            if select.select([self._read], [], [], wait_s)[0]:
                return int(signal.SIGTERM) in self._read.recv(64)
        return False

    def press(self, verdict: Verdict, seconds: float) -> None:
        """End this process by steps, `seconds` after the verdict. Called again and again by the watching thread."""
        from .watch import GRACE_S, SAVING_S, WAKE_S, say

        if not self.raised and not self._signalled and self._handles:
            self._signalled = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        patience = SAVING_S if HERE.saving and verdict.kind != "lost" else WAKE_S
        if not self.raised and not self._cut and seconds > patience:
            self._cut = True
            cut_connections()
        if seconds > GRACE_S:
            at = place_of(self.watch.main)
            say(self.watch.error(verdict).render())
            say(f"netmind-autopar: rank {self.watch.rank} did not end by itself within {GRACE_S:.0f} s and is ended, at {at.where}")
            os._exit(EXIT_CODE)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid or self.watch._stopped.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.raised:
            return
        self.raised = True
        found = self.watch.verdict or self.watch.cause(1.5)
        if found is None:
            where = place_of(self.watch.main).where
            found = Verdict("terminated", self.watch.rank, f"rank {self.watch.rank} was told to end (SIGTERM)", where, "", HERE.waiting)
        raise self.watch.error(self.watch.tell(found))

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An error that nobody caught: the others hear of it before this process ends."""
        if os.getpid() != self.pid or self.watch._stopped.is_set():
            self._old_hook(kind, error, trace)
            return
        self.raised = True
        cause: BaseException | None = None
        with suppress(Exception):
            from .watch import explained

            cause = explained(error, HERE.waiting or "a collective of the program's own", sure=False)
        if isinstance(error, RankError):
            self.watch.tell(_verdict(error))
        elif isinstance(cause, RankError):  # of a collective that is not ours
            traceback.print_exception(kind, error, trace)
            kind, error, trace = type(cause), cause, None
        else:
            at = place_in(trace)
            text = error.what if isinstance(error, AutoparError) else (str(error).splitlines() or [""])[0][:300]
            why = "; ".join(t for t in (error.where, error.why) if t) if isinstance(error, AutoparError) else ""
            what = f"rank {self.watch.rank} failed with {kind.__name__}: {text}"
            self.watch.tell(Verdict("failed", self.watch.rank, what, at.where, why, HERE.waiting))
        self._old_hook(kind, error, trace)

    def _at_exit(self) -> None:
        if os.getpid() == self.pid and self.watch.verdict is None:  # else the thread sees to it that the process ends
            self.watch.stop()

    def _forked(self) -> None:
        """A child process, such as one that loads data, is no rank."""
        if self._handles:
            with suppress(ValueError, OSError):
                signal.set_wakeup_fd(-1)
                if signal.getsignal(signal.SIGTERM) == self._on_term:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
        HERE.stop = None


def _verdict(error: RankError) -> Verdict:
    kind = {"LostRankError": "lost", "StalledRankError": "stalled", "DivergedRankError": "diverged", "TerminatedError": "terminated"}
    return Verdict(kind.get(type(error).__name__, "failed"), error.rank, error.what, error.where, error.why, error.collective)


def cut_connections() -> int:
    """Wake a thread that waits in a collective: end this process's connections to other ranks, so that the wait fails; how many.

    gloo cannot be told to give up. Connections of the key-value store stay; NCCL is told to abort. The process is on its way out.
    """
    import torch.distributed as dist

    world: Any = getattr(dist.group, "WORLD", None)
    keep: set[int] = set()
    if world is not None:
        with suppress(Exception):
            world.abort()
        with suppress(Exception):
            store = world.get_group_store()
            while hasattr(store, "underlying_store"):
                store = store.underlying_store
            keep.add(store.port)
    folder, count = next((f for f in ("/proc/self/fd", "/dev/fd") if os.path.isdir(f)), None), 0
    for fd in map(int, os.listdir(folder)) if folder else ():
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                ends = {one.getsockname()[1], one.getpeername()[1]}
                if not ends & keep:
                    one.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count
