"""Plain problems of choices: equal to brute force, bounds that hold, files of the contest."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from netmind_autopar.ir.errors import InputError
from netmind_autopar.solver.pairwise import solve as solving
from netmind_autopar.solver.pairwise.contract import contract
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
    if seed % 2:  # the way of large problems: messages, forests, and the integer program over a few plans
        monkeypatch.setattr(solving, "SMALL", 40)
    answer = solve(instance, time_limit=0.5 if seed % 2 else 20.0)
    if best == np.inf:
        assert answer.choice is None
        return
    assert answer.bound <= best * (1 + 1e-6) + 1e-6
    if seed % 2:
        assert answer.choice is None or answer.cost >= best
    else:
        assert answer.choice is not None and answer.cost == best and answer.status == "optimal"
    if answer.choice is not None:
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


def test_bounds_hold_and_forests_only_improve() -> None:
    for seed in range(30):
        instance = drawn(seed)
        problem = contract(instance)
        best = brute(instance)
        if not problem.feasible or not problem.costs or best == np.inf:
            continue
        field = Field(problem)
        messages = Messages(field)
        rng = np.random.default_rng(seed)
        for _ in range(3):
            choice = messages.sweep()
            assert messages.bound() <= best + 1e-6
            prices = {int(m): float(rng.random()) for m in rng.integers(0, instance.moments, 3)}
            messages.reprice(prices)
            own = field.split(field.costs + field.memory_costs(prices))
            before = field.cost(choice) + float(field.memory_costs(prices) @ field.chosen(choice))
            better = improve(field, choice, own, [int(i) for i in rng.permutation(field.n)])
            after = field.cost(better) + float(field.memory_costs(prices) @ field.chosen(better))
            assert after <= before + 1e-9 or before == np.inf


def test_nothing_fits_is_said() -> None:
    instance = drawn(3)
    impossible = Instance("none", instance.costs, instance.usages, instance.intervals, instance.edges, instance.tables, -1.0)
    assert solve(impossible, time_limit=2.0).choice is None


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
