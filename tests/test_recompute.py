"""Ops that run again in backward: what replay makes of a program, and that every such plan is exact, to the last bit."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from liveness import lowered_peak
from random_plans import random_plan
from random_saving import names_of, replayable, with_saving
from torch import fx, nn
from zoo import ZOO

from netmind_autopar.ir.errors import PlanError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Input, Output, Program, Signature, is_getitem, op_name, tensor_args
from netmind_autopar.passes.emit import emit, split_phases
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime import simulate
from netmind_autopar.solver.replay import is_late, refusal, replay, takers, without_dead
from netmind_autopar.tracer.capture import capture
from netmind_autopar.verification import compare
from netmind_autopar.verification.sides import deal

MESHES = ("a=2", "a=4", "a=2,b=2")
MODELS = ("gpt2_dropout", "llama", "bert_dropout", "resnet14", "mixtral_grouped", "t5")


@functools.cache
def captured(name: str) -> tuple[nn.Module, object, Program, dict]:
    if name.endswith("_dropout"):
        model, inputs = getattr(models, name.removesuffix("_dropout"))(torch.float64, 0.2)
    elif name == "llama":
        model, inputs = models.llama(torch.float64, layers=3)
    else:
        model, inputs = ZOO[name].make(torch.float64)
    program = capture(model, inputs)
    return model, inputs, program, bind_program(program)


@functools.cache
def odd_plan(name: str, mesh: str, seed: int) -> Plan:
    _, _, program, rules = captured(name)
    return random_plan(program, rules, mesh, seed)


def replayed(name: str, entries: tuple[str, ...]) -> tuple[Program, dict[str, str]]:
    _, _, program, rules = captured(name)
    return replay(program, entries, names_of(program, rules))


CASES = [(name, mesh, seed) for seed in range(4) for name in MODELS for mesh in MESHES]
QUICK = [(name, MESHES[k % 3], 0) for k, name in enumerate(MODELS)]


@pytest.mark.parametrize(
    ("name", "mesh", "seed"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(map(str, c))) for c in CASES]
)
def test_odd_plans_that_save_memory_are_exact(name: str, mesh: str, seed: int) -> None:
    """Random sets of recomputed, gathered again and offloaded classes under random layouts."""
    model, inputs, program, rules = captured(name)
    plan = with_saving(odd_plan(name, mesh, seed), program, rules, seed)
    lowered = lower(program, rules, plan)
    marks = {getattr(n.target, "__name__", "") for n in lowered.graph.nodes}
    assert marks >= {"offload", "reload"} and any("again" in n.meta for n in lowered.graph.nodes)
    report = compare(model, inputs, program, lowered, plan)
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"
    assert {row.name for row in report.rows if row.tolerance <= 1e-9} == {o.name for o in program.outputs}, "all of it in float64"


def results(lowered: Program, plan: Plan, program: Program) -> list[list[torch.Tensor]]:
    """Every rank's results for inputs drawn by the program's own shapes."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for item in program.inputs:
        value = program.node(item.node).meta["val"]
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3
        state[item.node] = drawn.to(value.dtype) if value.is_floating_point() else drawn.abs().mul(10).to(value.dtype)
    pieces = {name: deal(value, lowered.specs[name], plan.sizes) for name, value in state.items()}  # type: ignore[arg-type]
    return simulate.no_grad_run(lowered, plan.sizes, pieces)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["gpt2_dropout", "bert_dropout", "llama", "mixtral_grouped"])
def test_not_one_bit_changes(name: str, mesh: str) -> None:
    """What runs again gives the same bits: dropout masks too. Losses, new buffers and gradients of every rank."""
    _, _, program, rules = captured(name)
    plan = odd_plan(name, mesh, 1)
    kept = results(lower(program, rules, plan), plan, program)
    for share in (0.3, 1.0):
        saving = with_saving(plan, program, rules, 2, share=share).model_copy(update={"regather": plan.regather, "offload": ()})
        again = results(lower(program, rules, saving), saving, program)
        for out, a, b in zip(program.outputs, kept, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), out.name


def test_dropout_is_drawn_again() -> None:
    """The test above is about something: the twins of dropout and of attention are there, and another seed changes the gradients."""
    program, twins = replayed("gpt2_dropout", tuple(replayable(*captured("gpt2_dropout")[2:])))
    again = {op_name(program.node(t)) for t in twins}
    assert {"autopar.dropout.default", "autopar.attention.default"} <= again
    for name in twins:
        node, old = program.node(name), program.node(twins[name])
        rest = [a for a in node.args if not isinstance(a, torch.fx.Node)]
        assert rest == [a for a in old.args if not isinstance(a, torch.fx.Node)] and node.kwargs.keys() == old.kwargs.keys()


