"""The shape of a call and of a result: nested containers and objects around a flat list of tensors.

A template is a tree. `flatten` takes an object apart into its tensors and a template; `build` makes an object of the same kind
around other tensors. Known are tensors, constants, tuples, lists, dicts, dataclasses and any object that holds tensors in its
attributes (a Hugging Face cache, say); nothing has to be registered anywhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import CaptureError, InputError, ShapeError

_OPAQUE = (
    torch.nn.Module,
    torch.dtype,
    torch.device,
    torch.Generator,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
)


@dataclass(frozen=True)
class Leaf:
    """A tensor: its position in the flat list."""

    index: int


@dataclass(frozen=True)
class Const:
    """Anything without tensors: the object itself."""

    value: Any


@dataclass(frozen=True)
class Items:
    """A tuple, list or dict of class `cls`: keys (positions for sequences) with their templates."""

    cls: type
    keys: tuple[Any, ...]
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """An object of class `cls` with attributes; it is made without calling its constructor."""

    cls: type
    names: tuple[str, ...]
    items: tuple[Any, ...]


Template = Leaf | Const | Items | Record


def flatten(obj: Any, path: str = "") -> tuple[Template, list[tuple[str, torch.Tensor]]]:
    """The template of `obj` and its tensors with their paths ("past_key_values.layers.0.keys"), in order."""
    leaves: list[tuple[str, torch.Tensor]] = []
    return _flatten(obj, path, leaves, ()), leaves


def _flatten(obj: Any, path: str, leaves: list[tuple[str, torch.Tensor]], above: tuple[int, ...]) -> Template:
    if isinstance(obj, torch.Tensor):
        leaves.append((path, obj))
        return Leaf(len(leaves) - 1)
    if isinstance(obj, _OPAQUE) or id(obj) in above:
        return Const(obj)
    above += (id(obj),)
    start = len(leaves)
    make: type[Items | Record] = Items
    if isinstance(obj, Mapping):  # of a dataclass that is a dict too, as Hugging Face's ModelOutput, the items count
        keys, values = tuple(obj), list(obj.values())
    elif isinstance(obj, (tuple, list)):
        keys, values = tuple(range(len(obj))), list(obj)
    else:
        attributes = _attributes(obj)
        keys, values, make = tuple(attributes), list(attributes.values()), Record
    items = tuple(_flatten(v, f"{path}.{k}" if path else str(k), leaves, above) for k, v in zip(keys, values, strict=True))
    if len(leaves) == start and make is Record and not _is_cache(obj):
        return Const(obj)
    return make(type(obj), keys, items)


def _is_cache(obj: Any) -> bool:
    """A cache of keys and values, as Hugging Face has them. An empty one holds no tensor and is filled by the call all the same."""
    return callable(getattr(obj, "update", None)) and callable(getattr(obj, "get_seq_length", None))


def _attributes(obj: Any) -> dict[str, Any]:
    """Instance attributes, those in slots included."""
    slots = [s for c in type(obj).__mro__ for s in _slots(c)]
    found = {s: getattr(obj, s) for s in slots if hasattr(obj, s)}
    return {**found, **getattr(obj, "__dict__", {})}


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(s for s in slots if s not in ("__dict__", "__weakref__") and not s.startswith("__"))


def constants(template: Template | None) -> list[Any]:
    """What is no tensor in a template."""
    if isinstance(template, Const):
        return [template.value]
    return [value for item in getattr(template, "items", ()) for value in constants(item)]


def build(template: Template, values: list[Any]) -> Any:
    """The inverse of `flatten`. A value None stands for an output that was dropped."""
    if isinstance(template, Leaf):
        return values[template.index]
    if isinstance(template, Const):
        return template.value
    items = [build(item, values) for item in template.items]
    cls: Any = template.cls
    if isinstance(template, Record):
        obj: Any = object.__new__(cls)
        for name, item in zip(template.names, items, strict=True):
            object.__setattr__(obj, name, item)
        return obj
    if issubclass(cls, (tuple, list)):
        return cls(*items) if hasattr(cls, "_fields") else cls(items)
    pairs = dict(zip(template.keys, items, strict=True))
    if cls is dict:
        return pairs
    make: Any = cls
    if dataclasses.is_dataclass(cls):
        return make(**{k: v for k, v in pairs.items() if v is not None})
    return make(pairs)


def match(template: Template, obj: Any, path: str, found: list[torch.Tensor]) -> None:
    """Collect the tensors of `obj` into `found`; ShapeError where `obj` is unlike what was captured."""
    if isinstance(template, Leaf):
        if not isinstance(obj, torch.Tensor):
            raise _unlike(path, "a tensor", obj)
        found.append(obj)
    elif isinstance(template, Const):
        if obj is not template.value and not _equal(obj, template.value):
            raise _unlike(path, repr(template.value), obj)
    elif isinstance(template, Record):
        attributes = _attributes(obj) if isinstance(obj, template.cls) else {}
        if not isinstance(obj, template.cls) or set(attributes) != set(template.names):
            raise _unlike(path, f"a {template.cls.__name__}", obj)
        for name, item in zip(template.names, template.items, strict=True):
            match(item, attributes[name], f"{path}.{name}", found)
    else:
        is_map = issubclass(template.cls, Mapping)
        if not isinstance(obj, Mapping if is_map else (tuple, list)) or len(obj) != len(template.keys):
            raise _unlike(path, f"a {template.cls.__name__} of {len(template.keys)}", obj)
        for key, item in zip(template.keys, template.items, strict=True):
            if is_map and key not in obj:
                raise _unlike(f"{path}.{key}", "an entry", None)
            match(item, obj[key], f"{path}.{key}" if path else str(key), found)


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return False


def _unlike(path: str, expected: str, obj: Any) -> ShapeError:
    got = f"a tensor {tuple(obj.shape)}" if isinstance(obj, torch.Tensor) else repr(obj)[:80]
    return ShapeError(
        "called with other arguments than it was captured with",
        where=path,
        why=f"captured with {expected}, called with {got}",
        try_="call it as in sample_inputs, or capture it again for this call",
    )


class Call:
    """How a model is called: `sample_inputs` brought into the order of its signature.

    Tensors are numbered in the order of `forward`'s parameters, whether given by position or by name; what is no tensor is
    a constant of the capture.
    """

    def __init__(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        self.signature = inspect.signature(forward)
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                "sample_inputs do not fit the model's forward",
                where=f"forward{self.signature}",
                why=str(error),
                try_="pass a dict with the names of forward's parameters",
            ) from error
        self.positional = len(args)
        self.keywords = tuple(kwargs)
        self.template, self.leaves = flatten(self._canonical(bound))

    def _canonical(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        """One flat dict; what arrived through **kwargs stands beside the other names, defaults are left out."""
        out = dict(bound.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in out:
                out.update(out.pop(name))
        return out

    def arguments(self, tensors: list[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) as the user gave them, around other tensors."""
        values = build(self.template, list(tensors))
        args: list[Any] = []
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += values.get(name, ())
            elif len(args) < self.positional and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(values[name])
        return tuple(args[: self.positional]), {name: values[name] for name in self.keywords}

    def pack(self, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of another call, in order. Raises ShapeError when the call is unlike the captured one."""
        try:
            given = self._canonical(self.signature.bind(*args, **kwargs))
        except TypeError as error:
            raise ShapeError(
                "called with other arguments than it was captured with",
                where=f"forward{self.signature}",
                why=str(error),
                try_="call it as in sample_inputs",
            ) from error
        assert isinstance(self.template, Items)
        names = dict(zip(self.template.keys, self.template.items, strict=True))
        found: list[torch.Tensor] = []
        for name, item in names.items():
            if name not in given and not isinstance(item, Const):
                raise _unlike(name, "a tensor" if isinstance(item, Leaf) else "an argument", None)
            match(item, given.get(name, self._default(name, item)), name, found)
        for name in given:
            if name not in names and not _equal(given[name], self._default(name, Const(None))):
                raise _unlike(name, "nothing", given[name])
        return found

    def _default(self, name: str, item: Template) -> Any:
        parameter = self.signature.parameters.get(name)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
        return getattr(item, "value", None)


def sample_call(forward: Callable[..., Any], sample_inputs: Any) -> Call:
    """A Call from a tensor, a tuple or list (positional), or a mapping (by name). InputError when no tensor is in it."""
    if isinstance(sample_inputs, torch.Tensor):
        call = Call(forward, (sample_inputs,), {})
    elif isinstance(sample_inputs, Mapping):
        call = Call(forward, (), dict(sample_inputs))
    elif isinstance(sample_inputs, (tuple, list)):
        call = Call(forward, tuple(sample_inputs), {})
    else:
        raise InputError(
            "sample_inputs are no tensors",
            where=f"sample_inputs: {type(sample_inputs).__name__}",
            why="a tensor, a tuple of tensors or a dict of tensors is needed",
            try_='sample_inputs={"input_ids": torch.zeros(8, 128, dtype=torch.long)}',
        )
    if not call.leaves:
        raise InputError(
            "sample_inputs hold no tensor",
            where=f"sample_inputs: {sample_inputs!r}"[:120],
            why="shapes and dtypes of the inputs are read off sample tensors",
            try_='sample_inputs={"input_ids": torch.zeros(8, 128, dtype=torch.long)}',
        )
    for path, tensor in call.leaves:
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise InputError(
                f"{path} is a {'nested' if tensor.is_nested else 'sparse'} tensor",
                where=f"sample_inputs: {path}",
                why="every shape of a plan is fixed, and how many elements this one holds is not",
                try_="pass a dense tensor, padded to one length, and a mask",
            )
    devices = {str(tensor.device) for _, tensor in call.leaves}
    if len(devices) > 1:
        listing = ", ".join(f"{path}: {tensor.device}" for path, tensor in call.leaves)
        raise InputError(
            "sample_inputs lie on several devices",
            where=listing,
            why="one call must have its inputs on one device",
            try_="move them all to one device; meta will do",
        )
    return call


@dataclass
class Selection:
    """The outputs of a model, taken apart: which are kept, and which of those carry a gradient."""

    outputs: tuple[str, ...] | None
    differentiable: tuple[str, ...] | None
    template: Template | None = None
    kept: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    carrying: tuple[str, ...] = ()

    def take(self, result: Any) -> tuple[torch.Tensor, ...]:
        """The tensors to return from the traced function; those without a gradient are detached."""
        self.template, leaves = flatten(result)
        if isinstance(self.template, Leaf):
            leaves = [("output", leaves[0][1])]
        if not leaves:
            raise CaptureError("the model returns no tensor", why="there is nothing to compute", try_="return a tensor from forward")
        self.kept = tuple(i for i, (path, _) in enumerate(leaves) if self.outputs is None or _named(path, self.outputs))
        _check_names("outputs", self.outputs, leaves)
        _check_names("differentiable", self.differentiable, leaves)
        self.paths = tuple(leaves[i][0] for i in self.kept)
        tensors = [leaves[i][1] for i in self.kept]
        losses = any(t.is_floating_point() and t.dim() == 0 for t in tensors)
        keep = [
            _named(p, self.differentiable) if self.differentiable is not None else t.is_floating_point() and (t.dim() == 0 or not losses)
            for p, t in zip(self.paths, tensors, strict=True)
        ]
        self.carrying = tuple(p for p, t, k in zip(self.paths, tensors, keep, strict=True) if k and t.requires_grad)
        return tuple(t if k else t.detach() for t, k in zip(tensors, keep, strict=True))

    def unpack(self, values: list[Any]) -> Any:
        """What the model returns, around the kept outputs; a dropped one is None."""
        assert self.template is not None
        slots: dict[int, Any] = dict(zip(self.kept, values, strict=True))
        total = 1 + max(_indices(self.template), default=-1)
        return build(self.template, [slots.get(i) for i in range(total)])


def _indices(template: Template | None) -> list[int]:
    if isinstance(template, Leaf):
        return [template.index]
    return [i for item in getattr(template, "items", ()) for i in _indices(item)]


def _named(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in names)


def _check_names(option: str, names: tuple[str, ...] | None, leaves: list[tuple[str, torch.Tensor]]) -> None:
    for name in names or ():
        if not any(_named(path, (name,)) for path, _ in leaves):
            known = ", ".join(path for path, _ in leaves[:8])
            raise InputError(
                f"{option}: the model has no output {name!r}",
                where=f"{option}={names!r}",
                why=f"its outputs are {known}",
                try_=f"{option}=({leaves[0][0]!r},)",
            )
