"""The solver against exhaustive search, its certificate, its determinism and its limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from netmind_autopar.solver import milp, search
from netmind_autopar.solver.bound import Local, Relaxed
from netmind_autopar.solver.memory import Moments
from netmind_autopar.solver.presolve import reduce
from netmind_autopar.solver.problem import Consumer, Node, Problem, Value, evaluate, profile, seconds
from netmind_autopar.solver.search import least_peak, solve_problem
from netmind_autopar.solver.shard import solve_ilp


def brute_force(problem: Problem) -> tuple[float, tuple[int, ...] | None]:
    """The cheapest choice within the limit, by trying all."""
    best, found = math.inf, None
    for choice in itertools.product(*(range(len(node.labels)) for node in problem.nodes)):
        cost, peak, _ = evaluate(problem, choice)
        if cost < best and (problem.limit_bytes is None or peak <= problem.limit_bytes):
            best, found = cost, choice
    return best, found


def smallest_peak(problem: Problem) -> int:
    choices = itertools.product(*(range(len(node.labels)) for node in problem.nodes))
    found = [evaluate(problem, c) for c in choices]
    return min(peak for cost, peak, _ in found if cost < math.inf)


def random_problem(seed: int, nodes: int = 6) -> Problem:
    """A random DAG: shared groups, both phases, folded values, impossible conversions, states that are one layout."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, nodes)
    made = tuple(
        Node(f"n{i}", tuple(map(str, range(k))), rng.integers(0, 20, k) * 1e-3, rng.integers(0, 5, k)) for i, k in enumerate(sizes)
    )
    values = []
    for i in range(nodes - 1):
        p, q, count = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
        takers = sorted(rng.choice(np.arange(i, nodes), size=min(nodes - i, int(rng.integers(1, 4))), replace=False).tolist())
        consumers = tuple(Consumer(t, rng.integers(0, q, sizes[t]), int(rng.integers(0, 2))) for t in takers)
        seconds = rng.integers(0, 30, (p, q)) * 1e-3
        same = rng.random((p, q)) < 0.2
        seconds[same] = 0
        seconds[(rng.random((p, q)) < 0.05) & ~same] = math.inf
        produced = np.array([i * 2 + 14 * c for c in range(count)])
        used = produced[:, None] + 1 + np.array([2 * (t - i) for t in takers])[None, :]
        held = used + rng.integers(0, 3, used.shape)
        values.append(
            Value(
                f"v{i}",
                i,
                rng.integers(0, p, sizes[i]),
                consumers,
                seconds,
                same,
                rng.random(p) < 0.4,
                rng.integers(0, 40, p),
                rng.integers(0, 40, q),
                produced,
                used,
                held,
                room=rng.integers(0, 30, (p, q)) if rng.random() < 0.7 else None,
            )
        )
    return Problem(made, tuple(values), moments=32, fixed_bytes=3)


def limited(problem: Problem, seed: int) -> Problem:
    """With a limit somewhere between the least possible peak and the peak of the unlimited optimum (when they differ)."""
    _, choice = brute_force(problem)
    if choice is None:
        return problem
    low, high = smallest_peak(problem), evaluate(problem, choice)[1]
    limit = int(np.random.default_rng(seed).integers(low, max(high, low + 1)))
    return Problem(problem.nodes, problem.values, problem.moments, problem.fixed_bytes, limit)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("binding", [False, True])
def test_ilp_equals_brute_force(seed, binding):
    problem = random_problem(seed)
    if binding:
        problem = limited(problem, seed)
    best, _ = brute_force(problem)
    found = solve_ilp(problem, [range(len(n.labels)) for n in problem.nodes], time_limit=20, gap=1e-6, scale=0.05)
    if best == math.inf:
        assert found.choice is None and found.status == "infeasible"
        return
    assert found.seconds == pytest.approx(best, rel=1e-6, abs=1e-12) and found.status == "optimal"
    assert found.bound <= best * (1 + 1e-9)
    assert problem.limit_bytes is None or evaluate(problem, found.choice)[1] <= problem.limit_bytes


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("binding", [False, True])
def test_bounds_and_pruning_lose_nothing(seed, binding, monkeypatch):
    monkeypatch.setattr(search, "SMALL_CELLS", 0)  # so that memory is priced and strategies are pruned, however small the problem
    problem = random_problem(seed + 1000)
    if binding:
        problem = limited(problem, seed)
    best, _ = brute_force(problem)
    found = solve_problem(problem, gap=1e-5)
    if best == math.inf:
        assert found.status == "infeasible"
        return
    assert found.seconds == pytest.approx(best, rel=1e-6, abs=1e-12) and found.status == "optimal"
    assert found.bound <= best * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("seed", range(0, 50, 5))
