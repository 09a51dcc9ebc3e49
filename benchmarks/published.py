"""Training runs that others measured: read from their CSV files, and priced by this package's cost model.

A run is a transformer, so its ops need no capture: the matrix products, attention and bytes of one layer are written down here, as
`OpCost`s, and priced by `OpCost.seconds`, `collective_seconds` and `pipeline_seconds`, which price every plan.

What a device reaches is given by `Constants`, which become curves of the device. They are fitted on some rows and judged on others.
Eager execution takes the longer of what the device and what the host needs for a layer: small layers wait for their launches.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from netmind_autopar.costs.compute import OpCost
from netmind_autopar.costs.curves import interpolate
from netmind_autopar.costs.device import cluster_profile, make_mesh
from netmind_autopar.costs.pipeline import pipeline_seconds
from netmind_autopar.costs.space import START_LAUNCHES, collective_seconds
from netmind_autopar.ir.errors import InputError
from netmind_autopar.ir.mesh import Axis, Curve, Device, Mesh

MOST = {
    "matmul": 1.0,
    "attention": 1.0,
    "memory": 1.0,
    "link": 1.3,
    "inter": 1.3,
    "reduced": 1.0,
    "compiled": 1.0,
}  # no rate beyond the vendor's
FORWARD_OPS, BACKWARD_OPS = 25, 40  # kernels of one layer
ACTIVATION_READS = 60  # bytes that norms, residuals, bias, GELU and dropout of one layer move in forward, per element of [tokens, hidden]
ADAM_BYTES = 18  # of state and gradients that the optimizer reads and writes, per parameter: mixed precision


@dataclass(frozen=True)
class Run:
    """One measured run. Sizes are global but for `micro`, the sequences of one micro-batch on one replica."""

    name: str
    device: str  # a cluster preset
    layers: int
    hidden: int
    ffn: int
    gated: bool
    heads: int
    kv_heads: int
    vocab: int
    seq: int
    micro: int
    micro_batches: int
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    fsdp: bool = False
    chunks: int = 1
    dtype: str = "float16"
    recompute: str = "none"
    compiled: bool = False
    async_tp: bool = False
    seconds: float = 0.0  # measured, of a step
    peak_gib: float = 0.0  # measured; 0 where the table does not tell
    group: str = ""

    @property
    def layer_parameters(self) -> float:
        kv = 2 * self.hidden * self.hidden * self.kv_heads / self.heads
        return 2 * self.hidden**2 + kv + (3 if self.gated else 2) * self.hidden * self.ffn


@dataclass(frozen=True)
class Constants:
    """What a kind of machine and its software reach."""

    matmul: float = 0.8  # of the peak, when large
    ramp_s: float = 7e-6
    memory: float = 0.85  # of the memory bandwidth
    host_s: float = 3e-5  # of the host, per kernel
    link: float = 1.0  # times the preset's link inside a node
    inter: float = 1.0  # times the preset's link between nodes
    step_s: float = 5e-3  # what every step costs besides
    reduced: float = 1.0  # of the peak that the reduced float8 products reach, as a part of `matmul`
    attention: float = 0.5  # of the peak, fused
    compiled: float = 1.0  # bytes that a compiled layer still moves


# Fitted on half of the rows of each source (seed 0, no tables; mean errors there 6.6%, 6.9%, 5.7%): vTrain's A100 runs of one node and of
# several (Bang et al., MICRO 2024), torchtitan's published runs on H100, H200 and A100.
FITTED: dict[str, Constants] = {
    "vtrain, one node": Constants(matmul=0.642, ramp_s=6.92e-5, memory=0.999, host_s=5.40e-5, step_s=3.84e-3),
    "vtrain, several nodes": Constants(inter=0.494),
    "torchtitan": Constants(matmul=0.722, attention=0.341, memory=0.368, reduced=0.735, compiled=0.943),
}
FREE: dict[str, tuple[str, ...]] = {  # what is fitted
    "vtrain, one node": ("matmul", "ramp_s", "memory", "host_s", "step_s"),
    "vtrain, several nodes": ("matmul", "memory", "inter"),
    "torchtitan": ("matmul", "attention", "memory", "reduced", "compiled"),
}
LEAST_ROWS = 4  # fewer are not fitted

C = TypeVar("C")
GRID = tuple(10.0 ** (e / 2) for e in range(6, 36))


@lru_cache(maxsize=64)
def machine(cluster: str, c: Constants) -> Device:
    """The preset's device with curves that say what the constants say."""
    device = make_mesh("a=1", cluster).device
    curves = []
    for dtype in ("float16", "bfloat16", "float8_e4m3fn"):
        reach = c.matmul * (c.reduced if dtype.startswith("float8") else 1.0)
        points = tuple((x, x / (device.flops(dtype) * reach) + c.ramp_s) for x in GRID)
        fused = tuple((x, x / (device.flops(dtype) * c.attention) + c.ramp_s) for x in GRID)
        curves += [Curve("matmul", dtype, points), Curve("attention", dtype, fused)]
        curves.append(Curve("elementwise", dtype, tuple((x, x / (device.memory_bandwidth_bytes_s * c.memory)) for x in GRID)))
    return replace(device, curves=tuple(curves), launch_s=1e-7)


