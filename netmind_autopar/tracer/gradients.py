"""What backward will do, read off autograd's graph: which nodes there are, in which order they run, and what each of them is given.

A node of torch's own computes its gradient from the arguments of the op that made it and from what it is given, so that two models
that have made the same ops, and the same graph, have the same backward. Where Python takes part in it (`autograd.Function`, hooks
on gradients or on saved tensors) that is no proof, and backward has to be run.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import torch_private
from .period import NoPeriod, Step

_LEAF = "AccumulateGrad"
_OF_TORCH = re.compile(rf"{_LEAF}|\w+Backward\d+")
Name = Callable[[torch.Tensor], tuple[str, int | None]]  # a leaf's name without its block's number, and the number


def is_plain(nodes: dict[Any, tuple]) -> bool:
    """True when all nodes are torch's own."""
    return not any(isinstance(node, torch.autograd.function.FunctionCtx) or not _OF_TORCH.fullmatch(_kind(node)) for node in nodes)


def reached(roots: Sequence[torch.Tensor]) -> dict[Any, tuple]:
    """Every node that a gradient of `roots` reaches, with what it gives its gradients to: (node, position) or (None, 0)."""
    found: dict[Any, tuple] = {}
    stack = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = node.next_functions
            stack += [after for after, _ in found[node]]
    return found


def backward_steps(steps: list[Step], times: Sequence[int], roots: Sequence[torch.Tensor], nodes: dict[Any, tuple], name: Name) -> None:
    """Add to the steps of forward those of backward, as autograd's engine takes them: the node made last first, gradients summed as
    they arrive. `times`: how many nodes had been made when each step of forward was taken."""
    arrived: dict[Any, dict[int, int]] = {node: {} for node in nodes}  # the steps that made what each has been given so far

    def give(node: Any, position: int, step: int) -> None:
        before = arrived[node].get(position)
        if before is not None:
            steps.append(Step(("sum",), (before, step)))
        arrived[node][position] = step if before is None else len(steps) - 1

    for i, root in enumerate(roots):
        steps.append(Step(("tangent", i)))
        give(root.grad_fn, root.output_nr, len(steps) - 1)
    done: set[Any] = set()
    for node in sorted((n for n in nodes if _kind(n) != _LEAF), key=torch_private.number_of, reverse=True):
        given = sorted(arrived[node].items())
        ends, blocks = [], []
        for after, position in nodes[node]:
            if after in done:
                raise NoPeriod("a gradient that comes too late")
            leaf, block = name(after.variable) if after is not None and _kind(after) == _LEAF else (None, None)
            blocks += [] if block is None else [block]
            ends.append((after is None, position, leaf, block is not None))
        made = min(bisect.bisect_right(times, torch_private.number_of(node)), len(times) - 1)
        content = (_kind(node), tuple(position for position, _ in given), tuple(ends))
        steps.append(Step(content, (made, *(step for _, step in given)), tuple(blocks)))
        done.add(node)
        number = len(steps) - 1
        for after, position in nodes[node]:
            if after is not None:
                give(after, position, number)


def _kind(node: Any) -> str:
    return node.name().rpartition("::")[2]
