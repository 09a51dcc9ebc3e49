"""The decision, as a small JSON file: readable, diffable, editable, checked on load, never pickled.

A plan names classes of nodes, not nodes: the same operation in every repeated block is one class (`h.*.attn.c_attn.addmm`)
and is decided once. A choice has one symbol per mesh axis, the letter of the op's rule that the axis splits:

    "b n"    axis 0 splits letter b, axis 1 splits letter n
    "-"      the axis splits nothing
    "+"      Partial sums flow through a linear op

What saves memory is said by name, with the members that it is for as a Python slice in program order; all when none is given:

    recompute   "h.*.mlp.gelu[:12]"             ops of forward that run again in backward
    regather    "h.*.attn.c_attn.weight"        values whose conversions are made again in backward instead of being kept; "*": all
    offload     "disk:h.*.mlp.gelu[:4]"         values that wait for backward in host memory, or on disk; "name[1]" is a second output
    state       "optimizer:h.*.mlp.c_fc.weight[2:5]", "disk:optimizer:wte.weight"
                                                parameters whose optimizer state waits between steps in host memory, or on disk
                "param:h.*.mlp.c_fc.weight[:4]", "disk:param:wte.weight"
                                                parameters that wait there themselves, with their gradient and optimizer state
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, ValidationError, field_validator, model_serializer

from .errors import PlanError
from .jsontext import read_json
from .mesh import Axis, Curve, Device, Mesh, check_rising
from .planrows import Alternative, Bytes, Collective, Fused, Part, Replicated, Seconds
from .precision import Precision

T = TypeVar("T")
ALL = "*"
STATE_BUCKET_BYTES = 1 << 27  # of optimizer state that waits elsewhere, what is on the device at a time; a larger one comes alone
_ENTRY = re.compile(r"(?:(?P<tier>disk):)?(?:(?P<what>optimizer|param):)?(?P<name>[^:]+?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclass(frozen=True)
class Entry:
    """One name of `recompute`, `regather`, `offload` or `state`: members start … stop-1 of it, kept on `tier` "host" or "disk".

    what: "optimizer" or "param" in `state`, nothing elsewhere."""

    name: str
    start: int = 0
    stop: int | None = None
    tier: str = "host"
    what: str = ""

    @classmethod
    def parse(cls, text: str, *what: str) -> Entry:
        """Raises PlanError when `text` is no entry, or is one for something else than `what`."""
        found = _ENTRY.fullmatch(text)
        if not found or (found["what"] or "") not in (what or ("",)):
            heads = " or ".join(f'"{w}:"' for w in what)
            raise PlanError(
                f"cannot read the entry {text!r}",
                where="state" if what else "recompute, regather or offload",
                try_=f"{heads} and a name as in choices" if what else 'a name as in choices, or "name[:12]"',
            )
        stop = int(found["stop"]) if found["stop"] else None
        return cls(found["name"], int(found["start"] or 0), stop, found["tier"] or "host", found["what"] or "")

    def __str__(self) -> str:
        part = f"[{self.start or ''}:{'' if self.stop is None else self.stop}]" if self.start or self.stop is not None else ""
        return ("disk:" if self.tier == "disk" else "") + (f"{self.what}:" if self.what else "") + self.name + part

    def of(self, members: Sequence[T]) -> Sequence[T]:
        """Those of all members of a class, in program order, that the entry is for."""
        return members[self.start : self.stop]


def entries_of(name: str, members: Iterable[int], count: int, tier: str = "host", what: str = "") -> list[str]:
    """The entries that say these positions out of `count`, in order."""
    out: list[str] = []
    run: list[int] = []
    for at in [*sorted(members), -1]:
        if run and at != run[-1] + 1:
            stop = None if run[-1] + 1 == count else run[-1] + 1
            out.append(str(Entry(name, run[0], stop, tier, what)))
            run = []
        run.append(at)
    return out


class PlanCurve(Part):
    """Measured seconds of one collective by the bytes that one device sends: see `ir.mesh.Curve`."""

    kind: str
    points: tuple[tuple[float, float], ...] = Field(min_length=1)

    @field_validator("points")
    @classmethod
    def _rising(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        check_rising(points)
        return points


class PlanAxis(Part):
    """One mesh axis. The link's numbers travel with the plan: the chain of collectives between two placements follows from them."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    size: int = Field(ge=1)
    bandwidth_bytes_s: float = Field(default=1e11, gt=0, allow_inf_nan=False)
    latency_s: Seconds = 1e-5
    curves: tuple[PlanCurve, ...] = ()
    within: int = Field(default=0, ge=0)
    inner_bandwidth_bytes_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    inner_latency_s: Seconds = 0.0

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without what was not measured, or is not there."""
        optional = ("curves", "within", "inner_bandwidth_bytes_s", "inner_latency_s")
        return {key: value for key, value in handler(self).items() if key not in optional or value}

    @classmethod
    def of(cls, axis: Axis) -> PlanAxis:
        same = {name: getattr(axis, name) for name in cls.model_fields if name != "curves"}
        return cls(**same, curves=tuple(PlanCurve(kind=c.kind, points=c.points) for c in axis.curves))

    def axis(self) -> Axis:
        same = {name: getattr(self, name) for name in type(self).model_fields if name != "curves"}
        return Axis(**same, curves=tuple(Curve(c.kind, "", c.points) for c in self.curves))


class PlanDevice(Part):
    """What the price of a local copy depends on: it decides between chains of moves, so it travels with the plan."""

    memory_bandwidth_bytes_s: float = Field(default=1e11, gt=0, allow_inf_nan=False)
    launch_s: Seconds = 5e-6


class Memory(Part):
    """Predicted peak of the fullest device, by category, at the moment of the peak. The sum is the peak.

    communication_buffers: what conversions pack, receive and join while they run, buckets of gradients among it, and parameters that were
    gathered. fragmentation: what the allocator loses between tensors, as the device's profile has it.
    """

    parameters: Bytes = 0
    gradients: Bytes = 0
    optimizer: Bytes = 0
    activations: Bytes = 0
    transients: Bytes = 0
    inputs: Bytes = 0
    communication_buffers: Bytes = 0
    fragmentation: Bytes = 0


class Stream(Part):
    """One stream of a step besides compute: a mesh axis, or a link to the host. exposed_s: busy while compute has nothing to do."""

    name: str
    busy_s: Seconds
    exposed_s: Seconds


class Cost(Part):
    """Predicted cost of one training step. `step_s` is the sum of the seconds below it: everything one after the other.

    timeline_s: the step when collectives and transfers run beside compute, as the emitted code has them; 0 where nothing does, or
    prices mean nothing. As the planner sketches it (solver/sketch.py), or simulated on the lowered program (costs/timeline.py).
    """

    step_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    communication_s: Seconds = 0.0
    recompute_s: Seconds = 0.0
    transfer_s: Seconds = 0.0
    peak_bytes: Bytes = 0
    memory: Memory = Memory()
    timeline_s: Seconds = 0.0
    streams: tuple[Stream, ...] = ()

    @property
    def predicted_s(self) -> float:
        """The step as it will run: the timeline where there is one, else the sum."""
        return self.timeline_s or self.step_s

    @property
    def overlapped_s(self) -> float:
        """Seconds of the sum that run beside others; 0 without a timeline."""
        return max(0.0, self.step_s - self.timeline_s) if self.timeline_s else 0.0

    @property
    def exposed_s(self) -> float:
        """Seconds in which streams have work and compute has none, stream by stream."""
        return sum(s.exposed_s for s in self.streams)


def streams_of(busy: Mapping[str, float], exposed: Mapping[str, float]) -> tuple[Stream, ...]:
    """The streams besides compute, by name."""
    return tuple(Stream(name=name, busy_s=busy[name], exposed_s=alone) for name, alone in sorted(exposed.items()))


class Plan(Part):
    """What the solver decided and what it proved. `solve_s` and `alternatives` tell how it was found and are not part of the file.

    gib_worth_s: by how many seconds one more GiB per device would shorten the step, at the margin and under these shardings.
    fuse: fused ops stand in the places of what they compute. precision: the dtypes it computes in; None: those of the model.
    overlap: collectives travel while ops run; False runs each where it is needed.

    Two things are minimised. The sum of all work, one after the other: least_sum_s is the least that was found, bound_s what no plan
    is below, gap and status are about these two. Then, with overlap, `cost.timeline_s`: this is the plan with the shortest timeline that
    was found, and its own sum, `cost.step_s`, may be more than least_sum_s. No timeline is shorter than timeline_bound_s.
    """

    format: Literal["netmind-autopar-plan"] = "netmind-autopar-plan"
    version: Literal[1] = 1
    graph_hash: str = Field(pattern=r"^[0-9a-f]{16}$")
    mode: Literal["training", "inference"] = "training"
    mesh: tuple[PlanAxis, ...] = Field(min_length=1)
    device: PlanDevice = PlanDevice()
    cluster: str = "custom"
    inputs: Literal["global", "local"] = "global"
    fuse: bool = False
    precision: Precision | None = None
    memory_limit_bytes: Bytes | None = None
    optimizer: str = "adamw"
    choices: dict[str, str]
    micro_batches: int = Field(default=1, ge=1)
    recompute: tuple[str, ...] = ()
    regather: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    cost: Cost = Cost()
    collectives: tuple[Collective, ...] = ()
    replicated: tuple[Replicated, ...] = ()
    fusions: tuple[Fused, ...] = ()
    gib_worth_s: Seconds = 0.0
    bound_s: Seconds = 0.0
    gap: Seconds = 0.0
    least_sum_s: Seconds = 0.0
    timeline_bound_s: Seconds = 0.0
    status: Literal["optimal", "feasible", "given"] = "given"
    solver: str = ""
    random_costs: int | None = None
    overlap: bool = True
    _solve_s: float = PrivateAttr(default=0.0)
    _alternatives: tuple[Alternative, ...] = PrivateAttr(default=())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.dumps() == other.dumps()

    def __hash__(self) -> int:
        return int(self.hash(), 16)

    @property
    def timeline_gap(self) -> float:
        """How much of the timeline is above its bound, relative; 0 without a timeline."""
        whole = self.cost.timeline_s
        return max(0.0, whole - self.timeline_bound_s) / whole if whole else 0.0

    @property
    def solve_s(self) -> float:
        """CPU seconds that planning took in this process; 0 for a loaded plan."""
        return self._solve_s

    def timed(self, seconds: float) -> Plan:
        """The same plan, with `solve_s` set."""
        out = self.model_copy()
        out._solve_s = seconds
        return out

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """All meshes that were looked at, the best first, when a search over meshes found this plan; none for a loaded plan."""
        return self._alternatives

    def beside(self, alternatives: tuple[Alternative, ...]) -> Plan:
        """The same plan, with `alternatives` set."""
        out = self.model_copy()
        out._alternatives = alternatives
        return out

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.mesh)

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.mesh)

    def links(self) -> Mesh:
        """The mesh as far as conversions depend on it: a plan lowers alike wherever it is loaded."""
        axes = tuple(a.axis() for a in self.mesh)
        device = Device("planned", (("float32", 1.0),), 1, self.device.memory_bandwidth_bytes_s, 1.0, self.device.launch_s)
        return Mesh(axes, device, self.cluster)

    def dumps(self) -> str:
        """The file's text: the same plan gives the same bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"

    def hash(self) -> str:
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan; the file is replaced whole or not at all. Raises PlanError when it cannot be written."""
        target = Path(path)
        try:
            fd, staged = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        except OSError as e:
            raise PlanError(f"cannot write the plan to {target}", why=str(e), try_="name a folder that exists and can be written") from None
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                f.write(self.dumps())
                f.flush()
                os.fsync(f.fileno())
            os.replace(staged, target)
        except OSError as e:
            Path(staged).unlink(missing_ok=True)
            raise PlanError(f"cannot write the plan to {target}", why=str(e), try_="free some space, or name another folder") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan file. Raises PlanError that names the field at fault."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise PlanError(
                f"cannot read the plan {path}", why=str(e), try_="give the path of a file written by `--json` or Plan.save"
            ) from None
        return cls.loads(text, where=str(path))

    @classmethod
    def loads(cls, text: str, where: str = "") -> Plan:
        """The inverse of `dumps`. Raises PlanError that names the field at fault."""
        try:
            data = read_json(text)
            return cls.model_validate_json(json.dumps(data, allow_nan=False))
        except ValidationError as e:
            first = e.errors()[0]
            field = ".".join(str(p) for p in first["loc"])
            raise PlanError(
                "the plan file is not valid",
                where=f"{where}: {field}".strip(": "),
                why=first["msg"],
                try_="undo the edit of that field, or plan again",
            ) from None
        except ValueError as e:
            raise PlanError(
                "the plan file is not readable JSON",
                where=where,
                why=str(e)[:200],
                try_="plan again: the file is truncated or was edited into something else",
            ) from None