@lru_cache(maxsize=100_000)
def product(device: Device, dtype: str, rows: float, inner: float, columns: float, count: float = 1.0) -> float:
    """Seconds of `count` matrix products at once."""
    sizes = {"b": max(1, round(count)), "m": max(1, round(rows)), "k": max(1, round(inner)), "n": max(1, round(columns))}
    size = 1 if dtype.startswith("float8") else 2
    operands = ((("b", "m", "k"), size, 0), (("b", "k", "n"), size, 0), (("b", "m", "n"), 2, 1))
    flops = 2.0 * math.prod(sizes.values())
    return _seconds(OpCost("matmul", flops, dtype, sizes, operands, (("m",), ("n",), ("k",)), op="mm"), device)


@lru_cache(maxsize=100_000)
def attended(device: Device, dtype: str, heads: float, queries: float, keys: float, size: float) -> float:
    """Seconds of a causal attention that never writes its scores, on the device whose queries see the most keys."""
    sizes = {"h": max(1, round(heads)), "s": max(1, round(queries)), "t": max(1, round(keys)), "d": max(1, round(size))}
    operands = ((("h", "s", "d"), 2, 0), (("h", "t", "d"), 4, 0), (("h", "s", "d"), 2, 1))
    flops = 4.0 * math.prod(sizes.values()) * (1.0 - 0.5 * queries / keys)
    return _seconds(OpCost("attention", flops, dtype, sizes, operands, op="attention"), device)


@lru_cache(maxsize=100_000)
def passed(device: Device, amount: float) -> float:
    """Seconds of ops that move so many bytes."""
    return _seconds(OpCost("elementwise", 0.0, "bfloat16", {"x": max(1, round(amount))}, ((("x",), 1, 0),), op="add"), device)


def _seconds(cost: OpCost, device: Device) -> float:
    return float(cost.seconds((("-",),), Mesh((Axis("a", 1),), device))[0])


def sent(kind: str, axis: Axis, amount: float) -> float:
    """Seconds of a collective over `axis` of a tensor of `amount` bytes, whole."""
    if axis.size == 1:
        return 0.0
    bytes_ = amount * (axis.size - 1) / axis.size * (2 if kind == "all_reduce" else 1)
    return float(collective_seconds(kind, axis, bytes_)) + (0.0 if axis.measured(kind) else START_LAUNCHES * 4e-6)


def axes_of(run: Run, c: Constants, tables: Sequence[tuple[int, Curve]] = ()) -> dict[str, Axis]:
    """The axes of a run: pipeline outermost, tensor innermost, as Megatron and torchtitan lay ranks out."""
    mesh = make_mesh(f"pp={run.pp},dp={run.dp},cp={run.cp},tp={run.tp}", run.device)
    profile = cluster_profile(run.device)
    out, inner = {}, 1
    for axis in reversed(mesh.axes):
        inside = inner * axis.size <= profile.node_size
        curves = tuple(curve for group, curve in tables if group == axis.size and inside)
        rate = axis.bandwidth_bytes_s * (c.link if inside else c.inter)
        out[axis.name] = replace(axis, bandwidth_bytes_s=rate, curves=curves)
        inner *= axis.size
    return out


