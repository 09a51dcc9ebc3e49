"""Plans that no solver would choose: a random legal strategy for every class, prices ignored."""

from __future__ import annotations

import random

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.plan import Plan, PlanAxis
from netmind_autopar.ir.program import Program
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.solver.conversions import needed_conversions, owner_of, uses, value_name
from netmind_autopar.solver.kinds import collect
from netmind_autopar.solver.solve import choices_to_strategies
from netmind_autopar.tracer.hash import graph_hash


def random_plan(program: Program, rules: dict[str, Rule], mesh: str, seed: int, *, idle: float = 0.1, inputs: str = "global") -> Plan:
    """Every class draws one of its strategies, "split nothing" with probability `idle`; classes at impossible edges draw again."""
    links = make_mesh(mesh, "h100-sxm")
    kinds = {name: kind for name, kind in collect(program, rules, links.sizes, inputs).items() if len(kind.strategies) > 1}
    draw = random.Random(seed)
    axes = tuple(PlanAxis(name=a.name, size=a.size, bandwidth_bytes_s=a.bandwidth_bytes_s, latency_s=a.latency_s) for a in links.axes)

    def pick(name: str) -> str:
        options = kinds[name].strategies
        return " ".join(options[0] if draw.random() < idle else draw.choice(options))

    choices = {name: pick(name) for name in kinds}
    conversions = Conversions(links, None)
    class_of = {member: name for name, kind in kinds.items() for member in kind.members}
    for attempt in range(200):  # a conversion may be impossible: a maximum in parts cannot be made
        head = {"graph_hash": graph_hash(program), "mode": program.mode, "mesh": axes, "inputs": inputs}
        plan = Plan(**head, choices=dict(choices), status="given")  # type: ignore[arg-type]
        strategies = choices_to_strategies(program, rules, plan)
        bad = [
            n
            for n in needed_conversions(program, rules, strategies, links.sizes, frozenset())
            if conversions.seconds(n.source, n.target) == float("inf")
        ]
        if not bad:
            return plan.model_copy(update={"regather": _some_values(program, class_of, draw)})
        for need in bad:
            ends = {need.producer, *(u.node if u.result is None else owner_of(program, u.result) or "" for u in need.uses)}
            for name in {class_of.get(end, end) for end in ends} & kinds.keys():
                choices[name] = pick(name) if attempt < 100 else " ".join(kinds[name].strategies[0])
    raise AssertionError("no feasible plan was drawn")


def _some_values(program: Program, class_of: dict[str, str], draw: random.Random) -> tuple[str, ...]:
    """Values that are converted again in backward: none, all, or some members of some."""
    if (kind := draw.random()) < 0.6:
        return () if kind < 0.3 else ("*",)
    names = sorted({value_name(class_of[node], index) for node, index in uses(program) if node in class_of})
    return tuple(name + draw.choice(("", "[:1]")) for name in names if draw.random() < 0.5)
