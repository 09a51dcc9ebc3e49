"""Bugs in the package itself: a rule, a kernel, a pass, a collective. They are found, made small, written down, and gone when gone."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from random_plans import random_plan
from test_planted import made

from netmind_autopar.ir.errors import InputError
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.verification import Report, compare
from netmind_autopar.verification.case import Case, Given, Ref, Step, Wanted
from netmind_autopar.verification.perturb import noisy, noisy_input
from netmind_autopar.verification.repro import literal
from netmind_autopar.verification.sides import deal

SEEDS = 10


@dataclass(frozen=True)
class Planted:
    """`code` breaks the package: it defines undo(). `origin`: what the first difference must name; `ops`: what the case may hold."""

    model: str
    mesh: str
    code: str
    origin: str
    ops: tuple[str, ...]


PLANTED = {
    "rule: softmax splits its dim": Planted(
        "experts",
        "a=2,b=2",
        """
from netmind_autopar.rules import table
row = table.TABLE["aten._softmax.default"]
table.TABLE["aten._softmax.default"] = "... c -> ... c"
def undo(): table.TABLE["aten._softmax.default"] = row
""",
        "softmax",
        ("aten._softmax.default",),
    ),
    "rule: gelu is linear": Planted(
        "mlp",
        "a=4",
        """
from netmind_autopar.rules import table
row = table.TABLE["aten.gelu.default"]
table.TABLE["aten.gelu.default"] = "pointwise +"
def undo(): table.TABLE["aten.gelu.default"] = row
""",
        "gelu",
        ("aten.gelu.default",),
    ),
    "kernel: the table begins at 0": Planted(
        "labels",
        "a=4",
        """
from netmind_autopar.kernels import embedding as module
right = module.embedding
module.embedding = lambda weight, indices, start, padding_idx: right(weight, indices, 0, padding_idx)
def undo(): module.embedding = right
""",
        "table_embedding",
        ("autopar.embedding.default",),
    ),
    "pass: buckets in the wrong order": Planted(
        "norms",
        "a=3",
        """
from netmind_autopar.passes import bucket as module
right = module._join
def wrong(new, members, axis, op):
    same = [m for m in members if m.args[3] == members[-1].args[3]]
    if len(same) > 1:
        a, b = same[0], same[-1]
        a.args, b.args = (b.args[0], *a.args[1:]), (a.args[0], *b.args[1:])
    right(new, members, axis, op)
module._join = wrong
def undo(): module._join = right
""",
        "",
        (),
    ),
    "collective: pieces arrive in the wrong order": Planted(
        "mlp",
        "a=4",
        """
import torch
from netmind_autopar.runtime import collectives as module
right = module._BUILDERS["all_to_all"]
def wrong(a, b, axis, sizes, coord):
    step = right(a, b, axis, sizes, coord)
    late = lambda y: step.unpack(torch.roll(y, step.receive[0]))
    return module.Stage(step.pack, late, step.wire, step.axis, step.op, step.send, step.receive)
module._BUILDERS["all_to_all"] = wrong
module.stage.cache_clear()
def undo():
    module._BUILDERS["all_to_all"] = right
    module.stage.cache_clear()
