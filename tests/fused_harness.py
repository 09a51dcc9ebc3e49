"""The fused ops against float64: for each case the error of ours and of eager PyTorch in the same dtype, forward and every gradient.

    TRITON_INTERPRET=1 python tests/fused_harness.py [--all] [name ...]

runs the Triton kernels in Triton's interpreter on the CPU (a process of its own: the interpreter is chosen when kernels are defined) and
prints one JSON line per quantity. Without it the eager references are measured, with `device="cuda"` the compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from netmind_autopar.kernels.counter import keep_mask  # noqa: E402 - also registers the ops

BAR = 1.5  # of eager's error
HALF, FLOATS = (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """`ours` and `eager` take the tensors (those of `leaves` require a gradient) and give tensors; truth is eager on float64."""

    name: str
    make: Callable[[], dict[str, Tensor]]
    ours: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    layout: str = "dense"
    quick: bool = False
    kernels: frozenset[str] = field(default_factory=frozenset)  # those that must have run


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale


def ramp(n: int) -> Tensor:
    """Rising along a row, so that its blocks differ in mean and in maximum."""
    return torch.linspace(-1.5, 1.5, n, dtype=torch.float64)


def spread(x: Tensor) -> Tensor:
    """Rows of very different size and mean."""
    rows = x.shape[:-1]
    return x * torch.logspace(-1, 1.5, max(1, rows.numel()), dtype=x.dtype).reshape(*rows, 1) + 0.5


def lay(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory: `gaps` between rows, dims `turned` (the first two), or `apart`: elements of a row not adjacent."""
    if layout == "gaps" and x.dim() > 1:
        out = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        out[..., : x.shape[-1]] = x
        return out[..., : x.shape[-1]]
    if layout == "turned" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "apart" and x.dim() > 1:
        return x.mT.contiguous().mT
    return x


# ---- the ops ------------------------------------------------------------------------------------------------------------------

ops = torch.ops.autopar


def norm_case(rows: tuple[int, ...], n: int, center: bool, add: bool, weight: bool, bias: bool, offset: float = 0.0, **more: Any) -> Case:
    def make() -> dict[str, Tensor]:
        out = {"x": spread(normal(*rows, n) + ramp(n))}
        if add:
            out["residual"] = normal(*rows, n)
        if weight:
            out["weight"] = normal(n, scale=0.5) + 1 - offset
        if bias:
            out["bias"] = normal(n)
        return out

    def ours(x: Tensor, residual: Any = None, weight: Any = None, bias: Any = None) -> tuple[Tensor, ...]:
        if add:
            found = ops.add_layer_norm(x, residual, weight, bias, 1e-5) if center else ops.add_rms_norm(x, residual, weight, 1e-5, offset)
            return tuple(found[:2])
        found = ops.layer_norm(x, weight, bias, 1e-5) if center else ops.rms_norm(x, weight, 1e-5, offset)
        return tuple(found[:1])

    def eager(x: Tensor, residual: Any = None, weight: Any = None, bias: Any = None) -> tuple[Tensor, ...]:
        total = x + residual if add else x
        if offset and weight is not None:
            weight = weight + offset
        y = F.layer_norm(total, [n], weight, bias, 1e-5) if center else F.rms_norm(total, [n], weight, 1e-5)
        return (y, total) if add else (y,)

    words = ["layer_norm" if center else "rms_norm", "x".join(map(str, (*rows, n)))]
    words += [
        w for w, on in (("add", add), ("weight", weight), ("bias", bias), ("offset", offset), (more.get("layout"), "layout" in more)) if on
    ]
    leaves = tuple(x for x, on in (("x", True), ("residual", add), ("weight", weight), ("bias", bias)) if on)
    return Case(" ".join(map(str, words)), make, ours, eager, leaves, **more)


