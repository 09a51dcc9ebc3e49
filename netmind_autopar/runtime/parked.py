"""Optimizer state that waits between steps in host memory or on disk.

`park(tiers)` names parameters. Any torch optimizer over them, built in the ordinary way, then keeps between its steps no tensor of
their state on the device: `optimizer.state[p]` holds `Parked` objects. A step runs the optimizer on one bucket of parameters after
the other, and only that bucket's state is on the device:

    bring(bucket)    step with the gradients of the bucket alone    send(bucket)

then once more on what is not parked, which is the step that hooks and schedulers see. An optimizer outside of `torch.optim` may count
steps per group, or compare parameters; it runs once, with all its state on the device meanwhile. What optimizers make when they are
built, and what `load_state_dict` gives them before their first step, is parked after that step. A parameter that waits elsewhere
itself (runtime/stowed.py) comes with the bucket, and so does its gradient.

What is parked are the tensors of at least one dim that `optimizer.state[p]` holds directly. `state_dict()` returns tensors on the
device, copies of what is parked; of a parameter that waits elsewhere itself the very tensors, where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..ir.errors import InputError
from ..ir.plan import STATE_BUCKET_BYTES
from .dtensors import as_dtensor
from .mapped import copy
from .offload import TIERS, _file, _stream, _strides
from .stowed import device_of, forget_pages, local_of, on_device, stowed

BUCKET_BYTES = STATE_BUCKET_BYTES
STATES = 2  # tensors of a parameter's size that its state is taken for before there is any

_tiers = WeakTensorKeyDictionary()  # parameter -> where its state waits
_drivers: weakref.WeakKeyDictionary[Optimizer, _Driver] = weakref.WeakKeyDictionary()
_hooked: list[object] = []


def park(tiers: Mapping[Tensor, str]) -> None:
    """From now on the state of these parameters waits between steps: parameter -> "host" or "disk"."""
    for parameter, tier in tiers.items():
        if tier not in TIERS:
            raise InputError(f"{tier!r} is no place for optimizer state", try_=f"one of {', '.join(TIERS)}")
        _tiers[parameter] = tier
    if tiers and not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_before_any))


class Parked:
    """A tensor of an optimizer's state, while it is not on the device. `tensor()` is a copy that is.

    device: where it is used, x's own when None. stays: its parameter waits elsewhere too, and `tensor()` is the memory itself.
    """

    def __init__(self, x: Tensor, tier: str, device: torch.device | None = None, stays: bool = False) -> None:
        local = local_of(x)
        self.tier, self.device, self.stays = tier, device or local.device, stays
        self.whole, self.shape, self.dtype, self.strides = x.shape, local.shape, x.dtype, _strides(local)
        self.bytes = local.numel() * local.element_size()
        self.layout = (x.device_mesh, x.placements, x.stride()) if isinstance(x, DTensor) else None
        self.memory = _file(self) if tier == "disk" else self.empty(device="cpu", pin_memory=self.device.type == "cuda")
        self.event: torch.cuda.Event | None = None  # when the last copy out has arrived

    def __repr__(self) -> str:
        return f"Parked({tuple(self.whole)}, {self.dtype}, {self.tier})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles of an optimizer hold tensors
        return _itself, (self.tensor(),)

    def empty(self, **options: Any) -> Tensor:
        """Memory for the local tensor."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, **options)

    def fits(self, x: Any, parameter: Tensor) -> bool:
        """Whether x can wait in this memory."""
        if not isinstance(x, Tensor) or (x.shape, x.dtype) != (self.whole, self.dtype):
            return False
        layout = (x.device_mesh, x.placements, x.stride()) if isinstance(x, DTensor) else None
        found = layout, device_of(parameter), _strides(local_of(x))
        return found == (self.layout, self.device, self.strides) and _may_leave(x, parameter)

    def wrapped(self, local: Tensor) -> Tensor:
        """The local tensor as the optimizer had it."""
        if self.layout is None:
            return local
        mesh, placements, stride = self.layout
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=self.whole, stride=stride)

    def tensor(self) -> Tensor:
        """A copy on the device, or the tensor itself where it is."""
        if not self.stays:
            return bring([self])[0]
        if self.event is not None:
            self.event.synchronize()
        if self.layout is None:
            return self.memory
        mesh, placements, _ = self.layout
        return as_dtensor(self.memory, mesh, placements, self.whole)