@pytest.mark.parametrize("name", ["gpt2_dropout", "llama", "resnet14", "mixtral_grouped"])
def test_what_replay_makes(name: str) -> None:
    _, _, program, rules = captured(name)
    before = str(program.graph)
    new, twins = replayed(name, tuple(replayable(program, rules)))
    assert str(program.graph) == before
    assert [(o.node, o.role, o.name) for o in new.outputs] == [(o.node, o.role, o.name) for o in program.outputs]
    position = {n: i for i, n in enumerate(new.graph.nodes)}
    for twin, original in twins.items():
        node, old = new.node(twin), new.node(original)
        assert twin == f"{original}_again" and node.meta["again"] == original and node.meta["phase"] == "backward"
        assert node.target is old.target
        users = takers(node)
        assert users and all(is_late(u) for u in users), "a twin that nothing in backward needs"
        first = min(position[u] for u in users)
        between = [n for n in new.graph.nodes if position[node] < position[n] < first]
        assert all("again" in n.meta for n in between), "as late as possible: only twins stand between a twin and its first user"
        for mine, its in zip(tensor_args(node), tensor_args(old), strict=True):
            assert mine is its or mine.meta["again"] == its.name
    for node in new.graph.nodes:
        if is_late(node) and not is_getitem(node):
            for arg in tensor_args(node):
                assert arg.op == "placeholder" or arg.op == "get_attr" or is_late(arg), f"{node} takes {arg} of forward"
        if is_getitem(node):
            assert node.users
    split_phases(new)


@pytest.mark.parametrize("name", ["gpt2_dropout", "llama", "resnet14"])
def test_twins_are_members_of_their_class(name: str) -> None:
    _, _, program, rules = captured(name)
    names = names_of(program, rules)
    new, twins = replayed(name, tuple(replayable(program, rules)))
    all_rules = {**rules, **{t: rules[o] for t, o in twins.items()}}
    found = names_of(new, all_rules)
    assert {k: found[k] for k in names} == names
    assert all(found[t] == names[o] for t, o in twins.items())


def chain(length: int) -> Program:
    """x → sin(x) over and over, and the gradient."""
    graph, aten = fx.Graph(), torch.ops.aten
    x = torch.ones(3, device="meta")

    def put(name: str, phase: str, target: object = None, *args: fx.Node) -> fx.Node:
        node = graph.create_node("call_function", target, args, name=name) if target else graph.placeholder(name)  # type: ignore[arg-type]
        node.meta = {"val": x, "phase": phase}
        return node

    value, grad = put("x", "forward"), put("t", "forward")
    made = [value]
    for i in range(length):
        made.append(put(f"sin_{i}", "forward", aten.sin.default, made[-1]))
    for i in reversed(range(length)):
        grad = put(f"mul_{i}", "backward", aten.mul.Tensor, grad, put(f"cos_{i}", "backward", aten.cos.default, made[i]))
    graph.output((made[-1], grad))
    ends = Output(made[-1].name, "output", "y", 0), Output(grad.name, "grad", "x", 0)
    return Program(graph, (Input("x", "input", "x", 0), Input("t", "tangent", "y", 0)), ends, Signature(*[lambda *_: []] * 3))  # type: ignore[arg-type]


def test_a_long_run_is_replayed_from_its_beginning() -> None:
    """Thousands of twins that need one another: no recursion, and backward keeps nothing but the input."""
    program = chain(3000)
    names = {n.name: n.name.partition("_")[0] for n in program.graph.nodes if n.op != "output"}
    new, twins = replay(program, ("sin",), names)
    assert len(twins) == 2999, "the last one is only handed out"
    forward, backward = split_phases(new)
    taken = {a.name for n in backward for a in tensor_args(n)}
    assert not taken & {n.name for n in forward}
    at_borders, _ = replay(program, ("sin[:1500]",), names)
    forward, backward = split_phases(at_borders)
    assert {a.name for n in backward for a in tensor_args(n)} & {n.name for n in forward} == {f"sin_{i}" for i in range(1500, 2999)}


def test_only_what_backward_needs_runs_again() -> None:
    """Of sums and views some feed nothing in backward: those run again only where another twin takes them."""
    _, _, program, rules = captured("llama")
    names = names_of(program, rules)
    adds = sorted({names[n.name] for n in program.graph.nodes if op_name(n).startswith("aten.add.") and not is_late(n)})
    views = sorted({names[n.name] for n in program.graph.nodes if op_name(n).startswith("aten.view") and not is_late(n)})
    new, twins = replay(program, (*adds, *views), names)
    unneeded = [
        n for n in program.graph.nodes if not refusal(n) and names[n.name] in (*adds, *views) and not any(is_late(u) for u in takers(n))
    ]
    assert unneeded and {f"{n.name}_again" for n in unneeded} - twins.keys(), "some are needed by nothing in backward"
    for node in unneeded:
        if f"{node.name}_again" in twins:
            assert any("again" in u.meta for u in takers(new.node(f"{node.name}_again")))


