"""Random ops: what is drawn depends on seed, salt and place alone, follows its distribution, and is the same on every mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from case_kit import make
from random_plans import random_plan
from torch import Tensor, fx, nn

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import CaptureError
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.program import Program
from netmind_autopar.ir.spec import shard, unshard
from netmind_autopar.kernels import random as kernel
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.algebra import input_specs, output_specs, strategies
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.rules.localize import localize_args
from netmind_autopar.rules.prove import put_tensors
from netmind_autopar.rules.table import rule_of
from netmind_autopar.runtime import simulate
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare

OPS = torch.ops.autopar
MESHES = {"a=1": (1,), "a=2": (2,), "a=4": (4,), "a=2,b=2": (2, 2), "a=3": (3,)}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = {"uniform": (-1.0, 3.0), "normal": (0.5, 2.0), "exponential": (1.5, 0.0)}
MANY = 1 << 18


def drawn(kind: str, shape: tuple[int, ...], a: float, b: float, dtype: torch.dtype, *, seed: int = 1, salt: int = 0) -> Tensor:
    size = list(shape)
    return getattr(OPS, kind)(torch.tensor(seed), a, b, salt, dtype, size, size, [0] * len(size), size)


# --- the same numbers wherever they are made -------------------------------------------------------------------------


def split_everywhere(case: tuple[str, tuple, dict], sizes: tuple[int, ...]) -> int:
    """Run a case under every strategy of its rule, rank by rank; the joined result must be the whole one, bit for bit."""
    call = make(case)
    rule, whole, count = rule_of(call), call.target(*call.args), 0
    whole = whole[0] if isinstance(whole, tuple) else whole
    for strategy in strategies(rule, sizes):
        ins = input_specs(rule, strategy, [t.dtype for t in call.tensors])
        out = output_specs(rule, strategy, [whole.dtype] * len(rule.outputs))[0]
        if out is None or out.has_partial or any(s.has_partial for s in ins):
            continue
        pieces = []
        for coord in coordinates(sizes):
            args, kwargs = localize_args(call.args, call.kwargs, rule, strategy, out, sizes, coord)
            args, kwargs = put_tensors(args, kwargs, [shard(t, s, sizes, coord) for t, s in zip(call.tensors, ins, strict=True)])
            made = call.target(*args, **kwargs)
            pieces.append(made[0] if isinstance(made, tuple) else made)
        joined = unshard(pieces, out, sizes)
        assert torch.equal(joined != 0, whole != 0) if "attention" in case[0] else torch.equal(joined, whole), strategy
        count += 1
    return count


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_bitwise_those_of_the_whole(kind: str, dtype: torch.dtype, mesh: str) -> None:
    size = [7, 11, 10]
    case = (f"autopar.{kind}.default", (torch.tensor(3), *KINDS[kind], 4, dtype, size, size, [0] * 3, size), {})
    assert split_everywhere(case, MESHES[mesh]) >= (1 if mesh == "a=1" else 4)


@pytest.mark.parametrize("mesh", MESHES)
def test_integers_are_bitwise_the_same(mesh: str) -> None:
    size = [7, 11, 10]
    case = ("autopar.randint.default", (torch.tensor(3), -(2**40), 2**40, 4, torch.int64, size, size, [0] * 3, size), {})
    assert split_everywhere(case, MESHES[mesh]) >= (1 if mesh == "a=1" else 4)


@pytest.mark.parametrize("mesh", MESHES)
def test_dropout_masks_are_bitwise_the_same(mesh: str) -> None:
    size = [7, 11, 10]
    for dtype in FLOATS:
        x = torch.ones(size, dtype=dtype)
        case = ("autopar.dropout.default", (x, torch.tensor(9), 0.3, 2, size, [0] * 3, size), {})
        assert split_everywhere(case, MESHES[mesh]) >= (1 if mesh == "a=1" else 4)
    assert 0.1 < float((make(case).outputs[0] == 0).float().mean()) < 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("mesh", MESHES)
def test_attention_masks_are_bitwise_the_same(mesh: str) -> None:
    """All weights equal and the values a unit matrix: what comes out is the mask itself."""
    b, h, n = 4, 6, 8
    q, v = torch.zeros(b, h, n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64).expand(b, h, n, n).contiguous()
    names = [a.name for a in OPS.attention.default._schema.arguments]
    values: dict[str, Any] = {"q": q, "k": q, "v": v, "mask": None, "seed": torch.tensor(7), "causal": False, "scale": 1.0, "p": 0.4}
    more = {a.name: a.default_value for a in OPS.attention.default._schema.arguments if a.has_default_value()}
    values |= {"salt": 3, "b_start": 0, "h_start": 0, "heads": h, **more}
    rest = {"s_start": 0, "rows": n}
    args = tuple(values[name] if name in values else rest.get(name, n) for name in names)
    assert split_everywhere(("autopar.attention.default", args, {}), MESHES[mesh]) >= (1 if mesh == "a=1" else 3)


def test_lengths_and_offsets_do_not_matter() -> None:
    """Pieces that begin and end anywhere: vector instructions and their remainders round alike."""
    for kind, (a, b) in KINDS.items():
        for dtype in FLOATS:
            whole = drawn(kind, (11, 301), a, b, dtype)
            for (r, c), (m, n) in (((0, 0), (11, 1)), ((3, 7), (5, 3)), ((10, 1), (1, 300)), ((2, 298), (9, 3)), ((0, 13), (11, 17))):
                part = getattr(OPS, kind)(torch.tensor(1), a, b, 0, dtype, [m, n], [11, 301], [r, c], [m, n])
                assert torch.equal(part, whole[r : r + m, c : c + n]), (kind, dtype)


def test_beyond_2_to_the_32() -> None:
    parts = [3, 1 << 31]
    rows = [OPS.normal(torch.tensor(1), 0.0, 1.0, 0, torch.float64, [1, 64], parts, [i, 5], [1, 64]) for i in range(3)]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2]) and not torch.equal(rows[1], rows[2])
    tail = OPS.normal(torch.tensor(1), 0.0, 1.0, 0, torch.float64, [1, 8], parts, [2, 10], [1, 8])
    assert torch.equal(tail, rows[2][:, 5:13])


# --- they follow their distributions ---------------------------------------------------------------------------------

CDF: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda x: (x + 1) / 4,
    "normal": lambda x: 0.5 * (1 + torch.erf((x - 0.5) / 2 / math.sqrt(2))),
    "exponential": lambda x: -torch.expm1(-1.5 * x),
}
MOMENTS = {"uniform": (1.0, 16 / 12), "normal": (0.5, 4.0), "exponential": (1 / 1.5, 1 / 1.5**2)}


def kolmogorov(x: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """The largest distance between the sample's distribution and `cdf`, times the root of the sample's size."""
    values = cdf(x.double().flatten().sort()[0])
    n = values.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - values).max(), (values - steps[:-1]).max())) * math.sqrt(n)


@pytest.mark.parametrize("seed", [0, 1, 2**61 + 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_distribution(kind: str, dtype: torch.dtype, seed: int) -> None:
    """Kolmogorov and Smirnov's bound for one false alarm in 10,000 is 2.23; mean and variance within four standard errors."""
    x = drawn(kind, (MANY,), *KINDS[kind], dtype, seed=seed).double()
    mean, var = MOMENTS[kind]
    assert kolmogorov(x, CDF[kind]) < 2.23
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(var / MANY)
    fourth = float(((x - mean) ** 4).mean())
    assert abs(float(((x - mean) ** 2).mean()) - var) < 4 * math.sqrt((fourth - var**2) / MANY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_short_floats_are_the_long_ones_rounded(kind: str, dtype: torch.dtype) -> None:
    a, b = KINDS[kind]
    short, long = drawn(kind, (4096,), a, b, dtype).double(), drawn(kind, (4096,), a, b, torch.float32).double()
    step = torch.finfo(dtype).eps
    assert ((short - long).abs() <= step * (long.abs() + abs(b - a))).all()


def test_integers_are_even() -> None:
    counts = torch.bincount(drawn("randint", (MANY,), 3, 20, torch.int64) - 3, minlength=17).double()
    expected = MANY / 17
    assert counts.numel() == 17 and float(((counts - expected) ** 2 / expected).sum()) < 45.9  # chi-square, 16 degrees, 1 in 10,000
    wide = drawn("randint", (4096,), -(2**61), 2**61, torch.int64).double() / 2**61
    assert kolmogorov(wide, lambda x: (x + 1) / 2) < 2.23


def correlation(x: Tensor, y: Tensor) -> float:
    """In standard errors."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).mean() / (x.std() * y.std())) * math.sqrt(x.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_independent(kind: str) -> None:
    """Between salts, steps, neighbours at several distances and powers of two, and of squares too."""
    base = drawn(kind, (512, 512), *KINDS[kind], torch.float32, seed=100)
    others = [drawn(kind, (512, 512), *KINDS[kind], torch.float32, seed=100, salt=salt) for salt in (1, 2, 1000)]
    others += [drawn(kind, (512, 512), *KINDS[kind], torch.float32, seed=seed) for seed in (101, 100 + 2**32, 100 ^ 1)]
    others += [base.roll(n, 1) for n in (1, 2, 3, 16, 256)] + [base.roll(n, 0) for n in (1, 2, 64)] + [base.T, base.flip(0, 1)]
    for other in others:
        assert abs(correlation(base, other)) < 5
        assert abs(correlation(base**2, other**2)) < 5


def test_bits_are_even_and_independent() -> None:
    bits = drawn("randint", (MANY,), 0, 2**62, torch.int64)
    ones = torch.stack([(bits >> k) & 1 for k in range(62)]).double()
    assert ((ones.mean(1) - 0.5).abs() < 4.5 * 0.5 / math.sqrt(MANY)).all()
    off = torch.corrcoef(ones) - torch.eye(62, dtype=torch.float64)
    assert off.abs().max() < 5.5 / math.sqrt(MANY)


def test_ends_of_intervals() -> None:
    u = drawn("uniform", (MANY,), 0.0, 1.0, torch.bfloat16)
    assert u.min() >= 0 and u.max() < 1
    for dtype in FLOATS:
        x = drawn("uniform", (MANY,), 3.0, 3.1, dtype)
        assert x.min() >= torch.tensor(3.0, dtype=dtype) and x.max() < 3.1
    e = drawn("exponential", (MANY,), 1.0, 0.0, torch.float32)
    assert e.min() > 0 and torch.isfinite(e.log()).all()


def test_own_logarithm_and_cosine() -> None:
    u = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp_min(1e-30)
    for x in (u, u**12, 1 - u * 1e-8, torch.tensor([2.0**-53, 0.5, 1.0, math.sqrt(0.5)], dtype=torch.float64)):
        assert torch.allclose(kernel._log(x), x.log(), rtol=1e-15, atol=0)
        assert torch.allclose(kernel._cos_turns(x % 1), torch.cos(2 * math.pi * (x % 1)), rtol=0, atol=2e-15)


# --- every op that users' models call --------------------------------------------------------------------------------


class Draw(nn.Module):
    """One random op on ones, beside a parameter so that there is something to train."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.w * x.sum(), self.function(x.detach())


ALPHA = 1.7580993408473766
A_SCALE = 1 / math.sqrt((ALPHA**2 * 0.3 + 1) * 0.7)
WEIGHTS = torch.tensor([[1.0, 0, 2, 1]])
# name -> (function of a tensor of ones, mean, standard deviation) of the elements that are drawn
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "rand": (lambda x: torch.rand(x.shape), 0.5, 12**-0.5),
    "rand_like": (lambda x: torch.rand_like(x), 0.5, 12**-0.5),
    "randn": (lambda x: torch.randn(*x.shape, dtype=torch.float64), 0, 1),
    "randn_like": (lambda x: torch.randn_like(x, dtype=torch.float32), 0, 1),
    "randn_complex": (lambda x: torch.view_as_real(torch.randn(x.shape, dtype=torch.complex128)), 0, 0.5**0.5),
    "randint": (lambda x: torch.randint(5, x.shape), 2, 2**0.5),
    "randint_low": (lambda x: torch.randint(-2, 3, x.shape), 0, 2**0.5),
    "randint_like": (lambda x: torch.randint_like(x, 5), 2, 2**0.5),
    "randint_like_low": (lambda x: torch.randint_like(x, 1, 6), 3, 2**0.5),
    "bernoulli": (lambda x: torch.bernoulli(x * 0.3), 0.3, 0.21**0.5),
    "bernoulli_p": (lambda x: torch.bernoulli(x, 0.3), 0.3, 0.21**0.5),
    "bernoulli_": (lambda x: torch.empty_like(x).bernoulli_(0.3), 0.3, 0.21**0.5),
    "bernoulli_tensor": (lambda x: torch.empty_like(x).bernoulli_(x * 0.3), 0.3, 0.21**0.5),
    "normal_tensors": (lambda x: torch.normal(x, x * 2), 1, 2),
    "normal_mean": (lambda x: torch.normal(x, 2.0), 1, 2),
    "normal_std": (lambda x: torch.normal(3.0, x), 3, 1),
    "normal_size": (lambda x: torch.normal(1.0, 2.0, x.shape), 1, 2),
    "normal_": (lambda x: torch.empty_like(x).normal_(1.0, 2.0), 1, 2),
    "uniform_": (lambda x: torch.empty_like(x).uniform_(-1, 3), 1, 4 / 12**0.5),
    "exponential_": (lambda x: torch.empty_like(x).exponential_(2.0), 0.5, 0.5),
    "geometric_": (lambda x: torch.empty_like(x).geometric_(0.4), 2.5, 0.6**0.5 / 0.4),
    "log_normal_": (lambda x: torch.empty_like(x).log_normal_(0.0, 0.5).log(), 0, 0.5),
    "cauchy_": (lambda x: torch.empty_like(x).cauchy_(0.0, 1.0).atan(), 0, math.pi / 12**0.5),
    "random_to": (lambda x: torch.empty_like(x).random_(5), 2, 2**0.5),
    "random_": (lambda x: torch.empty(x.shape, dtype=torch.float32).random_() / 2**24, 0.5, 12**-0.5),
    "multinomial": (lambda x: torch.multinomial(WEIGHTS.expand(x.numel(), 4), 1), 1.75, 1.1875**0.5),
    "multinomial_more": (lambda x: torch.multinomial(WEIGHTS.expand(64, 4), x.numel() // 64, True), 1.75, 1.1875**0.5),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(torch.stack([x * 0, x], -1), hard=True)[..., 1], 0.7310586, 0.4434095),
    "dropout": (lambda x: F.dropout(x, 0.3, True), 1, (0.3 / 0.7) ** 0.5),
    "dropout_": (lambda x: F.dropout(x + 0, 0.3, True, True), 1, (0.3 / 0.7) ** 0.5),
    "native_dropout": (lambda x: torch.native_dropout(x, 0.3, True)[0], 1, (0.3 / 0.7) ** 0.5),
    "native_dropout_mask": (lambda x: torch.native_dropout(x, 0.3, True)[1].double(), 0.7, 0.21**0.5),
    "feature_dropout": (lambda x: F.dropout1d(x.reshape(64, -1, 1), 0.3, True), 1, (0.3 / 0.7) ** 0.5),
    "alpha_dropout": (lambda x: F.alpha_dropout(x * 0, 0.3, True), 0, ALPHA * A_SCALE * 0.21**0.5),
    "feature_alpha_dropout": (lambda x: F.feature_alpha_dropout(x.reshape(64, -1, 1) * 0, 0.3, True), 0, ALPHA * A_SCALE * 0.21**0.5),
    "rrelu": (lambda x: F.rrelu(-x, 0.2, 0.6, True), -0.4, 0.4 / 12**0.5),
}


def run(program: Program, inputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """The captured program on one device; parameters and tangents are ones."""
    state = {}
    for item in program.inputs:
        value = program.node(item.node).meta["val"]
        given = {"seed": lambda: torch.tensor(seed), "input": lambda index=item.index: inputs[index]}
        state[item.node] = given.get(item.role, lambda value=value: torch.ones(value.shape, dtype=value.dtype))()
    return _reference(program, state)


@torch.no_grad()
def _reference(program: Program, state: dict[str, Tensor]) -> list[Tensor]:
    return simulate.reference(program, state)


@pytest.mark.parametrize("name", CALLS)
def test_calls_follow_torch(name: str) -> None:
    """Mean and standard deviation within five standard errors of what torch documents, dtype and shape as torch's own."""
    function, mean, std = CALLS[name]
    x = torch.ones(64, 256, dtype=torch.float64)
    program = capture(Draw(function), (x,))
    found = next(v for v, o in zip(run(program, (x,), 5), program.outputs, strict=True) if o.role == "output" and o.name == "1")
    own = function(x)
    assert (found.dtype, found.shape) == (own.dtype, own.shape)
    n = found.numel()
    assert abs(float(found.double().mean()) - mean) < 5 * std / math.sqrt(n)
    assert abs(float(found.double().std()) / std - 1) < 5 * 2 / math.sqrt(n)
    again = [run(program, (x,), seed) for seed in (5, 6)]
    at = next(i for i, o in enumerate(program.outputs) if o.role == "output" and o.name == "1")
    assert torch.equal(again[0][at], found) and not torch.equal(again[1][at], found)


def test_permutations_and_samples_without_replacement() -> None:
    x = torch.ones(6, dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0, 0.0, 2.0, 2.0])
    module = Draw(lambda x: (torch.randperm(6), torch.multinomial(weights.expand(3, 5), 4)))
    program = capture(module, (x,))
    place = {o.name: i for i, o in enumerate(program.outputs) if o.role == "output"}
    firsts = []
    for seed in range(600):
        out = run(program, (x,), seed)
        order, picked = out[place["1.0"]], out[place["1.1"]]
        assert sorted(order.tolist()) == list(range(6))
        assert all(sorted(row) == [0, 1, 3, 4] for row in picked.tolist())  # no class twice, none without weight
        firsts += [(int(order[0]), int(row[0])) for row in picked]
    orders = torch.bincount(torch.tensor([a for a, _ in firsts[::3]]), minlength=6)
    assert orders.min() > 60 and orders.max() < 145
    share = torch.bincount(torch.tensor([b for _, b in firsts]), minlength=5) / len(firsts)
    assert torch.allclose(share, weights / weights.sum(), atol=0.05)


# --- models on meshes ------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """Most random ops at once, each with a use and a gradient where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.t = nn.Linear(7, 6), nn.Linear(6, 10), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.randn_like(x) * 0.1 + torch.rand(7, dtype=x.dtype)
        h = F.alpha_dropout(F.rrelu(self.a(x), training=True), 0.3, True)
        h = h * torch.bernoulli(torch.sigmoid(h.detach())) + torch.empty_like(h).normal_(0.5, 2.0)
        h = h + torch.empty(5, 6, dtype=h.dtype).exponential_(2.0)
        h = F.dropout1d(h.T.unsqueeze(0), 0.2, True)[0].T
        h = F.feature_alpha_dropout(h.unsqueeze(-1), 0.2, True).squeeze(-1)[torch.randperm(5)]
        scores = self.b(h)
        soft, hard = F.gumbel_softmax(scores, tau=0.7), F.gumbel_softmax(scores, tau=0.7, hard=True)
        weights = torch.softmax(scores.detach(), -1)
        picked = soft.gather(1, torch.multinomial(weights, 3)).sum() + soft.gather(1, torch.multinomial(weights, 4, True)).pow(2).sum()
        picked = picked + hard.gather(1, torch.randint(0, 10, (5, 2))).sum() + torch.normal(h, torch.ones_like(h)).pow(2).mean()
        noisy = F.dropout(h, 0.5, True) + torch.empty_like(h).bernoulli_(0.3)
        noisy = noisy + torch.randint_like(h, 3) + torch.empty_like(h).uniform_(-1, 1)
        return picked + self.t(noisy).sin().sum() + torch.empty_like(h).geometric_(0.4).sum()


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.net = getattr(nn, kind)(4, 6, num_layers=3, dropout=0.4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.net(x)
        return y.pow(2).sum() + (h[0] if isinstance(h, tuple) else h).sin().sum()


def lockstep(model: nn.Module, inputs: Any, mesh: str, seeds: tuple[int, ...], random_costs: tuple[int | None, ...] = (None,)) -> None:
    program = capture(model, inputs)
    rules = bind_program(program)
    plans = [random_plan(program, rules, mesh, seed) for seed in seeds]
    for prices in random_costs:
        plans.append(solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=graph_hash(program), random_costs=prices, time_limit=20))
    for plan in plans:
        report = compare(model, inputs, program, lower(program, rules, plan), plan)
        assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


@pytest.mark.parametrize("mesh", ["a=4", "a=3", "a=2,b=2"])
def test_many_random_ops_on_meshes(mesh: str) -> None:
    torch.manual_seed(0)
    lockstep(Many().double(), torch.randn(5, 7, dtype=torch.float64), mesh, (0, 1, 2), (None, 0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRU", {}),
        *(pytest.param(kind, {"bidirectional": True}, marks=pytest.mark.slow) for kind in ("LSTM", "RNN", "GRU")),
        pytest.param("LSTM", {"proj_size": 3}, marks=pytest.mark.slow),
        pytest.param("RNN", {"nonlinearity": "relu"}, marks=pytest.mark.slow),
    ],
)
def test_dropout_between_recurrent_layers(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind, **options).double(), torch.randn(5, 2, 4, dtype=torch.float64)
    lockstep(model, x, "a=2,b=2", (0,), ())
    program = capture(model, x)
    drops = [n for n in program.graph.nodes if n.target is OPS.dropout.default and n.meta["phase"] == "forward"]
    assert len({n.args[3] for n in drops}) == 2


RECURRENT = [("LSTM", {"bidirectional": True}), ("LSTM", {"proj_size": 3}), ("GRU", {}), ("RNN", {"bias": False})]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_layers_taken_apart_are_the_recurrent_net(kind: str, options: dict[str, Any]) -> None:
    """With p so small that nothing drops, layer by layer is the whole."""
    torch.manual_seed(0)
    model, x = Recurrent(kind, **options).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    model.net.dropout = 1e-12
    program = capture(model, x, mode="inference")
    state = {i.node: dict(model.named_parameters())[i.name].detach() for i in program.inputs if i.role == "param"}
    state |= {i.node: x if i.role == "input" else torch.tensor(1) for i in program.inputs if i.role in ("input", "seed")}
    assert torch.allclose(_reference(program, state)[0], model.eval()(x), rtol=1e-12)


def masks(program: Program, plan: Any, rules: Any, seed: int) -> dict[str, Tensor]:
    """What every dropout of forward keeps, whole, by the node's name; of attention its result."""
    lowered = lower(program, rules, plan)
    state = {}
    for i, item in enumerate(program.inputs):
        value = program.node(item.node).meta["val"]
        state[item.node] = torch.tensor(seed) if item.role == "seed" else torch.ones(value.shape, dtype=value.dtype)
        if value.is_floating_point():
            state[item.node] = torch.randn(value.shape, generator=torch.Generator().manual_seed(i), dtype=value.dtype)
    pieces = {n: [shard(v, lowered.specs[n], plan.sizes, c).clone() for c in coordinates(plan.sizes)] for n, v in state.items()}
    found: dict[str, Tensor] = {}

    def observe(node: fx.Node, locals_: list[Any]) -> None:
        if node.target is OPS.dropout.default and node.meta["phase"] == "forward":
            found[node.name] = unshard([t != 0 for t in locals_], lowered.specs[node.name], plan.sizes).clone()  # type: ignore[arg-type]
        if node.target is OPS.attention.default:
            found[node.name] = unshard([t[0] for t in locals_], lowered.specs[node.name][0], plan.sizes)  # type: ignore[arg-type,index]

    simulate.no_grad_run(lowered, plan.sizes, pieces, observe)
    return found


@pytest.mark.parametrize(
    "meshes", [("a=1", "a=2", "a=4", "a=2,b=2"), pytest.param(("a=1", "a=3", "a=2,b=3", "a=2,b=2,c=2"), marks=pytest.mark.slow)]
)
def test_gpt2_drops_the_same_elements_on_every_mesh(meshes: tuple[str, ...]) -> None:
    """Embedding and residual masks bit for bit, attention to the last digits; chosen plans, random prices and random plans."""
    model, inputs = models.gpt2(dtype=torch.float64, dropout=0.2)
    program = capture(model, inputs)
    rules, known = bind_program(program), graph_hash(program)
    reference: dict[str, Tensor] = {}
    for mesh in meshes:
        plans = [
            solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=known, random_costs=prices, time_limit=20, gap=0.2)
            for prices in ((None,) if mesh == "a=1" else (None, 4))
        ]
        plans += [] if mesh == "a=1" else [random_plan(program, rules, mesh, 0)]
        for plan in plans:
            found = masks(program, plan, rules, 17)
            reference = reference or found
            assert found.keys() == reference.keys() and sum(v.dtype == torch.bool for v in found.values()) >= 5
            for name, mask in found.items():
                if mask.dtype == torch.bool:
                    assert torch.equal(mask, reference[name]), (mesh, name)
                    assert 0.6 < float(mask.float().mean()) < 0.95
                else:
                    assert torch.allclose(mask, reference[name], rtol=1e-9, atol=1e-12), (mesh, name)


def test_a_deep_model_counts_on() -> None:
    """Folded capture numbers the random ops of every block as a full trace does."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(F.rrelu(self.fc(x), training=self.training), 0.2, self.training)
            return x + y + 0.01 * torch.randn_like(y)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(17))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.pow(2).mean()

    model, x = Deep(), torch.randn(4, 6)
    full, folded = capture(model, x, fold=False), capture(model, x)
    assert graph_hash(full) == graph_hash(folded)
    salts = [n.args[3] for n in full.graph.nodes if n.target in (OPS.uniform.default, OPS.normal.default, OPS.dropout.default)]
    assert len(set(salts)) == 3 * 17


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: torch.poisson(x), "poisson"),
        (lambda x: torch.binomial(x * 5, x * 0.5), "binomial"),
        (lambda x: torch._standard_gamma(x), "gamma"),
        (lambda x: torch.randint(-(2**62), 2**62 + 1, x.shape), "randint"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_line(function: Callable[[Tensor], Tensor], word: str) -> None:
    with pytest.raises(CaptureError) as error:
        capture(Draw(function), torch.ones(4, dtype=torch.float64))
    assert word in error.value.what and "test_random_ops.py" in error.value.where


def test_a_generator_of_its_own_is_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(CaptureError):
        capture(Draw(lambda x: torch.rand(x.shape, generator=generator)), torch.ones(4, dtype=torch.float64))
