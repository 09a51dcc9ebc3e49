"""Random views, broadcasts and small graphs: rules computed from shapes, and their refinement, are exact."""

from __future__ import annotations

import math

import torch
from case_kit import A, F, make
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import fx

from netmind_autopar.rules.algebra import strategies
from netmind_autopar.rules.bind import bind_nodes
from netmind_autopar.rules.prove import prove
from netmind_autopar.rules.table import rule_of

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def factored(draw, number):
    """A shape with this many elements, dims of size 1 among it."""
    shape, left = [], number
    while left > 1:
        shape.append(draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0])))
        left //= shape[-1]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return shape


def some(found, most):
    return found[:: max(1, len(found) // most)]


@QUICK
@given(st.sampled_from([12, 16, 24, 30, 36, 60]), st.data())
def test_views(number, data):
    call = make(("aten.view.default", (F(*data.draw(factored(number))), data.draw(factored(number))), {}))
    rule = rule_of(call)
    assert rule.known
    assert math.prod(rule.sizes[x] for x in {x for dim in rule.inputs[0].dims for x in dim}) == number
    for mesh in ((2,), (3,), (2, 2)):
        assert prove(rule, call, mesh, some(strategies(rule, mesh), 12)) == []


@QUICK
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.sampled_from(["add.Tensor", "mul.Tensor", "div.Tensor", "where.self"]),
    st.data(),
)
def test_broadcasts(shape, name, data):
    def operand():
        kept = shape[data.draw(st.integers(0, len(shape))) :]
        return [n if data.draw(st.booleans()) else 1 for n in kept]

    args = [F(*operand()), F(*operand())]
    call = make((f"aten.{name}", (F(*operand()) > 0, *args) if name == "where.self" else tuple(args), {}))
    rule = rule_of(call)
    for mesh in ((2,), (2, 2)):
        assert prove(rule, call, mesh, some(strategies(rule, mesh), 12)) == []


class Chain:
    """A random graph of ops that move, split and mix dims, with meta tensors as values."""

    def __init__(self, data):
        self.data, self.graph = data, fx.Graph()
        self.values = []
        for _ in range(2):
            node = self.graph.placeholder("x")
            shape = data.draw(factored(24))
            node.meta["val"] = torch.empty(shape, device="meta", dtype=torch.float64)
            self.values.append(node)

    def call(self, op, *args):
        node = self.graph.call_function(op, args)
        result = op(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        node.meta["val"] = result.contiguous()
        self.values.append(node)

    def grow(self):
        x = self.data.draw(st.sampled_from(self.values))
        shape = x.meta["val"].shape
        kind = self.data.draw(st.sampled_from(["view", "view", "permute", "gelu", "add", "softmax", "matmul", "sum"]))
        if kind == "view":
            self.call(A.view.default, x, self.data.draw(factored(math.prod(shape))))
        elif kind == "permute":
            self.call(A.permute.default, x, list(self.data.draw(st.permutations(range(len(shape))))))
        elif kind == "gelu":
            self.call(A.gelu.default, x)
        elif kind == "add":
            self.call(A.add.Tensor, x, self.data.draw(st.sampled_from([v for v in self.values if v.meta["val"].shape == shape])))
        elif kind == "softmax" and shape:
            self.call(A._softmax.default, x, self.data.draw(st.integers(0, len(shape) - 1)), False)
        elif kind == "matmul" and len(shape) == 2:
            self.call(A.t.default, x)
            self.call(A.mm.default, x, self.values[-1])
        elif kind == "sum" and len(shape) > 1:
            self.call(A.sum.dim_IntList, x, [0])


@settings(max_examples=30, deadline=None, phases=(Phase.generate,))  # shrinking a graph takes minutes
@given(st.integers(2, 9), st.data())
def test_refined_graphs(length, data):
    """Every refined rule is exact, and binding again gives the same."""
    chain = Chain(data)
    for _ in range(length):
        chain.grow()
    nodes = [n for n in chain.graph.nodes if n.op == "call_function"]
    assume(nodes)
    rules = bind_nodes(nodes)
    assert {k: str(v) for k, v in bind_nodes(nodes).items()} == {k: str(v) for k, v in rules.items()}
    for node in nodes:
        rule = rules[node.name]
        assert prove(rule, node, (2,)) == []
        assert prove(rule, node, (2, 2), some(strategies(rule, (2, 2)), 8)) == []
