"""Which parameters' optimizer state waits between steps elsewhere, as a plan says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..ir.errors import PlanError
from ..ir.plan import Entry
from ..ir.program import Program
from .problem import Node

OPTIMIZER = "optimizer"


def parked(program: Program, entries: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """The placeholders of parameters whose optimizer state waits elsewhere, and the tier: "host" or "disk".

    entries: as in `Plan.state`; the first one that names a parameter counts. names: the class of every node (`fold.classes`). Raises
    PlanError for entries that name no parameter that is trained.
    """
    if not entries:
        return {}
    wanted = {o.name for o in program.outputs if o.role == "grad"}
    members: dict[str, list[str]] = {}
    trained: set[str] = set()
    for item in program.inputs:
        if item.role == "param":
            members.setdefault(names[item.node], []).append(item.node)
            trained |= {names[item.node]} if item.name in wanted else set()
    out: dict[str, str] = {}
    for text in entries:
        entry = Entry.parse(text, OPTIMIZER)
        if entry.name not in trained:
            raise PlanError(f"{text!r} names no parameter that is trained", where=f"state: {text}", try_="undo the edit, or plan again")
        for node in entry.of(members[entry.name]):
            out.setdefault(node, entry.tier)
    return out


def with_state(node: Node, trained: Sequence[str], members: int, each: np.ndarray, tiers: Mapping[str, str]) -> Node:
    """The node of a class of parameters with its optimizer state told apart, parked as `tiers` says.

    trained: those of the class's `members` that have state, `each` bytes of it per strategy. A class that is trained in part is parked as
    a whole or not at all.
    """
    if not each.any():
        return node
    where = [tiers.get(member) for member in trained]
    if len(trained) < members:
        each, where = each * len(trained), where[:1]
    return replace(node, state=each, here=len(where)).park(where.count("host"), where.count("disk"))
