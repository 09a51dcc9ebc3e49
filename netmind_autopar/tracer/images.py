"""Rewrites on the joint graph of ops on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The bias gradient by itself: it has no in-channels, so beside the others' it would keep those from being split."""
    if not output_mask[2]:
        return NotImplemented
    bias = grad.sum([0, *range(2, grad.dim())])
    if not any(output_mask[:2]):
        return None, None, bias
    mask = [*output_mask[:2], False]
    rest = (stride, padding, dilation, transposed, output_padding, groups, mask)
    return (*_aten.convolution_backward.default(grad, x, weight, None, *rest)[:2], bias)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {_aten.convolution_backward.default: _convolution_backward}
