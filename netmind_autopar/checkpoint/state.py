"""What a checkpoint holds of a run: collected from live objects, and put back into them.

Tensors of the model are called `model/<name>`, those of an optimizer `optimizer/<parameter>/<key>`. Everything else is JSON in sections:
optimizer, scheduler, rng, data, extra. A section that is not alike on all ranks is kept per rank.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from ..ir.errors import DamagedError, InputError
from ..runtime.parked import Parked
from ..runtime.tensorfile import DTYPES
from .manifest import Index, TensorRecord
from .tree import Encoder, decode

# of a group of parameters: how the machine at hand computes, not what; what the optimizer at hand says stands
LOCAL_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
PLACED = "optimizer/"


@dataclass(frozen=True)
class Run:
    """The live objects of a training run. optimizer, scheduler: one, or several by name."""

    model: nn.Module
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None
    scheduler: Any = None
    data: Any = None
    extra: Mapping[str, Any] | None = None
    rng: bool = True


@dataclass
class Collected:
    """What this rank has to save: sections of JSON, and tensors by name."""

    sections: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Tensor | Parked] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """Of each section a hash of all that it holds but the tensors that are spread over the ranks."""
        out = {}
        for name, section in self.sections.items():
            whole = hashlib.sha256(json.dumps(section, sort_keys=True).encode())
            for key in sorted(_names(section)):
                tensor = self.stored[key]
                if not isinstance(tensor, Parked | DTensor):
                    raw = tensor.detach().to("cpu").contiguous().reshape(-1)
                    whole.update(memoryview(raw.view(torch.uint8).numpy()) if raw.numel() else b"")
            out[name] = whole.hexdigest()
        return out

    def own(self, sections: set[str], rank: int) -> None:
        """Keep these sections alone, and call their plain tensors after this rank: on rank 0 there are others of these names."""
        self.sections = {name: section for name, section in self.sections.items() if name in sections}
        for name, section in self.sections.items():
            moved = {key: f"rank-{rank}/{key}" for key in _names(section) if not isinstance(self.stored[key], Parked | DTensor)}
            self.sections[name] = _renamed(section, moved)
            for key, new in moved.items():
                self.stored[new] = self.stored.pop(key)


def collect(run: Run) -> Collected:
    """Everything of a run, as references to the live tensors. Raises InputError for what has no place in a checkpoint."""
    out = Collected()
    out.stored.update(model_tensors(run.model))
    optimizers = by_name(run.optimizer)
    out.sections["optimizer"] = {label: _optimizer(run.model, optimizer, label, out) for label, optimizer in optimizers.items()}
    texts, tensors = Encoder(stored=out.stored), Encoder(lambda t: not t.dim(), out.stored)
    out.sections["scheduler"] = {k: texts.encode(_said(s), f"scheduler/{k}") for k, s in by_name(run.scheduler).items()}
    out.sections["data"] = texts.encode(_said(run.data), "data")
    out.sections["extra"] = {k: tensors.encode(_said(v), f"extra/{k}") for k, v in (run.extra or {}).items()}
    out.sections["rng"] = Encoder(lambda t: True).encode(generators(), "rng") if run.rng else None
    return out


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and those buffers that a state_dict has; each once, whatever its names."""
    hidden = {f"{prefix}.{name}".lstrip(".") for prefix, m in model.named_modules() for name in m._non_persistent_buffers_set}
    found = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    found |= {f"model/{name}": b.detach() for name, b in model.named_buffers() if name not in hidden}
    if empty := [name for name, t in found.items() if t.is_meta]:
        raise InputError(f"{empty[0]} lies on the meta device and has no values", try_="give the module that autoparallelize returned")
    return found


def by_name(given: Any) -> dict[str, Any]:
    """One object, or several by name, as several."""
    return {} if given is None else dict(given) if isinstance(given, Mapping) else {"": given}


def is_stateful(x: Any) -> bool:
    return callable(getattr(x, "state_dict", None)) and callable(getattr(x, "load_state_dict", None))


def _said(x: Any) -> Any:
    return x.state_dict() if is_stateful(x) else x


