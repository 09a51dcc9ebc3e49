"""Train in float16 with float32 parameters: a policy for the model, which stays as it is, and a loss scaler.

    torchrun --nproc-per-node 2 examples/mixed_precision.py
    torchrun --nproc-per-node 2 examples/mixed_precision.py --precision bf16

bfloat16 needs no scaler: with it the scaler below does nothing.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from netmind_autopar import autoparallelize
from netmind_autopar.optim import GradScaler

BATCH, WIDTH = 16, 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x.roll(1, -1)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp16")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    pm = autoparallelize(Net(), torch.empty(BATCH, WIDTH), mesh, precision=args.precision)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=3e-3)
    scaler = GradScaler(device, init_scale=2.0**24, enabled=args.precision == "fp16")  # too much: the first steps are left out
    for step in range(args.steps):
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        loss = pm(x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if dist.get_rank() == 0:
            print(f"step {step:3}  loss {float(loss.detach()):.4f}  scale {scaler.get_scale():g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
