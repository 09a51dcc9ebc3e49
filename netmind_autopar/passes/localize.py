"""Give every op its local shape arguments, and write down the specs it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..ir.program import Input, Output, Program, is_getitem, source, tensor_args, values
from ..ir.spec import Replicate, Spec, plain
from ..rules.algebra import Rule, Strategy, input_specs, output_specs
from ..rules.localize import localize_args

if TYPE_CHECKING:
    from .pipeline import Lowering


def localize(program: Program, context: Lowering) -> Program:
    """Set `specs` and `expects` of every node from its strategy, and turn shape arguments into local ones."""
    with program.edit() as new:
        ends = program.placeholders()
        for node in new.graph.nodes:
            if node.op == "placeholder":
                new.specs[node.name] = placeholder_spec(node, ends[node.name], context)
            elif node.op == "get_attr":
                new.specs[node.name] = _replicated(values(node)[0], context)
            elif node.op == "call_function" and not is_getitem(node):
                _localize_op(node, context.rules[node.name], context.strategies[node.name], new, context)
        new.expects["output"] = tuple(output_spec(program, out, new.specs, context) for out in program.outputs)
    return new.program


def _localize_op(node: fx.Node, rule: Rule, strategy: Strategy, new, context: Lowering) -> None:
    outs = values(node)
    specs = output_specs(rule, strategy, [None if v is None else v.dtype for v in outs])
    new.expects[node.name] = input_specs(rule, strategy, [_dtype(arg) for arg in tensor_args(node)])
    new.specs[node.name] = specs if isinstance(node.meta["val"], (tuple, list)) else specs[0]
    if rule.adjust:
        node.args, node.kwargs = localize_args(node.args, node.kwargs, rule, strategy, specs[0], context.sizes)


def placeholder_spec(node: fx.Node, item: Input, context: Lowering) -> Spec:
    """Where an input lies: a parameter as its choice says, the rest replicated unless the plan chose otherwise."""
    value = values(node)[0]
    strategy = context.strategies.get(node.name)
    rule = context.rules.get(node.name)
    if strategy is None or rule is None:
        return _replicated(value, context)
    spec = output_specs(rule, strategy, [value.dtype])[0]
    return spec if spec is not None else _replicated(value, context)


def output_spec(program: Program, out: Output, specs: Mapping[str, Spec | tuple], context: Lowering) -> Spec:
    """Where a result must lie: a gradient as its parameter, a buffer replicated, an output as the plan chose."""
    value = values(program.node(out.node))[0]
    if out.role == "grad":
        owner = next(i for i in program.inputs if i.name == out.name and i.role in ("param", "input"))
        return specs[owner.node]
    strategy = context.strategies.get(f"output.{out.name}") if out.role == "output" else None
    rule = context.rules.get(f"output.{out.name}")
    if strategy is None or rule is None:
        return _replicated(value, context)
    return output_specs(rule, strategy, [value.dtype])[0]


def _replicated(value: torch.Tensor, context: Lowering) -> Spec:
    return plain(value.shape, value.dtype, [Replicate()] * len(context.sizes))


def _dtype(node: fx.Node) -> torch.dtype:
    producer, index = source(node)
    return values(producer)[index].dtype
