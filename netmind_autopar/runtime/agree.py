"""Ranks that must not disagree: one rank decides, all get its answer or its error, nobody is left waiting."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from ..ir import errors
from ..ir.errors import AutoparError, MeshError


def from_rank_zero(make: Callable[[], str]) -> str:
    """Run `make` on rank 0 and give its text to every rank. An error of rank 0 is raised on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    box: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = ("ok", make())
        except AutoparError as e:
            box[0] = ("error", type(e).__name__, e.what, e.where, e.why, e.try_)
        except Exception as e:
            box[0] = (
                "error",
                "AutoparError",
                f"{type(e).__name__}: {e}",
                "",
                "an internal error on rank 0",
                "report it with AUTOPAR_DEBUG=1",
            )
    dist.broadcast_object_list(box, src=0)
    return _answer(box[0])


def all_alike(what: str, text: str, *, why: str, try_: str) -> None:
    """Raise MeshError on every rank unless all ranks give the same `text`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise MeshError(
            f"{what} differs between ranks", where=f"rank 0 has {found[0]}, rank {odd[0]} has {found[odd[0]]}", why=why, try_=try_
        )


def together(make: Callable[[], object]) -> object:
    """Run `make` on every rank; when any rank fails, every rank raises an error that names the first that did."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    mine: AutoparError | None = None
    result: object = None
    try:
        result = make()
    except AutoparError as e:
        mine = e
    except Exception as e:
        mine = AutoparError(f"{type(e).__name__}: {e}", why="an internal error", try_="set AUTOPAR_DEBUG=1 for the traceback")
        mine.__cause__ = e
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if mine is None else ("error", type(mine).__name__, mine.what, mine.where, mine.why, mine.try_))
    if mine is not None:
        raise mine
    for rank, other in enumerate(found):
        if other is not None:
            kind, name, what, where, why, hint = other  # type: ignore[misc]
            _answer((kind, name, f"rank {rank}: {what}", where, why, hint))
    return result


def _answer(box: object) -> str:
    kind, *rest = box  # type: ignore[misc]
    if kind == "ok":
        return rest[0]
    name, what, where, why, hint = rest
    raise getattr(errors, name, AutoparError)(what, where=where, why=why, try_=hint)