""",
        "",
        (),
    ),
}


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Any:
    """Plants bugs and takes them out again: `undo = broken(code)`."""
    undone: list[Callable[[], None]] = []

    def plant(code: str) -> Callable[[], None]:
        space: dict[str, Any] = {}
        exec(code, space)
        undone.append(space["undo"])
        return space["undo"]

    yield plant
    for undo in undone:
        undo()


def failing(bug: Planted) -> Report:
    """The first random plan whose comparison fails, with its report made small."""
    model, inputs, program, _ = made(bug.model)
    rules = bind_program(program)
    for seed in range(SEEDS):
        plan = random_plan(program, rules, bug.mesh, seed)
        report = compare(model, inputs, program, lower(program, rules, plan), plan, shrink=True)
        if not report.ok:
            return report
    raise AssertionError("no plan meets the bug")


@pytest.mark.parametrize("bug", PLANTED.values(), ids=PLANTED)
def test_a_bug_is_made_small_written_down_and_found_gone(bug: Planted, broken: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made(bug.model)  # other tests share it: made before anything is broken
    undo = broken(bug.code)
    report = failing(bug)
    assert bug.origin in report.difference.origin
    small = report.shrunk
    assert small.case is not None, str(report)
    assert len(small.case.sizes) == 1 and small.case.sizes[0] <= 3
    assert all(step.op in bug.ops for step in small.case.steps), small.case.steps
    assert small.plan is not None and small.plan.sizes == small.case.sizes
    assert len(small.classes) <= 3, small.classes
    path = tmp_path / "repro.py"
    report.write_repro(path)
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert report.difference.origin in text or not bug.origin
    assert runpy.run_path(str(path))["CASE"].main() == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "expected" in shown and bug.origin in shown
    undo()
    assert runpy.run_path(str(path))["CASE"].main() == 0
    assert "passed" in capsys.readouterr().out


def test_the_script_runs_by_itself(broken: Any, tmp_path: Path) -> None:
    bug = PLANTED["kernel: the table begins at 0"]
    made(bug.model)
    broken(bug.code)
    failing(bug).write_repro(tmp_path / "repro.py")
    (tmp_path / "plant.py").write_text(bug.code)
    clean = {**os.environ, "OMP_NUM_THREADS": "1"}
    bad = subprocess.run(
        [sys.executable, "-c", "import plant, runpy; runpy.run_path('repro.py', run_name='__main__')"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "table_embedding" in bad.stdout and "rank 1" in bad.stdout
    good = subprocess.run([sys.executable, "repro.py"], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("passed")


def test_shrinking_is_deterministic(broken: Any, tmp_path: Path) -> None:
    bug = PLANTED["rule: gelu is linear"]
    made(bug.model)
    broken(bug.code)
    texts = []
    for i in range(2):
        failing(bug).write_repro(tmp_path / f"{i}.py")
        texts.append((tmp_path / f"{i}.py").read_bytes())
    assert texts[0] == texts[1]


def test_nothing_to_shrink() -> None:
    model, inputs, program, rules = made("mlp")
    plan = random_plan(program, rules, "a=2", 0)
    report = compare(model, inputs, program, lower(program, rules, plan), plan)
    assert report.ok
    with pytest.raises(InputError, match="no difference"):
        report.write_repro("nowhere.py")


def test_a_case_by_hand(capsys: pytest.CaptureFixture) -> None:
    given = Given("x", "f64[5,6] S(1) P(sum)", seed=3, low=-2.0, high=2.0)
    step = Step("y", "aten.sum.dim_IntList", (Ref("x"), [1]), split="b -")
    wanted = Wanted("y", 0, "f64[5] R S(0)")
    case = Case("a=3,b=2", (given,), (step,), (wanted,))
    assert case.main() == 0
    assert "passed" in capsys.readouterr().out
    again = eval(
        literal((3, [True, None], {"a": float("inf")}, Ref("x", 1), torch.float32)), {"Ref": Ref, "torch": torch, "inf": float("inf")}
    )
    assert again == (3, [True, None], {"a": float("inf")}, Ref("x", 1), torch.float32)


@pytest.mark.parametrize(
    "layout", ["f64[5,4] P(sum) S(0)", "f64[5,4] P(max) R", "f64[5,4] P(sum) P(sum)", "i64[5,4] P(sum) R", "i64[5,4] P(min) R"]
)
def test_terms_make_the_whole(layout: str) -> None:
    from netmind_autopar.ir.spec import parse_spec, unshard

    spec = parse_spec(layout)
    value = torch.randn(5, 4, dtype=torch.float64) * 8
    value = value.to(spec.dtype)
    parts = deal(value, spec, (3, 2))
    assert torch.allclose(unshard(parts, spec, (3, 2)), value)
    assert all(bool(p.any()) for p in parts)
    assert not torch.equal(parts[0], parts[2]) or spec.placements[0] == parse_spec("f64[1] R").placements[0]


def test_noise_keeps_what_must_stay_valid() -> None:
    ones, zeros = torch.ones(6), torch.zeros(4, 9)
    assert len(set(noisy(ones, 0.1, 0, "w").tolist())) == 6
    assert bool((noisy(ones, 0.1, 0, "w") > 0).all())
    assert 0 < float(noisy(zeros, 0.1, 0, "b").abs().max()) < 1
    masked = torch.tensor([0.0, float("-inf"), -1e9])
    assert noisy(masked, 0.1, 0, "m").tolist()[1:] == [float("-inf"), -1e9]
    share = torch.rand(50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    moved = noisy_input(share, 0.1, 0, "x")
    assert bool(((moved >= 0) & (moved <= 1)).all()) and not torch.equal(moved, share)
    mask = torch.tensor([0.0, 1.0, 1.0])
    assert torch.equal(noisy_input(mask, 0.1, 0, "x"), mask)
    assert torch.equal(noisy(ones, 0.1, 0, "w"), noisy(ones, 0.1, 0, "w")) and not torch.equal(
        noisy(ones, 0.1, 0, "w"), noisy(ones, 0.1, 1, "w")
    )
