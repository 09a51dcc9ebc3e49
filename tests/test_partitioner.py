"""Recomputation against torch's min-cut partitioner: the comparison is fair, and ours runs no more again at equal peak."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import partitioner
from partitioner import Counted, Subject

from netmind_autopar.ir.program import Program, is_getitem
from netmind_autopar.solver.replay import rewritten
from netmind_autopar.solver.saving import decide
from netmind_autopar.solver.saving.border import Apart, border, labels
from netmind_autopar.solver.saving.cut import Cut
from netmind_autopar.solver.saving.mix import fit, least
from netmind_autopar.solver.saving.tape import Saved, Tape

BUDGETS = (0.3, 0.6, 0.9)


@functools.cache
def small() -> Subject:
    return partitioner.subject(*partitioner.gpt2(2))


@functools.cache
def torchs(budget: float) -> Program:
    return partitioner.partitioned(small().program, budget)


def as_saved(on: Subject, program: Program) -> Saved:
    """Torch's decision in the planner's words: what forward no longer does, or does twice, runs again."""
    there = {node.name: node.meta.get("phase") for node in program.graph.nodes}
    recompute: dict[int, frozenset[int]] = {}
    for n, (kind, node) in enumerate(zip(on.built.kinds, on.built.problem.nodes, strict=True)):
        again = {i for i, name in enumerate(kind.members) if f"{name}_again" in there or there.get(name) == "backward"}
        if node.again and kind.role == "op" and again:
            recompute[n] = frozenset(again)
    return Saved(recompute)


@pytest.mark.parametrize("budget", BUDGETS)
def test_torchs_program_computes_the_same_ops(budget: float) -> None:
    """Forward and backward together run every op at least once, but for those that were the same twice; twins stand in backward."""
    on, program = small(), torchs(budget)
    twins = {n.meta["again"] for n in program.graph.nodes if "again" in n.meta}
    there = {n.name for n in program.graph.nodes if "again" not in n.meta}
    lost = [n for n in on.program.graph.nodes if n.name not in there and n.op == "call_function" and not is_getitem(n)]
    assert twins and twins <= there
    assert sum(on.each[n.name] for n in lost) < 0.01 * sum(on.each.values())
    assert len(program.outputs) == len(on.program.outputs)


@pytest.mark.parametrize("budget", BUDGETS)
def test_both_sides_are_counted_alike(budget: float) -> None:
    """The planner's own count of torch's decision is what the program that torch makes takes."""
    on, program = small(), torchs(budget)
    assert on.first.choice is not None
    run = Tape(on.built.problem, on.first.choice).run(as_saved(on, program))
    counted = partitioner.torch_decided(on, budget, "flops")
    assert run.peak == pytest.approx(counted.peak, rel=1e-3)
    assert run.again_s == pytest.approx(counted.again_s, rel=1e-2)


@pytest.mark.parametrize(("by", "budgets"), [("flops", BUDGETS), ("seconds", (0.6,))])
def test_at_equal_peak_no_more_runs_again(by: str, budgets: tuple[float, ...]) -> None:
    rows = list(partitioner.against_torch(small(), budgets, (by,)))
    for row in rows:
        print(partitioner._line(row))
    found = partitioner.verdict(rows, [])
    assert found["planned"] and found["never_above"] and found["least_ratio"] >= 1.0 and found["least_used"] >= 0.98


def test_the_layer_at_the_border_fills_what_is_left() -> None:
    """Whole numbers for single layers: within the limit, never slower, and somewhere faster than whole layers are."""
    on = small()
    problem = replace(on.built.problem, host_bytes_s=0.0)
    assert on.first.choice is not None
    tape = Tape(problem, on.first.choice)
    cut = Cut(tape)
    low, high = least(tape, cut)[1].peak, tape.run().peak
    faster = 0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        limit = int(low + share * (high - low))
        found = fit(tape, cut, limit)
        assert found is not None
        saved, run = border(tape, found.saved, found.run, limit)
        assert run.peak <= limit and run.seconds <= found.run.seconds
        assert tape.run(saved).seconds == run.seconds
        faster += run.seconds < found.run.seconds * (1 - 1e-6)
    assert faster


def test_groups_of_layers_are_decided_apart() -> None:
    """Every op that may run again is in one part, and no part is in two groups."""
    on = small()
    assert on.first.choice is not None
    cut = Cut(Tape(on.built.problem, on.first.choice))
    assert labels(cut, Saved({0: frozenset([0])})) == [1, 2]
    apart = Apart(cut.tape, [1, 2], cut)
    assert sorted(op.moment for part in apart.parts for op in part.ops) == sorted(op.moment for part in cut.parts for op in part.ops)
    assert all(len({apart.layer(op) for op in part.ops}) == 1 for part in apart.parts)


def test_a_planner_that_runs_every_block_again_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _verdict(monkeypatch, _everything)["least_ratio"] < 1.0


def test_a_planner_that_ignores_the_limit_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _verdict(monkeypatch, lambda on, limit: replace(on.keep_all, again_s=1e-9))["never_above"]


def _verdict(monkeypatch: pytest.MonkeyPatch, planner: Callable[[Subject, int], Counted]) -> dict:
    monkeypatch.setattr(partitioner, "planned", planner)
    return partitioner.verdict(list(partitioner.against_torch(small(), (0.9,), ("flops",))), [])


def _everything(on: Subject, limit: int) -> Counted:
    every = Saved({n: frozenset(range(len(node.moments))) for n, node in enumerate(on.built.problem.nodes) if node.again})
    last = on.built.problem.forward_end
    ranks = {n: frozenset(r for r in rs if on.built.problem.nodes[n].moments[r] <= last) for n, rs in every.recompute.items()}
    names = decide.entries(on.built.problem, Saved({n: r for n, r in ranks.items() if r}))[0]
    new = rewritten(on.program, *on.task.known, names)
    return on.count(new.program, new.rules)
