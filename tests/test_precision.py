"""A policy of precision: the casts that it writes, what they compute, in which dtype gradients are summed, and where it is recorded."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from two_processes import found_by_two
from zoo import ZOO

from netmind_autopar import Plan, autoparallelize, plan, verify
from netmind_autopar.api import lower_plan, plan_program
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import InputError, PlanError
from netmind_autopar.ir.precision import Precision, agreed
from netmind_autopar.ir.program import Program, values
from netmind_autopar.ir.spec import Spec
from netmind_autopar.ir.stretches import casts_end
from netmind_autopar.runtime.collectives import BUCKETS, MOVES
from netmind_autopar.solver import build as building
from netmind_autopar.solver.sums import cast_first
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.tracer.signature import sample_call
from netmind_autopar.verification import relative_error
from netmind_autopar.verification.sides import captured, promoted, widened

BF16, FP16 = Precision.of("bf16"), Precision.of("fp16")


class Block(nn.Module):
    """Attention with a mask and an MLP, the weights of both ends tied."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.ends = nn.Embedding(19, width)
        nn.init.normal_(self.ends.weight, std=0.1)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.ends(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return F.cross_entropy((x @ self.ends.weight.t()).flatten(0, 1), (7 * tokens % 19).flatten())


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Odds(nn.Module):
    """Convolution, batch norm, softmax in the open, a concatenation and an index_put of two dtypes, writes, losses by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.norm(self.conv(x)))
        self.seen.mul_(0.9).add_(h.detach().mean((0, 2, 3)))
        both = torch.cat([h.mean((2, 3)), x.new_ones(len(x), 4)], 1)
        both = both.index_put((torch.tensor([0]),), both[1:2].float())
        kept = torch.zeros_like(y)
        kept.copy_(self.head(both))
        weights = torch.softmax(kept, -1)
        z = torch.einsum("bi,bj->ij", weights, self.head(both)).logsumexp(0)
        return F.mse_loss(weights, y) + z.square().mean() + (kept.exp() - y).square().mean(), z


class Mine(nn.Module):
    """A region where the user says what autocast does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            h = self.b(h.float())
        return h.square().sum()


def cases() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    tokens, mask = torch.randint(0, 19, (4, 6)), torch.zeros(4, 1, 6, 6)
    mask[:, :, :, 5:] = torch.finfo(torch.float32).min
    mask[0] = torch.finfo(torch.float32).min
    return {
        "block": (Block(), {"tokens": tokens, "mask": mask}),
        "odds": (Odds(), {"x": torch.randn(4, 3, 5, 5), "y": torch.randn(4, 5)}),
        "mine": (Mine(), torch.randn(4, 8)),
        "rows": (nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4), nn.LogSoftmax(-1)), torch.randn(8, 6)),
    }


def state_of(program: Program, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    users = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    state = {}
    for item in program.inputs:
        value = program.node(item.node).meta["val"]
        given = named[item.name] if item.role in ("param", "buffer") else users[item.index] if item.role == "input" else None
        state[item.node] = torch.ones(value.shape, dtype=value.dtype) if given is None else given.detach().clone()
    return state


def ops(program: Program, name: str) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and str(n.target) == name]


@pytest.mark.parametrize("name", ["block", "odds", "mine", "rows"])
def test_without_rounding_it_is_the_model(name: str) -> None:
    """In float64 the casts do nothing: outputs, gradients and buffers are those of the graph without a policy."""
    model, inputs = cases()[name]
    plain, cast = capture(model, inputs), capture(model, inputs, precision=BF16)
    want = captured(promoted(plain), {k: widened(v) for k, v in state_of(plain, model, inputs).items()})
    have = captured(promoted(cast), {k: widened(v) for k, v in state_of(cast, model, inputs).items()})
    assert [(o.role, o.name) for o in plain.outputs] == [(o.role, o.name) for o in cast.outputs]
    for out, a, b in zip(plain.outputs, want, have, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=lambda text, out=out: f"{out}: {text}")
    assert graph_hash(plain) != graph_hash(cast)


