"""How the values of a problem lie, as numbers of specs: columns per strategy, distinct layouts, and tables of conversions between them.

Specs themselves are made only where one is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from ..costs.comm import Conversions
from ..costs.room import room
from ..ir.spec import Spec
from ..rules.algebra import Rule, Strategy, input_placements, input_specs, output_placements, output_specs, term_dims

Numbers = np.ndarray
Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_tables: weakref.WeakKeyDictionary[Conversions, dict[tuple, Tables]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Side(Sequence[Any]):
    """The specs that a class takes, or gives: row k under strategy k. codes[k, axis] are positions in `rule.symbols`."""

    rule: Rule
    strategies: tuple[Strategy, ...]
    codes: np.ndarray
    dtypes: tuple[torch.dtype | None, ...]
    gives: bool

    def __len__(self) -> int:
        return len(self.strategies)

    def __getitem__(self, k: Any) -> Any:
        make = output_specs if self.gives else input_specs
        return make(self.rule, self.strategies[k], self.dtypes)  # type: ignore[arg-type]

    def column(self, position: int, conversions: Conversions) -> Numbers:
        """The numbers of the specs at one position, per strategy."""
        term = (self.rule.outputs if self.gives else self.rule.inputs)[position]
        dtype = self.dtypes[position]
        assert term is not None and dtype is not None
        placements = (output_placements if self.gives else input_placements)(self.rule, position)
        return conversions.numbers(term_dims(self.rule, term), dtype, placements, self.codes)


@dataclass(frozen=True, eq=False)
class Specs(Sequence[Spec]):
    """Specs known by their numbers."""

    conversions: Conversions
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, i: int) -> Spec: ...
    @overload
    def __getitem__(self, i: slice) -> Specs: ...
    def __getitem__(self, i: int | slice) -> Spec | Specs:
        if isinstance(i, slice):
            return Specs(self.conversions, self.numbers[i])
        return self.conversions.spec(int(self.numbers[i]))


def distinct(conversions: Conversions, columns: Sequence[Numbers]) -> tuple[Numbers, list[np.ndarray]]:
    """The first spec of every different layout of all columns, in order of appearance, and every column as positions among them."""
    if not columns:
        return np.zeros(0, np.int64), []
    numbers = np.concatenate(columns)
    _, first, inverse = np.unique(conversions.layouts(numbers), return_index=True, return_inverse=True)
    states = np.argsort(np.argsort(first))[inverse].astype(np.int32)
    return numbers[np.sort(first)], np.split(states, np.cumsum([len(c) for c in columns])[:-1])


def tables(
    conversions: Conversions,
    sources: Numbers,
    targets: Numbers,
    *,
    dense: bool,
    is_gradient: bool,
    bucket_bytes: int | None,
    turns: int = 1,
) -> Tables:
    """Of conversions: whether both layouts are one, seconds, bytes that they need while they run, and per target the bytes of the copy.

    dense: the tensor is contiguous; others are packed first. is_gradient: reductions travel in buckets, and an all-reduce waits for its
    bucket, in which `bucket_bytes` of others lie packed (None: all gradients fit into one). turns: of so many micro-batches each pays
    its part of the all-reduces that come after the last one.
    """
    known = _tables.setdefault(conversions, {})
    key = (sources.tobytes(), targets.tobytes(), is_gradient, dense, bucket_bytes, turns)
    if key not in known:
        same = conversions.layouts(sources)[:, None] == conversions.layouts(targets)[None, :]
        seconds = conversions.matrix(sources, targets, bucketed=is_gradient)
        if is_gradient and turns > 1:
            seconds = seconds - conversions.tail(sources, targets) * (1 - 1 / turns)
        need, left, reduced = room(conversions, sources, targets)
        if not dense:
            need = need + conversions.local_bytes(sources)[:, None]
        if is_gradient and bucket_bytes is not None:
            need = need + reduced * bucket_bytes
        elif is_gradient:
            left = left + reduced * left
        known[key] = same, np.where(same, 0.0, seconds), need * ~same, np.max(left * ~same, axis=0, initial=0)
    return known[key]
