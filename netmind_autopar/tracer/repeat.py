"""Capture a deep model without tracing every block: trace it with four, and write down the program of all of them.

    find the blocks -> rehearse the model with 4 and with all blocks -> trace it with 4 -> expand

Three proofs before an expanded program is believed: the blocks are alike as modules (blocks.py); the steps that the *whole* model
takes in eager mode, forward and backward, are those of the model of four blocks with its period repeated (rehearse.py); and the
program traced with four blocks has such a period too, which written down for four blocks is that program, in everything. Where one
of them fails, for whatever reason, every block is traced.

What four blocks cannot tell apart (the last block's and block 2's, say) all blocks do: the period of the steps and that of the
program are read off four blocks by the same rules (period.py), and the rehearsal of all blocks shows whether they hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..ir.program import Input, Output, Program, Signature, tensor_args, values
from . import blocks, clean, clone, torch_private
from .assemble import title
from .period import NoPeriod, Pattern, Place, Step, cut
from .rehearse import Memo, Rehearsal, digest, frozen, rehearse
from .signature import Call, Const, Items, Record, Selection, Template

Trace = Callable[[nn.Module, Any, Selection], Program]  # of a fake model and its mode


def expanded(model: nn.Module, call: Call, select: Callable[[], Selection], trace: Trace, mode: Callable[[], Any]) -> Program:
    """The program of `model`, as a trace of all of it would have it, or NoPeriod (or whatever the model raises).

    `select` makes a fresh Selection, `mode` a fresh fake mode.
    """
    path, count = blocks.find(model)
    names = Names(path)

    fakes, memo = mode(), Memo()

    def rehearsed(keep: int) -> Rehearsal:
        with warnings.catch_warnings(), torch_private.as_in_export():
            warnings.simplefilter("ignore")
            return rehearse(shortened(model, fakes, path, keep), path, call, select(), names.split, fakes, memo)

    four, every = rehearsed(4), rehearsed(count)
    period = Pattern(four.steps, cut(four.steps, four.starts, four.backward))
    _check_steps(period, every, count - 2)
    if four.tangents != every.tangents:
        raise NoPeriod("blocks return outputs that carry gradients")

    fakes, one, two = mode(), select(), four.selection
    program = trace(shortened(model, fakes, path, 4), fakes, one)
    if one.paths != two.paths or one.kept != two.kept or not same_template(one.template, two.template):
        raise NoPeriod("traced outputs are not those of the rehearsal")
    parameters, buffers = clone.names(model)
    expander = _Expander(names, program, period, four, [*parameters, *buffers])
    if found := difference(expander.program(four, 4), program):
        raise NoPeriod(f"four blocks, written down again, are others: {found}")
    return expander.program(every, count)


def shortened(model: nn.Module, mode: Any, path: str, keep: int) -> nn.Module:
    """A fake copy of `model` with the first `keep` blocks alone."""
    rest = list(model.get_submodule(path).children())[keep:]
    copy = clone.fake_clone(model, mode, rest)
    entries = copy.get_submodule(path)._modules
    for name in list(entries)[keep:]:
        del entries[name]
    return copy


def _check_steps(period: Pattern, rehearsal: Rehearsal, copies: int) -> None:
    wanted = [step for step, _ in period.expand(copies)]
    if len(wanted) != len(rehearsal.steps):
        raise NoPeriod(f"{len(rehearsal.steps)} steps where {len(wanted)} were expected")
    if wanted != rehearsal.steps:
        i, step, real = next((i, *pair) for i, pair in enumerate(zip(wanted, rehearsal.steps, strict=True)) if pair[0] != pair[1])
        raise NoPeriod(f"step {i} differs: {real} instead of {step}")


class Names:
    """Names of modules, parameters and buffers with and without their block's number."""

    def __init__(self, path: str) -> None:
        self.prefix = f"{path}." if path else ""

    def split(self, name: str) -> tuple[str, int | None]:
        number, dot, rest = name[len(self.prefix) :].partition(".")
        if name.startswith(self.prefix) and number.isdigit():
            return dot + rest, int(number)
        return name, None

    def join(self, name: str, block: int | None) -> str:
        return name if block is None else f"{self.prefix}{block}{name}"


