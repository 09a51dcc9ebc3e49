"""Compile every registered configuration of every fused kernel for a Hopper GPU, without one, and read the machine code.

What is compiled is what would be launched: the launch functions run on meta tensors, and the launches they ask for are recorded. Triton's
own ptxas and cuobjdump say the rest. A line per kernel, call, dtype and configuration:

    registers, spills (bytes of local memory, or instructions that use it), shared (bytes),
    loads, stores ({bits: instructions} of rows of elements in global memory),
    single (instructions for one number a row, or for what a program moves once: statistics, labels, weights, angles, partial sums),
    wgmma, dot (whether there is one)

The line that an access comes from says which of the two it is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netmind_autopar.kernels.fused import (
    adamw,
    cross_entropy,
    dropout_add,
    gated,
    group_norm,
    lamb,
    language,
    norm_launch,
    permute,
    rope,
    segments,
    softmax,
)
from netmind_autopar.kernels.fused.launch import KERNELS, Config, Launch, recording

TARGET = ("cuda", 90, 32)
ROWS = 4096
# one number a row; the label's logit; what a program reads or writes once: weights, angles, partial sums
SINGLE = re.compile(
    r"\+ row( \* t_row)?[,)]|tl\.where\(inside|\((weight|bias) \+ col|\(at_[cs]\b|tl\.load\((seed|scale)\)|\((dweight|dbias) \+ at"
    r"|\((weight|bias) \+ first|\((mean|rstd) \+ row|tl\.load\((order|place|keys) \+|tl\.load\(rate\)|tl\.load\(weight \+ row"
    r"|sums \+ row|dweight \+ row \* channels|dbias \+ row \* channels"
)
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}
Made = Callable[..., Tensor]


def _norm_forward(center: bool, add: bool) -> Callable[[int, Made], object]:
    def call(n: int, new: Made) -> object:
        weight, bias = new(n), new(n) if center else None
        return norm_launch.forward(new(ROWS, n), new(ROWS, n) if add else None, weight, bias, 1e-5, 0.0, center)

    return call


def _norm_backward(center: bool, add: bool) -> Callable[[int, Made], object]:
    def call(n: int, new: Made) -> object:
        statistic = new(ROWS, dtype=torch.float32)
        more, mean = new(ROWS, n) if add else None, statistic if center else None
        return norm_launch.backward(new(ROWS, n), more, new(ROWS, n), new(n), mean, statistic, 0.0, center)

    return call


def _adamw(n: int, new: Made, more: bool) -> None:
    """Parameters and state in float32; the gradient, and the copy, in the dtype."""
    p, m, v = (new(ROWS * n, dtype=torch.float32) for _ in range(3))
    copy, scale = (new(ROWS * n), new(dtype=torch.float32)) if more else (None, None)
    adamw.adamw_(p, new(ROWS * n), m, v, copy, scale, 1e-3, 0.9, 0.95, 1e-8, 0.1, 3)


def _group_norm(n: int, new: Made, backward: bool) -> None:
    """Groups of 16 channels, n positions."""
    x, w = new(8, 512, n), new(512)
    if backward:
        statistic = new(8, 32, dtype=torch.float32)
        group_norm.group_norm_silu_backward(new(8, 512, n), x, w, w, statistic, statistic)
    else:
        group_norm.group_norm_silu(x, w, w, 32, 1e-5)


def _lamb(n: int, new: Made, direction: bool, more: bool) -> None:
    p, m, v = (new(ROWS * n, dtype=torch.float32) for _ in range(3))
    if direction:
        lamb.lamb_direction_(p, new(ROWS * n), m, v, new(dtype=torch.float32) if more else None, 0.9, 0.95, 1e-6, 0.1, 3)
    else:
        lamb.lamb_apply_(p, m, new(2, dtype=torch.float32), new(ROWS * n) if more else None, 1e-3)


def _places(new: Made, count: int = ROWS) -> Tensor:
    return new(count, dtype=torch.int64)


def _labels(new: Made) -> Tensor:
    return new(ROWS, dtype=torch.int64)


_FORWARD = {
    f"{'layer' if c else 'rms'}{' add' if a else ''}": (_norm_forward(c, a), _norm_backward(c, a))
    for c in (False, True)
    for a in (False, True)
}
CALLS: dict[str, dict[str, Callable[[int, Made], object]]] = {
    **{f"norm.forward{wide}": {label: pair[0] for label, pair in _FORWARD.items()} for wide in ("", "_wide")},
    **{name: {label: pair[1] for label, pair in _FORWARD.items()} for name in ("norm.backward", "norm.backward_wide")},
    "norm.weights_wide": {label: pair[1] for label, pair in _FORWARD.items() if "add" not in label},
    "gated.forward": {kind: lambda n, new, kind=kind: gated.gated(new(ROWS, n), new(ROWS, n), kind) for kind in gated.KINDS},
    "gated.backward": {
        kind: lambda n, new, kind=kind: gated.gated_backward(new(ROWS, n), new(ROWS, n), new(ROWS, n), kind) for kind in gated.KINDS
    },
    "group_norm_silu.forward": {"": lambda n, new: _group_norm(n, new, False)},
    "group_norm_silu.backward": {"": lambda n, new: _group_norm(n, new, True)},
    "lamb.direction": {label: lambda n, new, more=more: _lamb(n, new, True, more) for label, more in (("", False), ("scaled", True))},
    "lamb.apply": {label: lambda n, new, more=more: _lamb(n, new, False, more) for label, more in (("", False), ("copy", True))},
    "permute": {"": lambda n, new: permute.permute(new(ROWS, n), _places(new, 2 * ROWS), 2)},
    "unpermute": {
        "": lambda n, new: permute.unpermute(new(2 * ROWS, n), _places(new, 2 * ROWS), None, 2),
        "weighted": lambda n, new: permute.unpermute(new(2 * ROWS, n), _places(new, 2 * ROWS), new(ROWS, 2), 2),
    },
    "embedding.sum": {"": lambda n, new: segments.segment_sum(new(ROWS, n), _places(new), 50304)},
    "rope": {
        label: lambda n, new, back=back, r=r: rope.rope(new(4, ROWS, 32, r * n).transpose(1, 2), new(ROWS, 2 * n), new(ROWS, 2 * n), back)
        for label, back, r in (("", False, 2), ("back", True, 2), ("partial", False, 4))
    },
    "adamw": {"": lambda n, new: _adamw(n, new, False), "scaled, with a copy": lambda n, new: _adamw(n, new, True)},
    "dropout_add": {
        label: lambda n, new, add=add, rows=rows: dropout_add.drop(
            new(ROWS, n), new(ROWS, n) if add else None, new(dtype=torch.int64), 0.1, 3, [rows, 2 * n], [0, n], [ROWS, n]
        )
        for label, add, rows in (("", False, ROWS), ("add", True, ROWS), ("far", True, 1 << 24))
    },
    "softmax.forward": {
        "": lambda n, new: softmax.masked_softmax(new(4, 8, 128, n), None, 0.5),
        "added": lambda n, new: softmax.masked_softmax(new(4, 8, 128, n), new(4, 1, 128, n), 0.5),
    },
    "softmax.backward": {"": lambda n, new: softmax.masked_softmax_backward(new(ROWS, n), new(ROWS, n), 0.5)},
    "cross_entropy.forward": {
        "whole": lambda n, new: cross_entropy.forward(new(ROWS, n), _labels(new), -100, 0.0),
        "smoothed": lambda n, new: cross_entropy.forward(new(ROWS, n), _labels(new), -100, 0.1),
        "block": lambda n, new: cross_entropy.stats(new(ROWS, n), _labels(new), n, 4 * n, -100),
    },
    "cross_entropy.backward": {
        "": lambda n, new: cross_entropy.backward(
            new(ROWS, dtype=torch.float32), new(ROWS, n), _labels(new), new(ROWS, dtype=torch.float64), 0, 1.0, 0.0
        )
    },
    "cross_entropy.combine": {"": lambda n, new: cross_entropy.combine(new(8, 3, n, dtype=torch.float32))},
}


def launches(name: str, config: Config, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """(call, launch) of one kernel under one configuration; what a wider row would force is forced by its width."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width = config.block if KERNELS[name].whole else 32768
    for label, call in CALLS[name].items():
        with recording({name: config}) as found:
            call(width, new)
        mine = [x for x in found if x.kernel.name == name and x.config == config]
        assert mine, f"{name} {label} was not launched with {config}"
        yield from ((label, x) for x in mine)


