"""The one-line algebra: reading patterns, binding sizes, enumerating strategies, and the layouts that follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netmind_autopar.ir.spec import Partial, Replicate, Shard
from netmind_autopar.rules.algebra import Term, bind, input_specs, is_legal, letter_spec, output_specs, parse, strategies, vanishes

R, P = Replicate(), Partial("sum")
F64 = torch.float64


def test_parse_reads_every_sign():
    inputs, outputs, fixed, reduce = parse("+a (b c!), *1 ..., _ -> a (c b), _, ; max")
    assert inputs == (Term((("a",), ("b", "c")), "+"), Term(((), ("...",)), "*"))
    assert outputs == (Term((("a",), ("c", "b"))), None, Term(()))
    assert fixed == {"c"} and reduce == "max"


@pytest.mark.parametrize("text", ["a b", "a -> b ; mean", "a % b -> a", "a -> a{"])
def test_parse_refuses(text):
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "inputs", "outputs"),
    [
        ("m k, k n -> m n", [(4, 6), (5, 7)], [(4, 7)]),
        ("m k, k n -> m n", [(4, 6)], [(4, 7)]),
        ("a b -> a b", [(4, 6, 2)], [(4, 6)]),
        ("(a b) -> a b", [(12,)], [(5, 3)]),
        ("(a b) -> (b a)", [(12,)], [(12,)]),
    ],
)
def test_bind_refuses_shapes_that_do_not_fit(text, inputs, outputs):
    with pytest.raises(ValueError):
        bind(text, inputs, outputs)


def test_bind_learns_groups_and_leading_dims():
    rule = bind("+(b s) e -> b s e", [(12, 5)], [(3, 4, 5)])
    assert rule.sizes == {"b": 3, "s": 4, "e": 5}
    assert str(bind("... k, k n -> ... n", [(2, 3, 4), (4, 5)], [(2, 3, 5)])) == "d0 d1 k, k n -> d0 d1 n"
    assert bind("(a b) -> (b a)", [(12,)], [(12,)], sizes={"a": 3}).sizes == {"a": 3, "b": 4}


def test_symbols():
    assert bind("m k, k n -> m n", [(4, 6), (6, 8)], [(4, 8)]).symbols == ("-", "m", "k", "n")
    assert bind("+a b! -> a b!", [(4, 6)], [(4, 6)]).symbols == ("-", "a", "+")
    assert bind("*a, *a -> a", [(4,), (4,)], [(4,)]).symbols == ("-", "a", "*0", "*1")
    assert bind("+a b -> a b", [(4, 1)], [(4, 1)]).symbols == ("-", "a", "+"), "a dim of size 1 is no choice"
    assert bind("+a -> 1 ; max", [(4,)], [(1,)]).symbols == ("-", "a"), "a maximum is not linear"


def test_placements_of_a_matmul_with_bias():
    rule = bind("+n, m k, k n -> m n", [(8,), (4, 6), (6, 8)], [(4, 8)])
    assert vanishes(rule, "k") and not vanishes(rule, "m")

    def layout(*strategy):
        specs = [*input_specs(rule, strategy, [F64] * 3), *output_specs(rule, strategy, [F64])]
        return [s.placements for s in specs if s is not None]

    assert layout("m") == [(R,), (Shard(0),), (R,), (Shard(0),)]
    assert layout("n") == [(Shard(0),), (R,), (Shard(1),), (Shard(1),)]
    assert layout("k") == [(P,), (Shard(1),), (Shard(0),), (P,)]
    assert layout("k", "m") == [(P, R), (Shard(1), Shard(0)), (Shard(0), R), (P, Shard(0))]


def test_placements_through_linear_inputs_and_switched_off_outputs():
    rule = bind("*a b, a b -> a b, _", [(4, 6), (4, 6)], [(4, 6), None])
    assert [s.placements for s in input_specs(rule, ("*0",), [F64, F64])] == [(P,), (R,)]
    out = output_specs(rule, ("*0",), [F64, None])
    assert out[0].placements == (P,) and out[1] is None


def test_strategies_leave_no_device_empty():
    rule = bind("a b -> a b", [(5, 2)], [(5, 2)])
    assert strategies(rule, (2,)) == (("-",), ("a",), ("b",))
    assert strategies(rule, (4,)) == (("-",),), "5 in 4 pieces of 2 leaves the last empty"
    assert ("a", "a") in strategies(rule, (2, 2)) and ("b", "b") not in strategies(rule, (2, 2))
    assert strategies(rule, (1, 2)) == (("-", "-"), ("-", "a"), ("-", "b")), "an axis of size 1 splits nothing"
    assert not is_legal(rule, ("a",), (2, 2)) and not is_legal(rule, ("x",), (2,))


def test_fixed_letters_and_groups_in_print():
    rule = bind("+a (c! n) -> a n, a n", [(4, 12)], [(4, 6), (4, 6)])
    assert str(rule) == "+a (c! n) -> a n, a n"
    assert str(bind("a -> 1 ; max", [(4,)], [(1,)])) == "a -> 1 ; max"


def test_local_sizes_of_letters():
    rule = bind("m k, k n -> m n", [(4, 6), (6, 8)], [(4, 8)])
    spec = letter_spec(rule, ("k", "n"))
    assert spec.parts == (4, 6, 8) and spec.placements == (Shard(0, 1), Shard(0, 2))


LETTERS = st.sampled_from("abcd")


@st.composite
def terms(draw):
    names = draw(st.lists(LETTERS, unique=True, max_size=4))
    dims, at = [], 0
    while at < len(names):
        take = draw(st.integers(1, 2))
        dims.append(tuple(names[at : at + take]))
        at += take
    for _ in range(draw(st.integers(0, 1))):
        dims.insert(draw(st.integers(0, len(dims))), ())
    return Term(tuple(dims))


@settings(max_examples=150, deadline=None)
@given(st.lists(terms(), min_size=1, max_size=3), st.lists(terms(), min_size=1, max_size=2), st.data())
def test_print_and_parse_are_inverse(ins, outs, data):
    """What a rule prints binds back to the same rule, and every strategy's specs have the call's shapes."""
    sizes = {letter: data.draw(st.integers(1, 5)) for letter in "abcd"}

    def shape(term):
        return [torch.Size([sizes[x] for x in dim]).numel() for dim in term.dims]

    marks = [data.draw(st.sampled_from(["", "+", "*"])) for _ in ins]
    ins = [Term(t.dims, m) for t, m in zip(ins, marks, strict=True)]
    text = ", ".join(map(str, ins)) + " -> " + ", ".join(map(str, outs))
    rule = bind(text, [shape(t) for t in ins], [shape(t) for t in outs], sizes=sizes)
    assert rule.inputs == tuple(ins) and rule.outputs == tuple(outs)
    again = bind(str(rule), [shape(t) for t in ins], [shape(t) for t in outs], sizes=sizes)
    assert again == rule
    for strategy in strategies(rule, (2, 2)):
        specs = [*input_specs(rule, strategy, [F64] * len(ins)), *output_specs(rule, strategy, [F64] * len(outs))]
        assert [list(s.shape) for s in specs] == [shape(t) for t in (*ins, *outs)]
