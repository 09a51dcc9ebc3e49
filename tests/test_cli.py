"""The command line: what it shows, its exit codes, and an error in four slots for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from netmind_autopar import cli
from netmind_autopar.ir.errors import InputError
from netmind_autopar.ir.plan import Plan

EXAMPLES = Path(__file__).parent.parent / "examples"
MLP = str(EXAMPLES / "mlp.py") + ":tiny"

GOOD = """
import torch
def model(): return torch.nn.Linear(8, 8)
def sample_inputs(): return (torch.randn(4, 8),)
"""


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPAR_DEBUG", raising=False)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert cli.main(["plan", MLP, "--mesh", "dp=2,tp=2", "--cluster", "h100-sxm", "--json", str(path)]) == 0
    return path


def write(folder: Path, text: str, name: str = "m.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must be refused as bad input; its message."""
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert re.match(r"\w+Error: .+\n  (where|why|try) ", shown.err), shown.err
    assert shown.out == ""
    return shown.err


# what is wrong with a model file, and what the message must say

BAD_FILES = {
    "syntax": ("def model():\n    return (\n", ["not valid Python", "m.py:2"]),
    "import": ("import no_such_module_anywhere\n", ["cannot be run", "m.py:1", "ModuleNotFoundError"]),
    "raises": ("x = 1\n1 / 0\n", ["cannot be run", "m.py:2  1 / 0", "ZeroDivisionError"]),
    "exits": ("import sys\nsys.exit(3)\n", ["cannot be run", "m.py:2"]),
    "no model": ("def build(): pass\ndef sample_inputs(): pass\n", ["no function model()", "build"]),
    "empty": ("", ["no function model()", "no functions"]),
    "no inputs": ("import torch\ndef model(): return torch.nn.Linear(8, 8)\n", ["no function sample_inputs()"]),
    "model is a number": ("model = 3\n", ["no function model()"]),
    "no module": ("def model(): return 3\ndef sample_inputs(): return ()\n", ["returned a int", "not a module"]),
    "factory raises": (
        "def model():\n    return undefined_name\ndef sample_inputs(): return ()\n",
        ["model() raised", "m.py:2", "NameError"],
    ),
    "inputs raise": (GOOD + "def sample_inputs():\n    raise ValueError('no data')\n", ["sample_inputs() raised", "ValueError: no data"]),
    "inputs are no tensors": (GOOD + "def sample_inputs(): return 'text'\n", ["Error"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_model_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = BAD_FILES[case]
    message = fails(capsys, "plan", write(tmp_path, text), "--mesh", "dp=2", "--cluster", "h100-sxm")
    for piece in expected:
        assert piece in message


BAD_ARGUMENTS = {
    "no command": ([], "command line"),
    "unknown command": (["fly"], "command line"),
    "unknown option": (["plan", MLP, "--mesh", "dp=2", "--fast"], "--fast"),
    "no mesh": (["plan", MLP], "--mesh"),
    "no model": (["plan", "--mesh", "dp=2"], "no model"),
    "two models": (["plan", MLP, "--hf", "config.json", "--mesh", "dp=2"], "two models"),
    "missing file": (["plan", "nowhere.py", "--mesh", "dp=2"], "no file nowhere.py"),
    "not Python": (["plan", str(EXAMPLES.parent / "README.md"), "--mesh", "dp=2"], "not a Python file"),
    "unknown factory": (["plan", str(EXAMPLES / "mlp.py") + ":huge", "--mesh", "dp=2"], "no function huge()"),
    "mesh and devices": (["plan", MLP, "--mesh", "dp=2", "--devices", "2"], "--devices"),
    "no devices": (["plan", MLP, "--devices", "0", "--cluster", "h100-sxm"], "--devices"),
    "unknown baseline": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--baseline", "magic"], "unknown baseline 'magic'"),
    "prohibition without a value": (["plan", MLP, "--mesh", "dp=2", "--forbid", "weight"], "cannot read --forbid"),
    "prohibition of nothing": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--forbid", "no.weight=R"], "no.weight"),
    "mesh text": (["plan", MLP, "--mesh", "2x4", "--cluster", "h100-sxm"], "cannot read the mesh"),
    "mesh of nothing": (["plan", MLP, "--mesh", "", "--cluster", "h100-sxm"], "cannot read the mesh"),
    "axis twice": (["plan", MLP, "--mesh", "dp=2,dp=2", "--cluster", "h100-sxm"], "named twice"),
    "axis of size 0": (["plan", MLP, "--mesh", "dp=0", "--cluster", "h100-sxm"], "cannot read the mesh"),
    "unknown cluster": (["plan", MLP, "--mesh", "dp=2", "--cluster", "abacus"], "abacus"),
    "memory text": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--memory", "lots"], "lots"),
    "negative memory": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--memory", "-3GiB"], "Error"),
    "memory that nothing fits": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--memory", "1KiB"], "InfeasibleError"),
    "unknown optimizer": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--optimizer", "magic"], "magic"),
    "pin without a value": (["plan", MLP, "--mesh", "dp=2", "--pin", "weight"], "cannot read the pin"),
    "pin of nothing": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--pin", "nothing.weight=R"], "nothing.weight"),
    "pin in other words": (["plan", MLP, "--mesh", "dp=2", "--cluster", "h100-sxm", "--pin", "layers.0.weight=rows"], "rows"),
    "time limit": (["plan", MLP, "--mesh", "dp=2", "--time-limit", "-1"], "--time-limit"),
    "gap": (["plan", MLP, "--mesh", "dp=2", "--gap", "nan"], "--gap"),
    "batch": (["plan", "--hf", "config.json", "--batch", "0", "--mesh", "dp=2"], "--batch"),
    "missing config": (["plan", "--hf", "nowhere.json", "--mesh", "dp=2"], "cannot read the config"),
    "missing plan": (["explain", "nowhere.json"], "cannot read the plan"),
    "missing plan to verify": (["verify", MLP, "--plan", "nowhere.json"], "cannot read the plan"),
    "not a plan": (["explain", str(EXAMPLES / "mlp.py")], "not readable JSON"),
    "steps": (["verify", MLP, "--plan", "x.json", "--steps", "0"], "--steps"),
    "folder of the plan": (
        ["plan", MLP, "--mesh", "dp=1", "--cluster", "h100-sxm", "--json", "/nowhere/at/all/plan.json"],
        "cannot write the plan",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, expected = BAD_ARGUMENTS[case]
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, *argv)
    assert os.listdir(tmp_path) == []


PROFILE_EDITS = {"nan": "nan", "negative": "-1.0", "zero": "0.0", "text": '"fast"', "truncated": None}


@pytest.mark.parametrize("case", PROFILE_EDITS)
def test_bad_profile(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (EXAMPLES / "cluster.toml").read_text()
    edit = PROFILE_EDITS[case]
    changed = text[: len(text) // 2] if edit is None else re.sub(r"(memory_bandwidth_bytes_s *= *)\S+", rf"\g<1>{edit}", text)
    assert changed != text
    message = fails(capsys, "plan", MLP, "--mesh", "dp=2", "--cluster", write(tmp_path, changed, "mine.toml"))
    assert message.startswith("ProfileError")


BAD_CONFIGS = {
    "truncated": ("{", "cannot read the config"),
    "a list": ("[]", "model type"),
    "empty": ("{}", "model type"),
    "unknown": ('{"model_type": "no-such-model"}', "no causal language model"),
    "inconsistent": ('{"model_type": "gpt2", "n_embd": 10, "n_head": 3}', "no causal language model"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, expected = BAD_CONFIGS[case]
    assert expected in fails(capsys, "plan", "--hf", write(tmp_path, text, "config.json"), "--mesh", "dp=2")


def test_error_of_a_model_file_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "def model():\n    return 1 / 0\n\ndef sample_inputs():\n    return ()\n")
    assert fails(capsys, "plan", path, "--mesh", "dp=2").replace(path, "m.py") == (
        "InputError: model() raised an error\n"
        "  where  m.py:2  return 1 / 0\n"
        "  why    ZeroDivisionError: division by zero\n"
        "  try    call it in Python by itself\n"
    )


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_DEBUG", "1")
    with pytest.raises(InputError):
        cli.main(["plan", "nowhere.py", "--mesh", "dp=2"])


def test_a_defect_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("inner\nsecond line")

    monkeypatch.setattr(cli, "run_clusters", broken)
    assert cli.main(["clusters"]) == 3
    shown = capsys.readouterr().err
    assert shown == "netmind-autopar: unexpected RuntimeError: inner  (set AUTOPAR_DEBUG=1 for the traceback)\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_clusters", interrupted)
    assert cli.main(["clusters"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "examples:" in capsys.readouterr().out
    for command in ("plan", "explain", "diff", "verify", "mesh", "clusters"):
        assert cli.main([command, "--help"]) == 0
    assert cli.main(["--version"]) == 0


def test_plan_shows_and_saves(plan_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["plan", MLP, "--mesh", "dp=2,tp=2", "--cluster", "h100-sxm", "--memory", "1GiB", "--json", str(tmp_path / "p.json")]
    assert cli.main(argv) == 0
    shown = capsys.readouterr()
    for piece in (
        "MLP on 4 devices",
        "dp 2 × tp 2 (h100-sxm)",
        "predicted peak per device of 1.00 GiB",
        "gap",
        "layers.0.weight",
        "Memory per device",
    ):
        assert piece in shown.out
    assert shown.err == ""
    assert "\x1b" not in shown.out
    plan = Plan.load(tmp_path / "p.json")
    assert plan.axis_names == ("dp", "tp")
    assert plan.sizes == (2, 2)
    assert plan.memory_limit_bytes == 2**30


def test_plan_is_deterministic(plan_file: Path, tmp_path: Path) -> None:
    assert cli.main(["plan", MLP, "--mesh", "dp=2,tp=2", "--cluster", "h100-sxm", "--json", str(tmp_path / "p.json")]) == 0
    assert (tmp_path / "p.json").read_bytes() == plan_file.read_bytes()


def test_pin_is_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", MLP, "--mesh", "tp=2", "--cluster", "h100-sxm", "--pin", "layers.1.weight=S(1)", "--json", str(tmp_path / "p.json")]
    assert cli.main(argv) == 0
    assert re.search(r"layers\.1\.weight +32×32 +columns over tp +32×16 ", capsys.readouterr().out)


def test_more_pins_than_one_axis_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", MLP, "--mesh", "dp=2,tp=2", "--cluster", "h100-sxm"]
    assert cli.main([*base, "--pin", "layers.1.weight=R,S(1)"]) == 0
    assert re.search(r"layers\.1\.weight +32×32 +columns over tp +32×16 ", capsys.readouterr().out)
    assert cli.main([*base, "--forbid", "layers.1.weight=R,S(1)"]) == 0
    assert re.search(r"layers\.1\.weight +32×32 +rows over dp × tp +8×32 ", capsys.readouterr().out)


def test_the_best_mesh_is_shown_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", MLP, "--devices", "4", "--cluster", "dgx-h100", "--json", str(tmp_path / "p.json")]) == 0
    found = Plan.load(tmp_path / "p.json")
    out = capsys.readouterr().out
    assert "Meshes\n" in out and "on 4 devices" in out and found.cluster == "dgx-h100"
    rows = re.search(r"Meshes\n.*\n─+\n((?:dp.*\n)+)", out)
    assert rows and sorted(line.split()[0] for line in rows[1].splitlines()) == ["dp=2,tp=2", "dp=4"]
    assert rows[1].startswith(str(found.links())) and "1.00 ×" in rows[1].splitlines()[0]


def test_baselines_are_planned_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", MLP, "--mesh", "dp=2,tp=2", "--cluster", "h100-sxm"]
    assert cli.main([*base, "--baseline", "fsdp", "--json", str(tmp_path / "p.json")]) == 0
    assert "rows over dp × tp" in capsys.readouterr().out
    assert cli.main(["verify", MLP, "--plan", str(tmp_path / "p.json")]) == 0
    capsys.readouterr()
    assert cli.main([*base, "--compare"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Baselines on this mesh\n.*\n─+\nddp +[\d.]+ µs +[\d.]+ × ", out)
    assert re.search(r"ddp\+ulysses +no place: the", out) and "zero1+megatron-tp" in out


def test_hf_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    path = write(tmp_path, json.dumps(config), "config.json")
    for where in (path, str(tmp_path)):
        assert cli.main(["plan", "--hf", where, "--batch", "4", "--seq", "16", "--mesh", "dp=2", "--cluster", "h100-sxm"]) == 0
        assert "GPT2LMHeadModel on 2 devices" in capsys.readouterr().out


def test_explain(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(plan_file)]) == 0
    assert "Every choice" in capsys.readouterr().out
    assert cli.main(["explain", str(plan_file), MLP]) == 0
    assert "layers.0.weight" in capsys.readouterr().out


def test_diff(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", str(plan_file), str(plan_file)]) == 0
    assert "the same" in capsys.readouterr().out
    plan = Plan.load(plan_file)
    name = next(iter(plan.choices))
    other = tmp_path / "other.json"
    plan.model_copy(update={"choices": {**plan.choices, name: "x y"}}).save(other)
    assert cli.main(["diff", str(plan_file), str(other)]) == 1
    shown = capsys.readouterr().out
    assert "Choices that differ" in shown
    assert name in shown
    assert "x y" in shown


@pytest.mark.parametrize("extra", [[], ["--steps", "2", "--dtype", "float64"]], ids=["as it is", "float64"])
def test_verify(plan_file: Path, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", MLP, "--plan", str(plan_file), *extra]) == 0
    assert "computes what the model computes" in capsys.readouterr().out


def test_verify_writes_down_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from netmind_autopar.runtime import collectives

    plan_file = tmp_path / "plan.json"
    odd = ["--random-costs", "3", "--json", str(plan_file)]
    assert cli.main(["plan", MLP, "--mesh", "dp=2,tp=2", "--cluster", "h100-sxm", *odd]) == 0
    assert "all_reduce" in {c.kind for c in Plan.load(plan_file).collectives}

    right = collectives._BUILDERS["all_reduce"]

    def doubled(*args: object) -> collectives.Stage:
        step = right(*args)  # type: ignore[arg-type]
        return collectives.Stage(step.pack, lambda y: 2 * step.unpack(y), step.wire, step.axis, step.op)

    monkeypatch.setitem(collectives._BUILDERS, "all_reduce", doubled)
    collectives.stage.cache_clear()
    folder = tmp_path / "bug"
    assert cli.main(["verify", MLP, "--plan", str(plan_file), "--repro", str(folder)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "does NOT compute" in shown and "all_reduce over axis" in shown and "repro.py shows it by itself" in shown
    assert runpy.run_path(str(folder / "repro.py"))["CASE"].main() == 1
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["verify", MLP, "--plan", str(folder / "plan.json"), "--as-given"]) == 1
    monkeypatch.undo()
    collectives.stage.cache_clear()
    assert runpy.run_path(str(folder / "repro.py"))["CASE"].main() == 0
    assert cli.main(["verify", MLP, "--plan", str(folder / "plan.json")]) == 0


def test_verify_refuses_the_plan_of_another_model(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "PlanError" in fails(capsys, "verify", write(tmp_path, GOOD), "--plan", str(plan_file))


def test_mesh_and_clusters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clusters"]) == 0
    assert "h100-sxm" in capsys.readouterr().out
    assert cli.main(["mesh", "dp=4,tp=8", "--cluster", "h100-sxm"]) == 0
    assert "32 devices" in capsys.readouterr().out


def test_nothing_on_stderr_and_a_closed_pipe_is_quiet(plan_file: Path) -> None:
    command = [sys.executable, "-m", "netmind_autopar.cli", "explain", str(plan_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert piped.stdout is not None and piped.stderr is not None
    piped.stdout.close()
    assert piped.stderr.read() == ""
    piped.stderr.close()
    assert piped.wait(timeout=120) == 141
