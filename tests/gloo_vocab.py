"""One rank of a loss over a split vocabulary: `gloo_vocab.py WORLD STORE RANK` prints a JSON line per case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import netmind_autopar.kernels  # noqa: F401 - registers the ops

ops = torch.ops.autopar
SENT: list[int] = []


class Loss(torch.autograd.Function):
    """x [n, c] of this device's classes -> the mean loss over all classes; one all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, start: int, classes: int) -> Tensor:
        stats = ops.vocab_stats(x, target, start, classes, -100)
        everyone = stats.new_empty(dist.get_world_size(), *stats.shape[1:])
        dist.all_gather_into_tensor(everyone, stats)
        SENT.append(stats.numel() * stats.itemsize)
        lse, picked = ops.vocab_combine(everyone)
        ctx.save_for_backward(x, target, lse)
        ctx.start, ctx.count = start, (target != -100).sum()
        return (lse - picked).masked_fill(target == -100, 0).sum() / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, lse = ctx.saved_tensors
        rows = (grad / ctx.count).expand(len(target)).masked_fill(target == -100, 0)
        return ops.cross_entropy_backward(rows, x, target, lse, ctx.start, 1.0, 0.0), None, None, None


def main(world: int, store: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    for n, c in ((33, 1000), (7, 50257), (64, 129)):
        torch.manual_seed(c)
        x, target = torch.randn(n, c) * 5, torch.randint(0, c, (n,))
        target[::5] = -100
        whole = x.double().requires_grad_()
        truth = F.cross_entropy(whole, target)
        (wanted,) = torch.autograd.grad(truth, whole)
        mine = x.tensor_split(world, 1)[rank].clone().requires_grad_()
        start = sum(t.shape[1] for t in x.tensor_split(world, 1)[:rank])
        SENT.clear()
        loss = Loss.apply(mine, target, start, c)
        loss.backward()
        part = wanted[:, start : start + mine.shape[1]]
        print(
            json.dumps(
                {
                    "loss": float((loss.double() - truth).detach().abs() / truth.detach()),
                    "gradient": float((mine.grad - part).abs().max() / wanted.abs().max()),
                    "collectives": len(SENT),
                    "bytes_per_row": sum(SENT) / n,
                }
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
