"""Train, stop, go on: checkpoints that are written in the background and load on any number of processes.

python examples/resume.py --demo                                     2 processes, stopped half way, then 3; compared with one run
torchrun --nproc-per-node 2 examples/resume.py --steps 40            run it twice: the second goes on where the first one ended
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

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


def train(folder: Path, steps: int, stop: int) -> list[tuple[int, float]]:
    """(step, loss) of the steps that this program ran. stop: end after that step, as if the machine had been taken away."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))
    pm = autoparallelize(Net(), torch.zeros(BATCH, WIDTH), mesh)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = Data()
    parts: dict[str, Any] = {"model": pm, "optimizer": optimizer, "scheduler": scheduler, "data": data}
    losses = []
    with Checkpoints(folder, keep_last=2) as checkpoints:
        found = checkpoints.load_latest(**parts)
        for step in range(found.step if found else 0, min(steps, stop)):
            loss = pm(data.next())
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append((step, loss.item()))
            if (step + 1) % 5 == 0:
                checkpoints.save(step + 1, **parts)
    if torch.distributed.get_rank() == 0 and losses:
        print(f"steps {losses[0][0]} to {losses[-1][0]}: loss {losses[0][1]:.6f} → {losses[-1][1]:.6f}", flush=True)
    torch.distributed.destroy_process_group()
    return losses


def demo(steps: int) -> int:
    """One run of 2 processes; and one that stops half way and goes on with 3. 0 when their losses agree."""
    with tempfile.TemporaryDirectory() as name:
        runs = {"whole": [(2, steps)], "in two": [(2, steps // 2), (3, steps)]}
        losses: dict[str, dict[int, float]] = {}
        for run, parts in runs.items():
            for processes, stop in parts:
                out = Path(name, "losses.json")
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
                options = ["--folder", str(Path(name, run)), "--steps", str(steps), "--stop", str(stop), "--losses", str(out)]
                subprocess.run([*torchrun, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                losses.setdefault(run, {}).update({int(s): x for s, x in json.loads(out.read_text())})
    difference = max(abs(x - losses["in two"][s]) / x for s, x in losses["whole"].items())
    print(f"largest relative difference of the two runs' losses over {steps} steps: {difference:.1e}")
    return 0 if difference < 1e-4 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, stop, go on.")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stop", type=int, default=sys.maxsize, help="end after this step")
    parser.add_argument("--losses", type=Path, help="write them here, as JSON")
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    if args.demo:
        return demo(args.steps)
    losses = train(args.folder, args.steps, args.stop)
    if args.losses and os.environ["RANK"] == "0":
        args.losses.write_text(json.dumps(losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
