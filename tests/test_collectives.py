"""Moves: packing, the lockstep wire and the real one, over even and uneven pieces."""

from __future__ import annotations

import itertools

import pytest
import torch

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import GraphError
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.spec import Partial, Replicate, Shard, Spec, is_valid, shard, unshard
from netmind_autopar.runtime.collectives import groups_along, lockstep, stage

SHAPES = {"even": ((8,), (4,)), "uneven": ((7,), (5,)), "parts": ((3, 4), (6,)), "uneven parts": ((2, 5), (3, 3))}
MESHES = {"4": "a=4", "2x2": "a=2,b=2", "3": "a=3", "2x3": "a=2,b=3"}


def all_specs(dims: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> list[Spec]:
    shards = [Shard(d, p) for d, parts in enumerate(dims) for p in range(len(parts))]
    options = [Replicate(), Partial("sum"), *shards]
    made = (Spec(dims, torch.float64, p) for p in itertools.product(options, repeat=len(sizes)))
    return [s for s in made if is_valid(s, sizes)]


def split_randomly(x: torch.Tensor, spec: Spec, sizes: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    """Local tensors whose Partial terms are random, not just zeros."""
    locals_ = [shard(x, spec, sizes, c) for c in coordinates(sizes)]
    for axis, placement in enumerate(spec.placements):
        if isinstance(placement, Partial):
            for group in groups_along(axis, sizes):
                noise = torch.randn(locals_[group[0]].shape, generator=generator, dtype=x.dtype)
                locals_[group[0]] = locals_[group[0]] + noise
                locals_[group[1]] = locals_[group[1]] - noise
    return locals_


@pytest.mark.parametrize("mesh_text", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("dims", SHAPES.values(), ids=SHAPES)
def test_every_conversion_ends_in_the_target_layout(dims: tuple, mesh_text: str) -> None:
    mesh = make_mesh(mesh_text, "h100-sxm")
    conversions, generator = Conversions(mesh), torch.Generator().manual_seed(0)
    specs = all_specs(dims, mesh.sizes)
    x = torch.randn(specs[0].shape, generator=generator, dtype=torch.float64)
    tried = 0
    for a, b in itertools.product(specs, specs):
        if len(specs) > 12 and (tried := tried + 1) % 7:
            continue
        locals_ = split_randomly(x, a, mesh.sizes, generator)
        for move in conversions.path(a, b):
            steps = [stage(move.kind, move.axis, str(move.before), str(move.after), mesh.sizes, c) for c in coordinates(mesh.sizes)]
            packed = [s.pack(t) for s, t in zip(steps, locals_, strict=True)]
            carried = packed if steps[0].wire is None else lockstep(steps, packed, mesh.sizes)
            locals_ = [s.unpack(t) for s, t in zip(steps, carried, strict=True)]
            assert steps[0].wire is None or all(t.is_contiguous() for t in locals_), f"{a} → {b}: what arrives is dense"
        torch.testing.assert_close(unshard(locals_, b, mesh.sizes), x, rtol=1e-12, atol=1e-12, msg=f"{a} → {b}")
        if not b.has_partial:
            for c, local in zip(coordinates(mesh.sizes), locals_, strict=True):
                torch.testing.assert_close(local, shard(x, b, mesh.sizes, c), rtol=1e-12, atol=1e-12, msg=f"{a} → {b} at {c}")


def test_a_move_that_is_none_is_refused() -> None:
    with pytest.raises(GraphError, match="not a move"):
        stage("teleport", 0, "f32[4] S(0)", "f32[4] R", (2,), (0,))
    with pytest.raises(GraphError, match="not split"):
        stage("all_gather", 0, "f32[4] R", "f32[4] R", (2,), (0,))
    with pytest.raises(GraphError, match="not Partial"):
        stage("all_reduce", 0, "f32[4] S(0)", "f32[4] R", (2,), (0,))


def test_groups_along_axes() -> None:
    assert groups_along(0, (2, 3)) == ((0, 3), (1, 4), (2, 5))
    assert groups_along(1, (2, 3)) == ((0, 1, 2), (3, 4, 5))
