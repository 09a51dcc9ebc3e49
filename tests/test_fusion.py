"""The fusion pass: what it fuses and what it leaves, that nothing changes by it, and that a wrong fusion would be seen."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gloo_fusion
import pytest
import test_repeat
import torch
import torch.nn.functional as F
from random_plans import random_plan
from test_repeat import both
from torch import Tensor, nn
from zoo import ZOO

from netmind_autopar import Plan, arguments, plan, verify
from netmind_autopar.arguments import fusing
from netmind_autopar.cli import main
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import InputError
from netmind_autopar.ir.program import Program, op_name
from netmind_autopar.passes import losses
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.collectives import move
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.fusion import fused_rows, rewrite, table
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare
from netmind_autopar.verification.sides import Sides, captured, promoted, widened

how = test_repeat.how  # a fixture
N = 6


class Model(nn.Module):
    """A function of x and of parameters w, b [n] between two linears, so that gradients arrive and leave everywhere."""

    def __init__(self, form: Callable[..., Tensor], dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 4, N)) -> None:
        super().__init__()
        self.form = form
        self.w, self.b = (nn.Parameter(torch.linspace(0.5, 1.5, shape[-1]).roll(k)) for k in (0, 2))
        self.first, self.second = (nn.Parameter(torch.randn(shape[-1], shape[-1]) * 0.5) for _ in range(2))
        self.to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.form(x @ self.first, y @ self.second, self.w, self.b).float().sin().sum()


def capturing(
    form: Callable[..., Tensor], dtype: torch.dtype = torch.float32, fuse: bool = True, shape: tuple[int, ...] = (2, 4, N)
) -> Program:
    torch.manual_seed(0)
    return capture(Model(form, dtype, shape), (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)), fuse=fuse)


def sites(program: Program) -> dict[str, int]:
    return {row.name: row.count for row in fused_rows(program) if not row.why}


def difference(fused: Program, plain: Program, model: nn.Module, inputs: Any) -> float:
    """The largest relative difference of any result, everything computed in float64, where rounding hides nothing."""
    rules = bind_program(fused)
    side = Sides(model, inputs, fused, lower(fused, rules, random_plan(fused, rules, "a=1", 0)), (1,), perturb=0.05)
    state = {k: widened(v) for k, v in side.snapshot(3).items()}
    mine, theirs = (
        {(o.role, o.name, o.index): t for o, t in zip(p.outputs, captured(promoted(p), state), strict=True)} for p in (fused, plain)
    )
    if mine.keys() != theirs.keys():
        return float("inf")
    largest = max(float(b.abs().max()) for b in theirs.values() if b.is_floating_point() and b.numel())
    worst = 0.0
    for a, b in ((mine[key], theirs[key]) for key in mine):
        if b.is_floating_point() and b.numel():
            worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6 * largest, 1e-300))
    return worst


# ---- forms --------------------------------------------------------------------------------------------------------------------


def _scale(x: Tensor, eps: float = 1e-5) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def _chunked(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _turned(x: Tensor, half: Callable[[Tensor], Tensor], sin_first: bool = False) -> Tensor:
    """x [2, 4, 6] as [2, 4, 1, 6]: four heads of one position."""
    x = x.unsqueeze(2)
    angles = torch.linspace(0.0, 1.0, x.shape[-1]).expand(1, 1, -1)
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in (angles.cos(), angles.sin()))
    turned = sin * half(x) + x * cos if sin_first else (x * cos) + (half(x) * sin)
    return turned.squeeze(2)


MASK = torch.triu(torch.full((4, N), -1e4), 1)

FORMS: dict[str, tuple[Callable[..., Tensor], dict[str, int]]] = {
    "rms": (lambda x, y, w, b: w * (x * _scale(x)), {"rms_norm": 1}),
    "rms, factors turned": (lambda x, y, w, b: (_scale(x) * x) * w, {"rms_norm": 1}),
    "rms, eps first": (lambda x, y, w, b: x * torch.rsqrt(1e-3 + x.square().mean(-1, keepdim=True)) * w, {"rms_norm": 1}),
    "rms, divided": (lambda x, y, w, b: w * (x / torch.sqrt((x * x).mean([2], keepdim=True) + 1e-5)), {"rms_norm": 1}),
    "rms, wide inside": (lambda x, y, w, b: w * (x.float() * _scale(x.float())).to(x.dtype), {"rms_norm": 1}),
    "rms, of Gemma": (lambda x, y, w, b: ((x.float() * _scale(x.float())) * (1.0 + w.float())).type_as(x), {"rms_norm": 1}),
    "rms, no weight": (lambda x, y, w, b: x * _scale(x), {"rms_norm": 1}),
    "rms, one op": (lambda x, y, w, b: F.rms_norm(x, [N], w, 1e-4), {"rms_norm": 1}),
    "rms, of a sum": (lambda x, y, w, b: (lambda s: s + w * (s * _scale(s)))(x + y), {"add_rms_norm": 1}),
    "layer": (lambda x, y, w, b: F.layer_norm(x, [N], w, b, 1e-3), {"layer_norm": 1}),
    "layer, of a sum": (lambda x, y, w, b: (lambda s: F.layer_norm(s, [N], w) * s)(y + x), {"add_layer_norm": 1}),
    "swiglu": (lambda x, y, w, b: F.silu(x) * y, {"gated": 1}),
    "swiglu, turned": (lambda x, y, w, b: y * (x * torch.sigmoid(x)), {"gated": 1}),
    "geglu": (lambda x, y, w, b: y * F.gelu(x), {"gated": 1}),
    "geglu, tanh": (lambda x, y, w, b: F.gelu(x, approximate="tanh") * y, {"gated": 1}),
    "rope": (lambda x, y, w, b: _turned(x, _half), {"rope": 1}),
    "rope, chunked, turned": (lambda x, y, w, b: _turned(x, _chunked, True), {"rope": 1}),
    "softmax": (lambda x, y, w, b: torch.softmax(x * 0.3 + MASK.to(x.dtype), -1), {"masked_softmax": 1}),
    "softmax, divided": (lambda x, y, w, b: torch.softmax(MASK.to(x.dtype) + x / 3.0, 2), {"masked_softmax": 1}),
    "softmax, wide": (lambda x, y, w, b: torch.softmax(x * 0.3, -1, dtype=torch.float32).to(x.dtype), {"masked_softmax": 1}),
    "dropout": (lambda x, y, w, b: y + F.dropout(x, 0.4), {"dropout_add": 1}),
    "dropout of a norm": (lambda x, y, w, b: F.layer_norm(F.dropout(x, 0.4) + y, [N], w), {"dropout_add": 1, "layer_norm": 1}),
    "no dropout": (lambda x, y, w, b: F.layer_norm(F.dropout(x, 0.0) + y, [N], w), {"add_layer_norm": 1}),
    "group norm": (lambda x, y, w, b: F.silu(F.group_norm(x, 2)), {"group_norm_silu": 1}),
}  # fmt: skip


NARROW = ("rms, wide inside", "rms, of Gemma", "rope", "softmax, wide", "layer, of a sum", "geglu")
EACH = [pytest.param(f, d, marks=pytest.mark.slow if d == torch.bfloat16 and f not in NARROW else (), id=f"{f}-{str(d)[6:]}")
        for f in FORMS for d in (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("form", "dtype"), EACH)
def test_a_form_is_fused_and_computes_the_same(form: str, dtype: torch.dtype) -> None:
    function, wanted = FORMS[form]
    program = capturing(function, dtype)
    assert sites(program) == wanted, (program.unfused, program.graph)
    if dtype == torch.float32:
        model, inputs = Model(function), (torch.randn(2, 4, N), torch.randn(2, 4, N))
        assert difference(program, capturing(function, fuse=False), model, inputs) <= 1e-10


def _written(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    s = F.dropout(x, 0.4) + y
    s.add_(1.0)
    return s


def _autocast(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.layer_norm(x, [N], w, b)


NEARLY: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "read on the way": (lambda x, y, w, b: (lambda r: w * (x * r) + r)(_scale(x)), "rms_norm", "something else reads what rsqrt gives"),
    "another dim": (lambda x, y, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), "rms_norm", "other dims than the last"),
    "another power": (lambda x, y, w, b: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5), "rms_norm", "in no form that is known"),
    "a scaled sum": (lambda x, y, w, b: torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-5, alpha=2)) * x, "", ""),
    "two dims": (lambda x, y, w, b: F.layer_norm(x, [4, N]), "layer_norm", "over more than the last dim"),
    "a matrix of weights": (lambda x, y, w, b: (x * _scale(x)) * w.expand(4, N), "", ""),
    "its own argument": (lambda x, y, w, b: F.silu(x) * x, "gated", "its own argument"),
    "broadcast": (lambda x, y, w, b: F.silu(x) * w, "gated", "up is float32[6], x float32[2, 4, 6]"),
    "thirds": (lambda x, y, w, b: _turned(x, lambda t: torch.cat((-t[..., 2:], t[..., :2]), -1)), "rope", "not into halves"),
    "a learned mask": (lambda x, y, w, b: torch.softmax(x * 0.3 + b, -1), "masked_softmax", "gradient of the mask is wanted"),
    "filled": (lambda x, y, w, b: torch.softmax((x * 0.3).masked_fill(MASK < 0, -9.0), -1), "masked_softmax", "filled with -9.0"),
    "softmax over rows": (lambda x, y, w, b: torch.softmax(x * 0.3 + MASK, 1), "masked_softmax", "another dim than the last"),
    "dropout of a vector": (lambda x, y, w, b: F.dropout(x, 0.4) + w, "dropout_add", "residual is float32[6]"),
    "written in place": (_written, "dropout_add", "written in place"),
    "autocast": (_autocast, "layer_norm", "autocast region"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEARLY)
def test_what_only_looks_like_a_site_is_left_and_reported(case: str) -> None:
    function, fusion, why = NEARLY[case]
    program = capturing(function)
    left = [(u.fusion, u.why) for u in program.unfused]
    if fusion:
        assert sites(program).get(fusion, 0) == 0
        assert any(name == fusion and why in text for name, text in left), left
        assert all(u.where and u.count >= 1 for u in program.unfused)
    model, inputs = Model(function), (torch.randn(2, 4, N), torch.randn(2, 4, N))
    assert difference(program, capturing(function, fuse=False), model, inputs) <= 1e-10


def test_what_float64_computes_in_float32_stays() -> None:
    program = capturing(FORMS["rms, wide inside"][0], torch.float64)
    assert sites(program) == {} and [u.fusion for u in program.unfused] == ["rms_norm"]
    assert sites(capturing(FORMS["rms"][0], torch.float64)) == {"rms_norm": 1}


def test_frozen_weights() -> None:
    model = Model(FORMS["rms, of a sum"][0])
    for p in (model.w, model.first):
        p.requires_grad_(False)
    inputs = (torch.randn(2, 4, N), torch.randn(2, 4, N))
    fused, plain = (capture(model, inputs, fuse=f) for f in (True, False))
    assert sites(fused) == {"add_rms_norm": 1}
    assert {o.name for o in fused.outputs if o.role == "grad"} == {o.name for o in plain.outputs if o.role == "grad"} == {"second"}
    assert difference(fused, plain, model, inputs) <= 1e-12


def test_masks_do_not_depend_on_what_is_fused() -> None:
    def form(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.dropout(F.dropout(x, 0.3) + F.dropout(y, 0.0), 0.2) * F.dropout(y, 0.5)

    programs = [capturing(form, fuse=f) for f in (True, False)]
    salts = [sorted((op_name(n).startswith("autopar.dropout"), n.args[3 if "add" not in op_name(n) else 4]) for n in p.graph.nodes
                    if op_name(n).startswith("autopar.dropout") and n.meta["phase"] == "forward") for p in programs]  # fmt: skip
    assert salts[0] == salts[1] and len(salts[0]) == 3


# ---- whole models -------------------------------------------------------------------------------------------------------------

COUNTED = {  # the name of a module's class → the sites that it is, per call
    "LlamaRMSNorm": "rms", "MixtralRMSNorm": "rms", "LayerNorm": "layer", "LlamaMLP": "gated", "MixtralExperts": "gated",
    "GEGLU": "gated", "LlamaAttention": "rope", "MixtralAttention": "rope", "ResnetBlock2D": "group",
}  # fmt: skip
TIMES = {"LlamaAttention": 2, "MixtralAttention": 2, "ResnetBlock2D": 2}
OPS = {"rms_norm": "rms", "add_rms_norm": "rms", "layer_norm": "layer", "add_layer_norm": "layer", "gated": "gated", "rope": "rope"}
OPS |= {"group_norm_silu": "group", "masked_softmax": "softmax", "dropout_add": "dropout"}


def eligible(model: nn.Module) -> Counter[str]:
    """Sites by the modules that the library's authors wrote, not by ops."""
    found: Counter[str] = Counter()
    for module in model.modules():
        name = type(module).__name__
        if name in COUNTED:
            found[COUNTED[name]] += TIMES.get(name, 1)
        if name == "GPT2Block" and model.training and module.attn.resid_dropout.p > 0:
            found["dropout"] += 2  # behind attention and behind the MLP
        if name == "GPT2Attention" and module.config._attn_implementation == "eager":
            found["softmax"] += 1
        if name in ("UNet2DConditionModel", "UNet2DModel"):
            found["group"] += 1  # conv_norm_out with conv_act
    return found


