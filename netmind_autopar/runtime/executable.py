"""What a device needs to run a plan: sources, the meaning of the program's ends, and their specs. No tracer, no solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..ir.program import Input, Output, Program, Signature
from ..ir.spec import Spec
from .reach import reached

# Other sources of the same step: forward alone; gradients that wait before their last reduction; and those joined with what waits.
Variant = Literal["inference", "waiting", "closing"]


@dataclass(frozen=True)
class Executable:
    """A plan's emitted source and what its ends mean. variant: makes the source of another variant, when it is first needed."""

    source: str
    variant: Callable[[Variant], str]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    input_specs: tuple[Spec, ...]
    output_specs: tuple[Spec, ...]
    signature: Signature
    constants: Mapping[str, Tensor]
    tied: Mapping[str, str]
    training: bool
    mode: str
    reached: tuple[frozenset[int], ...]  # of each gradient: the outputs whose gradient enters into it
    parked: Mapping[str, str]  # parameters whose optimizer state waits between steps elsewhere, and where
    turns: int = 1
    joins: tuple[str, ...] = ()  # of micro-batches, see `ir.program.Micro`
    stowed: Mapping[str, str] = field(default_factory=dict)  # parameters that wait elsewhere themselves, and where

    @classmethod
    def of(
        cls,
        lowered: Program,
        source: str,
        variant: Callable[[Variant], str],
        *,
        training: bool,
        parked: Mapping[str, str] | None = None,
        stowed: Mapping[str, str] | None = None,
    ) -> Executable:
        """From a lowered program: `specs` of its placeholders, `expects` of its results."""
        specs = tuple(lowered.specs[i.node] for i in lowered.inputs)
        return cls(
            source,
            variant,
            lowered.inputs,
            lowered.outputs,
            specs,  # type: ignore[arg-type]
            lowered.results,
            lowered.signature,
            lowered.constants,
            lowered.tied,
            training,
            lowered.mode,
            reached(lowered),
            parked or {},
            lowered.turns,
            lowered.micro.joins if lowered.micro else (),
            stowed or {},
        )


class Roles:
    """The ends of the program, sorted once."""

    def __init__(self, e: Executable) -> None:
        pairs = list(zip(e.inputs, e.input_specs, strict=True))
        users = sorted((p for p in pairs if p[0].role == "input"), key=lambda p: p[0].index)
        self.users, self.user_specs = [i for i, _ in users], [s for _, s in users]
        self.leading = [i for i in e.inputs if i.role != "tangent"]
        self.leading_specs = [s for i, s in pairs if i.role != "tangent"]
        self.tangents = [(i, s) for i, s in pairs if i.role == "tangent"]
        ends = list(zip(e.outputs, e.output_specs, strict=True))
        self.results = [o for o, _ in ends if o.role != "grad"]
        self.result_specs = [s for o, s in ends if o.role != "grad"]
        self.leaves = 1 + max((o.index for o in self.results if o.role == "output"), default=-1)
        order = {(i.name, i.index): k for k, i in enumerate(self.leading) if i.role in ("param", "input")}
        self.grad_slots = [order[o.name, o.index] for o, _ in ends if o.role == "grad"]
        self.given = {o.index for o, _ in ends if o.role == "grad" and o.index >= 0}  # inputs that get a gradient
        changed = {o.name for o in self.results if o.role == "mutation"}
        self.reached = e.reached
        self.changed = [k for k, i in enumerate(self.leading) if i.role == "buffer" and i.name in changed]
