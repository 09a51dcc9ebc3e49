"""Who bears what in the relaxation of price.py, taken from the linear program of cut.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..problem import FORWARD
from .cut import Answer, Cut


@dataclass(frozen=True)
class Shares:
    """Of value v's cost of being there, and of its copy's, what consumer t bears when it runs again; what it pays for v being kept."""

    value: Mapping[tuple[int, int], float]
    copy: Mapping[tuple[int, int], float]
    kept: Mapping[tuple[int, int], float]


def shares(cut: Cut, answer: Answer | None) -> Shares:
    """As in the linear program at its solution; where that says nothing, equal ones."""
    problem = cut.problem
    tables: tuple[dict[tuple[int, int], float], ...] = ({}, {}, {})  # of copies, of values, for keeping
    copied: set[tuple[int, int]] = set()  # what is taken as a copy, so that the program says what having that costs
    for (j, i), numbers in (answer.links if answer else {}).items():
        v = cut.things[i].value
        takers = [t for t, c in enumerate(problem.values[v].consumers) if c.node == cut.parts[j].node and c.phase == FORWARD]
        copied |= {(v, t) for t in takers[:1] if cut.things[i].source >= 0}
        for table, number in zip(tables, numbers, strict=True):
            if takers and number:
                table[v, takers[0]] = table.get((v, takers[0]), 0.0) + number
    copy, value, kept = tables
    for v, item in enumerate(problem.values):
        takers = [t for t, c in enumerate(item.consumers) if c.phase == FORWARD and problem.nodes[c.node].again]
        for table in (copy, value):
            total = sum(table.get((v, t), 0.0) for t in takers)
            for t in takers:
                free = table is copy and (v, t) in copied
                table[v, t] = table.get((v, t), 0.0) / total if total > 0.0 else 0.0 if free else 1.0 / len(takers)
    return Shares(value, copy, kept)