def source(launch: Launch) -> Any:
    """What Triton would compile for this launch: types, constants and what it would know to divide by 16."""
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    given = dict(zip(launch.kernel.fn.arg_names, launch.args, strict=False)) | launch.flags
    for i, name in enumerate(launch.kernel.fn.arg_names):
        value = given[name]
        divides = True
        if isinstance(value, Tensor):
            signature[name] = "*" + NAMES[value.dtype]
        elif name in launch.flags or value is None or (value == 1 and not isinstance(value, float)):
            signature[name], divides = "constexpr", False
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[name], divides = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divides = value % 16 == 0
        if divides:
            hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel.fn, signature=signature, constexprs=constants, attrs=hints)


def compiled(launch: Launch) -> dict[str, Any]:
    """Facts of the machine code of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages, "enable_fp_fusion": True}
    kernel = triton.compile(source(launch), target=GPUTarget(*TARGET), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = (_tool("cuobjdump", flag, file.name) for flag in ("-res-usage", "-sass"))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    accesses = list(_accesses(kernel.asm["llir"], Path(launch.kernel.fn.fn.__code__.co_filename).read_text(encoding="utf-8").splitlines()))
    return {
        "registers": numbers["REG"],
        "spills": max(numbers["LOCAL"] + numbers["STACK"], len(re.findall(r"\b(?:LDL|STL)\b", code))),
        "shared": kernel.metadata.shared,
        "loads": dict(sorted(Counter(bits for what, bits, single in accesses if what == "ld" and not single).items())),
        "stores": dict(sorted(Counter(bits for what, bits, single in accesses if what == "st" and not single).items())),
        "single": sum(single for *_, single in accesses),
        "wgmma": len(re.findall(r"\bHGMMA", code)),
        "dot": "tt.dot" in kernel.asm["ttir"],
    }


def _tool(name: str, *args: str) -> str:
    path = Path(language.triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def _accesses(llir: str, lines: list[str]) -> Iterator[tuple[str, int, bool]]:
    """("ld" or "st", bits, whether it is of a single number) of every access to global memory."""
    line_of = {n: int(line) for n, line in re.findall(r"^!(\d+) = !DILocation\(line: (\d+)", llir, re.M)}
    for text in llir.splitlines():
        if "addrspace(1)" not in text or "!dbg" not in text:
            continue
        if found := re.search(r"(?<![a-z])(ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s", text):
            what, count, bits = found.groups()
        elif found := re.search(r"\b(load|store) (?:<(\d+) x )?(?:bfloat|half|float|double|i)(\d*)", text):
            what, count, bits = found[1].replace("load", "ld").replace("store", "st"), found[2], found[3]
            bits = bits or {"bfloat": 16, "half": 16, "float": 32, "double": 64}[re.findall("bfloat|half|float|double", found[0])[0]]
        else:
            continue
        line = line_of[re.search(r"!dbg !(\d+)", text)[1]]
        yield what, int(count or 1) * int(bits), bool(SINGLE.search(lines[line - 1]))


def verdict(row: dict[str, Any]) -> str:
    """Why a configuration is not fit to be registered, empty when it is."""
    if row["spills"]:
        return f"{row['spills']} spills"
    if row["dot"] and not row["wgmma"]:
        return "a dot without wgmma"
    narrow = {bits: n for found in (row["loads"], row["stores"]) for bits, n in found.items() if int(bits) < 128}
    return f"accesses of {', '.join(map(str, narrow))} bits" if narrow else ""


def rows(names: list[str], dtypes: tuple[torch.dtype, ...], every: bool = True) -> Iterator[dict[str, Any]]:
    """A row per kernel, configuration, dtype and call. every=False: the first configuration of each width, in the first dtype."""
    for name, kernel in sorted(KERNELS.items()):
        if names and not any(n in name for n in names):
            continue
        configs = kernel.configs if every else kernel.configs[:1]
        for config in configs:
            for dtype in dtypes if name != "cross_entropy.combine" else (torch.float32,):
                if config.only not in (0, dtype.itemsize):
                    continue
                for label, launch in launches(name, config, dtype):
                    facts = {
                        "kernel": name,
                        "call": label,
                        "dtype": NAMES[dtype],
                        "config": [config.block, config.rows, config.warps, config.stages],
                    }
                    facts |= compiled(launch)
                    yield {**facts, "why": verdict(facts)}
