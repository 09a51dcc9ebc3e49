"""Models of the zoo, written by hand: proteins, scans, images and graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _made(model: type[nn.Module], dtype: torch.dtype, **shapes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = model().to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    return module, {
        name: shape if isinstance(shape, Tensor) else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


class GatedAttention(nn.Module):
    """AlphaFold's attention over the last but one dim of x [..., s, c], with a gate and an optional bias [..., heads, s, s]."""

    def __init__(self, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads, self.head = heads, head
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, heads * head, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(width, heads * head), nn.Linear(heads * head, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        q, k, v = (f(x).unflatten(-1, (self.heads, self.head)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("...qhd,...khd->...hqk", q / math.sqrt(self.head), k)
        weights = torch.softmax(scores if bias is None else scores + bias, -1)
        mixed = torch.einsum("...hqk,...khd->...qhd", weights, v).flatten(-2)
        return self.out(torch.sigmoid(self.gate(x)) * mixed)


class Transition(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


class OuterProductMean(nn.Module):
    """m [b, s, r, c] -> [b, r, r, z]: products of projected columns, averaged over the sequences."""

    def __init__(self, width: int, pair: int, inner: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(width, inner)
        self.out = nn.Linear(inner * inner, pair)

    def forward(self, m: Tensor) -> Tensor:
        m = self.norm(m)
        outer = torch.einsum("bsic,bsjd->bijcd", self.a(m), self.b(m)) / m.shape[1]
        return self.out(outer.flatten(-2))


class TriangleMultiplication(nn.Module):
    """Edges ij from edges ik and jk (outgoing) or ki and kj (incoming)."""

    def __init__(self, pair: int, outgoing: bool) -> None:
        super().__init__()
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
        self.norm, self.norm_out = nn.LayerNorm(pair), nn.LayerNorm(pair)
        self.a, self.b, self.out = (nn.Linear(pair, pair) for _ in range(3))
        self.gate_a, self.gate_b, self.gate = (nn.Linear(pair, pair) for _ in range(3))

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z)
        a, b = torch.sigmoid(self.gate_a(z)) * self.a(z), torch.sigmoid(self.gate_b(z)) * self.b(z)
        return torch.sigmoid(self.gate(z)) * self.out(self.norm_out(torch.einsum(self.equation, a, b)))


class TriangleAttention(nn.Module):
    """Attention around the starting node (along rows) or the ending one (along columns), biased by the third edge."""

    def __init__(self, pair: int, heads: int, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.bias, self.attention = nn.Linear(pair, heads, bias=False), GatedAttention(pair, heads, 2)

    def forward(self, z: Tensor) -> Tensor:
        z = z if self.starting else z.transpose(1, 2)
        out = self.attention(z, self.bias(z).permute(0, 3, 1, 2).unsqueeze(1))
        return out if self.starting else out.transpose(1, 2)


class EvoformerBlock(nn.Module):
    """Jumper et al., Nature 596 (2021), supplement, algorithm 6."""

    def __init__(self, width: int = 6, pair: int = 5, heads: int = 3) -> None:
        super().__init__()
        self.pair_norm, self.pair_bias = nn.LayerNorm(pair), nn.Linear(pair, heads, bias=False)
        self.rows, self.columns, self.transition = GatedAttention(width, heads, 2), GatedAttention(width, heads, 2), Transition(width)
        self.outer = OuterProductMean(width, pair, 3)
        self.triangle_out, self.triangle_in = TriangleMultiplication(pair, True), TriangleMultiplication(pair, False)
        self.starting, self.ending = TriangleAttention(pair, heads, True), TriangleAttention(pair, heads, False)
        self.pair_transition = Transition(pair)

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.pair_bias(self.pair_norm(z)).permute(0, 3, 1, 2).unsqueeze(1)
        m = m + self.rows(m, bias)
        m = m + self.columns(m.transpose(1, 2)).transpose(1, 2)
        m = m + self.transition(m)
        z = z + self.outer(m)
        for update in (self.triangle_out, self.triangle_in, self.starting, self.ending, self.pair_transition):
            z = z + update(z)
        return m, z


class Evoformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([EvoformerBlock()])
        self.head = nn.Linear(5, 4)

    def forward(self, m: Tensor, z: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            m, z = block(m, z)
        return {"loss": self.head(z).square().mean() + m.square().mean(), "msa": m}


def evoformer(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(Evoformer, dtype, m=(2, 4, 5, 6), z=(2, 5, 5, 5))


class SelectiveScan(nn.Module):
    """A Mamba block (Gu and Dao, arXiv:2312.00752): h_t = exp(dt A) h_{t-1} + dt B_t x_t,  y_t = C_t h_t + D x_t.

    `loop` walks over time; otherwise the same by cumulative sums of logarithms.
    """

    def __init__(self, loop: bool, hidden: int = 6, inner: int = 8, state: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.loop, self.rank, self.state = loop, rank, state
        self.norm, self.into, self.out = (
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 2 * inner, bias=False),
            nn.Linear(inner, hidden, bias=False),
        )
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.parts, self.dt = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.into(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        low, b, c = self.parts(u).split([self.rank, self.state, self.state], -1)
        dt = F.softplus(self.dt(low))
        decay = torch.einsum("bti,is->btis", dt, -torch.exp(self.a_log))
        drive = torch.einsum("bti,bts,bti->btis", dt, b, u)
        states = self._looped(decay, drive) if self.loop else self._summed(decay, drive)
        y = torch.einsum("btis,bts->bti", states, c) + u * self.d
        return x + self.out(y * F.silu(gate))

    def _looped(self, decay: Tensor, drive: Tensor) -> Tensor:
        h, states = torch.zeros_like(drive[:, 0]), []
        for t in range(drive.shape[1]):
            h = torch.exp(decay[:, t]) * h + drive[:, t]
            states.append(h)
        return torch.stack(states, 1)

    def _summed(self, decay: Tensor, drive: Tensor) -> Tensor:
        total = torch.cumsum(decay, 1)
        return torch.exp(total) * torch.cumsum(drive * torch.exp(-total), 1)


class Mamba(nn.Module):
    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(11, 6), SelectiveScan(loop), nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.block(self.table(ids)))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def mamba_loop(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(lambda: Mamba(True), dtype, ids=_ids(11, 3, 6))


def mamba_cumsum(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(lambda: Mamba(False), dtype, ids=_ids(11, 5, 7))


class UNet(nn.Module):
    """Down by convolution and pooling, up by transposed convolution and interpolation, with skips; images or signals."""

    def __init__(self, dims: int = 2, width: int = 4) -> None:
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv1d, nn.ConvTranspose1d)
        pool, average = (nn.MaxPool2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.MaxPool1d, nn.AdaptiveAvgPool1d)
        self.smooth = "bilinear" if dims == 2 else "linear"
        self.first, self.norm = conv(3, width, 3, padding=1), nn.GroupNorm(2, width)
        self.down, self.pool = conv(width, 2 * width, 3, stride=2, padding=1), pool(2)
        self.soft = (nn.AvgPool2d if dims == 2 else nn.AvgPool1d)(3, stride=1, padding=1)
        self.middle = conv(2 * width, 2 * width, 3, padding=2, dilation=2, padding_mode="circular")
        self.up, self.mix = up(2 * width, width, 4, stride=2, padding=1), conv(3 * width, width, 1)
        self.squeeze, self.excite = average(1), conv(width, width, 1)
        self.last, self.coarse = conv(width, 3, 3, padding=1), average(3)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        a = F.silu(self.norm(self.first(x)))
        b = self.pool(F.silu(self.down(a)))
        b = self.soft(self.middle(b))
        b = F.interpolate(b, scale_factor=2, mode="nearest")
        fine = self.up(b)
        smooth = F.interpolate(b, size=a.shape[2:], mode=self.smooth, align_corners=False)
        y = self.mix(torch.cat([fine + a, smooth], 1))
        y = self.last(y * torch.sigmoid(self.excite(self.squeeze(y))))
        return {"loss": F.mse_loss(y, target) + F.l1_loss(self.coarse(y), self.coarse(target)), "image": y}


def unet2d(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(UNet, dtype, x=(5, 3, 16, 16), target=(5, 3, 16, 16))


def unet1d(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(lambda: UNet(1), dtype, x=(3, 3, 16), target=(3, 3, 16))


class WindowAttention(nn.Module):
    """Swin's attention inside windows, every other time shifted by half a window (Liu et al., arXiv:2103.14030)."""

    def __init__(self, width: int, heads: int, window: int, shift: int, size: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.2)
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + window - 1
        self.register_buffer("index", offset[0] * (2 * window - 1) + offset[1])
        region = torch.zeros(1, size, size, 1)
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None) if shift else slice(0, 0))):
            for j, columns in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None) if shift else slice(0, 0))):
                region[:, rows, columns] = 3 * i + j
        parts = self._windows(region).squeeze(-1)
        self.register_buffer("mask", (parts[:, None] != parts[:, :, None]) * -100.0)

    def _windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.window
        return x.view(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n * n, c)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.window
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm(x)
        q, k, v = self.qkv(self._windows(y)).view(-1, n * n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias[self.index].permute(2, 0, 1)
        scores = (scores.view(b, -1, *scores.shape[1:]) + self.mask[:, None]).view(scores.shape)
        y = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n * n, c))
        y = y.view(b, h // n, w // n, n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.layers = nn.Sequential(WindowAttention(6, 3, 4, 0, 8), WindowAttention(6, 3, 4, 2, 8))
        self.merge, self.head = nn.Linear(24, 8, bias=False), nn.Linear(8, 5)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.layers(self.stem(images).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return F.cross_entropy(self.head(self.merge(x).mean((1, 2))), labels)


def swin(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(Swin, dtype, images=(3, 3, 16, 16), labels=_ids(5, 3))


class Graph(nn.Module):
    """Message passing over an edge list: sums by scatter_add, means by index_add, a softmax per node, maxima by scatter_reduce."""

    def __init__(self, features: int = 6, nodes: int = 9) -> None:
        super().__init__()
        self.nodes = nodes
        self.into, self.message, self.score = nn.Linear(features, 8), nn.Linear(16, 8), nn.Linear(16, 1)
        self.update, self.head = nn.GRUCell(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        h = torch.tanh(self.into(x))
        for _ in range(2):
            pair = torch.cat([h[source], h.index_select(0, target)], -1)
            message = F.relu(self.message(pair))
            weight = torch.exp(self.score(pair)).squeeze(-1)
            norm = torch.zeros(self.nodes, dtype=x.dtype, device=x.device).scatter_add(0, target, weight)
            message = message * (weight / norm[target]).unsqueeze(-1)
            h = self.update(torch.zeros_like(h).index_add(0, target, message), h)
        degree = torch.zeros(self.nodes, dtype=x.dtype, device=x.device).index_add_(0, target, torch.ones_like(target, dtype=x.dtype))
        peak = torch.zeros_like(h).scatter_reduce(0, target.unsqueeze(-1).expand(-1, 8), h[source], "amax", include_self=False)
        return F.cross_entropy(self.head((h + peak) / (1 + degree).unsqueeze(-1)), labels)


def graph(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return _made(Graph, dtype, x=(9, 6), edges=_ids(9, 2, 20), labels=_ids(3, 9))


MODELS: dict[str, Any] = {
    "evoformer": (evoformer, "AlphaFold: row, column and triangle attention, outer product mean, triangle multiplication"),
    "mamba_loop": (mamba_loop, "a selective scan as a loop over time, causal depthwise convolution"),
    "mamba_cumsum": (mamba_cumsum, "a selective scan as cumulative sums"),
    "unet2d": (unet2d, "transposed convolution, interpolation, three poolings, circular padding, group norm"),
    "unet1d": (unet1d, "the same over signals"),
    "swin": (swin, "attention in windows, torch.roll, a learned bias by index, 3 heads"),
    "graph": (graph, "messages over an edge list: scatter_add, index_add, scatter_reduce"),
}
