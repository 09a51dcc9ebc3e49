"""One random module under one odd plan: is it exact? And when it is not: the smallest module and plan that are not either."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from random_modules import Recipe, refusal
from random_plans import random_plan

from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.plan import Plan
from netmind_autopar.ir.program import Program
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare

TRIES = 6  # plans that are tried on a smaller module before it counts as exact
IDLE = "-"


@dataclass(frozen=True)
class Case:
    """A plan by name: of a mesh, "solved" under random prices or "drawn" without prices, by a seed."""

    mesh: str
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind} plan {self.seed} on {self.mesh}"


@dataclass(frozen=True)
class Verdict:
    """`error`: the largest relative error, of what is compared in float64; `text` says what is wrong, "" when nothing is."""

    error: float
    text: str = ""
    plan: Plan | None = None

    @property
    def ok(self) -> bool:
        return not self.text


class Subject:
    """A module captured once, judged under many plans."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model, self.inputs = recipe.build()

    @functools.cached_property
    def program(self) -> Program:
        return capture(self.model, self.inputs)

    @functools.cached_property
    def rules(self) -> dict[str, Rule]:
        return bind_program(self.program)

    def plan(self, case: Case) -> Plan:
        if case.kind == "drawn":
            return random_plan(self.program, self.rules, case.mesh, case.seed)
        links = make_mesh(case.mesh, "h100-sxm")
        hash_ = graph_hash(self.program)
        return solve(self.program, self.rules, links, graph_hash=hash_, random_costs=case.seed, time_limit=10.0, gap=0.2)

    def judge(self, case: Case) -> Verdict:
        """Two training steps of all ranks against the original. Whatever is raised on the way counts as wrong."""
        try:
            return self.judge_plan(self.plan(case), emitted=case.seed % 4 == 0)
        except Exception as e:
            return Verdict(float("inf"), f"{type(e).__name__}: {e}")

    def judge_plan(self, plan: Plan, *, emitted: bool = False) -> Verdict:
        """`judge` for one plan; raises what capture and lowering raise."""
        lowered = lower(self.program, self.rules, plan)
        report = compare(
            self.model,
            self.inputs,
            self.program,
            lowered,
            plan,
            steps=2,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
            perturb=0.0,
            emitted=emitted,
        )
        error = max((r.error for r in report.rows if r.tolerance <= 1e-9), default=0.0)
        if report.ok:
            return Verdict(error, "", plan)
        wrong = ", ".join(f"{r.kind} {r.name} {r.error:.1e}" for r in report.rows if not r.error <= r.tolerance)
        return Verdict(float("inf") if error != error else error, f"{wrong}; first: {report.first_difference}", plan)


def smallest(recipe: Recipe, case: Case) -> tuple[Recipe, Verdict]:
    """Take steps out, outputs and gradients of inputs away, as long as some plan on the same mesh still fails; then undo choices."""
    failing = _first_failure(recipe, case)
    if failing is None:
        return recipe, Verdict(0.0, "it fails no more: not deterministic")
    for change in (_simpler_end, _fewer_steps, _simpler_end, _fewer_steps):
        recipe, failing = change(recipe, failing, case)
    return recipe, _idle(recipe, failing)


def _first_failure(recipe: Recipe, case: Case) -> Verdict | None:
    """A verdict against a module that eager PyTorch runs, under the plan named or a few others of its kind."""
    if not recipe.steps or refusal(recipe):
        return None
    subject = Subject(recipe)
    verdicts = (subject.judge(Case(case.mesh, case.kind, case.seed + k)) for k in range(TRIES))
    return next((v for v in verdicts if not v.ok), None)


def _fewer_steps(recipe: Recipe, failing: Verdict, case: Case) -> tuple[Recipe, Verdict]:
    k = len(recipe.steps)
    while k:
        k = min(k, len(recipe.steps)) - 1
        smaller = recipe.without(k)
        if found := _first_failure(smaller, case):
            recipe, failing = smaller, found
    return recipe, failing


def _simpler_end(recipe: Recipe, failing: Verdict, case: Case) -> tuple[Recipe, Verdict]:
    for smaller in (recipe.simple(), recipe.without_gradients()):
        if smaller != recipe and (found := _first_failure(smaller, case)):
            recipe, failing = smaller, found
    return recipe, failing


def _idle(recipe: Recipe, failing: Verdict) -> Verdict:
    """Undo choices of the plan one by one, as long as it still fails."""
    if failing.plan is None:
        return failing
    subject, plan = Subject(recipe), failing.plan
    nothing = " ".join(IDLE for _ in plan.mesh)
    judge = _guarded(subject.judge_plan)
    for name in sorted(plan.choices):
        less = plan.model_copy(update={"choices": {**plan.choices, name: nothing}})
        found = judge(less)
        if found and not found.ok:
            plan, failing = less, found
    return failing


def _guarded(judge: Callable[[Plan], Verdict]) -> Callable[[Plan], Verdict | None]:
    def run(plan: Plan) -> Verdict | None:
        try:
            return judge(plan)
        except Exception:  # a plan that no longer fits together
            return None

    return run


def story(recipe: Recipe, case: Case, verdict: Verdict) -> str:
    """What to read about a failure: the module's source, the plan's choices that matter, what is wrong."""
    chosen = {k: v for k, v in verdict.plan.choices.items() if set(v.split()) != {IDLE}} if verdict.plan else {}
    listed = "\n".join(f"#   {name}: {choice}" for name, choice in chosen.items())
    return f"{recipe.source()}\n# {case}, choices:\n{listed}\n# {verdict.text}\n"
