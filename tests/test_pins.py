"""Placements that parameters must not have: what is forbidden does not happen, and what cannot be is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import InputError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash


def planned(mesh: str = "tp=4", **options: object) -> Plan:
    """Two layers so large that weights are split; the batch is small."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 16384, bias=False), nn.ReLU(), nn.Linear(16384, 4096, bias=False))
        program = capture(model, torch.empty(16, 4096))
    return solve(program, bind_program(program), make_mesh(mesh, "h100-sxm"), graph_hash=graph_hash(program), **options)  # type: ignore[arg-type]


def test_what_is_forbidden_does_not_happen() -> None:
    free = planned()
    assert free.choices["0.weight"] == "d0" and free.choices["2.weight"] == "d1"
    other = planned(forbid={"0.weight": "S(0)"})
    assert other.choices["0.weight"] != "d0" and other.cost.step_s >= free.cost.step_s
    assert planned(forbid={"0.weight": ("S(0)", "S(1)")}).choices["0.weight"] == "-"
    assert planned(forbid={"0.weight": "S(0) R"}).choices["0.weight"] == "d1"
    assert planned(pins={"2.weight": "S(1)"}, forbid={"0.weight": "R"}).choices["2.weight"] == "d1"


def test_one_axis_may_be_meant() -> None:
    plan = planned("dp=2,tp=2", forbid={"0.weight": {"tp": "S(0)"}, "2.weight": {"dp": "R", "tp": "R"}})
    assert plan.choices["0.weight"].split()[1] != "d0" and "-" not in plan.choices["2.weight"].split()
    assert "-" in planned("a=1,b=4", forbid={"0.weight": "S(0)"}).choices["0.weight"].split()  # an axis of one device splits nothing


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"forbid": {"nope": "R"}}, "no such parameter"),
        ({"forbid": {"0.weight": "sideways"}}, "cannot read"),
        ({"forbid": {"0.weight": {"dp": "R"}}}, "axis 'dp'"),
        ({"forbid": {"0.weight": "R S(0) S(1)"}}, "nothing is left"),
        ({"forbid": {"0.weight": "S(0)"}, "pins": {"0.weight": "S(0)"}}, "nothing is left"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        planned(**options)  # type: ignore[arg-type]
