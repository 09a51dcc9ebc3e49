"""Give every op its local shape arguments, and write down the specs it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..ir.program import Output, Program, is_getitem, tensor_args, values
from ..ir.spec import Replicate, Spec, plain
from ..rules.algebra import Rule, Strategy, input_specs, output_specs
from ..rules.localize import localize_args
from ..solver.conversions import owner_of, value_of
from ..solver.micro import undivided

if TYPE_CHECKING:
    from .pipeline import Lowering


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def localize(program: Program, context: Lowering) -> Program:
    """Set `specs` and `expects` of every node from its strategy, and turn shape arguments into local ones."""
    with program.edit() as new:
        for node in new.graph.nodes:
            if node.op == "placeholder":
                new.specs[node.name] = _end_spec(node.name, values(node)[0], context)
            elif node.op == "get_attr":
                new.specs[node.name] = _replicated(values(node)[0], context)
            elif node.op == "call_function" and not is_getitem(node):
                _localize_op(node, context.rules[node.name], context.strategies[node.name], new, context)
        nodes = {node.name: node for node in new.graph.nodes}
        new.expects["output"] = tuple(_result_spec(program, nodes[out.node], out, new.specs, context) for out in program.outputs)
    return new.program


def _localize_op(node: fx.Node, rule: Rule, strategy: Strategy, new, context: Lowering) -> None:
    outs = values(node)
    specs = output_specs(rule, strategy, [None if v is None else v.dtype for v in outs])
    new.expects[node.name] = input_specs(rule, strategy, [value_of(arg).dtype for arg in tensor_args(node)])
    new.specs[node.name] = specs if isinstance(node.meta["val"], (tuple, list)) else specs[0]
    if node.target in _VIEWS:  # strides follow from the plan: a view that is legal globally may need a copy locally
        node.target = torch.ops.aten.reshape.default
    if rule.adjust:
        sizes, spec = context.sizes, specs[0]
        if symbol := node.meta.get("micro"):  # where a piece begins is said of the whole batch, of which this is one turn
            rule, strategy, sizes = undivided(rule, symbol, new.program.turns), (symbol, *strategy), (new.program.turns, *sizes)
            spec = output_specs(rule, strategy, [None if v is None else v.dtype for v in outs])[0]
        node.args, node.kwargs = localize_args(node.args, node.kwargs, rule, strategy, spec, sizes)


def _end_spec(name: str, value: torch.Tensor, context: Lowering) -> Spec:
    """Where a tensor at the program's ends lies: as the plan chose, else replicated."""
    strategy = context.strategies.get(name)
    spec = output_specs(context.rules[name], strategy, [value.dtype])[0] if strategy else None
    return spec or _replicated(value, context)


def _result_spec(program: Program, node: fx.Node, out: Output, specs: Mapping[str, Spec | tuple], context: Lowering) -> Spec:
    """Where a result must lie: a gradient as its parameter, a buffer replicated, an output as the plan chose."""
    value, owner = value_of(node), owner_of(program, out)
    if owner is None:
        return _replicated(value, context)
    return specs[owner] if owner in specs else _end_spec(owner, value, context)  # type: ignore[return-value]


def _replicated(value: torch.Tensor, context: Lowering) -> Spec:
    return plain(value.shape, value.dtype, [Replicate()] * len(context.sizes))
