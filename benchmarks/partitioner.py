"""What is recomputed against torch's min-cut partitioner with `activation_memory_budget`, on one device, at equal predicted peaks.

    python benchmarks/partitioner.py [--model gpt2|llama] [--budgets 0.0,0.1,...,1.0] [--json] [--out FILE]

Both sides plan the same captured graph, and both results become a program of forward and backward in which what runs twice stands
twice. One cost model and one count of liveness price them. Torch's backward stands in the order of its own reordering pass. For each
budget torch decides twice, by FLOPs (its default) and by the seconds of our cost model, and each is compared at its own peak.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from torch import fx
from torch._functorch import config, partitioners
from torch._inductor.custom_graph_pass import CustomRuntimeEstimator
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

sys.path[:0] = [str(Path(__file__).parent)]

import large_models

from netmind_autopar.costs.comm import Conversions
from netmind_autopar.costs.compute import FREE
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.program import Program, is_getitem
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.build import Built, build
from netmind_autopar.solver.problem import evaluate, resident_bytes
from netmind_autopar.solver.replay import rewritten
from netmind_autopar.solver.saving.cut import Cut
from netmind_autopar.solver.saving.decide import Task, within
from netmind_autopar.solver.saving.mix import least
from netmind_autopar.solver.saving.tape import Tape
from netmind_autopar.solver.search import solve_problem
from netmind_autopar.solver.shard import Solution
from netmind_autopar.tracer.capture import capture

GIB = 2**30
BUDGETS = tuple(round(0.1 * i, 1) for i in range(11))


@dataclass(frozen=True)
class Counted:
    """A program, counted out. again_s: seconds of what runs a second time. peak: bytes, `resident` (what always lives) included."""

    again_s: float
    peak: int
    resident: int


@dataclass(frozen=True)
class Subject:
    """A model on one H100 without optimizer state. each: seconds of every op; built: the planner's problem with the same seconds."""

    program: Program
    task: Task
    built: Built
    each: Mapping[str, float]
    first: Solution

    @property
    def keep_all(self) -> Counted:
        return self.count(self.program, self.task.known[0])

    def count(self, program: Program, rules: Mapping[str, Rule]) -> Counted:
        """A program in which what runs again is marked so. What ran in forward nowhere does not run again."""
        task = self.task
        problem = build(program, rules, task.mesh, task.conversions, states=task.states, inputs=task.inputs).problem
        assert all(len(node.labels) == 1 for node in problem.nodes), "one device, one way"
        choice = (0,) * len(problem.nodes)
        twice = [n.meta["again"] for n in program.graph.nodes if "again" in n.meta and not is_getitem(n)]
        there = {n.name for n in program.graph.nodes}
        again_s = sum(self.each[name] for name in twice if name in there)
        return Counted(again_s, evaluate(problem, choice)[1], resident_bytes(problem, choice))


def gpt2(layers: int = 12) -> large_models.Made:
    """GPT-2 small as its config has it, dropout on, bf16, batch 8 x 1024."""
    settings = transformers.GPT2Config(n_layer=layers, use_cache=False, loss_type="ForCausalLMLoss")
    return large_models._made(lambda: transformers.GPT2LMHeadModel(settings), large_models._tokens(8, 1024))


def llama(layers: int = 8) -> large_models.Made:
    """Blocks of a Llama of one billion parameters, bf16, batch 4 x 2048."""
    return large_models.llama(layers, hidden=2048, wide=8192, heads=32, kv=8, batch=4, length=2048)


MODELS: dict[str, Callable[[], large_models.Made]] = {"gpt2": gpt2, "llama": llama}


def subject(model: torch.nn.Module, inputs: Any, *, fused: bool = False) -> Subject:
    """fused: what a compiler fuses into its neighbours takes no time: element-wise ops, reductions, views; products and attention do."""
    program, mesh = capture(model, inputs, outputs=("loss",)), make_mesh("dp=1", "h100-sxm")
    task = Task(program, bind_program(program), mesh, Conversions(mesh, None), "global", 0)
    built = task.build()
    if fused:
        known, members = _op_list(), {kind.name: kind.members for kind in built.kinds if kind.role == "op"}
        ops = {node.name: node for node in program.graph.nodes}
        free = {name for name, group in members.items() if known.is_fusible(ops[group[0]]) or known.is_view(ops[group[0]])}
        nodes = tuple(replace(n, seconds=0.0 * n.seconds) if n.name in free else n for n in built.problem.nodes)
        built = replace(built, problem=replace(built.problem, nodes=nodes))
    pairs = zip(built.kinds, built.problem.nodes, strict=True)
    each = {m: float(node.seconds[0]) / len(kind.members) for kind, node in pairs for m in kind.members if node.moments}
    return Subject(program, task, built, each, solve_problem(built.problem))


# Our side.


def planned(on: Subject, limit: int) -> Counted | None:
    """What the planner makes of a limit in bytes; None when it finds nothing."""
    found = within(on.task, on.built, on.first, limit, allowed=None, time_limit=60.0, gap=1e-4)
    if found.solution.seconds == math.inf:
        return None
    new = rewritten(on.program, *on.task.known, found.recompute)
    return on.count(new.program, new.rules)


