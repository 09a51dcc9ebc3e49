"""Models of the zoo: hand."""

from __future__ import annotations

from typing import Any

# name -> (factory of a dtype, what it is there for[, options of capture])
MODELS: dict[str, Any] = {}
