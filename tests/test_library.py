"""Models of every family of ops under random legal plans, all ranks in lockstep; every core op of ATen has a row or a reason."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from case_kit import A, F, I, make
from library_models import MODELS
from random_plans import random_plan

from netmind_autopar.ir.errors import CaptureError
from netmind_autopar.ir.program import is_getitem, op_name
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.rules.library import WITHOUT
from netmind_autopar.rules.table import TABLE, rule_of
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare

QUICK = (("a=3", 1), ("a=2,b=2", 0))
MORE = tuple((mesh, seed) for mesh in ("a=4", "a=3", "a=2,b=2") for seed in range(2, 5))


@functools.cache
def captured(name: str) -> tuple[Any, ...]:
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    model = model.double()
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


def exact(name: str, plans: tuple[tuple[str, int], ...]) -> None:
    model, inputs, program, rules = captured(name)
    for mesh, seed in plans:
        plan = random_plan(program, rules, mesh, seed)
        report = compare(model, inputs, program, lower(program, rules, plan), plan)
        assert report.ok, f"{mesh} {seed}: {report.max_rel_error:.2g} {report.first_difference}"
        assert {row.kind for row in report.rows} >= {"output", "gradient"}


@pytest.mark.parametrize("name", MODELS)
def test_random_plans_are_exact(name: str) -> None:
    _, _, program, rules = captured(name)
    assert {op_name(n) for n in program.graph.nodes if n.op == "call_function" and not is_getitem(n) and not rules[n.name].known} == set()
    exact(name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_more_random_plans_are_exact(name: str) -> None:
    exact(name, MORE)


def _core() -> set[str]:
    found = set()
    for name in dir(A):
        packet = getattr(A, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            if torch.Tag.core in op.tags and overload != "out" and not op._schema.is_mutable:
                found.add(str(op))
    return found


def test_every_core_op_has_a_row_or_a_reason() -> None:
    core = _core()
    assert len(core) > 180
    assert core - set(TABLE) == set(WITHOUT) & core
    assert not set(WITHOUT) & set(TABLE)
    assert all(WITHOUT.values())


def ops(name: str) -> list[str]:
    return [op_name(n) for n in captured(name)[2].graph.nodes if n.op == "call_function"]


def test_resampling_stays_whole() -> None:
    assert {"aten.upsample_bicubic2d.default", "aten.upsample_bicubic2d_backward.default"} <= set(ops("bicubic"))
    assert len(ops("bicubic")) < 20
    assert A.upsample_bicubic2d.vec.py_kernels  # the decompositions that capture set aside are back


def test_in_channels_split_though_there_is_a_bias() -> None:
    _, _, program, rules = captured("conv2d")
    backward = [rules[n.name] for n in program.graph.nodes if op_name(n) == "aten.convolution_backward.default"]
    assert backward and all("i" in rule.letters for rule in backward)


def test_equal_bags_split_over_the_batch_and_ragged_ones_over_all() -> None:
    assert "autopar.embedding_bag.default" not in ops("bags, equal, mean, padding None")
    case = ("autopar.embedding_bag.default", (F(8, 4), I(8, 9), I(3, 9).sort().values, None, 3, 0, 0), {})
    rule = rule_of(make(case))
    assert rule.letters == ("v", "d", "n", "b")
    assert dict(rule.adjust) == {6: "start:v", 5: "start:b", 4: "size:b"}


def test_memory_outside_of_a_tensor_is_refused() -> None:
    from library_models import Formula

    model = Formula(lambda w: (w * 2)[:3].as_strided((6, 4), (4, 1)), (6, 4)).double()
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.tensor(1.0, dtype=torch.float64),))
    assert "as_strided of (6, 4) by (4, 1) leaves the memory of its tensor of shape (3, 4)" in str(caught.value)
