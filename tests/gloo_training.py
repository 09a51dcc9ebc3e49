"""What training loops do, on one process of a gloo run, compared with one device. Cases of tests/test_accumulate.py and others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from netmind_autopar import autoparallelize
from netmind_autopar.verification import relative_error


def mesh_of(case: dict) -> DeviceMesh:
    sizes = tuple(case["mesh"])
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def loss_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return full(result).square().mean() if result.shape else result
    return result["loss"]


def call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def part(inputs: Any, start: int, end: int) -> Any:
    return {k: v[start:end] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[start:end]


def gradient_error(pm: nn.Module, original: nn.Module) -> float:
    largest = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
    pairs = [(p.grad, full(pm.get_parameter(n).grad)) for n, p in original.named_parameters() if p.grad is not None]  # type: ignore[arg-type]
    return max(relative_error(want, have, largest) for want, have in pairs)


def accumulate(case: dict) -> dict[str, float]:
    """Four micro-steps against one step of the whole batch; bytes that both send; and the same once more, after an ordinary step."""
    count = 4
    model, inputs = getattr(models, case["model"])(batch=16)
    original = copy.deepcopy(model)
    pm = autoparallelize(model, part(inputs, 0, 4), mesh_of(case), **case["options"])
    original_loss = loss_of(call(original, inputs))
    original_loss.backward()
    found: dict[str, float] = {}

    def sent(run: Callable[[], None]) -> int:
        before = sum(pm.sent_bytes.values())
        run()
        return sum(pm.sent_bytes.values()) - before

    def steps() -> None:
        for k in range(count):
            with pm.no_sync(k < count - 1):
                (loss_of(call(pm, part(inputs, 4 * k, 4 * k + 4))) / count).backward()

    found["one step"] = sent(lambda: loss_of(call(pm, part(inputs, 0, 4))).backward())
    pm.zero_grad()
    found["sent"] = sent(steps)
    found["gradient"] = gradient_error(pm, original)
    pm.zero_grad()
    loss_of(call(pm, part(inputs, 0, 4))).backward()  # gradients that are there already
    steps()
    loss_of(call(original, part(inputs, 0, 4))).backward()
    found["same"] = gradient_error(pm, original)
    return found


CASES: dict[str, Callable[[dict], dict[str, Any]]] = {"accumulate": accumulate}
