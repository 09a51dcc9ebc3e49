"""Keep Hugging Face's mask code on the path that eager takes.

While exporting, `transformers.masking_utils` builds explicit masks of batch x 1 x T x T where eager asks for `is_causal` and no
mask: it does not dare to look at values. What depends on no input can be looked at; what is data stays data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from . import torch_private


def constant_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """The real value of a tensor being traced, when it depends on no input, parameter or buffer; else None."""
    end = torch_private.traced_node(tensor)
    if end is None:
        return None
    needed: dict[fx.Node, None] = {}
    stack = [end]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        needed[node] = None
        stack += node.all_input_nodes
    values: dict[fx.Node, Any] = {}
    with torch_private.no_modes():
        for node in end.graph.nodes:
            if node in needed:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)
    return values[end]


@contextmanager
def eager_masks() -> Iterator[None]:
    """Inside the block, `transformers.masking_utils` (if it is imported) answers as in eager wherever that needs no data."""
    module: Any = sys.modules.get("transformers.masking_utils")
    names = ("is_torchdynamo_exporting", "is_tracing", "find_packed_sequence_indices")
    if module is None or not all(hasattr(module, name) for name in names):
        yield
        return
    before = {name: getattr(module, name) for name in names}
    packed = before["find_packed_sequence_indices"]

    def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        value = constant_value(position_ids)
        if value is None:
            return packed(position_ids)  # data: sees `is_tracing` below and does not look
        with torch_private.no_modes():
            steps = value.diff(dim=-1)
            unpacked = bool((steps == 1).all())
        return None if unpacked else packed(position_ids)

    module.is_torchdynamo_exporting = lambda: False
    module.is_tracing = lambda tensor=None: tensor is not None
    module.find_packed_sequence_indices = find_packed_sequence_indices
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