@pytest.mark.parametrize("name", ["block", "odds", "mine"])
def test_it_computes_what_autocast_does(name: str) -> None:
    model, inputs = cases()[name]
    if name == "block":
        inputs["mask"][0] = 0  # what autocast makes of a row that is masked whole is another matter
    program = capture(model, inputs, precision=BF16)
    found = captured(program, state_of(program, model, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    largest = max(float(g.norm()) for g in grads.values())  # type: ignore[union-attr]
    for out, value in zip(program.outputs, found, strict=True):
        assert torch.isfinite(value).all()
        if out.role == "grad":
            want = grads[out.name]
            assert value.dtype == torch.float32 and want is not None
            assert float((value - want).norm()) <= 0.03 * max(float(want.norm()), 0.05 * largest), out.name
        elif out.role == "output" and not value.dim():
            torch.testing.assert_close(value, loss.detach().float(), rtol=2e-2, atol=1e-3)


def test_products_are_narrow_and_statistics_wide() -> None:
    model, inputs = cases()["block"]
    program = capture(model, inputs, precision=BF16)
    made = {str(n.target): values(n)[0].dtype for n in program.graph.nodes if n.op == "call_function"}  # type: ignore[union-attr]
    assert {made[f"aten.{name}.default"] for name in ("mm", "addmm")} == {torch.bfloat16}
    assert made["autopar.attention.default"] == torch.bfloat16
    assert made["aten.native_layer_norm.default"] == made["autopar.sum_exp.default"] == torch.float32
    assert values(ops(program, "autopar.sum_exp.default")[0].args[0])[0].dtype == torch.bfloat16  # type: ignore[arg-type,union-attr]
    params = {i.node for i in program.inputs if i.role == "param"}
    casts = [n for n in ops(program, "aten._to_copy.default") if casts_end(n) and n.args[0].name in params]  # type: ignore[union-attr]
    assert len(casts) == len({n.args[0] for n in casts}) == 16  # each weight and bias of a layer once
    where = {node: i for i, node in enumerate(program.graph.nodes)}
    second = next(n for n in casts if "layers_1_down" in n.name)
    block = min(where[n] for n in where if (n.meta.get("module") or "").startswith("layers.1") and n not in casts)
    assert where[second] < block  # a block ahead, so that its gather can be


def test_softmax_of_a_product_is_wide() -> None:
    model, inputs = cases()["odds"]
    program = capture(model, inputs, precision=FP16)
    assert {values(n)[0].dtype for n in ops(program, "aten._softmax.default")} == {torch.float32}  # type: ignore[union-attr]
    assert {values(n)[0].dtype for n in ops(program, "aten.convolution.default")} == {torch.float16}  # type: ignore[union-attr]
    buffers = [program.node(o.node).meta["val"].dtype for o in program.outputs if o.role == "mutation"]
    assert set(buffers) <= {torch.float32, torch.int64} and len(buffers) == 4


def test_modules_may_be_kept_wide_and_outputs_cast() -> None:
    model, inputs = cases()["block"]
    program = capture(model, inputs, precision=Precision(keep=("layers.1",), outputs="bfloat16"))
    kept = [n for n in ops(program, "aten.addmm.default") if n.meta["module"].startswith("layers.1")]
    assert len(kept) == 4 and {values(n)[0].dtype for n in kept} == {torch.float32}  # type: ignore[union-attr]
    others = [n for n in ops(program, "aten.addmm.default") if n not in kept]
    assert {values(n)[0].dtype for n in others} == {torch.bfloat16}  # type: ignore[union-attr]
    assert [program.node(o.node).meta["val"].dtype for o in program.outputs if o.role == "output"] == [torch.bfloat16]


def summed_narrow(program: Program, lowered: Program) -> int:
    """Terms of fewer bits that are summed over devices on the way to a parameter's gradient."""
    narrow = {name for name, _ in cast_first(program)}
    found = 0
    for node in lowered.graph.nodes:
        taken = node.args[0] if node.target in BUCKETS else node.args[:1] if node.target in MOVES and "reduce" in node.args[1] else ()
        for origin in taken:
            while origin.target in MOVES:
                origin = origin.args[0]
            spec = lowered.specs.get(origin.name)
            found += origin.name in narrow and isinstance(spec, Spec) and spec.has_partial
    return found


def one_layer() -> tuple[nn.Module, Any]:
    model, inputs = cases()["block"]
    assert isinstance(model, Block)
    model.layers = model.layers[:1]
    return model, inputs


def test_gradients_are_cast_before_they_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = one_layer()
    program = capture(model, inputs, precision=BF16)
    assert len(cast_first(program)) > 8
    assert not cast_first(capture(model, inputs, precision=Precision(reduce="bfloat16")))

    def found(seed: int) -> int:
        chosen = plan_program(program, make_mesh("dp=2", "h100-sxm"), lambda _: None, random_costs=seed)
        return summed_narrow(program, lower_plan(program, chosen))

    assert [found(seed) for seed in range(2)] == [0, 0]
    monkeypatch.setattr(building, "cast_first", lambda program: frozenset())  # planted: the policy's word is not heard
    assert sum(found(seed) for seed in range(2)) > 0


def test_what_is_gathered_is_the_narrow_copy() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(2)))
    sent = {}
    for name, policy in (("fp32", "fp32"), ("bf16", "bf16"), ("half", {"reduce": "bfloat16"})):
        found = plan(model, torch.empty(64, 4096, device="meta"), "dp=4", cluster="h100-sxm", precision=policy, baseline="fsdp")
        sent[name] = Counter[str]()
        for row in found.collectives:
            sent[name][row.kind] += row.bytes
    assert sent["bf16"]["all_gather"] * 2 == sent["fp32"]["all_gather"] > 0
    assert sent["bf16"]["reduce_scatter"] == sent["fp32"]["reduce_scatter"] > 0
    assert sent["half"]["reduce_scatter"] * 2 == sent["bf16"]["reduce_scatter"]


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_the_ranks_compute_what_one_device_does(policy: str) -> None:
    model, inputs = one_layer()
    found = plan(model, inputs, "dp=2", precision=policy, random_costs=5)
    assert Plan.loads(found.dumps()) == found and found.precision == Precision.of(policy)
    report = verify(model, inputs, found)
    assert report.ok and any("the policy computes in" in note for note in report.notes)
    assert max(row.error for row in report.rows if row.tolerance < 1e-6) < 1e-12  # the same in float64


