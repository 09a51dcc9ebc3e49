"""The fused ops: errors against float64, gradients, blocks of a vocabulary, bad input, launch configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_harness import BAR, BLOCKS, cases, masks, measure, verdict
from torch import Tensor

from netmind_autopar.ir.errors import InputError
from netmind_autopar.kernels.fused import launch, norm_launch
from netmind_autopar.kernels.fused.launch import KERNELS, Config, choose, recording, usable

HARNESS = Path(__file__).parent / "fused_harness.py"
ops = torch.ops.autopar
QUICK = [(case, dtype) for case in cases() if case.quick for dtype in case.dtypes]


def interpreted(*args: str, timeout_s: float = 600) -> list[dict[str, Any]]:
    """Rows of the harness in a process in which kernels are interpreted."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(HARNESS), *args], env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.stdout, done.stderr
    assert "Error" not in done.stderr, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def judge(rows: list[dict[str, Any]]) -> None:
    assert [row["why"] for row in rows if row["why"]] == []
    assert [row["case"] for row in rows if not row["kernels"]] == [], "the reference ran in place of a kernel"
    assert [(row["case"], row["missing"]) for row in rows if row["missing"]] == []


# ---- errors against float64 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), QUICK, ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")))
def test_references_are_as_exact_as_eager(case: Any, dtype: torch.dtype) -> None:
    assert [why for row in measure(case, dtype) if (why := verdict(row))] == []


def test_interpreted_kernels_are_as_exact_as_eager() -> None:
    judge(interpreted())


@pytest.mark.slow
def test_every_interpreted_kernel_is_as_exact_as_eager() -> None:
    rows = interpreted("--all", timeout_s=1800)
    judge(rows)
    assert {k for row in rows for k in row["kernels"]} == set(KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(cases()), ids=lambda c: c.name)
def test_kernels_on_a_device_are_as_exact_as_eager(case: Any) -> None:
    for dtype in case.dtypes:
        before = sum(launch.counts().values())
        assert [why for row in measure(case, dtype, "cuda") if (why := verdict(row))] == []
        assert sum(launch.counts().values()) > before


def test_masks_of_the_interpreted_kernel_are_those_of_the_reference() -> None:
    rows = interpreted("--masks")
    assert [row["case"] for row in rows if not row["equal"]] == []
    assert len(rows) == 3 * len(BLOCKS) and rows[-1]["launches"] == 2 * 3 * (len(BLOCKS) - 1), (
        "the last block has four loops: the reference"
    )


@pytest.mark.gpu
def test_masks_on_a_device_are_those_of_a_cpu() -> None:
    here = {row["case"]: row["equal"] for row in masks("cuda")}
    assert all(here.values())
    block = (0.5, 3, [64, 4096], [0, 0], [64, 4096])
    on = [ops.dropout(torch.ones(64, 4096, device=d), torch.tensor(9, device=d), *block).cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*on)


def test_a_wrong_number_is_seen() -> None:
    """One part in a hundred in one of many elements, and a systematic error of two roundings."""
    case = next(c for c in cases() if c.name.startswith("gated silu"))

    def once(**x: Tensor) -> tuple[Tensor, ...]:
        y = case.ours(**x)[0].clone()
        y.view(-1)[int(y.abs().argmax())] *= 1.01
        return (y,)

    def twice(**x: Tensor) -> tuple[Tensor, ...]:
        return (case.ours(**x)[0] * (1 + 2 * torch.finfo(x["up"].dtype).eps),)

    for fn in (once, twice):
        wrong = type(case)(**{**case.__dict__, "ours": fn})
        assert any(verdict(row) for row in measure(wrong, torch.float32)), fn.__name__
    row = {
        "ours_rms": float("nan"),
        "eager_rms": 1.0,
        "ours_max": 0.0,
        "eager_max": 1.0,
        "ulp": 1e-3,
        "case": "",
        "dtype": "",
        "quantity": "",
    }
    assert verdict(row) and BAR == 1.5


