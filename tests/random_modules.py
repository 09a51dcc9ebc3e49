"""Small random modules, each drawn from a seed: a pool of tensors that random ops extend, and losses at the end.

Every op is a function `(draw, x) -> step or None`; it may add modules and parameters to the model and reads x's shape, and the
step `(model, x) -> tensor` runs in forward. Sizes are small and often 1, odd or prime, so that few of them divide a mesh.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[nn.Module, Tensor], Tensor]
LARGEST = 1500  # elements of a tensor in the pool
APART = 1e-6  # ops that jump or choose are only used where rounding cannot decide


class Draw:
    """Random choices, and the model under construction."""

    def __init__(self, seed: int, model: RandomModule) -> None:
        self.random, self.model = random.Random(seed), model
        self.pool: list[Tensor] = []

    def size(self) -> int:
        return self.random.choice((1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8))

    def shape(self, rank: int) -> list[int]:
        return [self.size() for _ in range(rank)]

    def dim(self, x: Tensor, *, negative: bool = True) -> int:
        d = self.random.randrange(x.dim())
        return d - x.dim() if negative and self.random.random() < 0.5 else d

    def some(self, x: Tensor) -> list[int]:
        return sorted(self.random.sample(range(x.dim()), self.random.randint(1, x.dim())))

    def add(self, module: nn.Module) -> int:
        """A layer's number: a new one, or now and then one that has the same form already (shared weights)."""
        alike = [i for i, old in enumerate(self.model.layers) if repr(old) == repr(module)]
        if alike and self.random.random() < 0.5:
            return self.random.choice(alike)
        if self.random.random() < 0.15:
            for p in module.parameters():
                p.requires_grad_(False)
        self.model.layers.append(module)
        return len(self.model.layers) - 1

    def parameter(self, shape: list[int]) -> int:
        alike = [i for i, old in enumerate(self.model.free) if list(old.shape) == shape]
        if alike and self.random.random() < 0.4:
            return self.random.choice(alike)
        self.model.free.append(nn.Parameter(torch.randn(shape), requires_grad=self.random.random() > 0.1))
        return len(self.model.free) - 1

    def broadcast(self, x: Tensor) -> list[int]:
        """A shape that broadcasts to x's."""
        shape = [1 if self.random.random() < 0.35 else n for n in x.shape]
        return shape[self.random.randint(0, max(len(shape) - 1, 0)) :]

    def factors(self, n: int) -> list[int]:
        """n as a product, in random order."""
        out = []
        while n > 1:
            f = self.random.choice([k for k in range(2, n + 1) if n % k == 0])
            out.append(f)
            n //= f
        if self.random.random() < 0.2:
            out.insert(self.random.randint(0, len(out)), 1)
        return out or [1]


def apart(x: Tensor) -> bool:
    """No two elements are nearly equal, none is nearly zero."""
    flat = torch.cat([x.detach().flatten(), x.new_zeros(1)]).sort().values
    return bool((flat.diff() > APART).all())


# layers


def linear(g: Draw, x: Tensor) -> Step:
    i = g.add(nn.Linear(x.shape[-1], g.size(), bias=g.random.random() < 0.7))
    return lambda m, v: m.layers[i](v)


def square(g: Draw, x: Tensor) -> Step:
    i = g.add(nn.Linear(x.shape[-1], x.shape[-1]))
    return lambda m, v: v + m.layers[i](torch.tanh(m.layers[i](v)))


def layer_norm(g: Draw, x: Tensor) -> Step | None:
    if x.shape[-1] == 1:
        return None
    count = 1 if x.dim() < 2 or g.random.random() < 0.7 else 2
    i = g.add(nn.LayerNorm(x.shape[-count:], elementwise_affine=g.random.random() < 0.8))
    return lambda m, v: m.layers[i](v)


def rms_norm(g: Draw, x: Tensor) -> Step:
    i = g.add(nn.RMSNorm(x.shape[-1], eps=1e-3))
    return lambda m, v: m.layers[i](v)