def _optimizer(model: nn.Module, optimizer: Optimizer, label: str, out: Collected) -> dict[str, Any]:
    """Groups by the names of their parameters, and the state by name; what waits elsewhere is taken from there."""
    encoder = Encoder(lambda t: not t.dim(), out.stored)
    groups, state = [], {}
    for number, (members, group) in enumerate(zip(_members(model, optimizer), optimizer.param_groups, strict=True)):
        options = {k: encoder.encode(v, f"{PLACED}{label} group {number}/{k}") for k, v in group.items() if k != "params"}
        groups.append({"parameters": members, "options": options})
        for name, parameter in zip(members, group["params"], strict=True):
            if parameter in optimizer.state:
                held = dict(optimizer.state[parameter])
                state[name] = encoder.encode(held, f"{PLACED}{label}{'/' if label else ''}{name}")
    return {"groups": groups, "state": state}


def _members(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters of each group. Raises InputError for parameters of another model."""
    names = {id(p): name for name, p in model.named_parameters()}
    out = []
    for group in optimizer.param_groups:
        if any(id(p) not in names for p in group["params"]):
            raise InputError(
                "the optimizer holds a parameter that the model does not have",
                why="its state is saved under the parameter's name",
                try_="build the optimizer from pm.parameters(), and give that pm",
            )
        out.append([names[id(p)] for p in group["params"]])
    return out


def generators() -> dict[str, Any]:
    """The state of every generator of random numbers that has no owner."""
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": device}


def set_generators(state: Mapping[str, Any]) -> None:
    """The inverse of `generators`. A state of CUDA's stays unused without CUDA."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Restoring:
    """One checkpoint on its way into a run: says what to read, and puts what was read into the live objects."""

    def __init__(self, run: Run, sections: Mapping[str, Any], index: Index) -> None:
        self.run, self.sections, self.index = run, sections, index
        self.targets: dict[str, Tensor] = {}
        self._model()
        self._wanted: dict[str, list[str]] = {}
        for label, optimizer in by_name(run.optimizer).items():
            self._optimizer(label, optimizer)
        live = collect_templates(run)
        for name in ("scheduler", "data", "extra"):
            for key in _names(sections.get(name)):
                self.targets[key] = self._plain(key, live.get(key.split("/", 1)[1] if key.startswith("rank-") else key))

    def _record(self, name: str) -> TensorRecord:
        if name not in self.index.tensors:
            raise DamagedError(f"tensors.json is damaged: it does not have {name!r}")
        return self.index.tensors[name]

    def _model(self) -> None:
        have, saved = model_tensors(self.run.model), [name for name in self.index.tensors if name.startswith("model/")]
        strange = [
            *(f"{n} is not in the checkpoint" for n in have if n not in self.index.tensors),
            *(f"{n} is not in the model" for n in saved if n not in have),
        ]
        strange += [
            f"{n} has the shape {tuple(t.shape)}, in the checkpoint {self.index.tensors[n].shape}"
            for n, t in have.items()
            if n in self.index.tensors and tuple(t.shape) != self.index.tensors[n].shape
        ]
        if strange:
            raise InputError(
                "the checkpoint is of another model",
                where="; ".join(s.removeprefix("model/") for s in strange[:5])
                + (f"; and {len(strange) - 5} more" if len(strange) > 5 else ""),
                try_="build the model as it was when the checkpoint was written",
            )
        self.targets.update(have)

    def _optimizer(self, label: str, optimizer: Optimizer) -> None:
        saved = (self.sections.get("optimizer") or {}).get(label)
        if saved is None:
            raise InputError(
                f"the checkpoint has no optimizer{f' called {label!r}' if label else ''}", try_="leave optimizer= out, or load another one"
            )
        here = _members(self.run.model, optimizer)
        there = [list(group["parameters"]) for group in saved["groups"]]
        if [set(g) for g in here] != [set(g) for g in there]:
            raise InputError(
                "the optimizer's groups are not those of the checkpoint",
                where=_first_difference(here, there),
                why="options and state belong to groups of parameters, by name",
                try_="build the optimizer with the same groups, in the same order",
            )
        parameters = dict(self.run.model.named_parameters())
        for name, state in saved["state"].items():
            for key in _names(state):
                self.targets[key] = self._as(key, parameters[name])

    def _as(self, key: str, parameter: Tensor) -> Tensor:
        """Memory for a tensor of a parameter's state: lies as the parameter where it has its shape, else whole on every rank."""
        record = self._record(key)
        dtype = DTYPES[record.dtype]
        if record.shape == tuple(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype).detach()
        if not isinstance(parameter, DTensor):
            return torch.empty(record.shape, dtype=dtype, device=parameter.device)
        local = torch.empty(record.shape, dtype=dtype, device=parameter.to_local().device)
        return DTensor.from_local(local, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim, run_check=False)

    def _plain(self, key: str, live: Tensor | Parked | None) -> Tensor:
        """Memory for a tensor of `extra`: as the object that is given for it has it, else whole on the CPU."""
        record = self._record(key)
        if isinstance(live, Tensor) and tuple(live.shape) == record.shape:
            return torch.empty_like(live, dtype=DTYPES[record.dtype]).detach()
        return torch.empty(record.shape, dtype=DTYPES[record.dtype])

    def apply(self) -> dict[str, Any]:
        """Put what was read into optimizers, schedulers, generators and whatever can load its state. Returns data and extra as they are."""
        for label, optimizer in by_name(self.run.optimizer).items():
            self._load_optimizer(optimizer, self.sections["optimizer"][label])
        found = {name: decode(self.sections.get(name), self.targets, f"the section {name!r}") for name in ("scheduler", "data", "extra")}
        for label, scheduler in by_name(self.run.scheduler).items():
            if label not in (found["scheduler"] or {}):
                raise InputError(f"the checkpoint has no scheduler{f' called {label!r}' if label else ''}", try_="leave scheduler= out")
            scheduler.load_state_dict(found["scheduler"][label])
        if is_stateful(self.run.data) and found["data"] is not None:
            self.run.data.load_state_dict(found["data"])
        for name, owner in (self.run.extra or {}).items():
            if is_stateful(owner) and name in (found["extra"] or {}):
                owner.load_state_dict(found["extra"][name])
        if self.run.rng and self.sections.get("rng"):
            set_generators(decode(self.sections["rng"], {}, "the section 'rng'"))
        return {"data": found["data"], "extra": found["extra"] or {}}

    def _load_optimizer(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        """Through the optimizer's own load_state_dict, so that its hooks run; bits that it would cast are put in behind it."""
        state: dict[int, Any] = {}
        groups, exact, at = [], [], 0
        for names, group, said in zip(_members(self.run.model, optimizer), optimizer.param_groups, saved["groups"], strict=True):
            options = decode(said["options"], {}, "the section 'optimizer'")
            options |= {k: group[k] for k in LOCAL_OPTIONS if k in group}
            groups.append({**options, "params": list(range(at, at + len(names)))})
            for name, parameter in zip(names, group["params"], strict=True):
                if name in saved["state"]:
                    state[at] = decode(saved["state"][name], self.targets, f"the state of {name}")
                    exact += [
                        (parameter, k, v) for k, v in state[at].items() if isinstance(v, Tensor) and v.dim() and v.dtype != parameter.dtype
                    ]
                at += 1
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, key, value in exact:
            if isinstance(optimizer.state[parameter].get(key), Tensor):
                optimizer.state[parameter][key] = value


def collect_templates(run: Run) -> dict[str, Tensor | Parked]:
    """The tensors that live objects have where the checkpoint may have some: how they lie there is how they are read."""
    out = Encoder(lambda t: not t.dim())
    for name, owner in (run.extra or {}).items():
        if is_stateful(owner):
            out.encode(owner.state_dict(), f"extra/{name}")
    return out.stored


def _names(section: Any) -> Iterator[str]:
    """The stored tensors that a section names."""
    if isinstance(section, list):
        for value in section:
            yield from _names(value)
    elif isinstance(section, dict):
        if len(section) == 1 and isinstance(section.get("$stored"), str):
            yield section["$stored"]
        else:
            for value in section.values():
                yield from _names(value)


def _renamed(section: Any, names: Mapping[str, str]) -> Any:
    if isinstance(section, list):
        return [_renamed(v, names) for v in section]
    if isinstance(section, dict):
        if len(section) == 1 and "$stored" in section:
            return {"$stored": names.get(section["$stored"], section["$stored"])}
        return {k: _renamed(v, names) for k, v in section.items()}
    return section


def _first_difference(here: list[list[str]], there: list[list[str]]) -> str:
    if len(here) != len(there):
        return f"{len(here)} groups here, {len(there)} there"
    number = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if set(a) != set(b))
    a, b = set(here[number]), set(there[number])
    only = [f"{n} is in it here only" for n in sorted(a - b)] + [f"{n} is in it there only" for n in sorted(b - a)]
    return f"group {number}: {only[0]}"
