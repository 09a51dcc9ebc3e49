"""The price of one op."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from netmind_autopar.costs.compute import CLASSES, FREE, flops, node_prices, node_seconds, op_cost, short_name, tensor_bytes
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.costs.presets import CLUSTERS
from netmind_autopar.ir.mesh import Axis, Device, Mesh
from netmind_autopar.ir.program import tensor_args
from netmind_autopar.ir.spec import local_bytes
from netmind_autopar.rules.algebra import Rule, bind, input_specs, output_specs, strategies

aten = torch.ops.aten


def capture(fn: object, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> fx.Node:
    """The last op of a function of tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(fn)(*(torch.empty(s, dtype=dtype) for s in shapes)).graph  # type: ignore[operator]
    return [n for n in graph.nodes if n.op == "call_function" and short_name(n) != "getitem"][-1]


def ruled(pattern: str, node: fx.Node) -> Rule:
    made = node.meta["val"]
    outs = [tuple(v.shape) if v is not None else None for v in (made if isinstance(made, (tuple, list)) else [made])]
    return bind(pattern, [tuple(n.meta["val"].shape) for n in tensor_args(node)], outs)


MM, ADDMM, POINTWISE = "m k, k n -> m n", "+n, m k, k n -> m n", "a b -> a b"
H100 = make_mesh("dp=4,tp=8", "h100-sxm")


def conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return aten.convolution(x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)


def conv_backward(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: tuple[bool, bool, bool]) -> torch.Tensor:
    made = aten.convolution_backward(g, x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, mask)
    return made[0] if mask[0] else made[1]


