"""`verify` and `compare`: outputs, gradients, buffers and parameters of all ranks against the original model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..api import lower_plan
from ..arguments import check_model
from ..ir.plan import Plan
from ..ir.program import Program
from ..ir.spec import Spec
from ..passes.emit import emit
from ..runtime import threads
from ..tracer.capture import capture
from .judge import magnitude, rank_errors, tolerance, worst
from .locate import Difference, first_difference
from .perturb import AMOUNT
from .report import Report, Row
from .sides import Optimizer, Sides, captured, promoted, ranks, weakest, widened

KINDS = {"output": "output", "grad": "gradient", "mutation": "buffer"}
NO_OPERATION = "no operation: the captured graph itself differs from the model"
IN_THE_FILE = "no operation of the graph: the file that is emitted from it computes something else"


@dataclass(frozen=True)
class Failure:
    """What a failing comparison computed: enough to find it again, smaller. `state` holds the global value of every placeholder.

    base: the captured program; `program` is that one, or that one in float64, and `lowered` follows it.
    """

    base: Program
    program: Program
    lowered: Program
    plan: Plan
    state: dict[str, Tensor]
    difference: Difference


def verify(
    model: nn.Module,
    sample_inputs: Any,
    plan: Plan,
    *,
    steps: int = 1,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    differentiable: Sequence[str] | None = None,
    perturb: float = AMOUNT,
    shrink: bool = False,
) -> Report:
    """Compare a plan with the original: every output, gradient and buffer on every rank, over `steps` training steps.

    model, sample_inputs: as given to `plan`, with real values. optimizer: makes a torch optimizer from parameters, such as
    `lambda p: torch.optim.AdamW(p)`, one that treats every element by itself; without one the parameters stay as they are.
    Tolerances: 1e-9 in float64, 1e-4 in float32, and within 1e-9 once more with all of the program in float64.
    perturb: relative size of the seeded noise on parameters, float buffers and inputs, so that ones, zeros and equal labels hide
    nothing (see `perturb.py`); 0 takes the values as they are. shrink: make a failing case as small as it gets (`Report.shrunk`).
    The first step is run a second time as the emitted file, which is what processes run.
    A model that drops out is compared with its captured graph under the same random numbers, a policy of precision with the captured
    graph that has its casts (in float64 that is the model's own function). Raises PlanError when the plan was
    made for another model or mesh, InputError when the model has no values.
    """
    check_model(model)
    program = capture(
        model, sample_inputs, outputs=outputs, differentiable=differentiable, mode=plan.mode, fuse=plan.fuse, precision=plan.precision
    )
    lowered = lower_plan(program, plan)
    return compare(
        model,
        sample_inputs,
        program,
        lowered,
        plan,
        steps=steps,
        optimizer=optimizer,
        seed=seed,
        perturb=perturb,
        shrink=shrink,
        emitted=True,
    )


def compare(
    model: nn.Module,
    sample_inputs: Any,
    program: Program,
    lowered: Program,
    plan: Plan,
    *,
    steps: int = 1,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    perturb: float = AMOUNT,
    shrink: bool = False,
    emitted: bool | None = None,
) -> Report:
    """`verify` for a program that is captured and lowered already.

    emitted: run the first step once more as the emitted file, a thread for each rank; None: of micro-batches only.
    What computes in less than float64 differs from itself by rounding as soon as a sum is split. The ranks are therefore compared
    twice: with the original within the tolerance of their least precise dtype, and once more with everything in float64,
    against the captured graph, within float64's.
    """
    run = _Run(model, sample_inputs, program, lowered, plan, optimizer, seed, perturb)
    emitted = plan.micro_batches > 1 if emitted is None else emitted
    for step in range(steps):
        failure = run.step(step, emitted=emitted and step == 0)
        if failure is not None or not run.ok:
            report = Report(tuple(run.rows), str(failure.difference) if failure else run.outside, tuple(run.notes), failure)
            return report.shrink() if shrink and failure else report
    return Report(tuple(run.rows), "", tuple(run.notes))


@dataclass
class _Run:
    """One comparison on its way through the steps."""

    model: nn.Module
    sample_inputs: Any
    program: Program
    lowered: Program
    plan: Plan
    optimizer: Optimizer | None
    seed: int
    perturb: float
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outside: str = NO_OPERATION  # where a difference lies that no operation of the graph makes

    def __post_init__(self) -> None:
        self.weak = weakest(self.program)
        self.side = self._sides(self.perturb)
        self.small: dict[str, Tensor] = {}  # per parameter the elements that got no more than rounding for a gradient
        self.wide = (promoted(self.program), promoted(self.lowered)) if self.weak is not None else None
        if self.side.stand_in:
            policy = self.program.precision
            why = f"the policy computes in {policy.compute}" if policy else "random numbers are drawn"
            self.notes.append(f"{why}: compared with the captured graph on one device, not with the model itself")

    @property
    def ok(self) -> bool:
        return all(row.error <= row.tolerance for row in self.rows)

    def _sides(self, perturb: float) -> Sides:
        sizes = self.plan.sizes
        return Sides(self.model, self.sample_inputs, self.program, self.lowered, sizes, self.optimizer, perturb=perturb, seed=self.seed)

    def step(self, step: int, *, emitted: bool = False) -> Failure | None:
        """Compare one step and go on to the next; what is known of the first difference when there is one."""
        state, expected = self._expected(step)
        self.rows += [Row(step, "gradient", name, float("inf"), 0.0) for name in self.side.ungiven()]
        self.rows += [Row(step, "buffer", name, float("inf"), 0.0) for name in self.side.unkept(state)]
        if self.lowered.outputs != self.program.outputs:
            self.rows.append(Row(step, "output", "the program's ends", float("inf"), 0.0))
            return None
        found = self._attempt(lambda: self.side.lockstep(state), step)
        if found is not None:
            self.rows += self._compared(step, expected, found, self.lowered)
        narrow_failed = not self.ok
        failure = self._exactly(state, step)
        if failure is None and narrow_failed:
            failure = self._failure(self.program, self.lowered, state)
        if self.ok and emitted:
            self._emitted(state, expected, step)
        if self.ok and found is not None:
            self.side.advance(expected, found)
            if self.optimizer:
                self.rows += self._parameters(step, expected)
        return failure

    def _emitted(self, state: dict[str, Tensor], expected: Sequence[Tensor], step: int) -> None:
        """The step as the emitted file computes it, of a program that is right."""
        source = emit(self.lowered, self.plan, inference=self.program.mode == "inference")
        found = self._attempt(
            lambda: threads.run(source, self.lowered, self.plan.axis_names, self.plan.sizes, self.side.dealt(state)), step
        )
        if found is not None:
            self.rows += self._compared(step, expected, found, self.lowered, kind="emitted ")
        if not self.ok:
            self.outside = IN_THE_FILE

    def _expected(self, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """State and reference's results; where noise drove the model out of its range, the values are taken as they were given."""
        state, trouble = self.side.snapshot(self.seed + step), None
        try:
            expected = self.side.reference(state)
            if step or not self.perturb or all(_finite(t) for t in expected):
                return state, expected
        except Exception as error:
            if step or not self.perturb:
                raise
            trouble = error
        calm = self._sides(0.0)
        given = calm.snapshot(self.seed)
        other = calm.reference(given)
        if trouble is None and not all(_finite(t) for t in other):
            return state, expected
        self.notes.append("values as given: with noise on them the model itself gives no finite result")
        self.side = calm
        return given, other

    def _attempt(self, run: Any, step: int) -> list[list[Tensor]] | None:
        try:
            return run()
        except Exception as error:
            text = str(error).strip().splitlines()
            self.rows.append(Row(step, "run", f"{type(error).__name__}: {text[0] if text else ''}"[:120], float("inf"), 0.0))
            return None

    def _exactly(self, state: dict[str, Tensor], step: int) -> Failure | None:
        """The comparison in float64, of a program that is not float64 throughout."""
        if self.wide is None:
            return None
        program, lowered = self.wide
        wide = {k: widened(v) for k, v in state.items()}
        try:
            expected = captured(program, wide)
        except Exception:  # an op that asks for one dtype
            self.notes.append("not compared in float64: the program cannot be computed in it")
            self.wide = None
            return None
        found = self._attempt(lambda: ranks(lowered, self.plan.sizes, wide), step)
        rows = [] if found is None else self._compared(step, expected, found, lowered, exact=True)
        self.rows += rows
        return None if found is not None and all(r.error <= r.tolerance for r in rows) else self._failure(program, lowered, wide)

    def _failure(self, program: Program, lowered: Program, state: dict[str, Tensor]) -> Failure | None:
        difference = first_difference(program, lowered, self.plan.sizes, state)
        return None if difference is None else Failure(self.program, program, lowered, self.plan, state, difference)

    def _compared(
        self,
        step: int,
        expected: Sequence[Tensor],
        found: Sequence[Sequence[Tensor]],
        lowered: Program,
        *,
        exact: bool = False,
        kind: str = "",
    ) -> list[Row]:
        outputs = self.program.outputs
        largest = max((magnitude(w) for o, w in zip(outputs, expected, strict=True) if o.role == "grad"), default=0.0)
        weak = 0.0 if exact or self.weak is None else tolerance(self.weak)
        rows: list[Row] = []
        for out, spec, want, have in zip(outputs, lowered.results, expected, found, strict=True):
            limit = tolerance(want.dtype)
            error = worst(_errors(want, have, spec, self.plan.sizes, largest if out.role == "grad" else 0.0))
            rows.append(Row(step, kind + KINDS[out.role], out.name, error, max(limit, weak if limit else 0.0)))
        return rows

    def _parameters(self, step: int, expected: Sequence[Tensor]) -> list[Row]:
        """Parameters after the optimizer's step. Elements whose gradient is rounding are left out: Adam makes whole steps of it."""
        rows = []
        grads = {o.name: g for o, g in zip(self.program.outputs, expected, strict=True) if o.role == "grad" and o.index < 0}
        largest = max((magnitude(g) for g in grads.values()), default=0.0)
        for name, grad in grads.items():
            noise = self.small[name] = (grad.abs() < 1e-4 * largest) | self.small.get(name, torch.zeros((), dtype=torch.bool))
            node, want = self.side.nodes["param", name], self.side.original(name).detach()
            pieces = zip(self.side.locals[node], self.side.split(node, want), self.side.split(node, noise), strict=True)
            have = [torch.where(still, right, mine) for mine, right, still in pieces]
            error = worst(_errors(want, have, self.side.specs[node], self.plan.sizes))
            rows.append(Row(step, "parameter", name, error, max(tolerance(want.dtype), tolerance(self.weak) if self.weak else 0.0)))
        return rows


def _errors(want: Tensor, have: Sequence[Tensor], spec: Spec, sizes: tuple[int, ...], largest: float = 0.0) -> list[float]:
    try:
        return rank_errors(want, have, replace(spec, dtype=want.dtype), sizes, largest)
    except RuntimeError:  # shapes that do not fit each other
        return [float("inf")]


def _finite(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all())
