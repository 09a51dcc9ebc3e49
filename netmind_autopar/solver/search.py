"""From a problem to a proven plan: bound and prune, price memory where it binds, then the ILP over what is left.

    1. presolve          strategies that are never needed go                                     presolve.reduce
    2. bound and prune   without the memory limit                                                _tighten
    3. ILP               without the limit; if its plan fits, done
    4. price memory      λ on the crowded moments until plans fit; prune again with their cost   _price_memory
    5. ILP               with memory rows, over the strategies left                              shard.solve_ilp
    6. least peak        when nothing fits: how little memory is possible                        least_peak

Where too many strategies are left, the ILP looks at those whose excess over the bound is below a threshold; the others cost at
least bound + threshold, so the certificate stays true: it is the smaller of both.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from . import milp
from .bound import Local, Relaxed, prune
from .memory import Moments, crowded
from .presolve import Kept, cells, merged, reduce
from .problem import Choice, Problem, evaluate, profile
from .progress import Goal, State
from .shard import Shard, Solution, dual_prices, solve_ilp

MOST_CELLS = 16_000  # pairs of states that the ILP is built for
PROBE_CELLS = 8_000  # and those of an ILP on the way,
PROBES = 4  # of so many
STALLS = 2e-2  # of the gap: bounding that gains less between two plans has come to its end
PRUNE_SWEEPS = 4  # after so many sweeps a plan is tried, and what it rules out goes
FAR = 1.5  # of the bytes wished for: what is far more
SMALL_CELLS = 1_500  # an ILP of this size is solved as it is
DUAL_CELLS = (4_000, 8_000, 12_000)  # of the LPs that price memory
WITHIN_CELLS = 3_000  # of an ILP with memory rows on the way
ROUNDS = 4  # of pricing memory and solving that ILP
LAST_CELLS = 9_000  # of the last ILP with memory rows,
PEAK_ROUNDS = 20  # of the LP or ILP that looks for the least peak
PEAK_GAP = 5e-3  # relative, at which the least peak counts as found
PEAK_TIME_S = 300.0  # a net for what node limits do not catch
TRIES = 4_000  # plans counted out to make one that just fits faster
NODES = 30  # which branches at most this often


def solve_problem(
    problem: Problem, *, allowed: Kept | None = None, time_limit: float = 60.0, gap: float = 1e-4, wish: int | None = None
) -> Solution:
    """The cheapest choice within the limit, with a bound that holds. Status "infeasible" is proven, "unknown" is not.

    wish: bytes; where the limit is none, and plans near the best need far more than this, one of them will do.
    """
    deadline = time.monotonic() + time_limit
    problem = merged(problem)
    kept = reduce(problem, allowed)
    if not all(kept):
        return Solution(None, math.inf, math.inf, milp.INFEASIBLE)
    free = replace(problem, limit_bytes=None)
    goal = Goal(gap, far=FAR * wish if wish is not None and problem.limit_bytes is None else math.inf)
    state = _tighten(free, kept, goal, deadline)
    if not goal.met(state) and goal.is_far(free, state):
        return Solution(state.best, state.best_s, state.bound, milp.FEASIBLE)
    first = _finish(free, state, gap, deadline)
    if first.choice is None or problem.limit_bytes is None or evaluate(problem, first.choice)[1] <= problem.limit_bytes:
        return first
    return _within_limit(problem, kept, first, gap, deadline)


def quick(
    problem: Problem, allowed: Kept | None, deadline: float, gap: float = 1e-3, *, shift: float = 0.0, near: Choice | None = None
) -> Solution:
    """A good choice without an integer program, and a bound that holds; the limit is not looked at.

    shift: what is added to the objective, so that `gap` is relative to the seconds of a plan. near: a choice to start from."""
    problem = merged(problem)
    kept = reduce(problem, allowed)
    if not all(kept):
        return Solution(None, math.inf, math.inf, milp.INFEASIBLE)
    state = _tighten(replace(problem, limit_bytes=None), kept, Goal(gap, shift), deadline, rounds=1, near=near)
    return Solution(state.best, state.best_s, min(state.bound, state.best_s), milp.FEASIBLE)


def _tighten(
    problem: Problem, kept: Kept, goal: Goal, deadline: float, rounds: int = 25, sweeps: int = 20, near: Choice | None = None
) -> State:
    """Bound, plans and pruning without memory, until what is left suits the ILP."""
    state, moments = State(kept), Moments(problem)
    prices = dict(problem.prices)
    relaxed, local = Relaxed(problem, kept, moments), Local(problem, kept, prices, moments)
    relaxed.reprice(prices, 0.0)
    if near is not None:
        state.offer(problem, local.descend(near))
    probes = 0
    for _ in range(rounds):
        stalls = _round(problem, state, relaxed, local, goal, sweeps)
        if goal.met(state) or goal.is_far(problem, state) or time.monotonic() > deadline or cells(problem, state.kept) <= MOST_CELLS:
            break
        if rounds > 1 and stalls:
            probes += 1
            if probes > PROBES or not _probe(problem, state, deadline):
                break
            _prune(state, relaxed, state.excess or [], state.base)
            local.kept = state.kept
    return state


def _round(problem: Problem, state: State, relaxed: Relaxed, local: Local, goal: Goal, sweeps: int) -> bool:
    """So many sweeps, fewer when they no longer help. True then."""
    for sweep in range(sweeps):
        relaxed.rebalance()
        if sweep % PRUNE_SWEEPS != PRUNE_SWEEPS - 1:
            relaxed.sweep()
            continue
        before = relaxed.bound()
        choice, excess = relaxed.sweep()
        known, gain = state.best_s, before - state.base
        state.offer(problem, local.descend(choice))
        if before > state.base or state.best_s < known:
            state.bound, state.base, state.excess = before, before, excess
            _prune(state, relaxed, excess, before)
            local.kept = state.kept
        if goal.met(state):
            break
        if state.best_s == known and gain < STALLS * (state.best_s - before):
            return True
    return False


def _prune(state: State, relaxed: Relaxed, excess: list[np.ndarray], bound: float) -> None:
    """Drop what `excess` above `bound` rules out, here and in the relaxation."""
    smaller = prune(relaxed.kept, excess, bound, state.best_s)
    if state.excess is not None:
        state.excess = _filtered(state.excess, state.kept, smaller)
    relaxed.restrict(smaller)
    state.kept = smaller


def _probe(problem: Problem, state: State, deadline: float) -> bool:
    """Whether there is a better plan from the ILP over the most promising strategies: the cheaper the plan in hand, the more is pruned."""
    kept, _ = _narrow(problem, state, PROBE_CELLS)
    left = max(deadline - time.monotonic(), 1.0)
    found = solve_ilp(problem, kept, time_limit=left, gap=1e-3, scale=state.scale, incumbent=state.best, nodes=NODES)
    known = state.best_s
    if found.choice is not None:
        state.offer(problem, found.choice)
    return state.best_s < known


def _filtered(excess: list[np.ndarray], old: Kept, new: Kept) -> list[np.ndarray]:
    return [e[[ks.index(k) for k in stay]] for e, ks, stay in zip(excess, old, new, strict=True)]


def _finish(
    problem: Problem,
    state: State,
    gap: float,
    deadline: float,
    moments: tuple[int, ...] = (),
    *,
    most: int = MOST_CELLS,
    nodes: int | None = None,
) -> Solution:
    """The ILP over what is left, narrowed when that is too much."""
    kept, threshold = _narrow(problem, state, most)
    left = max(deadline - time.monotonic(), 1.0)
    found = solve_ilp(problem, kept, time_limit=left, gap=gap, scale=state.scale, incumbent=state.best, moments=moments, nodes=nodes)
    bound = max(state.bound, min(found.bound, state.base + threshold))
    if found.choice is None:
        status = found.status if threshold == math.inf else milp.UNKNOWN
        return replace(found, bound=bound, status=status)
    bound = min(bound, found.seconds)
    closed = found.seconds - bound <= gap * abs(found.seconds) + 1e-15
    return replace(found, bound=bound, status=milp.OPTIMAL if closed else milp.FEASIBLE)


def _narrow(problem: Problem, state: State, most: int = MOST_CELLS) -> tuple[Kept, float]:
    """Strategies for the ILP, and the least excess among those left out."""
    if state.excess is None or cells(problem, state.kept) <= most:
        return state.kept, math.inf
    low, high = 0.0, max(float(e.max()) for e in state.excess)
    for _ in range(20):
        middle = (low + high) / 2
        if cells(problem, _below(state, middle)) <= most:
            low = middle
        else:
            high = middle
    return _below(state, low), low


def _below(state: State, threshold: float) -> Kept:
    best = state.best or (-1,) * len(state.kept)
    assert state.excess is not None
    return tuple(
        tuple(k for k, e in zip(ks, over, strict=True) if e <= threshold or k == own)
        for ks, over, own in zip(state.kept, state.excess, best, strict=True)
    )


def _within_limit(problem: Problem, kept: Kept, first: Solution, gap: float, deadline: float) -> Solution:
    """The limit binds: `first` is the best plan without it."""
    assert problem.limit_bytes is not None and first.choice is not None
    state, moments = State(kept, bound=first.bound), Moments(problem)
    if cells(problem, kept) <= SMALL_CELLS:  # no need to prune
        found = _finish(problem, state, gap, deadline)
        if found.choice is not None:
            return found
    relaxed = Relaxed(problem, kept, moments)
    crowd = _price_memory(problem, state, relaxed, first, deadline)
    for round_ in range(ROUNDS):
        before = state.best_s - state.bound
        _sharpen(problem, state, relaxed, crowd, first.seconds, DUAL_CELLS[min(round_, len(DUAL_CELLS) - 1)], deadline)
        if round_ and _settled(problem, state, before, gap):
            break
        _probe_within(problem, state, crowd, deadline)
        if state.best is None:
            peak, least, choice = least_peak(problem, kept, moments)
            if choice is None or peak > problem.limit_bytes:
                proven = least > problem.limit_bytes
                return Solution(choice, math.inf, first.bound, milp.INFEASIBLE if proven else milp.UNKNOWN, least_bytes=int(least))
            state.offer(problem, _improved(problem, kept, choice, moments))
        if time.monotonic() > deadline:
            break
    return _finish(problem, state, gap, deadline, tuple(sorted(crowd)), most=LAST_CELLS, nodes=NODES)


def _improved(problem: Problem, kept: Kept, choice: Choice, moments: Moments) -> Choice:
    """A choice that fits, made faster one node at a time as far as it still fits; at most `TRIES` plans are counted out."""
    local, now, tries = Local(problem, kept, {}, moments), list(choice), 0
    limit = problem.limit_bytes or 0
    for _ in range(3):
        before = list(now)
        for i, ks in enumerate(kept):
            old, costs = now[i], []
            if len(ks) > 1:
                costs = list(zip(local.costs(i, now).tolist(), ks, strict=True))
            mine = next((cost for cost, k in costs if k == old), 0.0)
            for cost, k in sorted(costs):
                if cost >= mine * (1 - 1e-9) or tries >= TRIES:
                    break
                now[i], tries = k, tries + 1
                if int(profile(problem, now).max()) <= limit:
                    break
                now[i] = old
        if now == before or tries >= TRIES:
            break
    return tuple(now)


def _settled(problem: Problem, state: State, before: float, gap: float) -> bool:
    """True when another round of pricing is not worth it: closed, small enough for the ILP, or hardly any progress."""
    now = state.best_s - state.bound
    if state.best is None:
        return False
    return now <= gap * abs(state.best_s) or cells(problem, state.kept) <= WITHIN_CELLS or now > 0.8 * before


def _probe_within(problem: Problem, state: State, crowd: set[int], deadline: float) -> None:
    """A plan that fits from the ILP over the most promising strategies."""
    kept, _ = _narrow(problem, state, WITHIN_CELLS)
    left = max(deadline - time.monotonic(), 1.0)
    more = {"moments": sorted(crowd), "nodes": 20, "rounds": 8, "crowd": crowd}
    found = solve_ilp(problem, kept, time_limit=left, gap=1e-3, scale=state.scale, incumbent=state.best, **more)  # type: ignore[arg-type]
    if found.choice is not None:
        state.offer(problem, found.choice)


def _price_memory(problem: Problem, state: State, relaxed: Relaxed, first: Solution, deadline: float) -> set[int]:
    """Rough prices of memory: up where there is too little, down where there is plenty. Returns the moments that mattered."""
    limit, unit = problem.limit_bytes or 0, first.seconds / max(problem.limit_bytes or 0, 1)
    prices: dict[int, float] = {}
    crowd: set[int] = set()
    choice: Choice = first.choice or ()
    for round_ in range(3):
        _move_prices(prices, profile(problem, choice), limit, unit, 2.0 / (1.0 + 0.5 * round_))
        crowd |= set(prices)
        choice = _dual_round(problem, state, relaxed, prices, 40 if round_ == 0 else 15)
        if time.monotonic() > deadline:
            break
    return crowd


def _sharpen(problem: Problem, state: State, relaxed: Relaxed, crowd: set[int], scale: float, most: int, deadline: float) -> None:
    """Exact prices, the duals of the memory rows in the LP over the promising strategies; adds to `crowd` what their plan violates."""
    kept, _ = _narrow(problem, state, most)
    left = max(deadline - time.monotonic(), 1.0)
    found = dual_prices(problem, kept, sorted(crowd), scale=scale or 1.0, time_limit=left)
    choice = _dual_round(problem, state, relaxed, found or dict(relaxed.prices), 100)
    crowd |= set(crowded(profile(problem, choice), problem.limit_bytes or 0, crowd))


def _dual_round(problem: Problem, state: State, relaxed: Relaxed, prices: dict[int, float], sweeps: int) -> Choice:
    """Bound, decode and prune under these prices. Returns the plan that the prices ask for."""
    relaxed.reprice(prices, problem.limit_bytes or 0)
    local = Local(problem, relaxed.kept, prices, relaxed.moments)
    for _ in range(sweeps):
        relaxed.rebalance()
        before = relaxed.bound()
        choice, excess = relaxed.sweep()
    choice = local.descend(choice)
    for candidate in (choice, *((local.descend(state.best),) if state.best else ())):
        state.offer(problem, candidate)
    if before > state.base:
        state.base, state.excess = before, excess
        state.bound = max(state.bound, before)
    if state.best is not None:
        _prune(state, relaxed, excess, before)
    return choice


def _move_prices(prices: dict[int, float], memory: np.ndarray, limit: int, unit: float, step: float) -> None:
    """Dearer where the last plan had too much, cheaper where it had too little; moments that are newly crowded get a price."""
    for m in prices:
        prices[m] *= math.exp(step * float(np.clip(8.0 * (memory[m] - limit) / max(limit, 1), -1.0, 1.0)))
    for m in crowded(memory, limit, set(prices), most=2):
        prices[m] = 0.2 * unit if not prices else max(unit * 0.02, float(np.median(list(prices.values()))))


def least_peak(problem: Problem, kept: Kept, moments: Moments) -> tuple[int, float, Choice | None]:
    """(smallest peak found, proven lower bound on the peak, the choice that has it).

    Depends on the problem alone, neither on its limit nor on the time: a limit of the peak that it names works.
    """
    best, found, bound = math.inf, None, 0.0
    weights: dict[int, float] = {}
    choice: Choice = tuple(ks[0] for ks in kept)
    relaxed = Relaxed(problem, kept, moments, weight=0.0)
    for _ in range(30):
        memory = profile(problem, choice)
        top = float(memory.max())
        weights = {m: w * math.exp(6.0 * (float(memory[m]) - top) / max(top, 1.0)) for m, w in weights.items()}
        for m in crowded(memory, int(0.98 * top), set(weights), most=2):
            weights[m] = max(weights.values(), default=1.0)
        total = sum(weights.values())
        weights = {m: w / total for m, w in weights.items() if w > 1e-6 * total}
        relaxed.reprice(weights, 0.0)
        for _ in range(8):
            bound = max(bound, relaxed.bound())
            choice, _ = relaxed.sweep()
        choice = Local(problem, kept, weights, moments, weight=1e-9).descend(choice)
        cost, peak, _ = evaluate(problem, choice)
        if peak < best and cost < math.inf:
            best, found = peak, choice
        if best - bound <= PEAK_GAP * best:
            break
    if best - bound > PEAK_GAP * best and cells(problem, kept) <= MOST_CELLS:
        best, bound, found = _peak_ilp(problem, kept, moments, sorted(weights), (best, bound, found))
    return (int(best) if best < math.inf else 0), bound, found


def _peak_ilp(
    problem: Problem, kept: Kept, moments: Moments, crowd: list[int], known: tuple[float, float, Choice | None]
) -> tuple[float, float, Choice | None]:
    """Minimise the peak: rounds of the LP, which find the moments that matter and plans near its prices, then of a small ILP."""
    best, bound, found = known
    unit = max(bound, 1.0)
    shard = Shard(problem, kept, peak_only=True)
    rows = {m: shard.memory_row(m, unit) for m in crowd}
    relax, whole = True, cells(problem, kept) <= SMALL_CELLS
    for _ in range(PEAK_ROUNDS):
        before = best, bound
        result = milp.solve(shard.model, time_limit=PEAK_TIME_S, gap=PEAK_GAP / 2, nodes=NODES, relax=relax)
        bound = max(bound, result.bound * unit if result.bound > -math.inf else 0.0)
        if result.values is None:
            break
        choices = [shard.read(result.values)]
        if result.duals is not None and (total := sum(result.duals[row] for row in rows.values())) > 0:
            weights = {m: float(result.duals[row]) / total for m, row in rows.items() if result.duals[row] > 1e-6 * total}
            choices.append(Local(problem, kept, weights, moments, weight=1e-9).descend(choices[0]))
        fresh: list[int] = []
        for choice in choices:
            cost, peak, _ = evaluate(problem, choice)
            if peak < best and cost < math.inf:
                best, found = peak, choice
            fresh += crowded(profile(problem, choice), int(bound), {*rows, *fresh})
        if best - bound <= PEAK_GAP * best or not (fresh or relax):
            break
        if (best, bound) == before:  # the LP says no more
            if not (whole and relax):
                break
            relax = False
        rows |= {m: shard.memory_row(m, unit) for m in fresh}
    return best, min(bound, best), found
