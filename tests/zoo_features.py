"""Models of the zoo: one feature of torch each, as user code has them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Made = tuple[nn.Module, Any]


def _randn(dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _randint(high: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def _model(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype).train()


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Dropouts(nn.Module):
    """Element-wise, whole channels, in place; in a convolutional and a linear part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 7, 3, padding=1), nn.Linear(7, 4)
        self.drop, self.channels, self.inplace = nn.Dropout(0.3), nn.Dropout1d(0.4), nn.Dropout(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(F.relu(self.conv(x))).mean(-1)
        return self.inplace(self.fc(self.drop(x)) * 2).square().mean()


class Norms(nn.Module):
    """Batch norm of one, two and three dims, without running statistics; instance and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm1d(7), nn.BatchNorm2d(7, affine=False, momentum=0.3)
        self.three = nn.BatchNorm3d(7, track_running_stats=False)
        self.instance, self.group = nn.InstanceNorm1d(7, affine=True), nn.GroupNorm(7, 7)
        self.rms, self.local = nn.RMSNorm(6), nn.LocalResponseNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.two(x.unflatten(2, (2, 3))).flatten(2)
        x = self.three(x[:, :, :, None, None]).flatten(2)
        x = self.local(self.group(self.instance(x)))
        return (self.rms(x) * torch.linspace(0, 1, 6, dtype=x.dtype)).square().sum(-1).mean()


class Tied(nn.Module):
    """One weight as embedding, as head and, transposed, inside; a shared module; one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.block = mlp(6, 6)
        self.again = self.block
        self.scale = nn.Parameter(torch.ones(6))
        self.copy = self.scale

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.scale
        x = x + self.block(x) * self.copy
        x = x + self.again(x) + torch.softmax(x @ self.table.weight.t(), -1) @ self.table.weight
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class Frozen(nn.Module):
    """The first layer, one bias and a table in the middle want no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(5, 8, 7, 3)
        self.layers[0].requires_grad_(False)
        self.layers[2].bias.requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank update (Hu et al., arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.a, self.b = nn.Parameter(torch.randn(rank, base.in_features) * 0.3), nn.Parameter(torch.randn(base.out_features, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scale


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6).requires_grad_(False)
        self.layers = nn.Sequential(LoRA(nn.Linear(6, 7)), nn.GELU(), LoRA(nn.Linear(7, 9)))

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(self.table(ids)).flatten(0, 1), ids.flatten())


class ComplexRope(nn.Module):
    """Rotary positions as complex numbers, as in Llama's first code; and a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.phase = nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        angles = torch.outer(torch.arange(s, device=x.device, dtype=x.dtype), 10.0 ** -torch.arange(0, 2, device=x.device, dtype=x.dtype))
        turn = torch.polar(torch.ones_like(angles), angles)

        def rotate(y: Tensor) -> Tensor:
            pairs = torch.view_as_complex(y.reshape(b, s, 3, 2, 2))
            return torch.view_as_real(pairs * turn[None, :, None] * torch.view_as_complex(self.phase)).flatten(3)

        q, k = rotate(self.q(x)), rotate(self.k(x))
        return (
            torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1).square().mean()
            + torch.view_as_complex(k.contiguous().unflatten(-1, (2, 2))).abs().mean()
        )


class Autocast(nn.Module):
    """bfloat16 for a part, float32 for a part of that part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.gelu(self.a(x))
            with torch.autocast("cpu", enabled=False):
                y = self.norm(self.b(y.float()))
            y = self.c(y)
        return y.float().square().mean()


class Checkpointed(nn.Module):
    """Activation checkpointing in both forms, with dropout inside, once over several arguments."""

    def __init__(self, reentrant: bool, p: float = 0.0) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList([mlp(6, 8, 6) for _ in range(3)])
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        def step(block: nn.Module, x: Tensor, scale: float) -> Tensor:
            return x + self.drop(block(x)) * scale

        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(step, block, x, 0.5 + i, use_reentrant=self.reentrant)
        return x.square().mean()


@dataclasses.dataclass
class Answer:
    """Registered nowhere."""

    loss: Tensor
    hidden: list[Tensor]
    extra: dict[str, Any]
    note: str = "plain"


class Pair(NamedTuple):
    mean: Tensor
    rows: Tensor


class Returns(nn.Module):
    """A dataclass with a list, a dict, a named tuple, None and text in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(5, 7, 4)

    def forward(self, x: Tensor) -> Answer:
        y = self.layers(x)
        return Answer(y.square().mean(), [y, y.argmax(-1)], {"pair": Pair(y.mean(0), y[0]), "none": None, "same": y}, note="kept")


