"""Models of the zoo: Hugging Face transformers, built from configs, unmodified.

Sizes are small and odd on purpose: 97 words, 3, 6 or 7 heads, batches of 3 and 5, so that most dims divide by no mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import torch
from torch import nn

VOCAB, BATCH, SEQ = 97, 4, 9

Batch = dict[str, torch.Tensor]
Sample = tuple[nn.Module, Batch]


def _ids(*shape: int, high: int = VOCAB, low: int = 0, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _floats(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _text(batch: int = BATCH, seq: int = SEQ) -> Batch:
    return {"input_ids": _ids(batch, seq), "labels": _ids(batch, seq, seed=2)}


@functools.cache
def _grouped_in_float64() -> None:
    """torch's grouped product takes no float64, where transformers takes its own only for older versions of torch: let it do so
    for float64 too, or the model would not run at all."""
    from transformers.integrations import moe

    decide = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda x, w, offs: w.dtype != torch.float64 and decide(x, w, offs)


def _lm(make: Callable[[], nn.Module], dtype: torch.dtype, batch: int = BATCH, seq: int = SEQ) -> Sample:
    return models._build(make, dtype, "cpu"), _text(batch, seq)


def gpt2(dtype: torch.dtype) -> Sample:
    """Three heads of size 8 from one fused projection; the head is tied to the embedding."""
    return models.gpt2(dtype, hidden=24, heads=3, vocab=VOCAB, batch=5, seq=SEQ)


def opt(dtype: torch.dtype) -> Sample:
    """A mask given as data, some of it padding: positions are a cumulative sum of it."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        num_hidden_layers=2,
        hidden_size=24,
        ffn_dim=40,
        num_attention_heads=3,
        vocab_size=VOCAB,
        word_embed_proj_dim=24,
        max_position_embeddings=16,
        dropout=0.0,
        pad_token_id=1,
    )
    model, batch = _lm(lambda: OPTForCausalLM(config), dtype, batch=3)
    mask = torch.ones(3, SEQ, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[2, 5:] = 0
    return model, {**batch, "attention_mask": mask}


def llama(dtype: torch.dtype) -> Sample:
    """Six query heads on two key heads; nothing divides by four."""
    return models.llama(dtype, hidden=24, heads=6, kv_heads=2, vocab=VOCAB, batch=3, seq=10)


def qwen3(dtype: torch.dtype) -> Sample:
    """Norms of queries and keys, a head size of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        num_hidden_layers=2,
        hidden_size=28,
        intermediate_size=44,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=VOCAB,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return _lm(lambda: Qwen3ForCausalLM(config), dtype)


def mistral(dtype: torch.dtype) -> Sample:
    """Each query sees four keys: a banded mask that depends on nothing but the length."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        num_hidden_layers=2,
        hidden_size=28,
        intermediate_size=40,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=VOCAB,
        max_position_embeddings=16,
        sliding_window=4,
    )
    return _lm(lambda: MistralForCausalLM(config), dtype, batch=3, seq=9)


def bert(dtype: torch.dtype) -> Sample:
    """Masked language modelling with dropout."""
    model, batch = models.bert(dtype, 0.1, hidden=24, vocab=VOCAB, batch=5, seq=SEQ)
    labels = batch["labels"].clone()
    labels[:, ::2] = -100
    return model, {**batch, "labels": labels}


def t5(dtype: torch.dtype) -> Sample:
    """Encoder and decoder with learned biases of relative position, one table for both."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=1,
        num_decoder_layers=2,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_heads=3,
        vocab_size=VOCAB,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    model = models._build(lambda: T5ForConditionalGeneration(config), dtype, "cpu")
    return model, {"input_ids": _ids(3, 10), "labels": _ids(3, 7, seed=2)}


def vit(dtype: torch.dtype) -> Sample:
    """17 tokens of an image, classified."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=2,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = models._build(lambda: ViTForImageClassification(config), dtype, "cpu")
    return model, {"pixel_values": _floats(5, 3, 16, 16, dtype=dtype), "labels": _ids(5, high=5)}


