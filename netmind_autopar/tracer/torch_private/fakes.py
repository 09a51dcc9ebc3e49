"""Fake tensors, the modes around them, and what autograd says of its nodes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._library import simple_registry
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# What torch raises when a model looks at a value that is only known when it runs.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, symbolic_shapes.GuardOnDataDependentSymNode)


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors have shapes and no storage."""
    return FakeTensorMode(shape_env=symbolic_shapes.ShapeEnv(), allow_non_fake_inputs=True)


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def is_symbolic(value: Any) -> bool:
    """True when a size is not known at capture."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def no_rules() -> contextlib.AbstractContextManager[Any]:
    """Where no library has rules of its own for classes of tensors, nobody has to look for them at every op."""
    if any(entry.torch_dispatch_rules._data for entry in simple_registry.singleton._data.values()):
        return contextlib.nullcontext()

    def none(op: Any, kind: Any) -> None:
        return None

    return mock.patch.object(simple_registry, "find_torch_dispatch_rule", none)


def data_dependent_cause(error: BaseException) -> BaseException | None:
    """The data-dependent error at the bottom of `error`, when there is one: torch wraps it in others."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        if isinstance(chain, DATA_DEPENDENT) or "data-dependent" in text.lower() or "_local_scalar_dense" in text:
            return chain
        chain = chain.__cause__ or chain.__context__
    return None


def is_transforming() -> bool:
    """Inside torch.func.grad, vmap and the like."""
    return torch._C._are_functorch_transforms_active()


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Ordinary tensors and ordinary tracing, whatever modes the caller is inside of."""
    with _disable_current_modes():
        yield


def constant(tensor: torch.Tensor) -> torch.Tensor | None:
    """The real value of a tensor that is a constant; None for a fake tensor without one."""
    return tensor.constant if isinstance(tensor, FakeTensor) else tensor


class Kin:
    """Makes fake tensors like one that an op or a factory has just made: the same facts, memory of their own."""

    def __init__(self, fake: torch.Tensor) -> None:
        assert type(fake) is FakeTensor
        self.state, self.device = dict(vars(fake)), fake.fake_device
        shape, stride, self.offset = tuple(fake.shape), tuple(fake.stride()), fake.storage_offset()
        self.form = (shape, stride)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
        self.dtype, self.extent = fake.dtype, self.offset + extent

    def make(self) -> torch.Tensor:
        """Not to be called where modes are on that would see it, nor for tensors that `is_plain` says are more than their facts."""
        if self.offset == 0:
            memory = torch.empty_strided(*self.form, dtype=self.dtype, device="meta")
        else:
            memory = torch.empty(self.extent, dtype=self.dtype, device="meta").as_strided(*self.form, self.offset)
        out = torch.Tensor._make_subclass(FakeTensor, memory, False, dispatch_device=True, device_for_backend_keys=self.device)
        torch._C._set_throw_on_mutable_data_ptr(out)
        vars(out).update(self.state)
        return out

    def parameter(self, original: torch.Tensor) -> torch.Tensor:
        """A fake parameter or buffer in the place of `original`, which wants a gradient if that one does."""
        with unseen():
            out = self.make()
        if isinstance(original, torch.nn.Parameter):
            out._is_param = True  # what nn.Parameter says of a tensor that has a class of its own
        return out.requires_grad_(original.requires_grad)


def unseen() -> Any:
    """A context that modes see nothing of: their tensors are as any others."""
    return torch._C._DisableTorchDispatch()


def is_plain(tensor: torch.Tensor) -> bool:
    """A fake tensor that shape, strides, offset and dtype say everything about: no known value, not conjugated, on the CPU."""
    return (
        type(tensor) is FakeTensor
        and tensor.constant is None
        and tensor.real_tensor is None
        and tensor.fake_device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
    )


class _Recorder(TorchDispatchMode):
    def __init__(self, run: Callable[[Any, tuple, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.run = run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a rehearsal; the guard against it would take longer than the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # asks a fake tensor where it lies
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        return self.run(func, args, kwargs or {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch logs about a trace that fails is said once, in an error of ours."""
    from torch.export import _trace  # only now: it takes a second

    logs = [logging.getLogger(name) for name in (FakeTensor.__module__, symbolic_shapes.__name__)]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        with mock.patch.object(_trace, "print", create=True):  # it prints half a graph
            yield
    finally:
        for log, value in zip(logs, before, strict=True):
            log.disabled = value


@contextlib.contextmanager
def as_in_export() -> Iterator[None]:
    """Code that asks whether it is being exported hears yes; ops that cannot run on fake tensors raise and log nothing."""
    flags = {name: getattr(torch.compiler, name) for name in ("_is_compiling_flag", "_is_exporting_flag")}
    try:
        for name in flags:
            setattr(torch.compiler, name, True)
        with quiet(), no_rules():
            yield
    finally:
        for name, value in flags.items():
            setattr(torch.compiler, name, value)


def nodes_made() -> int:
    """How many nodes autograd has made on this thread."""
    return torch._C._autograd._get_sequence_nr()


def number_of(node: Any) -> int:
    """The how-manieth of autograd's nodes it is; the engine runs the last one first."""
    return node._sequence_nr()


def saving_hooks(note: Callable[[], None]) -> Any:
    """A context in which `note` is called when hooks are set on what autograd saves (checkpointing, offloading)."""
    push = torch._C._autograd._push_saved_tensors_default_hooks

    def noted(*hooks: Any) -> None:
        note()
        push(*hooks)

    return mock.patch.object(torch._C._autograd, "_push_saved_tensors_default_hooks", noted)


def recorder(run: Callable[[Any, tuple, dict[str, Any]], Any]) -> Any:
    """A context in which every op, after autograd, is what `run` returns for (op, args, kwargs)."""
    return _Recorder(run)
