"""GPT-2 from Hugging Face, unmodified. `examples/gpt2.py` is the 124M model, `:xl` the 1.5B one, `:tiny` runs anywhere."""

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

transformers.logging.set_verbosity_error()  # it warns of ids of special tokens, which play no part here


def _inputs(batch: int, seq: int, vocab: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(vocab, (batch, seq))
    return {"input_ids": tokens, "labels": tokens}


def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config())


def sample_inputs() -> dict[str, torch.Tensor]:
    return _inputs(32, 1024, 50257)


def xl() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=48, n_head=25, n_embd=1600))


def tiny() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def tiny_inputs() -> dict[str, torch.Tensor]:
    return _inputs(8, 16, 96)
