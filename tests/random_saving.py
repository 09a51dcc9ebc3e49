"""Random decisions to save memory: ops that run again, values that are gathered again, values that wait in host memory or on disk."""

from __future__ import annotations

import random
from collections.abc import Sequence

from netmind_autopar.ir.plan import Entry, Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.solver.conversions import end_rules, uses, value_name
from netmind_autopar.solver.fold import classes
from netmind_autopar.solver.replay import is_late, refusal


def names_of(program: Program, rules: dict[str, Rule]) -> dict[str, str]:
    """The class of every node, as plans name it."""
    return classes(program, {**end_rules(program), **rules})


def replayable(program: Program, rules: dict[str, Rule]) -> list[str]:
    """Classes of ops that can be recomputed."""
    names = names_of(program, rules)
    return sorted({names[n.name] for n in program.graph.nodes if n.name in names and not refusal(n)})


def made_in_forward(program: Program, rules: dict[str, Rule]) -> list[str]:
    """Values that forward computes and backward takes, as plans name them."""
    names, nodes = names_of(program, rules), {n.name: n for n in program.graph.nodes}
    return sorted(
        {
            value_name(names[n], i)
            for (n, i), takers in uses(program).items()
            if nodes[n].op == "call_function" and not is_late(nodes[n]) and any(u.phase == "backward" and u.result is None for u in takers)
        }
    )


def with_saving(plan: Plan, program: Program, rules: dict[str, Rule], seed: int, *, share: float = 0.5) -> Plan:
    """The plan with about `share` of all that could be recomputed, gathered again, offloaded; some of it for the first members only."""
    draw = random.Random(seed)
    names = names_of(program, rules)
    sizes: dict[str, int] = {}
    for name in names.values():
        sizes[name] = sizes.get(name, 0) + 1
    values = sorted({value_name(names[n], i) for n, i in uses(program) if n in names})

    def some(of: Sequence[str], tiers: Sequence[str] = ("host",)) -> tuple[str, ...]:
        chosen = [name for name in of if draw.random() < share]
        out = []
        for name in chosen:
            count, part = sizes.get(name, 1), draw.random() < 0.3
            start, stop = (draw.randrange(count), draw.randint(1, count)) if part else (0, None)
            out.append(str(Entry(name, min(start, (stop or 1) - 1), stop, draw.choice(tiers))))
        return tuple(out)

    update = {
        "recompute": some(replayable(program, rules)),
        "regather": some(values),
        "offload": some(made_in_forward(program, rules), ("host", "disk")),
    }
    return Plan.loads(plan.model_copy(update=update).dumps())
