"""The same training under Ray Train: it starts the processes and their group, `train` is what each of them runs.

python examples/ray_train.py --workers 2 --folder /shared/runs/ray                  needs: pip install "ray[train]"
torchrun --standalone --nproc-per-node 2 examples/ray_train.py --worker             the same function without Ray, to try it
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from elastic import BATCH, WIDTH, Data, Net

from netmind_autopar import Checkpoints, autoparallelize

Report = Callable[[dict[str, Any]], None]


def train(config: dict[str, Any], report: Report = lambda _: None) -> float:
    """One worker. config: folder (that all workers see), steps. Ray has started the process group, or the mesh does; the last loss."""
    torch.manual_seed(0)
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    pm = autoparallelize(Net(), torch.zeros(BATCH, WIDTH), f"dp={world}", baseline="fsdp")
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-3)
    data, value = Data(), float("nan")
    parts: dict[str, Any] = {"model": pm, "optimizer": optimizer, "data": data}
    with Checkpoints(config["folder"], keep_last=2) as checkpoints:
        found = checkpoints.load_latest(**parts)  # after a failure Ray starts all workers again
        for step in range(found.step if found else 0, config["steps"]):
            loss = pm(data.next())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            report({"step": step, "loss": value})
            if (step + 1) % 10 == 0:
                checkpoints.save(step + 1, **parts)
    return value


def under_ray(workers: int, config: dict[str, Any]) -> int:
    try:
        import ray.train
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        print('Ray is not installed: pip install "ray[train]", or try --worker under torchrun', file=sys.stderr)
        return 2

    def worker(given: dict[str, Any]) -> None:
        train(given, ray.train.report)

    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    print(trainer.fit().metrics)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Train under Ray Train.")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help="this process is one worker, started by torchrun")
    args = parser.parse_args()
    config = {"folder": str(args.folder.absolute()), "steps": args.steps}
    if not args.worker:
        return under_ray(args.workers, config)
    loss = train(config)
    if os.environ["RANK"] == "0":
        print(f"loss {loss:.6f}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
