"""How many micro-batches a step is made of: one, unless more of them fit where one does not, or are faster within the memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..ir.errors import InfeasibleError, InputError
from ..ir.mesh import Mesh
from ..ir.plan import Plan
from ..ir.program import Program
from ..rules.algebra import Rule
from .micro import Refusal, in_turns, micro_batches
from .solve import NothingFits, advised, solve

MOST = 64  # micro-batches that are tried, in powers of two
WORTH = 0.1  # share of the step that saving memory costs, from which on micro-batches are tried
GAIN = 0.97  # with micro-batches half as large the least peak must come down to this share, or smaller ones are not tried
LEAST_S = 5.0  # seconds that a try gets at least


def solve_batches(
    program: Program,
    rules: Mapping[str, Rule],
    mesh: Mesh,
    count: int | None,
    say: Callable[[str], None] = lambda _: None,
    *,
    time_limit: float,
    **options: Any,
) -> Plan:
    """The cheapest plan with `count` micro-batches; with as many as are best, in powers of two, when None. Options as in `solve`.

    Raises InputError where there are no such micro-batches, and what `solve` raises.
    """
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"micro_batches={count!r} is no number of micro-batches", try_="micro_batches=4, or None")
        return solve(*in_turns(program, rules, count), mesh, time_limit=time_limit, **options)
    deadline = time.monotonic() + time_limit
    best, first = _tried(program, rules, mesh, time_limit=time_limit, **options)
    if best is not None and (options.get("random_costs") is not None or _saving_share(best) < WORTH):
        return best
    turns, refused = 2, first
    while turns <= MOST and (left := deadline - time.monotonic()) > 0:
        found = micro_batches(program, rules, turns)
        if isinstance(found, Refusal):
            break
        say(f"trying {turns} micro-batches")
        plan, error = _tried(*found, mesh, time_limit=max(left, LEAST_S), **options)
        if plan is not None and best is not None and plan.cost.predicted_s >= best.cost.predicted_s:
            break
        if error is not None and refused is not None and _need(error) > GAIN * _need(refused):
            break
        best, refused, turns = plan or best, error, 2 * turns
    if best is None and first is not None:
        limit = options.get("memory_limit")
        raise advised(first, mesh.device.memory_bytes if limit is None else limit) from None
    assert best is not None
    return best


def _tried(program: Program, rules: Mapping[str, Rule], mesh: Mesh, **options: Any) -> tuple[Plan | None, InfeasibleError | None]:
    try:
        return solve(program, rules, mesh, advise=False, **options), None
    except InfeasibleError as error:
        return None, error


def _need(error: InfeasibleError) -> float:
    """The least bytes that were found."""
    return error.need_bytes if isinstance(error, NothingFits) else math.inf


def _saving_share(plan: Plan) -> float:
    """The share of the step that goes into running things twice and into transfers."""
    return (plan.cost.recompute_s + plan.cost.transfer_s) / plan.cost.step_s if plan.cost.step_s else 0.0
