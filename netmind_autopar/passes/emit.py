"""Write a lowered program as Python: one file for all ranks, the code that runs is the code one reads.

The file defines `build(place)`. It binds what differs from rank to rank (collectives, local sizes, device) and returns
`forward(*inputs) -> (results, saved)` and `backward(saved, *tangents) -> gradients`. Every name is deleted after its last use,
so that memory is freed when the plan says so. A collective that travels while other ops run is two lines: `a = gather_0.start(x)`
and `y = a.wait()`.

Of a program in micro-batches, or whose gradients wait, `backward(saved, total, *tangents)` gives each gradient away as it is made,
`total(i, gradient)`, and `finish(*totals) -> gradients` does what comes after the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from ..ir.errors import GraphError
from ..ir.local import Local
from ..ir.plan import Plan
from ..ir.program import Program, is_getitem, source, tensor_args
from ..runtime.accumulate import meet
from ..runtime.collectives import BUCKETS, MOVES, STARTS, wait
from ..runtime.offload import MARKS, fetch, offload, release
from .defer import FINISH, waits
from .pipeline import Gradients
from .regions import Region, split_regions
from .reuse import Reuse, reuse

HEADER = '''"""Emitted by netmind-autopar. Mesh {mesh}, plan {plan}, graph {graph}. One file for every rank."""

{types}import torch

{kernels}{tiers}

aten = torch.ops.aten
autopar = {autopar}
inf, nan = float("inf"), float("nan")
'''
# Ops of our own: called as the plain functions they are, for nothing here needs the dispatcher; as ops where a compiler reads along.
_KERNELS = {
    False: {
        "types": "from types import SimpleNamespace\n\n",
        "kernels": "from netmind_autopar.kernels import DIRECT",
        "autopar": 'SimpleNamespace(**{str(op).split(".")[1]: call for op, call in DIRECT.items()})',
    },
    True: {"types": "", "kernels": "import netmind_autopar.kernels", "autopar": "torch.ops.autopar"},
}


@dataclass
class _Writer:
    """Collects the constants that `build` binds, one name for each distinct thing."""

    axes: tuple[str, ...]
    constants: dict[str, str] = field(default_factory=dict)  # expression → name
    count: dict[str, int] = field(default_factory=dict)
    regions: list[str] | None = None  # functions that a compiler may compile; None: none are made
    reuse: Reuse = field(default_factory=Reuse)  # what is written over an operand

    def bind(self, stem: str, expression: str) -> str:
        if expression not in self.constants:
            n = self.count.get(stem, 0)
            self.count[stem] = n + 1
            self.constants[expression] = f"{stem}_{n}"
        return self.constants[expression]


def emit(program: Program, plan: Plan, *, inference: bool = False, gradients: Gradients = "whole", regions: bool = False) -> str:
    """Source text of one lowered program. With `inference`, forward alone, saving nothing. gradients: as it was lowered with.

    regions: what stands between two collectives is a function of its own, for a compiler (passes/regions.py).
    """
    writer = _Writer(plan.axis_names, regions=[] if regions else None)
    forward, backward = split_phases(program)
    if inference:  # nothing waits for a backward
        forward = [n for n in forward if n.target not in (offload, release)]
    waiting = gradients == "waiting"
    kept = [] if inference else saved_nodes(program, forward, backward, finished=waiting or program.micro is not None)
    results = [n for n, o in zip(_results(program), program.outputs, strict=True) if o.role != "grad"]
    grads = [n for n, o in zip(_results(program), program.outputs, strict=True) if o.role == "grad"]
    inputs = [program.node(i.node) for i in program.inputs if i.role != "tangent"]
    tangents = [program.node(i.node) for i in program.inputs if i.role == "tangent"]
    if not regions:  # a compiler does it by itself
        ends = [*results, *grads, *unfinished(program, grads)]
        writer.reuse = reuse([*forward, *(() if inference else (*backward, *_finish(program)))], ends)
    parts = [_function("forward", inputs, forward, results, kept, writer, program)]
    names = "forward" if inference else "forward, backward"
    if not inference and (program.micro or waiting):
        late = [n for n, o in zip(_results(program), program.outputs, strict=True) if waits(o)] if waiting else grads
        now = [n for n, o in zip(_results(program), program.outputs, strict=True) if o.role == "grad" and not waits(o)] if waiting else []
        parts += _in_turns(kept, tangents, backward, late, now, writer, program)
        names += ", finish" + (f", {_waiting(program, late)}" if waiting else "")
    elif not inference:
        parts.append(_backward(kept, tangents, backward, grads, writer, program, "meet" if gradients == "closing" else ""))
    tiers = (
        "\nfrom netmind_autopar.runtime import offload as tiers"
        if any(n.target in MARKS for n in (forward if inference else (*forward, *backward)))
        else ""
    )
    mesh = ",".join(f"{a.name}={a.size}" for a in plan.mesh)
    head = HEADER.format(mesh=mesh, plan=plan.hash(), graph=plan.graph_hash, tiers=tiers, **_KERNELS[regions])
    bound = [f"    {name} = {expression}" for expression, name in writer.constants.items()]
    return "\n".join(
        [
            head,
            "",
            "def build(place):",
            '    """Bind rank, process groups and device."""',
            "    device = place.device",
            *bound,
            "",
            *(writer.regions or ()),
            *parts,
            f"    return {names}",
            "",
        ]
    )


def split_phases(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """The ops of forward and of backward, in order. Raises GraphError when forward needs backward."""
    forward = [n for n in program.graph.nodes if n.op in ("call_function", "get_attr") and n.meta["phase"] == "forward"]
    backward = [n for n in program.graph.nodes if n.op in ("call_function", "get_attr") and n.meta["phase"] == "backward"]
    late = set(backward) | {program.node(i.node) for i in program.inputs if i.role == "tangent"}
    for node in forward:
        if wrong := next((a for a in tensor_args(node) if a in late), None):
            raise GraphError(f"{node.name} of forward needs {wrong.name} of backward", where=node.meta.get("where", ""))
    for node, out in zip(_results(program), program.outputs, strict=True):
        if out.role != "grad" and node in late:
            raise GraphError(f"the result {out.name} of forward is made by {node.name} of backward", where=node.meta.get("where", ""))
    return forward, backward


def saved_nodes(program: Program, forward: Sequence[fx.Node], backward: Sequence[fx.Node], *, finished: bool = False) -> list[fx.Node]:
    """What forward hands to backward: values and inputs that backward or a gradient output takes. finished: some end in `finish`."""
    early = {*forward, *(program.node(i.node) for i in program.inputs if i.role != "tangent")}
    takers = [*backward]
    grads = [n for n, o in zip(_results(program), program.outputs, strict=True) if o.role == "grad"]
    grads = unfinished(program, [n for n in grads if n is not None]) if finished else grads
    wanted = {a for node in takers for a in tensor_args(node)} | {n for n in grads if n is not None}
    return [n for n in program.graph.nodes if n in early and n in wanted and not isinstance(n.meta["val"], (tuple, list))]


def _results(program: Program) -> list[fx.Node]:
    return tensor_args(next(n for n in program.graph.nodes if n.op == "output"))


def _function(
    name: str,
    inputs: Sequence[fx.Node],
    body: Sequence[fx.Node],
    results: Sequence[fx.Node],
    kept: Sequence[fx.Node],
    writer: _Writer,
    program: Program,
) -> str:
    lines = [f"    def {name}({', '.join(n.name for n in inputs)}):"]
    lines += _body(body, [*results, *kept], writer, program, inputs)
    saved = ", ".join(n.name for n in kept)
    lines.append(f"        return ({_tuple(results)}), [{saved}]")
    return "\n".join([*lines, ""])


def _backward(
    kept: Sequence[fx.Node],
    tangents: Sequence[fx.Node],
    body: Sequence[fx.Node],
    grads: Sequence[fx.Node],
    writer: _Writer,
    program: Program,
    meets: str,
) -> str:
    lines = _opened(kept, ["saved", *filter(None, [meets]), *(n.name for n in tangents)])
    lines += _body(body, grads, writer, program, [*kept, *tangents])
    lines.append(f"        return ({_tuple(grads)})")
    return "\n".join([*lines, ""])


def _opened(kept: Sequence[fx.Node], parameters: Sequence[str]) -> list[str]:
    """How `backward` begins: what forward saved is taken out, so that each name frees its tensor."""
    lines = [f"    def backward({', '.join(parameters)}):"]
    return lines + ([f"        ({_tuple(kept)}) = saved", "        saved.clear()"] if kept else [])


def unfinished(program: Program, grads: Sequence[fx.Node]) -> list[fx.Node]:
    """What a micro-batch gives for these gradients, each once, in order: what the phase "finish" starts from."""
    finish = _finish(program)
    made = dict.fromkeys(a for node in finish for a in tensor_args(node) if a not in finish)
    return [*made, *(n for n in dict.fromkeys(grads) if n not in finish and n not in made)]


def _finish(program: Program) -> dict[fx.Node, None]:
    return dict.fromkeys(n for n in program.graph.nodes if n.meta.get("phase") == FINISH)


def _in_turns(
    kept: Sequence[fx.Node],
    tangents: Sequence[fx.Node],
    body: Sequence[fx.Node],
    grads: Sequence[fx.Node],
    now: Sequence[fx.Node],
    writer: _Writer,
    program: Program,
) -> list[str]:
    """`backward` and `finish` of a program in micro-batches, or of one whose gradients wait but for those that are needed `now`."""
    given = unfinished(program, grads)
    joins = program.micro.joins if program.micro else ()
    once = {n for n, join in zip(_results(program), joins, strict=False) if join == "same"}  # each turn makes all of it
    sends = {node: f"        total({i}, {node.name}{', once=True' if node in once else ''})" for i, node in enumerate(given)}
    lines = _opened(kept, ["saved", "total", *(n.name for n in tangents)])
    lines += [sends[n] for n in (*kept, *tangents) if n in sends]
    lines += _body(body, now, writer, program, [*kept, *tangents], sends)
    lines += [f"        return ({_tuple(now)})"] if now else []
    done = [f"    def finish({', '.join(n.name for n in given)}):"]
    done += _body(list(_finish(program)), grads, writer, program, given)
    done.append(f"        return ({_tuple(grads)})")
    return ["\n".join([*lines, ""]), "\n".join([*done, ""])]


def _waiting(program: Program, grads: Sequence[fx.Node]) -> str:
    """Names of what `finish` takes, and for every gradient which of these it is finished from."""
    given, finish = unfinished(program, grads), _finish(program)
    at = {node: i for i, node in enumerate(given)}

    def position(node: fx.Node) -> int:
        while node in finish:
            node = tensor_args(node)[0]
        return at[node]

    return f"{tuple(n.name for n in given)}, {tuple(map(position, grads))}"


def _tuple(nodes: Iterable[fx.Node]) -> str:
    return "".join(f"{n.name}, " for n in nodes).rstrip(" ")


def _body(
    body: Sequence[fx.Node],
    kept: Sequence[fx.Node],
    writer: _Writer,
    program: Program,
    given: Sequence[fx.Node],
    after: Mapping[fx.Node, str] = MappingProxyType({}),
) -> list[str]:
    """One line per op, or a few per region. after: a line more behind that of an op, or of its region."""
    if writer.regions is None:
        return _lines([_Item(n, (n,)) for n in body], kept, writer, program, given, after)
    places = split_regions(body, {*kept, *after})
    items = [_Item(p, p.gives, p.takes) if isinstance(p, Region) else _Item(p, (p,)) for p in places]
    return _lines(items, kept, writer, program, given, after)


@dataclass(frozen=True, eq=False)
class _Item:
    """An op, or a region: what it makes, and (of a region) what it takes."""

    what: fx.Node | Region
    makes: tuple[fx.Node, ...]
    takes: tuple[fx.Node, ...] = ()

    @property
    def arguments(self) -> Sequence[fx.Node]:
        return tensor_args(self.what) if isinstance(self.what, fx.Node) else self.takes


def _lines(
    items: Sequence[_Item],
    kept: Sequence[fx.Node],
    writer: _Writer,
    program: Program,
    given: Sequence[fx.Node],
    after: Mapping[fx.Node, str],
) -> list[str]:
    """The lines of every item, one `del` after the last use of each name."""
    inside, last = {n for item in items for n in item.makes}, {}
    for item in items:
        for arg in item.arguments:
            last[arg] = item
    keep = set(kept)
    free: dict[_Item, list[fx.Node]] = {}
    for value, user in last.items():
        if value not in keep and (value in inside or value in given):
            free.setdefault(user, []).append(value)
    lines: list[str] = []
    module = None
    for item in items:
        dead = free.get(item, [])
        if isinstance(item.what, Region):
            lines += _call_of_region(item.what, dead, writer, program)
            dead, module = [], None
        else:
            if (item.what.meta.get("module") or "") != module:
                module = item.what.meta.get("module") or ""
                lines.append(f"        # {module or 'model'}")
            lines.append(f"        {item.what.name} = {_call(item.what, writer)}{_comment(item.what, program)}")
        lines += [after[n] for n in item.makes if n in after]
        dead = [n.name for n in (*dead, *item.makes) if n in dead or (n not in last and n not in keep)]
        if dead:
            lines.append(f"        del {', '.join(dead)}")
    return lines


def _call_of_region(region: Region, dead: Sequence[fx.Node], writer: _Writer, program: Program) -> list[str]:
    """Writes the region as a function, and returns the lines that call it with a list, so that what is `dead` then is freed inside."""
    assert writer.regions is not None
    name = f"region_{len(writer.regions)}"
    lines = [f"    def {name}(args):", *([f"        ({_tuple(region.takes)}) = args", "        args.clear()"] if region.takes else [])]
    lines += _lines([_Item(n, (n,)) for n in region.nodes], region.gives, writer, program, region.takes, {})
    lines += [f"        return ({_tuple(region.gives)})", "", f"    {name} = place.region({name}, {region.ops})", ""]
    writer.regions.append("\n".join(lines))
    call = [f"        args = [{', '.join(n.name for n in region.takes)}]"]
    call += [f"        del {', '.join(n.name for n in dead)}"] * bool(dead)
    return [*call, f"        {_tuple(region.gives)} = {name}(args)".replace("         = ", "        ")]


def _comment(node: fx.Node, program: Program) -> str:
    producer, index = source(node)
    spec = program.specs.get(producer.name)
    shown = spec[index] if isinstance(spec, tuple) and is_getitem(node) else spec
    where = (node.meta.get("where") or "").split("  ")[0]
    text = "   ".join(t for t in ("" if isinstance(shown, tuple) or shown is None else str(shown), where) if t)
    return f"  # {text}" if text else ""


def _call(node: fx.Node, writer: _Writer) -> str:
    if node.op == "get_attr":
        return writer.bind("constant", f"place.constant({node.target!r})")
    if is_getitem(node):
        return f"{_text(node.args[0], writer)}[{node.args[1]}]"
    if node.target is wait:
        return f"{_text(node.args[0], writer)}.wait()"
    start = ".start" if node.target in STARTS else ""
    if node.target in MOVES:
        x, kind, axis, before, after = node.args
        own = ", own=True" * (node in writer.reuse.within)
        return f"{writer.bind(kind, f'place.move({kind!r}, {writer.axes[axis]!r}, {before!r}, {after!r}{own})')}{start}({x.name})"
    if node.target in BUCKETS:
        tensors, axis, op = node.args
        specs = ", ".join(repr(node.meta["specs"][i]) for i in range(len(tensors)))
        name = writer.bind("bucket", f"place.bucket({writer.axes[axis]!r}, {op!r}, [{specs}])")
        return f"{name}{start}([{', '.join(t.name for t in tensors)}])"
    if node.target in MARKS:
        args = [_text(a, writer) for a in node.args] + ["device"] * (node.target is fetch)
        return f"tiers.{node.target.__name__}({', '.join(args)})"  # type: ignore[union-attr]
    if node.target is meet:
        (x,) = tensor_args(node)
        return f"meet({x.name!r}, {x.name})"
    if not isinstance(node.target, torch._ops.OpOverload):
        raise GraphError(f"cannot emit a call of {node.target}", where=node.meta.get("where", ""))
    target, written = writer.reuse.instead.get(node, (node.target, None))
    args = [_text(a, writer) for a in node.args]
    kwargs = [f"{k}={_text(v, writer)}" for k, v in node.kwargs.items() if k not in ("device", "pin_memory")]
    if any(a.name == "device" for a in target._schema.arguments):
        kwargs.append("device=device")
    if written:
        kwargs.append(f"{written}={writer.reuse.over[node].name}")
    namespace, _, op = str(target).partition(".")
    if namespace == "autopar":  # called as the plain function it is: nothing here needs the dispatcher
        op = op.removesuffix(".default")
    elif namespace != "aten":  # prims, or an op of the user's
        namespace = f"torch.ops.{namespace}"
    return f"{namespace}.{op}({', '.join([*args, *kwargs])})"


def _text(value: Any, writer: _Writer) -> str:
    """An argument as source text."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, Local):
        return writer.bind(
            f"local_{value.what}", f"place.local({value.what!r}, {value.spec!r}, {value.parts}, {value.times}, {value.repeat})"
        )
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(v, writer) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, torch.device):
        return "device"
    return repr(value) if isinstance(value, (int, float, str, bool, complex)) or value is None else str(value)
