"""Recomputation: ops of forward that run once more in backward, so that nothing of theirs is kept in between.

A twin stands just before the first op of backward that needs it, as late as possible. It takes what its original took; where that
is recomputed too, its twin. So a run of chosen ops is replayed from what is still kept at its borders. Random numbers need no care:
they are functions of a seed, which is an input of the program, and of counters, which are arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..costs.compute import FREE, short_name
from ..ir.errors import PlanError
from ..ir.plan import Entry
from ..ir.program import Draft, Program, is_getitem, source, tensor_args, values
from ..rules.algebra import Rule
from .conversions import value_name

OWN = ("aten", "prims", "autopar")  # ops whose numbers are known to follow from their arguments alone, unless tagged otherwise


def replay(
    program: Program, entries: Sequence[str], names: Mapping[str, str], more: Collection[str] = ()
) -> tuple[Program, dict[str, str]]:
    """The program with `<name>_again` in backward for every chosen op, and {twin: original}.

    entries: as in `Plan.recompute`. names: the class of every node (`fold.classes`). more: other ops to choose. An op that nothing in
    backward needs gets no twin. Users in forward and the results of the program keep the original; one that loses its last user stays
    (see `without_dead`). Raises PlanError for entries that name no op of forward, and for ops that give something else when they run
    again.
    """
    chosen = chosen_ops(program, entries, names) | set(more)
    if not chosen:
        return program, {}
    with program.edit() as new:
        twins = _Replay(new, chosen).run()
    return new.program, twins


@dataclass(frozen=True)
class Rewritten:
    """The program that a plan runs, with rules and classes of every op in it. twins: twin -> original."""

    program: Program
    rules: dict[str, Rule]
    names: dict[str, str]
    twins: Mapping[str, str]


def rewritten(
    program: Program, rules: Mapping[str, Rule], names: Mapping[str, str], entries: Sequence[str], stowed: Collection[str] = ()
) -> Rewritten:
    """What pricing and lowering both look at: ops that run again stand in backward, those that run only there in backward alone.

    stowed: placeholders of parameters that wait elsewhere; views of them are taken again, so that none holds them meanwhile.
    """
    changed, twins = replay(program, entries, names, views_of(program, stowed))
    more = {twin: rules[old] for twin, old in twins.items()}
    known = {twin: names[old] for twin, old in twins.items()}
    return Rewritten(without_dead(changed, twins.values()), {**rules, **more}, {**names, **known}, twins)


def chosen_ops(program: Program, entries: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """The ops that `Plan.recompute` names. Raises PlanError as `replay` does."""
    members: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.name in names and node.op != "output" and "again" not in node.meta:
            members.setdefault(names[node.name], []).append(node)
    out: set[str] = set()
    for text in entries:
        entry = Entry.parse(text)
        found = members.get(entry.name)
        if found is None or entry.tier != "host":
            raise PlanError(f"{text!r} names no op", where=f"recompute: {text}", try_="undo the edit, or plan again")
        for node in entry.of(found):
            if why := refusal(node):
                raise PlanError(f"{node.name} cannot be recomputed", where=f"recompute: {text}", why=why, try_="drop the entry")
            out.add(node.name)
    return out


def refusal(node: fx.Node) -> str:
    """Why an op of a captured program cannot be recomputed; "" when it can."""
    if node.op != "call_function" or is_getitem(node):
        return "it is given, not computed"
    if node.meta.get("phase") == "backward":
        return "it runs in backward anyway"
    if not isinstance(node.target, torch._ops.OpOverload):
        return "it is no op of ATen"
    if node.target._schema.is_mutable:
        return "it writes into its arguments"
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return "it draws random numbers from a generator, which has moved on by then"
    if node.target.namespace not in OWN:
        return "it is an op of another library, and nothing says that it gives the same twice"
    return ""


class _Replay:
    def __init__(self, new: Draft, chosen: set[str]) -> None:
        self.new = new
        self.order = list(new.graph.nodes)
        self.chosen = [n for n in self.order if n.name in chosen]
        self.again: dict[fx.Node, fx.Node] = {}  # ops and their getitems

    def run(self) -> dict[str, str]:
        at = self._first_needs()
        for node in self.chosen:
            if node in at:
                self._twin(node, self.order[at[node]])
        for old, twin in self.again.items():
            if old.op == "call_function":
                self._hand_over(old, twin)
        for node in reversed([*self.again, *self.again.values()]):
            if is_getitem(node) and not node.users:
                self.new.graph.erase_node(node)
        return {twin.name: old.name for old, twin in self.again.items() if not is_getitem(old)}

    def _first_needs(self) -> dict[fx.Node, int]:
        """Of every op that needs a twin the position of the op of backward that needs it first, itself or through other twins."""
        position = {node: i for i, node in enumerate(self.order)}
        chosen, out = set(self.chosen), dict[fx.Node, int]()
        for node in reversed(self.chosen):
            wanted = [out[u] if u in out else position[u] for u in takers(node) if u in out or (u not in chosen and is_late(u))]
            if wanted:
                out[node] = min(wanted)
        return out

    def _twin(self, node: fx.Node, anchor: fx.Node) -> None:
        with self.new.graph.inserting_before(anchor):
            for old in (node, *(u for u in node.users if is_getitem(u))):
                args, kwargs = fx.node.map_arg((old.args, old.kwargs), lambda n: self.again.get(n, n))
                twin = self.new.graph.create_node("call_function", old.target, args, kwargs, name=f"{old.name}_again")
                twin.meta = {**old.meta, "phase": "backward", "again": old.name}
                self.again[old] = twin

    def _hand_over(self, old: fx.Node, twin: fx.Node) -> None:
        for user in list(old.users):
            if is_late(user) and user is not twin and not is_getitem(user):
                user.replace_input_with(old, twin)


def views_of(program: Program, given: Collection[str]) -> set[str]:
    """The ops of forward that only view these placeholders, or view such views."""
    seen, out = set(given), set[str]()
    for node in program.graph.nodes if seen else ():
        args = [source(arg)[0] for arg in tensor_args(node)] if node.op == "call_function" and not is_getitem(node) else []
        if args and short_name(node) in FREE and all(arg.name in seen for arg in args) and not refusal(node):
            seen.add(node.name)
            out.add(node.name)
    return out


def is_late(node: fx.Node) -> bool:
    """True for an op of backward."""
    return node.op == "call_function" and node.meta.get("phase") == "backward"


def takers(node: fx.Node) -> list[fx.Node]:
    """Who takes any output of an op, `getitem` looked through."""
    out: list[fx.Node] = []
    for user in node.users:
        out += user.users if is_getitem(user) else [user]
    return out


def without_dead(program: Program, originals: Iterable[str]) -> Program:
    """The program without those of the named ops of forward that lost their last user to a twin: they only run in backward."""
    names = set(originals)
    if not any(n.name in names and not takers(n) for n in program.graph.nodes):
        return program
    with program.edit() as new:
        for node in reversed(list(new.graph.nodes)):
            if node.name in names and not takers(node):
                for item in list(node.users):
                    new.graph.erase_node(item)
                new.graph.erase_node(node)
    return new.program


def offloaded(program: Program, entries: Sequence[str], names: Mapping[str, str]) -> dict[tuple[str, int], str]:
    """The values, as (producer, output index), that wait for backward elsewhere, and the tier: "host" or "disk".

    entries: as in `Plan.offload`; the first one that names a value counts. Raises PlanError for entries that name no value
    that an op of forward makes.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.name in names and not is_late(node):
            for index, value in enumerate(values(node)):
                if value is not None:
                    found.setdefault(value_name(names[node.name], index), []).append((node.name, index))
    out: dict[tuple[str, int], str] = {}
    for text in entries:
        entry = Entry.parse(text)
        if entry.name not in found:
            raise PlanError(f"{text!r} names no value that forward computes", where=f"offload: {text}", try_="undo the edit, or plan again")
        for value in entry.of(found[entry.name]):
            out.setdefault(value, entry.tier)
    return out
