"""Curves, their fit, profiles that hold them, and the processes that measure."""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from netmind_autopar import Plan, cli
from netmind_autopar.calibrate import fit, run
from netmind_autopar.calibrate.cases import OPS, Case, cases_for, pool_for, tensors
from netmind_autopar.calibrate.measure import elements
from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.curves import at_size, interpolate, make, op_seconds
from netmind_autopar.costs.device import cluster_profile, error_band, load_profile, make_mesh
from netmind_autopar.costs.presets import CLUSTERS
from netmind_autopar.costs.space import MESSAGES, collective_seconds
from netmind_autopar.ir.errors import InputError, MeshError, PlanError, ProfileError
from netmind_autopar.ir.mesh import Axis, Curve, Device
from netmind_autopar.ir.plan import PlanAxis
from netmind_autopar.ir.spec import parse_spec
from netmind_autopar.report import plan_report, render

EXAMPLES = Path(__file__).parent.parent / "examples"
RATE, START_S = 1e11, 2e-6  # of the machine that is made up below
PLAIN = Device("cpu", (("float32", RATE),), 2**33, 2e10, 1e10, 1e-6)

# --- curves ------------------------------------------------------------------------------------------------------------------


def test_a_curve_passes_through_its_points_and_never_falls() -> None:
    points = ((10.0, 1.0), (100.0, 2.0), (1000.0, 8.0))
    assert [interpolate(points, x) for x, _ in points] == pytest.approx([s for _, s in points])
    assert interpolate(points, math.sqrt(10 * 100)) == pytest.approx(math.sqrt(2))
    assert interpolate(points, 1.0) == 1.0
    assert interpolate(points, 5000.0) == pytest.approx(40.0)
    values = interpolate(points, np.logspace(0, 5, 100))
    assert (np.diff(values) >= 0).all()
    assert make("x", "", ((3.0, 1.0), (1.0, 2.0), (1.0, 9.0))).points == ((1.0, 2.0), (3.0, 2.0))


def test_an_op_is_priced_by_its_own_curve_then_by_its_class() -> None:
    curves = (Curve("gelu", "float32", ((1e3, 7.0),)), Curve("elementwise", "float32", ((1e3, 1e-9),)))
    device = Device("cpu", (("float32", 1e9), ("bfloat16", 2e9)), 1, 1e9, 1e9, 1e-6, curves)
    moved = np.array([1e3])
    assert op_seconds(device, ("gelu.approximate", "gelu", "elementwise"), "float32", None, moved, ()) == pytest.approx([7.0])
    assert op_seconds(device, ("add", "elementwise"), "float32", None, moved, ()) == pytest.approx([1e-9])
    assert op_seconds(device, ("add", "elementwise"), "bfloat16", None, moved, ()) == pytest.approx([1e-9])
    assert op_seconds(device, ("mm", "matmul"), "float32", moved, moved, ()) is None
    thin = (Curve("matmul", "float32", ((1e3, 1.0),)), Curve("thin.columns", "float32", ((8.0, 3.0), (128.0, 1.0))))
    device = Device("cpu", (("float32", 1e9), ("bfloat16", 2e9)), 1, 1e9, 1e9, 1e-6, thin)

    def mm(rows: int, columns: int, inner: int, dtype: str = "float32") -> float:
        found = op_seconds(device, ("mm", "matmul"), dtype, moved, moved, [np.array([n]) for n in (rows, columns, inner)])
        assert found is not None
        return float(found[0])

    assert [mm(8, 256, 8), mm(256, 8, 256), mm(256, 4, 256)] == pytest.approx([1.0, 3.0, 3.0])
    assert mm(256, 256, 256, "bfloat16") == pytest.approx(0.5)  # the float32 curve, at twice the rate


def test_a_measured_collective_takes_what_its_curve_says() -> None:
    curves = (Curve("all_reduce", "", ((1e3, 1e-4), (1e6, 1e-3))),)
    axis = Axis("a", 2, 1e9, 1e-5, curves)
    assert collective_seconds("all_reduce", axis, 1e6) == pytest.approx(1e-3)
    assert collective_seconds("all_reduce", axis, 1e6, latency_share=0.0) == pytest.approx(9e-4)
    assert collective_seconds("all_gather", axis, 1e6) == pytest.approx(1e-5 + 1e-3)
    assert collective_seconds("all_reduce", Axis("a", 1, 1e9, 1e-5, curves), 1e6) == 0.0
    assert at_size(((1e3, 1e-4),), 2, 4, MESSAGES["all_reduce"], 1e-5)[0][1] == pytest.approx(1.4e-4)


# --- plans -------------------------------------------------------------------------------------------------------------------


