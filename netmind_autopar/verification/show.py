"""A report on the terminal: verdict, the worst rows, the first difference."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .report import SHOWN, Report


def verify_report(report: Report) -> Group:
    """The outcome of `verify`: verdict, the rows furthest beyond (or closest to) their tolerance, the first operation that differs."""
    failed = sum(not row.ok for row in report.rows)
    verdict = Text(
        "the plan computes what the model computes" if report.ok else "the plan does NOT compute what the model computes",
        style="green" if report.ok else "bold red",
    )
    count = f"{failed} of {len(report.rows)} comparisons failed" if failed else f"{len(report.rows)} comparisons"
    parts: list[RenderableType] = [verdict + Text(f": {count}, largest relative difference {report.max_rel_error:.1e}", style="")]
    shown = [row for row in report.worst() if failed == 0 or not row.ok][: SHOWN if failed else 3]
    if shown:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for name in ("step", "what", "name", "error", "at most"):
            number = name in ("step", "error", "at most")
            table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in shown:
            error = Text(f"{row.error:.1e}", style="" if row.ok else "red")
            table.add_row(str(row.step), row.kind, row.name, error, f"{row.tolerance:.0e}")
        parts.append(table)
        hidden = (failed or len(report.rows)) - len(shown)
        parts += [Text(f"… {hidden} more", style="dim")] if hidden else []
    if report.first_difference:
        parts.append(Text(f"first operation that differs: {report.first_difference}"))
    if report.shrunk:
        parts.append(Text(str(report.shrunk)))
    return Group(*parts, *(Text(f"note: {note}", style="dim") for note in report.notes))
