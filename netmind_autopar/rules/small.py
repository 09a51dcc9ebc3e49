"""Small real calls of an op, made from one call of a program: other sizes, CPU tensors, many kinds of numbers.

Sizes are replaced class by class: what is equal in the program's call is equal in the small one, and what divides may be kept
dividing. Numbers are drawn in several *kinds*, because an op may treat rows alike for positive numbers and not for others.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .call import Call, tensors_in

KINDS = ("normal", "positive", "negative", "integers", "twins", "spike", "large", "small", "halves", "peak", "broken", "infinite")
# Ascending, so that the order of sizes is kept. EVEN has sizes that 2, 3 and 4 devices share evenly and unevenly, ODD hardly any.
EVEN = (6, 8, 10, 12, 14, 15, 16, 18, 20, 21, 22, 24)
ODD = (5, 7, 9, 11, 13, 17, 19, 23, 25, 29, 31, 37)
LARGER = (21, 26, 33, 38, 45, 52, 57, 62, 69, 74, 81, 86)
KEPT = 4  # sizes up to this are often the op's own (coordinates, pairs), so they stay
POSITIONS = {"dim", "dims", "axis", "axes", "dim0", "dim1", "start_dim", "end_dim"}  # integers that count dims
MAX_RUNS = 6000
RUN_LIMIT_S, SEARCH_LIMIT_S = 0.5, 20.0  # of CPU
WAIT_LIMIT_S = 5.0  # of wall clock, for an op that waits for something


class NotFound(Exception):
    """Why no rule was found, in the user's terms. `lasting`: true of the op itself, not of this machine."""

    def __init__(self, why: str, *, lasting: bool = True, draws: bool = False) -> None:
        super().__init__(why)
        self.why, self.lasting, self.draws = why, lasting, draws


class Guarded:
    """An op that counts its runs, and whose every failure is a RuntimeError. Raises NotFound when it takes too long, in seconds of CPU:
    a machine that is busy otherwise must not find fewer rules."""

    def __init__(self, target: Any) -> None:
        self.target, self._schema, self.__name__ = target, target._schema, str(target)
        self.runs, self.slow, self.deadline = 0, 0, math.inf

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        start, since = time.thread_time(), time.perf_counter()
        try:
            result = self.target(*args, **kwargs)
        except Exception as error:
            text = str(error).strip().splitlines()
            raise RuntimeError(f"{type(error).__name__}: {text[0] if text else ''}") from None
        now = time.thread_time()
        if self.runs == 1:  # torch imports much when it first runs an op of the user's
            self.deadline = now + SEARCH_LIMIT_S
        elif now - start > RUN_LIMIT_S or time.perf_counter() - since > WAIT_LIMIT_S:
            self.slow += 1
        if self.slow > 2 or now > self.deadline or self.runs > MAX_RUNS:
            raise NotFound(f"it takes long: {time.perf_counter() - since:.1f} s for a small call, {self.runs} runs", lasting=False)
        return result


def tensors_of(result: Any) -> list[torch.Tensor | None]:
    """What an op returned, as a list; None for what is no tensor."""
    items = result if isinstance(result, (list, tuple)) else (result,)
    return [t if isinstance(t, torch.Tensor) else None for t in items]


def sizes_of(call: Call) -> list[int]:
    """Distinct sizes that a small call replaces, ascending, without 1: of the tensor arguments' dims, and integers that make a dim."""
    made = {int(n) for shape in call.results if shape is not None for n in shape}
    given = {v for a in call.target._schema.arguments for v in _integers(call[a.name]) if a.name not in POSITIONS}
    return sorted(({int(n) for shape in call.shapes for n in shape} | (made & given)) - {0, 1})