class HfReturns(nn.Module):
    """Hugging Face's own output class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(5, 7, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.layers(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=(x * 2, logits + 1))


class Losses(nn.Module):
    """Two losses that share a trunk and have a head each, and one without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = mlp(5, 7), nn.Linear(7, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"hard": F.cross_entropy(self.one(h), labels), "soft": self.two(h).square().mean(), "norm": h.abs().sum()}


@torch.library.custom_op("zoo::swish", mutates_args=())
def swish(x: Tensor, beta: float) -> Tensor:
    """An element-wise op of the user's own."""
    return x * torch.sigmoid(beta * x)


@swish.register_fake
def _(x: Tensor, beta: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("zoo::swish_backward", mutates_args=())
def swish_backward(grad: Tensor, x: Tensor, beta: float) -> Tensor:
    s = torch.sigmoid(beta * x)
    return grad * (s + beta * x * s * (1 - s))


@swish_backward.register_fake
def _(grad: Tensor, x: Tensor, beta: float) -> Tensor:
    return torch.empty_like(x)


def _swish_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.beta = inputs[1]


swish.register_autograd(lambda ctx, grad: (swish_backward(grad, ctx.saved_tensors[0], ctx.beta), None), setup_context=_swish_setup)


@torch.library.custom_op("zoo::row_norm", mutates_args=())
def row_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their root mean square, times a weight: [n, d], [d] -> [n, d], [n]."""
    scale = torch.rsqrt(x.square().mean(-1) + 1e-6)
    return x * scale[:, None] * weight, scale


@row_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:1])


def _row_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _row_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, scale = ctx.saved_tensors
    normed, inner = x * scale[:, None], grad * weight
    dx = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale[:, None]
    return dx, (grad * normed).sum(0)


row_norm.register_autograd(_row_backward, setup_context=_row_setup)


class Custom(nn.Module):
    """Custom ops of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.weight = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y, scale = row_norm(swish(self.up(x), 1.5), self.weight)
        return self.down(y).square().mean() + scale.detach().sum()


class Square(torch.autograd.Function):
    """A straight-through estimator: the rounding has the gradient of a square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Inplace(nn.Module):
    """Writes into intermediate results, whole and in part; an autograd.Function of the user's own; detach and no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.mul_(2).add_(1)
        y[:, 2:4] = y[:, 4:6] * 3
        y[:, 0] += 1.5
        F.relu_(y)
        out = torch.zeros(y.shape[0], 8, dtype=y.dtype)
        out[:, :4] = y[:, :4]
        out.view(-1, 4)[1::2] += self.b(y)[:, 4:]
        out.masked_fill_(out.detach() < 0.1, 0.3).clamp_(max=5)
        with torch.no_grad():
            limit = out.abs().amax()
        return (Square.apply(out / limit) * y.detach()).sum()


class Buffers(nn.Module):
    """Counters, a moving average, a ring of the last rows, a buffer that is not saved, one in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(5, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("queue", torch.zeros(6, 4), persistent=False)
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        with torch.no_grad():
            self.steps += 1
            self.average.lerp_(y.mean(0), 0.1)
            self.queue = torch.cat([self.queue[y.shape[0] :], y.detach()])
            self.seen |= (y > 0).any(0)
        return (y - self.average).square().mean() + (y @ self.queue.t()).logsumexp(-1).sum() / self.steps


class Kinds(nn.Module):
    """Integer, bool, float64 and 0-dim inputs; a list of tensors; keyword-only, optional and constant arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(7, 5), mlp(5, 6, 4)

    def forward(
        self, ids: Tensor, parts: list[Tensor], *, keep: Tensor, scale: Tensor, bias: Tensor | None = None, power: int = 1, **more: Tensor
    ) -> Tensor:
        x = self.table(ids) + torch.stack(parts).sum(0)
        x = torch.where(keep[:, None], x, -x) * scale
        x = x if bias is None else x + bias
        return (self.layers(x) ** power * more["weight"]).mean()


class Parametrized(nn.Module):
    """weight_norm, orthogonal by symmetric matrices, a user's own parametrization and the older weight_norm."""

    def __init__(self) -> None:
        super().__init__()
        import torch.nn.utils.parametrize as parametrize

        class Symmetric(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.triu() + x.triu(1).transpose(-1, -2)

        self.a = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
        self.b = nn.Linear(6, 6)
        parametrize.register_parametrization(self.b, "weight", Symmetric())
        self.c = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).square().mean()


class Functional(nn.Module):
    """torch.func.functional_call with weights computed from others (a hypernetwork), vmap over an ensemble."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.hyper = nn.Linear(5, 15)
        self.ensemble = nn.Parameter(torch.randn(3, 4, 3) * 0.5)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        made = self.hyper(code)
        y = torch.func.functional_call(self.inner, {"weight": made[:12].view(3, 4), "bias": made[12:]}, (x,))
        z = torch.vmap(lambda w: torch.tanh(x @ w))(self.ensemble)
        return y.square().mean() + (self.inner(x) * z.mean(0)).sum() + z.square().sum()


class Einsums(nn.Module):
    """einsum in many forms, bilinear layers, tensordot, outer products, matmuls of odd ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.core = nn.Parameter(torch.randn(3, 5, 4) * 0.5), nn.Parameter(torch.randn(4, 5, 3) * 0.5)
        self.bilinear = nn.Bilinear(5, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.einsum("bi,hij,bj->bh", x, self.w, y)
        b = torch.einsum("...i,jik->...jk", x, self.core).diagonal(dim1=-2, dim2=-1).sum(-1)
        c = torch.tensordot(x, self.w, ([1], [1])).mean((1, 2)) + torch.einsum("bi,bi->b", x, x) + torch.einsum("ii->", self.w[0, :4])
        d = self.bilinear(x, y) @ torch.outer(self.w[:, 0, 0], y[0]) @ y.mT
        return (
            a.square().mean() + b.sum() + c.sum() + d.mean() + (self.w @ y[0]).sum() + torch.linalg.multi_dot([x, self.w[0], y.t()]).mean()
        )


class Choices(nn.Module):
    """topk, sort, cumulative sums and maxima, searchsorted, gather, softmax over a middle dim, where, masked fill, quantiles."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.edges = mlp(5, 6), nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        best, where = y.topk(2, -1)
        ordered, order = y.sort(dim=1, descending=True, stable=True)
        soft = torch.softmax(y.unflatten(-1, (2, 3)), 1)
        total = torch.cumsum(ordered, 2) + torch.cummax(y, 1).values + torch.logcumsumexp(y, 1)
        place = torch.searchsorted(self.edges.detach().sort().values, y.detach())
        picked = torch.gather(total, 2, where) + self.edges[place.clamp(max=5)].sum(-1, keepdim=True)
        nucleus = y.masked_fill((ordered.softmax(-1).cumsum(-1) > 0.7).gather(1, order.argsort(1)), -4.0)
        return (
            (best * picked).mean()
            + soft.amax(1).sum()
            + nucleus.logsumexp(-1).mean()
            + y.median(1).values.sum()
            + y.std()
            + y.prod(-1).mean()
        )


class Distances(nn.Module):
    """cdist, cosine similarity, pairwise distance, norms, triplet and contrastive losses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.centers = mlp(5, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.layers(x), self.layers(y)
        near = torch.cdist(a, self.centers).softmax(-1)
        same = F.cosine_similarity(a[:, None], b[None], dim=-1)
        triple = F.triplet_margin_loss(a, b, self.centers[:1].expand_as(a))
        contrast = F.cross_entropy(F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).t() / 0.1, torch.arange(len(x)))
        return (
            near.square().sum()
            + same.mean()
            + triple
            + contrast
            + F.pairwise_distance(a, b).mean()
            + a.norm()
            + torch.linalg.norm(b, dim=1).sum()
        )


class Linalg(nn.Module):
    """Dense linear algebra: solve, Cholesky, inverse, determinant; Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.filter = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        spd = self.a @ self.a.mT + 2 * torch.eye(4, dtype=x.dtype)
        low = torch.linalg.cholesky(spd)
        y = (
            torch.linalg.solve(spd, x.unsqueeze(-1)).squeeze(-1)
            + torch.logdet(spd)[:, None]
            + (torch.linalg.inv(low) @ x.unsqueeze(-1)).sum(-1)
        )
        wave = torch.fft.rfft(y, n=6, dim=-1) * torch.polar(torch.ones_like(self.filter), self.filter)
        return torch.fft.irfft(wave, n=6, dim=-1).square().mean() + torch.fft.fft2(self.a).abs().mean()


class Shapes(nn.Module):
    """Views that do not nest, strides, repeats, padding, unfold, pixel shuffle, meshgrid, triangles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(1, 4, 3, padding="same", padding_mode="reflect"), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x[:, None])
        patches = F.unfold(x[:, None], 3, padding=1).mean(1).view(len(x), 1, *x.shape[1:])
        z = F.pixel_shuffle(y, 2) + F.pad(patches, (3, 3, 2, 4), value=0.5)
        parts = torch.tensor_split(z.reshape(3, -1), 4, 1)
        rows, columns = torch.meshgrid(self.weight[:, 0], self.weight[0], indexing="ij")
        w = torch.kron(self.weight[:2, :2], self.weight[2:4, 2:]) + self.weight[2:].repeat(1, 1) + self.weight.tile(2)[:4, 4:]
        strided = self.weight.unfold(0, 3, 2).sum(-1)
        loss = torch.stack([(i + 1) * p.square().sum() for i, p in enumerate(parts)]).mean() + (rows * columns).tril(1).sum()
        loss = loss + w.roll(1, 0).flip(0)[::2].prod(0).sum() + strided.movedim(0, 1).contiguous().view(-1).square().sum()
        return loss + self.weight.repeat_interleave(2, 0).rot90().diff(dim=0).square().sum()


def _autocast(dtype: torch.dtype) -> Made:
    """Autocast knows float32 alone: a float64 model would stay as it is, so this one is float32 whatever is asked for."""
    return _model(Autocast, torch.float32), {"x": _randn(torch.float32, 5, 5)}


def _kinds(dtype: torch.dtype) -> Made:
    parts = [_randn(dtype, 6, 5, seed=i) for i in (3, 4)]
    inputs = {"ids": _randint(7, 6), "parts": parts, "keep": _randint(2, 6).bool(), "scale": torch.tensor(1.5, dtype=dtype)}
    return _model(Kinds, dtype), {**inputs, "bias": None, "power": 2, "weight": _randn(dtype, 4).requires_grad_()}


def _with(make: Callable[[], nn.Module], **shapes: Any) -> Callable[[torch.dtype], Made]:
    """A factory: a tuple is the shape of normal numbers; a tensor, and whatever else, is what it is."""

    def factory(dtype: torch.dtype) -> Made:
        inputs = {k: _randn(dtype, *v, seed=i + 1) if isinstance(v, tuple) else v for i, (k, v) in enumerate(shapes.items())}
        return _model(make, dtype), inputs

    return factory


MODELS: dict[str, Any] = {
    "dropout": (_with(Dropouts, x=(5, 3, 8)), "dropout of elements, of channels, in place"),
    "norms": (_with(Norms, x=(5, 7, 6)), "batch norm in all forms, instance, group, RMS and local response norm"),
    "tied": (_with(Tied, ids=_randint(11, 4, 7)), "a weight used as table, head and transposed; a shared module"),
    "frozen": (_with(Frozen, x=(6, 5)), "parameters without gradients, and one that is not used"),
    "lora": (_with(Adapted, ids=_randint(9, 5, 4)), "low-rank adapters on a frozen base"),
    "complex_rope": (_with(ComplexRope, x=(3, 6, 12)), "complex numbers: polar, view_as_complex, products, abs"),
    "autocast": (_autocast, "a bfloat16 region with a float32 island"),
    "checkpoint": (_with(lambda: Checkpointed(False), x=(5, 6)), "torch.utils.checkpoint, not reentrant"),
    "checkpoint_reentrant": (_with(lambda: Checkpointed(True), x=(5, 6)), "torch.utils.checkpoint, reentrant"),
    "checkpoint_dropout": (_with(lambda: Checkpointed(False, 0.3), x=(6, 6)), "dropout inside torch.utils.checkpoint"),
    "dataclass": (_with(Returns, x=(6, 5)), "returns a dataclass that nobody registered"),
    "hf_output": (_with(HfReturns, x=(5, 5), labels=_randint(4, 5)), "returns Hugging Face's ModelOutput"),
    "hf_output_bare": (_with(HfReturns, x=(5, 5), labels=None), "the same without a loss"),
    "losses": (_with(Losses, x=(6, 5), labels=_randint(3, 6)), "several losses"),
    "custom_op": (_with(Custom, x=(6, 5)), "torch.library.custom_op: element-wise, and one with a reduction"),
    "inplace": (_with(Inplace, x=(5, 5)), "in-place ops on intermediates, autograd.Function, no_grad"),
    "buffers": (_with(Buffers, x=(4, 5)), "buffers written in forward"),
    "kinds": (_kinds, "int, bool and 0-dim inputs, lists, keyword-only, None and constants"),
    "parametrized": (_with(Parametrized, x=(5, 5)), "weight_norm, spectral_norm, a user's parametrization"),
    "functional": (_with(Functional, x=(6, 4), code=(5,)), "functional_call, vmap"),
    "einsums": (_with(Einsums, x=(5, 5), y=(5, 4)), "einsum, bilinear, tensordot, matmul of odd ranks"),
    "choices": (_with(Choices, x=(3, 4, 5)), "topk, sort, cumsum, gather, softmax over a middle dim"),
    "distances": (_with(Distances, x=(5, 5), y=(5, 5)), "cdist, cosine similarity, contrastive losses"),
    "linalg": (_with(Linalg, x=(3, 4)), "cholesky, solve, inverse, logdet, Fourier transforms"),
    "shapes": (_with(Shapes, x=(3, 6, 6)), "odd views, strides, unfold, pixel shuffle, kron, roll"),
}
