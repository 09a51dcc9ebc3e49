"""Parameters that wait in host memory or on disk, with their gradients and their optimizer state.

`stow(tiers, device)` names parameters whose local tensor lies elsewhere (`elsewhere` put it there). They are tensors like any other:
one can read and write them, save them, clip their gradients. The emitted step copies them in where it uses them, and sends their
gradients out as soon as they are made.

An optimizer steps on copies. For each bucket (runtime/parked.py) `on_device` puts copies in the optimizer's groups, with gradients and
state, and afterwards writes them back. So the same kernels make the same numbers as without, and only a bucket is on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .dtensors import as_dtensor
from .mapped import copy, drop, is_mapped, on_disk
from .offload import _contiguous


@dataclass(frozen=True)
class Stowed:
    """Where a parameter waits, and the device on which it is used."""

    tier: str
    device: torch.device


@dataclass(frozen=True)
class _Like:
    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...]
    bytes: int


_stowed = WeakTensorKeyDictionary()  # parameter -> Stowed


def elsewhere(local: Tensor, tier: str, device: torch.device | None = None) -> Tensor:
    """A copy of a local tensor in host memory (pinned for a GPU) or on disk, contiguous. device: where it is used, its own when None."""
    if tier == "disk":
        out = on_disk(_Like(local.shape, local.dtype, _contiguous(local.shape), local.numel() * local.element_size()))
        copy(out, local.detach())
        return out
    return torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=(device or local.device).type == "cuda").copy_(
        local.detach()
    )


def stow(tiers: Mapping[Tensor, str], device: torch.device) -> None:
    """From now on these parameters wait elsewhere: parameter -> "host" or "disk". device: where they are used."""
    for parameter, tier in tiers.items():
        _stowed[parameter] = Stowed(tier, device)
        if tier == "disk" and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


def stowed(parameter: Tensor) -> Stowed | None:
    """Where a parameter waits; None for one that is on its device."""
    return _stowed.get(parameter)


def beside(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a parameter where that waits; itself when it is there."""
    found, local = _stowed.get(parameter), local_of(gradient)
    if found is None or (local.device.type == "cpu" and (found.tier == "host" or is_mapped(local))):
        return gradient
    there = elsewhere(local, found.tier, found.device)
    return as_dtensor(there, gradient.device_mesh, gradient.placements, gradient.shape) if isinstance(gradient, DTensor) else there


def device_of(parameter: Tensor) -> torch.device:
    """The device on which a parameter, its gradient and its state are used."""
    found = _stowed.get(parameter)
    return found.device if found else parameter.device


def local_of(x: Tensor) -> Tensor:
    """The part of a tensor on this rank."""
    return x._local_tensor if isinstance(x, DTensor) else x  # type: ignore[attr-defined]


def forget_pages(parameters: Iterable[Tensor]) -> None:
    """Give back the physical memory of what lies on disk."""
    for p in parameters:
        if p in _stowed:
            drop(local_of(p))
            _drop_gradient(p)


def drop_after_loading(module: nn.Module) -> None:
    """When a state dict is loaded, give back what lies on disk module by module."""
    for part in module.modules():
        if any(p in _stowed for p in part.parameters(recurse=False)):
            part.register_load_state_dict_post_hook(_loaded)


def _loaded(module: nn.Module, incompatible: object) -> None:
    forget_pages(module.parameters(recurse=False))


def _drop_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        drop(local_of(parameter.grad))


@contextmanager
def on_device(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Iterator[None]:
    """In an optimizer's groups and state, copies on the device in the place of these parameters; what it makes of them is written back."""
    copies = {p: _copy_of(p) for p in parameters if p in _stowed}
    _exchange(optimizer, copies)
    try:
        yield
    except BaseException:
        _exchange(optimizer, {there: p for p, there in copies.items()})
        raise
    _exchange(optimizer, {there: p for p, there in copies.items()})
    for p, there in copies.items():
        copy(local_of(p), local_of(there.detach()))
        increment_version(p)


def _copy_of(parameter: Tensor) -> nn.Parameter:
    """A parameter and its gradient, copied to the device."""
    made = nn.Parameter(_brought(parameter.detach(), _stowed[parameter].device), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        made.grad = _brought(parameter.grad, _stowed[parameter].device)
    return made


@torch.no_grad()
def _brought(x: Tensor, device: torch.device) -> Tensor:
    local = local_of(x)
    there = torch.empty_like(local, device=device)
    copy(there, local)
    if not isinstance(x, DTensor):
        return there
    return DTensor.from_local(there, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _exchange(optimizer: Optimizer, others: Mapping[Tensor, Tensor]) -> None:
    """Put other tensors in the place of those that are the keys."""
    if not others:
        return
    by_id = {id(old): new for old, new in others.items()}
    for group in optimizer.param_groups:
        group["params"] = [by_id.get(id(p), p) for p in group["params"]]
    for old, new in others.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