def batch_norm(g: Draw, x: Tensor) -> Step | None:
    if x.dim() not in (2, 3, 4) or x.numel() // x.shape[1] < 3:
        return None
    make = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()]
    i = g.add(make(x.shape[1], affine=g.random.random() < 0.8, track_running_stats=g.random.random() < 0.8))
    return lambda m, v: m.layers[i](v)


def group_norm(g: Draw, x: Tensor) -> Step | None:
    if x.dim() < 3 or x[0].numel() < 4:
        return None
    groups = g.random.choice([k for k in range(1, x.shape[1] + 1) if x.shape[1] % k == 0])
    if x[0].numel() // groups < 2:
        return None
    i = g.add(nn.GroupNorm(groups, x.shape[1]))
    return lambda m, v: m.layers[i](v)


def conv(g: Draw, x: Tensor) -> Step | None:
    if x.dim() not in (3, 4):
        return None
    make, flipped = (nn.Conv1d, nn.ConvTranspose1d) if x.dim() == 3 else (nn.Conv2d, nn.ConvTranspose2d)
    groups = g.random.choice([k for k in range(1, x.shape[1] + 1) if x.shape[1] % k == 0])
    make = flipped if g.random.random() < 0.25 else make
    out, kernel = groups * g.random.randint(1, 3), g.random.choice((1, 3))
    i = g.add(
        make(x.shape[1], out, kernel, stride=g.random.choice((1, 1, 2)), padding=kernel // 2, groups=groups, bias=g.random.random() < 0.6)
    )
    return lambda m, v: m.layers[i](v)


def attention(g: Draw, x: Tensor) -> Step | None:
    """Heads from a reshape, grouped or not, causal or masked by data or a learned bias."""
    if x.dim() != 3 or x.shape[-1] < 2:
        return None
    kv, times, d = g.random.choice((1, 2, 3)), g.random.choice((1, 1, 2)), g.random.choice((2, 3, 4))
    q, k, out = (
        g.add(nn.Linear(a, b)) for a, b in ((x.shape[-1], kv * times * d), (x.shape[-1], 2 * kv * d), (kv * times * d, x.shape[-1]))
    )
    how, bias = g.random.choice(("none", "causal", "mask", "bias")), -1
    seq = x.shape[1]
    if how == "bias":
        bias = g.parameter([seq, seq])

    def run(m: nn.Module, v: Tensor) -> Tensor:
        qs = m.layers[q](v).view(*v.shape[:2], kv * times, d).transpose(1, 2)
        ks, vs = m.layers[k](v).view(*v.shape[:2], 2, kv, d).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if how == "mask":
            mask = (torch.arange(seq)[:, None] - torch.arange(seq)[None]).abs() < 1 + seq // 2
        elif how == "bias":
            mask = m.free[bias]
        y = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=how == "causal", enable_gqa=times > 1)
        return v + m.layers[out](y.transpose(1, 2).flatten(2))

    return run


def multihead(g: Draw, x: Tensor) -> Step | None:
    if x.dim() != 3 or x.shape[-1] % 2:
        return None
    i = g.add(nn.MultiheadAttention(x.shape[-1], 2, batch_first=g.random.random() < 0.5))
    return lambda m, v: m.layers[i](v, v, v, need_weights=False)[0]


def written_attention(g: Draw, x: Tensor) -> Step | None:
    if x.dim() < 2:
        return None
    return lambda m, v: torch.softmax(v @ v.transpose(-1, -2) / v.shape[-1], -1) @ v


def embedding(g: Draw, x: Tensor) -> Step:
    rows = g.random.choice((5, 7, 8))
    i = g.add(nn.Embedding(rows, g.size(), padding_idx=g.random.choice((None, 0)), scale_grad_by_freq=g.random.random() < 0.2))
    shape = g.model.ids.shape
    return lambda m, v: m.layers[i](m.ids % rows) + v.mean() if len(shape) else v


# shapes


def reshape(g: Draw, x: Tensor) -> Step:
    shape = g.factors(x.numel())
    return lambda m, v: v.reshape(shape)


