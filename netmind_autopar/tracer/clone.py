"""A copy of the user's model that has shapes and no weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ir.errors import CaptureError
from . import torch_private


def fake_like(tensor: torch.Tensor, mode: Any) -> torch.Tensor:
    """A fake CPU tensor of the same shape and dtype, contiguous, whatever device or mode the original is from."""
    with mode:
        out = torch.empty(tuple(int(n) for n in tensor.shape), dtype=tensor.dtype, device="cpu")
    return out.requires_grad_(tensor.requires_grad)


def fake_clone(model: nn.Module, mode: Any, without: Sequence[nn.Module] = ()) -> nn.Module:
    """A deep copy of `model` whose parameters and buffers are fake; tied ones stay tied. The original is not touched.

    The modules `without`, which share nothing with others, are replaced by identities, and what is in them by nothing.
    """
    memo: dict[int, Any] = {id(module): nn.Identity() for module in without}
    nothing = torch.empty(0, device="meta")
    memo.update({id(tensor): nothing for module in without for tensor in (*module.parameters(), *module.buffers())})
    kin: dict[tuple, torch_private.Kin] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in memo:
            key = (tuple(tensor.shape), tensor.dtype)
            if key not in kin:
                kin[key] = torch_private.Kin(fake_like(tensor, mode))
            memo[id(tensor)] = kin[key].parameter(tensor)
    for module in model.modules():  # most of what a module holds are empty tables of hooks, which deepcopy is slow with
        memo.update({id(value): OrderedDict() for value in vars(module).values() if type(value) is OrderedDict and not value})
    try:
        clone = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            "the model cannot be copied",
            where=type(model).__name__,
            why=f"copy.deepcopy: {type(error).__name__}: {error}",
            try_="keep what cannot be copied (locks, files, process groups, tensors with a history) out of the modules",
        ) from error
    for name, module in clone.named_modules():
        _plain_tensors(name, module)
    return clone


def _plain_tensors(name: str, module: nn.Module) -> None:
    """Tensors that are plain attributes are constants of the program: their values are needed, on the CPU."""
    for key, value in vars(module).items():
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            path = f"{name}.{key}" if name else key
            raise CaptureError(
                f"the tensor {path} has no value",
                where=type(module).__name__,
                why="a plain attribute on the meta device is a constant that nobody knows",
                try_=f'register it: self.register_buffer("{key}", ...)',
            )
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            setattr(module, key, value.cpu())


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second name -> first name of every parameter or buffer that has several."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return tied


def names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of parameters and of buffers, in the model's order, each tensor once."""
    return [n for n, _ in model.named_parameters()], [n for n, _ in model.named_buffers()]
