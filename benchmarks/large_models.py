"""Large Hugging Face models on the meta device, with inputs of a global batch: what planning is measured on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

Made = tuple[torch.nn.Module, dict[str, torch.Tensor]]


def _made(build: Callable[[], torch.nn.Module], inputs: dict[str, torch.Tensor]) -> Made:
    with torch.device("meta"):
        model = build()
    return model.to(torch.bfloat16), inputs


def _tokens(batch: int, length: int, *, mask: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


def llama(layers: int, *, hidden: int, wide: int, heads: int, kv: int, vocab: int = 128256, batch: int = 8, length: int = 8192) -> Made:
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=length,
        rope_theta=500000.0,
        use_cache=False,
    )
    return _made(lambda: transformers.LlamaForCausalLM(config), _tokens(batch, length))


def llama_8b(layers: int, batch: int) -> Made:
    return llama(layers, hidden=4096, wide=14336, heads=32, kv=8, batch=batch)


def llama_70b(layers: int, batch: int) -> Made:
    return llama(layers, hidden=8192, wide=28672, heads=64, kv=8, batch=batch)


def llama_405b(layers: int, batch: int) -> Made:
    return llama(layers, hidden=16384, wide=53248, heads=128, kv=8, batch=batch)


def gpt2_xl(batch: int) -> Made:
    config = transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25, use_cache=False, loss_type="ForCausalLMLoss")
    return _made(lambda: transformers.GPT2LMHeadModel(config), _tokens(batch, 1024))


def vit_huge(batch: int) -> Made:
    config = transformers.ViTConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        intermediate_size=5120,
        image_size=224,
        patch_size=14,
        num_labels=1000,
    )
    images = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    return _made(
        lambda: transformers.ViTForImageClassification(config),
        {"pixel_values": images, "labels": torch.zeros(batch, dtype=torch.long, device="meta")},
    )


def mixtral(batch: int) -> Made:
    config = transformers.MixtralConfig(use_cache=False, max_position_embeddings=4096, experts_implementation="grouped_mm")
    return _made(lambda: transformers.MixtralForCausalLM(config), _tokens(batch, 4096))


def bert_large(batch: int) -> Made:
    config = transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return _made(lambda: transformers.BertForMaskedLM(config), _tokens(batch, 512))


# Per model what a number of devices trains on: a global batch that grows with the devices.
FIVE: dict[str, Callable[[int], Made]] = {
    "GPT-2 XL": lambda devices: gpt2_xl(4 * devices),
    "Llama-3-8B": lambda devices: llama_8b(32, max(8, devices)),
    "ViT-Huge": lambda devices: vit_huge(32 * devices),
    "Mixtral-8x7B": lambda devices: mixtral(max(8, devices)),
    "BERT-Large": lambda devices: bert_large(16 * devices),
}