def layer(run: Run, device: Device, axes: dict[str, Axis], c: Constants) -> tuple[float, float]:
    """(forward, backward) seconds of one layer and one micro-batch, what tensor and context parallelism send included."""
    tokens, h, t = run.micro * run.seq / run.cp, run.hidden, run.tp
    kv = 2 * h * run.kv_heads / run.heads
    work = product(device, run.dtype, tokens, h, (h + kv) / t) + product(device, run.dtype, tokens, h / t, h)
    work += product(device, run.dtype, tokens, h, (2 if run.gated else 1) * run.ffn / t) + product(
        device, run.dtype, tokens, run.ffn / t, h
    )
    wide = "bfloat16" if run.dtype.startswith("float8") else run.dtype
    heads, queries, size = run.micro * run.heads / t, run.seq / run.cp, h / run.heads
    if run.gated:
        core = attended(device, wide, heads, queries, run.seq, size)
    else:  # scores are written and read
        core = 2 * product(device, wide, queries, size, run.seq, heads)
    moved = tokens * h * ACTIVATION_READS * (c.compiled if run.compiled else 1.0)
    moved = moved * (0.4 + 0.6 / t) + (0 if run.gated else run.micro * run.heads / t * run.seq**2 * 16)
    kind = "all_gather" if run.gated else "all_reduce"  # with sequence parallelism: a gather and a scatter for each reduction
    travel = sent(kind, axes["tp"], tokens * h * 2) * (4 if run.gated else 2) * (0.3 if run.async_tp else 1.0)
    travel += sent("all_gather", axes["cp"], run.micro * run.seq * kv / t * 2)
    forward = work + core + passed(device, moved) + travel
    backward = 2 * work + 2.5 * core + 2 * passed(device, moved) + travel
    host = c.host_s * (0.3 if run.compiled else 1.0)
    forward, backward = max(forward, FORWARD_OPS * host), max(backward, BACKWARD_OPS * host)
    return forward, backward + forward * {"none": 0.0, "selective": 0.5, "full": 1.0}[run.recompute]


def predict(run: Run, c: Constants, tables: Sequence[tuple[int, Curve]] = ()) -> float:
    """Seconds of a step."""
    device, axes = machine(run.device, c), axes_of(run, c, tables)
    forward, backward = layer(run, device, axes, c)
    tokens, wide = run.micro * run.seq / run.cp, "bfloat16" if run.dtype.startswith("float8") else run.dtype
    head = 3 * product(device, wide, tokens, run.hidden, run.vocab / run.tp) + passed(device, tokens * run.vocab / run.tp * 20)
    each = run.layers / run.pp
    sharded, reduced = 0.0, 0.0
    if run.fsdp:  # parameters are gathered in forward and backward, gradients scattered: hidden behind the layer's compute
        weights = run.layer_parameters / run.tp * 2
        gather, scatter = sent("all_gather", axes["dp"], weights), sent("reduce_scatter", axes["dp"], 2 * weights)
        sharded = each * (max(0.0, gather - forward) + max(0.0, gather + scatter - backward))
    else:
        reduced = sent("all_reduce", axes["dp"], (run.layers * run.layer_parameters / run.pp + run.vocab * run.hidden) / run.tp * 2)
    stages = [each * (forward + backward)] * run.pp
    stages[-1] += head
    border = sent("all_gather", replace(axes["pp"], size=min(2, run.pp)), 2 * tokens * run.hidden * 2 / run.tp)
    busy = pipeline_seconds(stages, run.micro_batches, chunks=run.chunks, send_s=border if run.pp > 1 else 0.0)
    parameters = (run.layers * run.layer_parameters / run.pp + run.vocab * run.hidden) / run.tp / (run.dp if run.fsdp else 1)
    return busy + sharded + reduced + passed(device, parameters * ADAM_BYTES) + c.step_s


# --- memory ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What a run keeps beyond its parameters, gradients and Adam's state (16 bytes per parameter, in float32)."""

    selective: float = 8.0  # tensors of [tokens, hidden] in bfloat16 per layer, with some ops recomputed; twice that with none
    full: float = 2.0  # with all recomputed
    logits: float = 8.0  # bytes per logit, loss included
    base_gib: float = 5.0  # the driver, communication buffers, fragmentation
    eager: float = 1.2  # times the activations where nothing is compiled


KEPT = Kept(selective=8.92, full=2.56, logits=9.13, base_gib=4.69, eager=1.1)  # half of torchtitan's rows, mean error there 8.8%
KEPT_FREE = ("selective", "full", "logits", "base_gib", "eager")


