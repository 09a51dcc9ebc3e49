"""A module being drawn: choices, and the source lines that they become.

Ops (`random_layers.py`, `random_shapes.py`, `random_math.py`) are functions `(draw, value) -> expression or None`. They write Python:
what they return, and lines that they add before it, is what a user would have in `forward`; None means that the op does not fit
the value. A line is run as soon as it is drawn, so that every later choice knows shapes and numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

APART = 1e-6  # ops that jump or choose are only used where rounding cannot decide
SIZES = (1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 12)
MOVED = (
    "def moved(layer):  # weights of one and biases of zero would hide errors",
    "    for t in [*layer.parameters(), *layer.buffers()]:",
    "        if t.is_floating_point():",
    "            t.data += 0.1 * torch.rand(t.shape)",
    "    return layer",
)


@dataclass(frozen=True)
class Value:
    """A tensor that exists in `forward`, under its name there."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def dim(self) -> int:
        return self.tensor.dim()

    def numel(self) -> int:
        return self.tensor.numel()

    def apart(self) -> bool:
        """No two elements are nearly equal, none is nearly zero."""
        flat = torch.cat([self.tensor.detach().flatten(), self.tensor.new_zeros(1)]).sort().values
        return bool((flat.diff() > APART).all())

    def __str__(self) -> str:
        return self.name


class Draw:
    """Random choices, the values made so far, and the lines of the step being drawn."""

    def __init__(self, source: random.Random) -> None:
        self.random, self.model = source, nn.Module()
        self.setup: dict[str, str] = {}  # attribute of the model -> the lines that make it
        self.env: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.model}
        exec("\n".join(MOVED), self.env)
        self.pool: list[Value] = []
        self.lines: list[str] = []
        self.name, self.ids_rank = "", 0

    # choices

    def chance(self, p: float) -> bool:
        return self.random.randrange(100) < 100 * p

    def below(self, n: int) -> int:
        return self.random.randrange(n)

    def choice(self, *options: Any) -> Any:
        return options[self.random.randrange(len(options))]

    def order(self, n: int) -> list[int]:
        out = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def size(self) -> int:
        return self.choice(*SIZES)

    def dim(self, x: Value) -> int:
        """A dim of x, now and then counted from the end."""
        d = self.below(x.dim())
        return d - x.dim() if self.chance(0.4) else d

    def some(self, x: Value) -> list[int]:
        return sorted(self.order(x.dim())[: 1 + self.below(x.dim())])

    def broadcast(self, x: Value) -> list[int]:
        """A shape that broadcasts to x's."""
        shape = [1 if self.chance(0.35) else n for n in x.shape]
        return shape[self.below(len(shape)) :]

    def divisor(self, n: int) -> int:
        return self.choice(*(k for k in range(1, n + 1) if n % k == 0))

    def factors(self, n: int) -> list[int]:
        """n as a product, in random order, a 1 now and then."""
        out: list[int] = []
        while n > 1:
            out.append(self.choice(*(k for k in range(2, n + 1) if n % k == 0)))
            n //= out[-1]
        if self.chance(0.2):
            out.insert(self.below(len(out) + 1), 1)
        return out or [1]

    def other(self, fits: Callable[[Value], bool]) -> Value | None:
        """Another value made before, if one fits."""
        found = [v for v in self.pool if fits(v)]
        return self.choice(*found) if found else None

    # source

    def line(self, text: str) -> None:
        """A statement of the step, run at once."""
        exec(text, self.env)
        self.lines.append(text)

    def temp(self, word: str) -> str:
        return f"{self.name}_{word}"

    def layer(self, text: str, *, share: bool = True) -> str:
        """A layer; now and then one of the same form that exists already (shared weights), now and then frozen."""
        alike = [k for k, made in self.setup.items() if f"= moved({text})" in made]
        if share and alike and self.chance(0.5):
            return self.choice(*alike)
        return self._attribute("layer", f"moved({text})" + (".requires_grad_(False)" if self.chance(0.1) else ""))

    def parameter(self, shape: list[int]) -> str:
        alike = [k for k, made in self.setup.items() if f"nn.Parameter(torch.randn({shape})" in made]
        if alike and self.chance(0.3):
            return self.choice(*alike)
        return self._attribute("p", f"nn.Parameter(torch.randn({shape}), requires_grad={self.chance(0.9)})")

    def buffer(self, text: str) -> str:
        return self._attribute("b", text)

    def _attribute(self, word: str, text: str) -> str:
        """`self.<name>`; seeded by itself, so that its numbers stay when another one is taken out of the module."""
        name = f"{word}{len(self.setup)}"
        made = f'self.register_buffer("{name}", {text})' if word == "b" else f"self.{name} = {text}"
        self.setup[f"self.{name}"] = f"torch.manual_seed({self.below(10**6)}); {made}"
        torch.set_default_dtype(torch.float64)
        exec(self.setup[f"self.{name}"], self.env)
        torch.set_default_dtype(torch.float32)
        return f"self.{name}"
