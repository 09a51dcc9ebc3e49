"""Models of the zoo: written by hand with nothing but torch, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
import zoo_science
from torch import Tensor, nn
from torch.nn import functional as F


def build(make: Callable[[], nn.Module], dtype: torch.dtype, **inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model, seeded and in `dtype`, and its inputs: a shape gives normal numbers, (high, shape) integers; the rest stays as it is."""
    torch.manual_seed(0)
    model = make().to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    return model, {name: _drawn(value, dtype, generator) for name, value in inputs.items()}


def _drawn(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(value, tuple) and value and all(isinstance(n, int) for n in value):
        return torch.randn(value, generator=generator, dtype=torch.float64).to(dtype)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int) and isinstance(value[1], tuple):
        return torch.randint(0, value[0], value[1], generator=generator)
    return value


class ChannelsLast(nn.Module):
    """ConvNeXt's layer norm over the channels of an image [n, c, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, layer norm, two linear layers, a learned scale (Liu et al., arXiv:2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.up, self.down = (
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (6, 12), classes: int = 7) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelsLast(widths[0])]
        for i, width in enumerate(widths):
            if i:
                layers += [ChannelsLast(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, 2)]
            layers += [ConvNeXtBlock(width), ConvNeXtBlock(width)]
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.layers(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(self.head(self.norm(x.mean((-2, -1)))), labels)


def convnext(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(ConvNeXt, dtype, images=(5, 3, 16, 16), labels=(7, (5,)))


class DLRM(nn.Module):
    """Recommendation: dense features, bags of categorical ones, pairwise dots, a top network (Naumov et al., arXiv:1906.00091)."""

    def __init__(self, dense: int = 5, rows: tuple[int, ...] = (11, 8, 13), width: int = 6) -> None:
        super().__init__()
        modes = ("sum", "mean", "mean")
        self.bottom = nn.Sequential(nn.Linear(dense, 9), nn.ReLU(), nn.Linear(9, width), nn.ReLU())
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(n, width, mode=mode, padding_idx=0 if i == 2 else None)
            for i, (n, mode) in enumerate(zip(rows, modes, strict=True))
        )
        pairs = len(rows) * (len(rows) + 1) // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("lower", torch.tril_indices(len(rows) + 1, len(rows) + 1, -1))

    def forward(self, dense: Tensor, bags: list[Tensor], flat: Tensor, offsets: Tensor, clicks: Tensor) -> Tensor:
        x = self.bottom(dense)
        found = [table(bag) for table, bag in zip(self.tables, bags, strict=False)] + [self.tables[-1](flat, offsets)]
        every = torch.stack([x, *found], 1)
        dots = torch.bmm(every, every.transpose(1, 2))[:, self.lower[0], self.lower[1]]
        logits = self.top(torch.cat([x, dots], 1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicks.to(logits.dtype))


def dlrm(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(2)
    bags = [torch.randint(0, n, (6, k), generator=generator) for n, k in ((11, 3), (8, 4))]
    flat, offsets = torch.randint(0, 13, (15,), generator=generator), torch.tensor([0, 2, 2, 7, 8, 12])  # the second bag is empty
    return build(DLRM, dtype, dense=(6, 5), bags=bags, flat=flat, offsets=offsets, clicks=(2, (6,)))


class Encoder(nn.Module):
    """torch's own transformer encoder with a padding mask."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
        self.head = nn.Linear(12, 17)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.head(self.encoder(self.table(ids), src_key_padding_mask=padding))
        return F.cross_entropy(x.flatten(0, 1), ids.flatten())


def _padding(batch: int, seq: int) -> Tensor:
    """True where a row has ended; rows of different lengths."""
    return torch.arange(seq) >= torch.tensor([seq - i % 3 for i in range(batch)])[:, None]


