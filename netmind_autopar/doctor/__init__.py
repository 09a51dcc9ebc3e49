"""Is this machine ready to train? What is installed, what there is room for, and whether processes reach each other."""

from .run import Diagnosis, Finding, examine

__all__ = ["Diagnosis", "Finding", "examine"]
