"""Inductor as the compiler of regions, where this machine has what it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import torch_private

_log = logging.getLogger("netmind_autopar")


def compiler_for(device_type: str) -> Callable[[Callable[[list[Tensor]], Any], Sequence[Tensor]], Callable[[list[Tensor]], Any]] | None:
    """The compiler of regions; None, with one notice, where Inductor cannot run."""
    lacks = torch_private.inductor_lacks(device_type)
    if not lacks:
        return torch_private.inductor
    _log.warning("compile=True has no effect here, everything runs as it is written: %s", lacks)
    return None
