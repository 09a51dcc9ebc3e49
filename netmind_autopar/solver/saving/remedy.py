"""What would fit when a plan does not: changes that cost the user little, each tried and priced."""

from __future__ import annotations

import time
from dataclasses import replace

from ...costs.comm import Conversions
from ..presolve import Kept
from ..problem import evaluate
from ..search import solve_problem
from .decide import Task
from .joint import solve_joint

LEAST_S = 5.0  # with less time left nothing is tried


def remedies(task: Task, limit: int, *, allowed: Kept | None, time_limit: float) -> list[str]:
    """Sentences for a refusal: the changes that fit within `limit` bytes, with the predicted step. Pins hold for them too, while the
    mesh stays; a wider mesh is looked at without them."""
    deadline = time.monotonic() + time_limit
    out = []
    wider = replace(task.mesh.axes[0], size=2 * task.mesh.axes[0].size)
    mesh = replace(task.mesh, axes=(wider, *task.mesh.axes[1:]))
    more = replace(task, mesh=mesh, conversions=Conversions(mesh, task.conversions.random_costs))
    named = ",".join(f"{axis.name}={axis.size}" for axis in mesh.axes)
    tries = [(f"{named}, twice the devices", more, None)]
    if not task.offload and task.mesh.device.host_bandwidth_bytes_s > 0:
        tries.insert(0, ("offload=True", replace(task, offload=True), allowed))
    for what, changed, kept in tries:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            break
        step_s = _fits(changed, limit, kept, left)
        if step_s is not None:
            out.append(f"{what}, which fits ({step_s * 1e3:.3g} ms a step predicted)")
    return out


def _fits(task: Task, limit: int, allowed: Kept | None, time_limit: float) -> float | None:
    """Seconds of a plan that fits, None when none was found."""
    built = task.build()
    free = solve_problem(built.problem, allowed=allowed, time_limit=time_limit, gap=1e-2)
    if free.choice is None:
        return None
    if evaluate(built.problem, free.choice)[1] <= limit:
        return task.program.turns * free.seconds
    problem = built.problem if task.offload else replace(built.problem, host_bytes_s=0.0)
    found = solve_joint(problem, free.choice, limit, allowed=allowed, bound=free.bound, gap=1e-2, time_limit=time_limit)
    return task.program.turns * found.seconds if found.fits else None
