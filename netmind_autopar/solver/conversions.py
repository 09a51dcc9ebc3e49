"""Which conversions a plan needs: the one definition that prices them (solver/build.py) and that lowering must follow.

A value is (producer, output index). Each of its uses wants it in some layout; one conversion serves all uses of the same group
that want the same layout. The group is "both": what is gathered in forward is kept for backward. For a value that the plan lists
in `regather` it is the phase of the use: what is gathered in forward is gathered again in backward from the stored shards, except
where the value holds Partial sums (a reduction is done once).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import fx

from ..ir.errors import PlanError
from ..ir.plan import ALL, Entry
from ..ir.program import Output, Program, is_getitem, source, tensor_args, values
from ..ir.spec import Layout, Spec, layout, same_layout
from ..rules.algebra import Rule, Strategy, Term, input_specs, output_specs
from ..rules.algebra import strategies as all_strategies


class Use(NamedTuple):
    """One taker of a value: argument `position` of the op `node`, or the program's output at `position` (node "output")."""

    node: str
    position: int
    phase: str
    result: Output | None = None


@dataclass(frozen=True)
class Needed:
    """One conversion: of output `index` of `producer`, from `source` to `target`, for `uses`.

    is_gradient: the value is the gradient of a parameter or an input; its all-reduces travel in buckets and are priced so.
    """

    producer: str
    index: int
    group: str
    source: Spec
    target: Spec
    uses: tuple[Use, ...]
    is_gradient: bool = False

    @property
    def phase(self) -> str:
        """Where it runs: with its first use, and in forward whenever forward needs it too."""
        return "forward" if any(use.phase == "forward" for use in self.uses) else self.uses[0].phase


def plain_rule(shape: Sequence[int], *, split: bool = True) -> Rule:
    """The rule of a tensor at the program's ends: one letter per dim, which can be split unless `split` is False."""
    letters = tuple(f"d{i}" for i in range(len(shape)))
    term = Term(tuple((letter,) for letter in letters))
    sizes = {letter: int(n) for letter, n in zip(letters, shape, strict=True)}
    return Rule((), (term,), sizes, frozenset() if split else frozenset(letters))


def end_rules(program: Program, inputs: str = "global") -> dict[str, Rule]:
    """Rules of placeholders and constants by node name, and of the program's results as `output.<path>`."""
    out: dict[str, Rule] = {}
    ends = program.placeholders()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            role = ends[node.name].role if node.op == "placeholder" else ""
            shape = tuple(value_of(node).shape)
            split = role in ("param", "tangent") or (role == "input" and inputs == "local")
            out[node.name] = plain_rule(shape, split=split)
    nodes = {node.name: node for node in program.graph.nodes}
    joins = program.micro.joins if program.micro else ("",) * len(program.outputs)
    for item, join in zip(program.outputs, joins, strict=True):
        if item.role == "output":
            rule = plain_rule(value_of(nodes[item.node]).shape)
            if join.startswith("cat:"):  # what lies in turns along a dim cannot lie on devices along it
                rule = replace(rule, fixed=frozenset({f"d{join[4:]}"}))
            out[f"output.{item.name}"] = rule
    return out


def value_of(node: fx.Node) -> torch.Tensor:
    """The (fake) tensor that a node stands for, `getitem` looked through."""
    producer, index = source(node)
    found = values(producer)[index]
    assert found is not None
    return found


def owner_of(program: Program, item: Output) -> str | None:
    """Whose layout a result takes: the node of the parameter or input of a gradient or new value, `output.<path>`, None: replicated."""
    if item.role == "output":
        return f"output.{item.name}"
    if item.role == "grad" or item.index >= 0:
        return program.owner(item).node
    return None


def uses(program: Program) -> dict[tuple[str, int], list[Use]]:
    """Every value that a placeholder, a constant or an op produces, and its uses in the order of the program."""
    out: dict[tuple[str, int], list[Use]] = {}
    for node in program.graph.nodes:
        if node.op != "output" and not is_getitem(node):
            out.update({(node.name, i): [] for i, v in enumerate(values(node)) if v is not None})
        if node.op == "call_function" and not is_getitem(node):
            phase = node.meta["phase"]
            for position, arg in enumerate(program.taken(node).nodes):
                producer, index = source(arg)
                out[producer.name, index].append(Use(node.name, position, phase))
    nodes = {node.name: node for node in program.graph.nodes}
    for position, item in enumerate(program.outputs):
        producer, index = source(nodes[item.node])
        out[producer.name, index].append(Use("output", position, "backward" if item.role == "grad" else "forward", item))
    return out


def group(spec: Spec, phase: str, again: bool) -> str:
    """Who shares a conversion of a value that lies like `spec`; `again`: it is converted again in backward."""
    return phase if again and not spec.has_partial else "both"