def flatten(g: Draw, x: Tensor) -> Step | None:
    if x.dim() < 2:
        return None
    a = g.random.randrange(x.dim() - 1)
    b = g.random.randrange(a + 1, x.dim())
    return lambda m, v: v.flatten(a, b)


def unflatten(g: Draw, x: Tensor) -> Step:
    d = g.dim(x, negative=False)
    parts = g.factors(x.shape[d])
    return lambda m, v: v.unflatten(d, parts)


def permute(g: Draw, x: Tensor) -> Step:
    order = g.random.sample(range(x.dim()), x.dim())
    return lambda m, v: v.permute(order)


def regroup(g: Draw, x: Tensor) -> Step:
    """Open a dim up, permute, close it again: a channel shuffle."""
    d = g.dim(x, negative=False)
    parts = g.factors(x.shape[d])
    order = list(range(d)) + g.random.sample(range(d, d + len(parts)), len(parts)) + list(range(d + len(parts), x.dim() + len(parts) - 1))
    return lambda m, v: v.unflatten(d, parts).permute(order).reshape(v.shape)


def unsqueeze(g: Draw, x: Tensor) -> Step:
    d = g.random.randint(-x.dim() - 1, x.dim())
    return lambda m, v: v.unsqueeze(d)


def squeeze(g: Draw, x: Tensor) -> Step | None:
    if g.random.random() < 0.5:
        d = g.dim(x)
        return lambda m, v: v.squeeze(d)
    return (lambda m, v: v.squeeze()) if x.numel() > 1 else None


def expand(g: Draw, x: Tensor) -> Step:
    n = g.random.choice((2, 3, 4))
    shape = [n if k == 1 else k for k in x.shape]
    lead = [g.random.choice((2, 5))] if g.random.random() < 0.3 else []
    return lambda m, v: v.expand(*lead, *shape)


def repeat(g: Draw, x: Tensor) -> Step:
    times = [g.random.choice((1, 1, 2, 3)) for _ in x.shape]
    return (lambda m, v: v.repeat(times)) if g.random.random() < 0.6 else (lambda m, v: v.repeat_interleave(2, -1))


def take_slice(g: Draw, x: Tensor) -> Step | None:
    d = g.dim(x)
    n = x.shape[d]
    if n < 2:
        return None
    start, step = g.random.randrange(n - 1), g.random.choice((1, 1, 2))
    end = g.random.randint(start + 1, n)
    index = [slice(None)] * x.dim()
    index[d] = slice(start - n if g.random.random() < 0.3 else start, end, step)
    return lambda m, v: v[tuple(index)]


def select(g: Draw, x: Tensor) -> Step:
    d = g.dim(x)
    i = g.random.randrange(x.shape[d])
    return lambda m, v: v.select(d, i)


def pick(g: Draw, x: Tensor) -> Step:
    """Indexing by constant tensors, duplicates included."""
    d = g.dim(x, negative=False)
    index = torch.tensor([g.random.randrange(x.shape[d]) for _ in range(g.random.randint(1, 6))])
    how = g.random.choice(("index", "index_select", "gather", "two"))
    if how == "index_select":
        return lambda m, v: v.index_select(d, index)
    if how == "gather":
        wide = index.reshape([-1 if k == d else 1 for k in range(x.dim())]).expand(
            [len(index) if k == d else n for k, n in enumerate(x.shape)]
        )
        return lambda m, v: torch.gather(v, d, wide)
    if how == "two" and x.dim() > 1:
        other = torch.tensor([g.random.randrange(x.shape[-1]) for _ in range(len(index))])
        first = torch.tensor([g.random.randrange(x.shape[0]) for _ in range(len(index))])
        return lambda m, v: v[first, ..., other]
    places = (slice(None),) * d
    return lambda m, v: v[(*places, index)]