# Torch's side.


def joint_module(program: Program) -> tuple[fx.GraphModule, dict[str, str], int, list[int]]:
    """The program as the partitioner wants it.

    Also: its placeholders' names -> ours; how many results are forward's; which inputs are parameters and buffers.
    """
    graph, made, ours = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, str]()
    ends = program.placeholders()
    static: list[int] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            role = ends[node.name].role
            name = f"{'tangents' if role == 'tangent' else 'primals'}_{len(ours)}"
            if role in ("param", "buffer"):
                static.append(sum(1 for n in ours if n.startswith("primals")))
            made[node] = graph.placeholder(name)
            made[node].meta = dict(node.meta)
            ours[name] = node.name
        elif node.op != "output":
            made[node] = graph.node_copy(node, lambda n: made[n])
            assert made[node].name == node.name
    named = {n.name: made[n] for n in made}
    forward = [o for o in program.outputs if o.role != "grad"]
    out = graph.output(tuple(named[o.node] for o in (*forward, *(o for o in program.outputs if o.role == "grad"))))
    out.meta["desc"] = [None] * len(program.outputs)
    return fx.GraphModule(dict(program.constants), graph), ours, len(forward), static


class Seconds(CustomRuntimeEstimator):
    """Tells the partitioner's knapsack what our cost model says."""

    def __init__(self, each: Mapping[str, float]) -> None:
        self.each = each

    def __call__(self, node: fx.Node) -> float:
        return self.each.get(node.name, 0.0) * 1e9

    def uuid(self) -> None:
        return None


def _op_list() -> partitioners.OpTypes:
    """Torch's own table, with what it would say of our ops, and with all views among the views."""
    known = _usual()
    ours = torch.ops.autopar
    views = {n for n in (getattr(torch.ops.aten, name, None) for name in FREE) if n is not None}
    cheap = {ours.dropout, ours.cross_entropy_backward, ours.sum_exp, ours.pick}
    return replace(
        known,
        compute_intensive_ops=known.compute_intensive_ops | {ours.attention, ours.grouped_mm},
        view_ops=known.view_ops | views,
        recomputable_ops=known.recomputable_ops | views | cheap,
        fusible_ops=known.fusible_ops | views | cheap,
    )


_usual = partitioners.get_default_op_list


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    heads = q.shape[1]
    return sdpa_flop_count(q.shape, (k.shape[0], heads, *k.shape[2:]), (v.shape[0], heads, *v.shape[2:]))


_attention_flops._get_raw = True  # type: ignore[attr-defined]


def partitioned(program: Program, budget: float, estimator: Any = "flops") -> Program:
    """The program that runs after torch's partitioner has decided: forward, then backward, with `<name>_again` for what runs twice."""
    module, ours, results, static = joint_module(program)
    flops = {torch.ops.autopar.attention: _attention_flops}
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(activation_memory_budget=budget, activation_memory_budget_runtime_estimator=estimator))
        stack.enter_context(mock.patch.object(partitioners, "get_default_op_list", _op_list))
        stack.enter_context(mock.patch.dict(flop_registry, flops))
        forward, backward = partitioners.min_cut_rematerialization_partition(
            module, None, num_fwd_outputs=results, static_lifetime_input_indices=static
        )
    return _joined(program, forward.graph, backward.graph, ours, results)


def _joined(program: Program, forward: fx.Graph, backward: fx.Graph, ours: Mapping[str, str], results: int) -> Program:
    """Both halves as one program in our form."""
    graph, at = fx.Graph(), dict[str, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            at[node.name] = graph.node_copy(node)
    out = _copied(graph, forward, at, ours, "forward")[:results]
    late = dict(at)
    out += _copied(graph, backward, late, ours, "backward", frozenset(at))
    graph.output(tuple(out))
    graph.lint()
    ordered = [o for o in program.outputs if o.role != "grad"] + [o for o in program.outputs if o.role == "grad"]
    outputs = tuple(replace(o, node=node.name) for o, node in zip(ordered, out, strict=True))
    return replace(program, graph=graph, outputs=outputs)


def _copied(
    graph: fx.Graph, half: fx.Graph, at: dict[str, fx.Node], ours: Mapping[str, str], phase: str, known: frozenset[str] = frozenset()
) -> list[fx.Node]:
    """Append one half. `at`: by name, what its placeholders stand for; afterwards also what it makes. Returns its results."""
    for node in half.nodes:
        if node.op == "placeholder":
            at.setdefault(node.name, at.get(ours.get(node.name, node.name)))  # type: ignore[arg-type]
        elif node.op == "output":
            return [at[n.name] for n in node.args[0] if n is not None]
        else:
            again = node.name in known
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: at[n.name])
            name = f"{node.name}_again" if again else node.name
            twin = graph.create_node(node.op, node.target, args, kwargs, name=name)
            twin.meta = {**node.meta, "phase": phase} | ({"again": node.name} if again else {})
            at[node.name] = twin
    raise AssertionError("a graph without results")


