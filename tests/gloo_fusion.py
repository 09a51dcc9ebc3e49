"""One rank of a loss over classes that an axis splits, through the compiler: `gloo_fusion.py WORLD STORE RANK PLAN` prints a JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent.parent))

from netmind_autopar import Plan, autoparallelize

ROWS, CLASSES = 9, 65


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(12, CLASSES, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.h(x) * 4, target)


def case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,))
    target[::4] = -100
    return Classifier(), (torch.randn(ROWS, 12), target)


def main(world: int, store: str, rank: int, plan: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    model, inputs = case()
    pm = autoparallelize(model, inputs, init_device_mesh("cpu", (world,), mesh_dim_names=("a",)), plan=Plan.load(plan))
    loss = pm(*inputs)
    loss.backward()
    wanted = model(*inputs)
    wanted.backward()
    grad = next(iter(dict(pm.named_parameters()).values())).grad.full_tensor()
    error = float((grad - model.h.weight.grad).abs().max() / model.h.weight.grad.abs().max())
    print(json.dumps({"loss": abs(float(loss) - float(wanted)), "gradient": error}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
