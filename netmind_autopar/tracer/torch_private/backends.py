"""Inductor, which compiles regions, and torch's own count of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import _disable_current_modes

from .fakes import fake_mode, quiet


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