def test_curves_travel_with_the_plan_and_choose_the_same_chains() -> None:
    # gathering so slow that an all-to-all is cheaper, copies and all: whoever loses the curves takes another chain
    curves = (Curve("all_gather", "", ((1.0, 10.0),)),)
    axis = Axis("a", 2, 1e9, 1e-5, curves)
    plan = Plan(graph_hash="0" * 16, mesh=(PlanAxis.of(axis),), choices={})
    loaded = Plan.loads(plan.dumps())
    assert loaded == plan and loaded.links().axes == (axis,)
    a, b = parse_spec("f32[64, 64] S(0)"), parse_spec("f32[64, 64] S(1)")
    with_curves = [m.kind for m in Conversions(loaded.links()).path(a, b)]
    bare = Plan(graph_hash="0" * 16, mesh=(PlanAxis(name="a", size=2, bandwidth_bytes_s=1e9, latency_s=1e-5),), choices={})
    assert with_curves == ["all_to_all"]
    assert [m.kind for m in Conversions(bare.links()).path(a, b)] == ["all_gather", "slice"]
    assert "curves" not in bare.dumps()
    with pytest.raises(PlanError, match="curves"):
        Plan.loads(plan.dumps().replace("10.0", "-1.0"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_presets_have_no_curves(name: str) -> None:
    mesh = make_mesh("dp=2,tp=8", name)
    assert not mesh.device.curves and not any(axis.curves or axis.hideable < 1 for axis in mesh.axes)
    assert error_band(name, 1.0, 1.0) is None


# --- profiles ----------------------------------------------------------------------------------------------------------------

RESIDUALS = [{"kind": kind, "points": 9, "median": p / 2, "p90": p} for kind, p in (("compute", 0.1), ("communication", 0.3))]
CALIBRATION = {"torch": "2", "backend": "gloo", "ranks": 2, "threads": 1, "seconds": 60, "seed": 0, "residuals": RESIDUALS}


def profile(**more: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(load_profile(EXAMPLES / "cluster.toml").model_dump(exclude_defaults=True)))
    data["device"]["curves"] = [{"kind": "matmul", "dtype": "float32", "points": [[1e3, 1e-6], [1e6, 1e-5]]}]
    data["links"]["intra"]["curves"] = [{"kind": "all_reduce", "group": 2, "points": [[1e3, 1e-4]]}]
    return data | {"calibration": CALIBRATION} | more


def write(folder: Path, data: dict[str, Any]) -> str:
    (folder / "my.json").write_text(json.dumps(data))
    return str(folder / "my.json")


def test_a_profile_with_curves(tmp_path: Path) -> None:
    mesh = make_mesh("a=4", write(tmp_path, profile()))
    assert mesh.device.curves[0].points == ((1e3, 1e-6), (1e6, 1e-5))
    assert mesh.axes[0].measured("all_reduce")[0][1] > 1e-4  # four devices: more messages than the two that were measured
    assert mesh.axes[0].hideable == 1.0  # a profile from before it was measured
    data = profile()
    data["links"]["intra"]["hideable"] = 0.25
    assert make_mesh("a=4", write(tmp_path, data)).axes[0].hideable == 0.25
    assert error_band(mesh.cluster, 3.0, 1.0) == pytest.approx(0.15)
    assert error_band(str(tmp_path / "none.json"), 3.0, 1.0) is None


@pytest.mark.parametrize(
    ("points", "where"),
    [
        ([[1e3, 1e-6], [1e6, float("nan")]], "device.curves.0.points.1.1"),
        ([[1e3, -1e-6]], "device.curves.0.points.0.0"),
        ([[1e3]], "device.curves.0.points.0"),
        ([[1e6, 1e-5], [1e3, 1e-6]], "device.curves.0"),
        ([[1e3, 1e-5], [1e6, 1e-6]], "device.curves.0"),
        ([], "device.curves.0.points"),
        ("fast", "device.curves.0.points"),
    ],
)
def test_bad_curves_are_refused_by_name(points: object, where: str, tmp_path: Path) -> None:
    data = profile()
    data["device"]["curves"][0]["points"] = points
    with pytest.raises(ProfileError) as caught:
        load_profile(write(tmp_path, data))
    assert where.removesuffix(".0.0") in caught.value.where


ABSURD = {
    "device.peak_flops.float32": [1e30, 989.0, 67e3],  # TFLOP/s, GFLOP/s instead of FLOP/s
    "device.memory_bandwidth_bytes_s": [3350.0, 3.35, 1e30],  # GB/s, TB/s
    "device.host_bandwidth_bytes_s": [64.0],
    "device.memory_bytes": [80, 80_000, 10**30],
    "device.launch_s": [4.0, 10.0],  # microseconds
    "links.intra.bandwidth_bytes_s": [360.0, 450e3],
    "links.intra.latency_s": [10.0, 2.7],
    "links.intra.hideable": [1.5, -0.1, math.nan],
    "node_size": [10**9],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in ABSURD.items() for v in values], ids=str)
def test_absurd_numbers_are_refused_by_name(field: str, value: float, tmp_path: Path) -> None:
    data = profile()
    at = data
    for key in field.split(".")[:-1]:
        at = at[key]
    at[field.split(".")[-1]] = value
    with pytest.raises(ProfileError) as caught:
        load_profile(write(tmp_path, data))
    assert field in caught.value.where


def test_who_has_no_numbers_is_told_to_measure(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match=r"h100-sxm(.|\n)*netmind-autopar calibrate"):
        cluster_profile("abacus")
    with pytest.raises(MeshError, match=r"h100-sxm(.|\n)*netmind-autopar calibrate"):
        make_mesh("a=2", write(tmp_path, profile(device="abacus")))


def test_a_profile_of_one_node_is_not_used_beyond_it(tmp_path: Path) -> None:
    data = profile(node_size=2)
    del data["links"]["inter"]
    file = write(tmp_path, data)
    assert make_mesh("a=2", file).size == 2
    with pytest.raises(MeshError, match="leaves the node"):
        make_mesh("a=4", file)


def test_the_report_says_how_wrong_it_may_be(tmp_path: Path) -> None:
    cost = {"step_s": 4.0, "compute_s": 3.0, "communication_s": 1.0}
    plan = Plan.model_validate({"graph_hash": "0" * 16, "mesh": ({"name": "a", "size": 2},), "choices": {}, "cost": cost})
    assert "±" not in render(plan_report(plan))
    assert "± 15%" in render(plan_report(plan.model_copy(update={"cluster": write(tmp_path, profile())})))


# --- the fit -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    cases = [c for c in cases_for("cpu", 0, 2**32) if c.op in ("mm", "mm.t", "add", "gelu", "gelu.tanh", "native_layer_norm")]
    return fit.costs_of(cases)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_as_it_is_captured(op: str, dtype: str) -> None:
    if (op, dtype) == ("native_layer_norm_backward", "bfloat16"):
        pytest.skip("a CPU keeps the statistics in bfloat16; only CUDA, which keeps them in float32, is measured in it")
    sizes = {1: (6, 16), 2: (6, 16), 3: (8, 8, 8), 4: (2, 4, 8, 8)}[len(inspect.signature(OPS[op].shapes).parameters)]
    case = Case(op, sizes, dtype)
    given = tensors(case, pool_for([case], torch.device("cpu")))
    made = OPS[op].call(*given)
    assert str(case) in fit.costs_of([case])
    assert (made[0] if isinstance(made, tuple | list) else made).numel() > 0


def law(cost: Any) -> float:
    """A machine with a roofline, on which the tanh form of GELU takes four times as long, and few columns three times."""
    passed = START_S + cost.moved_bytes() / 2e10
    if cost.flops:
        rows, columns, inner = (math.prod(cost.sizes[x] for x in letters) for letters in cost.matmul)
        return max((START_S + cost.flops / RATE) * (3.0 if columns < 16 and rows >= 32 and inner >= 32 else 1.0), passed)
    return passed * (4.0 if cost.op == "gelu.approximate" else 1.0)


def noisy(costs: dict[str, Any], by: float, seed: int = 0) -> dict[str, float]:
    draw = random.Random(seed)
    return {name: law(cost) * draw.uniform(1 - by, 1 + by) for name, cost in costs.items()}


def test_every_case_is_one_op_of_the_planner(costs: dict[str, Any]) -> None:
    assert len(costs) > 100
    assert costs[str(Case("gelu.tanh", (32, 512)))].op == "gelu.approximate"
    assert costs[str(Case("gelu", (32, 512)))].op == "gelu"
    assert costs[str(Case("mm", (64, 64, 64)))].flops == 2 * 64**3


def test_the_fit_finds_a_machine_that_was_made_up(costs: dict[str, Any]) -> None:
    points = fit.points_of(costs, noisy(costs, 0.05))
    device = fit.with_curves(PLAIN, points)
    errors = [abs(fit.predicted(device, c) / law(c) - 1) for c in costs.values()]
    assert np.median(errors) < 0.05 and np.quantile(errors, 0.9) < 0.15
    judged = {r["kind"]: r for r in fit.residuals(fit.op_errors(PLAIN, points, 0))}
    assert judged["compute"]["median"] < 0.1 and judged["compute"]["p90"] < 0.25
    assert judged["compute"]["points"] > 60


def test_residuals_tell_when_the_model_is_wrong(costs: dict[str, Any]) -> None:
    seconds = noisy(costs, 0.05)
    names = sorted(seconds)
    shuffled = dict(zip(names, random.Random(0).sample([seconds[n] for n in names], len(names)), strict=True))
    judged = {r["kind"]: r for r in fit.residuals(fit.op_errors(PLAIN, fit.points_of(costs, shuffled), 0))}
    assert judged["compute"]["median"] > 0.5


def test_what_is_judged_was_not_fitted() -> None:
    series = {"a": [(float(i), f"a{i}") for i in range(12)], "b": [(1.0, "b0")]}
    parts = fit.splits(series, 3)
    assert parts == fit.splits(series, 3) != fit.splits(series, 4)
    assert all(not set(fitted) & set(judged) and {"a0", "a11", "b0"} <= set(fitted) for fitted, judged in parts)
    assert sorted(x for _, judged in parts for x in judged) == sorted(f"a{i}" for i in range(1, 11))


@pytest.mark.parametrize("kind", [*MESSAGES, "send"])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_collectives_send_what_was_asked_for(kind: str, group: int) -> None:
    for asked in (256, 4096, 2**20):
        ((_, [(sent, _)]),) = fit.sent_points({f"{kind} {group} {asked}": 1.0}).items()
        assert sent == pytest.approx(asked, rel=0.05 if asked > 300 else 0.3)
        assert kind in ("send", "all_gather") or elements(kind, group, asked) % group == 0


# --- the processes -----------------------------------------------------------------------------------------------------------

TASK = {"ranks": 2, "threads": 1, "deadline_s": 30.0}


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if Path(f"/proc/{p}").exists()]