FLOPS = {
    "mm": (aten.mm, [(6, 4), (4, 10)], 2 * 6 * 4 * 10),
    "addmm": (aten.addmm, [(10,), (6, 4), (4, 10)], 2 * 6 * 4 * 10),
    "bmm": (aten.bmm, [(3, 6, 4), (3, 4, 10)], 3 * 2 * 6 * 4 * 10),
    "baddbmm": (aten.baddbmm, [(3, 6, 10), (3, 6, 4), (3, 4, 10)], 3 * 2 * 6 * 4 * 10),
    "mv": (aten.mv, [(6, 4), (4,)], 2 * 6 * 4),
    "convolution": (conv, [(2, 3, 8, 8), (5, 3, 3, 3)], 2 * 2 * 4 * 4 * 5 * 27),
    "both gradients": (
        lambda g, x, w: conv_backward(g, x, w, (True, True, False)),
        [(2, 5, 4, 4), (2, 3, 8, 8), (5, 3, 3, 3)],
        2 * 2 * 2 * 4 * 4 * 5 * 27,
    ),
    "one gradient": (
        lambda g, x, w: conv_backward(g, x, w, (False, True, False)),
        [(2, 5, 4, 4), (2, 3, 8, 8), (5, 3, 3, 3)],
        2 * 2 * 4 * 4 * 5 * 27,
    ),
    "gelu": (aten.gelu, [(6, 4)], 0),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops(name: str) -> None:
    fn, shapes, expected = FLOPS[name]
    assert flops(capture(fn, *shapes)) == expected


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm", "convolution", "both gradients", "one gradient"])
def test_flops_agree_with_torch(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    fn, shapes, _ = FLOPS[name]
    with FlopCounterMode(display=False) as counter:
        fn(*(torch.randn(s) for s in shapes))
    assert flops(capture(fn, *shapes)) == counter.get_total_flops()


def test_attention_flops() -> None:
    importlib.import_module("netmind_autopar.kernels.attention")  # registers the op

    def call(causal: bool) -> object:
        return lambda q, k, v: torch.ops.autopar.attention(q, k, v, None, None, causal, 0.125, 0.0, 0, 0, 0, 8, 0, q.shape[2])[0]

    shapes = [(2, 8, 32, 16), (2, 4, 32, 16), (2, 4, 32, 16)]
    assert flops(capture(call(False), *shapes)) == 4 * 2 * 8 * 32 * 32 * 16
    assert flops(capture(call(True), *shapes)) == 2 * 2 * 8 * 32 * 32 * 16


def test_split_work_costs_less_and_never_less_than_its_share() -> None:
    node = capture(aten.mm, (8192, 4096), (4096, 4096), dtype=torch.bfloat16)
    rule = ruled(MM, node)
    whole = node_seconds(node, rule, ("-", "-"), H100)
    assert whole == pytest.approx(2 * 8192 * 4096 * 4096 / (989.4e12 * 0.8), rel=0.05)
    for letter in "mkn":
        split = node_seconds(node, rule, ("-", letter), H100)
        assert whole / 8 <= split < whole / 4
        assert node_seconds(node, rule, (letter, letter), H100) < split


def test_dtype_and_device_count() -> None:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        node = capture(aten.mm, (4096, 4096), (4096, 4096), dtype=dtype)
        seconds[dtype] = node_seconds(node, ruled(MM, node), ("-", "-"), H100)
    assert seconds[torch.float64] > seconds[torch.float32] > 5 * seconds[torch.bfloat16]
    node = capture(aten.mm, (512, 512), (512, 512))
    slow, fast = (node_seconds(node, ruled(MM, node), ("-",), make_mesh(4, cluster)) for cluster in ("cpu", "h100-sxm"))
    assert slow > 100 * fast


def test_small_matmuls_are_less_efficient() -> None:
    def rate(n: int) -> float:
        node = capture(aten.mm, (n, n), (n, n), dtype=torch.bfloat16)
        return flops(node) / node_seconds(node, ruled(MM, node), ("-", "-"), H100)

    rates = [rate(n) for n in (64, 256, 1024, 4096, 16384)]
    assert rates == sorted(rates)
    assert rates[0] < 0.01 * rates[-1]
    thin = capture(aten.mm, (65, 8192), (8192, 8192), dtype=torch.bfloat16)  # one row more than a tile: two tiles
    full = capture(aten.mm, (128, 8192), (8192, 8192), dtype=torch.bfloat16)
    a, b = (node_seconds(n, ruled(MM, n), ("-", "-"), H100) for n in (thin, full))
    assert a == pytest.approx(b, rel=0.02)


def test_views_and_tiny_constants_are_free() -> None:
    views = [
        (aten.t, "+a b -> b a"),
        (lambda x: aten.view(x, [64, 64]), "+a b -> a b"),
        (lambda x: aten.expand(x, [64, 64]), "+a b -> a b"),
    ]
    for fn, pattern in views:
        node = capture(fn, (64, 64))
        assert node_seconds(node, ruled(pattern, node), ("-", "-"), H100) == 0.0
    small, large = capture(lambda: aten.full([4], 0.0)), capture(lambda: aten.full([4096, 4096], 0.0))
    assert node_seconds(small, ruled(" -> a", small), ("-", "-"), H100) == 0.0
    assert node_seconds(large, ruled(" -> a b", large), ("-", "-"), H100) > 4096 * 4096 * 4 / 3.35e12
    assert not FREE & {name for names in CLASSES.values() for name in names.split()}


def test_an_embedding_reads_only_its_rows() -> None:
    def lookup(rows: int) -> float:
        with FakeTensorMode():
            graph = make_fx(aten.embedding)(torch.empty(rows, 256), torch.empty(4, 8, dtype=torch.int64)).graph
        node = next(n for n in graph.nodes if n.op == "call_function")
        return node_seconds(node, ruled("v! d, a b -> a b d", node), ("-", "-"), H100)

    assert lookup(1000) == lookup(1_000_000)


def test_local_bytes_are_those_of_the_specs() -> None:
    node = capture(aten.addmm, (30,), (14, 20), (20, 30))
    rule, mesh = ruled(ADDMM, node), make_mesh("a=2,b=3", "h100-sxm")
    cost, dtypes = op_cost(node, rule), [torch.float32] * 3
    for strategy in strategies(rule, mesh.sizes):
        specs = [*input_specs(rule, strategy, dtypes), *output_specs(rule, strategy, dtypes[:1])]
        expected = sum(local_bytes(s, mesh.sizes) for s in specs if s)
        assert cost._bytes(cost.local_sizes(strategy, mesh.axes)) == expected


def test_many_strategies_at_once() -> None:
    node = capture(aten.mm, (96, 64), (64, 32))
    rule = ruled(MM, node)
    found = strategies(rule, H100.sizes)
    np.testing.assert_array_equal(node_prices(node, rule, found, H100), [node_seconds(node, rule, s, H100) for s in found])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([*CLUSTERS]),
)
def test_prices_are_finite_and_positive(m: int, k: int, n: int, dtype: torch.dtype, cluster: str) -> None:
    mesh = make_mesh("a=2,b=3", cluster)
    rows = [(aten.mm, [(m, k), (k, n)], MM), (aten.gelu, [(m, n)], POINTWISE), (lambda x: aten.sum(x, [1]), [(m, n)], "a b -> a")]
    for fn, shapes, pattern in rows:
        node = capture(fn, *shapes, dtype=dtype)
        rule = ruled(pattern, node)
        prices = node_prices(node, rule, strategies(rule, mesh.sizes), mesh)
        assert np.isfinite(prices).all()
        assert (prices > 0).all()
        assert prices.max() <= prices[0] * (1 + 1e-12)  # nothing costs more than doing everything


def test_empty_tensors() -> None:
    node = capture(aten.mm, (0, 4), (4, 8))
    assert 0 < node_seconds(node, ruled(MM, node), ("-", "-"), H100) < 1e-4
    assert tensor_bytes(node.meta["val"]) == 0
    assert tensor_bytes(None) == 0


def test_a_slow_device_by_hand() -> None:
    """The formula, written out once."""
    mesh = Mesh((Axis("a", 2),), Device("toy", (("float32", 1e9),), 10**9, 1e8, 1e8, 1e-3))
    node = capture(aten.gelu, (1000, 1000))
    assert node_seconds(node, ruled(POINTWISE, node), ("a",), mesh) == pytest.approx(2 * 4e6 / 2 / (1e8 * 0.9) + 1e-3)
    node = capture(aten.mm, (640, 640), (640, 640))
    assert node_seconds(node, ruled(MM, node), ("m",), mesh) == pytest.approx(2 * 640**3 / 2 / (1e9 * 0.8) + 3e-6 + 1e-3)
