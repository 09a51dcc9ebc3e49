"""netmind-autopar: parallelises an unmodified PyTorch model by itself. The public names are all here.

Names are imported when they are first used, so that a worker that only runs an emitted module never loads tracer or solver.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import autoparallelize, plan
    from .checkpoint import Checkpoints
    from .ir.errors import AutoparError
    from .ir.mesh import Mesh
    from .ir.plan import Plan
    from .rules.learnt import register_rule
    from .runtime.module import ParallelModule
    from .verification import Report, verify

__all__ = ["AutoparError", "Checkpoints", "Mesh", "ParallelModule", "Plan", "Report", "autoparallelize", "plan", "register_rule", "verify"]
__version__ = "0.1.0"

_HOMES = {
    "autoparallelize": "api",
    "plan": "api",
    "AutoparError": "ir.errors",
    "Checkpoints": "checkpoint",
    "Mesh": "ir.mesh",
    "Plan": "ir.plan",
    "register_rule": "rules.learnt",
    "ParallelModule": "runtime.module",
    "Report": "verification",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