def torch_decided(on: Subject, budget: float, by: str) -> Counted:
    """What torch makes of a budget. by: "flops", torch's own estimate, or "seconds", our cost model's."""
    program = partitioned(on.program, budget, Seconds(on.each) if by == "seconds" else by)
    rules = dict(on.task.known[0])
    rules |= {n.name: rules[n.meta["again"]] for n in program.graph.nodes if n.meta.get("again") in rules}
    return on.count(program, rules)


# Tables.

Row = dict[str, Any]


def against_torch(on: Subject, budgets: Sequence[float], by: Sequence[str] = ("flops", "seconds")) -> Iterator[Row]:
    """A row per budget and estimate: both sides at the peak that torch's decision has. ratio: None when ours runs nothing again."""
    for kind, budget in itertools.product(by, budgets):
        torchs = torch_decided(on, budget, kind)
        ours = planned(on, torchs.peak)
        yield {
            "budget": budget,
            "by": kind,
            "torch_s": torchs.again_s,
            "ours_s": ours.again_s if ours else None,
            "ratio": torchs.again_s / ours.again_s if ours and ours.again_s else None,
            "torch_gib": torchs.peak / GIB,
            "ours_gib": ours.peak / GIB if ours else None,
            "used": ours.peak / torchs.peak if ours else None,
            "used_of_activations": _share(ours, torchs.peak) if ours else None,
        }


def _share(found: Counted, limit: int) -> float:
    return (found.peak - found.resident) / (limit - found.resident)


def sweep(on: Subject, steps: int = 12) -> Iterator[Row]:
    """The planner alone, from the least peak that it knows to keeping everything."""
    assert on.first.choice is not None
    tape = Tape(on.built.problem, on.first.choice)
    low, high = least(tape, Cut(tape))[1].peak, on.keep_all.peak
    for i in range(steps):
        limit = low + (high - low) * i // (steps - 1)
        found = planned(on, limit)
        yield {
            "limit_gib": limit / GIB,
            "ours_gib": found.peak / GIB if found else None,
            "ours_s": found.again_s if found else None,
            "used": found.peak / limit if found else None,
            "used_of_activations": _share(found, limit) if found else None,
        }


MIDDLE = (0.3, 0.7)


def verdict(rows: Sequence[Row], steps: Sequence[Row]) -> Row:
    """What the bars are about. A row without a plan counts as ratio 0, one in which ours runs nothing again does not count."""
    ratios = [(row["budget"], row["ratio"] or 0.0) for row in rows if row["ours_s"] != 0]
    made = [row["ours_gib"] for row in steps]
    every = [row for row in (*rows, *steps) if row["ours_s"] is not None]
    return {
        "least_ratio": min((r for _, r in ratios), default=None),
        "least_middle_ratio": min((r for b, r in ratios if MIDDLE[0] <= b <= MIDDLE[1]), default=None),
        "planned": all(row["ours_s"] is not None for row in (*rows, *steps)),
        "monotone": None not in made and all(a <= b for a, b in itertools.pairwise(made)),
        "never_above": all(row["used"] <= 1 for row in every),
        "least_used": min((row["used"] for row in every if row["ours_s"] > 0), default=1.0),
        "least_used_of_activations": min((row["used_of_activations"] for row in every if row["ours_s"] > 0), default=1.0),
    }


def fine(found: Row) -> bool:
    return (
        (found["least_ratio"] is None or found["least_ratio"] >= 1.0)
        and (found["least_middle_ratio"] is None or found["least_middle_ratio"] >= 1.3)
        and found["least_used"] >= 0.98
        and all(found[key] for key in ("planned", "monotone", "never_above"))
    )


def _line(row: Row) -> str:
    def show(key: str, value: Any) -> str:
        if not isinstance(value, float) or key == "budget":
            return str(value)
        return f"{value * 1e3:.3f} ms" if key.endswith("_s") else f"{value:.3f}"

    return "  ".join(f"{key} {show(key, value)}" for key, value in row.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), help="both when not given")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="torch's budgets, separated by commas")
    parser.add_argument("--fused", action="store_true", help="what a compiler fuses takes no time, on both sides")
    parser.add_argument("--json", action="store_true", help="a line of JSON per row")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    met = True
    for name in [args.model] if args.model else sorted(MODELS):
        on = subject(*MODELS[name](), fused=args.fused)
        rows, steps = [], []
        tables = (("at torch's peak", against_torch(on, [float(b) for b in args.budgets.split(",")]), rows), ("sweep", sweep(on), steps))
        for title, table, kept in tables:
            for row in table:
                kept.append(row)
                _say({"model": name, "table": title, **({"fused": True} if args.fused else {}), **row}, args)
        found = verdict(rows, steps)
        met &= fine(found)
        _say({"model": name, "table": "verdict", **({"fused": True} if args.fused else {}), **found, "ok": fine(found)}, args)
    return 0 if met else 1


def _say(row: Row, args: argparse.Namespace) -> None:
    text = json.dumps(row)
    print(text if args.json else _line(row), flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