def group_norm_case(shape: tuple[int, ...], groups: int, weight: bool = True, bias: bool = True, **more: Any) -> Case:
    def make() -> dict[str, Tensor]:
        x = normal(*shape) * torch.logspace(-1, 1, shape[1], dtype=torch.float64).view(1, -1, *(1 for _ in shape[2:])) + 0.5
        out = {"x": x}
        out |= {"weight": normal(shape[1], scale=0.5) + 1} if weight else {}
        return out | ({"bias": normal(shape[1])} if bias else {})

    def ours(x: Tensor, weight: Any = None, bias: Any = None) -> tuple[Tensor, ...]:
        return (ops.group_norm_silu(x, weight, bias, groups, 1e-5)[0],)

    def eager(x: Tensor, weight: Any = None, bias: Any = None) -> tuple[Tensor, ...]:
        return (F.silu(F.group_norm(x, groups, weight, bias, 1e-5)),)

    name = (
        f"group_norm_silu {'x'.join(map(str, shape))} {groups} groups{' weight' * weight}{' bias' * bias} {more.get('layout', '')}".strip()
    )
    return Case(name, make, ours, eager, ("x", *["weight"] * weight, *["bias"] * bias), **more)


def gated_case(shape: tuple[int, ...], kind: str, packed: bool = False, **more: Any) -> Case:
    def make() -> dict[str, Tensor]:
        if packed:
            return {"both": spread(normal(*shape[:-1], 2 * shape[-1]))}
        return {"gate": spread(normal(*shape)), "up": normal(*shape)}

    def act(x: Tensor) -> Tensor:
        return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def ours(**x: Tensor) -> tuple[Tensor, ...]:
        gate, up = x["both"].chunk(2, -1) if packed else (x["gate"], x["up"])
        return (ops.gated(gate, up, kind),)

    def eager(**x: Tensor) -> tuple[Tensor, ...]:
        gate, up = x["both"].chunk(2, -1) if packed else (x["gate"], x["up"])
        return (act(gate) * up,)

    name = " ".join(
        ["gated", kind, "x".join(map(str, shape)), *(["packed"] if packed else []), *([more["layout"]] if "layout" in more else [])]
    )
    return Case(name, make, ours, eager, ("both",) if packed else ("gate", "up"), **more)


