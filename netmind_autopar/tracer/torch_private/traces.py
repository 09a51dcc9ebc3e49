"""Tracing: a module to its forward graph, and that to the graph of forward and backward."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from traceback import FrameSummary, StackSummary
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dispatch import python as _dispatch
from torch._dynamo.utils import assert_no_fake_params_or_buffers
from torch._functorch._aot_autograd import descriptors as _desc
from torch._functorch._aot_autograd import graph_capture_wrappers as _aot_wrappers
from torch._functorch._aot_autograd import logging_utils as _aot_logging
from torch._functorch._aot_autograd import utils as _aot_utils
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import traceback
from torch.fx.experimental import proxy_tensor
from torch.utils import _traceback

from ..origin import is_foreign
from .fakes import no_rules, quiet

# Do not note which Python function each op came from: nobody reads it, and it takes a twelfth of the time. Since 2.12 or so.
_QUICK = {
    name: True for name in ("_disable_torch_fn_metadata_mode",) if name in inspect.signature(aot_export_joint_with_descriptors).parameters
}


def new_node(graph: fx.Graph, op: str, target: Any, args: tuple, kwargs: dict[str, Any], name: str) -> fx.Node:
    """`Graph.create_node` without its search for symbolic sizes, of which a captured graph has none; it takes a third of the time."""
    name = graph._graph_namespace.create_name(name, None)
    node = fx.Node(graph, name, op, target, args, kwargs)
    graph._graph_namespace.associate_name_with_obj(name, node)
    graph._insert(node)
    graph._find_nodes_lookup_table.insert(node)
    graph._len += 1
    return node


def export(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    """The forward graph before autograd, parameters as `get_attr` nodes. All tensors in `module` and `args` are fake."""
    with warnings.catch_warnings(), quiet(), _lean():
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, strict=False).module(check_guards=False)


def joint(
    module: fx.GraphModule, args: tuple[torch.Tensor, ...], decompositions: dict[Any, Callable[..., Any]]
) -> tuple[fx.Graph, dict[str, torch.Tensor], list[tuple], list[tuple]]:
    """Forward and backward in one graph.

    Returns the graph, the tensors its `get_attr` nodes name, and what its ends are, in order. Ends: ("param", name), ("buffer",
    name), ("input", index), ("tangent", output index); ("output", index), ("mutation", role, name), ("grad", role, name).
    """
    with contextlib.ExitStack() as stack, warnings.catch_warnings(), quiet(), _whole(), _lean():
        warnings.simplefilter("ignore")
        traced = aot_export_joint_with_descriptors(stack, module, args, decompositions=decompositions, **_QUICK).graph_module
    nodes = list(traced.graph.nodes)
    ins = [_end(n.meta.get("desc")) for n in nodes if n.op == "placeholder"]
    outs = [_end(d) for d in nodes[-1].meta["desc"]]
    constants = {n.target: attribute(traced, n.target) for n in nodes if n.op == "get_attr"}
    return traced.graph, constants, ins, outs


def traced(function: Callable[[list], list], inputs: list[torch.Tensor], decompositions: dict[Any, Callable[..., Any]]) -> fx.GraphModule:
    """What `function` does with fake tensors, autograd under `traced_backward` included, which tells every node where it comes from.

    In-place ops stay what they are, unlike in `joint`. The inputs are those that `function` is called with.
    """
    make = functools.partial(proxy_tensor.make_fx, decomposition_table=decompositions, **_QUICK)
    with warnings.catch_warnings(), quiet(), _whole(), _lean(), _dispatch.enable_python_dispatcher(), traceback.preserve_node_meta():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=False):
            graph = make(function)(inputs)
    assert_no_fake_params_or_buffers(graph)  # tensors that came from nowhere, also where nobody needs what is made of them
    _aot_utils.copy_fwd_metadata_to_bw_nodes(graph)
    graph.graph.eliminate_dead_code()
    return graph


def traced_backward(outs: list[torch.Tensor], wanting: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients of tensors inside a `traced` function, given those of `outs`, which become inputs of the graph after all others."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    graph = mode.tracer.graph
    for node in graph.nodes:
        node.meta["partitioner_tag"] = "is_forward"
    with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
        proxies = [mode.tracer.create_proxy("placeholder", f"tangents_{i}", (), {}) for i in reversed(range(len(outs)))]
    with proxy_tensor.disable_proxy_modes_tracing():
        tangents = [torch.empty_like(out, requires_grad=False) for out in outs]
    for proxy, tangent in zip(reversed(proxies), tangents, strict=True):
        proxy_tensor.track_tensor_tree(tangent, proxy, constant=None, tracer=mode.tracer)
        proxy.node.meta = {"val": tangent, "partitioner_tag": "is_backward"}
    _aot_logging.setup_stacktrace_preservation_hooks([out.grad_fn for out in outs if out.grad_fn is not None])
    with _aot_wrappers.set_partitioner_tag_is_backward(), traceback.preserve_node_meta():
        return list(torch.autograd.grad(outs, wanting, tangents, allow_unused=True))


# Ops that torch's Python decompositions take apart before autograd sees them: a bicubic resampling becomes 200 nodes.
_KEPT = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa hardshrink softshrink"
)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """The ops above run as what C++ says they are: one op, with one op as its gradient."""
    removed = []
    packets = [getattr(torch.ops.aten, name) for name in _KEPT.split() if hasattr(torch.ops.aten, name)]
    for op in [getattr(packet, overload) for packet in packets for overload in packet.overloads()]:
        kernels = {key: op.py_kernels.pop(key) for key in list(op.py_kernels) if key.name in ("Autograd", "CompositeImplicitAutograd")}
        op._dispatch_cache.clear()
        removed.append((op, kernels))
    try:
        yield
    finally:
        for op, kernels in removed:
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """Without what only costs time in a trace: code for graphs that nobody calls, and guards against being compiled."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fx.GraphModule, "recompile", _recompile_when_called))
        for mode in (FakeTensorMode, proxy_tensor.ProxyTorchDispatchMode, FunctionalTensorMode):
            if guarded := getattr(mode.__torch_dispatch__, "_torchdynamo_orig_callable", None):
                stack.enter_context(mock.patch.object(mode, "__torch_dispatch__", guarded))
        stack.enter_context(no_rules())
        stack.enter_context(mock.patch.object(_traceback, "_extract_symbolized_tb", _read_frames))
        yield


