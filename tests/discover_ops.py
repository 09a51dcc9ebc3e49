"""Custom ops for the tests of discovery: honest ones with the rule that must be found, and ones that only look splittable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from netmind_autopar.rules.call import Call
from netmind_autopar.rules.prove import put_tensors

HONEST: list[tuple[Any, str, tuple[Any, ...]]] = []  # (op, rule that must be found, arguments)
FALSE: list[tuple[Any, str, tuple[Any, ...]]] = []  # (op, the most that may be found, arguments)


def F(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def I(*shape: int) -> Tensor:  # noqa: E743
    return F(*shape, dtype=torch.int64)


def op(function: Callable[..., Any], namespace: str = "probe") -> Any:
    """A custom op of a function; its fake is the function itself on meta tensors."""
    made = torch.library.custom_op(f"{namespace}::{function.__name__.strip('_')}", function, mutates_args=())
    made.register_fake(function)
    return getattr(getattr(torch.ops, namespace), function.__name__.strip("_")).default


def call_of_op(target: Any, args: tuple[Any, ...]) -> Call:
    """The call with the shapes of its results, as a program has it."""
    made = target(*put_tensors(args, {}, [t.to("meta") for t in _flat(args)])[0])
    return Call(target, args, {}, tuple(made) if isinstance(made, (tuple, list)) else (made,))


def _flat(args: Any) -> list[Tensor]:
    return [t for a in args for t in ([a] if isinstance(a, Tensor) else _flat(a) if isinstance(a, (list, tuple)) else [])]


def honest(rule: str, *args: Any) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        HONEST.append((op(function), rule, args))
        return function

    return register


def false(most: str, *args: Any) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        FALSE.append((op(function), most, args))
        return function

    return register


# In expected rules a letter that is never split is just "!"; it may be called anything.

# --- honest ops -------------------------------------------------------------------------------------------------------------


@honest("a b !, *! -> a b !", F(8, 128, 512), F(512))
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@honest("*a b !, a b !, ! -> a b !, !", F(8, 128, 512), F(8, 128, 512), F(512))
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    g = grad * weight
    return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), (grad * x * r).sum((0, 1))


@honest("+a b -> a b", F(64, 4096))
def double(x: Tensor) -> Tensor:
    return 2 * x


@honest("a b, *a b -> a b", F(64, 4096), F(64, 4096))
def swiglu(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * y


@honest("a b, b, a 1 -> a b", F(64, 4096), F(4096), F(64, 1))
def broadcast(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(x * w) + s.exp()


@honest("*a b, *b c -> a c", F(64, 512), F(512, 1024))
def matmul(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


@honest("a b, c b, +c -> a c", F(64, 512), F(1024, 512), F(1024))
def affine(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x @ w.T + bias


@honest("a b c !, a b ! !, *a b ! f -> a b c f", F(2, 8, 128, 64), F(2, 8, 128, 64), F(2, 8, 128, 64))
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


@honest("a (b c) d !, a b ! !, *a b ! g -> a (b c) d g", F(2, 8, 128, 64), F(2, 2, 128, 64), F(2, 2, 128, 64))
def grouped_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


@honest("a b (c !), a ! (c !), *a ! (c d) -> a b (c d)", F(2, 128, 512), F(2, 128, 512), F(2, 128, 512), 8)
def fused_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    def split(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    out = torch.softmax(split(q) @ split(k).transpose(-1, -2), -1) @ split(v)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)


@honest("a b -> a", F(64, 4096))
def sum_of_squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


@honest("a b -> a ; max", F(64, 4096))
def largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1)


@honest("a b -> ", F(64, 4096))
def energy(x: Tensor) -> Tensor:
    return x.pow(4).sum()


@honest("*a b, a -> ! b", F(4096, 64), I(4096), 32)
def segment_sum(x: Tensor, ids: Tensor, segments: int) -> Tensor:
    return x.new_zeros(segments, x.shape[1]).index_add(0, ids, x)


@honest("*! b, c d -> c d b", F(5000, 64), I(16, 32))
def lookup(table: Tensor, ids: Tensor) -> Tensor:
    return table[ids]


@honest("+a b c -> (a b) c", F(8, 128, 64))
def flattened(x: Tensor) -> Tensor:
    return x.flatten(0, 1) * 2


# the dims of 32 and 16 are opened alike: d is 8 or 16 long, whichever factor was found first
@honest("*a b c (! d), c (! d), c (! d) -> a b c (! d)", F(2, 8, 64, 32), F(64, 16), F(64, 16))
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@honest("*a b c d, *a b e f -> a c e d f", F(2, 8, 16, 4), F(2, 8, 16, 4))
def outer(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bsic,bsjd->bijcd", x, y)


@honest("*a b c !, *d b ! -> a d c !", F(2, 16, 8, 128), F(32, 16, 3))
def rowwise_convolution(x: Tensor, w: Tensor) -> Tensor:
    out = torch.nn.functional.conv1d(x.transpose(1, 2).flatten(0, 1), w, padding=1)
    return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2).clone()


@honest("*a ! b, b -> a ! b", F(8, 50, 16), F(16))
def scan(x: Tensor, decay: Tensor) -> Tensor:
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = state * decay + x[:, t]
        out.append(state)
    return torch.stack(out, 1)


@honest("+a b -> (! a) b", F(64, 32))
def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x], 0)


@honest("a !, a -> a", F(64, 1000), I(64))
def row_losses(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


@honest("+a b -> b a", F(64, 4096))
def turned(x: Tensor) -> Tensor:
    return x.T * 3


@honest("+! b c -> ! b c", F(128, 8, 64))
def running(x: Tensor) -> Tensor:
    return x.cumsum(0)


@honest("a b, c b -> a c", F(64, 16), F(48, 16))
def distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(-1)


@honest("+a -> a b", F(64), 256)
def spread(x: Tensor, n: int) -> Tensor:
    return x[:, None].expand(-1, n).clone()


@honest("+a b -> a b", F(64, 32), [64, 32])
def shaped(x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(shape) * 2


@honest("a b -> a b", F(64, 64))
def square(x: Tensor) -> Tensor:
    return x.exp()


@honest("a ! -> a !, a !", F(64, 32))
def top_four(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.softmax(-1), x.topk(4).values


@honest("a b, a b -> ", [F(32, 64), F(32, 64)])
def total(xs: list[Tensor]) -> Tensor:
    return sum((x.exp().sum() for x in xs), start=xs[0].new_zeros(()))


@honest("a b -> a", F(64, 128))
def count_large(x: Tensor) -> Tensor:
    return (x > 0.5).sum(-1)


@honest("*! b c, ! -> b c", F(3, 64, 32), F(3))
def mix(x: Tensor, w: Tensor) -> Tensor:
    return torch.tensordot(w.softmax(0), x, 1)


# --- ops that only look splittable --------------------------------------------------------------------------------------------


@false("a ! -> a !", F(64, 64))
def positive_rows(x: Tensor) -> Tensor:  # every column alike while all numbers are positive
    return x * (1 + torch.relu(-x).sum(1, keepdim=True))


@false("! ! -> ! !", F(64, 32))
def rare_maximum(x: Tensor) -> Tensor:  # a clip by the global maximum that is seldom reached
    top = x.abs().max()
    return torch.where(top > 50.0, x / top, x)


@false("! ! -> ! !", F(64, 32))
def rarer_maximum(x: Tensor) -> Tensor:
    top = x.abs().max()
    return torch.where(top > 1e9, x * 0.5, x)


@false("a b -> a b", F(64, 32))
def clipped(x: Tensor) -> Tensor:  # linear below 100
    return x.clamp(-100, 100)


@false("a b -> a b", F(64, 32))
def dead_zone(x: Tensor) -> Tensor:  # linear above 1e-6
    return torch.where(x.abs() > 1e-6, x, 0.0)


@false("a b -> a b", F(64, 32))
def nearly_linear(x: Tensor) -> Tensor:
    return x + 1e-9 * x * x.abs()


@false("! b -> ! b", F(64, 32))
def batch_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


@false("! b -> ! b", F(64, 32))
def nearly_rowwise(x: Tensor) -> Tensor:
    return x.tanh() + 1e-6 * x.mean(0).tanh()


@false("! ! -> ! !", F(64, 32))
def dropout_seldom(x: Tensor) -> Tensor:
    return x * (torch.rand(x.shape, device=x.device) > 0.01)


class _State:
    calls = 0


@false("! ! -> ! !", F(64, 32))
def counting(x: Tensor) -> Tensor:
    _State.calls += x.device.type == "cpu"
    return x * (1.0 + _State.calls)


@false("! ! -> ! !", F(64, 32))
def counting_slowly(x: Tensor) -> Tensor:
    _State.calls += x.device.type == "cpu"
    return x * (1.0 + _State.calls // 97)


@false("! b -> ! b", F(64, 32))
def positions(x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0], device=x.device)[:, None]


@false("+! b -> ! b", F(640, 32))
def far_positions(x: Tensor) -> Tensor:  # rows beyond the 500th are others; linear, so terms do add up
    return torch.where((torch.arange(x.shape[0], device=x.device) >= 500)[:, None], 2 * x, x)


@false("+! b -> ! b", F(64, 32))
def large_batches(x: Tensor) -> Tensor:
    return x - x.mean(0) if x.shape[0] >= 32 else x * 1.0


@false("+! ! -> ! !", F(64, 64))
def large_calls(x: Tensor) -> Tensor:
    return x - x.mean() if x.numel() >= 4096 else x * 1.0


@false("! b -> ! b", F(64, 32))
def small_batches(x: Tensor) -> Tensor:
    return x.exp() if x.shape[0] > 3 else x


@false("! b -> ! b", F(64, 32))
def even_batches(x: Tensor) -> Tensor:
    return x.exp() if x.shape[0] % 2 == 0 else x


@false("! ! -> ! !", F(64, 32))
def without_twins(x: Tensor) -> Tensor:  # rows that occur twice count half
    alike = (x[:, None] == x[None]).all(-1).sum(-1)
    return x / alike[:, None]


@false("! ! -> ! !", F(64, 32))
def all_or_nothing(x: Tensor) -> Tensor:  # one NaN spoils all
    return torch.where(x.isnan().any(), torch.zeros_like(x), x)


@false("! ! -> ! !", F(64, 32))
def all_or_infinite(x: Tensor) -> Tensor:
    return torch.where(x.isinf().any(), torch.zeros_like(x), x)


@false("! ! -> ! !", F(64, 32))
def beyond_three(x: Tensor) -> Tensor:
    return torch.where((x > 3.5).any(), x * 2, x)


@false("! b -> ! b", F(64, 32))
def equal_neighbours(x: Tensor) -> Tensor:
    return torch.where(x == x.roll(1, 0), x * 2, x)


@false("! b -> ! b", F(64, 32))
def last_row(x: Tensor) -> Tensor:
    return (x - x[-1:]).tanh()


@false("+! b -> ! b", F(7, 32))
def seven_rows(x: Tensor) -> Tensor:  # at the program's own size, and at no other
    return x * (2.0 if x.shape[0] == 7 else 1.0)


@false("! ! -> ! !", F(64, 32))
def changes_argument(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        x.add_(1)
    return x * 2


@false("! b -> ! b", F(64, 32))
def cumulative(x: Tensor) -> Tensor:
    return x.cumsum(0).tanh()


@false("! -> !", F(64))
def sorted_(x: Tensor) -> Tensor:
    return x.sort().values


@false("! a, b -> b a", F(64, 32), I(64))
def wrapped_lookup(x: Tensor, ids: Tensor) -> Tensor:
    return x[ids % x.shape[0]].tanh()


@false("! b -> b", F(64, 32))
def mean_of_rows(x: Tensor) -> Tensor:  # neither a sum nor a maximum of pieces
    return x.mean(0).tanh()


@false("! -> ", F(64))
def norm_(x: Tensor) -> Tensor:
    return x.norm()


@false("! b -> b", F(64, 32))
def any_large(x: Tensor) -> Tensor:  # truth values do not add up
    return (x > 1.5).any(0)


@false("a !, ! -> a", F(64, 32), F(32))
def saturated_dot(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).clamp(-1e6, 1e6)
