"""Ops that draw random numbers, rewritten before autograd in terms of the counter-based ops of the namespace `autopar`.

Torch draws from a stream, so that a number depends on what was drawn before it and on the device. Here it depends on the
program's seed, the op's salt and the element's place in the global tensor: the same on every mesh, and when computed again.
`TABLE` maps an op to a function that is called in its place with the op's arguments, the source of randomness and the op's salt.
Not here, and so refused: what draws a number of times that depends on the numbers (gamma, Dirichlet, Poisson, binomial); and
`x.random_(low, high)`, which torch itself cannot export: its overload is called `from`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ..ir.errors import CaptureError

_aten = torch.ops.aten
_own = torch.ops.autopar


class Source(Protocol):
    """Where a program's random numbers come from; `seed` is the traced seed."""

    seed: Tensor | None


def draw(kind: str, shape: Sequence[int], dtype: torch.dtype, a: float, b: float, random: Source, salt: int) -> Tensor:
    """`kind` is an op of kernels/random.py; narrow integers and complex numbers are made of what that has."""
    shape = [int(n) for n in shape]
    if dtype.is_complex:
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.view_as_complex(draw(kind, [*shape, 2], real, a, b * math.sqrt(0.5) if kind == "normal" else b, random, salt))
    op = getattr(_own, kind).default
    return op(random.seed, a, b, salt, dtype, shape, shape, [0] * len(shape), shape)


def dropped(x: Tensor, p: float, random: Source, salt: int) -> Tensor:
    """Dropout of x."""
    shape = list(x.shape)
    return _own.dropout.default(x, random.seed, float(p), salt, shape, [0] * len(shape), shape)


def _kept(shape: Sequence[int], dtype: torch.dtype, p: float, random: Source, salt: int) -> Tensor:
    """Ones with probability 1 - p, else zeros."""
    if p >= 1:
        return torch.zeros(list(shape), dtype=dtype)
    return (dropped(torch.ones(list(shape), dtype=dtype), p, random, salt) != 0).to(dtype)


def _channels(x: Tensor) -> list[int]:
    return [*x.shape[:2], *(1 for _ in range(x.dim() - 2))]


def check(node: fx.Node, line: str) -> None:
    """CaptureError for a call that cannot be drawn as one device draws it, before it is traced: the user's line is still known."""
    arguments = [*node.args, *node.kwargs.values()]
    if any(isinstance(a, torch.Generator) for a in arguments) or node.kwargs.get("generator") is not None:
        raise CaptureError(
            "the model draws from a torch.Generator of its own",
            where=line,
            why="every device would have one, and they would not draw what one device draws",
            try_="leave generator= out: torch.manual_seed then governs what is drawn",
        )
    numbers = [a for a in node.args if isinstance(a, int)]
    if str(node.target).startswith(("aten.randint", "aten.random_")) and max(numbers, default=0) - min(0, *numbers, 0) > 2**62:
        raise CaptureError(
            f"{node.target} among more than 2^62 numbers",
            where=line,
            why="62 random bits make one number",
            try_="draw from a smaller range",
        )


# --- tensors from nothing --------------------------------------------------------------------------------------------


