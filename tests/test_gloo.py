"""Real processes: every model family on 2 and 4 gloo ranks equals one process over three optimizer steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gloo_ranks import launch

MODELS = ("gpt2", "llama", "bert", "resnet50", "mlp")
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
MESHES = {2: ((2,),), 4: ((4,), (2, 2))}


RUNS = (("float64", "sgd"), ("float32", "adamw"), ("float64", "adamw"), ("float32", "sgd"))


def cases(world: int, *, rest: bool = False) -> list[dict]:
    """Dtypes and optimizers over all models and meshes; every other case runs an odd plan from random prices.

    The quick tier has one case of every model, `rest` is what it leaves out: both together are every combination.
    """
    out = []
    for m, model in enumerate(MODELS):
        for k, mesh in enumerate(MESHES[world]):
            for j, (dtype, optimizer) in enumerate(RUNS):
                here = k == m % len(MESHES[world]) and j == (m + k + m // 2) % len(RUNS)
                quick = here and not (world > 2 and model == "resnet50")
                if quick != rest:
                    odd = {"random_costs": 10 * m + k} if (m + j + k) % 2 else {}
                    out.append({"model": model, "mesh": mesh, "dtype": dtype, "optimizer": optimizer, **odd})
    return out


def test_the_quick_tier_has_every_dtype_and_optimizer_and_odd_plans() -> None:
    for world in MESHES:
        quick, every = cases(world), [*cases(world), *cases(world, rest=True)]
        assert len(every) == len(MODELS) * len(MESHES[world]) * len(RUNS)
        assert {c["dtype"] for c in quick} == set(TOLERANCE) and {c["optimizer"] for c in quick} == {"sgd", "adamw"}
        assert 0 < sum("random_costs" in c for c in quick) < len(quick) and {c["mesh"] for c in quick} == set(MESHES[world])


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
