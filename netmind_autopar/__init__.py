"""netmind-autopar: parallelises an unmodified PyTorch model by itself. The public names are all here."""

from .api import autoparallelize, plan
from .ir.errors import AutoparError
from .ir.mesh import Mesh
from .ir.plan import Plan
from .runtime.module import ParallelModule
from .verify import Report, verify

__all__ = ["AutoparError", "Mesh", "ParallelModule", "Plan", "Report", "autoparallelize", "plan", "verify"]
__version__ = "0.1.0"