def rope_case(b: int, h: int, s: int, d: int, r: int, batches: int, **more: Any) -> Case:
    def make() -> dict[str, Tensor]:
        angles = torch.arange(s, dtype=torch.float64)[:, None] * torch.logspace(0, -3, r // 2, dtype=torch.float64)
        angles = torch.cat([angles, angles], -1)
        if batches:
            angles = torch.stack([angles + i for i in range(batches)])
        return {"x": normal(b, h, s, d), "cos": angles.cos(), "sin": angles.sin()}

    def ours(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return (ops.rope(x, cos, sin, False),)

    def eager(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turn, rest = x[..., :r], x[..., r:]
        half = torch.cat([-turn[..., r // 2 :], turn[..., : r // 2]], -1)
        return (torch.cat([turn * cos.unsqueeze(-3) + half * sin.unsqueeze(-3), rest], -1),)

    layout = f" {more['layout']}" if "layout" in more else ""
    return Case(f"rope {b}x{h}x{s}x{d} of {r}, {batches or 'no'} batches{layout}", make, ours, eager, ("x",), **more)


def entropy_case(n: int, c: int, smoothing: float, blocks: int = 1, **more: Any) -> Case:
    """blocks: the classes in so many blocks, as devices have them; the gradient then comes from each block's own backward."""
    target = torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(1))
    target[0] = -100

    def eager(x: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(x, target.to(x.device), reduction="none", label_smoothing=smoothing),)

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        labels = target.to(x.device)
        return (SplitLoss.apply(x, labels, blocks) if blocks > 1 else ops.cross_entropy(x, labels, -100, smoothing)[0].to(x.dtype),)

    name = f"cross_entropy {n}x{c} smoothing {smoothing}, {blocks} blocks{' ' + more['layout'] if 'layout' in more else ''}"

    def make() -> dict[str, Tensor]:
        x = normal(n, c, scale=3.0) + 4 * ramp(c)
        x[1 % n, -1] += 15  # the maximum comes last
        return {"x": x}

    return Case(name, make, ours, eager, ("x",), **more)


def adamw_case(n: int, step: int, more: bool, **rest: Any) -> Case:
    """One step of torch.optim.AdamW on a state that has seen some; parameters and state in the dtype."""
    numbers = (1e-2, 0.9, 0.95, 1e-8, 0.1, step)

    def make() -> dict[str, Tensor]:
        return {"p": normal(n), "grad": normal(n), "m": normal(n, scale=0.1), "v": normal(n).square() * 0.1, "scale": torch.tensor(0.5)}

    def ours(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        p, m, v, copy = p.clone(), m.clone(), v.clone(), torch.empty_like(p)
        ops.adamw_(p, grad, m, v, copy if more else None, scale if more else None, *numbers)
        assert not more or torch.equal(copy, p)
        return p, m, v

    def eager(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        parameter = torch.nn.Parameter(p.clone())
        optimizer = torch.optim.AdamW([parameter], numbers[0], numbers[1:3], numbers[3], numbers[4], foreach=False)
        parameter.grad = grad * scale if more else grad.clone()
        state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        optimizer.state[parameter] = state
        optimizer.step()
        return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]

    return Case(f"adamw {n} step {step}{' scaled' if more else ''}", make, ours, eager, (), **rest)


def lamb_case(n: int, step: int, more: bool, **rest: Any) -> Case:
    """One step of `optim.LAMB`'s formulas; a parameter of zeros where n is 1, whose ratio is 1."""

    def make() -> dict[str, Tensor]:
        p = normal(n) if n > 1 else torch.zeros(n, dtype=torch.float64)
        return {"p": p, "grad": normal(n), "m": normal(n, scale=0.1), "v": normal(n).square() * 0.1, "scale": torch.tensor(0.5)}

    def ours(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        p, m, v, copy = p.clone(), m.clone(), v.clone(), torch.empty_like(p)
        u, sums = ops.lamb_direction_(p, grad, m, v, scale if more else None, 0.9, 0.95, 1e-6, 0.1, step)
        ops.lamb_apply_(p, u, sums, copy if more else None, 1e-2)
        assert not more or torch.equal(copy, p)
        return p, m, v

    def eager(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        g = grad * scale if more else grad
        m, v = m * 0.9 + g * (1 - 0.9), v * 0.95 + g * g * (1 - 0.95)
        u = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6) + p * 0.1
        ratio = p.norm() / u.norm() if bool(p.norm() > 0) else 1.0
        return p - u * (ratio * 1e-2), m, v

    return Case(f"lamb {n} step {step}{' scaled' if more else ''}", make, ours, eager, (), **rest)


def permute_case(rows: int, n: int, times: int, weighted: bool, **more: Any) -> Case:
    """To the experts and back, and a square between, so that both gradients count."""
    order = torch.randperm(rows * times, generator=torch.Generator().manual_seed(3))

    def make() -> dict[str, Tensor]:
        return {"x": normal(rows, n), **({"weight": normal(rows, times)} if weighted else {})}

    def ours(x: Tensor, weight: Any = None) -> tuple[Tensor, ...]:
        there = order.to(x.device)
        return (ops.unpermute_rows(ops.permute_rows(x, there, times) * 2, torch.argsort(there), weight, times),)

    def eager(x: Tensor, weight: Any = None) -> tuple[Tensor, ...]:
        there = order.to(x.device)
        back = (x[there // times] * 2)[torch.argsort(there)].view(rows, times, n)
        return ((back if weight is None else back * weight.unsqueeze(-1)).sum(1),)

    name = f"permute {rows}x{n} times {times}{' weighted' * weighted}{' ' + more['layout'] if 'layout' in more else ''}"
    return Case(name, make, ours, eager, ("x", *["weight"] * weighted), **more)


def embedding_case(rows: int, n: int, many: int, padding: int = -1, **more: Any) -> Case:
    """Few of the table's rows, one of them often."""
    index = torch.randint(0, rows, (many,), generator=torch.Generator().manual_seed(4))
    index[: many // 2] = rows // 2

    def ours(table: Tensor) -> tuple[Tensor, ...]:
        return (ops.embedding(table, index.to(table.device), 0, padding),)

    def eager(table: Tensor) -> tuple[Tensor, ...]:
        return (F.embedding(index.to(table.device), table, padding if padding >= 0 else None),)

    return Case(f"embedding {rows}x{n} of {many}", lambda: {"table": normal(rows, n)}, ours, eager, ("table",), **more)


def linear_loss_case(rows: int, d: int, classes: int, chunk: int, smoothing: float = 0.0, **more: Any) -> Case:
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(5))
    target[0] = -100

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(x, weight, target.to(x.device), -100, smoothing, chunk)[0].to(x.dtype),)

    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(x @ weight.T, target.to(x.device), reduction="none", label_smoothing=smoothing),)

    def make() -> dict[str, Tensor]:
        return {"x": normal(rows, d), "weight": normal(classes, d, scale=0.3)}

    name = f"linear_cross_entropy {rows}x{d}x{classes} by {chunk}, smoothing {smoothing}"
    return Case(name, make, ours, eager, ("x", "weight"), **more)


def softmax_case(shape: tuple[int, ...], mask: tuple[int, ...] | None, truth: bool = False, **more: Any) -> Case:
    def make() -> dict[str, Tensor]:
        out = {"x": normal(*shape, scale=4.0)}
        if mask is not None:
            hidden = torch.rand(mask) < 0.3
            hidden[..., 0] = False
            out["mask"] = torch.where(hidden, -1e4, torch.randn(mask, dtype=torch.float64))
        return out

    def ours(x: Tensor, mask: Any = None) -> tuple[Tensor, ...]:
        return (ops.masked_softmax(x, mask > -1e3 if truth else mask, 0.3),)

    def eager(x: Tensor, mask: Any = None) -> tuple[Tensor, ...]:
        v = x * 0.3
        if mask is not None:
            v = v.masked_fill(mask <= -1e3, -float("inf")) if truth else v + mask
        return (torch.softmax(v, -1),)

    words = ["softmax", "x".join(map(str, shape)), "no mask" if mask is None else "mask " + "x".join(map(str, mask))]
    return Case(
        " ".join([*words, *(["of truth values"] if truth else []), *([more["layout"]] if "layout" in more else [])]),
        make,
        ours,
        eager,
        ("x",),
        **more,
    )


def dropout_case(rows: int, n: int, p: float, **more: Any) -> Case:
    """A block of columns of a tensor twice as wide."""
    block = ([rows, 2 * n], [0, n], [rows, n])

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        keep = keep_mask(torch.tensor(3, device=x.device), 5, p, *block)
        return (x * keep * (1 / (1 - p)) + residual,)

    def ours(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (ops.dropout_add(x, residual, torch.tensor(3, device=x.device), p, 5, *block),)

    name = f"dropout_add {rows}x{n} p {p}{' ' + more['layout'] if 'layout' in more else ''}"
    return Case(name, lambda: {"x": normal(rows, n), "residual": normal(rows, n)}, ours, eager, ("x", "residual"), **more)


BLOCKS = (
    ([4, 6], [0, 0], [4, 6]), ([4, 6], [1, 2], [2, 3]), ([2, 3, 50], [1, 0, 7], [1, 3, 40]), ([2, 3, 5, 7], [0, 1, 0, 2], [2, 2, 5, 4]),
    ([3, 70000, 40000], [1, 3, 5], [2, 2, 33]), ([3, 70000, 40000], [0, 53687, 0], [1, 2, 40000]), ([1], [0], [1]), ([], [], []),
    ([5, 9], [0, 4], [5, 1]), ([1 << 40], [(1 << 33) - 5], [10]), ([2, 3, 5, 7], [0, 1, 1, 2], [2, 2, 3, 4]),
)  # fmt: skip


def masks(device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Whether `autopar::dropout` and `dropout_add` keep, bit for bit, what the reference keeps."""
    for parts, starts, lengths in BLOCKS:
        for seed, salt, p in ((7, 0, 0.4), (-3, 12, 0.9), (1 << 40, 3, 0.01)):
            s, x = torch.tensor(seed, device=device), torch.ones(lengths, device=device)
            keep = keep_mask(s, salt, p, parts, starts, lengths).view(x.shape)
            block = (s, p, salt, parts, starts, lengths)
            found = [ops.dropout(x, *block), ops.dropout_add(x, -torch.ones_like(x), *block) + 1]
            equal = all(torch.equal(y != 0, keep) for y in found)
            yield {"case": f"mask {parts} {starts} {lengths} {seed} {salt} {p}", "equal": equal}


class SplitLoss(torch.autograd.Function):
    """The loss over a vocabulary in uneven blocks: what devices compute, without the devices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, blocks: int) -> Tensor:
        parts, start, stats = x.tensor_split(blocks, 1), 0, []
        ctx.starts = []
        for part in parts:
            stats.append(ops.vocab_stats(part, target, start, x.shape[1], -100))
            ctx.starts.append(start)
            start += part.shape[1]
        lse, picked = ops.vocab_combine(torch.cat(stats))
        ctx.save_for_backward(target, lse, *parts)
        return (lse - picked).masked_fill(target == -100, 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, lse, *parts = ctx.saved_tensors
        grad = grad.to(lse.dtype).masked_fill(target == -100, 0)
        found = [ops.cross_entropy_backward(grad, p, target, lse, s, 1.0, 0.0) for p, s in zip(parts, ctx.starts, strict=True)]
        return torch.cat(found, 1), None, None


def cases() -> Iterator[Case]:
    wide, wide_back = {"norm.forward_wide"}, {"norm.backward_wide", "norm.weights_wide"}
    quick = {"quick": True, "dtypes": (torch.bfloat16, torch.float32)}
    yield norm_case((3, 7), 65, False, False, True, False, **quick, kernels=frozenset({"norm.forward", "norm.backward"}))
    yield norm_case((5,), 257, True, True, True, True, **quick)
    yield norm_case((3, 5), 130, False, True, True, False, 1.0, layout="turned", quick=True)
    yield norm_case((2,), 20011, True, False, True, True, dtypes=(torch.bfloat16,), quick=True, kernels=frozenset(wide | wide_back))
    for n in (1, 8, 100, 768, 1023, 2048):
        rows = (64,) if n < 100 else (13,)
        dtypes = HALF if n == 1 else FLOATS  # one element a row: in float32 nothing is left but rounding
        yield norm_case(rows, n, False, False, True, False, dtypes=dtypes)
        yield norm_case(rows, n, True, False, True, True, dtypes=dtypes)
    for weight, bias in ((False, False), (True, False), (False, True)):
        for add in (False, True):
            yield norm_case((11,), 96, True, add, weight, bias)
            if not bias:
                yield norm_case((11,), 96, False, add, weight, bias)
    for layout in ("gaps", "apart", "turned"):
        yield norm_case((4, 3), 72, False, True, True, False, layout=layout)
        yield norm_case((4, 3), 72, True, True, True, True, layout=layout)
    for n in (9000, 16384, 20011):
        yield norm_case((3,), n, False, True, True, False, 1.0, kernels=frozenset(wide_back))
        yield norm_case((3,), n, True, True, True, True)
    yield norm_case((200,), 40, True, False, True, True)
    yield group_norm_case((2, 6, 5, 7), 3, **quick, kernels=frozenset({"group_norm_silu.forward", "group_norm_silu.backward"}))
    yield group_norm_case((1, 20, 3, 11), 2, layout="turned", quick=True)
    for weight, bias in ((False, False), (True, False), (False, True)):
        yield group_norm_case((3, 24, 65), 4, weight, bias)
    for layout in ("dense", "gaps", "apart"):
        yield group_norm_case((2, 8, 40, 40), 2, layout=layout)
    yield group_norm_case((1, 3, 17, 257), 1)
    yield group_norm_case((5, 12), 4)
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield gated_case((3, 5, 97), kind, **quick, kernels=frozenset({"gated.forward", "gated.backward"}))
        yield gated_case((4, 2048), kind)
        yield gated_case((5, 64), kind, packed=True, quick=kind == "silu")
        for layout in ("gaps", "apart"):
            yield gated_case((6, 33), kind, layout=layout)
    yield rope_case(2, 3, 5, 16, 16, 0, **quick, kernels=frozenset({"rope"}))
    yield rope_case(2, 6, 4, 20, 8, 2, layout="turned", quick=True)
    for b, h, s, d, r, batches in ((1, 33, 4, 128, 128, 1), (2, 4, 3, 80, 32, 2), (2, 2, 3, 10, 6, 1), (1, 2, 4, 256, 256, 0)):
        for layout in ("dense", "turned", "apart"):
            yield rope_case(b, h, s, d, r, batches, layout=layout)
    yield entropy_case(14, 4099, 0.0, **quick, kernels=frozenset({"cross_entropy.forward", "cross_entropy.backward"}))
    yield entropy_case(11, 1000, 0.1, quick=True)
    yield entropy_case(25, 1001, 0.0, 3, **quick, kernels=frozenset({"cross_entropy.combine"}))
    yield softmax_case((2, 3, 5, 33), (2, 1, 5, 33), **quick, kernels=frozenset({"softmax.forward", "softmax.backward"}))
    yield softmax_case((2, 3, 5, 70), (5, 70), True, quick=True)
    for layout in ("dense", "gaps", "apart", "turned"):
        yield softmax_case((3, 2, 4, 20), (3, 2, 1, 20), layout=layout)
        yield softmax_case((3, 4, 300), (3, 4, 1), layout=layout)
    for n in (1, 64, 1025, 5000, 16384):
        yield softmax_case((6, n), None)
        yield softmax_case((2, 3, 1, n), (1, 1, 1, n), n > 1)
    yield adamw_case(1500, 3, True, **quick, kernels=frozenset({"adamw"}))
    yield adamw_case(1024, 1, False)
    yield adamw_case(1, 1000, True)
    yield lamb_case(1500, 3, True, **quick, kernels=frozenset({"lamb.direction", "lamb.apply"}))
    yield lamb_case(5000, 1, False)
    yield lamb_case(1, 1000, True)
    yield permute_case(6, 33, 2, True, **quick, kernels=frozenset({"permute", "unpermute"}))
    yield permute_case(5, 1100, 3, False, layout="gaps")
    yield permute_case(9, 64, 1, True, layout="apart")
    yield embedding_case(11, 33, 24, **quick, kernels=frozenset({"embedding.sum"}))
    yield embedding_case(40, 600, 30, 20)
    yield linear_loss_case(13, 24, 301, 4, **quick, kernels=frozenset({"cross_entropy.forward", "cross_entropy.backward"}))
    yield linear_loss_case(9, 40, 77, 100, 0.1)
    yield dropout_case(7, 33, 0.3, **quick, kernels=frozenset({"dropout_add"}))
    for layout in ("dense", "gaps", "apart"):
        yield dropout_case(9, 1200, 0.1, layout=layout)
    for n, c in ((1, 1), (37, 7), (13, 9000), (9, 16384)):
        for layout in ("dense", "gaps", "apart"):
            yield entropy_case(n, c, 0.0, layout=layout)
        yield entropy_case(n, c, 0.2)
        if c > 4:
            yield entropy_case(n, c, 0.0, 4)


# ---- measuring ----------------------------------------------------------------------------------------------------------------


def measure(case: Case, dtype: torch.dtype, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """One row per output and gradient: errors by root mean square, relative to the truth's, and the largest, relative to its largest."""
    torch.manual_seed(0)
    given = {name: x.to(dtype) for name, x in case.make().items()}
    truth, grads = _run(case.eager, {k: v.double() for k, v in given.items()}, case, None)
    here = {k: lay(v.to(device), case.layout) for k, v in given.items()}
    ours, _ = _run(case.ours, here, case, grads)
    eager, _ = _run(case.eager, here, case, grads)
    for quantity in truth:
        yield {
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "quantity": quantity,
            **{
                f"{who}_{how}": error(found[quantity], truth[quantity])[how]
                for who, found in (("ours", ours), ("eager", eager))
                for how in HOW
            },
            "ulp": torch.finfo(dtype).eps,
        }


HOW = ("rms", "max")


def _run(fn: Any, given: dict[str, Tensor], case: Case, grads: list[Tensor] | None) -> tuple[dict[str, Tensor], list[Tensor]]:
    given = {k: v.detach().requires_grad_(k in case.leaves) for k, v in given.items()}
    outs = fn(**given)
    if grads is None:
        grads = [torch.randn_like(o) for o in outs]
    dtype = next(iter(given.values())).dtype
    # the gradients that arrive are those of the dtype for all, so that only what is computed differs
    arriving = [g.to(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(o) for g, o in zip(grads, outs, strict=True)]
    found = torch.autograd.grad(outs, [given[k] for k in case.leaves], arriving) if case.leaves else ()
    named = {f"out{i}": o for i, o in enumerate(outs)} | {f"d{k}": g for k, g in zip(case.leaves, found, strict=True)}
    return {k: v.detach() for k, v in named.items()}, grads


def error(got: Tensor, truth: Tensor) -> dict[str, float]:
    assert got.shape == truth.shape, (got.shape, truth.shape)
    wrong = (got.double().cpu() - truth).abs()
    rms = wrong.square().mean().sqrt() / (truth.square().mean().sqrt() + 1e-300)
    return {"rms": float(rms), "max": float(wrong.max() / (truth.abs().max() + 1e-300))}


def verdict(row: dict[str, Any]) -> str:
    """Why a row misses the bar, empty when it does not. An rms below the unit roundoff (half an ulp), or three
    steps at the largest element, is no error."""
    if not row["ours_rms"] <= max(BAR * row["eager_rms"], row["ulp"] / 2):
        return f"{row['case']} {row['dtype']} {row['quantity']}: rms {row['ours_rms']:.2e}, eager {row['eager_rms']:.2e}"
    if not row["ours_max"] <= max(BAR * row["eager_max"], 3 * row["ulp"]):
        return f"{row['case']} {row['dtype']} {row['quantity']}: max {row['ours_max']:.2e}, eager {row['eager_max']:.2e}"
    return ""


def round_as_devices_do() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, a device rounds to the nearest (cvt.rn): give it the device's rounding."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return cut(data, source, target, mode)
        bits = torch.from_numpy(data.copy().reshape(-1)).view(torch.float32).to(torch.bfloat16).view(torch.int16)
        return bits.numpy().view("uint16").reshape(data.shape)

    interpreter._convert_float = convert


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", action="store_true", help="compare dropout's masks instead")
    parser.add_argument("--all", action="store_true", help="every case in every dtype, not the quick ones")
    parser.add_argument("names", nargs="*", help="only cases whose name contains one of these")
    args = parser.parse_args()
    from netmind_autopar.kernels.fused import language, launch

    torch.set_num_threads(1)
    if language.INTERPRETED:
        round_as_devices_do()
    if args.masks:
        for row in masks():
            print(json.dumps({**row, "launches": launch.counts().get("dropout_add", 0)}), flush=True)
        return 0
    bad = 0
    for case in cases():
        if not (args.all or case.quick) or (args.names and not any(n in case.name for n in args.names)):
            continue
        for dtype in case.dtypes:
            before = dict(launch.counts())
            rows = list(measure(case, dtype))
            ran = sorted(k for k, v in launch.counts().items() if v > before.get(k, 0))
            for row in rows:
                why = verdict(row)
                bad += bool(why)
                print(json.dumps({**row, "kernels": ran, "missing": sorted(case.kernels - set(ran)), "why": why}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
