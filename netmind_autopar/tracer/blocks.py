"""Find the list of blocks that a deep model repeats: alike in everything but their parameters' values and their own number."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import nn

from .period import NoPeriod

FEWEST = 16  # with fewer blocks, tracing them all costs no more (measured on GPT-2: even at 14)
_APART = ("_parameters", "_buffers", "_modules")  # compared by their own rules
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_UNUSED = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_PLAIN = (bool, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.memory_format)


def find(model: nn.Module) -> tuple[str, int]:
    """(path, number of blocks) of the one outermost ModuleList or Sequential whose blocks are alike; NoPeriod if there is not one."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}." if outer else "") for outer, _ in found):
            continue
        if type(module) in (nn.ModuleList, nn.Sequential) and len(module) >= FEWEST and _alike(module):  # type: ignore[arg-type]
            found.append((path, module))
    if len(found) != 1:
        raise NoPeriod(f"{len(found)} lists of blocks that are alike")
    path, blocks = found[0]
    _unshared(model, blocks)
    return path, len(blocks)  # type: ignore[arg-type]


def _alike(blocks: nn.Module) -> bool:
    children = list(blocks._modules.items())
    if [name for name, _ in children] != [str(i) for i in range(len(children))] or any(vars(blocks)[key] for key in _HOOKS):
        return False
    first = children[0][1]
    return all(isinstance(b, nn.Module) and _same_module(first, b, i) for i, (_, b) in enumerate(children))


def _unshared(model: nn.Module, blocks: nn.Module) -> None:
    """NoPeriod when a tensor or a module of a block is found a second time anywhere."""
    times = Counter(id(x) for _, x in model.named_parameters(remove_duplicate=False))
    times += Counter(id(x) for _, x in model.named_buffers(remove_duplicate=False))
    times += Counter(id(x) for _, x in model.named_modules(remove_duplicate=False))
    for block in blocks.children():
        if any(times[id(x)] > 1 for x in (*block.parameters(), *block.buffers(), *block.modules())):
            raise NoPeriod("a block shares something")


def _same_module(a: nn.Module, b: nn.Module, number: int) -> bool:
    """`a` is in block 0, `b` at the same place in block `number`."""
    if type(a) is not type(b) or any(vars(m).get(key) for m in (a, b) for key in _HOOKS):
        return False
    for key in ("_parameters", "_buffers"):
        one, two = vars(a)[key], vars(b)[key]
        if list(one) != list(two) or not all(_same_tensor(x, y) for x, y in zip(one.values(), two.values(), strict=True)):
            return False
    if list(a._modules) != list(b._modules):
        return False
    for x, y in zip(a._modules.values(), b._modules.values(), strict=True):
        if (x is None) != (y is None) or (x is not None and y is not None and not _same_module(x, y, number)):
            return False
    one, two = ({k: v for k, v in vars(m).items() if k not in (*_APART, *_UNUSED)} for m in (a, b))
    return list(one) == list(two) and all(_same_value(one[k], two[k], number) for k in one)


def _same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    hooks = bool(a._backward_hooks) or bool(b._backward_hooks) or a._post_accumulate_grad_hooks or b._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    facts = [(type(t), t.shape, t.dtype, t.requires_grad, t.layout) for t in (a, b)]
    return not hooks and facts[0] == facts[1]


def _same_value(a: Any, b: Any, number: int) -> bool:
    """Equal plain values, the same object, or each its block's number."""
    if type(a) is not type(b):
        return False
    if a is b and not isinstance(a, int):
        return True
    if type(a) is int:
        return a == b or (a == 0 and b == number)
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same_value(x, y, number) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same_value(a[k], b[k], number) for k in a)
    if isinstance(a, (set, frozenset)):
        return bool(a == b) and all(isinstance(x, (*_PLAIN, int)) for x in a)
    if type(a) is functools.partial:
        return a.func is b.func and _same_value(a.args, b.args, number) and _same_value(a.keywords, b.keywords, number)
    return False
