"""Which devices and links a mesh has: presets, a user's own profile, or the present machine.

A profile is a .toml or .json file (examples/cluster.toml). Every number is required, positive and finite:

    name = "lab"                      any text
    node_size = 4                     devices that share the inner link
    [device]                          or: device = "h100-sxm", a preset
    name = "my-gpu"
    memory_bytes = 80_000_000_000
    memory_bandwidth_bytes_s = 3.35e12
    host_bandwidth_bytes_s = 64e9     device to host, one direction
    launch_s = 4e-6                   fixed price of one kernel
    host_memory_bytes = 250_000_000_000      optional: this device's share of its node's memory; twice memory_bytes when left out
    disk_bandwidth_bytes_s = 3.5e9           optional: its share of its node's disks, writing; 1e9 when left out
    fragmentation = 0.068             optional: what the allocator loses, as a part of the tensors' bytes at the peak; 0 when left out
    [device.peak_flops]               FLOP/s by dtype name; float32 is required, unlisted dtypes run at its rate
    float32 = 67e12
    bfloat16 = 989e12
    [links.intra]                     inside a node: what one device can send, and the latency of one message
    bandwidth_bytes_s = 360e9
    latency_s = 2e-6
    hideable = 1.0                    optional: the part of a collective beside which the device can compute
    [links.inter]                     between nodes; may be left out of a cluster that is one node
    bandwidth_bytes_s = 40e9
    latency_s = 5e-6

`netmind-autopar calibrate` writes one that also holds curves (of the device, of the inner link) and how they were found.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..ir.errors import MeshError, ProfileError
from ..ir.jsontext import read_json
from ..ir.mesh import Axis, Curve, Device, Mesh, check_rising, parse_axes
from .curves import THIN, at_size, make
from .presets import CLUSTERS, DEVICES, HOSTS, host_memory_bytes, match_name
from .space import MESSAGES

MOST_DEVICES = 2**22
MEASURE = "`netmind-autopar calibrate --out my.json` measures this machine"

# Bounds are generous: outside of them a number is in the wrong unit.
Rate = Annotated[float, Field(ge=1e6, le=1e15, allow_inf_nan=False)]  # bytes/s
Flops = Annotated[float, Field(ge=1e8, le=1e17, allow_inf_nan=False)]
Latency = Annotated[float, Field(ge=1e-9, le=0.5, allow_inf_nan=False)]  # s
Launch = Annotated[float, Field(ge=1e-9, le=0.01, allow_inf_nan=False)]  # s
Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]  # of something
Share = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
MemoryBytes = Annotated[int, Field(ge=2**24, le=2**45)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Point = Annotated[list[Annotated[float, Field(gt=0, le=1e20)]], Field(min_length=2, max_length=2)]


class CurveProfile(_Part):
    """Measured points (amount, seconds). Of an op or a class of ops: amounts are floating-point operations, or bytes; of a collective:
    bytes that one device of a group of `group` sends."""

    kind: str = Field(min_length=1)
    dtype: str = ""
    group: int = Field(default=0, ge=0, le=2**20)
    points: list[Point] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _rising(self) -> CurveProfile:
        check_rising(self.points, falling=self.kind in THIN)
        return self

    def curve(self) -> Curve:
        return Curve(self.kind, self.dtype, tuple((x, s) for x, s in self.points))


class LinkProfile(_Part):
    """What one device can send along a link, and the latency of one message. hideable: the part of a collective's seconds beside which the
    device can compute. curves: collectives as they were measured."""

    bandwidth_bytes_s: Rate
    latency_s: Latency
    hideable: Part = 1.0
    curves: list[CurveProfile] = []

    def at(self, size: int) -> tuple[Curve, ...]:
        """The curves of a group of `size` devices, each from the measured group that is nearest in size."""
        out = []
        for kind in dict.fromkeys(c.kind for c in self.curves if c.kind in MESSAGES):
            near = min((c for c in self.curves if c.kind == kind), key=lambda c: abs(math.log(max(c.group, 1) / size)))
            points = near.curve().points
            out.append(make(kind, "", at_size(points, near.group, size, MESSAGES[kind], self.latency_s)))
        return tuple(out)


class LinkProfiles(_Part):
    """`inter` may be left out: the cluster is then one node."""

    intra: LinkProfile
    inter: LinkProfile | None = None


class DeviceProfile(_Part):
    name: str = Field(min_length=1)
    memory_bytes: MemoryBytes
    memory_bandwidth_bytes_s: Rate
    host_bandwidth_bytes_s: Rate
    launch_s: Launch
    peak_flops: dict[str, Flops]
    host_memory_bytes: MemoryBytes = 0
    disk_bandwidth_bytes_s: Rate = 1e9
    fragmentation: Part = 0.0
    curves: list[CurveProfile] = []

    @field_validator("peak_flops")
    @classmethod
    def _known_dtypes(cls, rates: dict[str, float]) -> dict[str, float]:
        if "float32" not in rates:
            raise ValueError("float32 is missing")
        for name in rates:
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"{name!r} is no dtype of PyTorch")
        return rates


class Residual(_Part):
    """How far predictions lay from measurements that their fit had not seen: relative errors, as parts of the measured seconds."""

    kind: str
    points: int = Field(ge=1)
    median: Share
    p90: Share


class Measurement(_Part):
    """What was measured: the lower quartile, the median and the upper quartile of `repeats` samples."""

    name: str
    kind: str
    dtype: str = ""
    group: int = Field(default=0, ge=0)
    amount: float = Field(ge=0)
    seconds: list[float] = Field(min_length=3, max_length=3)
    repeats: int = Field(ge=1)


class Calibration(_Part):
    """Where a profile's numbers come from: see docs/calibrate.md."""

    torch: str
    backend: str
    ranks: int = Field(ge=1)
    threads: int = Field(ge=1)
    seconds: float = Field(ge=0)
    seed: int
    residuals: list[Residual]
    measured: list[Measurement] = []


