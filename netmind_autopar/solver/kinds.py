"""Classes of a program as the solver decides them: members, the rule and strategies they share, and the layouts that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..ir.program import Program, tensor_args, values
from ..ir.spec import Spec
from ..rules.algebra import Rule, Strategy, strategy_codes
from .conversions import end_rules, value_of
from .fold import classes
from .layouts import Side

RESULT = "result"  # the node that replicated results want


@dataclass(frozen=True)
class Kind:
    """One class: its members in program order, the rule and strategies they share, and the layouts that follow."""

    name: str
    members: tuple[str, ...]
    rule: Rule
    strategies: tuple[Strategy, ...]
    takes: Sequence[tuple[Spec, ...]]
    gives: Sequence[tuple[Spec | None, ...]]
    role: str = "op"


def strategies_of(kind_rule: Rule, sizes: tuple[int, ...], cache: dict) -> tuple[tuple[Strategy, ...], np.ndarray]:
    """The strategies of a rule, and their codes."""
    key = (kind_rule.inputs, kind_rule.outputs, tuple(kind_rule.sizes.items()), kind_rule.fixed, kind_rule.reduce, sizes)
    if key not in cache:
        symbols, codes = kind_rule.symbols, strategy_codes(kind_rule, sizes)
        cache[key] = tuple(tuple(symbols[c] for c in row) for row in codes.tolist()), codes
    return cache[key]


def collect(program: Program, rules: Mapping[str, Rule], sizes: tuple[int, ...], inputs: str) -> dict[str, Kind]:
    """All classes of the program by name. Tangents belong to the class of their output."""
    rules = {**end_rules(program, inputs), **rules}
    cache: dict = {}
    members: dict[str, list[str]] = {}
    names = classes(program, rules)
    ends = program.placeholders()
    for node_name, name in names.items():
        if node_name not in ends or ends[node_name].role != "tangent":
            members.setdefault(name, []).append(node_name)
    nodes = {node.name: node for node in program.graph.nodes}
    out: dict[str, Kind] = {}
    for name, group in members.items():
        node = nodes[group[0]]
        role = ends[group[0]].role if group[0] in ends else "constant" if node.op == "get_attr" else "op"
        out[name] = _kind(
            name,
            tuple(group),
            rules[group[0]],
            [value_of(a).dtype for a in tensor_args(node)],
            [None if v is None else v.dtype for v in values(node)],
            sizes,
            cache,
            role,
        )
    for item in program.outputs:
        if item.role == "output":
            name = f"output.{item.name}"
            dtype = value_of(nodes[item.node]).dtype
            out[name] = _kind(name, (), rules[name], [], [dtype], sizes, cache, "result")
    out[RESULT] = Kind(RESULT, (), Rule((), (), {}), (("-",) * len(sizes),), ((),), ((),), "result")
    return out


def _kind(
    name: str,
    members: tuple[str, ...],
    rule: Rule,
    ins: Sequence[torch.dtype],
    outs: Sequence[torch.dtype | None],
    sizes: tuple[int, ...],
    cache: dict,
    role: str,
) -> Kind:
    found, codes = strategies_of(rule, sizes, cache)
    takes, gives = (Side(rule, found, codes, tuple(dtypes), side) for dtypes, side in ((ins, False), (outs, True)))
    return Kind(name, members, rule, found, takes, gives, role)
