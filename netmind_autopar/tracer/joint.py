"""Forward and backward in one graph, from the exported forward graph.

Most programs are functional before autograd and after it: nothing in them is written in place. Those are traced as they are, `directly`;
torch's own way, which first turns writes into copies, runs every op through two more layers and forward twice. It is the way for all
other programs, and gives the same graph where both work (tests/test_joint.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from . import torch_private


class NotDirect(Exception):
    """The program needs torch's own way."""


class Joint(NamedTuple):
    """graph: all results in its output. constants: the tensors that its `get_attr` nodes name. ins, outs: what its ends are, in order:
    ("param", name), ("buffer", name), ("input", index), ("tangent", output index); ("output", index), ("mutation", role, name),
    ("grad", role, name).
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    ins: list[tuple]
    outs: list[tuple]


def joint(module: fx.GraphModule, args: tuple[torch.Tensor, ...], decompositions: dict[Any, Callable[..., Any]]) -> Joint:
    """The joint graph of `module`, its parameters and `args` being fake tensors of one mode."""
    try:
        return directly(module, args, decompositions)
    except Exception:  # whatever the reason, torch's way is right, and says what is wrong
        return Joint(*torch_private.joint(module, args, decompositions))


def directly(module: fx.GraphModule, args: tuple[torch.Tensor, ...], decompositions: dict[Any, Callable[..., Any]]) -> Joint:
    """As `joint`, or NotDirect when something is written in place, before autograd or by it."""
    _check_forward(module)
    named = [("param", name, tensor) for name, tensor in module.named_parameters()]
    named += [("buffer", name, tensor) for name, tensor in module.named_buffers()]
    primals = [*(tensor for _, _, tensor in named), *args]
    if len({id(tensor) for tensor in primals}) != len(primals) or any(torch_private.constant(t) is not None for t in primals):
        raise NotDirect("one tensor under two names, or a tensor that has a value")
    ends = [(role, name) for role, name, _ in named] + [("input", i) for i in range(len(args))]
    carrying: list[int] = []

    def step(tensors: list[torch.Tensor]) -> list[Any]:  # the very tensors that the module holds
        outs = list(fx.Interpreter(module).run(*tensors[len(named) :]))
        if any(out is tensor for out in outs for tensor in tensors) or len({id(out) for out in outs}) != len(outs):
            raise NotDirect("an input is a result, or one result is two")
        carrying[:] = [i for i, out in enumerate(outs) if isinstance(out, torch.Tensor) and out.requires_grad]
        wanting = [tensor for tensor in tensors if tensor.requires_grad]
        gradients: list[Any] = []
        if carrying and wanting:
            gradients = torch_private.traced_backward([outs[i] for i in carrying], wanting)
        found = iter(gradients)
        return outs + [next(found) if gradients and tensor.requires_grad else None for tensor in tensors]

    traced = torch_private.traced(step, primals, decompositions)
    _check_traced(traced.graph)
    count = len(next(n for n in reversed(traced.graph.nodes) if n.op == "output").args[0]) - len(primals)  # type: ignore[arg-type]
    constants = {n.target: torch_private.attribute(traced, n.target) for n in traced.graph.nodes if n.op == "get_attr"}
    ins = [*ends, *(("tangent", i) for i in carrying)]
    return Joint(traced.graph, constants, ins, [*(("output", i) for i in range(count)), *(("grad", *end) for end in ends)])


# Regions of a program that say how it is run, and whose ops are traced like any others.
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _check_forward(module: fx.GraphModule) -> None:
    """NotDirect where an op writes, or is more than an op: torch's way knows what is written, and that it may be."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if node.op == "call_module" or _writes(node.target):
                raise NotDirect(str(node.target))


def _check_traced(graph: fx.Graph) -> None:
    """NotDirect where autograd writes into what it has made."""
    for node in graph.nodes:
        if _writes(node.target):
            raise NotDirect(str(node.target))


def _writes(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        if target is torch.ops.aten._has_compatible_shallow_copy_type.default:  # what assigning to .data asks first
            return True
        return target._schema.is_mutable and target is not torch.ops.aten.detach_.default  # which writes no numbers
    return isinstance(target, torch._ops.OperatorBase) and str(target) not in _REGIONS
