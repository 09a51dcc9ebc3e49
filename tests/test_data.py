"""Data sets read by the plan: every sample once, in an order that no mesh changes, from where it was left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import launch
from test_training import agree
from torch import nn
from torch.utils.data import DataLoader

from netmind_autopar import autoparallelize
from netmind_autopar.ir.errors import InputError
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.spec import Replicate, Shard, plain
from netmind_autopar.runtime.data import Batches, hull


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    started = not dist.is_initialized()
    yield
    if started and dist.is_initialized():
        dist.destroy_process_group()


def graph(sizes: tuple[int, ...], coord: tuple[int, ...], *placements: tuple[Any, ...]) -> Any:
    """As much of a graph as a sampler reads: inputs of 8 rows that lie so."""
    specs = [plain((8, 4), torch.float32, p) for p in placements]
    return SimpleNamespace(roles=SimpleNamespace(user_specs=specs), place=SimpleNamespace(sizes=sizes, coord=coord))


@pytest.mark.parametrize("size", [1, 3, 8, 29, 40])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 2), (4,)])
def test_every_sample_once(sizes: tuple[int, ...], shuffle: bool, size: int) -> None:
    """The pieces of all ranks, rows over all axes, are each batch; and batches are the same as on one device."""
    by_rank = [list(Batches(graph(sizes, c, (Shard(0),) * len(sizes)), size, shuffle=shuffle)) for c in coordinates(sizes)]
    alone = list(Batches(graph((1,), (0,), (Replicate(),)), size, shuffle=shuffle))
    for k, whole in enumerate(alone):
        parts = [rows[k] for rows, c in zip(by_rank, coordinates(sizes), strict=True) if not empty(sizes, c, len(whole))]
        assert list(itertools.chain(*parts)) == whole
    assert sorted(itertools.chain(*alone)) == list(range(size))


def empty(sizes: tuple[int, ...], coord: tuple[int, ...], total: int) -> bool:
    rest = total
    for n, i in zip(sizes, coord, strict=True):
        piece = -(-rest // n)
        rest = max(0, min(piece, rest - i * piece))
    return rest == 0


def test_rows_for_inputs_that_lie_unlike() -> None:
    assert hull(graph((2,), (1,), (Shard(0),), (Shard(1),)), 8) == (0, 8)
    assert hull(graph((2, 2), (1, 0), (Shard(0), Shard(1)), (Shard(0), Replicate())), 8) == (4, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_it_was(workers: int) -> None:
    """The position is that of what was handed out, though a loader fetches ahead; a new sampler of another mesh goes on from it."""
    model = nn.Linear(1, 1)
    pm = autoparallelize(model, torch.zeros(4, 1), "a=1", cluster="h100-sxm")
    rows = torch.arange(22.0).reshape(-1, 1)

    def reading(state: dict | None = None) -> tuple[Batches, Iterator[Any]]:
        batches = pm.batches(22, seed=3)
        if state:
            batches.load_state_dict(state)
        return batches, batches.read(DataLoader(rows, batch_sampler=batches, num_workers=workers))  # type: ignore[arg-type]

    _, all_ = reading()
    want = [b.flatten().tolist() for b in all_]
    assert sorted(itertools.chain(*want)) == rows.flatten().tolist() and len(want[-1]) == 2
    batches, some = reading()
    seen = [next(some).flatten().tolist() for _ in range(3)]
    state = batches.state_dict()
    assert state["position"] == 12 and seen == want[:3]
    later, rest = reading(state)
    assert [b.flatten().tolist() for b in rest] == want[3:]
    assert (later.epoch, later.position) == (1, 0)
    loader = DataLoader(rows, batch_sampler=later)  # type: ignore[arg-type]
    second = [b.flatten().tolist() for b in later.read(loader)]
    assert second != want and sorted(itertools.chain(*second)) == rows.flatten().tolist()


def test_another_order_is_refused() -> None:
    one = graph((1,), (0,), (Replicate(),))
    state = Batches(one, 20, seed=1).state_dict()
    for other in (Batches(one, 21, seed=1), Batches(one, 20, seed=2), Batches(one, 20, seed=1, shuffle=False)):
        with pytest.raises(InputError, match="the position was saved with"):
            other.load_state_dict(state)
    with pytest.raises(InputError, match="make no batch"):
        Batches(one, 5, drop_last=True)
    assert len(Batches(one, 21, drop_last=True)) == 2


@pytest.mark.gloo
def test_real_processes(tmp_path: Path) -> None:
    """An epoch over local pieces, with a last batch that is smaller and uneven, equals one device; it is left and taken up again."""
    work = [{"training": "epoch", "model": "odd", "mesh": (2,), "options": {"inputs": "local", "random_costs": seed}} for seed in (0, 1, 5)]
    agree(work, launch(2, work, tmp_path))
