"""Micro-batches at run time: results joined, gradients added up, in a place of their own for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .place import Place, load


def join(how: str, pieces: Sequence[Tensor]) -> Tensor:
    """A result of the step from those of its micro-batches; see `ir.program.Micro`."""
    if how == "same":
        return pieces[0]
    if how.startswith("cat:"):
        return torch.cat(list(pieces), dim=int(how[4:]))
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


class Turns:
    """The emitted functions of every micro-batch, run one after the other."""

    def __init__(self, source: str, place: Place, count: int, joins: Sequence[str], *, inference: bool = False) -> None:
        self.joins = tuple(joins)  # of all results but gradients
        name = "inference" if inference else "emitted"
        self.bound = [load(source, p, name) for p in place.turns(count)]

    def infer(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Results of a step whose emitted functions are forward alone; nothing is saved."""
        return self._joined([forward(*inputs)[0] for forward in self.bound]), []

    def step(self, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Results and gradients of a step, forward and backward of each micro-batch before the next one begins."""
        results, sums = self.sums(inputs, tangents)
        return results, self.bound[0][2](*sums)

    def sums(self, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """`step` without what comes after the last micro-batch: results, and what `finish` takes."""
        results, sums = [], _Sums()
        for forward, backward, *_ in self.bound:
            made, saved = forward(*inputs)
            results.append(made)
            backward(saved, sums.add, *tangents)
        return self._joined(results), sums.tensors

    def _joined(self, results: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        return tuple(join(how, pieces) for how, *pieces in zip(self.joins, *results, strict=True))


class _Sums:
    """Gradients added up. The first of each is copied: it may be memory that is not its own."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def add(self, i: int, gradient: Tensor, once: bool = False) -> None:
        """once: every micro-batch makes the whole gradient, which counts once."""
        if i in self.found:
            if not once:
                self.found[i] += gradient
        else:
            self.found[i] = gradient.clone(memory_format=torch.contiguous_format)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.found[i] for i in range(len(self.found))]
