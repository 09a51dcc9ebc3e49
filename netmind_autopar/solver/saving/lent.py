"""What a view makes of its base's time in memory.

A tensor that is kept stays while a view of it is wanted in backward, if the view is wanted as it is. Wanted in another layout, the copy
may wait in its place. So a kept tensor pays for memory until its view is wanted, and every conversion on the way there, of the tensor
for the view or of the view itself, gives back what that can have cost: each alone, so that what remains bounds every plan.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..problem import FORWARD, Problem


class Lent:
    """out[v, t]: seconds per source state of value v that its conversion for consumer t gives back."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.out = problem, dict[tuple[int, int], np.ndarray]()
        views = [u for u, value in enumerate(problem.values) if problem.nodes[value.node].view]
        self.made = {m: u for u in views for m in problem.values[u].produced.tolist()}  # by the moment at which a view is made

    def along(self, v: int, more: Mapping[int, np.ndarray]) -> None:
        """more: per instance of value v, by the moment that makes it, and source state what it pays for views of it."""
        value = self.problem.values[v]
        for t, consumer in enumerate(value.consumers):
            view = self.problem.nodes[consumer.node].view
            if consumer.phase == FORWARD and not view:
                continue
            self.out[v, t] = self.out.get((v, t), 0.0) + sum(more.values(), np.zeros(len(value.bytes)))
            after: dict[int, dict[int, np.ndarray]] = {}
            for made, used in zip(value.produced.tolist(), value.used[:, t].tolist(), strict=True):
                if view and made in more and (u := self.made.get(used + 1)) is not None:
                    taken = np.where(value.same, more[made][:, None], 0.0).max(axis=0)[consumer.state]  # per strategy
                    state = np.zeros(len(self.problem.values[u].bytes))
                    np.maximum.at(state, self.problem.values[u].state, taken)
                    after.setdefault(u, {})[used + 1] = state
            for u, states in after.items():
                self.along(u, states)
