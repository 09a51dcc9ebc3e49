"""From a captured program and a plan to the program one device runs: the passes, in order, and the check between them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..costs.comm import Conversions
from ..ir import flags
from ..ir.errors import GraphError
from ..ir.plan import Plan
from ..ir.program import Program, source, tensor_args
from ..ir.spec import Spec, same_layout
from ..rules.algebra import Rule, Strategy
from ..runtime.collectives import STARTS, wait
from ..solver.conversions import end_rules, regathered
from ..solver.fold import classes
from ..solver.micro import in_turns
from ..solver.parking import parked, stowed
from ..solver.replay import offloaded, rewritten
from ..solver.solve import choices_to_strategies
from .bucket import bucket_gradients
from .defer import defer_reductions
from .dense import make_dense
from .localize import localize
from .losses import fuse_losses
from .offload import offload_values
from .reshard import insert_reshards
from .schedule import schedule_collectives
from .stow import stow_parameters


@dataclass(frozen=True)
class Lowering:
    """What every pass may read besides the program: the plan, the rules, one strategy per node, and the price of moves."""

    plan: Plan
    rules: Mapping[str, Rule]
    strategies: Mapping[str, Strategy]
    conversions: Conversions
    sizes: tuple[int, ...]
    again: frozenset[tuple[str, int]] = frozenset()  # values that are converted again in backward
    away: Mapping[tuple[str, int], str] = field(default_factory=dict)  # values that wait for backward elsewhere, and where
    names: Mapping[str, str] = field(default_factory=dict)  # the class of every node
    gradients: Gradients = "whole"
    stowed: Mapping[str, str] = field(default_factory=dict)  # parameters that wait elsewhere, and where


Gradients = Literal["whole", "waiting", "closing"]
Pass = Callable[[Program, Lowering], Program]

PASSES: tuple[Pass, ...] = (
    localize,  # first: every op works on local shapes and says which specs it takes and gives
    insert_reshards,  # then every edge whose two specs differ gets its collectives
    fuse_losses,  # only now the reductions of a loss over split classes stand in the graph
    make_dense,  # what arrives at an op, moved or not, is dense where the op reads it so
    offload_values,  # then values are sent away as they lie, and backward's moves take what comes back
    defer_reductions,  # gradients of micro-batches are added up before they are reduced
    stow_parameters,  # parameters that wait elsewhere come, and their gradients leave when they are complete
    bucket_gradients,  # only now the gradients' all-reduces stand in the graph
    schedule_collectives,  # last: every collective and everything that can run meanwhile has its place
)


def lower(program: Program, rules: Mapping[str, Rule], plan: Plan, gradients: Gradients = "whole") -> Program:
    """The program of one device, rank-symbolic. Raises PlanError when the plan belongs to another program or mesh.

    gradients: "waiting" are given away before their last collectives, "closing" meet there what was given away (passes/defer.py).
    """
    program, context = prepare(program, rules, plan)
    return run_passes(program, replace(context, gradients=gradients))


def prepare(program: Program, rules: Mapping[str, Rule], plan: Plan) -> tuple[Program, Lowering]:
    """The program that the passes begin with, global shapes, and what they read. Raises as `lower` does."""
    program, rules = in_turns(program, rules, plan.micro_batches)
    strategies = choices_to_strategies(program, rules, plan)
    rules = {**end_rules(program, plan.inputs), **rules}
    names = classes(program, rules)
    away = offloaded(program, plan.offload, names)
    again = regathered(program, names, plan.regather)
    parked(program, plan.state, names)  # the runtime's business: here only whether the entries mean something
    gone = stowed(program, plan.state, names)
    new = rewritten(program, rules, names, plan.recompute, gone)
    strategies |= {twin: strategies[original] for twin, original in new.twins.items()}
    conversions = Conversions(plan.links(), plan.random_costs)
    return new.program, Lowering(plan, new.rules, strategies, conversions, plan.sizes, again, away, new.names, stowed=gone)


def run_passes(program: Program, context: Lowering) -> Program:
    """All passes, each followed by the check. They share one copy of the graph; the given program stays as it is."""
    program = program.copied()
    for step in PASSES:
        before = str(program.graph) if flags.debug_level() >= 3 else ""
        program = step(program, context)
        check(program, context.sizes, edges=step is not localize)
        if flags.debug_level() >= 3:
            flags.debug(3, _diff(step.__name__, before, str(program.graph)))
    return replace(program, owned=False)


def check(program: Program, sizes: tuple[int, ...], *, edges: bool = True) -> None:
    """The graph is well formed, every value has a spec and, with `edges`, every consumer gets the spec it expects.

    Raises GraphError that names the node: specs live in one place, and a pass that breaks one is caught here.
    """
    program.graph.lint()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function") and source(node)[0] is node and node.name not in program.specs:
            raise GraphError(f"no spec for {node.name}", where=node.meta.get("where", ""))
        if node.target in STARTS:
            _check_waited(node)
        if not edges or (node.op != "output" and source(node)[0] is not node):
            continue
        expected = program.expects.get(node.name, ())
        found = tensor_args(node)
        if node.op != "placeholder" and len(expected) != len(found):
            raise GraphError(f"{node.name} takes {len(found)} tensors and expects {len(expected)}", where=node.meta.get("where", ""))
        for arg, want in zip(found, expected, strict=False):
            have = spec_of(program.specs, arg)
            if have is None or have.dtype != want.dtype or not same_layout(have, want, sizes):
                raise GraphError(f"{node.name} expects {arg.name} as {want}, it is {have}", where=node.meta.get("where", ""))


def _check_waited(node) -> None:
    """A collective that is started is waited for once, in the same phase, before anything takes it."""
    where, waits = node.meta.get("where") or "", [u for u in node.users if u.target is wait]
    if other := next((u for u in node.users if u.target is not wait), None):
        raise GraphError(f"{other.name} takes {node.name} before it was waited for", where=where)
    if len(waits) != 1:
        raise GraphError(f"{node.name} is started and waited for {len(waits)} times", where=where)
    if waits[0].meta["phase"] != node.meta["phase"]:
        raise GraphError(f"{node.name} is started in {node.meta['phase']} and waited for in {waits[0].meta['phase']}", where=where)


def spec_of(specs: Mapping[str, Spec | tuple[Spec | None, ...]], node) -> Spec | None:
    """The spec of the value that a node stands for; `getitem` nodes are looked through."""
    producer, index = source(node)
    spec = specs[producer.name]
    return spec[index] if isinstance(spec, tuple) else spec


def _diff(name: str, before: str, after: str) -> str:
    if before == after:
        return f"pass {name}: nothing changed"
    return f"pass {name}\n" + "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))