def worker(text: str) -> tuple[str, str]:
    return "-c", f"import os, sys, time, pathlib\nfolder, rank = pathlib.Path(sys.argv[1]).parent, sys.argv[2]\n{text}"


def test_a_process_that_fails_ends_them_all(tmp_path: Path) -> None:
    start = time.monotonic()
    text = (
        f"pathlib.Path({str(tmp_path)!r}, rank).write_text(str(os.getpid()))\nif rank == '1': raise OSError('no such card')\ntime.sleep(60)"
    )
    with pytest.raises(ProfileError, match=r"process 1 of 2(.|\n)*no such card"):
        run.measure(TASK, lambda *_: None, worker(text))
    assert time.monotonic() - start < 20
    assert not alive([int(p.read_text()) for p in tmp_path.iterdir()])


def test_a_process_that_hangs_is_given_up() -> None:
    with pytest.raises(ProfileError, match="no result after 1 s"):
        run.measure({**TASK, "deadline_s": 1.0}, lambda *_: None, worker("time.sleep(60)"))


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    mine = f"pathlib.Path({str(tmp_path)!r}, rank).write_text(str(os.getpid()))"
    text = f"{mine}\n(folder / 'progress').write_text('[\"ops\", 0.5]')\ntime.sleep(60)"

    def say(what: str, part: float) -> None:
        if what == "ops" and len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.measure(TASK, say, worker(text))
    assert not alive([int(p.read_text()) for p in tmp_path.iterdir() if p.read_text()])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out", "/nowhere/at/all/my.json"], "no folder"),
        (["--out", "my.toml"], ".json"),
        (["--seconds", "5"], "20 to 120"),
        (["--ranks", "1000"], "1000 ranks"),
        (["--ranks", "0"], "--ranks"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured nevertheless"))
    assert cli.main(["calibrate", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_no_gpu_is_taken_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    task = run.make_task(2, 60.0, 0)
    assert task["device"] == "cpu" and task["backend"] == "gloo" and task["groups"] == [2]
    assert run.make_task(6, 60.0, 0)["groups"] == [2, 4, 6]
    assert run.make_task(1, 60.0, 0)["groups"] == []
    with pytest.raises(InputError):
        run.make_task(2, math.nan, 0)


@pytest.mark.gloo
def test_this_machine(tmp_path: Path) -> None:
    """Everything, in so little time that only the cheapest cases are measured."""
    heard: list[str] = []
    task = {**run.make_task(2, 30.0, 0), "ops_s": 2.5, "collectives_s": 2.5, "beside_s": 1.0}
    found = run.measure(task, lambda what, _: heard.append(what))
    made = run.profile_of(task, found, 5.0)
    assert {"starting", "ops", "collectives"} <= set(heard)
    file = tmp_path / "my.json"
    run.save(made, file)
    assert load_profile(file) == made
    assert os.listdir(tmp_path) == ["my.json"]
    assert made.calibration and {"compute", "communication", "matmul", "all_reduce"} <= {r.kind for r in made.calibration.residuals}
    mesh = make_mesh("a=2", str(file))
    assert {c.kind for c in mesh.axes[0].curves} == set(MESSAGES)
    assert found[0]["beside"] and 0.0 <= mesh.axes[0].hideable <= 1.0
    assert 1e8 < mesh.device.flops("float32") < 1e14
    assert make_mesh("a=2", str(file)) == mesh
