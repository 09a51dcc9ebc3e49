"""What a search knows so far, and where it may end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .presolve import Kept
from .problem import Choice, Problem, evaluate, profile

FAR_GAP = 5e-3  # relative to its seconds: how near to the best a plan must be for its bytes to say something about the best


@dataclass
class State:
    """What is known so far: strategies that remain, the best plan that fits, the proven bound.

    excess: per strategy, what it costs at least above `base`, a bound that was proven together with it.
    """

    kept: Kept
    best: Choice | None = None
    best_s: float = math.inf
    bound: float = -math.inf
    excess: list[np.ndarray] | None = None
    base: float = -math.inf

    @property
    def scale(self) -> float:
        """Seconds of about the objective's size."""
        if 0 < self.best_s < math.inf:
            return self.best_s
        return self.bound if self.bound > 0 else 1.0

    def offer(self, problem: Problem, choice: Choice) -> bool:
        """Keep `choice` if it fits and is cheaper."""
        cost, peak, _ = evaluate(problem, choice)
        fits = problem.limit_bytes is None or peak <= problem.limit_bytes
        if fits and cost < self.best_s:
            self.best, self.best_s = choice, cost
        return fits and cost < math.inf


@dataclass(frozen=True)
class Goal:
    """Where bounding ends. gap: relative to the objective with `shift` added. far: bytes; a plan that needs more need not be the best."""

    gap: float
    shift: float = 0.0
    far: float = math.inf

    def met(self, state: State) -> bool:
        return state.best_s - state.bound <= 0.1 * self.gap * abs(state.best_s + self.shift)

    def is_far(self, problem: Problem, state: State) -> bool:
        """About the best plan is in hand, and it needs so much that the best one will not fit either."""
        if self.far == math.inf or state.best is None or state.best_s - state.bound > FAR_GAP * abs(state.best_s):
            return False
        return int(profile(problem, state.best).max()) > self.far
