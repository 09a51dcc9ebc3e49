"""What `benchmarks/runtime.py` compares: one model on each side, made from the same seed, as a function that makes one training step.

A side is `Side(step, module, optimizer)`; `step()` is forward, backward and the optimizer and gives the loss of the whole batch, or of
this process's rows (`mean` says so). The peers are set up as their tutorials do, with what makes them faster and costs nothing
(`gradient_as_bucket_view`, one wrapped unit per block, a vocabulary that is split, `loss_parallel`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

WIDTH, HEADS = 512, 8


@dataclass
class Side:
    """One training step, and what is alive between steps. mean: the loss is that of this process's rows alone."""

    step: Callable[[], Tensor]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    mean: bool = False


def gpt2(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """Hugging Face's GPT-2 without dropout, and a whole batch."""
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": args.vocab, "n_positions": args.seq, "n_embd": WIDTH, "n_layer": args.layers, "n_head": HEADS}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False, **drops))
    tokens = torch.randint(args.vocab, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": tokens, "labels": tokens}


class Attention(nn.Module):
    """Causal attention whose heads a column-parallel plan can split."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Linears(nn.Module):
    """GPT-2 of `nn.Linear`s, which `parallelize_module` knows how to split (it does not Hugging Face's `Conv1D`)."""

    def __init__(self, layers: int, vocab: int, seq: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, WIDTH), nn.Embedding(seq, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocab, bias=False)
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else None)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def linears(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(args.vocab, (args.batch, args.seq + 1), generator=torch.Generator().manual_seed(1))
    return Linears(args.layers, args.vocab, args.seq), {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def trained(module: nn.Module, batch: dict[str, Tensor], *, mean: bool = False, around: Any = nullcontext, call: Any = None) -> Side:
    """A side that trains by AdamW. around: a context for forward and backward; call: what is called instead of the module."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    run = module if call is None else call

    def step() -> Tensor:
        context: AbstractContextManager[Any] = around()
        with context:
            out = run(**batch)
            loss = out if isinstance(out, Tensor) else out["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Side(step, module, optimizer, batch, mean)


def mesh_of(args: argparse.Namespace, axis: str) -> DeviceMesh:
    return init_device_mesh("cpu", (args.world,), mesh_dim_names=(axis,))


def ours(make: Any, args: argparse.Namespace, axis: str = "dp", **options: Any) -> Side:
    """The same model through `autoparallelize`; every rank is given the whole batch."""
    from netmind_autopar import autoparallelize

    model, batch = make(args)
    return trained(autoparallelize(model, batch, mesh_of(args, axis), **options), batch)


def _rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's share of a batch."""
    return {k: t.tensor_split(dist.get_world_size())[dist.get_rank()].contiguous() for k, t in batch.items()}


def ddp(args: argparse.Namespace) -> Side:
    model, batch = gpt2(args)
    return trained(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), _rows(batch), mean=True)


def fsdp(args: argparse.Namespace) -> Side:
    from torch.distributed.fsdp import fully_shard

    model, batch = gpt2(args)
    mesh = mesh_of(args, "dp")
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, _rows(batch), mean=True)


def megatron(args: argparse.Namespace) -> Side:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

    model, batch = linears(args)
    mesh = mesh_of(args, "tp")
    plan = {f"attn.{n}": ColwiseParallel() for n in "qkv"} | {
        "attn.out": RowwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }
    for block in model.h:  # type: ignore[union-attr]
        parallelize_module(block, mesh, plan)
    ends = {"wte": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    return trained(parallelize_module(model, mesh, ends), batch, around=loss_parallel)


def eager(args: argparse.Namespace, *, compiled: bool = False) -> Side:
    model, batch = gpt2(args)
    return trained(model, batch, call=torch.compile(model) if compiled else None)
