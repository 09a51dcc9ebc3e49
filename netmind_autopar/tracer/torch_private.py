"""The only file that imports private modules of torch. Written for 2.11 to 2.13; each name says why it is needed."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as _desc
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._library import simple_registry
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Do not note which Python function each op came from: nobody reads it, and it takes a twelfth of the time. Since 2.12 or so.
_QUICK = {
    name: True for name in ("_disable_torch_fn_metadata_mode",) if name in inspect.signature(aot_export_joint_with_descriptors).parameters
}

# What torch raises when a model looks at a value that is only known when it runs.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, symbolic_shapes.GuardOnDataDependentSymNode)


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors have shapes and no storage."""
    return FakeTensorMode(shape_env=symbolic_shapes.ShapeEnv(), allow_non_fake_inputs=True)


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def new_node(graph: fx.Graph, op: str, target: Any, args: tuple, kwargs: dict[str, Any], name: str) -> fx.Node:
    """`Graph.create_node` without its search for symbolic sizes, of which a captured graph has none; it takes a third of the time."""
    name = graph._graph_namespace.create_name(name, None)
    node = fx.Node(graph, name, op, target, args, kwargs)
    graph._graph_namespace.associate_name_with_obj(name, node)
    graph._insert(node)
    graph._find_nodes_lookup_table.insert(node)
    graph._len += 1
    return node


def is_symbolic(value: Any) -> bool:
    """True when a size is not known at capture."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


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
        stack.enter_context(_no_rules())
        yield


def _no_rules() -> contextlib.AbstractContextManager[Any]:
    """Where no library has rules of its own for classes of tensors, nobody has to look for them at every op."""
    if any(entry.torch_dispatch_rules._data for entry in simple_registry.singleton._data.values()):
        return contextlib.nullcontext()

    def none(op: Any, kind: Any) -> None:
        return None

    return mock.patch.object(simple_registry, "find_torch_dispatch_rule", none)


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


def data_dependent_cause(error: BaseException) -> BaseException | None:
    """The data-dependent error at the bottom of `error`, when there is one: torch wraps it in others."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        if isinstance(chain, DATA_DEPENDENT) or "data-dependent" in text.lower() or "_local_scalar_dense" in text:
            return chain
        chain = chain.__cause__ or chain.__context__
    return None


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
        with quiet(), _no_rules():
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


def inductor(function: Callable[[list[torch.Tensor]], Any], inputs: Sequence[torch.Tensor]) -> Callable[[list[torch.Tensor]], Any]:
    """A function of a list of tensors compiled by Inductor, for tensors like `inputs`; calling it empties the list.

    `torch.compile` would keep what it is called with until it returns, and guards what a plan fixes.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    mode = fake_mode()
    fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
    with _disable_current_modes(), torch.no_grad(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mode:
            graph = proxy_tensor.make_fx(lambda *xs: function(list(xs)), decomposition_table=select_decomp_table())(*fakes)
        graph.graph.eliminate_dead_code()
        end = next(n for n in graph.graph.nodes if n.op == "output")
        end.meta["user_visible_output_idxs"] = list(range(len(end.args[0])))  # type: ignore[arg-type]  # keep their strides
        with V.set_fake_mode(mode), tracing(TracingContext(mode)):
            return compile_fx_inner(graph, fakes)  # type: ignore[return-value]


def inductor_lacks(device_type: str) -> str:
    """What Inductor misses on this machine, or nothing."""
    try:
        if device_type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        else:
            import triton  # noqa: F401
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


def peak_of(run: Callable[[], Any], held: Sequence[Any]) -> int:
    """Bytes alive on the CPU at the peak of `run`: the tensors it makes, and those of these modules, optimizers and tensors."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*held)
    with tracker:
        run()
    found = tracker.get_tracker_snapshot("peak")
    return int(found[torch.device("cpu")]["Total"])