def encoder_batch_first(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(lambda: Encoder(True, True), dtype, ids=(17, (5, 7)), padding=_padding(5, 7))


def encoder_seq_first(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(lambda: Encoder(False, False), dtype, ids=(17, (7, 4)), padding=_padding(4, 7))


class EncoderDecoder(nn.Module):
    """nn.Transformer: cross attention and a causal mask made by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(12, 3, 1, 1, 16, dropout=0.0, batch_first=True)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.inner(source, target, tgt_mask=self.causal.to(target.dtype), tgt_is_causal=True).sigmoid().square().mean()


def encoder_decoder(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(EncoderDecoder, dtype, source=(3, 7, 12), target=(3, 5, 12))


class Attentions(nn.Module):
    """nn.MultiheadAttention in its forms: with and without weights, other key sizes, an added row of keys, masks."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(12, 4, kdim=7, vdim=5, batch_first=True, bias=False)
        self.odd = nn.MultiheadAttention(12, 2, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> dict[str, Tensor]:
        x, _ = self.self_attention(x, x, x, key_padding_mask=padding, need_weights=False)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x, weights = self.self_attention(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=True)
        x, cross = self.cross_attention(x, keys, values, need_weights=True, average_attn_weights=False)
        y, _ = self.odd(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=False)
        return {"loss": y.square().mean() + weights.square().sum() + cross.square().mean(), "weights": weights}


def attentions(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(Attentions, dtype, x=(5, 6, 12), keys=(5, 9, 7), values=(5, 9, 5), padding=_padding(5, 6))


class Recurrent(nn.Module):
    """A language model over nn.LSTM, nn.GRU or nn.RNN."""

    def __init__(self, cell: type[nn.RNNBase], vocab: int = 13, width: int = 6, hidden: int = 7, **options: Any) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(vocab, width), cell(width, hidden, **options)
        self.head = nn.Linear(hidden * (2 if options.get("bidirectional") else 1), vocab)

    def forward(self, ids: Tensor, state: Any = None) -> dict[str, Any]:
        x, state = self.cell(self.table(ids), state)
        logits = self.head(x)
        flat, target = logits[..., :-1, :].reshape(-1, logits.shape[-1]), ids[..., 1:].reshape(-1)
        return {"loss": F.cross_entropy(flat, target), "state": state}


def lstm(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(lambda: Recurrent(nn.LSTM, num_layers=2, batch_first=True), dtype, ids=(13, (5, 8)))


def lstm_bidirectional(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    model, inputs = build(lambda: Recurrent(nn.LSTM, bidirectional=True, bias=False), dtype, ids=(13, (6, 4)), h=(2, 4, 7), c=(2, 4, 7))
    return model, {"ids": inputs["ids"], "state": (inputs["h"].requires_grad_(), inputs["c"])}


def gru(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True), dtype, ids=(13, (4, 7)), state=(4, 4, 7))


def rnn(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(lambda: nn.Sequential(nn.RNN(6, 7, nonlinearity="relu"), _First(), nn.RNN(7, 5), _First()), dtype, input=(6, 5, 6))


class _First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


class Cells(nn.Module):
    """A hand-written loop over nn.LSTMCell and nn.GRUCell."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LSTMCell(6, 7), nn.GRUCell(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, c, z = x.new_zeros(x.shape[0], 7), x.new_zeros(x.shape[0], 7), None
        for t in range(x.shape[1]):
            h, c = self.one(x[:, t], (h, c))
            z = self.two(h, z)
        return z.square().mean() + c.abs().sum()


def cells(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(Cells, dtype, x=(5, 3, 6))


class SwitchMoE(nn.Module):
    """Experts behind dispatch and combine masks [groups, tokens, experts, capacity] (Lepikhin et al., arXiv:2006.16668)."""

    def __init__(self, hidden: int = 8, wide: int = 12, experts: int = 4, capacity: int = 3, top: int = 2) -> None:
        super().__init__()
        self.experts, self.capacity, self.top = experts, capacity, top
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(experts, hidden, wide) * 0.3), nn.Parameter(torch.randn(experts, wide, hidden) * 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [groups, tokens, hidden]. Each group fills its own places: groups over devices, then experts, is an all-to-all."""
        gates = torch.softmax(self.router(x), -1)
        combine, taken = x.new_zeros(*gates.shape, self.capacity), torch.zeros_like(gates)
        weight, chosen = torch.topk(gates, self.top, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        for k in range(self.top):
            mask = F.one_hot(chosen[..., k], self.experts).to(x.dtype)
            place = (torch.cumsum(mask, 1) - 1 + taken.sum(1, keepdim=True)) * mask
            taken = taken + mask
            keep = mask * (place < self.capacity)
            slot = F.one_hot(place.sum(-1).long().clamp(max=self.capacity - 1), self.capacity).to(x.dtype)
            combine = combine + torch.einsum("gs,gse,gsc->gsec", weight[..., k], keep, slot)
        dispatch = (combine > 0).to(x.dtype)
        inner = torch.einsum("gsec,gsd->egcd", dispatch, x)
        inner = F.relu(torch.einsum("egcd,edf->egcf", inner, self.up))
        inner = torch.einsum("egcf,efd->egcd", inner, self.down)
        first = F.one_hot(chosen[..., 0], self.experts).to(x.dtype)
        balance = (gates.mean((0, 1)) * first.mean((0, 1))).sum() * self.experts
        return torch.einsum("gsec,egcd->gsd", combine, inner), balance


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.moe, self.head = nn.Embedding(16, 8), nn.LayerNorm(8), SwitchMoE(), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y, balance = self.moe(self.norm(x))
        return F.cross_entropy(self.head(x + y).flatten(0, 1), ids.flatten()) + 0.01 * balance


def switch(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return build(Switch, dtype, ids=(16, (4, 6)))


MODELS: dict[str, Any] = {
    "resnet50": (models.resnet50, "batch norm, strided convolutions, 50 layers"),
    "resnet14": (lambda dtype: models.resnet50(dtype, blocks=(1, 1, 1, 1), batch=5, image=32), "the same, shallow, an odd batch"),
    "convnext": (convnext, "depthwise convolution, layer norm over channels"),
    "dlrm": (dlrm, "EmbeddingBag: sum, mean, bags by offsets, padding; dot interaction"),
    "encoder_batch_first": (encoder_batch_first, "nn.TransformerEncoder, pre-norm, padding mask, 3 heads"),
    "encoder_seq_first": (encoder_seq_first, "nn.TransformerEncoder, post-norm, sequence first"),
    "encoder_decoder": (encoder_decoder, "nn.Transformer: cross attention, additive causal mask"),
    "attentions": (attentions, "nn.MultiheadAttention: weights returned or not, other key sizes, bias_kv"),
    "lstm": (lstm, "nn.LSTM, two layers"),
    "lstm_bidirectional": (lstm_bidirectional, "nn.LSTM both ways, states given, one with a gradient, no bias"),
    "gru": (gru, "nn.GRU, two layers, both ways, state given"),
    "rnn": (rnn, "nn.RNN with relu and tanh; no loss, every output carries a gradient"),
    "cells": (cells, "a loop over nn.LSTMCell and nn.GRUCell"),
    "switch": (switch, "GShard-style experts: dispatch and combine masks, capacity, balance loss"),
    **zoo_science.MODELS,
}
