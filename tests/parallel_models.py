"""Models whose best plans are known: a decoder, an encoder-decoder, a mixture of experts. All hand-written, float64, seeded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Grouped-query attention with projections of its own; keys and values come from `memory` when it is given."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.size, self.dropout = hidden // heads, dropout
        self.q, self.o = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        y = x if memory is None else memory
        q, k, v = (f(z).unflatten(-1, (-1, self.size)).transpose(1, 2) for f, z in ((self.q, x), (self.k, y), (self.v, y)))
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout, causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention, cross attention when there is a memory, feed-forward."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, wide: int, cross: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads, kv_heads, dropout)
        self.n3, self.cross = (nn.LayerNorm(hidden), Attention(hidden, heads, kv_heads, dropout)) if cross else (None, None)
        self.up, self.down = nn.Linear(hidden, wide, bias=False), nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, causal: bool = True) -> Tensor:
        x = x + self.attn(self.n1(x), mask=None if causal else mask, causal=causal)
        if self.cross is not None and self.n3 is not None:
            x = x + self.cross(self.n3(x), memory, mask)
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Decoder(nn.Module):
    """A language model that returns its loss."""

    def __init__(self, vocab: int, hidden: int, heads: int, kv_heads: int, wide: int, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(vocab, hidden), nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, kv_heads, wide) for _ in range(layers))
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class EncoderDecoder(nn.Module):
    """One block each; queries and keys of the cross attention differ in length, and a mask hides padded source positions."""

    def __init__(self, vocab: int = 33, hidden: int = 16, heads: int = 4, kv_heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, hidden)
        self.encoder = Block(hidden, heads, kv_heads, 24, dropout=dropout)
        self.decoder = Block(hidden, heads, kv_heads, 24, cross=True, dropout=dropout)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.double()

    def forward(self, source: Tensor, seen: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        mask = seen[:, None, None, :]
        memory = self.encoder(self.embed(source), mask=mask, causal=False)
        out = self.decoder(self.embed(target), memory, mask)
        return F.cross_entropy(self.head(out).flatten(0, 1), labels.flatten(), label_smoothing=0.1)


class Experts(nn.Module):
    """Top-1 routing with a capacity, dispatch and combine as products (Lepikhin et al., GShard, arXiv:2006.16668, algorithm 1).

    x [groups, tokens, hidden]; every expert takes at most `capacity` tokens of a group, the others pass by.
    """

    def __init__(self, hidden: int, wide: int, experts: int, capacity: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.capacity = capacity
        self.norm, self.mix = nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, wide) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, wide, hidden) * wide**-0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + F.gelu(self.mix(x)))
        share = self.gate(y).softmax(-1)
        best, index = share.max(-1)
        taken = (index.unsqueeze(-1) == torch.arange(share.shape[-1], device=x.device)).to(x.dtype)
        place = (taken.cumsum(1) * taken).sum(-1) - 1
        slot = (place.unsqueeze(-1) == torch.arange(self.capacity, device=x.device)).to(x.dtype)
        dispatch = torch.einsum("gse,gsc->gsec", taken, slot)
        sent = torch.einsum("gsec,gsm->egcm", dispatch, y)
        made = torch.einsum("egcf,efm->egcm", F.gelu(torch.einsum("egcm,emf->egcf", sent, self.up)), self.down)
        out = torch.einsum("gsec,egcm->gsm", dispatch * best[..., None, None], made)
        return (x + out).square().mean()


def text(vocab: int, batch: int, seq: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(0, vocab, (batch, seq), generator=generator) for name in ("ids", "labels")}


def translation(vocab: int = 33, batch: int = 4, source: int = 9, target: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, source + 1, (batch, 1), generator=generator)
    return {
        "source": torch.randint(0, vocab, (batch, source), generator=generator),
        "seen": torch.arange(source) < lengths,
        "target": torch.randint(0, vocab, (batch, target), generator=generator),
        "labels": torch.randint(0, vocab, (batch, target), generator=generator),
    }


def tokens(groups: int, count: int, hidden: int) -> Tensor:
    return torch.randn(groups, count, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
