"""The search over meshes: which are looked at, that bounds are bounds, and that the best is found."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch

from netmind_autopar import plan
from netmind_autopar.api import plan_program
from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import cluster_profile, make_mesh
from netmind_autopar.ir.errors import InfeasibleError, InputError
from netmind_autopar.ir.mesh import Mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.build import build
from netmind_autopar.solver.meshes import Devices, candidates, estimate, factorisations, search_meshes
from netmind_autopar.tracer.capture import capture


@pytest.fixture(scope="module")
def captured() -> Any:
    model, inputs = models.gpt2(torch.float32, layers=1, hidden=128, heads=8, vocab=1000, batch=16, seq=64, device="meta")
    return model, inputs, capture(model, inputs)


@pytest.mark.parametrize(("devices", "node_size"), [(1, 8), (7, 8), (8, 8), (12, 8), (24, 8), (64, 8), (256, 8), (16384, 8)])
def test_factorisations_are_sensible_and_different(devices: int, node_size: int) -> None:
    found = factorisations(devices, node_size)
    assert len(set(found)) == len(found) and found[0] == (devices,)
    assert [len(s) for s in found] == sorted(len(s) for s in found)
    for sizes in found:
        assert math.prod(sizes) == devices and (min(sizes) >= 2 or devices == 1)
        if len(sizes) == 3 and devices > node_size and devices % node_size == 0:
            assert node_size in (sizes[2], sizes[1] * sizes[2])
    assert len(found) <= 30


def test_the_meshes_of_two_nodes() -> None:
    assert factorisations(16, 8) == ((16,), (2, 8), (4, 4), (8, 2), (2, 2, 4), (2, 4, 2))
    assert factorisations(6, 8) == ((6,), (2, 3), (3, 2))
    with pytest.raises(InputError):
        factorisations(0, 8)


def test_links_follow_from_the_nodes() -> None:
    links = cluster_profile("dgx-h100").links
    for mesh in candidates(Devices(16, "dgx-h100")):
        inside = [axis.bandwidth_bytes_s == links.intra.bandwidth_bytes_s for axis in mesh.axes]
        span = 1
        for axis, fast in reversed(list(zip(mesh.axes, inside, strict=True))):
            span *= axis.size
            assert fast == (span <= 8), str(mesh)


@pytest.mark.parametrize("text", ["dp=4", "dp=2,tp=2"])
def test_an_estimate_bounds_the_optimum(captured: Any, text: str) -> None:
    _, _, program = captured
    mesh, rules = make_mesh(text, "h100-sxm"), bind_program(program)
    bound, guess = estimate(build(program, rules, mesh, Conversions(mesh)).problem)
    best = plan_program(program, mesh, lambda _: None)
    assert 0 < bound <= best.cost.step_s * (1 + 1e-9) and guess >= best.bound_s * (1 - 1e-9)
    assert guess <= 1.2 * bound


def test_the_best_mesh_is_found(captured: Any) -> None:
    model, inputs, program = captured
    said: list[str] = []
    found = plan(model, inputs, devices=8, cluster="dgx-h100", progress=said.append)
    each = {str(mesh): plan_program(program, mesh, lambda _: None).cost.step_s for mesh in candidates(Devices(8, "dgx-h100"))}
    assert found.cost.step_s == pytest.approx(min(each.values()), rel=2e-4)
    assert {a.name for a in found.alternatives} == set(each) and found.alternatives[0].status == "planned"
    assert found.alternatives[0].step_s == found.cost.step_s and str(found.links()) == found.alternatives[0].name
    for a in found.alternatives:
        assert a.bound_s <= each[a.name] * (1 + 1e-9)
        assert a.step_s == pytest.approx(each[a.name], rel=2e-4) if a.status == "planned" else a.status == "ruled out"
    assert any("bounding" in text for text in said) and any("1 of" in text for text in said)


def test_the_file_has_no_alternatives_and_is_the_same_twice(captured: Any) -> None:
    model, inputs, _ = captured
    first, again = (plan(model, inputs, devices=4, cluster="dgx-h100") for _ in range(2))
    assert first.dumps() == again.dumps() and first.alternatives == again.alternatives
    assert "alternatives" not in first.dumps() and Plan.loads(first.dumps()).alternatives == ()
    assert first.timed(1.0).alternatives == first.alternatives


def fake(seconds: dict[str, float]) -> Any:
    """A solver that knows the answers, and refuses the meshes that it does not know."""

    def solve(mesh: Mesh, _: float) -> Plan:
        if str(mesh) not in seconds:
            raise InfeasibleError("too small", why="a test")
        axes = [{"name": a.name, "size": a.size} for a in mesh.axes]
        cost = {"step_s": seconds[str(mesh)], "compute_s": seconds[str(mesh)]}
        return Plan.model_validate({"graph_hash": "0" * 16, "mesh": tuple(axes), "choices": {}, "cost": cost}, strict=False)

    return solve


def test_meshes_without_a_plan_are_listed(captured: Any) -> None:
    _, _, program = captured
    found = search_meshes(program, bind_program(program), Devices(4, "cpu"), fake({"dp=2,tp=2": 1.0}), bounds=False)
    assert [(a.name, a.status) for a in found.alternatives] == [("dp=2,tp=2", "planned"), ("dp=4", "does not fit")]
    with pytest.raises(InfeasibleError, match="too small"):
        search_meshes(program, bind_program(program), Devices(4, "cpu"), fake({}), bounds=False)


def test_a_mesh_whose_bound_is_too_high_is_not_planned(captured: Any) -> None:
    _, _, program = captured
    asked: list[str] = []

    def solve(mesh: Mesh, left: float) -> Plan:
        asked.append(str(mesh))
        return fake({str(mesh): 1e-9})(mesh, left)  # type: ignore[no-any-return]

    found = search_meshes(program, bind_program(program), Devices(4, "cpu"), solve)
    assert len(asked) == 1 and [a.status for a in found.alternatives] == ["planned", "ruled out"]
    assert found.alternatives[1].bound_s > 1e-9


def test_when_the_time_is_over_the_best_so_far_is_kept(captured: Any) -> None:
    _, _, program = captured
    answers = {str(mesh): float(i + 1) for i, mesh in enumerate(candidates(Devices(8, "cpu")))}
    found = search_meshes(program, bind_program(program), Devices(8, "cpu"), fake(answers), bounds=False, time_limit=0.0)
    assert found.cost.step_s == 1.0 and {a.status for a in found.alternatives[1:]} == {"not tried"}
    assert len(found.alternatives) == len(answers)


def test_a_baseline_looks_for_its_mesh_too(captured: Any) -> None:
    model, inputs, _ = captured
    found = plan(model, inputs, devices=4, cluster="dgx-h100", baseline="fsdp+megatron-tp")
    rows = {a.name: a for a in found.alternatives}
    assert found.axis_names == ("dp", "tp") and rows["dp=4"].status == "no place"


@pytest.mark.parametrize("options", [{}, {"mesh": "dp=2", "devices": 2}, {"devices": 0}, {"devices": "8"}])
def test_a_mesh_or_a_number_of_devices_is_needed(captured: Any, options: dict[str, Any]) -> None:
    model, inputs, _ = captured
    with pytest.raises(InputError):
        plan(model, inputs, cluster="dgx-h100", **options)
