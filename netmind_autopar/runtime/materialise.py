"""Values for a model that has none, or others than its own: read from files or initialised, one module at a time, this device's part kept.

What a module's initialisation writes is found out on the meta device first: `reset_parameters` of a module may write into its
children, and Hugging Face's `_init_weights` does. Only those tensors are then made, whole and on the CPU, initialised, cut, and let go.
Every rank does this with rank 0's generator, so that all draw what one device draws; modules come in the order of `Module.apply`,
children first, which is the order in which torch's own modules draw when they are built.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ..ir.errors import InputError
from ..ir.spec import Spec, local_shape, part_start, shard
from .agree import from_rank_zero
from .weights import Weights

Init = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Cut:
    """This device's part of tensors. specs: by the tensor's id; others are kept whole. keep: where a part is put, at once, by that id."""

    specs: Mapping[int, Spec]
    sizes: tuple[int, ...]
    coord: tuple[int, ...]
    keep: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        """A part where it is kept."""
        return self.keep[id(tensor)](part) if id(tensor) in self.keep else part

    def box(self, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where this device's part begins in each dim, and how long it is."""
        spec = self.specs.get(id(tensor))
        if spec is None:
            return (0,) * tensor.dim(), tuple(tensor.shape)
        starts = tuple(part_start(spec, self.sizes, self.coord, dim) for dim in range(tensor.dim()))
        return starts, local_shape(spec, self.sizes, self.coord)

    def of(self, tensor: Tensor, whole: Tensor) -> Tensor:
        """The part of `whole`, the values of `tensor`, in memory of its own."""
        spec = self.specs.get(id(tensor))
        part = whole if spec is None else shard(whole, spec, self.sizes, self.coord)
        return self.put(tensor, part if id(tensor) in self.keep else part.clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class Bare:
    """What rank 0 says of its model: the tensors that have no values there, by name, and the state of its generator."""

    names: frozenset[str]
    generator: str

    @classmethod
    def of(cls, model: nn.Module) -> Bare:
        """Rank 0's answer, on every rank."""

        def say() -> str:
            names = [name for name, t in _tensors(model) if t.is_meta]
            return json.dumps([names, base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode() if names else ""])

        names, generator = json.loads(from_rank_zero(say))
        return cls(frozenset(names), generator)


def materialise(model: nn.Module, cut: Cut, bare: Bare, *, weights: Any = None, init: Init | None = None) -> dict[int, Tensor]:
    """This device's part, on the CPU, of every tensor that does not get its values from rank 0's model: by the id of this model's tensor.

    weights: a folder or file of safetensors that has all parameters. Without it, what lies on the meta device is initialised: by
    `init(module)`, called for every module, else by the model's `_init_weights`, else by `reset_parameters`.
    Raises InputError for a tensor that stays without values, CheckpointError for files that cannot be read.
    """
    found: dict[int, Tensor] = {}
    if weights is not None:
        found = _loaded(model, cut, Weights(weights, getattr(model, "base_model_prefix", "") or ""))
    wanted = {id(t): name for name, t in _tensors(model) if name in bare.names and id(t) not in found}
    if wanted:
        with _Generator(bare.generator, keep=weights is None):
            found |= _initialised(model, cut, wanted, init, all_modules=weights is None)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _loaded(model: nn.Module, cut: Cut, weights: Weights) -> dict[int, Tensor]:
    """Parameters, and those buffers that the files have."""
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    found: dict[int, Tensor] = {}
    missing = []
    for name, tensor in _tensors(model):
        there = weights.find(names[id(tensor)])
        if there is None:
            missing += [name] if isinstance(tensor, nn.Parameter) else []
            continue
        weights.check(there, name, tensor.shape)
        found[id(tensor)] = cut.put(tensor, weights.read(there, *cut.box(tensor)).to(tensor.dtype))
    if missing:
        raise InputError(
            f"the weights do not have {missing[0]!r}" + (f", nor {len(missing) - 1} other parameters" if len(missing) > 1 else ""),
            where=str(weights.path),
            why="tensors are found by their names in the model",
            try_="give the files of this model, as its save_pretrained wrote them",
        )
    return found


def _initialised(model: nn.Module, cut: Cut, wanted: Mapping[int, str], init: Init | None, *, all_modules: bool) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for module, act in _walk(model, init, lambda m: m._init_weights if callable(getattr(m, "_init_weights", None)) else None):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if act is None or not (all_modules or any(id(t) in wanted for t in own)):
            continue
        written = _written(module, act)
        if not any(id(t) in wanted for t in written):
            continue
        real = {id(t): _empty(t) for t in written}
        act(_twin(module, real))
        for tensor in written:
            value = real[id(tensor)].detach()
            if id(tensor) not in wanted:
                continue
            if value.is_floating_point() and bool(value.isnan().any()):
                raise InputError(
                    f"the initialisation of {type(module).__name__} leaves a part of {wanted[id(tensor)]!r} without values",
                    why="a module that lies on the meta device is initialised whole",
                    try_="write all of it in reset_parameters, or pass init=",
                )
            found[id(tensor)] = cut.of(tensor, value)
    left = [name for at, name in wanted.items() if at not in found]
    if left:
        raise InputError(
            f"{left[0]!r} lies on the meta device and nothing gives it values",
            where=", ".join(left[:8]) + (", …" if len(left) > 8 else ""),
            why="its module has no reset_parameters, or that does not write it",
            try_="pass init=, a function that initialises a module, or weights=, or build the model on the CPU",
        )
    return found


def _walk(
    module: nn.Module, init: Init | None, own: Callable[[nn.Module], Any], above: Any = None
) -> Iterator[tuple[nn.Module, Init | None]]:
    """Every module, children first, with what initialises it: a function that is given the module, or None."""
    above = own(module) or above
    for child in module.children():
        yield from _walk(child, init, own, above)
    if init is not None or above is not None:
        yield module, init or above
    elif callable(getattr(module, "reset_parameters", None)):
        yield module, lambda m: m.reset_parameters()
    elif callable(getattr(module, "_reset_parameters", None)):
        yield module, lambda m: m._reset_parameters()
    else:
        yield module, None


class _Writes(TorchFunctionMode):
    """Notes the memory that is written in place."""

    def __init__(self) -> None:
        self.memory: set[StorageWeakRef] = set()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__setitem__", "__set__") or name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, Tensor):
                self.memory.add(StorageWeakRef(target.untyped_storage()))
        if isinstance((kwargs or {}).get("out"), Tensor):
            self.memory.add(StorageWeakRef(kwargs["out"].untyped_storage()))  # type: ignore[index]
        return func(*args, **(kwargs or {}))


def _written(module: nn.Module, act: Init) -> list[Tensor]:
    """The tensors of a module and its children that `act` writes, seen on the meta device."""
    held = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    stand_ins = {at: _like(t, torch.empty_like(t, device="meta")) for at, t in held.items()}
    memory = {at: StorageWeakRef(t.untyped_storage()) for at, t in stand_ins.items()}
    seen = _Writes()
    try:
        with torch.no_grad(), seen:
            act(_twin(module, stand_ins))
    except (NotImplementedError, RuntimeError):  # it looks at values: then it may write what is its own, and nothing else
        return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [held[at] for at, where in memory.items() if where in seen.memory]


def _empty(t: Tensor) -> Tensor:
    """Memory on the CPU in which every number that nobody writes shows."""
    made = torch.empty(t.shape, dtype=t.dtype, device="cpu")
    made.fill_(float("nan") if t.dtype.is_floating_point or t.dtype.is_complex else 0)
    return _like(t, made)


def _like(t: Tensor, made: Tensor) -> Tensor:
    return nn.Parameter(made, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else made


def _twin(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """The same module around other tensors; the module itself is not touched."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    for held in ("_parameters", "_buffers"):
        _set(twin, held, {k: None if t is None else tensors.get(id(t), t) for k, t in module.__dict__[held].items()})
    _set(twin, "_modules", {k: None if m is None else _twin(m, tensors) for k, m in module._modules.items()})
    return twin


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Past the module's own `__setattr__`, which registers what it is given."""
    module.__dict__[name] = value


class _Generator:
    """Inside, this rank draws as rank 0 does. Afterwards it goes on from there if it had the same state before, and if `keep`."""

    def __init__(self, state: str, *, keep: bool) -> None:
        self.state = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8).clone()
        self.keep = keep

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.set_rng_state(self.state)

    def __exit__(self, *error: object) -> None:
        if not self.keep or not torch.equal(self.before, self.state):
            torch.set_rng_state(self.before)
