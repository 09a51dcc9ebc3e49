"""Which parameters' optimizer state waits between steps elsewhere, and which parameters do so themselves, as a plan says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..ir.errors import PlanError
from ..ir.plan import Entry
from ..ir.program import Program
from .problem import Node

OPTIMIZER, PARAM = "optimizer", "param"


def parked(program: Program, entries: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """The placeholders of parameters whose optimizer state waits elsewhere, and the tier: "host" or "disk".

    entries: as in `Plan.state`; the first one that names a parameter counts. names: the class of every node (`fold.classes`). That of
    `stowed` parameters is left out. Raises PlanError for entries that name no parameter that is trained.
    """
    gone = stowed(program, entries, names)
    entries = [text for text in entries if Entry.parse(text, OPTIMIZER, PARAM).what == OPTIMIZER]
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
            if node not in gone:
                out.setdefault(node, entry.tier)
    return out


def stowed(program: Program, entries: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """The placeholders of parameters that wait elsewhere, with gradient and optimizer state, and the tier. Arguments as of `parked`.

    Raises PlanError for entries that name no parameter, for parameters that cannot leave, and for programs in micro-batches.
    """
    found = [(text, entry) for text in entries if (entry := Entry.parse(text, OPTIMIZER, PARAM)).what == PARAM]
    if not found:
        return {}
    members: dict[str, list[str]] = {}
    for item in program.inputs:
        if item.role == "param":
            members.setdefault(names[item.node], []).append(item.node)
    given = {node.name for end in program.graph.nodes if end.op == "output" for node in end.all_input_nodes}
    out: dict[str, str] = {}
    for text, entry in found:
        if entry.name not in members:
            raise PlanError(f"{text!r} names no parameter", where=f"state: {text}", try_="undo the edit, or plan again")
        for node in entry.of(members[entry.name]):
            if why := stays(program.turns, node in given):
                raise PlanError(f"{node} cannot wait elsewhere", where=f"state: {text}", why=why, try_="drop the entry")
            out.setdefault(node, entry.tier)
    return out


def stays(turns: int, result: bool) -> str:
    """Why a parameter cannot wait elsewhere, of a program in so many micro-batches, or when it is a result as it is; "" when it can."""
    if turns > 1:
        return "gradients of micro-batches are added up on the device"
    return "the model returns it as it is" if result else ""


def with_places(
    node: Node,
    members: Sequence[str],
    trained: Sequence[str],
    size: np.ndarray,
    states: int,
    tiers: Mapping[str, str],
    gone: Mapping[str, str],
) -> Node:
    """The node of a class of parameters, told apart what of it may wait elsewhere, and where it does.

    size: bytes of one per strategy. states: of those in `trained`, tensors of optimizer state. tiers: whose state is parked. gone: which
    parameters are stowed.
    """
    node = with_state(node, trained, len(members), states * size, tiers) if trained else node
    where = [gone[member] for member in members if member in gone]
    host, disk = where.count("host"), where.count("disk")
    if len(trained) in (0, len(members)):
        return replace(node, size=size, trained=bool(trained), count=len(members)).stow(host, disk)
    bare = replace(node, size=size if where else None, trained=True, count=len(members), state=None).stow(host, disk)
    return replace(bare, state=node.state, here=node.here)  # trained in part: its state is counted as if it stayed


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