def regathered(program: Program, names: Mapping[str, str], entries: Sequence[str]) -> frozenset[tuple[str, int]]:
    """The values, as (producer, output index), that are converted again in backward. `names`: the class of every producer.

    Raises PlanError for an entry that names no value.
    """
    if not entries:
        return frozenset()
    found: dict[str, list[tuple[str, int]]] = {}
    for node, index in uses(program):
        found.setdefault(value_name(names[node], index), []).append((node, index))
    if ALL in entries:
        return frozenset(value for members in found.values() for value in members)
    out: set[tuple[str, int]] = set()
    for entry in map(Entry.parse, entries):
        if entry.name not in found:
            raise PlanError(f"{entry.name!r} names no value", where="regather", try_="undo the edit, or plan again")
        out.update(entry.of(found[entry.name]))
    return frozenset(out)


def value_name(producer_class: str, index: int) -> str:
    """How plans call output `index` of a class."""
    return producer_class + (f"[{index}]" if index else "")


def needed_conversions(
    program: Program,
    rules: Mapping[str, Rule],
    strategies: Mapping[str, Strategy],
    sizes: tuple[int, ...],
    again: frozenset[tuple[str, int]],
    stowed: Collection[str] = (),
) -> tuple[Needed, ...]:
    """Every conversion of the program under `strategies` (from `solve.choices_to_strategies`), in the order of the values.

    again: the values that are converted again in backward (from `regathered`). stowed: parameters whose gradients leave at once, and
    wait for no bucket.
    """
    rules = {**end_rules(program), **rules}
    nodes = {node.name: node for node in program.graph.nodes}
    produced: dict[str, tuple[Spec | None, ...]] = {}
    wants: dict[str, tuple[Spec, ...]] = {}
    none = ("-",) * len(sizes)
    for node in program.graph.nodes:
        if node.op == "output" or is_getitem(node):
            continue
        strategy = strategies.get(node.name, none)
        produced[node.name] = output_specs(rules[node.name], strategy, [None if v is None else v.dtype for v in values(node)])
        wants[node.name] = input_specs(rules[node.name], strategy, [value_of(arg).dtype for arg in tensor_args(node)])

    def wanted(use: Use, have: Spec) -> Spec:
        if use.result is None:
            return wants[use.node][use.position]
        owner = owner_of(program, use.result)
        if owner is None:
            return output_specs(plain_rule(have.shape), none, [have.dtype])[0]  # type: ignore[return-value]
        if owner in nodes:
            return produced[owner][0]  # type: ignore[return-value]
        return output_specs(rules[owner], strategies.get(owner, none), [have.dtype])[0]  # type: ignore[return-value]

    said = _Said(program, rules, sizes)
    out: list[Needed] = []
    for (name, index), takers in uses(program).items():
        have = produced[name][index]
        if have is None:
            continue
        served: dict[tuple, tuple[Spec, list[Use]]] = {}
        for use in takers:
            want = wanted(use, have)
            if not same_layout(have, want, sizes):
                served.setdefault((group(have, use.phase, (name, index) in again), layout(want, sizes)), (want, []))[1].append(use)
        is_gradient = any(is_bucketed(program, use, stowed) for use in takers)
        several = len({wanted(use, have).dims for use in takers}) > 1
        for key, (want, users) in served.items():
            target = said.first(want, have, takers, key[1]) if several else want
            out.append(Needed(name, index, key[0], have, target, tuple(users), is_gradient))
    return tuple(out)


def is_bucketed(program: Program, use: Use, stowed: Collection[str]) -> bool:
    """Whether a use is a gradient that may wait for its bucket."""
    return use.result is not None and use.result.role == "grad" and owner_of(program, use.result) not in stowed


class _Said:
    """How a layout that several uses of a value know is written: as the first of them that may want it writes it.

    Uses may see a dim as other parts; the moves between two layouts can depend on that, so pricing and lowering must agree.
    """

    def __init__(self, program: Program, rules: Mapping[str, Rule], sizes: tuple[int, ...]) -> None:
        self.program, self.rules, self.sizes = program, rules, sizes
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.known: dict[tuple, dict[Layout, Spec]] = {}

    def first(self, want: Spec, have: Spec, takers: Sequence[Use], wanted: Layout) -> Spec:
        """`want`, whose layout is `wanted`, in the words of the first taker that has some for it."""
        for use in takers:
            found = self._of(use, have).get(wanted)
            if found is not None:
                return found
        return want

    def _of(self, use: Use, have: Spec) -> dict[Layout, Spec]:
        """The layouts that a use may want, each as its first strategy writes it."""
        if use.result is None:
            node = self.nodes[use.node]
            rule, dtypes = self.rules[use.node], tuple(value_of(arg).dtype for arg in tensor_args(node))
        else:
            owner = owner_of(self.program, use.result)
            if owner is None:
                return {layout(have.replicated, self.sizes): have.replicated}
            rule = self.rules[owner]
            dtypes = (value_of(self.nodes[owner]).dtype if owner in self.nodes else have.dtype,)
        key = (id(rule), -1 if use.result else use.position, dtypes)
        if key not in self.known:
            found: dict[Layout, Spec] = {}
            for strategy in all_strategies(rule, self.sizes):
                specs = output_specs(rule, strategy, dtypes) if use.result else input_specs(rule, strategy, dtypes)
                spec = specs[0 if use.result else use.position]
                if spec is not None:
                    found.setdefault(layout(spec, self.sizes), spec)
            self.known[key] = found
        return self.known[key]
