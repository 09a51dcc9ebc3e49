"""A diagnosis on the terminal."""

from __future__ import annotations

import json

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .run import Diagnosis

MARK = {"ok": ("ok", "green"), "note": ("note", "yellow"), "wrong": ("WRONG", "bold red")}


def diagnosis_report(found: Diagnosis) -> Group:
    """Everything that was looked at, and below it what to do."""
    parts: list[RenderableType] = []
    for part in dict.fromkeys(f.part for f in found.findings):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        table.add_column(part, min_width=18)
        table.add_column("found", overflow="fold")
        table.add_column("")
        for f in (f for f in found.findings if f.part == part):
            table.add_row(f.name, f.value, Text(*MARK[f.level]))
        parts += [table, Text()]
    todo = sorted((f for f in found.findings if f.do), key=lambda f: f.level != "wrong")
    parts += [Text(f"{MARK[f.level][0]:<6} {f.name}: {f.do}") for f in todo]
    if todo:
        parts.append(Text())
    wrong = sum(f.level == "wrong" for f in found.findings)
    parts.append(Text("Something must be mended before training." if wrong else "This machine can train."))
    return Group(*parts)


def diagnosis_text(found: Diagnosis) -> str:
    """All of it as JSON."""
    return json.dumps(found.json(), indent=1, ensure_ascii=False, allow_nan=False)
