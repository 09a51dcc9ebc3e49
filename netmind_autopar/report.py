"""Plans as people read them: tables of what is split where, what is sent, what the memory holds and where the time goes."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .costs.device import ClusterProfile, error_band
from .ir.mesh import Mesh
from .ir.plan import Cost, Plan
from .ir.planrows import Alternative
from .ir.spec import Placement, Replicate, Shard, local_bytes, local_shape, plain
from .solver.explain import ClassRow, ConversionRow
from .wording import _digits, fusion_lines, precision_rows, rate, seconds, size, words

BAR = 24  # columns of a full bar
HEAVY = ("mm", "addmm", "bmm", "convolution", "attention", "embedding", "_softmax", "_log_softmax", "nll_loss", "sum_exp")
PARTS = (("compute", "compute_s"), ("communication", "communication_s"), ("recomputation", "recompute_s"), ("transfers", "transfer_s"))


@dataclass(frozen=True)
class ParameterRow:
    """All parameters of one class: `count` of them, one shape, one placement per mesh axis. Bytes are of the whole class."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...]
    device_bytes: int


def placements_of(plan: Plan, name: str, rank: int, variant: int = 0) -> tuple[Placement, ...]:
    """How a plan stores a parameter: its class is the choice of that name, `*` standing for the numbers of repeated blocks.

    variant: parameters of repeated blocks whose shapes differ are classes of their own, numbered in the model's order.
    """
    choice = plan.choices.get(name, "")
    wanted = name + (f"~{variant}" if variant else "")
    for key, found in plan.choices.items() if not choice else ():
        if "*" in key and re.fullmatch(re.escape(key).replace(r"\*", r"\d+"), wanted):
            choice = found
            break
    symbols = choice.split() or ["-"] * len(plan.mesh)
    letters = [f"d{i}" for i in range(rank)]
    return tuple(Shard(letters.index(s)) if s in letters else Replicate() for s in symbols)