def _integers(value: Any) -> list[int]:
    """An integer, or those in a list."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int]


def integers_of(call: Call) -> dict[str, int]:
    """Integer arguments (not those that count dims) by name."""
    named = {a.name: call[a.name] for a in call.target._schema.arguments}
    return {k: v for k, v in named.items() if type(v) is int and k not in POSITIONS}


Mapping_ = dict[int, int]
Maker = Callable[[Sequence[int]], Mapping_]


def makers(call: Call) -> Iterator[Maker]:
    """Ways to choose small sizes from a pool of numbers: sizes independent; divisors kept; the true sizes."""
    sizes = sizes_of(call)
    others = [v for v in integers_of(call).values() if v not in sizes and 1 < v <= 64]

    def independent(pool: Sequence[int]) -> Mapping_:
        out: Mapping_ = {n: n for n in sizes if n <= KEPT}
        for n in sizes:
            if n > KEPT:
                floor = max([0, *(v for v in others if v < n)])
                out[n] = next(p for p in itertools.chain(pool, itertools.count(max(pool) + 1)) if p > floor and p not in out.values())
        return out

    def dividing(pool: Sequence[int]) -> Mapping_:
        out: Mapping_ = {}
        for n in sorted({*sizes, *(v for v in integers_of(call).values() if v > 1)}):
            divisors = [d for d in out if n % d == 0]
            pairs = [(a, b) for a, b in itertools.product(divisors, divisors) if a * b == n]
            if not divisors:
                first = n if n <= KEPT else next(p for p in (pool[0] // 2 + 1, *pool, *range(pool[-1], 999)) if p not in out.values())
                out[n] = first
                continue
            base = math.lcm(*(out[d] for d in divisors))
            exact = [out[a] * out[b] for a, b in pairs] if pairs else []
            tries = [*exact, *(base * k for k in range(2 + pool[0] % 2, 99))]
            out[n] = next(t for t in tries if t % base == 0 and t not in out.values())
        return out

    yield independent
    yield dividing
    if sum(math.prod(s) for s in call.shapes) <= 1 << 14:
        yield lambda pool: {n: n for n in sizes}


def elements(call: Call, sizes: Mapping[int, int]) -> int:
    """Elements of all tensor arguments under other sizes."""
    return sum(math.prod(sizes.get(n, n) for n in shape) for shape in call.shapes)


def resized(call: Call, sizes: Mapping[int, int], kind: str, seed: int, dtype: torch.dtype | None, op: Any) -> Call:
    """The call with other sizes on random CPU tensors of one kind; `dtype` is that of floating-point numbers, None: their own.

    Integers equal to a size follow it. `op` runs it. Raises RuntimeError when the op refuses, NotFound when two runs differ.
    """
    generator = torch.Generator().manual_seed(seed)
    low = min([sizes.get(n, n) for n in (*sizes_of(call), *integers_of(call).values()) if n > 1], default=2)

    def put(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return draw(value.dtype, [sizes.get(int(n), int(n)) for n in value.shape], kind, low, generator, dtype)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if type(value) is int:
            return sizes.get(value, value) if name not in POSITIONS else value
        if isinstance(value, (list, tuple)):
            return [product(v) if type(v) is int and v not in sizes else put(v, name) for v in value]
        return value

    def product(value: int) -> int:  # in a shape: a dim that is made of two
        return next((sizes[a] * sizes[b] for a in sizes for b in sizes if a * b == value), value)

    names = [a.name for a in call.target._schema.arguments]
    args = tuple(put(a, names[i]) for i, a in enumerate(call.args))
    kwargs = {k: put(v, k) for k, v in call.kwargs.items()}
    return Call(op, args, kwargs, tuple(settled(op, args, kwargs)))


def draw(dtype: torch.dtype, shape: Sequence[int], kind: str, low: int, g: torch.Generator, wide: torch.dtype | None) -> torch.Tensor:
    """A random tensor of one kind. Integers lie in [0, low)."""
    if dtype == torch.bool:
        share = {"positive": 1.1, "negative": -0.1}.get(kind, 0.5)
        return torch.rand(shape, generator=g) < share
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 1 if kind == "negative" else min(low, 120), shape, generator=g, dtype=dtype)
    if dtype.is_complex:
        wide = None if wide is None else torch.complex128 if wide == torch.float64 else torch.complex64
    real = torch.float64 if (wide or dtype) in (torch.float64, torch.complex128) else torch.float32
    x = torch.randn(shape, generator=g, dtype=real)
    x = _shaped(x, kind, g)
    if dtype.is_complex:
        x = torch.complex(x, _shaped(torch.randn(shape, generator=g, dtype=real), kind, g))
    return x.to(wide or dtype)


def _shaped(x: torch.Tensor, kind: str, g: torch.Generator) -> torch.Tensor:
    """Standard normal numbers made into one kind. Spikes and broken numbers are single elements, so one device alone has them."""
    if kind in ("positive", "negative"):
        x = x.abs() * 0.5 + 0.1
        return x if kind == "positive" else -x
    if kind == "integers":
        return x.mul(1.2).round().clamp(-2, 2)
    if kind == "twins":  # equal slices along every dim
        for d, n in enumerate(x.shape):
            x = x.index_select(d, torch.randint(0, min(n, 2), (n,), generator=g)) if n else x
        return x
    if kind in ("large", "small"):
        return x * (1e4 if kind == "large" else 1e-4)
    if kind == "halves" and x.dim():  # all zero but for the first third of some dim
        d = int(torch.randint(0, x.dim(), (1,), generator=g))
        x.narrow(d, x.shape[d] // 3 + 1, x.shape[d] - x.shape[d] // 3 - 1).zero_() if x.shape[d] > 1 else x
    elif kind in ("spike", "peak", "broken", "infinite") and x.numel():
        at = int(torch.randint(0, x.numel(), (1,), generator=g))
        x.view(-1)[at] = {"spike": 1e3, "peak": 1e12, "broken": math.nan}.get(kind, -math.inf)
        if kind == "infinite" and x.numel() > 1:
            x.view(-1)[(at + x.numel() // 2) % x.numel()] = math.inf
    return x


def settled(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor | None]:
    """The op's results, if two runs agree bit by bit, whatever the random state, and leave the arguments as they were."""
    given = tensors_in((list(args), dict(kwargs)))
    before = [t.clone() for t in given]
    runs = []
    for seed in (1, 2, 1):
        torch.default_generator.manual_seed(seed)
        runs.append(tensors_of(op(*args, **kwargs)))
        if not all(same(a, b) for a, b in zip(given, before, strict=True)):
            raise NotFound("it changes its arguments")
        if len(runs) == 2 and alike(runs[0], runs[1]):
            return runs[0]
    if alike(runs[0], runs[2]):
        raise NotFound("it draws random numbers", draws=True)
    raise NotFound("two runs on the same arguments differ")


def alike(a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> bool:
    """Bit by bit, NaN equal to NaN."""
    return len(a) == len(b) and all((x is None) == (y is None) and (x is None or same(x, y)) for x, y in zip(a, b, strict=True))


def same(a: torch.Tensor, b: Any) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
