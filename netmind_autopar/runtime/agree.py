"""Ranks that must not disagree: one rank decides, all get its answer or its error, nobody is left waiting.

They talk over a gloo group of their own, so that a rank which plans while another trains never meets the collectives of training:
the watch then names both.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ..health.judge import BUSY_S
from ..health.progress import HERE
from ..health.watch import explained
from ..ir import errors
from ..ir.errors import AutoparError, MeshError

_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of each default group, ours


def from_rank_zero(make: Callable[[], str], doing: str = "planning") -> str:
    """Run `make` on rank 0 and give its text to every rank. An error of rank 0 is raised on every rank."""
    if _alone():
        return make()
    box = [_tried(make, doing)[:6] if dist.get_rank() == 0 else None]
    collective(f"the result of {doing}", lambda: dist.broadcast_object_list(box, src=0, group=_group()))
    kind, *slots = box[0]  # type: ignore[misc]
    if kind == "error":
        raise _error(slots)
    return slots[0]


def all_alike(what: str, text: str, *, why: str, try_: str) -> None:
    """Raise MeshError on every rank unless all ranks give the same `text`."""
    if _alone():
        return
    found = exchange(f"the comparison of {what}", text)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise MeshError(
            f"{what} differs between ranks", where=f"rank 0 has {found[0]}, rank {odd[0]} has {found[odd[0]]}", why=why, try_=try_
        )


def together(make: Callable[[], object], doing: str = "making ready") -> object:
    """Run `make` on every rank; when any rank fails, every rank raises an error that names the first that did."""
    if _alone():
        return make()
    result: list[object] = []
    mine = _tried(lambda: result.append(make()), doing)
    found = exchange(f"the results of {doing}", mine)
    if mine[0] == "error":
        raise mine[6]
    for rank, other in enumerate(found):
        if other[0] == "error":
            raise _error([other[1], f"rank {rank}: {other[2]}", *other[3:]])
    return result[0]


def exchange(name: str, mine: Any) -> list[Any]:
    """What every rank gives, in order of ranks. name: of this meeting, the same on all. Raises RankError when a rank is in trouble."""
    found: list[Any] = [None] * dist.get_world_size()
    given = mine[:6] if isinstance(mine, tuple) else mine  # an exception itself stays here
    collective(name, lambda: dist.all_gather_object(found, given, group=_group()))
    return found


def collective(name: str, act: Callable[[], object]) -> None:
    """A collective of torch.distributed, under a name that is the same on all ranks. Raises RankError when a rank is in trouble."""
    with HERE.wait(name):
        try:
            act()
        except (RuntimeError, ValueError) as e:
            raise explained(e, name) from None


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _group() -> Any:
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=BUSY_S))
    return _groups[world]


def _tried(make: Callable[[], Any], doing: str) -> tuple:
    """("ok", result) or ("error", class, what, where, why, try, the error itself)."""
    try:
        with HERE.doing(doing):
            return "ok", make()
    except AutoparError as e:
        return "error", type(e).__name__, e.what, e.where, e.why, e.try_, e
    except Exception as e:
        error = AutoparError(f"{type(e).__name__}: {e}", why="an internal error", try_="set AUTOPAR_DEBUG=1 for the traceback")
        error.__cause__ = e
        return "error", "AutoparError", error.what, "", error.why, error.try_, error


def _error(slots: Sequence[str]) -> AutoparError:
    name, what, where, why, hint = slots
    return getattr(errors, name, AutoparError)(what, where=where, why=why, try_=hint)
