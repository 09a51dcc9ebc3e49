"""The best choice that can be found in the time given, with a bound that is proven.

Contract; if what is left is small, one integer program settles it. Otherwise by columns: message passing under prices of memory says
for every strategy what taking it costs more at least; a linear program over the strategies that this makes likely prices memory
exactly and corrects the messages, until both agree. Whole choices come from integer programs over the few strategies that the linear
program mixes. What cannot be in a choice better than the best one is dropped; when little is left, one integer program settles it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from .. import milp
from .columns import Search
from .contract import contract
from .exact import pairs, settle
from .field import Field
from .instance import Instance, evaluate
from .messages import Messages

SMALL = 2_000  # pairs that one integer program takes at once, without any search


@dataclass(frozen=True)
class Answer:
    """choice: None when none was found (`status` says whether there is none). bound: no choice that fits costs less."""

    choice: list[int] | None
    cost: float
    peak: float
    bound: float
    status: str  # "optimal", "feasible", "infeasible", "unknown"
    seconds: float

    @property
    def gap(self) -> float:
        return (self.cost - self.bound) / abs(self.cost) if self.cost and math.isfinite(self.cost) else 0.0


def solve(instance: Instance, *, time_limit: float = 60.0, gap: float = 1e-6, seed: int = 0) -> Answer:
    """time_limit: wall-clock seconds from this call on. gap: relative, at which the search stops. The seed decides all randomness."""
    start = time.monotonic()
    deadline = start + 0.94 * time_limit  # the rest is for what has been begun by then, and for counting out
    problem = contract(instance)
    if not problem.feasible:
        return Answer(None, math.inf, math.inf, math.inf, milp.INFEASIBLE, time.monotonic() - start)
    field = Field(problem)
    everything = [np.arange(len(c)) for c in problem.costs]
    if not field.n:
        choice: list[int] | None = [] if float(field.base.max(initial=0.0)) <= field.limit else None
        bound, status = (field.fixed, milp.OPTIMAL) if choice is not None else (math.inf, milp.INFEASIBLE)
    elif pairs(field, np.array([len(k) for k in everything])) <= SMALL:
        found = settle(Messages(field), everything, (), deadline, gap=gap)
        choice, bound, status = found.choice, found.bound, found.status
    else:
        search = Search(field, deadline, gap, seed)
        search.go()
        choice, bound, status = search.best, search.bound, search.status
    seconds = time.monotonic() - start
    if choice is None:
        return Answer(None, math.inf, math.inf, bound, status, seconds)
    whole = problem.expand(choice)
    cost, peak = evaluate(instance, whole)
    bound = min(bound, cost)
    closed = cost - bound <= gap * abs(cost) + 1e-9
    return Answer(whole, cost, peak, bound, milp.OPTIMAL if closed else milp.FEASIBLE, seconds)