def put(g: Draw, x: Tensor) -> Step:
    """Writing at constant places: index_put, scatter_add, index_add, copies into slices."""
    d = g.dim(x, negative=False)
    index = torch.tensor(g.random.sample(range(x.shape[d]), g.random.randint(1, x.shape[d])))
    how, places = g.random.choice(("assign", "add", "index_add", "slice", "scatter")), (slice(None),) * d

    def run(m: nn.Module, v: Tensor) -> Tensor:
        y = v.clone()
        if how == "assign":
            y[(*places, index)] = v[(*places, index)].sin()
        elif how == "add":
            y[(*places, index)] += 0.5
        elif how == "index_add":
            y = y.index_add(d, index, v.index_select(d, index).cos())
        elif how == "slice":
            y.narrow(d, 0, 1).mul_(2.0)
        else:
            wide = index.reshape([-1 if k == d else 1 for k in range(v.dim())])
            wide = wide.expand([len(index) if k == d else n for k, n in enumerate(v.shape)])
            y = y.scatter_add(d, wide, v.narrow(d, 0, len(index)))
        return y

    return run


def split(g: Draw, x: Tensor) -> Step:
    d = g.dim(x)
    n = g.random.randint(1, x.shape[d])
    by_chunks, at = g.random.random() < 0.5, g.random.random()

    def run(m: nn.Module, v: Tensor) -> Tensor:
        pieces = v.chunk(n, d) if by_chunks else v.split(n, d)
        keep = pieces[int(at * len(pieces))]
        return torch.cat([p.sin() for p in reversed(pieces)], d) if at < 0.5 else keep

    return run


def pad(g: Draw, x: Tensor) -> Step:
    d = g.random.randint(1, min(2, x.dim()))
    sizes = [g.random.choice((0, 0, 1, 2)) for _ in range(2 * d)]
    value = g.random.choice((0.0, 0.7))
    return lambda m, v: F.pad(v, sizes, value=value)


def roll(g: Draw, x: Tensor) -> Step:
    d, n = g.dim(x, negative=False), g.random.randint(-2, 2)
    return (lambda m, v: v.roll(n, d)) if g.random.random() < 0.5 else (lambda m, v: v.flip(d))


# arithmetic


def pointwise(g: Draw, x: Tensor) -> Step:
    f: Any = g.random.choice((torch.sin, torch.tanh, torch.sigmoid, F.gelu, F.silu, F.softplus, torch.neg, torch.square, F.elu, torch.atan))
    return lambda m, v: f(v)


def jump(g: Draw, x: Tensor) -> Step | None:
    if not apart(x):
        return None
    f: Any = g.random.choice((F.relu, torch.abs, F.leaky_relu, lambda v: v.clamp(min=0), lambda v: v.clamp_max(0.0), F.hardtanh))
    return lambda m, v: f(v)


def scalars(g: Draw, x: Tensor) -> Step:
    a, b = g.random.choice((0.5, 2, -1.5)), g.random.choice((0.1, 1))
    return g.random.choice((lambda m, v: v * a + b, lambda m, v: b - v / a, lambda m, v: torch.lerp(v, v.sin(), 0.3)))


def free(g: Draw, x: Tensor) -> Step:
    i, how = g.parameter(g.broadcast(x)), g.random.choice(("add", "mul", "sub", "div", "outer"))

    def run(m: nn.Module, v: Tensor) -> Tensor:
        p = m.free[i]
        return {"add": v + p, "mul": v * p, "sub": p - v, "div": v / (p * p + 1), "outer": v + p * p.sum()}[how]

    return run


def softmax(g: Draw, x: Tensor) -> Step:
    d = g.dim(x)
    f: Any = g.random.choice((torch.softmax, torch.log_softmax, torch.logsumexp, F.normalize))
    return (lambda m, v: F.normalize(v + 2.0, dim=d)) if f is F.normalize else lambda m, v: f(v, d)


def where(g: Draw, x: Tensor) -> Step:
    shape = g.broadcast(x)
    mask = torch.tensor([g.random.random() < 0.5 for _ in range(torch.Size(shape).numel())]).reshape(shape)
    how, value = g.random.choice(("where", "fill", "zero", "number", "tril")), g.random.choice((0.0, -1.0))
    if how == "tril" and x.dim() >= 2:
        return lambda m, v: v.tril(g_diagonal)
    table: dict[str, Step] = {
        "where": lambda m, v: torch.where(mask, v.sin(), v),
        "fill": lambda m, v: v.masked_fill(mask, value),
        "zero": lambda m, v: v * mask,
    }
    return table.get(how, lambda m, v: torch.where(mask, v, value))


