"""Reading what the user passes: memory sizes and meshes, with errors that say what to write instead."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .costs.device import default_cluster, make_mesh
from .health import watch
from .ir.errors import InputError, MeshError, PlanError
from .ir.mesh import Mesh, parse_axes
from .ir.plan import Plan
from .kernels.fused.tuned import tuned_for
from .runtime.agree import together
from .runtime.join import join
from .solver.meshes import Devices

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(value: str | int | None) -> int | None:
    """`"70GiB"`, `"512MB"` or a number of bytes → bytes; None stays None. Raises InputError on anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise InputError(f"cannot read the memory limit {value!r}", why="a limit is a positive number with a unit", try_='memory="70GiB"')
    return int(float(found[1]) * UNITS[found[2].upper()])


def mesh_or_devices(mesh: Any, devices: int | None, cluster: str | None) -> Mesh | Devices:
    """The mesh to plan for, or the devices whose mesh is to be found. Raises InputError unless exactly one of both is given."""
    if (mesh is None) == (devices is None):
        raise InputError(
            "no mesh is given" if mesh is None else "a mesh and a number of devices are given",
            why="a plan is for one mesh, or for the best of all meshes of a number of devices",
            try_='mesh="dp=2,tp=4", or devices=8',
        )
    if devices is None:
        return make_mesh(mesh, cluster or default_cluster())
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise InputError(f"devices={devices!r} is no number of devices", try_="devices=8")
    return Devices(devices, cluster or default_cluster())


def fusing(fuse: bool | str) -> bool:
    """Whether fused ops are placed: "auto" means where their kernels were timed, on a GPU of this machine (kernels/fused/tuned.py). Raises
    InputError for another value."""
    if isinstance(fuse, bool):
        return fuse
    if fuse != "auto":
        raise InputError(f"fuse={fuse!r} is no choice", why="fused ops are placed, or not, or where they were timed", try_='fuse="auto"')
    return torch.cuda.is_available() and bool(tuned_for(torch.cuda.get_device_name()))


def check_model(model: object) -> nn.Module:
    """Raises InputError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}, not an nn.Module", try_="pass the module itself, unmodified")
    return model


def running_mesh(mesh: DeviceMesh | str, plan: Plan | None = None, timeout_s: float | None = None) -> DeviceMesh:
    """The DeviceMesh to run on, its ranks watched over if `timeout_s` is given. A mesh string is laid over all processes; one process
    alone gets a group of its own.

    Raises MeshError when there are more or fewer processes than the mesh has devices, PlanError when the plan is for another mesh.
    """
    found = _running(mesh)
    if timeout_s is not None and dist.is_initialized() and found.size() == dist.get_world_size():
        if not 1 <= timeout_s < float("inf"):
            raise InputError(f"timeout_s={timeout_s!r} is no time to wait for a rank", try_="timeout_s=30, or None to wait for ever")
        watch.start(timeout_s, found.device_type)
    if plan is not None:
        together(lambda: check_plan_mesh(plan, found), "looking at the plan")
    return found


def _running(mesh: DeviceMesh | str) -> DeviceMesh:
    if isinstance(mesh, DeviceMesh):
        if mesh.get_coordinate() is None:
            raise MeshError(
                "this process is not part of the mesh", where=str(mesh), try_="build the mesh over all processes that call autoparallelize"
            )
        return mesh
    if not isinstance(mesh, str):
        raise MeshError(
            f"the mesh is a {type(mesh).__name__}",
            why="a mesh is a DeviceMesh or text",
            try_='init_device_mesh("cpu", (2, 2)) or "dp=2,tp=2"',
        )
    axes = parse_axes(mesh)
    need = math.prod(n for _, n in axes)
    have = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if need != have:
        raise MeshError(
            f"the mesh {mesh} has {need} devices, and {have} process{'es' if have > 1 else ''} run",
            why="one process drives one device",
            try_=f"torchrun --nproc-per-node {need} …, or a mesh of {have}",
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        _start(have, "nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return init_device_mesh(kind, tuple(n for _, n in axes), mesh_dim_names=tuple(name for name, _ in axes))


def check_plan_mesh(plan: Plan, mesh: DeviceMesh) -> None:
    """Raises PlanError unless the plan was made for a mesh of these sizes and, where it has names, these names."""
    names = mesh.mesh_dim_names
    if plan.sizes == tuple(mesh.shape) and (names is None or tuple(names) == plan.axis_names):
        return
    have = ",".join(f"{name}={n}" for name, n in zip(names or ["?"] * mesh.ndim, mesh.shape, strict=True))
    raise PlanError(
        f"the plan was made for the mesh {plan.links()}, and the mesh here is {have}",
        why="every choice of a plan holds for one mesh",
        try_="plan again for this mesh, or run on the plan's",
    )


def _start(processes: int, backend: str) -> None:
    if processes > 1 or "MASTER_ADDR" in os.environ:
        join(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