def predict_gib(run: Run, k: Kept) -> float:
    """Peak of the fullest device under FSDP, GiB."""
    ends = run.vocab * run.hidden  # the embedding; the head is as large
    parameters = run.layers / run.pp * run.layer_parameters + (2 if run.pp == 1 else 1) * ends
    whole = parameters / (run.tp * run.dp * run.cp) * 16
    # two layers are gathered at a time; a pipeline's stage stays gathered between its micro-batches
    gathered = 2 * run.layers / run.pp * run.layer_parameters if run.pp > 1 else 2 * (2 * run.layer_parameters + 2 * ends)
    tokens = run.micro * run.seq / run.cp
    one = tokens * run.hidden * 2 / run.tp
    waiting = min(run.pp, run.micro_batches)  # micro-batches whose activations the first stage holds
    kept = {"full": k.full, "selective": k.selective, "none": 2 * k.selective}[run.recompute]
    alive = one * run.layers / run.pp * waiting * kept + (2 * one * k.selective if run.recompute == "full" else 0.0)
    logits = tokens * run.vocab / run.tp * k.logits
    return (whole + gathered / run.tp + alive * (1.0 if run.compiled else k.eager) + logits) / 2**30 + k.base_gib


# --- files -------------------------------------------------------------------------------------------------------------------

LLAMAS = {
    "8B": (32, 4096, 14336, 32, 8),
    "13B": (40, 5120, 13824, 40, 40),
    "70B": (80, 8192, 28672, 64, 8),
    "405B": (126, 16384, 53248, 128, 8),
}
GPT_VOCAB = 51200
GPUS = {"V100": "v100", "A100": "a100-80", "H100": "h100-sxm", "H200": "h200", "B200": "b200", "MI30": "mi300x"}  # by how a name begins


def header(path: str | Path) -> list[str]:
    """The first line of a file. Raises InputError when it is no text."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            return next(csv.reader(f), [])
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path} is no CSV file", why=str(e)) from None


def is_table(path: str | Path) -> bool:
    """Whether a file is a table of all-reduce times."""
    return header(path)[:1] == ["size(B)"]


def read(path: str | Path) -> list[Run]:
    """The runs of a CSV file with one of the known headers. Raises InputError that names the file and the row at fault."""
    columns = header(path)
    make = _megatron if "iteration time (ms)" in columns else _torchtitan if "tokens_per_s_per_GPU" in columns else None
    if make is None:
        raise InputError(f"{path} has no known header", try_="a file with the header of vTrain's or torchtitan's runs")
    with open(path, newline="", encoding="utf-8-sig") as f:
        return _parsed(path, list(csv.DictReader(f)), make)


def _parsed(path: str | Path, rows: Sequence[Any], make: Callable[[Any], C]) -> list[C]:
    """Every row as `make` reads it."""
    out = []
    for i, row in enumerate(rows, 2):
        try:
            out.append(make(row))
        except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError, AttributeError) as e:
            missing = f"the column or name {e} is missing" if isinstance(e, KeyError) else str(e)
            raise InputError(f"{path}, line {i}, cannot be read as a measured run", why=missing, try_="mend or drop the line") from None
    return out


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, not a positive number")
    return value


def _megatron(row: dict[str, str]) -> Run:
    n = {key: _positive(key, float(value)) for key, value in row.items()}
    hidden, t, d, p = (int(n[key]) for key in ("hidden size", "tensor parallelism", "data parallelism", "pipeline parallelism"))
    micro = int(n["micro batch"])
    several = n["# GPUs"] > 8
    return Run(
        " ".join(row.values()),
        "dgx-a100",
        int(n["# layers"]),
        hidden,
        4 * hidden,
        False,
        *(int(n["attention heads"]),) * 2,
        GPT_VOCAB,
        int(n["sequence length"]),
        micro,
        max(1, round(n["global batch"] / d / micro)),
        tp=t,
        dp=d,
        pp=p,
        recompute="full" if several else "none",
        seconds=n["iteration time (ms)"] / 1e3,
        group="vtrain, several nodes" if several else "vtrain, one node",
    )


def _torchtitan(row: dict[str, str]) -> Run:
    size = row["model"].rpartition("-")[2]
    layers, hidden, ffn, heads, kv = LLAMAS[size]
    degree = {name: int(n) for name, n in re.findall(r"(FSDP|TP|CP|PP)(\d+)", row["parallel"])}
    seq = next((int(value) for key, value in row.items() if key.startswith("seq") and value), 4096 if "llama2" in row["model"] else 8192)
    dp, cp, tp, pp = (degree.get(name, 1) for name in ("FSDP", "CP", "TP", "PP"))
    local, gpus = int(row["local_batch"]), int(row["GPUs"])
    device = GPUS[row["gpu"][:4]]
    kept = row["act_ckpt"]
    rate = _positive("tokens_per_s_per_GPU", float(row["tokens_per_s_per_GPU"]))
    return Run(
        f"{row['model']} {row['gpu'][:4]} {row['parallel']} {seq} {row['dtype']} {kept} compile={row['torch_compile']}",
        device,
        layers,
        hidden,
        ffn,
        True,
        heads,
        kv,
        32000 if "llama2" in row["model"] else 128256,
        seq,
        max(1, local // pp),  # as many micro-batches as stages
        pp,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        fsdp=True,
        chunks=2 if "interleaved" in row["parallel"] else 1,
        dtype="float8_e4m3fn" if row["dtype"].startswith("float8") else "bfloat16",
        recompute="full" if kept == "full" else "none" if kept == "none" else "selective",
        compiled=row["torch_compile"] == "1",
        async_tp=row["async_tp"] == "1",
        seconds=local * dp * seq / (rate * gpus),
        peak_gib=float(row["peak_mem_GiB"] or 0),
        group="torchtitan",
    )


def read_table(path: str | Path) -> list[tuple[int, float, float]]:
    """(devices, bytes, seconds) of a table of all-reduce times; the number of devices is in the file's name. Raises InputError."""
    found = re.search(r"GPU(\d+)", Path(path).name)
    if not found:
        raise InputError(f"the name of {path} does not tell how many devices reduce", try_="AR_GPU8_1M_1024M_LUT")
    with open(path, newline="", encoding="utf-8") as f:
        rows = [row for row in list(csv.reader(f))[1:] if row]
    devices = int(found[1])
    return _parsed(path, rows, lambda row: (devices, _positive("size", float(row[0])), _positive("time", float(row[3])) / 1e9))


