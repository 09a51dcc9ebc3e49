"""Time the fused ops on a CUDA device against eager PyTorch, torch.compile and Liger-Kernel (where it is installed), in one process.

Every contender runs in a CUDA graph over inputs that rotate, so that none is found in the L2 cache; a sample is one replay, the result the
median over rounds, contenders in turn. The bandwidth of a copy is measured by the same means in the same run, and what a kernel
must move divided by its time is given as a fraction of it.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import netmind_autopar.kernels  # noqa: F401 - registers the ops
from netmind_autopar.kernels.fused.launch import KERNELS, Config, forcing
from netmind_autopar.kernels.fused.tuned import Tuned

ops = torch.ops.autopar
L2_BYTES = 128 << 20  # inputs rotate over more than twice the largest cache of today
ROUNDS = 21


@dataclass(frozen=True)
class Case:
    """What is timed: `make` gives tensors, those in `leaves` get gradients; bytes moved forward and backward."""

    name: str
    kernels: tuple[str, str]  # forward, backward
    width: int
    make: Callable[[torch.device], dict[str, Tensor]]
    leaves: tuple[str, ...]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    liger: str
    moved: tuple[int, int]


def _new(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def cases(scale: int = 1) -> Iterator[Case]:
    """bf16, at least 256 MB of each large tensor at scale 1; a larger scale divides the rows."""
    for n in (1024, 4096, 8192, 16384):
        rows = max(2, (1 << 27) // n // scale)
        e = 2 * rows * n
        rows_of = lambda d, rows=rows, n=n: {"x": _new(d, rows, n), "weight": _new(d, n)}  # noqa: E731
        yield Case(
            f"rms_norm {rows}x{n}", ("norm.forward", "norm.backward"), n, rows_of, ("x", "weight"),
            lambda x, weight: ops.rms_norm(x, weight, 1e-5, 0.0)[0],
            lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5), "liger_rms_norm", (2 * e, 3 * e),
        )  # fmt: skip
        yield Case(
            f"layer_norm {rows}x{n}", ("norm.forward", "norm.backward"), n,
            lambda d, rows=rows, n=n: {"x": _new(d, rows, n), "weight": _new(d, n), "bias": _new(d, n)}, ("x", "weight", "bias"),
            lambda x, weight, bias: ops.layer_norm(x, weight, bias, 1e-5)[0],
            lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5), "liger_layer_norm", (2 * e, 3 * e),
        )  # fmt: skip
        for kind, act in (("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))):
            yield Case(
                f"gated {kind} {rows}x{n}", ("gated.forward", "gated.backward"), n,
                lambda d, rows=rows, n=n: {"gate": _new(d, rows, n), "up": _new(d, rows, n)}, ("gate", "up"),
                lambda gate, up, kind=kind: ops.gated(gate, up, kind), lambda gate, up, act=act: act(gate) * up,
                "liger_swiglu" if kind == "silu" else "liger_geglu", (3 * e, 5 * e),
            )  # fmt: skip
    for heads, d in ((32, 128), (16, 64)):
        seq = max(2, (1 << 27) // (4 * heads * d) // scale)
        e = 2 * 4 * heads * d * seq
        yield Case(
            f"rope 4x{heads}x{seq}x{d}", ("rope", "rope"), d // 2,
            lambda dev, h=heads, s=seq, d=d: {
                "x": _new(dev, 4, s, h, d).transpose(1, 2), "cos": _new(dev, 1, s, d), "sin": _new(dev, 1, s, d),
            }, ("x",), lambda x, cos, sin: ops.rope(x, cos, sin, False), _eager_rope, "", (2 * e, 2 * e),
        )  # fmt: skip
    for rows, c in ((8192, 32000), (8192, 131072)):
        rows = max(2, rows // scale)
        e = 2 * rows * c
        yield Case(
            f"cross_entropy {rows}x{c}", ("cross_entropy.forward", "cross_entropy.backward"), c,
            lambda d, n=rows, c=c: {"x": _new(d, n, c), "target": torch.randint(0, c, (n,), device=d)}, ("x",),
            lambda x, target: ops.cross_entropy(x, target, -100, 0.0)[0].mean(),
            lambda x, target: F.cross_entropy(x.float(), target), "liger_cross_entropy", (e, 2 * e),
        )  # fmt: skip


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    out = {"ours": case.ours, "eager": case.eager, "compiled": torch.compile(case.eager, mode="max-autotune-no-cudagraphs", dynamic=False)}
    if case.liger and importlib.util.find_spec("liger_kernel"):
        function = getattr(importlib.import_module("liger_kernel.transformers.functional"), case.liger)
        more = {"liger_rms_norm": (1e-5, 0.0, "llama", False), "liger_layer_norm": (1e-5,)}.get(case.liger, ())
        out["liger"] = lambda **x: _first(function(*x.values(), *more))
    return out


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def replayed(steps: list[Callable[[], object]]) -> Callable[[], float]:
    """A function that runs all steps once in a CUDA graph and gives the milliseconds of one step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps * 2:
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(steps)

    return run


