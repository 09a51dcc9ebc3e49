"""Plain problems of choices: equal to brute force, bounds that hold, files of the contest."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from netmind_autopar.ir.errors import InputError
from netmind_autopar.solver.pairwise import columns
from netmind_autopar.solver.pairwise import solve as solving
from netmind_autopar.solver.pairwise.contract import contract
from netmind_autopar.solver.pairwise.exact import Program, settle
from netmind_autopar.solver.pairwise.field import Field
from netmind_autopar.solver.pairwise.instance import Instance, evaluate, read
from netmind_autopar.solver.pairwise.messages import Messages
from netmind_autopar.solver.pairwise.solve import solve
from netmind_autopar.solver.pairwise.trees import improve

EXAMPLE = {
    "problem": {
        "name": "five",
        "nodes": {
            "intervals": [[30, 70], [40, 70], [50, 120], [110, 140], [110, 150]],
            "costs": [[15], [55, 65], [25, 45, 35], [85, 75], [95]],
            "usages": [[10], [25, 25], [15, 20, 15], [10, 10], [15]],
        },
        "edges": {
            "nodes": [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]],
            "costs": [[30, 40], [50, 10, 40], [90, 10, 20, 80], [60, 20, 30], [70, 60]],
        },
        "usage_limit": 50,
    }
}


def drawn(seed: int, nodes: int = 7, tight: bool = True) -> Instance:
    """A random problem: forbidden pairs, followers, tables that are sums, nodes that live at no moment, and a limit that binds."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 5, nodes)
    costs = tuple(rng.integers(0, 20, n).astype(float) for n in size)
    usages = tuple(rng.integers(0, 9, n).astype(float) for n in size)
    start = rng.integers(0, 10, nodes)
    intervals = np.stack([start, start + rng.integers(0, 8, nodes)], 1)
    edges, tables = [], []
    for i, j in itertools.combinations(range(nodes), 2):
        if rng.random() < 0.4:
            table = rng.integers(0, 20, (size[i], size[j])).astype(float)
            kind = rng.random()
            if kind < 0.3:
                table[rng.random(table.shape) < 0.4] = np.inf
            elif kind < 0.5:  # j follows i
                table[:] = np.inf
                table[np.arange(size[i]), rng.integers(0, size[j], size[i])] = rng.integers(0, 5)
            elif kind < 0.6:
                table = rng.integers(0, 9, (size[i], 1)) + rng.integers(0, 9, (1, size[j])).astype(float)
            edges.append((i, j))
            tables.append(table)
    bare = Instance("drawn", costs, usages, intervals, tuple(edges), tuple(tables), None)
    peaks = sorted(evaluate(bare, choice)[1] for choice in itertools.product(*(range(n) for n in size)))
    limit = peaks[len(peaks) // 4] if tight else peaks[-1]
    return Instance("drawn", costs, usages, intervals, tuple(edges), tuple(tables), float(limit))


def brute(instance: Instance) -> float:
    best = np.inf
    for choice in itertools.product(*(range(len(c)) for c in instance.costs)):
        cost, peak = evaluate(instance, choice)
        if peak <= instance.limit:
            best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(50))
def test_equal_to_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = drawn(seed, tight=seed % 5 != 0)
    best = brute(instance)
    if seed % 2:  # the way of large problems: messages, linear programs over a few strategies, and what is possible settled at the end
        monkeypatch.setattr(solving, "SMALL", -1)
    answer = solve(instance, time_limit=20.0)
    if best == np.inf:
        assert answer.choice is None and answer.status == "infeasible"
        return
    assert answer.bound <= best
    assert answer.choice is not None and answer.cost == best and answer.status == "optimal"
    assert evaluate(instance, answer.choice) == (answer.cost, answer.peak) and answer.peak <= instance.limit


