"""Planning a module's other calls when they are first seen: runtime/graphs.py asks, every rank captures, rank 0 plans."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .ir.errors import InputError, ShapeError
from .ir.plan import Plan
from .ir.program import Program
from .rules.bind import bind_program
from .runtime.executable import Executable
from .runtime.graphs import Asked, Planner
from .solver.conversions import end_rules
from .solver.fold import classes
from .tracer.hash import graph_hash
from .tracer.signature import build, flatten


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without weights, as captures need it; what the model's owner does to it later does not matter."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def planner(
    model: nn.Module,
    capture: Callable[[nn.Module, Any, str], Program],
    decide: Callable[..., Plan],
    compile_: Callable[[Program, Plan, bool], Executable],
) -> Planner:
    """What `Graphs` asks. capture (model, sample inputs, mode) and decide (program, pins=) are the collective ones of `autoparallelize`."""
    bones = skeleton(model)
    trains, modes = model.training, {name: m.training for name, m in model.named_modules()}

    def look(asked: Asked) -> tuple[str, Callable[[], tuple[Executable, Plan]]]:
        bones.train(asked.training)
        if asked.training == trains:
            for name, module in bones.named_modules():
                module.training = modes[name]
        for name, p in bones.named_parameters():
            p.requires_grad_(name in asked.trained if asked.gradients else p.requires_grad)
        program = capture(bones, _sample(bones, asked), "training" if asked.gradients else "inference")

        def make() -> tuple[Executable, Plan]:
            found = decide(program, pins=_pins(program, asked.layouts))
            return compile_(program, found, asked.training), found

        return graph_hash(program), make

    return look


def _sample(model: nn.Module, asked: Asked) -> dict[str, Any]:
    """A call as sample inputs: by name, with tensors of global shape and no values."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*asked.args, **asked.kwargs)
    except TypeError as error:
        raise ShapeError("called with arguments that forward does not take", where=f"forward{signature}", why=str(error)) from error
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(
                "a call of another shape with positional arguments that have no names",
                where=f"forward{signature}",
                try_="strict_shapes=True, and pad to the planned shape",
            )
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    template, leaves = flatten(named)
    empty = [torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.requires_grad and asked.gradients) for _, t in leaves]
    return build(template, empty)


def _pins(program: Program, layouts: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Parameters stay as they lie. What is decided once for several must lie alike: there most of them decide."""
    by_class: dict[str, list[str]] = {}
    names = classes(program, {**end_rules(program), **bind_program(program)})
    for item in program.inputs:
        if item.role == "param":
            by_class.setdefault(names[item.node], []).append(item.name)
    pins: dict[str, tuple[str, ...]] = {}
    for members in by_class.values():
        have = [layouts.get(program.tied.get(m, m), layouts.get(m)) for m in members]
        found = [h for h in have if h is not None]
        if found:
            pins[members[0]] = Counter(found).most_common(1)[0][0]
    return pins