def parameter_rows(plan: Plan, parameters: Iterable[tuple[str, torch.Tensor]]) -> list[ParameterRow]:
    """One row per repeated class of parameters: same name but for the block's number, same shape, same placements."""
    rows: dict[tuple, list[str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    variants: dict[str, list[tuple]] = {}
    for name, tensor in parameters:
        tensors[name] = tensor
        starred = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        shapes = variants.setdefault(starred, [])
        if (shape := tuple(tensor.shape)) not in shapes:
            shapes.append(shape)
        key = (starred, shape, placements_of(plan, name, tensor.dim(), shapes.index(shape)))
        rows.setdefault(key, []).append(name)
    out = []
    for (starred, shape, placements), names in rows.items():
        spec = plain(shape, tensors[names[0]].dtype, placements)
        shown = starred if len(names) > 1 else names[0]
        out.append(ParameterRow(shown, len(names), shape, spec.dtype, placements, len(names) * local_bytes(spec, plan.sizes)))
    return out


def plan_report(
    plan: Plan,
    title: str = "",
    parameters: Sequence[ParameterRow] = (),
    work: Sequence[ClassRow] = (),
    sent: Sequence[ConversionRow] = (),
    *,
    learnt: Sequence[tuple[str, str]] = (),
    compared: Sequence[Alternative] = (),
    show_all: bool = False,
) -> Group:
    """The whole report. learnt: (op, rule) of unlisted ops. compared: baselines on the mesh. `show_all`: whole tables, every choice."""
    parts: list[RenderableType] = [_header(plan, title)]
    parts += [Text(), _rivals("Meshes", "mesh", plan, plan.alternatives)] if plan.alternatives else []
    parts += [Text(), _rivals("Baselines on this mesh", "baseline", plan, compared)] if compared else []
    parts += [Text(), _time(plan.cost), Text(), _memory(plan)]
    if plan.micro_batches > 1:
        parts.append(Text(f"The step is {plan.micro_batches} micro-batches, one after the other; their gradients are added up."))
    parts += [Text(), _saved(plan, show_all)] if plan.recompute or plan.regather or plan.offload or plan.state else []
    parts += [Text(), _parameters(plan, parameters, show_all)] if parameters else []
    parts += [Text(), _work(plan, work, show_all)] if work else []
    parts += [Text(), _collectives(plan), *((Text(), _conversions(sent, show_all)) if sent else ())]
    parts += [Text(), _learnt(learnt)] if learnt else []
    parts += [Text(), _replicated(plan, show_all)] if plan.replicated else []
    parts += [Text(), Text("\n".join(fusion_lines(plan)))] if plan.fusions else []
    parts += [Text(), _choices(plan)] if show_all else []
    return Group(*parts)


def _table(*columns: str, right: str = "") -> Table:
    """A plain table; columns named in `right` (separated by commas) hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in columns:
        number = bool(name) and name in right.split(",")
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _section(title: str, table: Table, hidden: int = 0) -> Group:
    """A table under its title, and how many of its rows were left out."""
    more = [Text(f"… {hidden} more with --all", style="dim")] if hidden else []
    return Group(Text(title, style="bold"), table, *more)


def _header(plan: Plan, title: str) -> RenderableType:
    axes = " × ".join(f"{a.name} {a.size}" for a in plan.mesh)
    devices = math.prod(plan.sizes)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("plan", Text(title or plan.graph_hash, style="bold") + Text(f" on {devices} device{'s' * (devices > 1)}"))
    grid.add_row("mesh", f"{axes} ({plan.cluster})")
    beside = f", {seconds(plan.cost.step_s)} one after the other" if plan.cost.timeline_s else ""
    grid.add_row("step", Text(seconds(plan.cost.predicted_s), style="bold") + Text(" predicted" + beside + _band(plan)))
    limit = f" of {size(plan.memory_limit_bytes)}" if plan.memory_limit_bytes else ", no limit"
    grid.add_row("memory", Text(size(plan.cost.peak_bytes), style="bold") + Text(f" predicted peak per device{limit}"))
    for name, text in [*precision_rows(plan), *_proof(plan)]:
        grid.add_row(name, text)
    if plan.random_costs is not None:
        grid.add_row("costs", Text(f"random, seed {plan.random_costs}: the seconds mean nothing", style="yellow"))
    return grid


def _band(plan: Plan) -> str:
    """`, ± 12%` where the cluster was calibrated and its profile is still there."""
    band = error_band(plan.cluster, plan.cost.compute_s + plan.cost.recompute_s, plan.cost.communication_s)
    return "" if band is None or plan.random_costs is not None else f", ± {band:.0%} (nine of ten single ops and collectives lie within)"


def _proof(plan: Plan) -> list[tuple[str, str]]:
    if plan.status == "given":
        return [("bound", "none: this plan was given, nothing is proven about it")]
    state, least = (
        "optimal" if plan.status == "optimal" else "best found",
        f"no plan with equal blocks takes less than {seconds(plan.bound_s)}",
    )
    rows = [("bound", f"{least}; gap {plan.gap:.2%}, {state}")]
    if plan.cost.timeline_s:
        rows = [("sum", f"one after the other {least}; {seconds(plan.least_sum_s)} found, gap {plan.gap:.2%}, {state}")]
        rows.insert(0, ("bound", f"no plan takes less than {seconds(plan.timeline_bound_s)}; gap {plan.timeline_gap:.2%}"))
    spent = f", {seconds(plan.solve_s)} of CPU with the capture" if plan.solve_s else ""
    return [*rows, ("solver", f"{plan.solver or 'no integer program was needed'}{spent}")]


def _rivals(title: str, kind: str, plan: Plan, rows: Sequence[Alternative]) -> Group:
    """Other meshes or baselines beside the plan; a time after ≥ is a bound."""
    table = _table(kind, "step", "of the plan's", "memory", "", right="step,of the plan's,memory")
    table.columns[0].no_wrap = True
    for r in rows:
        step, ours = r.timeline_s or r.step_s or r.bound_s, plan.cost.predicted_s if r.timeline_s else plan.cost.step_s
        time = ("" if r.step_s else "≥ ") + seconds(step) if step else ""
        share = f"{step / ours:.2f} ×" if step and ours else ""
        why = ": ".join(filter(None, (r.status * (r.status != "planned"), r.why)))
        table.add_row(r.name, time, share, size(r.peak_bytes) if r.peak_bytes else "", Text(why, style="dim"))
    return _section(title, table)


def _bar(share: float) -> Text:
    full = max(0, min(BAR, round(share * BAR)))
    return Text("█" * full, style="cyan") + Text("·" * (BAR - full), style="dim")


def _time(cost: Cost) -> Group:
    table = _table("", "time", "share", " ", right="time,share")
    for name, field in PARTS:
        value = getattr(cost, field)
        if value or field in ("compute_s", "communication_s"):
            share = value / cost.step_s if cost.step_s else 0.0
            table.add_row(name, seconds(value), f"{share:.0%}", _bar(share))
    if not cost.timeline_s:
        return _section("Where the step's time goes", table)
    beside = _table("", "busy", "exposed", "hidden", right="busy,exposed,hidden")
    for s in cost.streams:
        beside.add_row(s.name, seconds(s.busy_s), seconds(s.exposed_s), f"{1 - s.exposed_s / s.busy_s:.0%}" if s.busy_s else "")
    title = f"Beside compute: {seconds(cost.timeline_s)} a step, {seconds(cost.overlapped_s)} less than one after the other"
    return Group(_section("Where the step's time goes, one after the other", table), Text(), _section(title, beside))


def _memory(plan: Plan) -> Group:
    table = _table("", "size", "share", " ", right="size,share")
    held = {name: value for name, value in plan.cost.memory if value}
    total = sum(held.values())
    for name, value in held.items():
        label = f"optimizer ({plan.optimizer})" if name == "optimizer" else name.replace("_", " ")
        table.add_row(label, size(value), f"{value / total:.0%}", _bar(value / total))
    return _section("Memory per device at the peak", table)


def _saved(plan: Plan, show_all: bool) -> Group:
    """What is done to fit into the memory."""
    table = _table("", "")
    kinds = (
        ("runs again in backward", plan.recompute),
        ("gathered again", plan.regather),
        ("waits elsewhere", plan.offload),
        ("waits between steps", plan.state),
    )
    hidden = 0
    for what, entries in kinds:
        shown = entries if show_all else entries[:6]
        hidden += len(entries) - len(shown)
        for i, entry in enumerate(shown):
            table.add_row("" if i else what, _fold(entry, 60))
    worth = [Text(f"One more GiB per device would save about {seconds(plan.gib_worth_s)} a step.")] if plan.gib_worth_s else []
    return Group(_section("To fit into the memory", table, hidden), *worth)


def _parameters(plan: Plan, rows: Sequence[ParameterRow], show_all: bool) -> Group:
    table = _table("", "shape", "stored", "on a device", "bytes", right="bytes")
    shown = rows if show_all else rows[:40]
    group = _Blocks(table)
    for r in shown:
        label = group.label(r.name, r.count)
        spec = plain(r.shape, r.dtype, r.placements)
        stored = words(r.placements, len(r.shape), plan.axis_names)
        local = local_shape(spec, plan.sizes)
        table.add_row(label, _shape(r.shape), Text(stored, style="" if stored != "whole" else "dim"), _shape(local), size(r.device_bytes))
    return _section("Parameters (bytes of all repetitions together, on one device)", table, len(rows) - len(shown))


class _Blocks:
    """Labels of rows; those of a repeated block are indented under a line that says how often it repeats."""

    def __init__(self, table: Table) -> None:
        self.table, self.block = table, ""
        table.columns[0].no_wrap = True

    def label(self, name: str, count: int) -> str:
        prefix, star, rest = name.partition("*.")
        if star and prefix != self.block:
            self.table.add_row(Text(_fold(f"{prefix}*"), style="bold"), Text(f"{count} times", style="dim"))
        self.block = prefix if star else ""
        return _fold("  " + rest if star else name)


def _fold(name: str, width: int = 28) -> str:
    """A dotted name in lines of at most `width` columns, broken before dots and the like; the further lines are indented."""
    lines = [""]
    for part in re.findall(r"[.@_]*[^.@_]+", name):
        if len(lines[-1]) + len(part) > width and lines[-1].strip():
            lines.append("    ")
        lines[-1] += part
    return "\n".join(lines)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _work(plan: Plan, rows: Sequence[ClassRow], show_all: bool) -> Group:
    """What the operations make, and how that lies on the devices; only the main ones of forward unless `show_all`."""
    table = _table("", "result", "laid out")
    group = _Blocks(table)
    for r in rows:
        kind = re.sub(r"(\.\d+)?(~\d+)?$", "", r.name).rpartition(".")[2]
        if r.role != "op" or not (show_all or kind in HEAVY):
            continue
        label = group.label(r.name, r.count)
        for i, spec in enumerate(r.gives):
            if spec is not None and (show_all or i == 0):
                layout = words(spec.placements, len(spec.shape), plan.axis_names)
                table.add_row("" if i else label, _shape(spec.shape), Text(layout, style="" if layout != "whole" else "dim"))
    return _section("Every operation" if show_all else "Main operations of forward", table)


def _conversions(rows: Sequence[ConversionRow], show_all: bool) -> Group:
    table = _table("result of, for", "by", "times", "bytes", "time", right="times,bytes,time")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    sending = [r for r in rows if r.bytes]
    shown = sending if show_all else sending[:15]
    for r in shown:
        more = f"\n    and {len(r.consumers) - 1} more" if len(r.consumers) > 1 else ""
        by = "\n".join(step.replace("_", "-") for step in r.path)
        table.add_row(f"{_fold(r.producer)}\n{_fold('  for ' + r.consumers[0])}{more}", by, str(r.count), size(r.bytes), seconds(r.seconds))
    return _section("What is sent, and for what", table, len(sending) - len(shown))


def _collectives(plan: Plan) -> RenderableType:
    if not plan.collectives:
        return Text("Nothing is sent between devices.")
    table = _table("collective", "axis", "phase", "times", "bytes", "time", right="times,bytes,time")
    for c in sorted(plan.collectives, key=lambda c: (-c.seconds, c.kind, c.axis, c.phase)):
        table.add_row(c.kind.replace("_", "-"), c.axis, c.phase, str(c.count), size(c.bytes), seconds(c.seconds))
    return _section("What each device sends in a step", table)


def _replicated(plan: Plan, show_all: bool) -> Group:
    table = _table("operation", "×", "time", "share", "where", right="×,time,share")
    rows = sorted(plan.replicated, key=lambda r: (-r.seconds, r.op, r.where))
    for r in rows if show_all else rows[:10]:
        share = r.seconds / plan.cost.step_s if plan.cost.step_s else 0.0
        table.add_row(r.op, str(r.count), seconds(r.seconds), f"{share:.1%}", f"{r.where}\n{r.why}" if r.why else r.where)
    hidden = 0 if show_all else max(0, len(rows) - 10)
    return _section("Not split: no sharding rule, so every device computes the whole", table, hidden)


def _learnt(rules: Sequence[tuple[str, str]]) -> Group:
    lines = [Text(f"{op.removesuffix('.default')}   {rule}") for op, rule in rules]
    return Group(Text("Rules of operations that no table lists, found by running them or given by hand", style="bold"), *lines)


def _choices(plan: Plan) -> Group:
    table = _table("operation", *plan.axis_names)
    for name, choice in plan.choices.items():
        table.add_row(name, *choice.split())
    return _section("Every choice: the letter of the operation's rule that an axis splits", table)


def diff_report(a: Plan, b: Plan, names: tuple[str, str] = ("a", "b")) -> Group | None:
    """What differs between two plans, or None when nothing does."""
    if a == b:
        return None
    table = _table("", *names)
    facts = {
        "graph": [p.graph_hash for p in (a, b)],
        "mesh": [",".join(f"{x.name}={x.size}" for x in p.mesh) for p in (a, b)],
        "cluster": [a.cluster, b.cluster],
        "optimizer": [a.optimizer, b.optimizer],
        "micro-batches": [str(p.micro_batches) for p in (a, b)],
        "limit": [size(p.memory_limit_bytes) if p.memory_limit_bytes else "none" for p in (a, b)],
        "step": [seconds(p.cost.predicted_s) for p in (a, b)],
        "communication": [seconds(p.cost.communication_s) for p in (a, b)],
        "peak": [size(p.cost.peak_bytes) for p in (a, b)],
    }
    for name, (left, right) in facts.items():
        table.add_row(name, left, Text(right, style="bold" if left != right else "dim"))
    parts: list[RenderableType] = [table, *_changes("Choices that differ", a.choices, b.choices, names)]
    sent = [{f"{c.kind} {c.axis} {c.phase}": f"{c.count} × , {size(c.bytes)}, {seconds(c.seconds)}" for c in p.collectives} for p in (a, b)]
    parts += _changes("Collectives that differ", sent[0], sent[1], names)
    return Group(*parts)


def _changes(title: str, a: Mapping[str, str], b: Mapping[str, str], names: tuple[str, str]) -> list[RenderableType]:
    different = [key for key in [*a, *(k for k in b if k not in a)] if a.get(key) != b.get(key)]
    if not different:
        return []
    table = _table("", *names)
    for key in different:
        table.add_row(key, a.get(key, "—"), b.get(key, "—"))
    return [Text(), _section(title, table)]


def mesh_report(mesh: Mesh) -> Group:
    """The axes of a mesh with their links, and the device."""
    title = f"{mesh.size} device{'s' * (mesh.size > 1)} of {mesh.cluster}: {mesh.device.name}, {size(mesh.device.memory_bytes)} each"
    table = _table("axis", "size", "sends", "latency", right="size,sends,latency")
    for axis in mesh.axes:
        table.add_row(axis.name, str(axis.size), rate(axis.bandwidth_bytes_s), seconds(axis.latency_s))
    return _section(title, table)


def clusters_report(profiles: Iterable[ClusterProfile]) -> Group:
    """One line per preset: the device, and what it can send inside a node and between nodes."""
    table = _table(
        "cluster", "device", "memory", "TFLOP/s", "a node", "inside it", "between", right="memory,TFLOP/s,a node,inside it,between"
    )
    for p in profiles:
        best = max(p.device.peak_flops.get(name, 0.0) for name in ("bfloat16", "float16", "float32"))
        table.add_row(
            p.name,
            p.device.name,
            size(p.device.memory_bytes),
            _digits(best / 1e12),
            str(p.node_size),
            rate(p.links.intra.bandwidth_bytes_s),
            rate(p.links.inter.bandwidth_bytes_s) if p.links.inter else "—",
        )
    return _section("Clusters (TFLOP/s of bfloat16 or float16 where there is one; a node's devices; what one device can send)", table)


def console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console that writes plain text when its file is not a terminal."""
    return Console(file=file or sys.stdout, width=width, highlight=False, soft_wrap=False, emoji=False, markup=False)


def render(report: RenderableType, width: int = 100) -> str:
    """The report as plain text, `width` columns wide."""
    text = io.StringIO()
    console(text, width).print(report)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