@dataclass
class _Steps:
    """A program's nodes between placeholders and output, as steps."""

    nodes: list[fx.Node]
    steps: list[Step]
    starts: list[int]
    backward: int


def _steps(program: Program, names: Names) -> _Steps:
    ends = program.placeholders()
    nodes = [n for n in program.graph.nodes if n.op in ("call_function", "get_attr")]
    if len(nodes) + len(ends) + 1 != len(program.graph.nodes):
        raise NoPeriod("nodes of an unknown kind")
    numbers = {node: i for i, node in enumerate(nodes)}
    out = _Steps(nodes, [], [], next((i for i, n in enumerate(nodes) if n.meta.get("phase") == "backward"), len(nodes)))
    for i, node in enumerate(nodes):
        module, block = names.split(node.meta.get("module") or "")
        if node.op == "call_function" and block == len(out.starts) and i < out.backward:
            out.starts.append(i)
        out.steps.append(_step(program, node, module, block, numbers, ends, names))
    return out


def _step(
    program: Program, node: fx.Node, module: str, block: int | None, numbers: dict[fx.Node, int], ends: dict[str, Input], names: Names
) -> Step:
    refs: list[int] = []
    named = [] if block is None else [block]

    def plain(arg: fx.Node) -> str:
        if arg in numbers:
            refs.append(numbers[arg])
            return "made"
        end = ends[arg.name]
        name, number = names.split(end.name) if end.role in ("param", "buffer") else (end.name, None)
        named.extend([] if number is None else [number])
        return f"{end.role} {name} {number is not None}"

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), plain)
    salt = _salt(node)
    counts = () if salt is None else (node.args[salt],)
    if salt is not None:
        args = (*args[:salt], "counts", *args[salt + 1 :])
    what = node.target if node.op == "call_function" else (node.target, digest(program.constants[node.target]))
    facts = (node.op, node.meta.get("where"), node.meta.get("phase"), module, block is not None, _facts(node))
    return Step((what, frozen(args), frozen(kwargs), facts), tuple(refs), tuple(named), counts)


def _facts(node: fx.Node) -> tuple:
    return tuple(None if v is None else (tuple(v.shape), v.dtype, v.stride()) for v in values(node))