@pytest.mark.parametrize("seed", range(20))
def test_without_settling(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is settled by an integer program over everything: plans fit, bounds hold, and nearly all plans are the best ones."""
    instance = drawn(seed, nodes=9)
    best = brute(instance)
    monkeypatch.setattr(solving, "SMALL", -1)
    monkeypatch.setattr(columns, "SETTLED", -1)
    monkeypatch.setattr(columns, "SWEEPS", 5)
    answer = solve(instance, time_limit=20.0)
    assert answer.bound <= best
    assert (answer.choice is not None) == (best < np.inf)
    if answer.choice is not None:
        assert best <= answer.cost <= 1.3 * best + 3.0
        assert evaluate(instance, answer.choice) == (answer.cost, answer.peak) and answer.peak <= instance.limit


def test_contraction_loses_nothing() -> None:
    for seed in range(40):
        instance = drawn(seed)
        problem, field = contract(instance), None
        costs = {}
        if problem.feasible:
            field = Field(problem)
            for choice in itertools.product(*(range(len(c)) for c in problem.costs)):
                whole = problem.expand(list(choice))
                cost, peak = evaluate(instance, whole)
                assert field.cost(choice) == pytest.approx(cost) or cost == np.inf
                assert float(field.profile(field.chosen(choice)).max(initial=0.0)) == pytest.approx(peak)
                if peak <= instance.limit:
                    costs[tuple(whole)] = cost
        assert min(costs.values(), default=np.inf) == pytest.approx(brute(instance)), seed


def prepared(seed: int) -> tuple[Instance, Field, list[tuple[float, float, tuple[int, ...]]]] | None:
    """An instance, its field, and (cost, peak, choice) of every choice of what contraction leaves; None when it leaves nothing."""
    instance = drawn(seed)
    problem = contract(instance)
    if not problem.feasible or not problem.costs:
        return None
    field, every = Field(problem), []
    for choice in itertools.product(*(range(len(c)) for c in problem.costs)):
        every.append((field.cost(choice), float(field.profile(field.chosen(choice)).max(initial=0.0)), choice))
    return instance, field, every


def test_bounds_and_excesses_hold_and_forests_only_improve() -> None:
    reached = 0
    for seed in range(30):
        if (found := prepared(seed)) is None:
            continue
        instance, field, every = found
        fitting = [(cost, choice) for cost, peak, choice in every if peak <= field.limit and cost < np.inf]
        messages, rng, last = Messages(field), np.random.default_rng(seed), -np.inf
        best = min((cost for cost, _ in fitting), default=np.inf)
        for turn in range(9):
            if turn % 3 == 0:
                prices = {int(m): float(rng.random()) for m in rng.integers(0, instance.moments, 3)} if turn else {}
                messages.reprice(prices)
                last = -np.inf
            before, bound = messages.bound, messages.sweep()
            assert bound <= best + 1e-6 and bound >= last - 1e-9
            last = bound
            for cost, choice in fitting if before > -np.inf else ():
                assert cost >= before + max(messages.excess[field.offset[:-1] + choice]) - 1e-6
            choice = messages.decode()
            own = field.split(field.costs + messages.memory)
            priced = [
                field.cost(c) + float(messages.memory @ field.chosen(c))
                for c in (choice, improve(field, choice, own, rng.permutation(field.n)))
            ]
            assert priced[1] <= priced[0] + 1e-9 or priced[0] == np.inf
        free = min(cost for cost, _, _ in every)
        messages.reprice({})
        for _ in range(50):
            messages.sweep()
        reached += messages.bound >= free - 1e-6
    assert reached >= 15  # without a limit the bound is nearly always the optimum


def test_reduced_costs_are_the_costs() -> None:
    for seed in range(20):
        if (found := prepared(seed)) is None:
            continue
        _, field, every = found
        messages = Messages(field)
        messages.reprice({1: 0.5, 3: 2.0})
        for _ in range(4):
            messages.sweep()
        node, low, high = messages.reduced()
        least = 0.0
        for cost, _, choice in every[:200]:
            total = float(node[field.offset[:-1] + choice].sum()) - float(messages.memory @ field.chosen(choice)) + field.fixed
            for n, table in enumerate(field.problem.tables):
                a, b = messages.low[n], messages.high[n]
                left = table[choice[field.ends[n, 0]], choice[field.ends[n, 1]]]
                left = left - low[messages.low_at[n] + choice[a]] - high[messages.high_at[n] + choice[b]]
                least = min(least, left)
                total += left
            assert total == pytest.approx(cost, abs=1e-6) or cost == np.inf
        assert least >= -1e-9


def test_relaxations_and_integer_programs() -> None:
    """Over all strategies: the relaxation is below the best choice, its prices prove as much by messages, the integer program finds it."""
    for seed in range(25):
        if (found := prepared(seed)) is None:
            continue
        _, field, every = found
        best = min((cost for cost, peak, _ in every if peak <= field.limit), default=np.inf)
        keep = [np.arange(len(c)) for c in field.problem.costs]
        messages = Messages(field)
        messages.sweep()
        program = Program(messages, keep, 1e4)
        relaxed = program.relax(time.monotonic() + 10.0)
        assert relaxed is not None and relaxed.cost <= best + 1e-6
        whole = program.whole(time.monotonic() + 10.0, gap=0.0)
        assert whole.cost == best and whole.bound <= best and (whole.choice is None) == (best == np.inf)
        if relaxed.over == 0.0 and not field.forbidden:
            messages.reprice(relaxed.prices)
            for _ in range(100):
                messages.sweep()
            assert messages.bound <= relaxed.cost + 1e-6 * abs(relaxed.cost) + 1e-6
        settled = settle(messages, keep, (), time.monotonic() + 10.0, gap=0.0, cost=best)
        assert settled.cost == best


def test_same_answer_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "SMALL", -1)
    monkeypatch.setattr(columns, "SETTLED", -1)
    answers = [solve(drawn(11, nodes=9), time_limit=20.0) for _ in range(2)]
    assert answers[0].choice == answers[1].choice and answers[0].bound == answers[1].bound


def test_nothing_fits_is_said() -> None:
    instance = drawn(3)
    impossible = Instance("none", instance.costs, instance.usages, instance.intervals, instance.edges, instance.tables, -1.0)
    answer = solve(impossible, time_limit=2.0)
    assert answer.choice is None and answer.status == "infeasible"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "iopddl.py"
    spec = importlib.util.spec_from_file_location("iopddl", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    instance, out = tmp_path / "five.json.gz", tmp_path / "solution.json"
    with gzip.open(instance, "wt") as file:
        json.dump(EXAMPLE, file)
    assert module.main([str(instance), "--time-limit", "10", "--out", str(out)]) == 0
    line = json.loads(capsys.readouterr().out)
    best = brute(read(instance))
    assert line["feasible"] and line["cost"] == best and line["bound"] <= best
    assert module.recount(instance, json.loads(out.read_text()))[0] == best
    (tmp_path / "bad.json").write_text('{"problem": {}}')
    assert module.main([str(tmp_path / "bad.json")]) == 2
    assert "no instance" in capsys.readouterr().err
    assert module.main([str(tmp_path / "absent.json")]) == 2


def test_files_that_are_none(tmp_path: Path) -> None:
    for text in ("", "[]", '{"problem": {"nodes": {"intervals": [], "costs": [[1]], "usages": [[1, 2]]}}}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(InputError):
            read(path)