def test_what_cannot_be_read_is_refused() -> None:
    for wrong in ("int4", 16, {"compute": "float8"}, {"reduce": "float16"}, {"speed": 1}):
        with pytest.raises(InputError, match="precision"):
            Precision.of(wrong)
    assert Precision.of("fp32") is None and agreed(None, BF16) is BF16 and agreed("bf16", BF16) is BF16
    with pytest.raises(InputError, match="another precision"):
        agreed("fp16", BF16)
    model, inputs = cases()["rows"]
    text = json.loads(plan(model, inputs, "dp=2", precision="bf16").dumps())
    with pytest.raises(PlanError, match="precision"):
        Plan.loads(json.dumps({**text, "precision": {**text["precision"], "compute": "int4"}}))
    with pytest.raises(PlanError):  # the plan's policy is part of the graph
        verify(model, inputs, Plan.loads(json.dumps({**text, "precision": None})))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "odds", "mine"])
@pytest.mark.parametrize("policy", ["bf16", "fp16", {"compute": "bfloat16", "reduce": "bfloat16"}])
def test_random_plans_compute_what_one_device_does(name: str, policy: Any) -> None:
    model, inputs = cases()[name]
    for seed in range(4):
        found = plan(model, inputs, "a=2,b=2", precision=policy, random_costs=seed)
        trainer = None if seed else (lambda p: torch.optim.SGD(p, lr=0.01))
        report = verify(model, inputs, found, steps=1 if seed else 2, optimizer=trainer)
        assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_without_rounding_is_itself(name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.make(torch.float32)
    plain, cast = (capture(model, inputs, precision=p, **entry.options) for p in (None, BF16))
    assert [(i.role, i.name) for i in plain.inputs] == [(i.role, i.name) for i in cast.inputs]
    state = {i.node: t for i, t in zip(plain.inputs, drawn(plain, model, inputs), strict=True)}
    want = captured(promoted(plain), state)
    have = captured(promoted(cast), {i.node: state[j.node] for i, j in zip(cast.inputs, plain.inputs, strict=True)})
    largest = max([float(w.abs().max()) for o, w in zip(plain.outputs, want, strict=True) if o.role == "grad" and w.numel()], default=0.0)
    for out, a, b in zip(plain.outputs, want, have, strict=True):
        assert a.shape == b.shape and relative_error(a, b.to(a.dtype), largest) <= 1e-9, out


def drawn(program: Program, model: nn.Module, inputs: Any) -> list[Tensor]:
    """Values of all placeholders in float64, with noise on parameters."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    call = sample_call(model.forward, inputs)
    users = program.signature.pack(*call.arguments([t for _, t in call.leaves]))
    noise = torch.Generator().manual_seed(0)
    out = []
    for item in program.inputs:
        given = named[item.name] if item.role in ("param", "buffer") else users[item.index] if item.role == "input" else None
        value = program.node(item.node).meta["val"]
        start = torch.ones(value.shape, dtype=value.dtype) if given is None else given.detach()
        wide = widened(start.clone())
        out.append(wide + 0.01 * torch.randn(wide.shape, generator=noise, dtype=wide.dtype) if item.role == "param" else wide)
    return out


@pytest.mark.slow
def test_a_deep_model_is_captured_from_four_blocks() -> None:
    from netmind_autopar.tracer import repeat

    model, (tokens, mask) = Block(layers=20), cases()["block"][1].values()
    inputs = {"tokens": tokens, "mask": mask}
    folded, whole = capture(model, inputs, precision=BF16), capture(model, inputs, precision=BF16, fold=False)
    assert repeat.difference(folded, whole) == ""


@pytest.mark.slow
def test_two_processes_train_alike(tmp_path: Path) -> None:
    found = found_by_two(__file__, tmp_path)
    for name in ("bf16", "fp16"):
        ours, alone = found[0][name], found[0][f"{name} alone"]
        assert found[1][name] == ours
        assert ours == pytest.approx(alone, rel=1e-2), name
        assert ours[-1] < ours[0]
    assert found[0]["parameters"] == found[1]["parameters"] == "torch.float32"
    assert found[0]["accumulated"] < 1e-2
    for rank in (0, 1):  # planted: one gradient overflows in step 2, on the device that has that row
        assert found[rank]["scales"] == [256.0, 256.0, 128.0, 128.0]
        assert found[rank]["moved"] == [True, True, False, True]


def losses(step: Any, model: nn.Module, inputs: Any, scaler: Any, context: Any) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = []
    for _ in range(8):
        optimizer.zero_grad()
        with context():
            loss = step(**inputs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        out.append(float(loss))
    return out


def worker(folder: str, rank: int) -> None:
    import contextlib

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from netmind_autopar.optim import GradScaler

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    found: dict[str, Any] = {}
    for name, policy in (("bf16", BF16), ("fp16", FP16)):
        assert policy is not None
        model, inputs = cases()["block"]
        inputs["mask"][0] = 0
        scaled = {"init_scale": 256.0, "enabled": name == "fp16"}
        alone = copy.deepcopy(model)
        found[f"{name} alone"] = losses(
            alone, alone, inputs, torch.amp.GradScaler("cpu", **scaled), lambda d=policy.dtype: torch.autocast("cpu", d)
        )
        pm = autoparallelize(model, inputs, mesh, precision=policy, baseline="fsdp")
        found[name] = losses(pm, pm, inputs, GradScaler("cpu", **scaled), contextlib.nullcontext)
        found["parameters"] = str(next(pm.parameters()).dtype)
        pm.zero_grad()
        pm(**inputs).backward()
        once = [p.grad.full_tensor() for p in pm.parameters()]  # type: ignore[union-attr]
        pm.zero_grad()
        for k in range(2):
            with pm.no_sync(k == 0):
                (pm(**inputs) / 2).backward()
        twice = [p.grad.full_tensor() for p in pm.parameters()]  # type: ignore[union-attr]
        found["accumulated"] = max(float((a - b).norm() / a.norm()) for a, b in zip(once, twice, strict=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    pm = autoparallelize(model, x, mesh, precision="fp16", random_costs=3)
    optimizer, scaler = torch.optim.SGD(pm.parameters(), lr=0.1), GradScaler("cpu", init_scale=256.0, growth_interval=100)
    found["scales"], found["moved"] = [], []
    for step in range(4):
        before = [p.to_local().clone() for p in pm.parameters()]  # type: ignore[attr-defined]
        optimizer.zero_grad()
        out = pm(x)
        weight = torch.ones(4, 8)
        weight[3, 0] = 1e3 if step == 2 else 1.0
        whole = out.full_tensor() if hasattr(out, "full_tensor") else out
        scaler.scale((whole * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        found["moved"].append(any(not torch.equal(a, p.to_local()) for a, p in zip(before, pm.parameters(), strict=True)))  # type: ignore[attr-defined]
        found["scales"].append(scaler.get_scale())
    (Path(folder) / f"found.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))
