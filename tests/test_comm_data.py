"""Chains of moves, carried out on every rank's tensor by a tiny machine that knows nothing of the runtime."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from netmind_autopar.costs.comm import Conversions, Move
from netmind_autopar.ir.mesh import Axis, Device, Mesh
from netmind_autopar.ir.spec import Partial, Replicate, Shard, Spec, chunk, is_valid, local_shape, parse_spec, shard, unshard

MESHES = [(4,), (2, 2), (2, 3), (2, 2, 2)]
DIMS = [((8, 6), (12,)), ((48,), (12,)), ((48,), (3, 4)), ((7,), (9,)), ((5, 3), (4, 2)), ((15,), (8,)), ((1,), (6,)), ((24,),), ()]
DEVICE = Device("test", (("float32", 1e12),), 10**9, 1e11, 1e10, 1e-6)
R, P = Replicate(), Partial("sum")
Coord = tuple[int, ...]


def random_pair(rng: random.Random, sizes: Coord) -> tuple[Spec, Spec]:
    """Two layouts of one tensor, whose dims may be seen as other parts."""
    dims = rng.choice(DIMS)
    other = rng.choice([d for d in DIMS if [math.prod(p) for p in d] == [math.prod(p) for p in dims]])
    found: list[Spec] = []
    while len(found) < 2:
        here = (dims, other)[len(found)]
        options = [R, P, *(Shard(d, p) for d, parts in enumerate(here) for p in range(len(parts)))]
        spec = Spec(here, torch.float64, tuple(rng.choice(options) for _ in sizes))
        if is_valid(spec, sizes):
            found.append(spec)
    return found[0], found[1]


def run_move(move: Move, ranks: list[torch.Tensor], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Every rank's tensor after one move, from those of its group along the axis alone."""
    if move.kind == "recast":
        return ranks
    coords = list(itertools.product(*(range(n) for n in sizes)))
    at = {c: i for i, c in enumerate(coords)}
    out = []
    for coord in coords:
        group = [(*coord[: move.axis], i, *coord[move.axis + 1 :]) for i in range(sizes[move.axis])]
        out.append(run_rank(move, [ranks[at[c]] for c in group], group, coord, sizes))
    return out


def opened(tensor: torch.Tensor, spec: Spec, sizes: tuple[int, ...], coord: tuple[int, ...]) -> torch.Tensor:
    parts = list(spec.parts)
    for axis, p in enumerate(spec.placements):
        if isinstance(p, Shard):
            parts[spec.index(p)] = chunk(parts[spec.index(p)], sizes[axis], coord[axis])[1]
    return tensor.reshape(parts)


def run_rank(move: Move, xs: list[torch.Tensor], group: list[Coord], coord: Coord, sizes: Coord) -> torch.Tensor:
    before, after, axis = move.before, move.after, move.axis
    mine, shape = coord[axis], local_shape(after, sizes, coord)
    xs = [opened(x, before, sizes, c) for x, c in zip(xs, group, strict=True)]
    new = after.placements[axis]
    if move.kind == "mask":
        return (xs[0] if mine == 0 else torch.zeros_like(xs[mine])).reshape(shape)
    if move.kind in ("all_reduce", "reduce_scatter"):
        op = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[before.placements[axis].op]
        whole = xs[0]
        for x in xs[1:]:
            whole = op(whole, x)
    elif move.kind in ("all_gather", "all_to_all"):
        whole = torch.cat(xs, dim=before.index(before.placements[axis]))
    else:
        whole = xs[mine]
    if isinstance(new, Shard):
        i = after.index(new)
        whole = whole.narrow(i, *chunk(whole.shape[i], sizes[axis], mine))
    return whole.reshape(shape)


def scattered(spec: Spec, sizes: tuple[int, ...], whole: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
    """All ranks' tensors; Partial sums are real sums of different terms, not one term and zeros."""
    coords = list(itertools.product(*(range(n) for n in sizes)))
    sums = [axis for axis, p in enumerate(spec.placements) if isinstance(p, Partial)]
    flat = spec.with_placements(R if axis in sums else p for axis, p in enumerate(spec.placements))
    terms = math.prod(sizes[a] for a in sums)
    pieces = [torch.randint(-9, 9, whole.shape, generator=rng).to(whole.dtype) for _ in range(terms - 1)]
    pieces.append(whole - sum(pieces, torch.zeros_like(whole)))
    out = []
    for c in coords:
        which = 0
        for a in sums:
            which = which * sizes[a] + c[a]
        out.append(shard(pieces[which], flat, sizes, c))
    return out


@pytest.mark.parametrize("random_costs", [None, 5, 6], ids=["real", "random5", "random6"])
@pytest.mark.parametrize("sizes", [*MESHES, (1, 3)], ids=str)
def test_paths_move_the_data_right(sizes: tuple[int, ...], random_costs: int | None) -> None:
    rng, numbers = random.Random(f"{sizes}{random_costs}data"), torch.Generator().manual_seed(0)
    axes = tuple(Axis(f"a{i}", n, 1e9 * (1 + 3 * i), 1e-5 / (1 + i)) for i, n in enumerate(sizes))
    conversions = Conversions(Mesh(axes, DEVICE), random_costs)
    coords = list(itertools.product(*(range(n) for n in sizes)))
    for _ in range(50):
        a, b = random_pair(rng, sizes)
        whole = torch.randint(-9, 9, a.shape, generator=numbers).to(torch.float64)
        ranks = scattered(a, sizes, whole, numbers)
        assert torch.equal(unshard(ranks, a, sizes), whole)
        for move in conversions.path(a, b):
            ranks = run_move(move, ranks, sizes)
            assert torch.equal(unshard(ranks, move.after, sizes), whole), f"{a} -> {b}: {move}"
        assert [tuple(x.shape) for x in ranks] == [local_shape(b, sizes, c) for c in coords]
        if not b.has_partial:
            assert all(torch.equal(x, shard(whole, b, sizes, c)) for x, c in zip(ranks, coords, strict=True))


def test_the_simulator_sees_a_gather_in_the_wrong_order() -> None:
    """Gathering the outer of two axes that split one dim mixes the pieces up: that is why it is not a move."""
    before, after = parse_spec("f64[8] S(0) S(0)"), parse_spec("f64[8] R S(0)")
    whole = torch.arange(8, dtype=torch.float64)
    ranks = [shard(whole, before, (2, 2), c) for c in itertools.product(range(2), range(2))]
    wrong = run_move(Move("all_gather", 0, before, after, 0, 0.0), ranks, (2, 2))
    assert not torch.equal(unshard(wrong, after, (2, 2)), whole)
