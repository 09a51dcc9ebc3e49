"""Is a plan exact? Run all of its ranks in lockstep in one process and compare with the original model.

check.py      verify, compare: the steps, and what is compared with what
sides.py      the original model and the ranks, with one state
perturb.py    values that hide nothing
judge.py      relative errors, tolerances
locate.py     the first operation that differs
shrink.py     a failing case made small: mesh, choices, program
repro.py      a small case as one Python file
"""

from __future__ import annotations

from .check import Failure, compare, verify
from .judge import TOLERANCE, VANISHING, relative_error, tolerance
from .locate import Difference
from .perturb import AMOUNT
from .report import Report, Row
from .sides import Optimizer

__all__ = [
    "AMOUNT",
    "TOLERANCE",
    "VANISHING",
    "Difference",
    "Failure",
    "Optimizer",
    "Report",
    "Row",
    "compare",
    "relative_error",
    "tolerance",
    "verify",
]