class ClusterProfile(_Part):
    """One cluster: equal devices, equal nodes. calibration: for one that was measured."""

    name: str = Field(min_length=1)
    node_size: int = Field(ge=1, le=2**20)
    device: DeviceProfile
    links: LinkProfiles
    calibration: Calibration | None = None


def load_profile(path: str | Path) -> ClusterProfile:
    """Read and check a profile. Raises ProfileError that names the field at fault."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text) if file.suffix == ".toml" else read_json(text, constants=True)
    except OSError as e:
        raise ProfileError("cannot read the cluster profile", where=str(file), why=str(e), try_=_presets()) from None
    except ValueError as e:
        raise ProfileError(
            f"the cluster profile is not readable {file.suffix[1:].upper()}",
            where=str(file),
            why=str(e)[:200],
            try_="start from examples/cluster.toml",
        ) from None
    if isinstance(data, dict) and isinstance(data.get("device"), str):
        data["device"] = _device_preset(data["device"], str(file))
    try:
        return ClusterProfile.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise ProfileError(
            "the cluster profile holds no usable value",
            where=f"{file}: {field}".removesuffix(": "),
            why=first["msg"],
            try_="see examples/cluster.toml for every field and its unit",
        ) from None


def _device_preset(name: str, where: str) -> dict[str, Any]:
    if name not in DEVICES:
        raise MeshError(f"unknown device {name!r}", where=where, try_=f"one of {', '.join(DEVICES)}, or a [device] table; {MEASURE}")
    data = {"name": name} | {k: v for k, v in DEVICES[name].items() if k != "source"}
    data |= {"host_memory_bytes": HOSTS[name].memory_bytes, "disk_bandwidth_bytes_s": HOSTS[name].disk_bytes_s}
    return data | {k: host_memory_bytes() for k in ("memory_bytes", "host_memory_bytes") if not data[k]}


def _preset(cluster: str) -> ClusterProfile:
    row = CLUSTERS[cluster]
    links = {
        which: {"bandwidth_bytes_s": link.vendor_bytes_s * link.efficiency, "latency_s": link.latency_s}
        for which, link in (("intra", row.intra), ("inter", row.inter))
    }
    device = _device_preset(row.device, cluster)
    return ClusterProfile.model_validate({"name": cluster, "node_size": row.node_size, "device": device, "links": links})


def _presets() -> str:
    return f"one of {', '.join(CLUSTERS)}, or the path of a .toml or .json profile; {MEASURE}"


def cluster_profile(cluster: str) -> ClusterProfile:
    """The profile of a preset or a file. Raises MeshError for an unknown name, ProfileError for a bad file."""
    if cluster in CLUSTERS:
        return _preset(cluster)
    if cluster.endswith((".toml", ".json")):
        return load_profile(cluster)
    raise MeshError(f"unknown cluster {cluster!r}", where="cluster=", try_=_presets())


def error_band(cluster: str, compute_s: float, communication_s: float) -> float | None:
    """By which part of itself a predicted time may be wrong, when the cluster's profile was calibrated; None otherwise.

    The calibration's errors that nine of ten measurements stayed within, compute and communication weighted by their seconds.
    """
    if not cluster.endswith((".toml", ".json")) or compute_s + communication_s <= 0:
        return None
    try:
        calibration = load_profile(cluster).calibration
    except (ProfileError, MeshError):
        return None
    if calibration is None:
        return None
    known = {r.kind: r.p90 for r in calibration.residuals}
    if "compute" not in known:
        return None
    parts = known["compute"] * compute_s + known.get("communication", known["compute"]) * communication_s
    return parts / (compute_s + communication_s)


def default_cluster() -> str:
    """The preset of the present machine: by the name of its CUDA device, "cpu" when it has none.

    Raises MeshError when the device is not among the presets.
    """
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    if found := match_name(name):
        return found
    raise MeshError(
        f"no numbers are known for the device {name!r}",
        where="cluster=",
        why="without them no plan can be priced",
        try_=f"pass cluster=, {_presets()}",
    )


def make_mesh(mesh: Any, cluster: str | None = None) -> Mesh:
    """The mesh with its links and its device.

    mesh: "dp=2,tp=4", a torch DeviceMesh, a Mesh (returned as it is), or a number of devices (one axis, "axis0"). Axes without
        names are called axis0, axis1 …
    cluster: a preset, a profile's path, or None for the present machine (its own memory then, and for "cpu" its share of the
        machine's memory).

    An axis gets the inner link when all its groups lie within a node, `node_size` consecutive ranks; otherwise the outer one, and with it
    the inner one between those of a group that are on one node. A device has one of each, so axes with the same one share its
    bandwidth (costs/link.py).
    Raises MeshError or ProfileError.
    """
    if isinstance(mesh, Mesh):
        return mesh
    names, ranks = _ranks(mesh)
    chosen = cluster or default_cluster()
    profile = cluster_profile(chosen)
    nodes = ranks // profile.node_size
    axes = []
    for i, name in enumerate(names):
        inside = bool((nodes == np.take(nodes, [0], axis=i)).all())
        tier, link = ("intra", profile.links.intra) if inside else ("inter", profile.links.inter)
        if link is None:
            raise MeshError(
                f"the axis {name!r} leaves the node, and no link between nodes is known",
                where=f"cluster={chosen!r}",
                why=f"the profile describes one node of {profile.node_size} devices",
                try_="a smaller mesh, calibrate --ranks with as many as the mesh has, or a [links.inter] table in the profile",
            )
        size, near, group = ranks.shape[i], profile.links.intra, _within(nodes, i)
        inner = (0, 0.0, 0.0) if inside else (group, near.bandwidth_bytes_s, near.latency_s) if group > 1 else (1, 0.0, 0.0)
        axes.append(Axis(name, size, link.bandwidth_bytes_s, link.latency_s, link.at(size), link.hideable, False, tier, *inner))
    memory, host = profile.device.memory_bytes, profile.device.host_memory_bytes or 2 * profile.device.memory_bytes
    if chosen == "cpu":
        memory, host = (size // min(ranks.size, profile.node_size) for size in (memory, host))
    elif cluster is None:
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Mesh(tuple(axes), _device(profile.device, memory, host), chosen)


def _within(nodes: np.ndarray, axis: int) -> int:
    """How many devices of every group of an axis are on one node, one after the other; 1 where that differs."""
    groups = np.moveaxis(nodes, axis, -1).reshape(-1, nodes.shape[axis])
    count = int((groups[0] == groups[0, 0]).sum())
    if len(groups[0]) % count:
        return 1
    parts = groups.reshape(len(groups), -1, count)
    alike = (parts == parts[:, :, :1]).all() and (np.sort(parts[:, :, 0], axis=1)[:, 1:] > np.sort(parts[:, :, 0], axis=1)[:, :-1]).all()
    return count if alike else 1


def _device(profile: DeviceProfile, memory_bytes: int, host_memory_bytes: int) -> Device:
    return Device(
        profile.name,
        tuple(profile.peak_flops.items()),
        memory_bytes,
        profile.memory_bandwidth_bytes_s,
        profile.host_bandwidth_bytes_s,
        profile.launch_s,
        host_memory_bytes=host_memory_bytes,
        disk_bandwidth_bytes_s=profile.disk_bandwidth_bytes_s,
        fragmentation=profile.fragmentation,
        curves=tuple(c.curve() for c in profile.curves),
    )


def _ranks(mesh: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Axis names, and the rank at every point of the mesh."""
    if isinstance(mesh, str):
        axes = parse_axes(mesh)
        return tuple(name for name, _ in axes), _consecutive(tuple(n for _, n in axes))
    if isinstance(mesh, int) and not isinstance(mesh, bool):
        return ("axis0",), _consecutive((mesh,))
    if isinstance(getattr(mesh, "mesh", None), torch.Tensor):  # a DeviceMesh; torch.distributed need not be built in
        ranks = mesh.mesh.cpu().numpy()
        names = mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(ranks.ndim))
        return tuple(names), ranks
    raise MeshError(f"not a mesh: {type(mesh).__name__}", why="a mesh is a DeviceMesh, a text, or a number of devices", try_='"dp=2,tp=4"')


def _consecutive(sizes: tuple[int, ...]) -> np.ndarray:
    size = math.prod(sizes)
    if not 1 <= size <= MOST_DEVICES:
        raise MeshError(f"a mesh of {size} devices", try_=f"a mesh of 1 to {MOST_DEVICES} devices")
    return np.arange(size).reshape(sizes)