def test_presolve_keeps_an_optimum(seed):
    problem = limited(random_problem(seed), seed)
    best, _ = brute_force(problem)
    kept = reduce(problem)
    if best == math.inf:
        return
    inside = [evaluate(problem, c) for c in itertools.product(*kept)]
    assert min(cost for cost, peak, _ in inside if problem.limit_bytes is None or peak <= problem.limit_bytes) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(50))
def test_costs_around_a_node_are_those_of_whole_plans(seed):
    """Priced memory included: what changes with one node's strategy is what changes in the whole plan."""
    problem = random_problem(seed + 4000)
    if not all(reduce(problem)):
        return
    rng = np.random.default_rng(seed)
    prices = {int(m): float(rng.random()) * 1e-3 for m in rng.choice(problem.moments, 4, replace=False)}
    local = Local(problem, reduce(problem), prices, Moments(problem), weight=0.5)

    def price(choice: list[int]) -> float:
        memory = profile(problem, choice)
        return 0.5 * seconds(problem, choice) + sum(p * int(memory[m]) for m, p in prices.items())

    choice = [int(rng.choice(ks)) for ks in local.kept]
    for i, ks in enumerate(local.kept):
        plans = [[*choice[:i], k, *choice[i + 1 :]] for k in ks]
        whole, around = np.array([price(p) for p in plans]), local.costs(i, choice)
        if np.isfinite(whole[0]) and np.isfinite(around[0]):
            assert around - around[0] == pytest.approx(whole - whole[0], rel=1e-9, abs=1e-12)
        assert (np.isfinite(whole) <= np.isfinite(around)).all()


@pytest.mark.parametrize("seed", range(20))
def test_rebalancing_keeps_the_bound_true_after_strategies_went(seed):
    problem = random_problem(seed + 5000)
    kept = reduce(problem)
    if not all(kept):
        return
    rng = np.random.default_rng(seed)
    relaxed, bounds = Relaxed(problem, kept, Moments(problem)), []
    smaller = tuple(tuple(sorted(rng.choice(ks, int(rng.integers(1, len(ks) + 1)), replace=False).tolist())) for ks in kept)
    for step in range(12):
        if step == 4:
            relaxed.restrict(smaller)
            bounds = []
        relaxed.rebalance()
        bounds.append(relaxed.bound())
        relaxed.sweep()
    best = min((seconds(problem, c) for c in itertools.product(*smaller)), default=math.inf)
    assert bounds[-1] <= best + 1e-12 and all(a <= b + 1e-12 for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("seed", range(20))
def test_least_peak_is_the_least(seed):
    problem = random_problem(seed + 2000)
    kept = reduce(problem)
    if not all(kept) or brute_force(problem)[0] == math.inf:
        return
    peak, bound, choice = least_peak(problem, kept, Moments(problem))
    assert evaluate(problem, choice)[1] == peak
    assert bound <= smallest_peak(problem) * (1 + 1e-6) and peak <= smallest_peak(problem) * (1 + 5.1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_cbc_agrees(seed, monkeypatch):
    problem = limited(random_problem(seed + 3000), seed)
    best, _ = brute_force(problem)
    real = milp.solve
    monkeypatch.setattr(milp, "solve", lambda *a, **k: real(*a, **{**k, "cbc": True}))
    assert solve_problem(problem, gap=1e-5).seconds == pytest.approx(best, rel=1e-5)


def test_time_limit_is_labelled_and_its_gap_is_true():
    """A knapsack-like problem, cut off at once: the status is feasible and the bound still holds."""
    rng = np.random.default_rng(0)
    nodes = tuple(Node(f"n{i}", tuple("abc"), rng.uniform(1, 2, 3), rng.integers(100, 1000, 3)) for i in range(60))
    problem = Problem(nodes, (), limit_bytes=60 * 420)
    keep = [range(3)] * 60
    start = tuple(int(np.argmin(n.resident)) for n in nodes)
    cut = solve_ilp(problem, keep, time_limit=0.0, gap=0.0, incumbent=start)
    best = solve_ilp(problem, keep, time_limit=20, gap=1e-4)
    assert best.status == "optimal" and evaluate(problem, best.choice)[1] <= problem.limit_bytes
    assert cut.bound <= best.seconds <= cut.seconds
    assert cut.status == ("optimal" if cut.seconds - cut.bound <= 1e-15 else "feasible")
