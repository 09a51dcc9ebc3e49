"""The best of all sensible meshes of a number of devices.

Meshes with one and two axes come first: each is bounded by a relaxation that is quick to compute (`estimate`), which also gives a
first guess of what it can reach; the most promising is planned first, and a mesh whose bound is no better than the least sum of the
best plan in hand is ruled out. Of those that were planned, the one with the shortest timeline is taken. Then those with three axes,
whose problems are larger, in the same way. The time limit is that of the whole search.

Ranks of the last axis are neighbours. With three axes the border between nodes must lie between two axes: a link inside a node is
worth an axis of its own only if the axis does not leave the node. (64,), (8, 8) and (2, 4, 8) are different problems, even where links are
the same: on a finer mesh one dim can be split along some axes and another along others, on a coarser one fewer messages do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..costs.comm import Conversions
from ..costs.device import cluster_profile, make_mesh
from ..costs.memory import optimizer_states
from ..ir.errors import AutoparError, InfeasibleError, InputError, SolverError
from ..ir.mesh import Mesh
from ..ir.plan import Plan
from ..ir.planrows import Alternative
from ..ir.program import Program
from ..rules.algebra import Rule
from .bound import Local, Relaxed
from .build import build
from .memory import Moments
from .presolve import reduce
from .problem import Problem, evaluate

NAMES = (("dp",), ("dp", "tp"), ("dp", "cp", "tp"))
MOST_AXES = 3
SWEEPS = 12  # of the relaxation, for the bound of one mesh
LEAST_S = 1.0  # seconds that a mesh which is tried gets at least

Solve = Callable[[Mesh, float], Plan]  # plans for a mesh within so many seconds


@dataclass(frozen=True)
class Devices:
    """A number of devices of a cluster, whose mesh is to be found."""

    count: int
    cluster: str


@dataclass(frozen=True)
class Estimate:
    """What is known about a mesh before it is planned: no plan is faster than `bound_s`, and one without memory limit takes `guess_s`."""

    mesh: Mesh
    bound_s: float
    guess_s: float


def factorisations(devices: int, node_size: int, most_axes: int = MOST_AXES) -> tuple[tuple[int, ...], ...]:
    """The sizes of all sensible meshes, fewest axes first, outermost axis first. Raises InputError for fewer than one device."""
    if devices < 1:
        raise InputError(f"a mesh of {devices} devices", where="devices=", try_="1 or more")
    inside = devices <= node_size or devices % node_size != 0  # then no border between nodes can be kept

    def sensible(sizes: tuple[int, ...]) -> bool:
        borders = {math.prod(sizes[i:]) for i in range(len(sizes))}
        return len(sizes) < 3 or inside or node_size in borders

    if devices == 1:
        return ((1,),)
    return tuple(sizes for n in range(1, most_axes + 1) for sizes in _products(devices, n) if sensible(sizes))


def _products(devices: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many numbers of 2 or more with this product, the first one ascending."""
    if factors == 1:
        yield (devices,)
        return
    for first in range(2, devices // 2 + 1):
        if devices % first == 0:
            yield from ((first, *rest) for rest in _products(devices // first, factors - 1))


def candidates(devices: Devices, most_axes: int = MOST_AXES) -> tuple[Mesh, ...]:
    """The meshes to look at."""
    node_size = cluster_profile(devices.cluster).node_size
    texts = [
        ",".join(f"{name}={n}" for name, n in zip(NAMES[len(sizes) - 1], sizes, strict=True))
        for sizes in factorisations(devices.count, node_size, most_axes)
    ]
    return tuple(make_mesh(text, devices.cluster) for text in texts)


def estimate(problem: Problem) -> tuple[float, float]:
    """(bound, guess): no choice takes fewer seconds than the bound, and one without memory limit takes as many as the guess."""
    free = replace(problem, limit_bytes=None)
    kept = reduce(free)
    if not all(kept):
        return math.inf, math.inf
    moments = Moments(free)
    relaxed, local = Relaxed(free, kept, moments), Local(free, kept, {}, moments)
    bound, guess = -math.inf, math.inf
    for _ in range(SWEEPS):
        relaxed.rebalance()
        bound = max(bound, relaxed.bound())
        choice, _ = relaxed.sweep()
    guess = evaluate(free, local.descend(choice))[0]
    return max(bound, 0.0), guess


def search_meshes(
    program: Program,
    rules: Mapping[str, Rule],
    devices: Devices,
    solve: Solve,
    *,
    optimizer: str = "adamw",
    inputs: str = "global",
    random_costs: int | None = None,
    time_limit: float = 60.0,
    gap: float = 1e-4,
    bounds: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The best plan over all meshes; the rest is in `Plan.alternatives`.

    solve: plans for one mesh within a time limit. bounds: estimate first; without it (for plans that are restricted, and quick to make)
    every mesh is planned. Raises what `solve` raised on the last mesh when no mesh has a plan.
    """
    deadline = time.monotonic() + time_limit
    search = _Search(solve, deadline, gap, say)
    meshes = candidates(devices)
    search.total = len(meshes)

    def judge(mesh: Mesh) -> Estimate:
        if not bounds:
            return Estimate(mesh, 0.0, 0.0)
        say(f"bounding the mesh {mesh}")
        conversions = Conversions(mesh, random_costs)
        states = optimizer_states(optimizer)
        built = build(program, rules, mesh, conversions, states=states, inputs=inputs, random_costs=random_costs)
        return Estimate(mesh, *estimate(built.problem))

    small = [mesh for mesh in meshes if len(mesh.axes) < MOST_AXES]
    search.run([judge(mesh) for mesh in small])
    for mesh in meshes[len(small) :]:
        if time.monotonic() > deadline:
            search.rows.append(Alternative(name=str(mesh), status="not tried", why="the time was over"))
        else:
            search.run([judge(mesh)])
    return search.result()


class _Search:
    """Meshes planned so far: the best plan, and a row for each mesh."""

    def __init__(self, solve: Solve, deadline: float, gap: float, say: Callable[[str], None]) -> None:
        self.solve, self.deadline, self.gap, self.say = solve, deadline, gap, say
        self.best: Plan | None = None
        self.rows: list[Alternative] = []
        self.error: AutoparError | None = None
        self.total = 0

    def run(self, estimates: Sequence[Estimate]) -> None:
        """Plan the most promising mesh first, and no mesh that cannot be better than the best plan in hand."""
        for e in sorted(estimates, key=lambda e: e.guess_s):
            left = self.deadline - time.monotonic()
            name = str(e.mesh)
            if self.best is not None and e.bound_s > 0 and e.bound_s >= self.best.least_sum_s * (1 - self.gap):
                self.rows.append(Alternative(name=name, status="ruled out", bound_s=e.bound_s))
            elif left <= 0 and self.best is not None:
                self.rows.append(Alternative(name=name, status="not tried", bound_s=e.bound_s, why="the time was over"))
            else:
                self.say(f"planning the mesh {name}, {len(self.rows) + 1} of {self.total}")
                self.rows.append(self.plan(e, max(left / 2, LEAST_S)))

    def plan(self, e: Estimate, time_limit: float) -> Alternative:
        """The row of one mesh, which is planned."""
        name = str(e.mesh)
        try:
            found = self.solve(e.mesh, time_limit)
        except (InfeasibleError, SolverError, InputError) as error:
            self.error = error
            status = (
                "does not fit" if isinstance(error, InfeasibleError) else "no place" if isinstance(error, InputError) else "not planned"
            )
            return Alternative(name=name, status=status, bound_s=e.bound_s, why=error.what)  # type: ignore[arg-type]
        if self.best is None or found.cost.predicted_s < self.best.cost.predicted_s:
            self.best = found
        return Alternative(
            name=name,
            status="planned",
            step_s=found.cost.step_s,
            timeline_s=found.cost.timeline_s,
            bound_s=max(e.bound_s, found.bound_s),
            peak_bytes=found.cost.peak_bytes,
        )

    def result(self) -> Plan:
        if self.best is None:
            raise self.error or SolverError("no mesh has a plan")
        rows = sorted(self.rows, key=lambda r: (r.step_s is None, r.timeline_s or r.step_s or 0.0, r.bound_s, r.name))
        return self.best.beside(tuple(rows))