g_diagonal = 0


def cast(g: Draw, x: Tensor) -> Step:
    return g.random.choice((lambda m, v: v * (v.detach() > -100).to(v.dtype), lambda m, v: v + v.numel() / 100, lambda m, v: v.double()))


def reduction(g: Draw, x: Tensor) -> Step | None:
    dims, keep = g.some(x), g.random.random() < 0.5
    how = g.random.choice(("sum", "mean", "var", "std", "amax", "amin", "max", "norm", "sum", "mean"))
    count = torch.Size([x.shape[d] for d in dims]).numel()
    if (how in ("var", "std") and count < 2) or (how in ("amax", "amin", "max") and not apart(x)):
        return None
    table: dict[str, Step] = {
        "sum": lambda m, v: v.sum(dims, keepdim=keep),
        "mean": lambda m, v: v.mean(dims, keepdim=keep),
        "var": lambda m, v: v.var(dims, keepdim=keep),
        "std": lambda m, v: (v.var(dims, keepdim=keep) + 1e-2).sqrt(),
        "amax": lambda m, v: v.amax(dims, keepdim=keep),
        "amin": lambda m, v: v.amin(dims, keepdim=keep),
        "max": lambda m, v: v.max(dims[0], keepdim=keep).values,
        "norm": lambda m, v: (torch.linalg.vector_norm(v, dim=dims, keepdim=keep) + 1.0).log(),
    }
    return table[how]


def scan(g: Draw, x: Tensor) -> Step | None:
    d = g.dim(x)
    if g.random.random() < 0.6:
        return lambda m, v: v.cumsum(d)
    return (lambda m, v: v.sort(d).values if g_sorted else v.topk(1, d).values) if apart(x) else None


g_sorted = True


def matmul(g: Draw, x: Tensor) -> Step | None:
    if x.dim() == 1:
        return lambda m, v: torch.outer(v, v) + torch.dot(v, v)
    i = g.parameter([*([x.shape[0]] if x.dim() == 3 and g.random.random() < 0.4 else []), x.shape[-1], g.size()])
    how = g.random.choice(("matmul", "einsum", "self"))
    if how == "self":
        return lambda m, v: v.transpose(-1, -2) @ v
    if how == "einsum" and m_rank(g, i) == 2:
        return lambda m, v: torch.einsum("...k,kn->n...", v, m.free[i])
    return lambda m, v: v @ m.free[i]


def m_rank(g: Draw, i: int) -> int:
    return g.model.free[i].dim()


def checkpointed_stats(g: Draw, x: Tensor) -> Step:
    """A buffer that follows a statistic of the batch, and is used before and after it is written."""
    i = len(g.model.names)
    g.model.register_buffer(f"average{i}", torch.zeros(x.shape[-1]))
    g.model.names.append(f"average{i}")

    def run(m: nn.Module, v: Tensor) -> Tensor:
        average = getattr(m, f"average{i}")
        y = v + average.clone()
        average.mul_(0.9).add_(v.detach().reshape(-1, v.shape[-1]).mean(0), alpha=0.1)
        return y * (1 + average.clone())

    return run


OPS: tuple[Callable[[Draw, Tensor], Step | None], ...] = (
    *(linear, linear, square, layer_norm, rms_norm, batch_norm, group_norm, conv, conv, attention, attention, multihead, written_attention),
    *(embedding, reshape, reshape, flatten, unflatten, unflatten, permute, permute, regroup, regroup, unsqueeze, squeeze, expand, repeat),
    *(take_slice, select, pick, pick, put, put, split, split, pad, roll, pointwise, pointwise, jump, scalars, free, free, softmax, where),
    *(cast, reduction, reduction, scan, matmul, checkpointed_stats),
)


