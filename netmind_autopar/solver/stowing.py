"""What travels in a step because parameters wait elsewhere, by slots of the timeline's sketch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .problem import Choice, Problem, Value, fetched_at, link_s, stays_by_phase, wanted


class Travel(NamedTuple):
    """A copy of value `value`, in or out: begun before the op at slot `go`, waited for before the op at slot `come`."""

    value: int
    inward: bool
    seconds: float
    go: int
    come: int


def travels(problem: Problem, choice: Choice) -> Iterator[Travel]:
    """Every fetch of a parameter that waits elsewhere, and every gradient that leaves."""
    for v, value in enumerate(problem.values):
        p, targets = wanted(value, choice)
        if value.stowed:
            for late, (first, _) in stays_by_phase(value, p, targets).items():
                for i, (go, use) in enumerate(zip(fetched_at(problem, first, late).tolist(), first.tolist(), strict=True)):
                    seconds = float(value.bytes[p]) * _link_s(problem, value.node, value.rank[i])
                    yield Travel(v, True, seconds, min(go, use) // 2, use // 2)
        elif value.owners is not None:
            yield from _gradients(problem, choice, v, value)


def _gradients(problem: Problem, choice: Choice, v: int, value: Value) -> Iterator[Travel]:
    assert value.owners is not None
    for t, consumer in enumerate(value.consumers):
        node = problem.nodes[consumer.node]
        for i, (owner, held) in enumerate(zip(value.owners[:, t].tolist(), value.held[:, t].tolist(), strict=True)):
            if owner >= 0 and node.size is not None and held < problem.moments - 1:  # it does not stay until the optimizer's moment
                seconds = float(node.size[choice[consumer.node]]) * _link_s(problem, consumer.node, owner)
                yield Travel(v, False, seconds, int(value.used[i, t]) // 2, held // 2)


def _link_s(problem: Problem, node: int, rank: int) -> float:
    return link_s(problem, "host" if rank < problem.nodes[node].stowed[0] else "disk")
