"""A plan that fits: from the cheapest sharding, which does not, to one whose recomputation and regathering is written down by name."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...costs.comm import Conversions
from ...ir.mesh import Mesh
from ...ir.plan import ALL, entries_of
from ...ir.program import Program
from ...rules.algebra import Rule
from .. import milp
from ..build import Built, build
from ..conversions import end_rules, regathered
from ..fold import classes
from ..parking import OPTIMIZER, PARAM, parked, stowed
from ..presolve import Kept, cells, reduce
from ..problem import Problem, evaluate
from ..replay import offloaded, rewritten
from ..search import solve_problem
from ..shard import Solution
from .joint import Joint, Search
from .place import Places
from .tape import Names, Saved


@dataclass(frozen=True)
class Decision:
    """What was solved, the solution, and what a plan says about saving memory. waits_s: seconds of waiting for transfers.

    byte_worth_s: seconds that one more byte of memory would save.
    """

    built: Built
    solution: Solution
    recompute: tuple[str, ...] = ()
    regather: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    waits_s: float = 0.0
    byte_worth_s: float = 0.0

    @property
    def peak(self) -> int:
        assert self.solution.choice is not None
        return evaluate(self.built.problem, self.solution.choice)[1]


EXACT_CELLS = 1_500  # a problem of this size is solved without recomputation too, exactly
TRIES = 6  # rounds of asking for less under a sharding where the tape saw less than the rewritten program needs


@dataclass(frozen=True)
class Task:
    """What is planned, and how its problem is built for any way of saving memory."""

    program: Program
    rules: Mapping[str, Rule]
    mesh: Mesh
    conversions: Conversions
    inputs: str
    states: int
    offload: bool = False  # activations, parameters and optimizer state may wait elsewhere

    @functools.cached_property
    def known(self) -> tuple[dict[str, Rule], dict[str, str]]:
        """The rules of all nodes, ends included, and their classes."""
        rules = {**end_rules(self.program, self.inputs), **self.rules}
        return rules, classes(self.program, rules)

    def build(
        self,
        recompute: tuple[str, ...] = (),
        regather: tuple[str, ...] = (),
        offload: tuple[str, ...] = (),
        limit: int | None = None,
        state: tuple[str, ...] = (),
    ) -> Built:
        """The problem of the program that runs when this is recomputed, regathered and offloaded, and this state waits elsewhere."""
        program, rules, again = self.program, self.rules, frozenset()  # type: ignore[var-annotated]
        away: dict[tuple[str, int], str] = {}
        elsewhere = stowed(program, state, self.known[1]) if state else {}
        if recompute or regather or offload or elsewhere:
            known, names = self.known
            again, away = regathered(program, names, regather), offloaded(program, offload, names)
            new = rewritten(program, known, names, recompute, elsewhere)
            program, rules = new.program, new.rules
        seed = self.conversions.random_costs
        return build(
            program,
            rules,
            self.mesh,
            self.conversions,
            states=self.states,
            inputs=self.inputs,
            random_costs=seed,
            limit_bytes=limit,
            regather=again,
            away=away,
            parked=parked(self.program, state, self.known[1]) if state else None,
            stowed=elsewhere,
        )


def within(task: Task, built: Built, first: Solution, limit: int, *, allowed: Kept | None, time_limit: float, gap: float) -> Decision:
    """The cheapest plan found that stays within `limit` bytes; `first` is the cheapest without a limit.

    When nothing fits, the solution has status "infeasible", infinite seconds, and the choice with the least peak that was found.
    """
    assert first.choice is not None
    deadline = time.monotonic() + time_limit
    problem = built.problem if task.offload else replace(built.problem, host_bytes_s=0.0)
    search = Search(problem, limit, allowed=allowed, bound=first.bound, gap=gap, time_limit=time_limit)
    joint = search.solve(first.choice)
    found = _written(task, built, joint, limit, gap)
    for _ in range(TRIES - 1):
        if not joint.fits or found.peak <= limit:
            break
        joint = search.less(joint.choice, found.peak - min(joint.peak, limit))
        found = _written(task, built, joint, limit, gap)
    if joint.fits and cells(built.problem, reduce(built.problem, allowed)) > EXACT_CELLS:
        return found
    left = max(deadline - time.monotonic(), 1.0)
    other = _without_recompute(task, limit, allowed=allowed, bound=joint.bound, time_limit=left, gap=gap)
    return min((found, other), key=lambda decision: (decision.solution.seconds, decision.peak))


def _written(task: Task, built: Built, joint: Joint, limit: int, gap: float) -> Decision:
    """The joint plan as names, counted out on the rewritten program."""
    recompute, regather, offload = entries(built.problem, joint.saved, joint.disk)
    state = state_entries(built.problem, joint.places, joint.stowed)
    new = task.build(recompute, regather, offload, limit, state)
    at = {kind.name: k for kind, k in zip(built.kinds, joint.choice, strict=True)}
    choice = tuple(at[kind.name] for kind in new.kinds)
    seconds, peak, _ = evaluate(new.problem, choice)
    if peak > limit:
        return Decision(new, Solution(choice, math.inf, joint.bound, milp.INFEASIBLE), recompute, regather, offload, state)
    seconds += joint.waits_s
    bound = min(joint.bound, seconds)
    closed = seconds - bound <= gap * abs(seconds)
    solution = Solution(choice, seconds, bound, milp.OPTIMAL if closed else milp.FEASIBLE)
    return Decision(new, solution, recompute, regather, offload, state, joint.waits_s, sum(joint.prices.values()))


def _without_recompute(task: Task, limit: int, *, allowed: Kept | None, bound: float, time_limit: float, gap: float) -> Decision:
    """The best plan that runs nothing twice but collectives. Its own bound says nothing about plans that do."""
    regather = (ALL,)
    built = task.build((), regather, (), limit)
    found = solve_problem(built.problem, allowed=allowed, time_limit=time_limit, gap=gap)
    if found.choice is None or found.seconds == math.inf:
        return Decision(built, found, (), regather)
    closed = found.seconds - bound <= gap * abs(found.seconds)
    return Decision(built, replace(found, bound=bound, status=milp.OPTIMAL if closed else milp.FEASIBLE), (), regather)


def entries(problem: Problem, saved: Saved, disk: Names | None = None) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """`recompute`, `regather` and `offload` of a plan: names, with a slice where not all members are meant. disk: of what waits
    elsewhere, that on disk."""
    recompute: list[str] = []
    for n, ranks in sorted(saved.recompute.items()):
        node = problem.nodes[n]
        recompute += entries_of(node.name, ranks, sum(1 for m in node.moments if m <= problem.forward_end))
    sizes: dict[str, int] = {}
    for value in problem.values:
        sizes[value.name] = sizes.get(value.name, 0) + value.count

    def named(names: Names, tier: str = "host") -> tuple[str, ...]:
        return tuple(entry for name, ranks in sorted(names.items()) for entry in entries_of(name, ranks, sizes[name], tier))

    host = {name: ranks - (disk or {}).get(name, frozenset()) for name, ranks in saved.offload.items()}
    return tuple(recompute), named(saved.regather), named(host) + named(disk or {}, "disk")


def state_entries(problem: Problem, places: Places, stowed: Places | None = None) -> tuple[str, ...]:
    """`state` of a plan: of each class the first parameters in host memory, the next on disk; then those whose state alone waits so."""
    out: list[str] = []
    for what, found in ((PARAM, stowed or {}), (OPTIMIZER, places)):
        for n, (host, disk) in sorted(found.items()):
            node, first = problem.nodes[n], sum((stowed or {}).get(n, (0, 0))) if what == OPTIMIZER else 0
            count = node.count if what == PARAM else node.here
            out += entries_of(node.name, range(first, first + host), count, "host", what)
            out += entries_of(node.name, range(first + host, first + host + disk), count, "disk", what)
    return tuple(out)
