"""Numbers and placements in words, for tables and messages."""

from __future__ import annotations

from collections.abc import Sequence

from .ir.plan import Plan
from .ir.spec import Partial, Placement, Shard

DIMS = ("rows", "columns")


def seconds(value: float) -> str:
    """`12.3 ms`: three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return "0 s" if value == 0 else f"{_digits(value * 1e9)} ns"


def size(value: float) -> str:
    """`1.25 GiB`: three digits and a binary unit."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{int(value)} B"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def words(placements: Sequence[Placement], rank: int, axes: Sequence[str]) -> str:
    """Placements in words: `rows over tp`, `rows over dp × tp`, `dim 2 over tp`, `terms over tp`, `whole`."""
    split: dict[int, list[str]] = {}
    terms: dict[str, list[str]] = {}
    for axis, placement in zip(axes, placements, strict=True):
        if isinstance(placement, Shard):
            split.setdefault(placement.dim, []).append(axis)
        elif isinstance(placement, Partial):
            terms.setdefault("terms" if placement.op == "sum" else placement.op, []).append(axis)
    parts = [(_dim_word(dim, rank), names) for dim, names in sorted(split.items())] + sorted(terms.items())
    return ", ".join(f"{what} over {' × '.join(names)}" for what, names in parts) or "whole"


def _dim_word(dim: int, rank: int) -> str:
    if rank == 1:
        return "split"
    return DIMS[dim] if rank == 2 else f"dim {dim}"


def fusion_lines(plan: Plan) -> list[str]:
    """What was fused, and what was left because it nearly fits."""
    fused = ", ".join(f"{f.count} {f.name}" for f in plan.fusions if not f.why)
    left = [f for f in plan.fusions if f.why]
    lines = [f"Fused in forward: {fused or 'nothing'}"]
    return (
        lines
        + [f"  left: {f.count} {f.name}, {f.why}  {f.where}".rstrip() for f in left[:5]]
        + [f"  … and {len(left) - 5} more"] * (len(left) > 5)
    )


def precision_rows(plan: Plan) -> list[tuple[str, str]]:
    """The dtypes of a policy, of a plan that has one."""
    return [("dtypes", str(plan.precision))] if plan.precision else []


def rate(bytes_s: float) -> str:
    """What a link sends."""
    return f"{_digits(bytes_s / 1e9)} GB/s"
