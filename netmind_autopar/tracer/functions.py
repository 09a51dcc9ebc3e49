"""What torch's export would lose: gradients that the user defines, and hooks on gradients.

Export writes down what forward computes. Of a `torch.autograd.Function` it would keep the forward and forget the backward, of
reentrant checkpointing no gradient would be left, and a hook on a tensor would never run: silently wrong gradients. So each of
them becomes one node of the exported graph, and when autograd is traced that node calls the real thing, backward and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointFunction

from ..ir.errors import CaptureError
from . import torch_private
from .origin import where_called
from .signature import build, flatten

_library = torch.library.Library("autopar", "FRAGMENT")
_library.define("user_function(Tensor[] tensors, int key) -> Tensor[]")
_library.define("user_hook(Tensor(a!) x, int key) -> ()")  # "writes", so that nobody drops it for having no result
_FUNCTION, _HOOK = torch.ops.autopar.user_function.default, torch.ops.autopar.user_hook.default

# Their apply does nothing to a gradient, or autograd is traced through them later.
_TRANSPARENT = ("torch.utils.checkpoint", "torch._library")


class Kept:
    """The functions and hooks met during one export, by the key in their node."""

    def __init__(self) -> None:
        self.calls: list[Callable[..., Any]] = []
        self.lines: list[str] = []
        self.inside = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block, `Function.apply`, `Tensor.register_hook` and gradients taken inside forward are caught."""
        apply, hook = torch.autograd.Function.apply.__func__, Tensor.register_hook  # type: ignore[attr-defined]
        with (
            mock.patch.object(torch.autograd.Function, "apply", classmethod(lambda cls, *a, **k: self._apply(apply, cls, a, k))),
            mock.patch.object(CheckpointFunction, "apply", classmethod(lambda cls, run, preserve, *a: _checkpoint(run, a)), create=True),
            mock.patch.object(Tensor, "register_hook", lambda x, h: self._hook(hook, x, h)),
            mock.patch.object(torch.autograd, "grad", _no_gradients),
            mock.patch.object(torch.autograd, "backward", _no_gradients),
        ):
            yield

    def restore(self, exported: fx.GraphModule) -> None:
        """Let the nodes call what they stand for."""
        for module in exported.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                if node.op == "call_function" and node.target in (_FUNCTION, _HOOK):
                    node.target, node.args = self.calls[node.args[1]], node.args[:1]

    def _apply(self, apply: Callable[..., Any], cls: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch_private.is_transforming() and not cls.__module__.startswith(_TRANSPARENT):
            raise CaptureError(
                f"{cls.__name__} is called inside torch.func or vmap",
                where=where_called(),
                why="a gradient written by hand cannot be kept through a transform of the function",
                try_="apply it outside, to the whole batch, or write it as a torch.library.custom_op with register_vmap",
            )
        template, leaves = flatten((args, kwargs))
        tensors = [tensor for _, tensor in leaves]
        traced = [torch_private.traced_node(t) is not None for t in tensors]
        if cls.__module__.startswith(_TRANSPARENT) or not any(traced):
            return apply(cls, *args, **kwargs)
        _check_constants(cls, args)

        def call(given: list[Tensor]) -> list[Tensor]:
            rest = iter(given)
            again = [next(rest) if known else tensor for known, tensor in zip(traced, tensors, strict=True)]
            positional, named = build(template, again)
            return [tensor for _, tensor in flatten(cls.apply(*positional, **named))[1]]

        call.__name__ = cls.__name__
        self.calls.append(call)
        self.lines.append(where_called())
        inputs = [tensor for known, tensor in zip(traced, tensors, strict=True) if known]
        outer: list[Any] = []

        def run() -> list[Tensor]:
            outer.append(apply(cls, *args, **kwargs))
            return [tensor for _, tensor in flatten(outer[0])[1]]

        torch_private.traced_call(_FUNCTION, inputs, len(self.calls) - 1, run)
        return outer[0]

    def _hook(self, hook: Callable[..., Any], tensor: Tensor, function: Callable[[Tensor], Tensor | None]) -> Any:
        if self.inside or torch_private.traced_node(tensor) is None:  # inside: once more, for a torch function mode
            return hook(tensor, function)

        def call(x: Tensor) -> None:
            x.register_hook(function)

        call.__name__ = "register_hook"
        self.calls.append(call)
        torch_private.traced_call(_HOOK, tensor, len(self.calls) - 1, list)
        with mock.patch.object(self, "inside", True):
            return hook(tensor, function)


def _checkpoint(run: Callable[..., Any], args: tuple) -> Any:
    """Reentrant checkpointing is what it wraps, but cuts the gradient when no input wants one."""
    if any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return run(*args)
    with torch.no_grad():
        return run(*args)


def _check_constants(cls: Any, args: tuple) -> None:
    for i, arg in enumerate(args):
        if isinstance(arg, nn.Module) and any(True for _ in arg.parameters()):
            raise CaptureError(
                f"{cls.__name__} is given a module",
                where=where_called(),
                why=f"argument {i} is a {type(arg).__name__}, whose parameters autograd does not see there",
                try_=f"pass the parameters to {cls.__name__}.apply as tensors",
            )


def _no_gradients(*_: Any, **__: Any) -> Any:
    raise CaptureError(
        "forward computes gradients itself",
        where=where_called(),
        why="forward is captured before autograd, so that there is no gradient yet to be asked for",
        try_="write the derivative as a formula, or take it in forward mode, with torch.func.jvp",
    )


def check_hooks(model: nn.Module) -> None:
    """CaptureError for hooks on gradients that are registered outside of forward: a captured graph would not run them."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(
                f"the parameter {name} has a hook on its gradient",
                where=name,
                why="the parallel module has parameters of its own, and a step that changes gradients unseen would be left out",
                try_="remove the hook, and register it on the parameters of the parallel module",
            )
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"the module {name or type(model).__name__} has a backward hook",
                where=name or type(model).__name__,
                why="forward and backward become one graph, in which modules are no more",
                try_="remove it (handle.remove()), or register a hook on a tensor inside forward: x.register_hook(...)",
            )
