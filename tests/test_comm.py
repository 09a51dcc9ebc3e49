"""Conversions: legal, cheapest, and what they say really happens to the data."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netmind_autopar.costs.comm import BUCKET_BYTES, Conversions, Move, collective_seconds
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.mesh import Axis, Curve, Device, Mesh
from netmind_autopar.ir.plan import PlanAxis
from netmind_autopar.ir.spec import Partial, Replicate, Shard, Spec, is_valid, local_bytes, parse_spec, same_layout

MESHES = [(4,), (2, 2), (2, 3), (2, 2, 2)]
DEVICE = Device("test", (("float32", 1e12),), 10**9, 1e11, 1e10, 1e-6)
R, P = Replicate(), Partial("sum")


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    """Axes of different speed, so that the order of moves matters."""
    return Mesh(tuple(Axis(f"a{i}", n, 1e9 * (1 + 3 * i), 1e-5 / (1 + i)) for i, n in enumerate(sizes)), DEVICE)


def random_spec(rng: random.Random, dims: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Spec:
    options = [R, P, *(Shard(d, p) for d, parts in enumerate(dims) for p in range(len(parts)))]
    while True:
        spec = Spec(dims, dtype, tuple(rng.choice(options) for _ in sizes))
        if is_valid(spec, sizes):
            return spec


DIMS = [((8, 6), (12,)), ((48,), (12,)), ((48,), (3, 4)), ((7,), (9,)), ((5, 3), (4, 2)), ((15,), (8,)), ((1,), (6,)), ((24,),), ()]


def random_pair(rng: random.Random, sizes: tuple[int, ...]) -> tuple[Spec, Spec]:
    dims = rng.choice(DIMS)
    other = rng.choice([d for d in DIMS if [math.prod(p) for p in d] == [math.prod(p) for p in dims]])
    return random_spec(rng, dims, sizes), random_spec(rng, other, sizes)


# --- an independent statement of what moves there are ---------------------------------------------------------------------


def legal_moves(spec: Spec, sizes: tuple[int, ...]) -> list[tuple[str, int, Spec]]:
    """Written out from the contract, move by move."""
    out: list[tuple[str, int, Spec]] = []
    shards = [Shard(d, p) for d, parts in enumerate(spec.dims) for p in range(len(parts))]
    for axis, here in enumerate(spec.placements):
        if sizes[axis] == 1:
            continue
        inner = [p for p, n in zip(spec.placements[axis + 1 :], sizes[axis + 1 :], strict=True) if n > 1]
        if isinstance(here, Shard) and here in inner:
            continue

        def to(new: object, at: int = axis) -> Spec:
            return spec.with_placements(new if i == at else p for i, p in enumerate(spec.placements))  # type: ignore[misc]

        free = [s for s in shards if s not in inner and s != here and is_valid(to(s), sizes)]
        if isinstance(here, Shard):
            out += [("all_gather", axis, to(R)), *(("all_to_all", axis, to(s)) for s in free)]
        elif isinstance(here, Partial):
            out += [("all_reduce", axis, to(R)), *(("reduce_scatter", axis, to(s)) for s in free)]
        else:
            out += [("mask", axis, to(P)), *(("slice", axis, to(s)) for s in free)]
    return out


class BruteForce:
    """Every sequence of moves, cut off only when it is as dear as the best one that ends in the same place."""

    def __init__(self, conversions: Conversions, sizes: tuple[int, ...]) -> None:
        self.conversions, self.sizes, self.moves = conversions, sizes, {}

    def edges(self, spec: Spec) -> list[tuple[float, Spec]]:
        if spec not in self.moves:
            found = []
            for kind, axis, after in legal_moves(spec, self.sizes):
                ((space, _, (i, j)),) = self.conversions.grouped([spec, after])
                price = space.price(i, j, axis)
                assert price[0] == kind
                found.append((price[2], after))
            self.moves[spec] = found
        return self.moves[spec]

    def from_(self, start: Spec) -> dict[Spec, float]:
        best = {start: 0.0}
        front = [start]
        while front:
            reached = []
            for spec in front:
                for seconds, after in self.edges(spec):
                    if best[spec] + seconds < best.get(after, math.inf) * (1 - 1e-12):
                        best[after] = best[spec] + seconds
                        reached.append(after)
            front = reached
        return best

    def cheapest(self, a: Spec, b: Spec) -> float:
        """One change of parts on the way, wherever the layouts agree."""
        ahead = self.from_(a)
        direct = ahead.get(b, math.inf)
        if a.dims == b.dims:
            return direct
        tails = {v: self.from_(v).get(b, math.inf) for v in self.from_(b.replicated)}
        joints = (ahead[u] + tail for u in ahead for v, tail in tails.items() if same_layout(u, v, self.sizes))
        return min(joints, default=math.inf)


@pytest.mark.parametrize("random_costs", [None, 3], ids=["real", "random"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_equals_brute_force(sizes: tuple[int, ...], random_costs: int | None) -> None:
    rng = random.Random(f"{sizes}{random_costs}")
    conversions = Conversions(mesh_of(sizes), random_costs)
    brute = BruteForce(conversions, sizes)
    for _ in range(60 if len(sizes) < 3 else 25 if random_costs is None else 6):
        a, b = random_pair(rng, sizes)
        expected = 0.0 if same_layout(a, b, sizes) else brute.cheapest(a, b)
        assert conversions.seconds(a, b) == pytest.approx(expected, rel=1e-9), f"{a} -> {b}"


@pytest.mark.parametrize("sizes", [*MESHES, (1, 4), (2, 1, 3)], ids=str)
def test_paths_are_connected_and_cost_what_was_said(sizes: tuple[int, ...]) -> None:
    rng = random.Random(str(sizes))
    for random_costs in (None, 1):
        conversions = Conversions(mesh_of(sizes), random_costs)
        for _ in range(40):
            a, b = random_pair(rng, sizes)
            path = conversions.path(a, b)
            chain = [a, *(m.after for m in path)]
            assert chain[-1] == b
            assert all(m.before == before for m, before in zip(path, chain, strict=False))
            assert sum(m.seconds for m in path) == pytest.approx(conversions.seconds(a, b), rel=1e-9, abs=1e-15)
            for m in path:
                if m.kind == "recast":
                    assert same_layout(m.before, m.after, sizes)
                    assert (m.axis, m.bytes, m.seconds) == (-1, 0, 0.0)
                else:
                    canonical = [(k, ax, s) for k, ax, s in legal_moves(m.before, sizes)]
                    assert (m.kind, m.axis, m.after) in canonical


# --- known answers --------------------------------------------------------------------------------------------------------


def kinds(conversions: Conversions, a: str, b: str) -> list[tuple[str, int]]:
    return [(m.kind, m.axis) for m in conversions.path(parse_spec(a), parse_spec(b))]


def test_inner_axis_first() -> None:
    conversions = Conversions(mesh_of((2, 2)))
    path = kinds(conversions, "f32[64,64] S(0) S(0)", "f32[64,64] R S(0)")
    assert len(path) > 1
    assert path[0][1] == 1
    assert kinds(conversions, "f32[64,64] S(0) S(0)", "f32[64,64] S(0) R") == [("all_gather", 1)]


def test_known_conversions() -> None:
    conversions = Conversions(make_mesh("dp=2,tp=4", "h100-sxm"))
    big = "f32[4096,4096]"
    assert kinds(conversions, f"{big} P(sum) R", f"{big} R R") == [("all_reduce", 0)]
    assert kinds(conversions, f"{big} P(sum) R", f"{big} S(0) R") == [("reduce_scatter", 0)]
    assert kinds(conversions, f"{big} R R", f"{big} S(0) S(1)") in ([("slice", 0), ("slice", 1)], [("slice", 1), ("slice", 0)])
    assert kinds(conversions, f"{big} R S(0)", f"{big} R S(1)") == [("all_to_all", 1)]
    assert kinds(conversions, f"{big} R R", f"{big} R P(sum)") == [("mask", 1)]
    assert kinds(conversions, f"{big} S(0) P(max)", f"{big} S(0) S(1)") == [("reduce_scatter", 1)]
    assert kinds(conversions, "f32[4096] S(0) R", "f32[(64 64)] S(0.0) R") == [("recast", -1)]


def test_slow_outer_axis_is_reduced_in_pieces() -> None:
    """The hierarchical all-reduce: scatter inside the node, reduce the pieces between nodes, gather inside."""
    mesh = make_mesh("dp=4,tp=8", "h100-sxm")
    path = kinds(Conversions(mesh), "f32[65536,1024] P(sum) P(sum)", "f32[65536,1024] R R")
    assert path == [("reduce_scatter", 1), ("all_reduce", 0), ("all_gather", 1)]


def test_an_idle_axis_helps() -> None:
    """What is replicated along an axis is reduced in shares, one per coordinate: fewer bytes than one reduce-scatter."""
    conversions = Conversions(make_mesh("dp=2,tp=4", "h100-sxm"))
    path = conversions.path(parse_spec("f32[4096,4096] R P(sum)"), parse_spec("f32[4096,4096] R S(1)"))
    assert [(m.kind, m.axis) for m in path] == [("slice", 0), ("reduce_scatter", 1), ("all_gather", 0)]
    assert sum(m.bytes for m in path) == 32 << 20 < 48 << 20


def test_bytes_are_those_that_travel() -> None:
    conversions = Conversions(mesh_of((4,)))
    expected = {
        ("f32[8,80000] S(0)", "f32[8,80000] R"): 3 * 2 * 80000 * 4,
        ("f32[7,80000] S(0)", "f32[7,80000] R"): 3 * 2 * 80000 * 4,  # the short piece travels padded
        ("f32[7,80000] P(sum)", "f32[7,80000] S(0)"): 3 * 2 * 80000 * 4,
        ("f32[8,80000] P(sum)", "f32[8,80000] R"): 2 * 3 * 8 * 80000 * 4 // 4,
        ("f32[8,80000] S(0)", "f32[8,80000] S(1)"): 3 * 2 * 20000 * 4,
        ("f32[80000,7] S(0)", "f32[80000,7] S(1)"): 20000 * 5 * 4,  # as it is: the first device keeps two of seven columns
        ("f32[8,80000] R", "f32[8,80000] S(1)"): 0,
    }
    for (a, b), count in expected.items():
        (move,) = conversions.path(parse_spec(a), parse_spec(b))
        assert move.bytes == count, (a, b)


def test_impossible_conversions() -> None:
    conversions = Conversions(mesh_of((4,)))
    for a, b in [
        ("f32[8] R", "f64[8] R"),
        ("f32[8] R", "f32[9] R"),
        ("f32[8] R", "f32[8] P(max)"),
        ("f32[3] R", "f32[3] S(0)"),
        ("b8[8] R", "b8[8] P(sum)"),
    ]:
        assert conversions.seconds(parse_spec(a), parse_spec(b)) == math.inf
        with pytest.raises(ValueError, match="no chain of moves"):
            conversions.path(parse_spec(a), parse_spec(b))
    with pytest.raises(ValueError, match="one placement for each axis"):
        conversions.seconds(parse_spec("f32[8] R R"), parse_spec("f32[8] R"))


def test_axes_of_size_one_are_free() -> None:
    conversions = Conversions(mesh_of((1, 2)))
    for a, b in itertools.product(["R", "S(0)", "S(1)", "P(sum)"], repeat=2):
        assert conversions.seconds(parse_spec(f"f32[4,4] {a} S(1)"), parse_spec(f"f32[4,4] {b} S(1)")) == 0.0
        path = conversions.path(parse_spec(f"f32[4,4] {a} S(1)"), parse_spec(f"f32[4,4] {b} S(1)"))
        assert [m.kind for m in path] == ([] if a == b else ["recast"])


# --- properties -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MESHES), st.integers(0, 10**6), st.sampled_from([None, 2]))
def test_triangle_and_zero(sizes: tuple[int, ...], seed: int, random_costs: int | None) -> None:
    rng = random.Random(seed)
    conversions = Conversions(mesh_of(sizes), random_costs)
    dims = rng.choice(DIMS)
    a, b, c = (random_spec(rng, dims, sizes) for _ in range(3))
    ab, bc, ac = conversions.seconds(a, b), conversions.seconds(b, c), conversions.seconds(a, c)
    assert conversions.seconds(a, a) == 0.0
    assert 0 <= ac <= (ab + bc) * (1 + 1e-12)
    assert math.isfinite(ac)
    assert (ab == 0.0) == same_layout(a, b, sizes)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MESHES), st.integers(0, 10**6))
def test_bucketing_only_takes_latency_off(sizes: tuple[int, ...], seed: int) -> None:
    a, b = random_pair(random.Random(seed), sizes)
    conversions = Conversions(mesh_of(sizes))
    whole, bucketed = conversions.seconds(a, b), conversions.seconds(a, b, bucketed=True)
    assert 0 <= bucketed <= whole
    assert (bucketed > 0) == (whole > 0)


def test_bucketing_leaves_large_tensors_alone() -> None:
    conversions = Conversions(mesh_of((4,)))
    large = [parse_spec(f"f32[{BUCKET_BYTES}] {p}") for p in ("P(sum)", "R")]
    small = [parse_spec(f"f32[64] {p}") for p in ("P(sum)", "R")]
    assert conversions.seconds(*large, bucketed=True) == conversions.seconds(*large)
    assert conversions.seconds(*small, bucketed=True) < 0.01 * conversions.seconds(*small)


def test_only_all_reduces_share_a_latency() -> None:
    """Reduce-scatters of gradients are one message each: passes/bucket.py joins all-reduces alone."""
    conversions = Conversions(mesh_of((4,)))
    small = [parse_spec(f"f32[64] {p}") for p in ("P(sum)", "S(0)")]
    assert [m.kind for m in conversions.path(*small)] == ["reduce_scatter"]
    assert conversions.seconds(*small, bucketed=True) == conversions.seconds(*small)


@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("bucketed", [False, True])
def test_matrix_is_seconds(sizes: tuple[int, ...], bucketed: bool) -> None:
    rng = random.Random(7)
    conversions = Conversions(mesh_of(sizes))
    specs = [random_spec(rng, dims, sizes) for dims in (((8, 6), (12,)), ((48,), (12,)), ((48,), (3, 4))) for _ in range(6)]
    specs.append(parse_spec(f"f64[48,12] P(max){' R' * (len(sizes) - 1)}"))
    matrix = conversions.matrix(specs, specs[:-1], bucketed=bucketed)
    single = Conversions(conversions.mesh)
    expected = [[single.seconds(a, b, bucketed=bucketed) for b in specs[:-1]] for a in specs]
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)


def test_matrix_forbids_what_cannot_be() -> None:
    conversions = Conversions(mesh_of((4,)))
    matrix = conversions.matrix([parse_spec("f32[8] R"), parse_spec("f32[3] S(0)")], [parse_spec("f32[8] S(0)"), parse_spec("i64[8] R")])
    assert np.isfinite(matrix).tolist() == [[True, False], [False, False]]


def test_collective_seconds() -> None:
    axis = Axis("tp", 8, 1e11, 1e-6)
    assert collective_seconds("all_gather", axis, 1e9) == pytest.approx(7e-6 + 1e-2)
    assert collective_seconds("all_reduce", axis, 1e9) == pytest.approx(14e-6 + 1e-2)
    assert collective_seconds("all_reduce", Axis("tp", 1, 1e11, 1e-6), 1e9) == 0.0


def test_no_transfer_takes_less_than_no_time() -> None:
    """A measured curve may fall below its first point, which counts as the latency: more bytes that happened to travel faster."""
    curve = Curve("all_to_all", "", ((1e3, 2e-3), (1e5, 1.85e-3), (1e7, 5e-3)))
    mesh = Mesh((Axis("a", 2, 1e9, 1e-5, (curve,)),), make_mesh("a=2", "cpu").device)
    before, after = parse_spec("f32[8,2] S(0)"), parse_spec("f32[8,2] S(1)")
    for sent, transfer_s in ((500, 0.0), (50_000, 0.0), (10_000_000, 3e-3)):
        move = Move("all_to_all", 0, before, after, sent, float(collective_seconds("all_to_all", mesh.axes[0], sent)))
        assert move.transfer_s(mesh) == pytest.approx(transfer_s, abs=1e-12)


def test_trees_between_nodes() -> None:
    """Of small all-reduces over many nodes the latency counts, of which a tree has less; of large ones the bytes: a ring sends fewer."""
    ring, nodes = Axis("dp", 64, 5e10, 1e-5), Axis("dp", 64, 5e10, 1e-5, within=1)
    assert collective_seconds("all_reduce", nodes, 1e3) == pytest.approx(2 * 6 * 1e-5 + 1e3 * 64 / 63 / 5e10)
    assert collective_seconds("all_reduce", nodes, 1e10) == collective_seconds("all_reduce", ring, 1e10) == pytest.approx(1.26e-3 + 0.2)
    for kind in ("all_gather", "reduce_scatter"):
        assert collective_seconds(kind, nodes, 1e3) == pytest.approx(6e-5 + 1e3 / 5e10)
    assert collective_seconds("all_to_all", nodes, 1e3) == collective_seconds("all_to_all", ring, 1e3)


def test_nodes_of_several_devices() -> None:
    """4 nodes of 8: what a step of the hierarchical algorithm takes, written down by hand, and what 8 cards of a node carry together."""
    axis = Axis("dp", 32, 5e10, 1e-5, within=8, inner_bandwidth_bytes_s=4e11, inner_latency_s=1e-6)
    whole = 1e6
    sent = 2 * 31 / 32 * whole
    inside, between = 7e-6 + 7 / 8 * whole / 4e11, 4e-5 + 2 * whole / 8 / 5e10
    assert collective_seconds("all_reduce", axis, sent) == pytest.approx(2 * inside + between)
    piece = 1e6
    gathered = 3e-5 + 3 * piece / 5e10 + 7e-6 + 7 * 4 * piece / 4e11
    assert collective_seconds("all_gather", axis, 31 * piece) == pytest.approx(gathered)
    assert collective_seconds("reduce_scatter", axis, 31 * piece) == pytest.approx(gathered)
    moved = 3e-5 + 24 / 31 * 1e9 / 5e10 + 7e-6 + 7 / 31 * 1e9 / 4e11
    assert collective_seconds("all_to_all", axis, 1e9) == pytest.approx(min(moved, 31e-5 + 1e9 / 4e11))
    large = 1e10  # eight cards of 5e10 are as fast as the link within the node
    assert collective_seconds("all_reduce", axis, large) == pytest.approx(62e-5 + large / 4e11, rel=0.05)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"])
@pytest.mark.parametrize("within", [0, 1, 2, 8])
def test_more_choice_is_never_slower_and_more_bytes_never_faster(kind: str, within: int) -> None:
    sizes = np.geomspace(1, 1e11, 60)
    plain = Axis("a", 16, 5e10, 1e-5)
    inner = {"inner_bandwidth_bytes_s": 3e11, "inner_latency_s": 2e-6} if within > 1 else {}
    axis = Axis("a", 16, 5e10, 1e-5, within=within, **inner)
    seconds = collective_seconds(kind, axis, sizes)
    assert (seconds <= collective_seconds(kind, plain, sizes) * (1 + 1e-12)).all() and (np.diff(seconds) > 0).all()
    assert [collective_seconds(kind, axis, float(x)) for x in sizes] == seconds.tolist()
    assert (collective_seconds(kind, axis, sizes, latency_share=0.0) <= seconds).all()


@pytest.mark.parametrize(
    ("mesh", "within"),
    [("a=64", [8]), ("dp=8,tp=8", [1, 0]), ("dp=4,tp=4", [2, 0]), ("a=12", [1]), ("a=2,b=4,c=4", [1, 2, 0]), ("a=8", [0])],
)
def test_who_shares_a_node(mesh: str, within: list[int]) -> None:
    assert [axis.within for axis in make_mesh(mesh, "dgx-h100").axes] == within
    assert [PlanAxis.of(axis).axis().within for axis in make_mesh(mesh, "dgx-h100").axes] == within


# (devices, bytes, seconds): all-reduce measured on A100 (NVLink), from the tables published with vTrain (MIT licence)
MEASURED = [
    (2, 1048576, 4.421e-05),
    (2, 8388608, 8.69e-05),
    (2, 67108864, 0.0004047),
    (2, 536870912, 0.002838),
    (2, 1073741824, 0.005443),
    (4, 1048576, 5.14e-05),
    (4, 8388608, 0.0001168),
    (4, 67108864, 0.0005438),
    (4, 536870912, 0.00372),
    (4, 1073741824, 0.007259),
    (8, 1048576, 9.279e-05),
    (8, 8388608, 0.0001343),
    (8, 67108864, 0.0005799),
    (8, 536870912, 0.004191),
    (8, 1073741824, 0.008193),
]


@pytest.mark.parametrize(("n", "size", "measured_s"), MEASURED)
def test_all_reduce_against_measurements(n: int, size: int, measured_s: float) -> None:
    conversions = Conversions(make_mesh(f"tp={n}", "a100-80"))
    predicted_s = conversions.seconds(parse_spec(f"f32[{size // 4}] P(sum)"), parse_spec(f"f32[{size // 4}] R"))
    assert 0.75 < predicted_s / measured_s < 1.33


SCRIPT = """
import json
from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.spec import parse_spec
c = Conversions(make_mesh("a=2,b=4", "h100-sxm"), {seed})
pairs = [("P(sum) P(sum)", "S(0) S(1)"), ("S(0) S(0)", "R S(0)"), ("S(1) R", "S(0) S(1)"), ("R R", "P(sum) S(0)")]
print(json.dumps([[(m.kind, m.axis, m.seconds) for m in c.path(*(parse_spec("f32[64,64] " + s) for s in p))] for p in pairs]))
"""


def test_random_costs_are_the_same_in_every_process() -> None:
    def run(seed: int, hash_seed: str) -> list:
        env = {"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(seed=seed)], capture_output=True, text=True, env=env, check=True)
        return json.loads(done.stdout)

    assert run(1, "0") == run(1, "1")
    mesh = make_mesh("a=2,b=4", "h100-sxm")
    specs = [parse_spec("f32[64,64] " + p) for p in ("S(0) S(1)", "P(sum) S(1)", "R R")]

    def chains(seed: int) -> tuple:
        conversions = Conversions(mesh, seed)
        return tuple((m.kind, m.axis) for a, b in itertools.permutations(specs, 2) for m in conversions.path(a, b))

    assert len({chains(seed) for seed in range(8)}) > 4  # other seeds take other ways


def test_random_costs_find_odd_chains() -> None:
    """Some chain is longer than the shortest one: the point of random prices."""
    mesh = mesh_of((2, 2))
    a, b = parse_spec("f32[64,64] S(0) S(1)"), parse_spec("f32[64,64] S(1) S(0)")
    assert max(len(Conversions(mesh, seed).path(a, b)) for seed in range(10)) > len(Conversions(mesh).path(a, b))


def test_local_bytes_never_enter_negative() -> None:
    for sizes in MESHES:
        rng = random.Random(11)
        conversions = Conversions(mesh_of(sizes))
        for _ in range(30):
            a, b = random_pair(rng, sizes)
            for m in conversions.path(a, b):
                assert 0 <= m.bytes <= 2 * max(local_bytes(m.before, sizes), local_bytes(m.after, sizes)) * max(sizes)
                assert 0.0 <= m.seconds < math.inf
