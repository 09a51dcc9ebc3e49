"""Llama from Hugging Face, unmodified. `examples/llama.py` has the shape of Llama-3.2-1B, `:large` of Llama-3-8B, `:tiny` runs anywhere."""

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()  # it warns of ids of special tokens, which play no part here


def _inputs(batch: int, seq: int, vocab: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(vocab, (batch, seq))
    return {"input_ids": tokens, "labels": tokens}


def _llama(layers: int, width: int, hidden: int, heads: int, kv_heads: int, vocab: int = 128256, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16 if width > 512 else torch.float32)


def model() -> LlamaForCausalLM:
    return _llama(layers=16, width=2048, hidden=8192, heads=32, kv_heads=8, tied=True)


def sample_inputs() -> dict[str, torch.Tensor]:
    return _inputs(16, 2048, 128256)


def large() -> LlamaForCausalLM:
    return _llama(layers=32, width=4096, hidden=14336, heads=32, kv_heads=8)


def large_inputs() -> dict[str, torch.Tensor]:
    return _inputs(64, 8192, 128256)


def tiny() -> LlamaForCausalLM:
    return _llama(layers=2, width=32, hidden=64, heads=4, kv_heads=2, vocab=96)


def tiny_inputs() -> dict[str, torch.Tensor]:
    return _inputs(8, 16, 96)
