"""Real processes: every model family on 2 and 4 gloo ranks equals one process over three optimizer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "gloo_worker.py"
MODELS = ("gpt2", "llama", "bert", "resnet50", "mlp")
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
MESHES = {2: ((2,),), 4: ((4,), (2, 2))}


RUNS = (("float64", "sgd"), ("float32", "adamw"), ("float64", "adamw"), ("float32", "sgd"))


def cases(world: int, *, rest: bool = False) -> list[dict]:
    """Dtypes and optimizers over all models and meshes; every other case runs an odd plan from random prices.

    The quick tier leaves some out, `rest` is what it leaves out: both together are every combination.
    """
    out = []
    for m, model in enumerate(MODELS):
        for k, mesh in enumerate(MESHES[world]):
            for j, (dtype, optimizer) in enumerate(RUNS):
                quick = j < (1 if model == "resnet50" else 4 // world * 2)
                if quick != rest:
                    odd = {"random_costs": 10 * m + k} if (m + j + k) % 2 else {}
                    out.append({"model": model, "mesh": mesh, "dtype": dtype, "optimizer": optimizer, **odd})
    return out


def launch(world: int, work: list[dict], folder: Path, *, timeout_s: float = 600) -> list[dict]:
    """Run `work` on `world` processes; rank 0's results, one a case."""
    out, env = folder / "results", {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(WORKER), str(r), str(world), str(folder / "store"), str(out), json.dumps(work)] for r in range(world)]
    processes = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    try:
        logs = [p.communicate(timeout=timeout_s)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    written = sorted(folder.glob("results.*"))
    assert written, "\n".join(log[-3000:] for log in logs)
    return json.loads(written[0].read_text())


@pytest.fixture(scope="module", params=sorted(MESHES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict]]:
    work = cases(request.param)
    return work, launch(request.param, work, tmp_path_factory.mktemp(f"gloo{request.param}"))


def agree(work: list[dict], results: list[dict]) -> None:
    for case, result in zip(work, results, strict=False):
        assert "error" not in result, f"{case}\n{result['error']}"
        for kind, error in result.items():
            bar = 1e-3 if kind == "bytes" else TOLERANCE[case["dtype"]]
            assert error <= bar, f"{case}: {kind} differs by {error:.2g}"
    assert len(results) == len(work)


@pytest.mark.gloo
def test_training_equals_one_process(run: tuple[list[dict], list[dict]]) -> None:
    agree(*run)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(MESHES))
def test_every_other_combination(world: int, tmp_path: Path) -> None:
    work = cases(world, rest=True)
    agree(work, launch(world, work, tmp_path))


@pytest.mark.gloo
def test_one_ranks_trouble_is_everybodys(tmp_path: Path) -> None:
    expected = {"no memory": "InfeasibleError", "other model": "MeshError", "bad input on one rank": "InputError"}
    launch(2, [{"refusal": name} for name in expected], tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"results.{rank}").read_text())
        assert [r["kind"] for r in found] == list(expected.values()), found
    assert "rank 1" in found[2]["text"] or "sample_inputs" in found[2]["text"]