def whisper(dtype: torch.dtype) -> Sample:
    """Convolutions over a spectrogram, then encoder and decoder; fixed positions."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        encoder_layers=1,
        decoder_layers=1,
        d_model=24,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=VOCAB,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = models._build(lambda: WhisperForConditionalGeneration(config), dtype, "cpu")
    return model, {"input_features": _floats(3, 8, 20, dtype=dtype), "labels": _ids(3, SEQ)}


def clip(dtype: torch.dtype) -> Sample:
    """Two towers and a loss that compares every text with every image."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": VOCAB}
    text |= {"max_position_embeddings": 12, "projection_dim": 16, "bos_token_id": 94, "eos_token_id": 95, "pad_token_id": 96}
    vision = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 5, "image_size": 12}
    vision |= {"patch_size": 4, "projection_dim": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = models._build(lambda: CLIPModel(config), dtype, "cpu")
    ids = _ids(5, SEQ, high=94)
    ids[torch.arange(5), torch.tensor([7, 4, 6, 5, 7])] = 95
    return model, {"input_ids": ids, "pixel_values": _floats(5, 3, 12, 12, dtype=dtype), "return_loss": True}  # type: ignore[dict-item]


def mixtral(dtype: torch.dtype, *, experts: str) -> Sample:
    """Two of five experts a token, and the loss that balances them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    _grouped_in_float64()
    config = MixtralConfig(
        num_hidden_layers=1,
        hidden_size=24,
        intermediate_size=20,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        output_router_logits=True,
        experts_implementation=experts,
    )
    return _lm(lambda: MixtralForCausalLM(config), dtype, batch=3)


def deepseek_v3(dtype: torch.dtype) -> Sample:
    """Latent attention, experts chosen by groups, one shared expert; the first layer is dense."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    _grouped_in_float64()
    config = DeepseekV3Config(
        num_hidden_layers=2,
        first_k_dense_replace=1,
        hidden_size=24,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_shared_experts=1,
        n_routed_experts=6,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=2,
        kv_lora_rank=10,
        q_lora_rank=14,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=16,
        num_mtp_layers=0,
        experts_implementation="grouped_mm",
    )
    return _lm(lambda: DeepseekV3ForCausalLM(config), dtype)


def deepseek_v2(dtype: torch.dtype) -> Sample:
    """Latent attention with rotations by complex numbers, two shared experts, batched experts."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        num_hidden_layers=1,
        first_k_dense_replace=0,
        hidden_size=24,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_shared_experts=2,
        n_routed_experts=5,
        num_experts_per_tok=2,
        kv_lora_rank=10,
        q_lora_rank=None,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
        head_dim=4,
        vocab_size=VOCAB,
        max_position_embeddings=16,
        experts_implementation="batched_mm",
    )
    return _lm(lambda: DeepseekV2ForCausalLM(config), dtype, batch=3, seq=9)


# name -> (factory of a dtype, what it is there for[, options of capture])
MODELS: dict[str, Any] = {
    "gpt2": (gpt2, "fused projection, tied head"),
    "opt": (opt, "padding mask as data, learned positions"),
    "llama": (llama, "grouped heads, rotary"),
    "qwen3": (qwen3, "norms of queries and keys, tied head"),
    "mistral": (mistral, "sliding window, seven heads on one"),
    "bert": (bert, "masked words, dropout"),
    "t5": (t5, "encoder-decoder, learned attention bias"),
    "vit": (vit, "image classification"),
    "whisper": (whisper, "convolutions, encoder-decoder"),
    "clip": (clip, "two towers, contrastive loss"),
    "mixtral_grouped": (functools.partial(mixtral, experts="grouped_mm"), "experts by grouped products"),
    "mixtral_batched": (functools.partial(mixtral, experts="batched_mm"), "experts by batched products"),
    "deepseek_v3": (deepseek_v3, "latent attention, grouped choice of experts"),
    "deepseek_v2": (deepseek_v2, "latent attention, shared experts, complex rotations"),
}