def gpt2(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=3, n_embd=24, n_head=3, vocab_size=50, n_positions=16, attn_implementation="eager", bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 8))
    return GPT2LMHeadModel(config).to(dtype).train(), {"input_ids": tokens, "labels": tokens}


MODELS: dict[str, Callable[[torch.dtype], tuple[nn.Module, Any]]] = {
    "gpt2_eager": gpt2, **{name: ZOO[name].make for name in ("llama", "mixtral_grouped", "dlrm", "unet2d_condition", "unet2d_pixels")}
}  # fmt: skip
BIG = ("unet2d_condition", "unet2d_pixels", "mixtral_grouped")


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(n, d, marks=pytest.mark.slow if n in BIG or (d == torch.bfloat16 and n != "llama") else (), id=f"{n}-{str(d)[6:]}")
    for n in MODELS for d in (torch.float32, torch.bfloat16)
    if (n, d) != ("mixtral_grouped", torch.bfloat16)  # torch's grouped_mm refuses rows of 20 bytes
])  # fmt: skip
def test_sites_of_whole_models(name: str, dtype: torch.dtype) -> None:
    """At least 95% of the eligible sites. A DLRM has none: its norms, gates and dropouts are none."""
    model, inputs = MODELS[name](dtype)
    wanted = eligible(model)
    program = capture(model, inputs, fuse=True)
    found: Counter[str] = Counter()
    for op, count in sites(program).items():
        found[OPS[op]] += count
    assert sum(min(found[k], n) for k, n in wanted.items()) >= 0.95 * sum(wanted.values()), (wanted, found, program.unfused)
    assert bool(wanted) == (name != "dlrm") and all(found[k] <= n for k, n in wanted.items()), (wanted, found)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["a=1", "a=2", "a=2,b=2"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_models_are_exact(name: str, mesh: str) -> None:
    """Lockstep under a random legal plan and under one with random prices; and the fused graph against the one that is not."""
    model, inputs = MODELS[name](torch.float32)
    fused, plain = (capture(model, inputs, fuse=f) for f in (True, False))
    assert difference(fused, plain, model, inputs) <= 1e-11
    rules = bind_program(fused)
    assert all(rule.known for rule in rules.values())
    priced = solve(fused, rules, make_mesh(mesh, "h100-sxm"), graph_hash=graph_hash(fused), memory_limit=1 << 60, random_costs=5, gap=0.05)
    for one in (random_plan(fused, rules, mesh, 3), priced):
        report = compare(model, inputs, fused, lower(fused, rules, one), one, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


@pytest.mark.slow
def test_a_deep_model_is_written_down_with_its_fused_ops(how: list[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=4)
    tokens = torch.randint(0, 40, (2, 6))
    folded, full = both(LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}, fuse=True)
    assert how == [""] and sites(folded) == sites(full) == {"add_rms_norm": 16, "gated": 8, "rms_norm": 1, "rope": 16}


# ---- a wrong fusion is seen ---------------------------------------------------------------------------------------------------


def _wrong(name: str, change: Callable[[table.Made], table.Made]) -> tuple[table.Fusion, ...]:
    def wrap(fusion: table.Fusion) -> table.Fusion:
        def make(match: table.Match) -> table.Made | str:
            made = fusion.make(match)
            return change(made) if isinstance(made, table.Made) else made

        return table.Fusion(fusion.name, fusion.patterns, make, fusion.sign) if fusion.name == name else fusion

    return tuple(map(wrap, table.TABLE))


PLANTED = {
    "another eps": ("rms, wide inside", "rms_norm", lambda m: table.Made(m.op, (*m.args[:2], m.args[2] * 100, m.args[3]), m.outputs)),
    "the offset forgotten": ("rms, of Gemma", "rms_norm", lambda m: table.Made(m.op, (*m.args[:3], 0.0), m.outputs)),
    "the weight forgotten": ("layer", "layer_norm", lambda m: table.Made(m.op, (m.args[0], None, *m.args[2:]), m.outputs)),
    "another activation": ("geglu, tanh", "gated", lambda m: table.Made(m.op, (*m.args[:2], "gelu"), m.outputs)),
    "gate and up exchanged": ("swiglu", "gated", lambda m: table.Made(m.op, (m.args[1], m.args[0], m.args[2]), m.outputs)),
    "the wrong way round": ("rope", "rope", lambda m: table.Made(m.op, (*m.args[:3], True), m.outputs)),
    "the scale forgotten": ("softmax", "masked_softmax", lambda m: table.Made(m.op, (*m.args[:2], 1.0), m.outputs)),
    "another sum": ("rms, of a sum", "add_rms_norm", lambda m: table.Made(m.op, m.args, {"": 0, "sum": 0})),
    "another chance": ("dropout", "dropout_add", lambda m: table.Made(m.op, (*m.args[:2], 0.1), m.outputs)),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_fusion_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, name, change = PLANTED[bug]
    plain = capturing(FORMS[form][0], fuse=False)
    monkeypatch.setattr(rewrite, "TABLE", _wrong(name, change))
    fused = capturing(FORMS[form][0])
    assert difference(fused, plain, Model(FORMS[form][0]), (torch.randn(2, 4, N), torch.randn(2, 4, N))) > 1e-6


# ---- the user's side ----------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_was_fused_and_runs_elsewhere() -> None:
    torch.manual_seed(0)
    model, inputs = (
        Model(lambda x, y, w, b: (F.silu(x) * y) * _scale(x.mean(1, keepdim=True)) * w),
        (torch.randn(2, 4, N), torch.randn(2, 4, N)),
    )
    found = plan(model, inputs, "a=2", cluster="h100-sxm", fuse=True)
    assert found.fuse and [(f.name, f.count) for f in found.fusions if not f.why] == [("gated", 1)]
    assert [f.name for f in found.fusions if f.why] == ["rms_norm"]
    again = Plan.loads(found.dumps())
    assert again == found and verify(model, inputs, again).ok
    for fuse, cluster, wanted in ((False, "h100-sxm", False), ("auto", "h100-sxm", False), (True, None, True)):
        assert plan(model, inputs, "a=2", cluster=cluster, fuse=fuse).fuse is wanted
    assert plan(copy.deepcopy(model), inputs, "a=2", fuse=False).graph_hash != found.graph_hash


def test_fuse_is_checked() -> None:
    assert fusing(True) is True and fusing(False) is False
    with pytest.raises(InputError, match="fuse='yes' is no choice"):
        fusing("yes")


@pytest.mark.parametrize(("here", "timed"), [(True, True), (True, False), (False, True)])
def test_left_to_itself_it_fuses_where_kernels_were_timed(monkeypatch: pytest.MonkeyPatch, here: bool, timed: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(arguments, "tuned_for", lambda name: {"norm.forward": {}} if timed and name == "a GPU" else {})
    assert fusing("auto") is (here and timed)


FILE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.linear(x) + x).sum() + nn.functional.silu(x).mul(x).sum()

def model():
    return Block()

def sample_inputs():
    return torch.ones(4, 8)
"""


def test_the_command_line_shows_fusions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "block.py").write_text(FILE)
    assert main(["plan", str(tmp_path / "block.py"), "--mesh", "a=2", "--fuse"]) == 0
    shown = capsys.readouterr().out
    assert "Fused in forward: 1 add_layer_norm" in shown
    assert "left: 1 gated, the activation is multiplied with its own argument  block.py:11" in shown
    assert main(["plan", str(tmp_path / "block.py"), "--mesh", "a=2"]) == 0
    assert "Fused" not in capsys.readouterr().out, "on a CPU nothing is fused unless it is asked for"


# ---- after sharding: a loss over split classes --------------------------------------------------------------------------------


def split_loss(world: int, fuse: bool = True) -> tuple[nn.Module, Any, Program, Plan]:
    """A plan under which the axis splits the classes: 65 of them, which divide by no mesh."""
    model, inputs = gloo_fusion.case()
    program = capture(model, inputs, fuse=fuse)
    found = plan(model, inputs, f"a={world}", fuse=fuse, time_limit=5.0)
    split = {"h.weight": "d0", "h.t": "a", "h.mm": "n", "mul": "b", "amax": "b", "sum_exp": "c", "pick": "c"}
    split |= {"cross_entropy_backward@backward": "c", "mul@backward": "b", "h.t@backward": "b", "h.mm@backward": "m"}
    assert split.keys() <= found.choices.keys(), found.choices
    choices = {name: split.get(name, "-") for name in found.choices}
    return model, inputs, program, found.model_copy(update={"choices": choices})


def collectives(lowered: Program) -> list[tuple[str, str]]:
    return [(str(n.args[1]), str(n.args[3])) for n in lowered.graph.nodes if n.target is move and n.args[1] != "slice"]


@pytest.mark.parametrize("world", [2, 4])
def test_a_loss_over_split_classes_takes_one_collective(world: int) -> None:
    """Twelve bytes a row and device, where three all-reduces stood; exact in lockstep."""
    model, inputs, program, one = split_loss(world)
    lowered = lower(program, bind_program(program), one)
    assert collectives(lowered) == [("all_gather", f"f32[{world},3,{gloo_fusion.ROWS}] S(0)")]
    report = compare(model, inputs, program, lowered, one, emitted=True)
    assert report.ok and report.max_rel_error <= 1e-6, report
    model, inputs, program, one = split_loss(world, fuse=False)
    assert [kind for kind, _ in collectives(lower(program, bind_program(program), one))] == ["all_reduce"] * 3


def test_a_wrong_start_of_the_classes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, program, one = split_loss(2)

    def wrong(new: Any, context: Any, loss: losses._Loss) -> None:
        loss.pick.args = (*loss.pick.args[:2], 0, *loss.pick.args[3:])
        right(new, context, loss)

    right = losses._rewrite
    monkeypatch.setattr(losses, "_rewrite", wrong)
    assert not compare(model, inputs, program, lower(program, bind_program(program), one), one).ok


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_loss_over_split_classes_on_real_processes(world: int, tmp_path: Path) -> None:
    split_loss(world)[3].save(tmp_path / "plan.json")
    command = [sys.executable, gloo_fusion.__file__, str(world), str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "plan.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
             for r in range(world)]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=300) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    for out, err in outputs:
        assert out, err
        row = json.loads(out.splitlines()[-1])
        assert row["loss"] <= 1e-6 and row["gradient"] <= 1e-6, row
