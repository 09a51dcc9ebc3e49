"""Every model of the zoo: captured, planned, and exact in lockstep under random legal plans and solved ones.

The quick tier runs two random plans a model, meshes in turn. The slow tier solves: real prices and random ones, every mesh, two dtypes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from random_plans import random_plan
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program, op_name, values
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.tracer.signature import flatten
from netmind_autopar.verification import compare

MESHES = ("a=4", "a=3", "a=2,b=2", "a=2,b=2,c=2")
NAMES = sorted(ZOO)
UNLIMITED = 1 << 60  # bytes
MOST_REPLICATED = 0.01

Captured = tuple[torch.nn.Module, Any, Program, dict[str, Rule]]


@functools.cache
def captured(name: str, dtype: torch.dtype) -> Captured:
    entry = ZOO[name]
    model, inputs = entry.make(dtype)
    program = capture(model, inputs, **entry.options)
    return model, inputs, program, bind_program(program)


def check(name: str, dtype: torch.dtype, plan: Plan, **options: Any) -> None:
    """The plan computes what the model does: every output, gradient and buffer."""
    model, inputs, program, rules = captured(name, dtype)
    report = compare(model, inputs, program, lower(program, rules, plan), plan, **options)
    wrong = [f"{row.kind} {row.name} of step {row.step}: {row.error:.2g}" for row in report.rows if not row.error <= row.tolerance]
    assert report.ok, f"{len(wrong)} of {len(report.rows)} differ: {'; '.join(wrong[:5])}; first: {report.first_difference}"
    assert "output" in {row.kind for row in report.rows}


HEAVY = ("resnet50", "unet2d_condition", "unet2d_pixels")  # 20 s and more; smaller ones of their kind are in the quick tier
PAIRS = (("a=4", "a=2,b=2"), ("a=3", "a=4"), ("a=2,b=2", "a=3"), ("a=3", "a=2,b=2,c=2"))
QUICK = [(name, mesh) for i, name in enumerate(NAMES) for mesh in PAIRS[i % len(PAIRS)]]


@pytest.mark.parametrize(
    ("name", "mesh"), [pytest.param(*c, marks=pytest.mark.slow if c[0] in HEAVY else (), id="-".join(c)) for c in QUICK]
)
def test_random_plans_are_exact(name: str, mesh: str) -> None:
    _, _, program, rules = captured(name, torch.float64)
    check(name, torch.float64, random_plan(program, rules, mesh, seed=NAMES.index(name)))


@pytest.mark.slow
@pytest.mark.parametrize("random_costs", [None, 7], ids=["real", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_solved_plans_are_exact(name: str, mesh: str, dtype: torch.dtype, random_costs: int | None) -> None:
    _, _, program, rules = captured(name, dtype)
    plan = solve(
        program,
        rules,
        make_mesh(mesh, "h100-sxm"),
        graph_hash=graph_hash(program),
        memory_limit=UNLIMITED,
        random_costs=random_costs,
        time_limit=20.0,
        gap=0.05,
    )
    check(name, dtype, plan, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))


def test_few_nodes_are_replicated_for_lack_of_a_rule() -> None:
    """At most 1% of the nodes of all models together."""
    total, without = 0, Counter[str]()
    for name in NAMES:
        _, _, program, rules = captured(name, torch.float64)
        total += len(rules)
        without.update(f"{op_name(program.node(n))} in {name}" for n, rule in rules.items() if not rule.known)
    listed = ", ".join(f"{op} ({count})" for op, count in without.most_common())
    assert sum(without.values()) <= MOST_REPLICATED * total, f"{sum(without.values())} of {total} nodes have no rule: {listed}"


@pytest.mark.parametrize("name", ["mixtral_grouped", "deepseek_v3"])
def test_no_uninitialised_memory_is_left(name: str) -> None:
    """The library writes through a permutation into `empty_like`: what it holds before would differ from device to device."""
    ops = Counter(op_name(n) for n in captured(name, torch.float64)[2].graph.nodes if n.op == "call_function")
    assert ops["aten.zeros_like.default"] and not any("empty" in op for op in ops)


class _Shapes(TorchDispatchMode):
    """The shapes of all tensors that an eager step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for _, t in flatten(result)[1] if isinstance(t, torch.Tensor)}
        return result


# name -> lengths of the sequences that attention compares
LENGTHS = {
    "gpt2": (9,),
    "opt": (9,),
    "llama": (10,),
    "qwen3": (9,),
    "mistral": (9,),
    "bert": (9,),
    "t5": (10, 7),
    "vit": (17,),
    "whisper": (10, 9),
    "clip": (9, 10),
    "mixtral_grouped": (9,),
    "deepseek_v3": (9,),
    "deepseek_v2": (9,),
    "dit": (16,),
}


def squares(name: str, program: Program) -> dict[tuple[int, ...], str]:
    """Shapes [..., length, length] in the program that no tensor of an eager step reaches, each with a node that has it."""
    model, inputs, *_ = captured(name, torch.float64)
    with _Shapes() as eager:
        model(**inputs)["loss"].backward()
    model.zero_grad(set_to_none=True)
    pairs = [(a, b) for a in LENGTHS[name] for b in LENGTHS[name]]
    made = {tuple(v.shape): n.name for n in program.graph.nodes if n.op == "call_function" for v in values(n) if v is not None}
    return {shape: node for shape, node in made.items() if shape[-2:] in pairs and not _reached(shape, eager.seen)}


def _reached(shape: tuple[int, ...], seen: set[tuple[int, ...]]) -> bool:
    """Eager has such a square, as large, whatever the dims before it."""
    return any(other[-2:] == shape[-2:] and math.prod(other) >= math.prod(shape) for other in seen)


@pytest.mark.parametrize("name", LENGTHS)
def test_no_square_of_the_sequence_that_eager_does_not_have(name: str) -> None:
    assert not squares(name, captured(name, torch.float64)[2])


def test_a_square_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, transformers makes an explicit mask when it is exported."""
    monkeypatch.setattr("netmind_autopar.tracer.capture.eager_masks", contextlib.nullcontext)
    model, inputs, *_ = captured("llama", torch.float64)
    assert squares("llama", capture(model, inputs))
