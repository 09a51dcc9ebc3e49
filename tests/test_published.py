"""Measured runs of others: reading them, pricing them, and the pipeline formula against a schedule that is played."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
sys.path.append(str(ROOT / "benchmarks"))

import published
import validation

from netmind_autopar.costs.pipeline import bubble, pipeline_seconds
from netmind_autopar.ir.errors import InputError

FILES = {"vtrain_one_node.csv": 16, "vtrain_several_nodes.csv": 4, "torchtitan.csv": 8}


def played(forward: float, backward: float, stages: int, micro_batches: int) -> float:
    """1F1B, event by event: a stage does its forwards of the warm-up, then one forward and one backward in turn."""
    orders = []
    for s in range(stages):
        warm = min(stages - 1 - s, micro_batches)
        order = [("f", i) for i in range(warm)]
        for i in range(micro_batches):
            order += [("f", warm + i)] if warm + i < micro_batches else []
            order.append(("b", i))
        orders.append(order)
    done: dict[tuple[int, str, int], float] = {}
    at, clock = [0] * stages, [0.0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(orders[s]):
                what, i = orders[s][at[s]]
                if what == "f":
                    needs = [(s - 1, "f", i)] if s else []
                else:
                    needs = [(s + 1, "b", i)] if s < stages - 1 else [(s, "f", i)]
                if any(n not in done for n in needs):
                    break
                start = max([clock[s], *(done[n] for n in needs)])
                clock[s] = done[s, what, i] = start + (forward if what == "f" else backward)
                at[s] += 1
    return max(clock)


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 2, 8, 13])
def test_the_formula_is_the_schedule(stages: int, micro_batches: int) -> None:
    assert pipeline_seconds([3.0] * stages, micro_batches) == pytest.approx(played(1.0, 2.0, stages, micro_batches))
    share = bubble(stages, micro_batches)
    assert (1 - share) * pipeline_seconds([3.0] * stages, micro_batches) == pytest.approx(3.0 * micro_batches)


def test_chunks_and_sends() -> None:
    assert pipeline_seconds([1.0] * 8, 8, chunks=2) == pytest.approx(8 + 7 / 2)
    assert pipeline_seconds([1.0] * 2, 4, send_s=0.1) == pytest.approx(5.2)
    assert pipeline_seconds([1.0, 2.0], 4) == pytest.approx(9.0)  # the slower stage sets the pace
    for bad in (([], 1, 1), ([1.0], 0, 1), ([1.0], 1, 0)):
        with pytest.raises(ValueError):
            pipeline_seconds(bad[0], bad[1], chunks=bad[2])


@pytest.mark.parametrize("name", FILES)
def test_files_are_read(name: str) -> None:
    runs = published.read(DATA / name)
    assert len(runs) == FILES[name]
    for run in runs:
        assert run.seconds > 0 and run.micro >= 1 and run.micro_batches >= 1
        assert run.group in published.FITTED and run.group in published.FREE


def test_a_row_is_read_as_it_says() -> None:
    run = next(r for r in published.read(DATA / "vtrain_several_nodes.csv") if r.hidden == 12288)
    assert run.tp * run.dp * run.pp == 512
    assert run.micro * run.micro_batches * run.dp == 1536
    assert 1.7e11 < run.layers * run.layer_parameters + run.vocab * run.hidden < 1.8e11


@pytest.mark.parametrize(("name", "bar"), [("vtrain_one_node.csv", 0.10), ("vtrain_several_nodes.csv", 0.15), ("torchtitan.csv", 0.15)])
def test_predictions_are_near_what_was_measured(name: str, bar: float) -> None:
    rows = validation.run_rows(DATA / name, (), fit=False, seed=0)
    times, peaks = ([r for r in rows if (r["group"] == validation.MEMORY) == memory] for memory in (False, True))
    assert validation.summary(times)["mape_pct"] <= 100 * bar
    assert bool(peaks) == (name == "torchtitan.csv")
    assert not peaks or validation.summary(peaks)["mape_pct"] <= 15
    assert rows == validation.run_rows(DATA / name, (), fit=False, seed=0)


def test_all_reduces_by_the_preset_and_by_curves() -> None:
    tables = sorted(DATA.glob("AR_GPU*"))
    preset, none = validation.table_rows(tables, fit=False, seed=0)
    assert not none and validation.summary(preset)["mape_pct"] < 10
    fitted, curves = validation.table_rows(tables, fit=True, seed=0)
    assert [n for n, _ in curves] == [2, 8]
    assert validation.summary(fitted)["median_pct"] < 5
    assert sum(r["fitted"] for r in fitted) == len(fitted) // 2


BROKEN = {  # of the first row of a file: (text, what stands there instead, what the error says)
    "a word": ("vtrain_one_node.csv", lambda t: t.replace("8,", "eight,", 1), "line 2"),
    "no time": (
        "vtrain_one_node.csv",
        lambda t: "\n".join(line.rpartition(",")[0] + ",0" for line in t.splitlines()[1:]),
        "not a positive",
    ),
    "a short row": ("vtrain_several_nodes.csv", lambda t: "175,512", "line 2"),
    "not a number": ("vtrain_several_nodes.csv", lambda t: "nan" + ",1" * 11, "nan"),
    "a model that is not known": ("torchtitan.csv", lambda t: t.splitlines()[1].replace("8B", "9B", 1), "9B"),
    "a device that is not known": ("torchtitan.csv", lambda t: t.splitlines()[1].replace("H100", "X100", 1), "X100"),
    "a rate of nothing": (
        "torchtitan.csv",
        lambda t: ",".join("0" if i == 11 else c for i, c in enumerate(t.splitlines()[1].split(","))),
        "rate|per_s",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_an_error_that_names_the_line(what: str, tmp_path: Path) -> None:
    name, damage, said = BROKEN[what]
    text = (DATA / name).read_text()
    first = text.splitlines()[0]
    damaged = damage(text)
    (tmp_path / name).write_text(damaged if damaged.startswith(first) else f"{first}\n{damaged}\n")
    with pytest.raises(InputError, match=said):
        published.read(tmp_path / name)


def test_files_that_are_none_are_errors(tmp_path: Path) -> None:
    (tmp_path / "AR_GPU4_x").write_text("size(B),count,type,time(ns),busbw(GB/s)\n1048576,262144,float\n")
    (tmp_path / "table.csv").write_text("size(B),count,type,time(ns),busbw(GB/s)\n1048576,262144,float,44210,1\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "none").mkdir()
    cases = {
        "AR_GPU4_x": "line 2",
        "table.csv": "how many devices",
        "bytes.csv": "no CSV",
        "empty.csv": "header",
        "none": "no measured run",
    }
    for name, said in cases.items():
        with pytest.raises(InputError, match=said):
            validation.run_published([str(tmp_path / name)], False, 0)


def test_every_row_is_shown_and_groups_of_one_source_are_judged_together(capsys: pytest.CaptureFixture[str]) -> None:
    rows = validation.run_published([str(DATA)], False, 0)
    found = validation.show_published(rows, True)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1 + len(found["groups"])
    groups = found["groups"]
    assert groups["vtrain, all"]["rows"] == groups["vtrain, one node"]["rows"] + groups["vtrain, several nodes"]["rows"]


def test_more_work_takes_longer() -> None:
    run = next(r for r in published.read(DATA / "torchtitan.csv") if r.seq == 8192)
    c = published.FITTED[run.group]
    base = published.predict(run, c)
    assert published.predict(replace(run, layers=2 * run.layers), c) > 1.7 * base
    assert published.predict(replace(run, recompute="full"), c) > published.predict(replace(run, recompute="none"), c)
    assert published.predict(replace(run, dtype="bfloat16"), c) > published.predict(replace(run, dtype="float8_e4m3fn"), c)
    assert published.predict(run, replace(c, matmul=c.matmul / 2)) > 1.2 * base


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    truth = published.Constants(matmul=0.5, memory=0.6, host_s=2e-5)
    runs = [replace(r, seconds=published.predict(r, truth)) for r in published.read(DATA / "vtrain_one_node.csv")]
    found = published.fitted(runs, published.Constants(), ("matmul", "memory", "host_s"), ())
    assert max(abs(published.predict(r, found) / r.seconds - 1) for r in runs) < 0.1


def test_rank_correlation() -> None:
    assert validation.rank_correlation([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert validation.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert validation.rank_correlation([1, 1, 2, 3], [1, 1, 2, 3]) == pytest.approx(1)


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "validation.py"), "--published", str(DATA), "--no-fit", "--json"]
    command += ["--plot", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "x.png").stat().st_size > 1000
    assert last["rows"] == 28 + 2 * 16 * 2 and set(last) >= {"rows", "mape_pct", "rank_correlation"}
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="header"):
        published.read(tmp_path / "x.csv")
