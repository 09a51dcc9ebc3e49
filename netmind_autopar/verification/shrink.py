"""Make a failing case small: first the program around the first difference, then the mesh, then the splits.

Everything is tried in a fixed order and at most `TRIALS` times, so the same failure always shrinks to the same case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..ir.errors import AutoparError, InputError
from ..ir.mesh import parse_axes
from ..ir.plan import Plan
from ..ir.spec import Replicate, parse_spec
from ..passes.pipeline import lower
from ..rules.algebra import is_legal, strategies
from ..rules.bind import bind_program
from ..solver.conversions import end_rules
from ..solver.fold import classes
from .case import Case
from .cut import attempt, cut_out
from .locate import Difference, first_difference
from .sides import promoted

if TYPE_CHECKING:
    from .check import Failure

TRIALS = 300
PLAN_TRIALS = 40


@dataclass(frozen=True)
class Shrunk:
    """case: the smallest part of the program that fails by itself, None when the lowered program is not what the plan lowers to.

    plan: for the whole model, the smallest mesh and the fewest split classes with which it still fails, None when not found.
    classes: those classes. difference: what the case shows.
    """

    case: Case | None
    plan: Plan | None
    classes: tuple[str, ...]
    difference: Difference

    def __str__(self) -> str:
        if self.case is None:
            return "not shrunk: the program is not what this plan lowers to, or fails only as a whole"
        ops = ", ".join(f"{s.op} split {s.split!r}" for s in self.case.steps) or "a conversion alone"
        lines = [f"smallest case: mesh {self.case.mesh}, {ops}; {self.difference}"]
        if self.plan is not None:
            lines.append(f"smallest plan: mesh {self.plan.links()}, split classes: {', '.join(self.classes) or 'none'}")
        return "\n".join(lines)


def shrink(failure: Failure | None) -> Shrunk:
    """The failure, small. Raises InputError when there is none."""
    if failure is None:
        raise InputError(
            "there is no difference to shrink", why="the comparison passed, or the captured graph itself differs from the model"
        )
    case = cut_out(failure)
    if case is None:
        return Shrunk(None, None, (), failure.difference)
    small = smallest(case)
    found = attempt(small)
    assert found is not None
    plan, names = _smallest_plan(failure, small)
    return Shrunk(small, plan, names, found)


def smallest(case: Case) -> Case:
    """The case with every change that it survives: fewer results, axes and devices, splits and ends."""
    first = attempt(case)
    kind = first.origin if first else ""
    trials, changed = 0, True
    while changed and trials < TRIALS:
        changed = False
        for other in _smaller(case):
            trials += 1
            if trials >= TRIALS:
                break
            found = attempt(other)
            if found is not None and found.origin == kind:
                case, changed = other, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    if len(case.wanted) > 1:
        yield from (replace(case, wanted=(w,)) for w in case.wanted)
        yield from (replace(case, wanted=tuple(v for v in case.wanted if v != w)) for w in case.wanted)
    axes = parse_axes(case.mesh)
    if len(axes) > 1:
        yield from (_without_axis(case, i) for i in range(len(axes)))
    for i, (_, size) in enumerate(axes):
        yield from (_with_size(case, i, n) for n in (2, 3) if n < size)
    yield from _less_split(case)
    used = (
        {name for s in case.steps for name in _names((s.args, dict(s.kwargs)))}
        | {w.name for w in case.wanted}
        | {w.owner for w in case.wanted}
    )
    if spare := [g for g in case.given if g.name not in used]:
        yield replace(case, given=tuple(g for g in case.given if g not in spare))


def _names(value: object) -> Iterator[str]:
    if hasattr(value, "name") and hasattr(value, "index"):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _names(v)
    elif isinstance(value, dict):
        yield from _names(list(value.values()))


def _less_split(case: Case) -> Iterator[Case]:
    """One op, given tensor or result at a time split along one axis less."""
    for i, step in enumerate(case.steps):
        symbols = step.split.split()
        for a, symbol in enumerate(symbols):
            if symbol != "-":
                less = replace(step, split=" ".join([*symbols[:a], "-", *symbols[a + 1 :]]))
                yield replace(case, steps=(*case.steps[:i], less, *case.steps[i + 1 :]))
    for field in ("given", "wanted"):
        items: tuple[Any, ...] = getattr(case, field)
        for i, item in enumerate(items):
            spec = parse_spec(item.layout)
            for a, placement in enumerate(spec.placements):
                if placement != Replicate():
                    whole = spec.with_placements(Replicate() if k == a else p for k, p in enumerate(spec.placements))
                    changed: dict[str, Any] = {field: (*items[:i], replace(item, layout=str(whole)), *items[i + 1 :])}
                    yield replace(case, **changed)


def _without_axis(case: Case, axis: int) -> Case:
    def drop(items: Sequence) -> tuple:
        return (*items[:axis], *items[axis + 1 :])

    def layout(text: str) -> str:
        spec = parse_spec(text)
        return str(spec.with_placements(drop(spec.placements)))

    return replace(
        case,
        mesh=",".join(f"{name}={n}" for name, n in drop(parse_axes(case.mesh))),
        links=drop(case.links),
        given=tuple(replace(g, layout=layout(g.layout)) for g in case.given),
        wanted=tuple(replace(w, layout=layout(w.layout)) for w in case.wanted),
        steps=tuple(replace(s, split=" ".join(drop(s.split.split()))) for s in case.steps),
    )


def _with_size(case: Case, axis: int, size: int) -> Case:
    axes = [(name, size if i == axis else n) for i, (name, n) in enumerate(parse_axes(case.mesh))]
    return replace(case, mesh=",".join(f"{name}={n}" for name, n in axes))


def _smallest_plan(failure: Failure, case: Case) -> tuple[Plan | None, tuple[str, ...]]:
    """For the whole model: the case's mesh, and only those classes split whose nodes the case needs; else the fewest there are."""
    rules = bind_program(failure.base)
    every = {**end_rules(failure.base, failure.plan.inputs), **rules}
    names = classes(failure.base, every)
    names |= {f"output.{o.name}": f"output.{o.name}" for o in failure.base.outputs if o.role == "output"}
    kept_axes = [failure.plan.axis_names.index(name) for name, _ in parse_axes(case.mesh)]
    sizes = [n for _, n in parse_axes(case.mesh)]

    def plan_of(kept: set[str], axes: list[int], sizes: list[int]) -> Plan:
        mesh = tuple(failure.plan.mesh[a].model_copy(update={"size": n}) for a, n in zip(axes, sizes, strict=True))
        choices = {}
        for node, name in names.items():
            rule = every.get(node)
            if rule is None or name in choices or len(strategies(rule, tuple(sizes))) < 2:
                continue
            old = failure.plan.choices.get(name, "").split()
            symbols = tuple(old[a] for a in axes) if name in kept and old else ("-",) * len(axes)
            choices[name] = " ".join(symbols if is_legal(rule, symbols, tuple(sizes)) else ("-",) * len(axes))
        return failure.plan.model_copy(update={"mesh": mesh, "choices": choices})

    def fails(plan: Plan) -> bool:
        try:
            lowered = lower(failure.base, rules, plan)
        except AutoparError:
            return False
        if failure.program is not failure.base:
            lowered = promoted(lowered)
        return first_difference(failure.program, lowered, plan.sizes, failure.state) is not None

    split = {name for name, text in failure.plan.choices.items() if set(text.split()) != {"-"}}
    near = {names[n] for n in _involved(case, failure) if n in names} & split
    options = ((near, kept_axes, sizes), (split, kept_axes, sizes), (split, list(range(len(failure.plan.mesh))), list(failure.plan.sizes)))
    for kept, axes, counts in options:
        if fails(plan_of(kept, axes, counts)):

            def still(some: list[str], axes: list[int] = axes, counts: list[int] = counts) -> bool:
                return fails(plan_of(set(some), axes, counts))

            fewest = _fewest(sorted(kept), still)
            return plan_of(set(fewest), axes, counts), tuple(fewest)
    return None, ()


def _involved(case: Case, failure: Failure) -> set[str]:
    """Nodes of the case, and the ends of the program that take its results."""
    names = {s.name for s in case.steps} | {g.name for g in case.given} | {g.name.rpartition("_")[0] for g in case.given}
    nodes = {n.name: n for n in failure.base.graph.nodes}
    for name in {w.name for w in case.wanted} & nodes.keys():
        names |= {u.name for u in nodes[name].users}
    for out in failure.base.outputs:
        if out.node in names:
            names |= {f"output.{out.name}"} if out.role == "output" else set()
            names |= {failure.base.owner(out).node} if out.role == "grad" else set()
    return names


def _fewest(items: list[str], fails: Callable[[list[str]], bool]) -> list[str]:
    """Delta debugging: leave out ever smaller runs of items while it still fails."""
    trials, size = 0, max(1, len(items) // 2)
    while items:
        start = 0
        while start < len(items) and trials < PLAN_TRIALS:
            without = items[:start] + items[start + size :]
            trials += 1
            if fails(without):
                items = without
            else:
                start += size
        if size == 1 or trials >= PLAN_TRIALS:
            break
        size = max(1, size // 2)
    return items
