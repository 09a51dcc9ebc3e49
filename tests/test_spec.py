"""Layouts: cutting and joining are inverse, and layouts called equal hold equal local data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from netmind_autopar.ir.spec import (
    Partial,
    Replicate,
    Shard,
    Spec,
    chunk,
    is_even,
    is_valid,
    layout,
    local_bytes,
    local_parts,
    local_shape,
    parse_spec,
    part_start,
    plain,
    same_layout,
    shard,
    splits,
    unshard,
)

MESHES = st.sampled_from([(2,), (3,), (4,), (2, 2), (2, 3), (1, 2), (2, 1, 2), (2, 2, 2)])
DIMS = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)


@st.composite
def placements(draw, dims, partial=True):
    places = [Shard(d, i) for d, parts in enumerate(dims) for i in range(len(parts))]
    return draw(st.sampled_from([Replicate(), *places, *places, *([Partial("sum")] if partial else [])]))


@st.composite
def specs(draw, partial=True):
    sizes, dims = draw(MESHES), draw(DIMS)
    spec = Spec(dims, torch.float64, tuple(draw(placements(dims, partial)) for _ in sizes))
    assume(is_valid(spec, sizes))
    return spec, sizes


def coords(sizes):
    return list(itertools.product(*(range(n) for n in sizes)))


def tensor(spec):
    return torch.arange(math.prod(spec.shape), dtype=torch.float64).reshape(spec.shape) + 1


@settings(max_examples=300, deadline=None)
@given(specs())
def test_shard_and_unshard_are_inverse(case):
    """Grouped parts, uneven pieces, several axes on one part, Partial."""
    spec, sizes = case
    whole = tensor(spec)
    locals_ = [shard(whole, spec, sizes, c) for c in coords(sizes)]
    assert torch.equal(unshard(locals_, spec, sizes), whole)
    assert [tuple(t.shape) for t in locals_] == [local_shape(spec, sizes, c) for c in coords(sizes)]
    assert max(t.numel() for t in locals_) * 8 == local_bytes(spec, sizes), "the first device is the fullest"
    assert all(t.numel() for t in locals_), "a valid spec leaves no device without elements"
    assert is_even(spec, sizes) == (len({tuple(local_parts(spec, sizes, c)) for c in coords(sizes)}) == 1)


@settings(max_examples=200, deadline=None)
@given(specs(partial=False))
def test_part_start_is_where_the_piece_lies(case):
    spec, sizes = case
    for c in coords(sizes):
        for i, n in enumerate(spec.parts):
            index = torch.arange(n).reshape([n if j == i else 1 for j in range(len(spec.parts))]).expand(spec.parts)
            piece = shard(index.reshape(spec.shape), spec, sizes, c).reshape(local_parts(spec, sizes, c))
            assert int(piece.min()) == part_start(spec, sizes, c, i)


def _views(shape):
    """Ways to see each dim as parts."""
    return [
        [
            parts
            for k in (1, 2, 3)
            for parts in itertools.product(range(1, n + 1), repeat=k)
            if math.prod(parts) == n and (k == 1 or 1 not in parts)
        ]
        for n in shape
    ]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([(12,), (8,), (6, 4), (24,), (5, 6)]), MESHES, st.data())
def test_equal_layouts_hold_equal_data(shape, sizes, data):
    pair = []
    for _ in range(2):
        dims = tuple(data.draw(st.sampled_from(ways)) for ways in _views(shape))
        pair.append(Spec(dims, torch.float64, tuple(data.draw(placements(dims)) for _ in sizes)))
        assume(is_valid(pair[-1], sizes))
    a, b = pair
    whole = tensor(a)
    equal = all(torch.equal(shard(whole, a, sizes, c), shard(whole, b, sizes, c)) for c in coords(sizes))
    if same_layout(a, b, sizes):
        assert equal
    elif sum(isinstance(p, Shard) for p in a.placements) <= 1 and sum(isinstance(p, Shard) for p in b.placements) <= 1:
        assert not equal or a.placements == b.placements, f"{a} and {b} hold the same data but are called different"


@pytest.mark.parametrize("dims", [((6,),), ((2, 3),), ((4, 6), (3,)), ((12,), (5,))])
def test_all_pairs_of_layouts_on_two_axes(dims):
    """Exhaustively: same_layout is never true for layouts that differ in data."""
    sizes = (2, 2)
    shape = tuple(math.prod(p) for p in dims)
    every = [Spec(view, torch.float64, (p, q)) for view in itertools.product(*_views(shape)) for p in _all(view) for q in _all(view)]
    every = [s for s in every if is_valid(s, sizes)]
    whole = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) + 1
    held: dict[tuple, tuple] = {}
    for spec in every:
        data = tuple(tuple(shard(whole, spec, sizes, c).flatten().tolist()) for c in coords(sizes))
        key = layout(spec, sizes)
        assert held.setdefault(key, data) == data, spec


def _all(dims):
    return [Replicate(), Partial("sum"), *(Shard(d, i) for d, parts in enumerate(dims) for i in range(len(parts)))]


@settings(max_examples=200, deadline=None)
@given(specs())
def test_print_and_parse_are_inverse(case):
    spec, _ = case
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "f32", "f31[2] R", "f32[2] X", "f32[2] P(mean)", "f32[a] R"])
def test_parse_refuses(text):
    with pytest.raises(ValueError):
        parse_spec(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9))
def test_chunks_are_those_of_torch(size, n):
    pieces = [chunk(size, n, i) for i in range(n)]
    assert [length for _, length in pieces if length] == [len(t) for t in torch.arange(size).chunk(n)]
    assert sum(length for _, length in pieces) == size
    assert splits(size, n) == all(length for _, length in pieces)
    assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(pieces))


def test_reductions_join_with_their_own_operator():
    locals_ = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])]
    for op, expected in (("sum", [4.0, 7.0]), ("max", [3.0, 5.0]), ("min", [1.0, 2.0])):
        assert unshard(locals_, plain((2,), torch.float32, [Partial(op)]), (2,)).tolist() == expected


def test_uneven_pieces_nest():
    spec = plain((7,), torch.float64, [Shard(0), Shard(0)])
    assert [shard(torch.arange(7.0), spec, (2, 2), c).tolist() for c in coords((2, 2))] == [[0, 1], [2, 3], [4, 5], [6]]
    assert not is_valid(plain((4,), torch.float64, [Shard(0)]), (3,))
