"""A calibration on the terminal: the machine's numbers, and how far predictions lay from what was measured."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..costs.device import ClusterProfile
from ..costs.space import MESSAGES


def calibration_report(profile: ClusterProfile, path: str | Path) -> Group:
    """What was found, and the error bands."""
    calibration, device = profile.calibration, profile.device
    assert calibration is not None
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in device.peak_flops.items())
    lines = [
        f"{device.name}: {calibration.ranks} ranks of {calibration.threads} threads, {calibration.backend}, {calibration.seconds:.0f} s",
        f"best of matrix products, GFLOP/s: {rates}",
        f"copies {device.memory_bandwidth_bytes_s / 1e9:.3g} GB/s, to the host {device.host_bandwidth_bytes_s / 1e9:.3g} GB/s, "
        f"a launch {device.launch_s * 1e6:.3g} µs",
    ]
    for curve in profile.links.intra.curves:
        if curve.kind in MESSAGES:
            least, rate = curve.points[0][1] * 1e6, max(sent / s for sent, s in curve.points) / 1e9
            lines.append(f"{curve.kind.replace('_', '-')} of {curve.group}: {least:,.0f} µs at least, {rate:.3g} GB/s at most")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("prediction of")
    for name in ("judged", "median error", "nine of ten within"):
        table.add_column(name, justify="right")
    for r in calibration.residuals:
        table.add_row(r.kind.replace("_", "-"), str(r.points), f"{r.median:.0%}", f"{r.p90:.0%}")
    parts: list[RenderableType] = [*map(Text, lines), Text(), table, Text(), Text(f"written: {path}   use it: --cluster {path}")]
    return Group(*parts)