def _salt(node: fx.Node) -> int | None:
    """The position of an argument that counts on from one random op to the next; an op that drops nothing (`p` is 0) has salt 0."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "salt" not in names or len(node.args) <= names.index("salt"):
        return None
    return names.index("salt") if "p" not in names or node.args[names.index("p")] else None


class _Expander:
    """Writes down the program of any number of blocks, given that of four and what a rehearsal says about outputs."""

    def __init__(self, names: Names, program: Program, period: Pattern, four: Rehearsal, tensors: list[str]) -> None:
        self.names, self.four_program, self.period, self.tensors = names, program, period, tensors
        self.four = _steps(program, names)
        self.pattern = Pattern(self.four.steps, cut(self.four.steps, self.four.starts, self.four.backward))
        number = {node.name: i for i, node in enumerate(self.four.nodes)}
        self.ends = {(o.role, o.name): number[o.node] for o in program.outputs if o.node in number}
        if len(self.ends) != len(program.outputs):
            raise NoPeriod("an input is an output, or two have one name")
        if [i.name for i in program.inputs if i.role in ("param", "buffer")] != list(self._tensors(4)):
            raise NoPeriod("the parameters are not in their order")
        if [i.name for i in program.inputs if i.role == "tangent"] != four.tangents:
            raise NoPeriod("other outputs carry gradients than in the rehearsal")
        if len({n.op for n in list(program.graph.nodes)[: len(program.inputs)]} | {"placeholder"}) != 1:
            raise NoPeriod("placeholders among the nodes")
        self.leaves: dict[tuple[Place, int], int] = {}
        for path, step, position in four.leaves:
            node = self.ends["output", path]
            if self.leaves.setdefault((period.locate(step), position), node) != node:
                raise NoPeriod("one result is two outputs")

    def program(self, rehearsal: Rehearsal, count: int) -> Program:
        steps = self.pattern.expand(count - 2)
        inputs = self._inputs(rehearsal.selection.paths, count)
        copy = _Copy(self, inputs)
        for step, index in steps:
            copy.add(step, index)
        graph, made = copy.writer.graph, copy.made
        outputs = self._outputs(rehearsal, inputs, count)
        graph.output(tuple(made[index] for index, _ in outputs))
        placed = tuple(Input(n.name, i.role, i.name, i.index) for n, i in zip(copy.given.values(), inputs, strict=True))
        results = tuple(Output(made[index].name, o.role, o.name, o.index) for index, o in outputs)
        constants = {n.target: self.four_program.constants[n.target] for n in made if n.op == "get_attr"}
        four = self.four_program
        given = four.signature
        signature = Signature(given.pack, rehearsal.selection.unpack, given.rebuild)
        return Program(
            graph, placed, results, signature, constants, self.four_program.tied, mode=four.mode, fused=four.fused, unfused=four.unfused
        )

    def _tensors(self, count: int) -> Iterable[str]:
        for name in self.tensors:
            number = self.names.split(name)[1]
            if number is None or number < count:
                yield name

    def _inputs(self, paths: tuple[str, ...], count: int) -> list[Input]:
        """Those of four blocks, the parameters and buffers of the others among them. Node names are those of the model input."""
        old = {(i.role, i.name): i for i in self.four_program.inputs}
        tensors = [old["param" if ("param", m) in old else "buffer", m] for m in map(self._model_name, self._tensors(count))]
        new = [Input(i.node, i.role, name) for i, name in zip(tensors, self._tensors(count), strict=True)]
        rest = [i for i in self.four_program.inputs if i.role not in ("param", "buffer")]
        return new + [Input(i.node, i.role, i.name, paths.index(i.name) if i.role == "tangent" else i.index) for i in rest]

    def _model_name(self, name: str) -> str:
        rest, number = self.names.split(name)
        return name if number is None or number < 4 else self.names.join(rest, 1)

    def _outputs(self, rehearsal: Rehearsal, inputs: list[Input], count: int) -> list[tuple[int, Output]]:
        """Each result with the number of the step that makes it."""
        out = []
        for i, (path, step, position) in enumerate(rehearsal.leaves):
            out.append((self._leaf(self.period.located(step, count - 2), position, count), Output("", "output", path, i)))
        for role, roles in (("mutation", ("buffer",)), ("grad", ("param", "input"))):
            for end in inputs:
                rest, number = self.names.split(end.name) if end.role in ("param", "buffer") else (end.name, None)
                if end.role in roles and (role, self._model_name(end.name) if number is not None else end.name) in self.ends:
                    out.append((self._end(role, rest, number, count), Output("", role, end.name, end.index)))
        return out

    def _leaf(self, place: Place, position: int, count: int) -> int:
        def known(place: Place) -> int:
            if (place, position) not in self.leaves:
                raise NoPeriod("an output that four blocks do not have")
            return self.leaves[place, position]

        if place.copy == 0:
            return self.pattern.index(self.pattern.end(known(place), place.part), count - 2)
        pair = [known(Place(place.part, place.at, copy)) for copy in (1, 2)]
        return self.pattern.of_copy(self.pattern.repeated(*pair), place.copy, count - 2)

    def _end(self, role: str, name: str, block: int | None, count: int) -> int:
        """The step that makes the gradient, or the new value, of what is called `name` in a block (or outside of them)."""
        number = {None: None, 0: 0, count - 1: 3}.get(block, 1)
        keys = [(role, self.names.join(name, k)) for k in ((1, 2) if number == 1 else (number,))]
        if any(key not in self.ends for key in keys):
            raise NoPeriod(f"{keys} are not all there")
        steps = [self.ends[key] for key in keys]
        if number == 1:
            assert block is not None
            return self.pattern.of_copy(self.pattern.repeated(*steps), block, count - 2)
        return self.pattern.index(self.pattern.end(steps[0], {None: "", 0: "tail", 3: "middle"}[number]), count - 2)


class _Copy:
    """The graph of a program of more blocks, written node by node after those of the four."""

    def __init__(self, expander: _Expander, inputs: list[Input]) -> None:
        self.four, self.names, self.writer = expander.four, expander.names, clean.Writer()
        models = {n.name: n for n in expander.four_program.graph.nodes if n.op == "placeholder"}
        self.given: dict[tuple[str, str], fx.Node] = {}
        self.made: list[fx.Node] = []
        for i in inputs:
            name = self.writer.unique(title(i.role, i.name, i.index))
            self.given[i.role, i.name] = self.writer.add("placeholder", name, (), {}, name, models[i.node].meta)
        ends = {i.node: i for i in expander.four_program.inputs}
        self.recipes = [self._recipe(node, ends) for node in self.four.nodes]

    def _recipe(self, node: fx.Node, ends: dict[str, Input]) -> tuple[list[Any], int | None, tuple[str, int | None]]:
        """What a node takes (None for a step's result, else role, name and block), where its salt stands, its module and block."""
        found: list[Any] = []
        for arg in tensor_args(node):
            if arg.op != "placeholder":
                found.append(None)
                continue
            end = ends[arg.name]
            rest, number = self.names.split(end.name) if end.role in ("param", "buffer") else (end.name, None)
            found.append((end.role, end.name, None) if number is None else (end.role, rest, number))
        return found, _salt(node), self.names.split(node.meta.get("module") or "")

    def add(self, step: Step, index: int) -> None:
        model, (takes, salt, (module, number)) = self.four.nodes[index], self.recipes[index]
        named, refs = iter(step.blocks), iter(step.refs)
        meta = dict(model.meta)
        if number is not None:
            meta["module"] = self.names.join(module, next(named))
        nodes = iter([self.made[next(refs)] if end is None else self._end(end, named) for end in takes])
        args, kwargs = fx.node.map_arg((model.args, model.kwargs), lambda _: next(nodes))
        if salt is not None:
            args = (*args[:salt], step.counts[0], *args[salt + 1 :])
        name = self.writer.unique(clean.node_title(model.op, model.target, args, meta))
        self.made.append(self.writer.add(model.op, model.target, args, kwargs, name, meta))

    def _end(self, end: tuple[str, str, int | None], named: Iterator[int]) -> fx.Node:
        role, name, number = end
        return self.given[role, name if number is None else self.names.join(name, next(named))]


def same_template(a: Template | None, b: Template | None) -> bool:
    """Equal; constants count as equal when they are of one class and, if they are plain, equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Const) and isinstance(b, Const):
        plain = isinstance(a.value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device))
        return type(a.value) is type(b.value) and (not plain or a.value == b.value)
    if isinstance(a, Items | Record) and isinstance(b, Items | Record):
        heads = [(x.cls, x.keys if isinstance(x, Items) else x.names) for x in (a, b)]
        return heads[0] == heads[1] and all(same_template(x, y) for x, y in zip(a.items, b.items, strict=True))
    return a == b


def difference(a: Program, b: Program) -> str:
    """The first thing in which two programs differ, node names, origins and the order of everything included; "" when none."""
    if (a.inputs, a.outputs, dict(a.tied)) != (b.inputs, b.outputs, dict(b.tied)):
        pairs = zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=False)
        return next((f"{x} and {y}" for x, y in pairs if x != y), "numbers of inputs and outputs")
    if len(a.graph.nodes) != len(b.graph.nodes):
        return f"{len(a.graph.nodes)} and {len(b.graph.nodes)} nodes"
    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True):
        args = [frozen(fx.node.map_arg((n.args, n.kwargs), lambda m: f"%{m.name}")) for n in (x, y)]
        heads = [(n.op, n.name, n.target, *(n.meta.get(key) for key in ("where", "module", "phase"))) for n in (x, y)]
        if heads[0] != heads[1] or args[0] != args[1] or (x.op != "output" and _facts(x) != _facts(y)):
            return f"{heads[0]} {args[0]} and {heads[1]} {args[1]}"
    digests = [{name: digest(tensor) for name, tensor in p.constants.items()} for p in (a, b)]
    return "" if digests[0] == digests[1] else "the constants"