_foreign = functools.lru_cache(maxsize=None)(is_foreign)


def _read_frames(frames: list[dict[str, Any]], skip: int) -> StackSummary:
    """Of a stack, innermost frame first, what is read of it: that a forward runs, the user's innermost line, and that in a forward
    (export keeps no others)."""
    first = next((f for f in reversed(frames) if f["name"] == "forward"), None)
    users = [f for f in frames[skip:] if _foreign(f["filename"])]
    found = [first, next((f for f in users if f["name"] == "forward"), None), users[0] if users else None]
    different = {id(f): f for f in found if f is not None}
    return StackSummary.from_list([FrameSummary(f["filename"], f["line"], f["name"]) for f in different.values()])


_recompile = fx.GraphModule.recompile


def _recompile_when_called(module: fx.GraphModule) -> None:
    tree = getattr(module.graph._codegen, "pytree_info", None)
    if tree is not None:
        module._in_spec, module._out_spec = tree.in_spec, tree.out_spec

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _recompile(self)
        return type(self).forward(self, *args, **kwargs)

    type(module).forward = forward


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What lies at a dotted path; None when nothing does."""
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def _end(desc: Any) -> tuple:
    """One end of the joint graph, from torch's descriptor of it."""
    if isinstance(desc, _desc.ParamAOTInput):
        return "param", desc.target
    if isinstance(desc, _desc.BufferAOTInput):
        return "buffer", desc.target
    if isinstance(desc, _desc.PlainAOTInput):
        return "input", desc.idx
    if isinstance(desc, _desc.TangentAOTInput):
        return "tangent", *_end(desc.output)[1:]
    if isinstance(desc, _desc.PlainAOTOutput):
        return "output", desc.idx
    if isinstance(desc, _desc.InputMutationAOTOutput):
        return "mutation", *_end(desc.mutated_input)
    if isinstance(desc, _desc.GradAOTOutput):
        return "grad", *_end(desc.grad_of)
    return "unknown", str(desc)


def traced_node(tensor: torch.Tensor) -> fx.Node | None:
    """The node that is being traced for `tensor`, when a trace is running that knows it."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)
    node = getattr(getattr(slot, "proxy", None), "node", None)
    return node if isinstance(node, fx.Node) else None


def traced_call(target: Any, inputs: Any, key: int, run: Callable[[], list[torch.Tensor]]) -> None:
    """Trace one node `target(inputs, key)` whose results are the tensors that `run` makes, unseen by the trace."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    with proxy_tensor.disable_proxy_modes_tracing():
        results = run()
    proxies = torch.utils._pytree.tree_map(lambda t: proxy_tensor.get_proxy_slot(t, mode.tracer).proxy, inputs)
    node = mode.tracer.create_proxy("call_function", target, (proxies, key), {})
    proxy_tensor.track_tensor_tree(results, node, constant=None, tracer=mode.tracer)
