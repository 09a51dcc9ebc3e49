"""What a plan tells besides its decisions: rows of its tables."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Collective(Part):
    """All collectives of one kind along one axis in one phase: how often, bytes sent per device, seconds."""

    kind: str
    axis: str
    phase: Literal["forward", "backward"]
    count: int = Field(ge=0)
    bytes: Bytes
    seconds: Seconds


class Replicated(Part):
    """An operation that has no sharding rule and runs whole on every device; `why` none was found."""

    op: str
    where: str
    count: int = Field(ge=1)
    seconds: Seconds
    why: str = ""


class Alternative(Part):
    """Another way to run the model, beside a plan: another mesh, or a baseline on the same mesh.

    ruled out: its bound is no better than the plan. does not fit: `step_s` and `peak_bytes` are those without a limit, where known.
    no place: the model, or its sizes, leave none.
    """

    name: str
    status: Literal["planned", "ruled out", "does not fit", "no place", "not planned", "not tried"]
    step_s: Seconds | None = None
    timeline_s: Seconds = 0.0
    bound_s: Seconds = 0.0
    peak_bytes: Bytes | None = None
    why: str = ""


class Fused(Part):
    """`count` sites of one kind in forward: fused, or, with `why`, left as they are on the user's line `where` (docs/fusion.md)."""

    name: str
    count: int = Field(ge=1)
    where: str = ""
    why: str = ""
