"""Checkpoints of a training run: written whole or not at all, and loaded on any mesh. See docs/checkpoints.md."""

from .checkpoints import Checkpoints, Restored

__all__ = ["Checkpoints", "Restored"]
