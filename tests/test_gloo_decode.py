"""Real processes: greedy decoding with a static cache gives the eager model's tokens and logits, and leaves the eager model's cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo_ranks import launch


def cases(world: int) -> list[dict]:
    meshes = {2: ((2,),), 3: ((3,),), 4: ((4,), (2, 2))}[world]
    kinds = [("gpt2", "local", 5), ("gpt2", "global", 3)] + ([("llama", "local", 1), ("gpt2", "local", None)] if world > 2 else [])
    return [{"decode": m, "inputs": i, "random_costs": c, "mesh": mesh} for mesh in meshes for m, i, c in kinds]


@pytest.mark.gloo
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_decoding_equals_one_process(world: int, tmp_path: Path) -> None:
    work = cases(world)
    results = launch(world, work, tmp_path)
    for case, result in zip(work, results, strict=False):
        assert "error" not in result, f"{case}\n{result['error']}"
        bar = 1e-9 if case["decode"] == "gpt2" else 1e-5  # Llama's norms compute in float32
        assert result["tokens"] == 1 and result["logits"] <= bar and result["cache"] <= bar, f"{case}: {result}"
    assert len(results) == len(work)
    assert any(result["split"] for result in results), "no cache lies split: nothing was shown"