def in_turn(runs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median milliseconds of each, sampled in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS + 3):
        for name, run in runs.items():
            ms = run()
            if i >= 3:
                samples[name].append(ms)
    return {name: statistics.median(found) for name, found in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    pairs = [[torch.empty(1 << 29, dtype=torch.bfloat16, device=device) for _ in range(2)] for _ in range(2)]
    ms = in_turn({"copy": replayed([lambda a=a, b=b: b.copy_(a) for a, b in pairs])})["copy"]
    return 4 * (1 << 29) / (ms * 1e-3)


def sets_of(case: Case, device: torch.device) -> list[dict[str, Tensor]]:
    """So many inputs that none of them is in the cache when its turn comes."""
    first = case.make(device)
    size = sum(t.numel() * t.itemsize for t in first.values())
    return [first, *(case.make(device) for _ in range(min(8, 1 + 2 * L2_BYTES // size)))]


def steps(case: Case, fn: Callable[..., Tensor], sets: list[dict[str, Tensor]], backward: bool) -> list[Callable[[], object]]:
    if not backward:
        return [lambda x=x: fn(**x) for x in sets]
    out: list[Callable[[], object]] = []
    for given in sets:
        x = {k: v.detach().requires_grad_(k in case.leaves) for k, v in given.items()}
        y, leaves = fn(**x), [x[k] for k in case.leaves]
        grad = torch.randn_like(y)
        out.append(lambda y=y, leaves=leaves, grad=grad: torch.autograd.grad(y, leaves, grad, retain_graph=True))
    return out


def time_case(case: Case, device: torch.device, copy_bytes_s: float) -> Iterator[dict[str, Any]]:
    sets = sets_of(case, device)
    for direction, moved in zip(("forward", "backward"), case.moved, strict=True):
        runs, failed = {}, {}
        for name, fn in contenders(case).items():
            try:
                runs[name] = replayed(steps(case, fn, sets, direction == "backward"))
            except Exception as error:  # another library's kernel may not run here: say so, and time the rest
                if name == "ours":
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:200]
        ms = in_turn(runs)
        yield {
            "case": case.name, "direction": direction, "ms": {k: round(v, 5) for k, v in ms.items()}, "failed": failed,
            "of_copy": round(moved / (ms["ours"] * 1e-3) / copy_bytes_s, 4),
            "of_best": round(min(v for k, v in ms.items() if k != "ours") / ms["ours"], 4),
        }  # fmt: skip


def tune(device: torch.device) -> tuple[Tuned, list[dict[str, Any]]]:
    """The fastest registered configuration of every kernel and width that is timed; the kernels of one case share its rows."""
    found: Tuned = {}
    rows = []
    for case in cases():
        sets = sets_of(case, device)
        for direction, name in zip(("forward", "backward"), case.kernels, strict=True):
            fitting = KERNELS[name].fitting(case.width, 2)
            if len(fitting) < 2 or case.name.startswith("layer_norm"):
                continue
            runs = {}
            for config in fitting:
                with forcing({name: config}):
                    runs[_name(config)] = replayed(steps(case, case.ours, sets, direction == "backward"))
            ms = in_turn(runs)
            best = min(fitting, key=lambda c: ms[_name(c)])
            found.setdefault(name, {})[2, case.width] = best
            rows.append({"kernel": name, "width": case.width, "best": _name(best), "ms": {k: round(v, 5) for k, v in ms.items()}})
    return found, rows


def _name(config: Config) -> str:
    return f"{config.block}x{config.rows}, {config.warps} warps, {config.stages} stages"
