"""`verify` finds bugs of recomputation and offload that are planted into correct programs, and names their place."""

from __future__ import annotations

import functools

import planted
import pytest
import torch
import torch.fx
from planted import Bug, Places, after, arg_of, before, ops, set_arg, times
from random_saving import with_saving
from test_planted import judged, made
from test_planted import lowered as kept
from torch import Tensor

from netmind_autopar.ir.mesh import parse_axes
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Draft, Program, is_getitem
from netmind_autopar.ir.spec import Partial
from netmind_autopar.passes.pipeline import lower, spec_of
from netmind_autopar.runtime.offload import prefetch, reload

SEEDS = 8


def bent(x: Tensor) -> Tensor:
    return x + 0.01 * x * x


def half(x: Tensor) -> Tensor:
    y = x.clone()
    y.reshape(-1)[: x.numel() // 2] = 0
    return y


def twins(draft: Draft) -> list:
    return [n for n in draft.graph.nodes if "again" in n.meta and not is_getitem(n)]


def twin_with_another_seed(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Backward draws dropout's mask anew."""
    for node in twins(draft):
        if "salt" in [a.name for a in node.target._schema.arguments] and arg_of(node, "p"):
            yield node, lambda node=node: set_arg(node, "salt", lambda old: old + 1)


def twin_of_a_changed_input(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """What the op took in forward was written to before it ran again."""
    for node in twins(draft):
        x = node.args[0] if node.args else None
        given = isinstance(x, torch.fx.Node) and spec_of(draft.specs, x)
        if given and given.dtype == torch.float64 and node.target is not torch.ops.aten.relu.default:  # whose sign alone is asked for
            yield node, lambda node=node: before(draft, node, 0, bent)


def twin_of_another_layout(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """A Partial sum is replayed and taken for the whole: the reduction was not replayed with it."""
    for node in draft.graph.nodes:
        if node.meta.get("phase") != "backward" or getattr(node.target, "__name__", "") != "move" or node.args[1] != "all_reduce":
            continue
        if "again" in node.args[0].meta and any(p == Partial("sum") for p in spec_of(draft.specs, node.args[0]).placements):
            yield node, lambda node=node: node.replace_all_uses_with(node.args[0])


def reload_of_another_value(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Two values that wait elsewhere are mixed up."""
    waiting = [n for n in draft.graph.nodes if n.target is prefetch]
    for a in waiting:
        for b in waiting:
            mine, other = draft.specs[a.name], draft.specs[b.name]
            alike = mine == other and a.meta["val"].dtype == torch.float64 and len(mine.shape) > 1
            early = list(draft.graph.nodes).index(b.args[0]) < list(draft.graph.nodes).index(a)
            if a is not b and alike and early and a.args[0].args[0].args[0].args != b.args[0].args[0].args[0].args:
                yield next(iter(a.users)), lambda a=a, b=b: a.update_arg(0, b.args[0])
                break


def reload_too_early(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Backward does not wait for the copy: half of it is missing."""
    for node in draft.graph.nodes:
        if node.target is reload and node.meta["val"].dtype == torch.float64 and node.meta["val"].dim() > 1:
            yield node, lambda node=node: after(draft, node, half)


def reload_of_other_numbers(draft: Draft, sizes: tuple[int, ...]) -> Places:
    """Backward takes numbers of another precision or scale than forward gave away."""
    for node in draft.graph.nodes:
        if node.target is reload and node.meta["val"].dtype == torch.float64:
            yield node, lambda node=node: after(draft, node, times, 1 + 1e-6)


SAVING = {
    "a twin with another seed": Bug(twin_with_another_seed, ("bert",), count=4),
    "a twin whose input has changed": Bug(twin_of_a_changed_input, ("gpt2", "llama"), count=6),
    "a twin's reduction is missing": Bug(twin_of_another_layout, ("gpt2", "llama"), count=2),
    "a reload of another value": Bug(reload_of_another_value, ("gpt2", "bert"), count=4),
    "a reload before the copy is over": Bug(reload_too_early, ("gpt2", "norms"), count=4),
    "a reload of other numbers": Bug(reload_of_other_numbers, ("gpt2", "norms"), count=4),
}


@functools.cache
def lowered(name: str, mesh: str, seed: int) -> tuple[Program, Plan]:
    _, _, program, rules = made(name)
    plan = with_saving(kept(name, mesh, seed)[1], program, rules, seed, share=0.4)
    return lower(program, rules, plan), plan


def places(bug: Bug) -> list[tuple[str, str, int, int]]:
    found: list[tuple[str, str, int, int]] = []
    for seed in range(SEEDS):
        for name in bug.models:
            for mesh in bug.meshes:
                count = planted.place_count(lowered(name, mesh, seed)[0], bug, tuple(n for _, n in parse_axes(mesh)))
                if count:
                    found.append((name, mesh, seed, (7 * seed + len(found)) % count))
                if len(found) == bug.count:
                    return found
    return found


@pytest.mark.parametrize("bug", SAVING.values(), ids=SAVING)
def test_planted_bugs_are_caught(bug: Bug) -> None:
    cases = places(bug)
    assert len(cases) == bug.count, "too few places for this bug"
    for name, mesh, seed, which in cases:
        good, plan = lowered(name, mesh, seed)
        bad, node, near = planted.planted(good, bug, plan.sizes, which)  # type: ignore[misc]
        near = {*near, *(u.name for n in bad.graph.nodes if n.name in near and n.name.endswith("_dense") for u in n.users)}
        report = judged(name, bad, plan)
        at = f"{name} {mesh} seed {seed}: {node.name}"
        assert not report.ok, at
        assert report.difference is not None, at
        assert {report.difference.node, report.difference.origin} & near, f"{at}\n{report}\n{near}"


@pytest.mark.parametrize("name", ["gpt2", "bert", "norms", "experts"])
def test_nothing_is_found_in_correct_programs(name: str) -> None:
    good, plan = lowered(name, "a=2,b=2", 0)
    report = judged(name, good, plan, steps=2, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    assert report.ok and not report.first_difference, str(report)


def test_a_bug_of_before_is_found_with_its_op() -> None:
    """A wrong op of forward is named by itself, not by its twin."""
    good, plan = lowered("bert", "a=2,b=2", 0)
    bug = Bug(lambda draft, sizes: ((n, lambda n=n: set_arg(n, "eps", lambda e: 2 * e)) for n in ops(draft, "aten.native_layer_norm")))
    bad, node, _ = planted.planted(good, bug, plan.sizes, 0)  # type: ignore[misc]
    report = judged("bert", bad, plan)
    assert not report.ok and report.difference.node == node.name