def _itself(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def send(pairs: Sequence[tuple[Parked, Tensor]]) -> None:
    """Copy tensors out to where they wait; afterwards their memory on the device may be given back.

    On CUDA the compute stream waits for the copies, and the host does for those to disk.
    """
    for device in dict.fromkeys(home.device for home, _ in pairs):
        here = [(home, local_of(x)) for home, x in pairs if home.device == device]
        if device.type != "cuda":
            for home, x in here:
                copy(home.memory, x)
            continue
        now, out, staged = torch.cuda.current_stream(device), _stream(device, "out"), []
        out.wait_stream(now)
        with torch.cuda.stream(out):
            for home, x in here:
                target = home.memory if home.tier == "host" else home.empty(device="cpu", pin_memory=True)
                target.copy_(x, non_blocking=True)
                staged += [(home, target)] if home.tier == "disk" else []
            event = out.record_event()
        now.wait_event(event)
        for home, _ in here:
            home.event = event
        if staged:
            event.synchronize()
        for home, target in staged:
            copy(home.memory, target)


@torch.no_grad()
def bring(homes: Sequence[Parked]) -> list[Tensor]:
    """The tensors on the device again. What waits elsewhere stays there too."""
    there = [home.empty(device=home.device) for home in homes]
    for device in dict.fromkeys(home.device for home in homes):
        here = [(home, x) for home, x in zip(homes, there, strict=True) if home.device == device]
        if device.type != "cuda":
            for home, x in here:
                copy(x, home.memory)
            continue
        now, back = torch.cuda.current_stream(device), _stream(device, "in")
        back.wait_stream(now)
        with torch.cuda.stream(back):
            for home, x in here:
                if home.event is not None:
                    back.wait_event(home.event)
                source = home.memory
                if home.tier == "disk":
                    source = home.empty(device="cpu", pin_memory=True)
                    copy(source, home.memory)
                x.copy_(source, non_blocking=True)
            event = back.record_event()
        now.wait_event(event)
    return [home.wrapped(x) for home, x in zip(homes, there, strict=True)]


def _may_leave(x: Any, parameter: Tensor) -> bool:
    """Whether x is a tensor of its own that lies with the parameter."""
    if not isinstance(x, Tensor) or not x.dim() or x.layout != torch.strided or not x.numel():
        return False
    if x.device not in (parameter.device, device_of(parameter)) or x.device.type == "meta":
        return False
    a, b = local_of(x), local_of(parameter)
    return a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not a.numel()


def _before_any(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a step of whatever optimizer: one that has parked parameters gets a driver, whose hooks are the innermost."""
    if optimizer not in _drivers:
        if not any(p in _tiers for group in optimizer.param_groups for p in group["params"]):
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError(
                "the plan keeps optimizer state elsewhere, and that of LBFGS belongs to no single parameter",
                where="Plan.state",
                try_="plan without offload=True, drop `state` from the plan, or take another optimizer",
            )
        _drivers[optimizer] = _Driver(optimizer)
    _drivers[optimizer].attach(optimizer)


class _Driver:
    """What one optimizer needs to step with parked state. It refers to the optimizer only through the arguments of its hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.homes = WeakTensorKeyDictionary()  # parameter -> {name: Parked}
        self.masked: list[tuple[Tensor, Tensor]] = []
        self.handles: list[Any] = []
        self.inner = _unhooked(optimizer)
        optimizer.register_state_dict_post_hook(_filled)
        optimizer.register_load_state_dict_post_hook(self.leave)

    def attach(self, optimizer: Optimizer) -> None:
        """Step after all other hooks that come before a step, and be done before those that come after it."""
        for handle in self.handles:
            handle.remove()
        self.handles = [optimizer.register_step_pre_hook(self.before), optimizer.register_step_post_hook(self.after)]
        hooks = self.handles[1].hooks_dict_ref()
        hooks.move_to_end(self.handles[1].id, last=False)

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step on what is parked; with a closure, when that has made the gradients."""
        self.masked = []
        self.leave(optimizer)
        if self.inner is None:
            self._bring(optimizer, _parked(optimizer), here=True)
            return None
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self._buckets(optimizer)
            return None

        def first() -> Any:
            loss = closure()
            self._buckets(optimizer)
            return loss

        return (args[0], first), {k: v for k, v in kwargs.items() if k != "closure"}

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the gradients back, and send away what came."""
        masked, self.masked = self.masked, []
        for p, grad in masked:
            p.grad = grad
        self.leave(optimizer)
        forget_pages(_parked(optimizer))

    def leave(self, optimizer: Optimizer) -> None:
        """Send away whatever state of parked parameters is on the device."""
        self._send(optimizer, _parked(optimizer))

    def _buckets(self, optimizer: Optimizer) -> None:
        """Step on one bucket of parked parameters after the other. Their gradients are hidden from then on, until `after`."""
        assert self.inner is not None
        grads = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        parked, others = [(p, g) for p, g in grads if p in _tiers], [(p, g) for p, g in grads if p not in _tiers]
        try:
            for p, _ in grads:
                p.grad = None
            for bucket in self._cut(optimizer, parked):
                self._bring(optimizer, [p for p, _ in bucket])
                for p, grad in bucket:
                    p.grad = grad
                with on_device(optimizer, [p for p, _ in bucket]):
                    self.inner(optimizer)
                for p, _ in bucket:
                    p.grad = None
                self._send(optimizer, [p for p, _ in bucket])
        except BaseException:
            for p, grad in parked:
                p.grad = grad
            raise
        finally:
            for p, grad in others:
                p.grad = grad
        self.masked = parked

    def _cut(self, optimizer: Optimizer, parked: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Runs of parameters whose state, and what else of them comes, is together no more than a bucket."""
        run: list[tuple[Tensor, Tensor]] = []
        room = BUCKET_BYTES
        for p, grad in parked:
            size = local_of(p).numel() * p.element_size()
            known = sum(v.bytes for v in optimizer.state.get(p, {}).values() if isinstance(v, Parked))
            need = (known or STATES * size) + (2 * size if stowed(p) else 0)
            if run and need > room:
                yield run
                run, room = [], BUCKET_BYTES
            run.append((p, grad))
            room -= need
        if run:
            yield run

    def _bring(self, optimizer: Optimizer, parameters: Sequence[Tensor], here: bool = False) -> None:
        """State to the device. here: to where its parameter is, whatever it is used on."""
        slots = [
            (optimizer.state[p], key, value)
            for p in parameters
            if p in optimizer.state
            for key, value in optimizer.state[p].items()
            if isinstance(value, Parked)
        ]
        if here:
            for state, key, home in slots:
                state[key] = home.tensor()
            return
        for (state, key, _), x in zip(slots, bring([home for _, _, home in slots]), strict=True):
            state[key] = x

    def _send(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        pairs: list[tuple[Parked, Tensor]] = []
        slots: list[tuple[dict[Any, Any], Any, Parked]] = []
        for p in parameters:
            if p not in optimizer.state:
                continue
            known = self.homes.setdefault(p, {})
            for key, value in optimizer.state[p].items():
                if not _may_leave(value, p):
                    continue
                if key not in known or not known[key].fits(value, p):
                    known[key] = Parked(value, _tiers[p], device_of(p), stowed(p) is not None)
                pairs.append((known[key], value))
                slots.append((optimizer.state[p], key, known[key]))
        send(pairs)
        for state, key, home in slots:
            state[key] = home


def _parked(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p in _tiers]


def _unhooked(optimizer: Optimizer) -> Callable[..., Any] | None:
    """The step without its hooks, for an optimizer of torch.optim, which treats every parameter that has a gradient by itself."""
    step = getattr(type(optimizer).step, "__wrapped__", None)
    return step if getattr(step, "__module__", "").startswith("torch.optim.") else None


def _filled(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with tensors for what is parked."""
    state = {
        key: {name: x.tensor() if isinstance(x, Parked) else x for name, x in held.items()} if isinstance(held, dict) else held
        for key, held in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
