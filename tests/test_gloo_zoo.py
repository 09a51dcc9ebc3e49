"""Models of the zoo on 3 and 4 real processes: losses, all parameters and all buffers after three steps are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo_ranks import launch

TOLERANCE = 1e-9
MESHES = {3: ((3,),), 4: ((2, 2), (4,))}
QUICK = ("tied", "custom_op", "dlrm", "bert")
MODELS = (
    *QUICK,
    "gpt2",
    "llama",
    "t5",
    "mixtral_grouped",
    "convnext",
    "resnet14",
    "unet2d_condition",
    "lstm",
    "mamba_cumsum",
    "encoder_batch_first",
    "lora",
)


def quick_cases(world: int) -> list[dict]:
    """Half of them on 3 processes, half on 4; of each half one at real prices, the other at random ones."""
    half = [k for k in range(len(QUICK)) if (k >= len(QUICK) // 2) == (world == 4)]
    prices: list[dict] = [{} if (k + world) % 2 else {"random_costs": k} for k in half]
    return [{"zoo": QUICK[k], "mesh": MESHES[world][0], **price} for k, price in zip(half, prices, strict=True)]


def all_cases(world: int) -> list[dict]:
    plain = [{"zoo": name, "mesh": mesh} for name in MODELS for mesh in MESHES[world]]
    odd = [{"zoo": name, "mesh": mesh, "random_costs": k} for k, name in enumerate(MODELS) for mesh in MESHES[world]]
    return [case for case in plain + odd if case not in quick_cases(world)]


def agree(work: list[dict], results: list[dict]) -> None:
    for case, result in zip(work, results, strict=False):
        assert "error" not in result, f"{case}\n{result['error']}"
        wrong = {kind: e for kind, e in result.items() if kind != "cpu_s" and not e <= TOLERANCE}
        assert not wrong, f"{case}: {wrong}"
    assert len(results) == len(work)


@pytest.mark.gloo
@pytest.mark.parametrize("world", sorted(MESHES))
def test_a_few_models_train_as_in_one_process(world: int, tmp_path: Path) -> None:
    work = quick_cases(world)
    agree(work, launch(world, work, tmp_path))


@pytest.mark.gloo
def test_plans_that_save_memory_train_as_in_one_process(tmp_path: Path) -> None:
    """Dropout and tied weights; twins, gathering again, host and disk, under random layouts on 2 processes."""
    work = [{"zoo": name, "mesh": (2,), "saving": k} for k, name in enumerate(("bert", "tied", "mixtral_grouped"))]
    agree(work, launch(2, work, tmp_path))


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("world", sorted(MESHES))
def test_all_models_train_as_in_one_process(world: int, part: int, tmp_path: Path) -> None:
    work = all_cases(world)[part::4]
    agree(work, launch(world, work, tmp_path, timeout_s=3600))