def _factory(kind: str, a: float, b: float) -> Callable[..., Tensor]:
    def run(size: Sequence[int], *, random: Source, salt: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(kind, size, dtype or torch.get_default_dtype(), a, b, random, salt)

    return run


def _like(kind: str, a: float, b: float) -> Callable[..., Tensor]:
    def run(x: Tensor, *, random: Source, salt: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(kind, x.shape, dtype or x.dtype, a, b, random, salt)

    return run


def _randint(low: int, high: int, size: Sequence[int], dtype: torch.dtype | None, random: Source, salt: int) -> Tensor:
    return draw("randint", size, dtype or torch.int64, low, high, random, salt)


def randint(high: int, size: Sequence[int], *, random: Source, salt: int, dtype: Any = None, **_: Any) -> Tensor:
    return _randint(0, high, size, dtype, random, salt)


def randint_low(low: int, high: int, size: Sequence[int], *, random: Source, salt: int, dtype: Any = None, **_: Any) -> Tensor:
    return _randint(low, high, size, dtype, random, salt)


def randint_like(x: Tensor, high: int, *, random: Source, salt: int, dtype: Any = None, **_: Any) -> Tensor:
    return _randint(0, high, x.shape, dtype or x.dtype, random, salt)


def randint_like_low(x: Tensor, low: int, high: int, *, random: Source, salt: int, dtype: Any = None, **_: Any) -> Tensor:
    return _randint(low, high, x.shape, dtype or x.dtype, random, salt)


def randperm(n: int, *, random: Source, salt: int, dtype: Any = None, **_: Any) -> Tensor:
    """The order of n numbers of 62 bits. Drawn whole on every device."""
    keys = _randint(0, 2**62, [n], torch.int64, random, salt)
    return torch.sort(keys, stable=True)[1].to(dtype or torch.int64)


# --- distributions with parameters -----------------------------------------------------------------------------------


def bernoulli(x: Tensor, *, random: Source, salt: int, **_: Any) -> Tensor:
    """One with the probability in x, element by element."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (draw("uniform", x.shape, wide.dtype, 0.0, 1.0, random, salt) < wide).to(x.dtype)


def bernoulli_p(x: Tensor, p: float = 0.5, *, random: Source, salt: int, **_: Any) -> Tensor:
    return _kept(x.shape, x.dtype if x.dtype.is_floating_point else torch.float32, 1.0 - p, random, salt).to(x.dtype)


def bernoulli_tensor(x: Tensor, p: Tensor, *, random: Source, salt: int, **_: Any) -> Tensor:
    return bernoulli(p.expand(x.shape), random=random, salt=salt).to(x.dtype)


def normal(
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    size: Sequence[int] | None = None,
    *,
    random: Source,
    salt: int,
    dtype: Any = None,
    **_: Any,
) -> Tensor:
    """torch.normal in all its forms."""
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    if not tensors:
        return draw("normal", size or [], dtype or torch.get_default_dtype(), float(mean), float(std), random, salt)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    kind = tensors[0].dtype if len(tensors) == 1 else torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return draw("normal", shape, kind, 0.0, 1.0, random, salt) * std + mean


def _filling(kind: str, a: float, b: float) -> Callable[..., Tensor]:
    """x with other values, as `x.uniform_(low, high)` has it: x itself is not read."""

    def run(x: Tensor, first: float = a, second: float = b, *, random: Source, salt: int, **_: Any) -> Tensor:
        return draw(kind, x.shape, x.dtype, float(first), float(second), random, salt)

    return run


def exponential(x: Tensor, lambd: float = 1.0, *, random: Source, salt: int, **_: Any) -> Tensor:
    return draw("exponential", x.shape, x.dtype, float(lambd), 0.0, random, salt)


def geometric(x: Tensor, p: float, *, random: Source, salt: int, **_: Any) -> Tensor:
    """How many trials until the first success, one or more: an exponential of rate -ln(1 - p), rounded up."""
    kind = x.dtype if x.dtype == torch.float64 else torch.float32
    if p >= 1:
        return torch.ones_like(x)
    return draw("exponential", x.shape, kind, -math.log1p(-p), 0.0, random, salt).ceil().clamp_min(1).to(x.dtype)


def log_normal(x: Tensor, mean: float = 1.0, std: float = 2.0, *, random: Source, salt: int, **_: Any) -> Tensor:
    return draw("normal", x.shape, x.dtype, mean, std, random, salt).exp()


def cauchy(x: Tensor, median: float = 0.0, sigma: float = 1.0, *, random: Source, salt: int, **_: Any) -> Tensor:
    wide = draw("uniform", x.shape, torch.float64, -0.5, 0.5, random, salt)
    return (torch.tan(wide * math.pi) * sigma + median).to(x.dtype)


def random_from(x: Tensor, low: int, high: int | None, *, random: Source, salt: int, **_: Any) -> Tensor:
    if high is None:
        digits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.bool: 1}
        high = 2 ** digits[x.dtype] + 1 if x.dtype in digits and x.dtype != torch.bool else 2 if x.dtype == torch.bool else None
    if high is None:
        high = min(torch.iinfo(x.dtype).max, 2**62 - 1) + 1
    return _randint(low, high, x.shape, x.dtype, random, salt)


def random_to(x: Tensor, high: int, *, random: Source, salt: int, **_: Any) -> Tensor:
    return random_from(x, 0, high, random=random, salt=salt)


def random_any(x: Tensor, *, random: Source, salt: int, **_: Any) -> Tensor:
    return random_from(x, 0, None, random=random, salt=salt)


def multinomial(x: Tensor, num_samples: int, replacement: bool = False, *, random: Source, salt: int, **_: Any) -> Tensor:
    """Classes (last dim) by weight. Without replacement, or one alone: the largest of weight / exponential (a race of exponential
    clocks, as torch does it); with it: where a uniform number falls among the running sums."""
    if num_samples == 1 or not replacement:
        kind = x.dtype if x.dtype in (torch.float64, torch.float32) else torch.float32
        race = x.to(kind) / draw("exponential", x.shape, kind, 1.0, 0.0, random, salt)
        return race.argmax(-1, keepdim=True) if num_samples == 1 else race.topk(num_samples, -1)[1]
    sums = x.double().cumsum(-1)
    spots = draw("uniform", [*x.shape[:-1], num_samples], torch.float64, 0.0, 1.0, random, salt) * sums[..., -1:]
    return torch.searchsorted(sums, spots, right=True).clamp_max(x.shape[-1] - 1)


# --- dropout and its relatives ---------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, train: bool, *, random: Source, salt: int) -> Tensor:
    return dropped(x, p, random, salt) if train and p > 0 else x


def dropout_add(x: Tensor, residual: Tensor, p: float, *, random: Source, salt: int) -> Tensor:
    """Dropout of x, plus residual: one op, which the fusion pass puts in place of both."""
    shape = list(x.shape)
    return _own.dropout_add.default(x, residual, random.seed, p, salt, shape, [0] * len(shape), shape)


def feature_dropout(x: Tensor, p: float, train: bool, *, random: Source, salt: int) -> Tensor:
    """Whole channels are dropped: dropout of ones [n, c, 1, ...], times x."""
    return x * dropped(x.new_ones(_channels(x)), p, random, salt) if train and p > 0 else x


def _alpha(shape: Callable[[Tensor], Sequence[int]]) -> Callable[..., Tensor]:
    """Dropout that keeps mean and variance of SELU's results (Klambauer et al., arXiv:1706.02515): what is dropped becomes -1.758."""

    def run(x: Tensor, p: float, train: bool, *, random: Source, salt: int) -> Tensor:
        if not train or p == 0:
            return x
        if p == 1:
            return x * 0
        alpha = 1.7580993408473766
        scale = 1.0 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
        keep = _kept(shape(x), x.dtype, p, random, salt)
        return x * (keep * scale) + ((keep - 1) * (alpha * scale) + alpha * scale * p)

    return run


def native_dropout(x: Tensor, p: float, train: bool | None = True, *, random: Source, salt: int) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = _kept(x.shape, x.dtype, p, random, salt)
    return x * keep * (1.0 / (1.0 - p) if p < 1 else 0.0), keep != 0


def rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *, random: Source, salt: int, **_: Any) -> Tensor:
    slope: Tensor | float = draw("uniform", x.shape, x.dtype, float(lower), float(upper), random, salt) if training else (lower + upper) / 2
    return torch.where(x <= 0, x * slope, x)


# --- recurrent layers that drop between them -------------------------------------------------------------------------


def _by_layer(op: Any, states: int) -> Callable[..., tuple[Tensor, ...]]:
    """A recurrent net layer by layer, with dropout between them; `states` are what a layer carries: h alone, or h and c."""

    def run(
        x: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        biases: bool,
        layers: int,
        p: float,
        train: bool,
        both_ways: bool,
        batch_first: bool,
        *,
        random: Source,
        salt: int,
    ) -> tuple[Tensor, ...]:
        if not train or p == 0 or layers == 1:
            return op(x, hx, params, biases, layers, 0.0, False, both_ways, batch_first)
        ways, each = 2 if both_ways else 1, len(params) // layers
        begin = list(hx) if states == 2 else [hx]
        ends: list[list[Tensor]] = [[] for _ in range(states)]
        for i in range(layers):
            start = [h[i * ways : (i + 1) * ways] for h in begin]
            weights = list(params[i * each : (i + 1) * each])
            x, *last = op(x, start if states == 2 else start[0], weights, biases, 1, 0.0, False, both_ways, batch_first)
            for found, h in zip(ends, last, strict=True):
                found.append(h)
            if i < layers - 1:
                x = dropped(x, p, random, salt + i)
        return (x, *(torch.cat(found) for found in ends))

    return run


def width(node: fx.Node) -> int:
    """How many salts a node takes: one for each tensor that it draws."""
    return max(1, int(node.args[4]) - 1) if node.target in _LAYERED and len(node.args) > 4 else 1  # type: ignore[arg-type,call-overload]


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(function(x, *args, **kwargs))

    return run


_LAYERED: dict[Any, Callable[..., Any]] = {
    _aten.lstm.input: _by_layer(_aten.lstm.input, 2),
    _aten.gru.input: _by_layer(_aten.gru.input, 1),
    _aten.rnn_tanh.input: _by_layer(_aten.rnn_tanh.input, 1),
    _aten.rnn_relu.input: _by_layer(_aten.rnn_relu.input, 1),
}
_UNIFORM, _NORMAL = _filling("uniform", 0.0, 1.0), _filling("normal", 0.0, 1.0)
_ALPHA, _FEATURE_ALPHA = _alpha(lambda x: x.shape), _alpha(_channels)

TABLE: dict[Any, Callable[..., Any]] = {
    _aten.rand.default: _factory("uniform", 0.0, 1.0),
    _aten.rand.generator: _factory("uniform", 0.0, 1.0),
    _aten.randn.default: _factory("normal", 0.0, 1.0),
    _aten.randn.generator: _factory("normal", 0.0, 1.0),
    _aten.rand_like.default: _like("uniform", 0.0, 1.0),
    _aten.randn_like.default: _like("normal", 0.0, 1.0),
    _aten.randint.default: randint,
    _aten.randint.generator: randint,
    _aten.randint.low: randint_low,
    _aten.randint.low_generator: randint_low,
    _aten.randint_like.default: randint_like,
    _aten.randint_like.low_dtype: randint_like_low,
    _aten.randperm.default: randperm,
    _aten.randperm.generator: randperm,
    _aten.bernoulli.default: bernoulli,
    _aten.bernoulli.p: bernoulli_p,
    _aten.bernoulli.Tensor: bernoulli_tensor,
    _aten.bernoulli_.float: _in_place(bernoulli_p),
    _aten.bernoulli_.Tensor: _in_place(bernoulli_tensor),
    _aten.normal.Tensor_Tensor: normal,
    _aten.normal.Tensor_float: normal,
    _aten.normal.float_Tensor: normal,
    _aten.normal.float_float: normal,
    _aten.normal_functional.default: _NORMAL,
    _aten.normal_.default: _in_place(_NORMAL),
    _aten.uniform.default: _UNIFORM,
    _aten.uniform_.default: _in_place(_UNIFORM),
    _aten.exponential.default: exponential,
    _aten.exponential_.default: _in_place(exponential),
    _aten.geometric.default: geometric,
    _aten.geometric_.default: _in_place(geometric),
    _aten.log_normal.default: log_normal,
    _aten.log_normal_.default: _in_place(log_normal),
    _aten.cauchy.default: cauchy,
    _aten.cauchy_.default: _in_place(cauchy),
    _aten.random_.default: _in_place(random_any),
    _aten.random_.to: _in_place(random_to),
    _aten.multinomial.default: multinomial,
    _aten.dropout.default: dropout,
    _aten.dropout_.default: _in_place(dropout),
    dropout_add: dropout_add,
    _aten.feature_dropout.default: feature_dropout,
    _aten.feature_dropout_.default: _in_place(feature_dropout),
    _aten.alpha_dropout.default: _ALPHA,
    _aten.alpha_dropout_.default: _in_place(_ALPHA),
    _aten.feature_alpha_dropout.default: _FEATURE_ALPHA,
    _aten.feature_alpha_dropout_.default: _in_place(_FEATURE_ALPHA),
    _aten.native_dropout.default: native_dropout,
    _aten.rrelu.default: rrelu,
    _aten.rrelu_.default: _in_place(rrelu),
    **_LAYERED,
}
