"""Small models, built from configs or by hand, that all tests share.

Every factory returns (model, sample_inputs), seeded, with real CPU tensors; sample_inputs is a dict or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BATCH, SEQ = 4, 8


def _text(vocab: int, batch: int, seq: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (batch, seq), generator=generator)
    labels = torch.randint(0, vocab, (batch, seq), generator=generator)
    return {"input_ids": ids, "labels": labels}


def gpt2(
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    vocab: int = 64,
    batch: int = BATCH,
    seq: int = SEQ,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        vocab_size=vocab,
        n_positions=max(16, seq),
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLMLoss",
    )
    return _build(lambda: GPT2LMHeadModel(config), dtype, device), _text(vocab, batch, seq)


def llama(
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 64,
    batch: int = BATCH,
    seq: int = SEQ,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden + 16,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=max(16, seq),
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _build(lambda: LlamaForCausalLM(config), dtype, device), _text(vocab, batch, seq)


def qwen2(
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    *,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = 64,
    batch: int = BATCH,
    seq: int = SEQ,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=max(16, seq),
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _build(lambda: Qwen2ForCausalLM(config), dtype, device), _text(vocab, batch, seq)


def bert(
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    *,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = 64,
    batch: int = BATCH,
    seq: int = SEQ,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=80,
        num_attention_heads=4,
        vocab_size=vocab,
        max_position_embeddings=max(16, seq),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    return _build(lambda: BertForMaskedLM(config), dtype, device), _text(vocab, batch, seq)


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3 and 1x1 convolutions with a shortcut (He et al., arXiv:1512.03385)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        same = stride == 1 and inside == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A bottleneck ResNet for images; `blocks` = (3, 4, 6, 3) and `width` = 64 is ResNet-50. Returns {"loss", "logits"}."""

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        stages, inside = [], width
        for i, count in enumerate(blocks):
            for j in range(count):
                stages.append(Bottleneck(inside, width << i, 2 if i and not j else 1))
                inside = 4 * (width << i)
        self.layers = nn.Sequential(*stages)
        self.average, self.dropout, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout), nn.Linear(inside, classes)
        for stage in stages:  # close to the usual zero start (Goyal et al., arXiv:1706.02677); with 1.0 float32 differs from itself by 100%
            nn.init.constant_(stage.bn3.weight, 0.2)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.layers(self.pool(self.relu(self.bn1(self.conv1(images)))))
        logits = self.fc(self.dropout(torch.flatten(self.average(x), 1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def resnet50(
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    *,
    blocks: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 4,
    classes: int = 10,
    batch: int = BATCH,
    image: int = 64,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, image, image, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return _build(lambda: ResNet(blocks, width, classes, dropout), dtype, device), {"images": images, "labels": labels}


class MLP(nn.Module):
    """Two linear layers with GELU between; the loss is the mean square of the difference to `target`."""

    def __init__(self, hidden: int, wide: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(hidden, wide), nn.Linear(wide, hidden), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y = self.down(self.dropout(nn.functional.gelu(self.up(x))))
        return nn.functional.mse_loss(y, target)


def mlp(
    dtype: torch.dtype = torch.float64, dropout: float = 0.0, *, hidden: int = 32, wide: int = 48, batch: int = BATCH, device: str = "cpu"
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(batch, hidden, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return _build(lambda: MLP(hidden, wide, dropout), dtype, device), {"x": x, "target": target}


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """Hugging Face's causal loss without its cast to float32, which would leave float64 tests seven digits."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), shifted.reshape(-1))


def _build(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = make()
    if dtype == torch.float64 and type(model).__name__.endswith(("LMHeadModel", "ForCausalLM")):
        model.loss_function = next_token_loss
    return model.to(dtype).train()


FACTORIES: dict[str, Callable[..., tuple[nn.Module, Any]]] = {"gpt2": gpt2, "llama": llama, "bert": bert, "resnet50": resnet50, "mlp": mlp}
