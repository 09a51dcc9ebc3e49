"""Numeric proof of a rule: run an op whole and split, in every way the rule allows, and compare.

For every legal strategy and every device of the mesh the global inputs are cut as `input_specs` says, the op runs on the
pieces with its arguments localized, and the results, put together as `output_specs` says, must equal the op's own. A Partial
input is a random decomposition, not the value on one device and zeros elsewhere, so that an op that is only nearly linear is
caught. No process group, no accelerator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.spec import Partial, Replicate, Spec, local_shape, shard, unshard
from .algebra import Rule, Strategy, input_specs, output_specs
from .algebra import strategies as all_strategies
from .call import Call, call_of
from .localize import localize_args

# Relative to the largest element. Exact for integers and truth values.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}

# Ops whose results are whatever was in memory: only shapes are compared.
GARBAGE = {f"aten.{op}.default" for op in ("empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")}
GARBAGE.add("aten.empty.memory_format")


@dataclass(frozen=True)
class Failure:
    """One strategy under which the split op does not compute what the whole op computes."""

    op: str
    strategy: Strategy
    mesh: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.op} on {self.mesh} split {' '.join(self.strategy)}: {self.why}"


def prove(
    rule: Rule,
    call: Call | fx.Node,
    sizes: tuple[int, ...],
    strategies: Iterable[Strategy] | None = None,
    seed: int = 0,
    *,
    closely: bool = False,
) -> list[Failure]:
    """Failures of a rule for one call on a mesh of these axis sizes; empty when every strategy is exact.

    A call with real tensors is run on them; a graph node, or a call with fake tensors, on random ones (`sample`).
    closely: each device's piece is judged by its own magnitude too, so that one huge number hides no error elsewhere.
    """
    call = call if isinstance(call, Call) else call_of(call)
    if any(type(t) is not torch.Tensor or t.device.type != "cpu" for t in call.tensors):
        call = sample(call, seed)
    whole = _outputs(call.target(*call.args, **call.kwargs))
    failures = []
    for strategy in all_strategies(rule, sizes) if strategies is None else strategies:
        if why := _try(rule, call, whole, strategy, sizes, torch.Generator().manual_seed(seed), closely):
            failures.append(Failure(call.op, tuple(strategy), sizes, why))
    return failures


def _try(
    rule: Rule,
    call: Call,
    whole: Sequence[torch.Tensor | None],
    strategy: Strategy,
    sizes: tuple[int, ...],
    generator: torch.Generator,
    closely: bool = False,
) -> str:
    """Why this strategy fails, empty when it does not."""
    ins = input_specs(rule, strategy, [t.dtype for t in call.tensors])
    outs = output_specs(rule, strategy, [None if t is None else t.dtype for t in whole])
    coords = list(itertools.product(*(range(n) for n in sizes)))
    pieces = [distribute(t, spec, sizes, generator) for t, spec in zip(call.tensors, ins, strict=True)]
    results: list[list[torch.Tensor | None]] = []
    for rank, coord in enumerate(coords):
        args, kwargs = localize_args(call.args, call.kwargs, rule, strategy, outs[0], sizes, coord)
        args, kwargs = put_tensors(args, kwargs, [p[rank] for p in pieces])
        try:
            result = _outputs(call.target(*args, **kwargs))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            return f"rank {rank} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for i, (tensor, spec) in enumerate(zip(result, outs, strict=True)):
            if spec is not None and (tensor is None or tuple(tensor.shape) != local_shape(spec, sizes, coord)):
                got = None if tensor is None else tuple(tensor.shape)
                return f"output {i} on rank {rank} has shape {got}, not {local_shape(spec, sizes, coord)}"
        results.append(result)
    for i, (expected, spec) in enumerate(zip(whole, outs, strict=True)):
        if expected is not None and spec is not None and call.op not in GARBAGE:
            joined = unshard([r[i] for r in results], spec, sizes)  # type: ignore[misc]
            if why := difference(joined, expected) or (closely and _piecewise([r[i] for r in results], expected, spec, sizes)):
                return f"output {i}: {why}"
    return ""


def _piecewise(pieces: Sequence[torch.Tensor | None], expected: torch.Tensor, spec: Spec, sizes: tuple[int, ...]) -> str:
    """What differs when every device's piece is judged by itself, and a sum by the magnitudes of its terms."""
    coords = itertools.product(*(range(n) for n in sizes))
    if not spec.has_partial:
        found = (difference(piece, shard(expected, spec, sizes, c)) for piece, c in zip(pieces, coords, strict=True))  # type: ignore[arg-type]
        return next((f"rank {rank}: {why}" for rank, why in enumerate(found) if why), "")
    if spec.placements != (Partial("sum"),) or expected.dtype not in TOLERANCE:
        return ""
    limit = 100 * TOLERANCE[expected.dtype] * sum(piece.abs() for piece in pieces if piece is not None)
    error = (sum(piece for piece in pieces if piece is not None) - expected).abs()
    wrong = error > limit  # not a number where a term is none
    return f"{int(wrong.sum())} elements differ by more than their terms' rounding" if bool(wrong.any()) else ""


def difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """In words, empty when equal: exactly, or for floating point relative to the largest element."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"{got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if expected.dtype not in TOLERANCE:
        return "" if torch.equal(got, expected) else f"{int((got != expected).sum())} elements differ"
    finite = expected[torch.isfinite(expected)].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    limit = TOLERANCE[expected.dtype]
    if torch.allclose(got, expected, rtol=limit, atol=limit * max(scale, 1e-30), equal_nan=True):
        return ""
    return f"differs by {float((got - expected).abs().max()):.3g} (largest element {scale:.3g})"


def distribute(tensor: torch.Tensor, spec: Spec, sizes: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    """Local tensors of all ranks, in rank order; along Partial(sum) axes random terms that add up to the value."""
    terms: dict[tuple[int, ...], torch.Tensor] = {(): tensor}
    for placement, n in zip(spec.placements, sizes, strict=True):
        terms = {
            (*c, i): t
            for c, old in terms.items()
            for i, t in enumerate(_decompose(old, n, generator) if placement == Partial("sum") else [old] * n)
        }
    plain = spec.with_placements(Replicate() if isinstance(p, Partial) else p for p in spec.placements)
    return [shard(terms[coord], plain, sizes, coord).contiguous() for coord in itertools.product(*(range(n) for n in sizes))]


def _decompose(tensor: torch.Tensor, n: int, generator: torch.Generator) -> list[torch.Tensor]:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        terms = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for _ in range(n - 1)]
    elif tensor.dtype == torch.bool:
        return [tensor] * n
    else:
        terms = [torch.randint(-3, 4, tensor.shape, generator=generator, dtype=tensor.dtype) for _ in range(n - 1)]
    return [*terms, tensor - sum(terms)] if terms else [tensor]


def put_tensors(args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with their tensors replaced, in the order of the call."""
    rest = iter(tensors)

    def put(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return next(rest)
        if isinstance(value, (list, tuple)):
            return type(value)(put(v) for v in value)
        return {k: put(v) for k, v in value.items()} if isinstance(value, dict) else value

    return tuple(put(a) for a in args), {k: put(v) for k, v in kwargs.items()}


def sample(call: Call, seed: int = 0) -> Call:
    """The call on random CPU tensors: floating point as float64 in (0.1, 1.1), where every common function is defined, integers
    below the smallest dim that any operand or result has."""
    generator = torch.Generator().manual_seed(seed)
    bound = min((n for t in (*call.tensors, *call.outputs) if t is not None for n in t.shape if n > 1), default=2)

    def draw(t: torch.Tensor) -> torch.Tensor:
        shape = tuple(t.shape)
        if t.dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.5
        if t.dtype.is_floating_point:
            return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        if t.dtype.is_complex:
            return torch.randn(shape, generator=generator, dtype=torch.complex128)
        return torch.randint(0, bound, shape, generator=generator, dtype=t.dtype)

    args, kwargs = put_tensors(call.args, call.kwargs, [draw(t) for t in call.tensors])
    return Call(call.target, args, kwargs, tuple(_outputs(call.target(*args, **kwargs))))


def _outputs(result: Any) -> list[torch.Tensor | None]:
    items = result if isinstance(result, (list, tuple)) else (result,)
    return [t if isinstance(t, torch.Tensor) else None for t in items]


__all__ = ["Failure", "difference", "distribute", "prove", "put_tensors", "sample"]
