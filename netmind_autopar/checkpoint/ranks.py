"""What all ranks of a run do together: a rank's trouble is everybody's typed error, and nobody waits for a rank that is gone."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..health.progress import HERE
from ..health.watch import word
from ..ir import errors
from ..ir.errors import AutoparError, CheckpointError

T = TypeVar("T")
KNOWN_S = 2.0  # how long one waits for a word about who is gone
OUTSIDE = {
    "ENOSPC": "free some space, or name a folder on another disk",
    "EDQUOT": "the quota is used up: free some space, or name another folder",
    "EFBIG": "the limit on the size of a file is reached: raise it (ulimit -f)",
    "EROFS": "name a folder that can be written",
    "EACCES": "name a folder that can be written",
    "EPERM": "name a folder that can be written",
}


class Ranks:
    """All processes, over a gloo group of their own, so that saving in the background never meets the collectives of training.

    timeout_s: how long one waits for the others. Make it on every rank alike.
    """

    def __init__(self, timeout_s: float) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        try:
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)) if together else None
        except RuntimeError as e:
            raise self._lost("reach the other processes", e) from None

    @property
    def alone(self) -> bool:
        return self.group is None

    def all(self, doing: str, make: Callable[[], T], *, named: bool = True) -> list[T]:
        """`make` on every rank and what it gave on each, in order. When it fails on any rank, every rank raises the first rank's error.

        doing: "write the checkpoint", for errors, which name the rank if `named`.
        """
        mine: Any
        try:
            mine = ("ok", make())
        except Exception as e:
            mine = ("error", *_slots(_typed(e, doing)))
        found = self._gathered(doing, mine)
        for rank, answer in enumerate(found):
            if answer[0] == "error":
                raise _error(answer[1:], f"rank {rank}: " if named and not self.alone else "")
        return [answer[1] for answer in found]

    def zero(self, doing: str, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; its error likewise."""
        return self.all(doing, lambda: make() if self.rank == 0 else None, named=False)[0]  # type: ignore[return-value]

    def planned(self, doing: str, act: Callable[[], Any]) -> None:
        """A call of torch.distributed.checkpoint, with its errors as ours."""
        try:
            act()
        except CheckpointException as e:
            rank, (error, _) = next(iter(sorted(e.failures.items())))
            raise _error(_slots(_typed(error, doing)), "" if self.alone else f"rank {rank}: ") from None
        except AutoparError:
            raise
        except OSError as e:
            raise _typed(e, doing) from None
        except RuntimeError as e:
            raise self._lost(doing, e) from None

    def _gathered(self, doing: str, mine: Any) -> list[Any]:
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * self.size
        trains = threading.current_thread() is threading.main_thread()  # the thread that saves is not what others wait for
        try:
            if trains:
                HERE.waiting = f"a checkpoint: {doing}"
            dist.all_gather_object(found, mine, group=self.group)
        except (RuntimeError, ValueError) as e:  # ValueError: the process group is gone
            raise self._lost(doing, e) from None
        finally:
            if trains:
                HERE.waiting = ""
        return found

    def _lost(self, doing: str, e: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot {doing}: {word(KNOWN_S) or 'another process is gone or does not answer'}",
            where=f"rank {self.rank}",
            why=str(e).splitlines()[0][:200] if str(e) else type(e).__name__,
            try_="look at what the other processes said; start again from the newest checkpoint",
        )


def _typed(e: BaseException, doing: str) -> AutoparError:
    """Any error as one of ours."""
    if isinstance(e, AutoparError):
        return e
    if isinstance(e, OSError):
        import errno

        code = errno.errorcode.get(e.errno or 0, "")
        where = str(e.filename) if e.filename else ""
        return CheckpointError(
            f"cannot {doing}", where=where, why=e.strerror or str(e), try_=OUTSIDE.get(code, "look at the folder and its disk")
        )
    return CheckpointError(f"cannot {doing}: {type(e).__name__}: {str(e)[:300]}", why="an error that was not foreseen", try_="report it")


def _slots(e: AutoparError) -> tuple[str, str, str, str, str]:
    return type(e).__name__, e.what, e.where, e.why, e.try_


def _error(slots: tuple[str, ...], prefix: str) -> AutoparError:
    name, what, where, why, hint = slots
    return getattr(errors, name, AutoparError)(prefix + what, where=where, why=why, try_=hint)