@pytest.mark.gpu
def test_weight_gradients_are_the_same_every_time() -> None:
    x, grad = (torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    _, mean, rstd = ops.layer_norm(x, weight, weight, 1e-5)
    found = [ops.layer_norm_backward(grad, None, x, weight, weight, mean, rstd) for _ in range(3)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    x = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(32_768, device="cuda", dtype=torch.bfloat16)
    y, rstd = ops.rms_norm(x, weight, 1e-5, 0.0)
    torch.testing.assert_close(y[-3:], F.rms_norm(x[-3:], [32_768], weight, 1e-5))
    dx, _ = ops.rms_norm_backward(y, None, x, weight, rstd, 0.0)
    torch.testing.assert_close(dx[-3:], ops.rms_norm_backward(y[-3:], None, x[-3:], weight, rstd[-3:], 0.0)[0])
    del dx, rstd
    gated = ops.gated(x, y, "silu")
    torch.testing.assert_close(gated[-3:], F.silu(x[-3:].float()).mul(y[-3:].float()).bfloat16())


# ---- the ops as torch sees them -----------------------------------------------------------------------------------------------


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    x, r, w, b = rand(3, 4, 6), rand(3, 4, 6), rand(6), rand(6)
    target = torch.tensor([1, 5, -100, 0])
    cos, sin = rand(4, 4), rand(4, 4)
    return {
        "rms_norm": (ops.rms_norm, (x, w, 1e-5, 1.0)),
        "rms_norm without weight": (ops.rms_norm, (x, None, 1e-5, 0.0)),
        "layer_norm": (ops.layer_norm, (x, w, b, 1e-5)),
        "layer_norm without bias": (ops.layer_norm, (x, w, None, 1e-5)),
        "layer_norm without both": (ops.layer_norm, (x, None, None, 1e-5)),
        "add_rms_norm": (ops.add_rms_norm, (x, r, w, 1e-5, 0.0)),
        "add_layer_norm": (ops.add_layer_norm, (x, r, w, b, 1e-5)),
        **{f"gated {kind}": (ops.gated, (x, r, kind)) for kind in ("silu", "gelu", "gelu_tanh")},
        "rope": (ops.rope, (rand(2, 3, 4, 6), cos, sin, False)),
        "rope back": (ops.rope, (rand(2, 3, 4, 4).transpose(1, 2).contiguous().transpose(1, 2), cos, sin, True)),
        "cross_entropy": (ops.cross_entropy, (rand(4, 6), target, -100, 0.0)),
        "masked_softmax": (ops.masked_softmax, (x, rand(4, 1), 0.5)),
        "masked_softmax of truth values": (ops.masked_softmax, (x, torch.arange(6) != 3, 0.5)),
        "dropout_add": (ops.dropout_add, (x, r, torch.tensor(3), 0.5, 2, [3, 8, 6], [0, 4, 0], [3, 4, 6])),
        "group_norm_silu": (ops.group_norm_silu, (x, rand(4), rand(4), 2, 1e-5)),
        "group_norm_silu without both": (ops.group_norm_silu, (x, None, None, 4, 1e-5)),
        "permute": (ops.permute_rows, (rand(3, 5), torch.tensor([4, 0, 3, 1, 5, 2]), 2)),
        "unpermute": (ops.unpermute_rows, (rand(6, 5), torch.tensor([4, 0, 3, 1, 5, 2]), None, 2)),
        "unpermute weighted": (ops.unpermute_rows, (rand(6, 5), torch.tensor([4, 0, 3, 1, 5, 2]), rand(3, 2), 2)),
        "linear_cross_entropy": (ops.linear_cross_entropy, (rand(4, 3), rand(6, 3), target, -100, 0.1, 3)),
        "cross_entropy smoothed": (ops.cross_entropy, (rand(4, 6), target, -100, 0.3)),
    }


@pytest.mark.parametrize("name", calls())
def test_torch_accepts_the_op_and_its_derivative_is_right(name: str) -> None:
    op, args = calls()[name]
    leaves = [
        i
        for i, a in enumerate(args)
        if isinstance(a, Tensor) and a.is_floating_point() and not (i and ("rope" in name or "softmax" in name))
    ]
    args = tuple(a.requires_grad_() if i in leaves else a for i, a in enumerate(args))
    torch.library.opcheck(op.default, args)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        found = op(*(next(rest) if i in leaves else a for i, a in enumerate(args)))
        return tuple(t for t in (found if isinstance(found, tuple) else (found,)) if t.requires_grad)

    assert torch.autograd.gradcheck(run, tuple(args[i] for i in leaves))


def test_backward_ops_and_pieces_of_the_loss_pass_opcheck() -> None:
    x, g, w = rand(3, 4, 6), rand(3, 4, 6), rand(6)
    _, mean, rstd = ops.layer_norm(x, w, None, 1e-5)
    torch.library.opcheck(ops.rms_norm_backward.default, (g, g, x, w, rstd, 0.0))
    torch.library.opcheck(ops.layer_norm_backward.default, (g, None, x, w, w, mean, rstd))
    torch.library.opcheck(ops.gated_backward.default, (g, x, g, "gelu"))
    stats = ops.vocab_stats(rand(4, 6), torch.tensor([1, 9, -100, 0]), 6, 12, -100)
    torch.library.opcheck(ops.vocab_stats.default, (rand(4, 6), torch.tensor([1, 9, -100, 0]), 6, 12, -100))
    torch.library.opcheck(ops.vocab_combine.default, (stats,))


def test_a_step_of_adamw_writes_what_it_says() -> None:
    p, grad, m, v = rand(5), rand(5), rand(5), rand(5).square()
    torch.library.opcheck(ops.adamw_.default, (p, grad, m, v, rand(5), torch.tensor(0.5), 1e-2, 0.9, 0.95, 1e-8, 0.1, 2))
    whole = [t.clone() for t in (p, m, v)]
    ops.adamw_(whole[0], grad, *whole[1:], None, None, 1e-2, 0.9, 0.95, 1e-8, 0.1, 2)
    for cut in (slice(0, 2), slice(2, 5)):  # a shard is stepped as the whole is
        parts = [t[cut].clone() for t in (p, m, v)]
        ops.adamw_(parts[0], grad[cut], *parts[1:], None, None, 1e-2, 0.9, 0.95, 1e-8, 0.1, 2)
        assert all(torch.equal(a, b[cut]) for a, b in zip(parts, whole, strict=True))


def test_only_the_sum_may_be_used() -> None:
    """The gradient of a norm that nothing uses is that of its residual sum alone."""
    x, r, w = (t.requires_grad_() for t in (rand(2, 5), rand(2, 5), rand(5)))
    _, total, _ = ops.add_rms_norm(x, r, w, 1e-5, 0.0)
    dx, dr, dw = torch.autograd.grad(total.sum(), (x, r, w), allow_unused=True)
    assert torch.equal(dx, torch.ones_like(x)) and torch.equal(dr, dx) and dw is None


def test_rope_keeps_the_order_of_dims_and_turns_back() -> None:
    x = rand(2, 5, 3, 8).transpose(1, 2)
    cos, sin = rand(5, 8).cos(), rand(5, 8).sin()
    y = ops.rope(x, cos, sin, False)
    assert y.stride() == x.stride()
    half = torch.arange(5.0, dtype=torch.float64)[:, None] * rand(4)
    angles = torch.cat([half, half], -1)
    again = ops.rope(ops.rope(x, angles.cos(), angles.sin(), False), angles.cos(), angles.sin(), True)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(ops.rope(x, angles.cos(), angles.sin(), True), ops.rope(x, angles.cos(), -angles.sin(), False))


# ---- loss over blocks of the vocabulary ---------------------------------------------------------------------------------------


def test_blocks_of_the_vocabulary_combine() -> None:
    x, target = rand(7, 11) * 30, torch.tensor([0, 3, 4, 10, -100, 7, 8])
    whole, lse = ops.cross_entropy(x, target, -100, 0.0)
    for cuts in ([11], [4, 7], [1, 9, 1]):
        starts = [sum(cuts[:i]) for i in range(len(cuts))]
        stats = [ops.vocab_stats(p, target, s, 11, -100) for p, s in zip(x.split(cuts, 1), starts, strict=True)]
        together, picked = ops.vocab_combine(torch.cat(stats))
        torch.testing.assert_close(together, lse, rtol=1e-14, atol=0)
        torch.testing.assert_close((together - picked).masked_fill(target == -100, 0), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, F.cross_entropy(x, target, reduction="none"), rtol=1e-12, atol=1e-12)


def test_infinite_logits() -> None:
    """A block of -inf counts for nothing; a row of them is nan, as it is in eager."""
    x, target = rand(3, 6), torch.tensor([4, 5, 3])
    x[:2, :3], x[2] = -float("inf"), -float("inf")
    stats = torch.cat([ops.vocab_stats(p, target, s, 6, -100) for p, s in zip(x.split(3, 1), (0, 3), strict=True)])
    lse, picked = ops.vocab_combine(stats)
    eager = F.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(lse - picked, eager, equal_nan=True)
    assert eager[2].isnan() and not eager[:2].isnan().any()
    torch.testing.assert_close(ops.cross_entropy(x, target, -100, 0.0)[0], eager, equal_nan=True)


def test_labels_that_are_no_class() -> None:
    with pytest.raises(IndexError, match="Target 6 is out of bounds"):
        ops.cross_entropy(rand(2, 6), torch.tensor([6, 0]), -100, 0.0)
    with pytest.raises(IndexError, match="Target -3 is out of bounds"):
        ops.vocab_stats(rand(2, 6), torch.tensor([-3, 0]), 0, 12, -100)


# ---- bad input ----------------------------------------------------------------------------------------------------------------

X, LABELS = torch.zeros(2, 3, 4), torch.zeros(4, dtype=torch.long)
BAD: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "integers": (ops.rms_norm, (X.long(), None, 1e-5, 0.0), "x is int64[2, 3, 4] on cpu"),
    "complex": (ops.gated, (X.to(torch.complex64), X.to(torch.complex64), "silu"), "gate is complex64"),
    "a weight of another width": (ops.layer_norm, (X, torch.zeros(3), None, 1e-5), "weight is float32[3] on cpu"),
    "a matrix for a bias": (ops.layer_norm, (X, None, X[0], 1e-5), "bias is float32[3, 4] on cpu"),
    "no dims": (ops.rms_norm, (torch.zeros(()), None, 1e-5, 0.0), "x has the shape []"),
    "rows without elements": (ops.rms_norm, (torch.zeros(3, 0), None, 1e-5, 0.0), "x has the shape [3, 0]"),
    "a residual of another shape": (ops.add_rms_norm, (X, X[:1], None, 1e-5, 0.0), "residual is float32[1, 3, 4]"),
    "a residual of another dtype": (ops.add_layer_norm, (X, X.half(), None, None, 1e-5), "residual is float16"),
    "another device": (ops.rms_norm, (X, torch.zeros(4, device="meta"), 1e-5, 0.0), "weight is on meta, x on cpu"),
    "an unknown activation": (ops.gated, (X, X, "relu"), "no activation 'relu'"),
    "gates that broadcast": (ops.gated, (X, X[..., :1], "silu"), "up is float32[2, 3, 1]"),
    "three dims to rotate": (ops.rope, (X, X, X, False), "x is float32[2, 3, 4]"),
    "an odd rotation": (ops.rope, (X[None], X[0, :, :3], X[0, :, :3], False), "cos is float32[3, 3]"),
    "too wide a rotation": (ops.rope, (X[None], torch.zeros(3, 6), torch.zeros(3, 6), False), "cos is float32[3, 6]"),
    "angles of other positions": (ops.rope, (X[None], X[0, :2], X[0, :2], False), "cos is float32[2, 4]"),
    "sines of another shape": (ops.rope, (X[None], X[0], X[0, :, :2], False), "sin float32[3, 2]"),
    "logits of three dims": (ops.cross_entropy, (X, LABELS, -100, 0.0), "x is float32[2, 3, 4]"),
    "no classes": (ops.cross_entropy, (torch.zeros(4, 0), LABELS, -100, 0.0), "x is float32[4, 0]"),
    "labels by probability": (ops.cross_entropy, (X[0], X[0, :, 0], -100, 0.0), "target is float32[3]"),
    "too many labels": (ops.vocab_stats, (X[0], LABELS, 0, 4, -100), "target is int64[4]"),
    "a block beyond the classes": (ops.vocab_stats, (X[0], LABELS[:3], 2, 5, -100), "classes 2 to 6 of 5"),
    "a mask of other rows": (ops.masked_softmax, (X, X[:, :2], 1.0), "mask is float32[2, 2, 4]"),
    "a mask of integers": (ops.masked_softmax, (X, LABELS, 1.0), "mask is int64[4]"),
    "a mask of more dims": (ops.masked_softmax, (X, X[None], 1.0), "mask is float32[1, 2, 3, 4]"),
    "softmax of five dims": (ops.masked_softmax, (X[None, None], None, 1.0), "x is float32[1, 1, 2, 3, 4]"),
    "a chance above one": (ops.dropout_add, (X, X, torch.tensor(0), 1.5, 0, [24], [0], [24]), "p is 1.5"),
    "a float for a seed": (ops.dropout_add, (X, X, torch.tensor(0.5), 0.5, 0, [24], [0], [24]), "seed is torch.float32 []"),
    "a block of another size": (ops.dropout_add, (X, X, torch.tensor(0), 0.5, 0, [24], [0], [23]), "lengths [23] for 24 elements"),
    "a step before the first": (ops.adamw_, (*[X[0, 0]] * 4, None, None, 1e-3, 0.9, 0.9, 1e-8, 0.0, 0), "step 0"),
    "a beta of one": (ops.adamw_, (*[X[0, 0]] * 4, None, None, 1e-3, 0.9, 1.0, 1e-8, 0.0, 1), "betas 0.9 and 1.0"),
    "a scale for each": (ops.adamw_, (*[X[0, 0]] * 4, None, X[0, 0], 1e-3, 0.9, 0.9, 1e-8, 0.0, 1), "scale is float32[4]"),
    "a gradient of another shape": (ops.adamw_, (X[0, 0], X[0], *[X[0, 0]] * 2, None, None, 1e-3, 0.9, 0.9, 1e-8, 0.0, 1), "grad is"),
    "what are no statistics": (ops.vocab_combine, (X[:, :2],), "stats is float32[2, 2, 4]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    op, args, text = BAD[name]
    with pytest.raises(InputError) as caught:
        op(*args)
    assert text in str(caught.value) and caught.value.why


def test_a_gradient_of_angles_is_refused() -> None:
    with pytest.raises(InputError, match="cos or sin requires a gradient"):
        ops.rope(rand(1, 2, 3, 4), rand(3, 4).requires_grad_(), rand(3, 4), False)


def test_a_gradient_of_a_mask_is_refused() -> None:
    with pytest.raises(InputError, match="mask requires a gradient"):
        ops.masked_softmax(rand(3, 4), rand(3, 4).requires_grad_(), 1.0)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x, w = torch.zeros(shape, requires_grad=True), torch.zeros(8, requires_grad=True)
    y, total, mean, _ = ops.add_layer_norm(x, x, w, w, 1e-5)
    z = ops.gated(y, total, "gelu")
    assert z.shape == shape and mean.shape == shape[:-1]
    z.sum().backward()
    assert x.grad.shape == shape and bool((w.grad == 0).all())
    assert ops.rope(torch.zeros(0, 2, 3, 4), torch.zeros(3, 4), torch.zeros(3, 4), False).shape == (0, 2, 3, 4)
    assert ops.cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), -100, 0.0)[0].shape == (0,)


# ---- which kernel, which configuration ----------------------------------------------------------------------------------------


def test_widths_take_the_smallest_block_that_holds_them() -> None:
    like = torch.empty(1, dtype=torch.bfloat16)
    for name in ("norm.forward", "norm.backward"):
        kernel, widest = KERNELS[name], max(c.block for c in KERNELS[name].configs)
        for width in (1, 64, 65, 1000, 4096, 4097, widest):
            config = choose(kernel, width, like)
            assert config is not None and config.block >= width
            assert not [c for c in kernel.configs if width <= c.block < config.block]
        assert choose(kernel, widest + 1, like) is None
    assert [c.warps for c in KERNELS["norm.backward"].fitting(8000, 4)] == [32], "of the sizes of elements that it is for"


@pytest.mark.parametrize(("width", "names"), [(100, ["norm.backward"]), (20_000, ["norm.backward_wide", "norm.weights_wide"])])
def test_rows_too_wide_for_registers_have_kernels_of_their_own(width: int, names: list[str]) -> None:
    x = torch.empty(64, width, device="meta", dtype=torch.bfloat16)
    rstd = torch.empty(64, device="meta")
    with recording() as found:
        norm_launch.backward(x, None, x, x[0], None, rstd, 0.0, False)
    assert [f.kernel.name for f in found] == names


def test_configurations_are_launchable() -> None:
    for kernel in KERNELS.values():
        assert len(set(kernel.configs)) == len(kernel.configs)
        for c in kernel.configs:
            assert all(n & (n - 1) == 0 for n in (c.block, c.rows, c.warps)) and c.warps <= 32, (kernel.name, c)
            assert c.rows * c.block >= 32 * c.warps, f"{kernel.name} {c}: threads without an element"


def device_tensor(dtype: torch.dtype = torch.bfloat16, n: int = 4) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, numel=lambda: n)


