"""An unmodified module and sample inputs in, a Program out: forward and backward as one graph of ATen ops.

    copy with fake tensors -> export (forward, before autograd) -> normalize -> joint export (autograd) -> clean

The user's module is never touched: a copy whose tensors are fake is traced. No weight is copied, on any device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from ..ir.collector import collector_off
from ..ir.errors import AutoparError, CaptureError, InputError
from ..ir.precision import Precision
from ..ir.program import Program
from . import clone, repeat, torch_private
from .assemble import Traced, assemble
from .functions import Kept, check_hooks
from .fusion import fuse_graph
from .joint import joint
from .masks import eager_masks
from .normalize import DECOMPOSITIONS, Random, normalize, number_draws
from .origin import module_path, where
from .precision import apply_precision, early
from .refusals import check_graph, check_model, check_result, explain, writes, written
from .signature import Call, Selection, sample_call
from .state import Dice, Rebound, Watch

_PREFIX = "model"  # the name under which the user's module hangs in the traced one


def capture(
    model: nn.Module,
    sample_inputs: Any,
    *,
    differentiable: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    fold: bool = True,
    mode: Literal["training", "inference"] = "training",
    fuse: bool = False,
    precision: Precision | None = None,
) -> Program:
    """Trace one training step of `model`, or with mode="inference" forward alone, for the shapes of `sample_inputs`.

    sample_inputs: a tensor, a tuple (positional) or a dict (by name) of tensors and constants, global shapes, on one device;
    only shapes and dtypes are read. differentiable: paths of the outputs that carry a gradient; by default every 0-dim
    float output (a loss), or every float output when there is none. outputs: paths of the outputs to keep, all by default.
    fold: trace few of a deep model's blocks when the others are provably alike; the program is the same, made faster.
    fuse: put fused ops in the places of what they compute (docs/fusion.md).
    mode: in inference no gradient is computed, and what the model writes into its inputs (a cache) comes back as a result.
    precision: the dtypes that the program computes in (tracer/precision.py); None: those of the model.

    Raises InputError for unusable arguments and CaptureError when the model is no single static graph.
    """
    _check_module(model)
    call = sample_call(model.forward, sample_inputs)
    kept, carrying = _names(outputs, "outputs"), _names(differentiable, "differentiable")
    if _check_mode(mode, carrying) == "inference":
        carrying = ()
    tied = clone.tied_names(model)

    def select() -> Selection:
        return Selection(kept, carrying)

    def trace(fake: nn.Module, fakes: Any, selection: Selection) -> Program:
        with fakes:
            seed = torch.empty((), dtype=torch.int64)
        tensors = [clone.fake_like(tensor, fakes) for _, tensor in call.leaves]
        watch = Watch(fake)

        def once(selection: Selection) -> Program:
            traced = _trace(_Wrapper(fake, call, selection, watch), (seed, *tensors), tied, mode, fuse, precision)
            return replace(assemble(traced, _PREFIX, call, selection, tied, mode), precision=precision)

        program = once(selection)
        watch.check(lambda: once(select()), program)
        return program

    with _plain_torch():
        if fold and (precision is None or precision.is_uniform):
            with contextlib.suppress(Exception):  # whatever the reason, tracing all of it is right, and says what is wrong
                return early(replace(repeat.expanded(model, call, select, trace, torch_private.fake_mode), precision=precision))
        fakes = torch_private.fake_mode()
        return early(trace(clone.fake_clone(model, fakes), fakes, select()))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            "the model is no torch.nn.Module",
            where=f"model: {type(model).__name__}",
            why="its parameters, buffers and forward are needed",
            try_="wrap the function in a Module",
        )
    check_model(model)
    check_hooks(model)


def _check_mode(mode: str, differentiable: tuple[str, ...] | None) -> str:
    if mode not in ("training", "inference"):
        raise InputError(f"there is no mode {mode!r}", where="mode=", try_='mode="training" or mode="inference"')
    if mode == "inference" and differentiable:
        raise InputError(
            "nothing is differentiable in inference",
            where=f"differentiable={differentiable!r}",
            why="forward alone is captured",
            try_='drop differentiable=, or use mode="training"',
        )
    return mode


def _names(value: Sequence[str] | None, option: str) -> tuple[str, ...] | None:
    value = (value,) if isinstance(value, str) else value
    if value is not None and not all(isinstance(v, str) for v in value):
        raise InputError(
            f"{option} must list output names", where=f"{option}={value!r}", why="outputs are chosen by path", try_=f'{option}=("loss",)'
        )
    return None if value is None else tuple(value)


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """Gradients on, the CPU as default device, no modes of the caller's: what is captured depends on the arguments alone."""
    device = torch.device("cpu") if torch.get_default_device().type != "cpu" else contextlib.nullcontext()
    with collector_off(), torch_private.no_modes(), torch.inference_mode(False), torch.enable_grad(), device, eager_masks():
        yield