def test_the_first_members_only() -> None:
    _, _, program, rules = captured("llama")
    names = names_of(program, rules)
    name = next(n for n in replayable(program, rules) if n.endswith("mlp.act_fn.silu"))
    members = [n for n, c in names.items() if c == name]
    assert len(members) == 3
    for first in range(4):
        assert list(replayed("llama", (f"{name}[:{first}]",))[1].values()) == members[:first]
    assert list(replayed("llama", (name,))[1].values()) == members


def test_what_only_backward_needs_moves_there() -> None:
    """An op of forward that backward alone takes: its original is gone from what runs, and the module is exact."""
    _, _, program, rules = captured("resnet14")
    new, twins = replayed("resnet14", tuple(replayable(program, rules)))
    dead = {o for o in twins.values() if not takers(new.node(o))}
    small = without_dead(new, twins.values())
    assert {n.name for n in new.graph.nodes if n.name not in {m.name for m in small.graph.nodes} and not is_getitem(n)} >= dead
    assert without_dead(program, ()) is program


def test_running_statistics_move_once() -> None:
    """Batch norm all recomputed: its new running statistics are made in forward, once, and are right over three steps."""
    model, inputs, program, rules = captured("resnet14")
    plan = odd_plan("resnet14", "a=2", 0).model_copy(update={"recompute": tuple(replayable(program, rules))})
    lowered = lower(program, rules, plan)
    ends = tensor_args(next(n for n in lowered.graph.nodes if n.op == "output"))
    changed = [n for n, o in zip(ends, lowered.outputs, strict=True) if o.role == "mutation"]
    assert changed and not any(is_late(n) for n in changed)
    assert sum("again" in n.meta for n in lowered.graph.nodes) > 50
    report = compare(model, inputs, program, lowered, plan, steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    assert report.ok and {row.kind for row in report.rows} >= {"buffer", "gradient", "parameter"}, report.first_difference


@pytest.mark.parametrize("mesh", ["a=1", "a=2,b=2"])
@pytest.mark.parametrize("name", ["gpt2_dropout", "llama"])
def test_memory_is_saved(name: str, mesh: str) -> None:
    """Everything recomputed: what is kept between the phases is inputs alone; the counted peak of activations falls."""
    _, _, program, rules = captured(name)
    plan = odd_plan(name, mesh, 3).model_copy(update={"regather": ("*",)})
    saving = plan.model_copy(update={"recompute": tuple(replayable(program, rules))})
    kept = lowered_peak(lower(program, rules, plan), plan)
    less = lowered_peak(lower(program, rules, saving), saving)
    assert less.activations < 0.6 * kept.activations


class Odd(nn.Module):
    """Ops that cannot run again: a library's, and what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.autopar_test.tripled(x * self.w).sin().sum()


@torch.library.custom_op("autopar_test::tripled", mutates_args=())
def _tripled(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


_tripled.register_fake(torch.empty_like)
_tripled.register_autograd(lambda ctx, grad: 3 * grad)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("no.such.op", "names no op"),
        ("h.*.attn", "names no op"),
        ("disk:mul", "names no op"),
        ("mul.99@backward", "names no op"),
        ("mul@backward", "runs in backward anyway"),
        ("w", "given, not computed"),
        ("input.x", "given, not computed"),
        ("tripled", "another library"),
    ],
)
def test_what_cannot_run_again_is_refused(entry: str, why: str) -> None:
    program = capture(Odd(), torch.ones(3, 4, dtype=torch.float64))
    rules = bind_program(program)
    with pytest.raises(PlanError, match=why) as found:
        replay(program, (entry,), names_of(program, rules))
    assert found.value.where == f"recompute: {entry}" and found.value.try_


def test_a_plan_that_names_nothing_is_refused_when_it_is_lowered() -> None:
    _, _, program, rules = captured("llama")
    plan = odd_plan("llama", "a=2", 0)
    for field in ("recompute", "regather", "offload"):
        with pytest.raises(PlanError, match="nowhere"):
            lower(program, rules, plan.model_copy(update={field: ("nowhere",)}))


def test_the_same_plan_gives_the_same_file() -> None:
    _, _, program, rules = captured("gpt2_dropout")
    plan = with_saving(odd_plan("gpt2_dropout", "a=2,b=2", 0), program, rules, 5)
    text = emit(lower(program, rules, plan), plan)
    assert text == emit(lower(program, rules, plan), plan)
    assert "_again = " in text and "tiers.prefetch(" in text
    alone = emit(lower(program, rules, plan), plan, inference=True)
    assert "_again" not in alone and "tiers" not in alone
