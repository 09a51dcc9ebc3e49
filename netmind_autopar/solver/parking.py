"""Which parameters' optimizer state waits between steps elsewhere, as a plan says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.errors import PlanError
from ..ir.plan import Entry
from ..ir.program import Program

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
