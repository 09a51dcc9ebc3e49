"""Train under a launcher that restarts: whatever is killed, and however many processes come back, the run goes on where it was.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/elastic.py --folder runs/elastic
torchrun --nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/elastic.py

Every life of the program does the same: plan for the processes there are, load the newest whole checkpoint, go on. On the same number of
processes losses are those of a run that was never stopped, bit for bit; on another number they differ by the order of additions.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netmind_autopar import Checkpoints, autoparallelize

BATCH, WIDTH = 24, 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x.roll(1, -1)).square().mean()


class Data:
    """Random batches, each a function of its number: the position is one integer."""

    def __init__(self) -> None:
        self.at = 0

    def next(self) -> torch.Tensor:
        self.at += 1
        return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(self.at))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


Told = Callable[[str, int, float], None]


def train(
    folder: Path, steps: int, *, every: int = 5, stop: int | None = None, timeout_s: float = 30.0, told: Told = lambda *_: None
) -> None:
    """One life of the program. stop: end after that step, as if the machines had been taken away.

    told: hears ("loaded", step, 0), ("step", number, loss) and ("save", step, 0) before each save.
    """
    torch.manual_seed(0)
    mesh = f"dp={os.environ['WORLD_SIZE']}"  # a mesh given as text starts the process group too
    pm = autoparallelize(Net(), torch.zeros(BATCH, WIDTH), mesh, baseline="fsdp", timeout_s=timeout_s)  # so small a model is not split
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = Data()
    parts: dict[str, Any] = {"model": pm, "optimizer": optimizer, "scheduler": scheduler, "data": data}
    with Checkpoints(folder, keep_last=2) as checkpoints:
        found = checkpoints.load_latest(**parts)
        start = found.step if found else 0
        told("loaded", start, 0.0)
        for step in range(start, steps if stop is None else min(steps, stop)):
            loss = pm(data.next())
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            told("step", step, loss.item())
            if (step + 1) % every == 0:
                told("save", step + 1, 0.0)
                checkpoints.save(step + 1, **parts)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train under a launcher that restarts.")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    life, rank, world = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE"))

    def told(what: str, step: int, loss: float) -> None:
        if rank == 0 and (what == "loaded" or step % 20 == 0):
            print(f"life {life}, {world} processes: {what} {step}" + (f", loss {loss:.6f}" if what == "step" else ""), flush=True)

    train(args.folder, args.steps, told=told)


if __name__ == "__main__":
    main()
