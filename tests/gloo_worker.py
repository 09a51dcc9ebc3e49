"""One process of a gloo run: trains models through autoparallelize and compares every step with the original.

Started by `gloo_ranks.py` as `python gloo_worker.py RANK WORLD`; a case is a dict, and so is its result.
A case of `tests/test_gloo_zoo.py` names a model of the zoo: `gloo_zoo.py` runs it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))

import models
from gloo_ranks import serve
from test_exact import optimizers

from netmind_autopar import AutoparError, autoparallelize
from netmind_autopar.ir.spec import Replicate, Shard, plain
from netmind_autopar.runtime.collectives import Collective, ProcessWire, stage
from netmind_autopar.verification import relative_error


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_of(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result if not result.shape else full(result).square().mean()
    return result.loss if hasattr(result, "loss") else result["loss"]


def call(module: torch.nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def train(case: dict) -> dict[str, float]:
    """Three steps; the worst relative error of loss, gradients and buffers."""
    dtype = getattr(torch, case["dtype"])
    model, inputs = getattr(models, case["model"])(dtype=dtype)
    original = copy.deepcopy(model)
    sizes = tuple(case["mesh"])
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))
    if dist.get_rank():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)  # rank 0's weights must win
    pm = autoparallelize(model, inputs, mesh, random_costs=case.get("random_costs"), micro_batches=case.get("micro_batches"))
    make = optimizers(case["model"])[case["optimizer"]]
    ours, theirs = make(pm.parameters()), make(original.parameters())
    worst = {"loss": 0.0, "gradient": 0.0, "buffer": 0.0}
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        a, b = loss_of(call(pm, inputs)), loss_of(call(original, inputs))
        a.backward()
        b.backward()
        worst["loss"] = max(worst["loss"], relative_error(b.detach(), full(a.detach())))
        grads = dict(pm.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
        for name, p in original.named_parameters():
            mine = grads[name].grad
            assert (mine is None) == (p.grad is None), name
            if mine is not None:
                worst["gradient"] = max(worst["gradient"], relative_error(p.grad, full(mine), largest))
        buffers = dict(pm.named_buffers())
        for name, buffer in original.named_buffers():
            worst["buffer"] = max(worst["buffer"], relative_error(buffer, buffers[name]))
        ours.step()
        theirs.step()
    priced = sum(c.bytes for c in pm.plan.collectives)
    worst["bytes"] = abs(sum(pm.sent_bytes.values()) / 3 - priced) / max(priced, 1)
    return worst


def refuse(case: dict) -> dict[str, str]:
    """The error that this rank gets where one rank's trouble must be everybody's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("a",))
    model, inputs = models.mlp()
    options: dict[str, Any] = {}
    if case["refusal"] == "no memory":
        options["memory"] = "1KiB"
    elif dist.get_rank() == 1 and case["refusal"] == "other model":
        model, inputs = models.mlp(wide=64)
    elif dist.get_rank() == 1 and case["refusal"] == "bad input on one rank":
        inputs = "text"
    try:
        autoparallelize(model, inputs, mesh, **options)
    except AutoparError as e:
        return {"kind": type(e).__name__, "text": str(e)}
    return {"kind": "none", "text": ""}


def overlap(case: dict) -> dict[str, float]:
    """Two steps of one plan, with collectives that travel while other ops run and without: how many results differ in any bit."""
    model, inputs = getattr(models, case["overlap"])(dtype=torch.float64)
    mesh = init_device_mesh("cpu", tuple(case["mesh"]), mesh_dim_names=tuple("abc"[: len(case["mesh"])]))
    ours = autoparallelize(model, inputs, mesh, random_costs=case["random_costs"])
    theirs = autoparallelize(model, inputs, mesh, plan=ours.plan.model_copy(update={"overlap": False}))
    differs = 0
    for _ in range(2):
        for pm in (ours, theirs):
            loss_of(call(pm, inputs)).backward()
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        differs += sum(p.grad is not None and not torch.equal(p.grad._local_tensor, q.grad._local_tensor) for p, q in pairs)
    return {"differs": differs, "starts": ours.code().count(".start(") - theirs.code().count(".start(")}


def flights(case: dict) -> dict[str, int]:
    """Many small all-gathers started, and others between them: how many bring something wrong, and how many gloo has at a time."""
    rank, wrong, most = dist.get_rank(), 0, 0
    wire = ProcessWire([dist.group.WORLD.group_name], (2,), (rank,))  # type: ignore[union-attr]
    if case.get("at will"):
        wire._settle = lambda step: None  # type: ignore[method-assign]
    wholes = [torch.arange(32.0 * n).reshape(2 * n, 16) + n for n in (1, 5, 2, 7, 3, 8, 4, 6, 2, 1) * 6]
    bound = []
    for whole in wholes:
        before, after = (str(plain(whole.shape, whole.dtype, [p])) for p in (Shard(0), Replicate()))
        step = stage("all_gather", 0, before, after, (2,), (rank,))
        bound.append(Collective(wire, step, step.unpack))
    for _ in range(case["flights"]):
        flying: list[tuple[Any, torch.Tensor]] = []
        for i, (gather, whole) in enumerate(zip(bound, wholes, strict=True)):
            flying.append((gather.start(whole.chunk(2)[rank].clone()), whole))
            most = max(most, _get_work_registry_size())
            if i % 3 == 0:
                wrong += not torch.equal(gather(whole.chunk(2)[rank].clone()), whole)
            if len(flying) > 12:
                started, want = flying.pop(0)
                wrong += not torch.equal(started.wait(), want)
        wrong += sum(not torch.equal(started.wait(), want) for started, want in flying)
    return {"wrong": wrong, "at once": most}


def run(case: dict) -> dict[str, Any]:
    if "flights" in case:
        return flights(case)
    if "overlap" in case:
        return overlap(case)
    if "training" in case:
        import gloo_training

        return gloo_training.CASES[case["training"]](case)
    if "decode" in case:
        import gloo_decode

        return gloo_decode.decode(case)
    if "zoo" in case:
        import gloo_zoo  # the whole zoo is imported by it: only where it is asked for

        return gloo_zoo.train(case)
    return refuse(case) if "refusal" in case else train(case)


if __name__ == "__main__":
    serve(run)