class _Wrapper(nn.Module):
    """The traced function: a seed and the user's tensors in, the kept outputs out."""

    def __init__(self, model: nn.Module, call: Call, selection: Selection, watch: Watch) -> None:
        super().__init__()
        self.call_shape, self.selection, self.watch = call, selection, watch
        self.add_module(_PREFIX, model)

    def forward(self, seed: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model, dice = self.get_submodule(_PREFIX), Dice()
        args, kwargs = self.call_shape.arguments(list(tensors))
        rebound = Rebound(model)
        result = model(*args, **kwargs)
        rebound.settle()
        dice.check(lambda: model(*args, **kwargs))
        self.watch.note()
        check_result(model, result)
        return self.selection.take(result)


def _trace(
    wrapper: _Wrapper, args: tuple[torch.Tensor, ...], tied: dict[str, str], mode: str, fuse: bool, precision: Precision | None
) -> Traced:
    kept = Kept()
    try:
        with kept.recording():
            exported = torch_private.export(wrapper, args)
        kept.restore(exported)
        check_graph(exported)
        lines = written(exported)
        _merge_tied(exported, tied)
        random = Random()
        number_draws(exported, random)
        unfused = fuse_graph(exported) if fuse else ()
        _note_origins(exported)
        if precision:
            apply_precision(exported, precision)
        seed = next(n for n in exported.graph.nodes if n.op == "placeholder")
        normalize(exported, seed, random)
        if mode == "inference":  # only now: models decide by requires_grad which of two equal ways they go
            for tensor in (*exported.parameters(), *args):
                tensor.requires_grad_(False)
        traced = Traced(*joint(exported, args, DECOMPOSITIONS), fuse, unfused)
        _check_complete(traced, wrapper, lines, mode)
        return traced
    except Exception as error:
        if isinstance(error, AutoparError):
            raise
        raise explain(error, next(iter(kept.lines), "")) from error


def _check_complete(traced: Traced, wrapper: _Wrapper, lines: dict[str, str], mode: str) -> None:
    """CaptureError when inputs or parameters are written, a tensor came from nowhere, or an output has lost its gradient."""
    for _, role, name in (end for end in traced.outs if end[0] == "mutation"):
        if role == "param" or (role == "input" and mode == "training"):
            node = f"tensors_{name - 1}" if role == "input" else name
            title = wrapper.call_shape.leaves[name - 1][0] if role == "input" else name.removeprefix(f"{_PREFIX}.")
            raise writes(title, lines.get(node, ""))
    for name, value in traced.constants.items():
        if torch_private.is_fake(value) or value.requires_grad:
            users = [n for n in traced.graph.nodes if n.op == "call_function" and any(a.target == name for a in n.all_input_nodes)]
            raise CaptureError(
                "forward uses a tensor that is neither argument, parameter nor buffer, and that wants a gradient or has no value",
                where=next((line for n in users if (line := n.meta.get("stack_trace"))), ""),
                why="it would be a constant of the graph: no optimizer sees it, and its gradient would be lost",
                try_="make it a parameter of the module, or pass it as an argument",
            )
    tangents = {end[1] for end in traced.ins if end[0] == "tangent"}
    lost = [p for i, p in enumerate(wrapper.selection.paths) if p in wrapper.selection.carrying and i not in tangents]
    if lost and mode == "training":
        raise CaptureError(
            "gradients were lost on the way through the model",
            where=", ".join(lost),
            why="the output wants a gradient when the model runs, and not in the traced graph",
            try_="look for an op that changes how gradients are computed (a hook, an autograd.Function), and report it",
        )


def _merge_tied(exported: fx.GraphModule, tied: dict[str, str]) -> None:
    """Let every use of a tied parameter name it the same way, and drop the other names."""
    full = {f"{_PREFIX}.{second}": f"{_PREFIX}.{first}" for second, first in tied.items()}
    for module in exported.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "get_attr" and node.target in full:
                    node.target = full[node.target]
    for second, first in full.items():
        owner, _, leaf = first.rpartition(".")
        tensor = getattr(exported.get_submodule(second.rpartition(".")[0]), second.rpartition(".")[2], None)
        holder = exported.get_submodule(owner)
        if tensor is not None and getattr(holder, leaf, None) is None:
            setattr(holder, leaf, tensor)
        with contextlib.suppress(AttributeError):
            delattr(exported.get_submodule(second.rpartition(".")[0]), second.rpartition(".")[2])


def _note_origins(exported: fx.GraphModule) -> None:
    """Put line and module, parsed once, where autograd's trace carries them along; leave out what only costs time."""
    for module in exported.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    path = module_path(node.meta.get("nn_module_stack"), _PREFIX)
                    line = where(node.meta.get("stack_trace"))
                    salt = {"salt": node.meta["salt"]} if "salt" in node.meta else {}
                    node.meta = {"stack_trace": line or "", "nn_module_stack": {"": (path, "")} if path is not None else {}, **salt}