def joined(g: Draw, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Two tensors into one, when their shapes allow it."""
    try:
        torch.broadcast_shapes(x.shape, y.shape)
        return g.random.choice(
            (torch.add, torch.mul, torch.sub, lambda a, b: a + b.sigmoid() * 2, lambda a, b: torch.where(b.detach() > 9, a, b))
        )
    except RuntimeError:
        pass
    if x.dim() == y.dim() > 0 and sum(a != b for a, b in zip(x.shape, y.shape, strict=True)) == 1:
        d = next(i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b)
        return lambda a, b: torch.cat([a, b, a], d)
    if x.dim() >= 2 and y.dim() >= 2 and x.shape[-1] == y.shape[-1] and x.dim() == y.dim() == 2:
        return lambda a, b: a @ b.t()
    return lambda a, b: a + b.mean()


class RandomModule(nn.Module):
    """Model number `seed`. Takes float inputs x [..] and y [..]; returns a loss, a dict, a tuple or a tensor."""

    def __init__(self, seed: int, ops: int = 10) -> None:
        super().__init__()
        self.layers, self.free = nn.ModuleList(), nn.ParameterList()
        self.names: list[str] = []
        torch.manual_seed(seed)
        g = Draw(seed, self)
        self.inputs = (torch.randn(g.shape(g.random.choice((2, 3, 3, 4)))), torch.randn(g.shape(g.random.choice((1, 2)))))
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("ids", torch.randint(0, 100, g.shape(g.random.choice((1, 2)))))
        self.steps: list[tuple[tuple[int, ...], Any]] = []
        g.pool += self.inputs
        while len(self.steps) < ops:
            self._extend(g)
        self.head = g.random.choice(("loss", "loss", "dict", "tuple", "tensor", "two", "inputs"))
        self.exits = [len(g.pool) - 1, g.random.randrange(len(g.pool))]
        self.wants_grad = g.random.random() < 0.4

    def _extend(self, g: Draw) -> None:
        i = len(g.pool) - 1 if g.random.random() < 0.7 else g.random.randrange(len(g.pool))
        x = g.pool[i]
        if g.random.random() < 0.2:
            j = g.random.randrange(len(g.pool))
            step = joined(g, x, g.pool[j])
            args: tuple[int, ...] = (i, j)
        else:
            if x.dim() == 0:
                return
            found = g.random.choice(OPS)(g, x)
            step, args = (None if found is None else (lambda *v, found=found: found(*v))), (i,)
        if step is None:
            return
        with torch.no_grad():
            given = [g.pool[k] for k in args]
            y = step(*given) if len(args) == 2 else step(self, *given)
        if 0 < y.numel() <= LARGEST and y.dim() <= 5 and y.is_floating_point() and float(y.abs().max()) < 50:
            self.steps.append((args, step))
            g.pool.append(y)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        pool = [x, y]
        for args, step in self.steps:
            given = [pool[k] for k in args]
            pool.append(step(*given) if len(args) == 2 else step(self, *given))
        last, other = (pool[k] for k in self.exits)
        loss = (last.sin() ** 2).mean() + sum((p * p).sum() * 1e-2 for p in self.free)
        loss = loss + sum(t.sin().mean() * 0.1 for t in pool[2:])
        return {
            "loss": lambda: loss,
            "dict": lambda: {"loss": loss, "last": last, "other": other, "again": last},
            "tuple": lambda: (last, loss, (other.t() if other.dim() == 2 else other,)),
            "tensor": lambda: last * (1 + 0 * loss) + loss,
            "two": lambda: {"a": loss, "b": (other**2).mean(), "c": last.detach()},
            "inputs": lambda: {"loss": loss, "x": x, "y": y, "same": last},
        }[self.head]()


def random_module(seed: int, ops: int = 10) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """(model, inputs) in float64, reset to how it was before it was tried out while being built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = RandomModule(seed, ops)
        for buffer_name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.fill_(1.0 if "var" in buffer_name else 0.1)
    finally:
        torch.set_default_dtype(before)
    trained = any(p.requires_grad for p in [*model.layers.parameters(), *model.free])
    inputs = tuple(t.requires_grad_(model.wants_grad or not trained) for t in model.inputs)
    del model.inputs
    return model, inputs  # type: ignore[return-value]