def tables_of(rows: Iterable[tuple[int, float, float]]) -> list[tuple[int, Curve]]:
    """Curves over the bytes that one device sends, from (devices, bytes, seconds)."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for n, size, seconds in rows:
        groups.setdefault(n, []).append((2 * size * (n - 1) / n, seconds))
    return [(n, Curve("all_reduce", "", tuple(sorted(points)))) for n, points in sorted(groups.items())]


def table_seconds(rows: Sequence[tuple[int, float, float]], tables: Sequence[tuple[int, Curve]]) -> list[float]:
    """Seconds of all-reduces: from curves, or from the preset where there are none."""
    known: dict[int, Any] = dict(tables)
    out = []
    for n, size, _ in rows:
        if n in known:
            out.append(float(interpolate(known[n].points, 2 * size * (n - 1) / n)))
        else:
            out.append(sent("all_reduce", make_mesh(f"a={n}", "dgx-a100").axes[0], size))
    return out


def fitted(runs: Sequence[Run], start: Constants, names: Sequence[str], tables: Sequence[tuple[int, Curve]]) -> Constants:
    """Constants with which the mean relative error of the seconds is least."""
    return least_error(lambda c: float(np.mean([abs(math.log(predict(r, c, tables) / r.seconds)) for r in runs])), start, names)


def fitted_memory(runs: Sequence[Run], start: Kept = KEPT) -> Kept:
    """Constants with which the mean relative error of the peaks is least."""
    return least_error(lambda k: float(np.mean([abs(math.log(predict_gib(r, k) / r.peak_gib)) for r in runs])), start, KEPT_FREE)


def least_error(loss: Callable[[Any], float], start: C, names: Sequence[str]) -> C:
    """The dataclass with the least loss that is found: one field after the other, in ever smaller steps."""
    best, least = start, loss(start)
    step = 1.6
    while step > 1.01:
        better = False
        for name in names:
            for factor in (step, 1 / step):
                value = getattr(best, name) * factor
                if value > MOST.get(name, math.inf):
                    continue
                tried = replace(best, **{name: value})  # type: ignore[type-var]
                if (found := loss(tried)) < least:
                    best, least, better = tried, found, True
        step = step if better else math.sqrt(step)
    return best