def test_what_kernels_do_not_know_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_capability", lambda index: (9, 0))
    assert usable(device_tensor()) and usable(device_tensor(), None, device_tensor(torch.float32))
    assert not usable(device_tensor(torch.float64)) and not usable(device_tensor(n=0)) and not usable(torch.zeros(3))
    assert not usable(torch.zeros(3, device="meta"))
    monkeypatch.setenv("AUTOPAR_KERNELS", "0")
    assert not usable(device_tensor())


def test_one_notice_where_a_user_would_wonder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_SAID", set())
    monkeypatch.setattr(launch, "triton", None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not usable(device_tensor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable(device_tensor()) and not usable(torch.zeros(3)), "said once, and never on a CPU"
    monkeypatch.setattr(launch, "triton", object())
    monkeypatch.setattr(launch, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match="Tesla T4 is older"):
        assert not usable(device_tensor())


def test_without_triton_everything_runs() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, netmind_autopar.kernels as k\n"
        "from netmind_autopar.kernels.fused import language\n"
        "assert language.triton is None and not language.INTERPRETED\n"
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "y, _ = torch.ops.autopar.rms_norm(x, None, 1e-5, 0.0)\n"
        "torch.ops.autopar.gated(y, y, 'silu').sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_forced_configuration_is_used_where_it_fits() -> None:
    kernel, like = KERNELS["norm.forward"], torch.empty(1, dtype=torch.bfloat16)
    config = Config(2048, 2, 8)
    with launch.forcing({"norm.forward": config}):
        assert choose(kernel, 2000, like) == config and choose(kernel, 4000, like) is None
    assert choose(kernel, 2000, like) == Config(2048, 1, 4)
