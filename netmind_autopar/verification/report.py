"""What `verify` found."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.errors import InputError

if TYPE_CHECKING:
    from .check import Failure
    from .locate import Difference
    from .shrink import Shrunk

SHOWN = 8  # rows of the summary


@dataclass(frozen=True)
class Row:
    """One comparison: `error` is max |a − b| over all ranks, relative to the largest magnitude of what it is judged against."""

    step: int
    kind: str  # "output", "gradient", "buffer", "parameter" (after the optimizer) or "run" (it raised an error); "emitted output" …
    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What `verify` found. `first_difference` names the first operation that differs and the user's line, or is "".

    notes: what the comparison could not do, in words. `failure` holds the failing computation, `shrunk` its smallest form.
    """

    rows: tuple[Row, ...]
    first_difference: str = ""
    notes: tuple[str, ...] = ()
    failure: Failure | None = field(default=None, repr=False, compare=False)
    shrunk: Shrunk | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def max_rel_error(self) -> float:
        errors = [row.error for row in self.rows]
        return next((e for e in errors if e != e), max(errors, default=float("nan")))

    @property
    def difference(self) -> Difference | None:
        """The first difference, taken apart."""
        return self.failure.difference if self.failure else None

    def worst(self) -> list[Row]:
        """All rows, those furthest beyond their tolerance first."""
        return sorted(self.rows, key=lambda r: (r.error == r.error, -r.error / r.tolerance if r.tolerance else -r.error, r.step))

    def shrink(self) -> Report:
        """The same report with the failing case made small. Raises InputError when nothing fails."""
        from .shrink import shrink

        return self if self.shrunk else replace(self, shrunk=shrink(self.failure))

    def write_repro(self, path: str | os.PathLike[str]) -> None:
        """Write one Python file that shows the failure with torch and netmind_autopar alone: exit code 1 while it is there.

        Raises InputError when nothing fails, or when the failure cannot be cut out of the program."""
        from .repro import write

        write(self.shrink().shrunk, path)

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write repro.py and, where the whole model fails with a smaller plan, plan.json into a folder; what was written, in words."""
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {place}", why=str(error), try_="name a folder that can be written") from None
        report = self.shrink()

        written = []
        if report.shrunk is not None and report.shrunk.case is not None:
            report.write_repro(place / "repro.py")
            written.append(f"{place / 'repro.py'} shows it by itself")
        if report.shrunk is not None and report.shrunk.plan is not None:
            report.shrunk.plan.save(place / "plan.json")
            written.append(f"{place / 'plan.json'} is the smallest plan of the whole model that fails")
        return "; ".join(written) or "nothing was written: the failure could not be cut out of the program"

    def __str__(self) -> str:
        failed = [row for row in self.rows if not row.ok]
        verdict = "the plan computes what the model computes" if self.ok else "the plan does NOT compute what the model computes"
        lines = [f"{verdict}: {len(self.rows)} comparisons, {len(failed)} failed, largest relative error {self.max_rel_error:.1e}"]
        shown = failed and [row for row in self.worst() if not row.ok][:SHOWN]
        lines += [f"  step {r.step}  {r.kind:<9} {r.name}  {r.error:.1e} (at most {r.tolerance:.0e})" for r in shown]
        if len(failed) > SHOWN:
            lines.append(f"  and {len(failed) - SHOWN} more")
        if self.first_difference:
            lines.append(f"first difference: {self.first_difference}")
        if self.shrunk:
            lines.append(str(self.shrunk))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
