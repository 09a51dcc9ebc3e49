"""Every lowered random program can be written as forward and backward: forward needs nothing that backward makes."""

from __future__ import annotations

import pytest
from random_modules import random_module
from random_plans import random_plan

from netmind_autopar.passes.emit import emit
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.tracer.capture import capture


@pytest.mark.parametrize("seed", [0, 2, 4, 5, 9, 14])
def test_results_of_forward_are_made_in_forward(seed: int) -> None:
    model, inputs = random_module(seed)
    program = capture(model, inputs)
    rules = bind_program(program)
    for number in range(6):
        plan = random_plan(program, rules, ("a=2", "a=3")[number % 2], seed + number)
        lowered = lower(program, rules, plan)
        for inference in (False, True):
            compile(emit(lowered, plan, inference=inference), "emitted", "exec")
