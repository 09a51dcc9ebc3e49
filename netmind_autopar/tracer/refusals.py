"""What cannot be captured, said in the user's terms: models and graphs that are refused, and errors of torch that are translated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..ir.errors import AutoparError, CaptureError, InputError
from . import torch_private
from .origin import line_of, where, where_raised
from .signature import constants, flatten

_aten = torch.ops.aten

# Part of what torch says -> (what, why, try). The first that fits is taken.
_PHRASES: tuple[tuple[tuple[str, ...], tuple[str, str, str]], ...] = (
    (
        ("nested",),
        (
            "nested tensors cannot be captured",
            "their rows differ in length, and every shape of a plan is fixed",
            "pad the rows to one length and pass a mask",
        ),
    ),
    (
        ("sparse",),
        (
            "sparse tensors cannot be captured",
            "how many elements they hold is only known when the model runs",
            "use dense tensors and masks",
        ),
    ),
    (
        (".numpy()", "FakeTensor", "can't be converted to numpy"),
        (
            "forward needs the value of a tensor",
            "the plan is made once, for every value the inputs may have",
            "keep it a tensor: no .numpy(), .tolist(), float() or int() of a tensor, and no packed sequences (pad and mask instead)",
        ),
    ),
    (
        ("Unexpected fake buffer",),
        (
            "forward uses a tensor that is neither argument, parameter nor buffer",
            "it was made outside of this call, or assigned to .data",
            "register it as a buffer or pass it as an argument; write into a buffer with copy_ instead of assigning .data",
        ),
    ),
    (
        ("device", "cuda", "CUDA"),
        (
            "forward moves tensors between devices, or makes them on another one",
            "the program is captured for one kind of device; each rank brings its own",
            "make new tensors with device=x.device, and drop .to(device) and .cuda() from forward",
        ),
    ),
)


def data_dependent(line: str) -> CaptureError:
    return CaptureError(
        "control flow or a shape depends on the values of a tensor",
        where=line,
        why="the plan is made once, for every value the inputs may have",
        try_="use torch.where, masks or a fixed size instead of if, .item(), nonzero or a boolean index",
    )


def explain(error: Exception, otherwise: str = "") -> AutoparError:
    """The error to raise for one that came out of a trace; `otherwise` is the line to name when the error knows none."""
    if isinstance(error, AutoparError):
        return error
    line = where_raised(error.__traceback__) or otherwise
    if isinstance(error, torch_private.DATA_DEPENDENT):
        return data_dependent(line)
    if data := torch_private.data_dependent_cause(error):
        return data_dependent(where_raised(data.__traceback__) or line)
    text = f"{type(error).__name__}: {_first_line(error)}"
    for phrases, (what, why, try_) in _PHRASES:
        if any(phrase in text for phrase in phrases):
            return CaptureError(what, where=line, why=f"{why} ({text})", try_=try_)
    return CaptureError(
        "the model failed while it was traced",
        where=line,
        why=text,
        try_="call the model with these sample_inputs; if that works, remove what only runs in Python",
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:300]


def check_model(model: nn.Module) -> None:
    """InputError for modules that are no plain module yet, or no longer."""
    for name, module in model.named_modules():
        title = f"{name} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError("the model is compiled by TorchScript", where=title, try_="pass the module that was scripted")
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise InputError(
                "the model is wrapped already",
                where=title,
                why=f"{type(module).__name__} spreads it over devices in its own way",
                try_="pass the module inside, model.module",
            )
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if norm and module.momentum is None and module.training and module.track_running_stats:
            raise InputError(
                "a batch norm with momentum=None averages by a number that is read out of a tensor",
                where=title,
                why="the plan is made once, and that number changes from step to step",
                try_="give it a momentum, or track_running_stats=False",
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            path = f"{name}.{key}" if name else key
            if tensor is not None and torch.nn.parameter.is_lazy(tensor):
                raise InputError(
                    f"{path} has no shape yet",
                    where=title,
                    why="a lazy module takes its shapes from the first call",
                    try_="call the model once, with torch.no_grad(), before planning",
                )
            if tensor is not None and hasattr(tensor, "device_mesh"):
                raise InputError(
                    f"{path} is a DTensor",
                    where=title,
                    why="the plan decides how parameters are split",
                    try_="pass the model before sharding it",
                )
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
                path = f"{name}.{key}" if name else key
                raise InputError(
                    f"{path} wants a gradient and is no parameter",
                    where=title,
                    why="a plain attribute is a constant of the graph: its gradient would be lost",
                    try_=f"self.{key} = nn.Parameter({key})",
                )


def check_graph(exported: fx.GraphModule) -> None:
    """CaptureError for sizes and numbers only known when the model runs, and tensors that are not strided or lie elsewhere."""
    for node in _calls(exported):
        line = where(node.meta.get("stack_trace")) or ""
        if node.target is _aten.embedding_renorm_.default:
            raise CaptureError(
                "an embedding with max_norm rewrites its own weight in forward",
                where=line,
                why="each device would rewrite other rows of the table",
                try_="drop max_norm, and scale what is looked up: x * (max_norm / x.norm(dim=-1, keepdim=True)).clamp(max=1)",
            )
        val = node.meta.get("val")
        for value in val if isinstance(val, (tuple, list)) else (val,):
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            if torch_private.is_symbolic(value) or any(torch_private.is_symbolic(n) for n in shape):
                raise data_dependent(line)
            if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
                what, why, try_ = _PHRASES[1][1]
                raise CaptureError(what, where=line, why=why, try_=try_)
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                what, why, try_ = _PHRASES[-1][1]
                raise CaptureError(what, where=line, why=why, try_=try_)


def _calls(exported: fx.GraphModule) -> Iterator[fx.Node]:
    for module in exported.modules():
        if isinstance(module, fx.GraphModule):
            yield from (n for n in module.graph.nodes if n.op == "call_function")


def written(exported: fx.GraphModule) -> dict[str, str]:
    """Line of the first op that writes into an input ("tensors_0") or a parameter ("model.fc.weight"), by its name in the graph."""
    lines: dict[str, str] = {}
    _written(exported, {}, lines)
    return lines


def _written(module: fx.GraphModule, outer: dict[str, str], lines: dict[str, str]) -> None:
    roots: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            roots[node] = outer.get(node.name, node.name)
        elif node.op == "get_attr":
            roots[node] = node.target
        elif node.op != "call_function" or not node.args:
            continue
        elif isinstance(node.target, torch._ops.OpOverload):
            first = node.target._schema.arguments[0]
            if not isinstance(node.args[0], fx.Node) or first.alias_info is None or node.args[0] not in roots:
                continue
            roots[node] = roots[node.args[0]]
            if first.alias_info.is_write:
                lines.setdefault(roots[node], where(node.meta.get("stack_trace")) or "")
        elif inner := [a for a in node.args if isinstance(a, fx.Node) and isinstance(getattr(module, str(a.target), None), fx.GraphModule)]:
            graph = getattr(module, inner[0].target)
            given = node.args[node.args.index(inner[0]) + 1 :]
            names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
            _written(graph, {n: roots[a] for n, a in zip(names, given, strict=False) if a in roots}, lines)


def writes(name: str, line: str) -> CaptureError:
    return CaptureError(
        "the model writes into what it was given",
        where=f"{name}, at {line}" if line else name,
        why="inputs and parameters are shared between devices",
        try_='clone the tensor before writing into it, or register it as a buffer; a cache may be written into with mode="inference"',
    )


def check_result(model: nn.Module, result: Any) -> None:
    """CaptureError when forward returns no tensor, or a number that was taken out of one."""
    template, leaves = flatten(result)
    line = line_of(type(model).forward, "return ")
    if any(torch_private.is_symbolic(value) for value in constants(template)):
        raise data_dependent(line)
    if not leaves:
        raise CaptureError(
            "the model returns no tensor",
            where=line or type(model).__name__,
            why=f"it returned {'None' if result is None else 'a ' + type(result).__name__}, and there is nothing to compute",
            try_="return a tensor from forward, or a tuple, dict or dataclass that holds one",
        )
