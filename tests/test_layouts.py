"""Arrays of the planner against the definitions they stand for: strategies, specs by number, local sizes, layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.spec import Shard as S
from netmind_autopar.ir.spec import chunk, cuts, is_valid, layout, local_bytes, plain
from netmind_autopar.rules.algebra import Rule, bind, input_specs, is_legal, output_specs, strategies
from netmind_autopar.solver.layouts import Side, Specs, distinct

RULES = {
    "mm": bind("m k, k n -> m n", [(8, 12), (12, 6)], [(8, 6)]),
    "view": bind("+b s d -> (b s) d", [(4, 6, 5)], [(24, 5)]),
    "amax": bind("a b -> a ; max", [(8, 6)], [(8,)]),
    "mul": bind("*a, a -> a", [(12,), (12,)], [(12,)]),
    "softmax": bind("a b! -> a b!", [(7, 9)], [(7, 9)]),
    "odd": bind("a b, b -> a 1", [(5, 1), (1,)], [(5, 1)]),
}
MESHES = ["a=4", "a=2,b=3", "a=1,b=2,c=2"]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_strategies_are_those_that_are_legal(rule: Rule, mesh: str) -> None:
    sizes = make_mesh(mesh, "h100-sxm").sizes
    per_axis = [rule.symbols if n > 1 else ("-",) for n in sizes]
    assert strategies(rule, sizes) == tuple(s for s in itertools.product(*per_axis) if is_legal(rule, s, sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_columns_are_the_specs_of_the_strategies(rule: Rule, mesh: str, dtype: torch.dtype) -> None:
    conversions = Conversions(make_mesh(mesh, "h100-sxm"))
    sizes = conversions.mesh.sizes
    found = strategies(rule, sizes)
    codes = np.array([[rule.symbols.index(s) for s in strategy] for strategy in found])
    for gives, terms, make in ((False, rule.inputs, input_specs), (True, rule.outputs, output_specs)):
        side = Side(rule, found, codes, (dtype,) * len(terms), gives)
        for position in range(len(terms)):
            specs = [make(rule, s, [dtype] * len(terms))[position] for s in found]
            numbers = side.column(position, conversions)
            assert list(Specs(conversions, numbers)) == specs == [row[position] for row in side]
            assert conversions.local_bytes(numbers).tolist() == [local_bytes(s, sizes) for s in specs]
            assert conversions.partial(numbers).tolist() == [s.has_partial for s in specs]
            first, (states,) = distinct(conversions, [numbers])
            layouts = [layout(s, sizes) for s in specs]
            assert [layout(s, sizes) for s in Specs(conversions, first)] == list(dict.fromkeys(layouts))
            assert [layout(conversions.spec(int(first[k])), sizes) for k in states] == layouts


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 2, 3)], ids=str)
def test_cuts_are_chunks_of_chunks(sizes: tuple[int, ...]) -> None:
    for size in range(1, 26):
        lengths, fine = cuts(size, sizes)
        for subset in range(1 << len(sizes)):
            axes = [a for a in range(len(sizes)) if subset >> a & 1]
            length = size
            for a in axes:
                length = chunk(length, sizes[a], 0)[1]
            only = plain((size,), torch.float32, [S(0)] * len(axes))
            assert lengths[subset] == length
            assert fine[subset] == is_valid(only, tuple(sizes[a] for a in axes))
