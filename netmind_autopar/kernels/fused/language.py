"""Triton, where it is installed; nothing else imports it, so that every other machine runs the eager references.

triton, tl   the modules, or None
jit          triton.jit; without Triton the function as it is, which is then never called
INTERPRETED  True when this process was started with TRITON_INTERPRET=1: kernels then run on CPU tensors, slowly
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(fn: Callable[..., None]) -> Any:
    """`triton.jit`, where there is one."""
    return triton.jit(fn) if triton is not None else fn


@jit
def _probe() -> None:
    pass


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"

__all__ = ["INTERPRETED", "jit", "tl", "triton"]
