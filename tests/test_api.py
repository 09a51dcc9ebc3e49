"""The user's contract on one process: what goes in, what comes out, and every refusal."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import netmind_autopar
from netmind_autopar import AutoparError, Plan, autoparallelize, plan
from netmind_autopar.arguments import parse_memory
from netmind_autopar.ir.errors import CaptureError, InputError, MeshError, PlanError, ProfileError, ShapeError, UnknownOpError


class Net(nn.Module):
    """Dropout, batch norm, a tied weight, a frozen one, a dict output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        x = self.drop(self.norm(self.embed(ids) * self.frozen))
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


IDS = torch.arange(8) % 10


def net_inputs() -> dict:
    return {"ids": IDS, "labels": IDS}


def test_public_names() -> None:
    assert len(netmind_autopar.__all__) <= 10
    for name in netmind_autopar.__all__:
        assert getattr(netmind_autopar, name) is not None
    with pytest.raises(AttributeError):
        _ = netmind_autopar.nothing


def test_a_module_like_the_original(mesh: DeviceMesh) -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pm = autoparallelize(model, net_inputs(), mesh)
    assert list(pm.state_dict()) == list(model.state_dict())
    assert [n for n, _ in pm.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert pm.head.weight is pm.embed.weight
    assert all(isinstance(p, DTensor) for p in pm.parameters())
    assert not pm.frozen.requires_grad
    result = pm(**net_inputs())
    assert set(result) == {"loss", "logits"}
    assert not isinstance(result["loss"], DTensor) and isinstance(result["logits"], DTensor)
    result["loss"].backward()
    assert pm.embed.weight.grad is not None and pm.frozen.grad is None
    torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
    torch.optim.AdamW(p for p in pm.parameters() if p.requires_grad).step()
    assert int(pm.norm.num_batches_tracked) == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_follows_the_seed(mesh: DeviceMesh) -> None:
    pm = autoparallelize(Net(), net_inputs(), mesh)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(pm(**net_inputs())["loss"].item())
    assert losses[0] == losses[2] != losses[1]


def test_outputs_and_gradients_asked_for(mesh: DeviceMesh) -> None:
    model, inputs = models.gpt2()
    dropped = autoparallelize(model, inputs, mesh, outputs=("loss",))(**inputs)
    assert dropped.loss is not None and dropped.logits is None
    gathered = autoparallelize(model, inputs, mesh, outputs="global")(**inputs)
    assert not isinstance(gathered.logits, DTensor)
    torch.testing.assert_close(gathered.logits, model(**inputs).logits)
    pm = autoparallelize(model, inputs, mesh)
    with pytest.raises(InputError, match="differentiable=") as e:
        pm(**inputs).logits.sum().backward()
    assert "logits" in str(e.value)
    both = autoparallelize(model, inputs, mesh, differentiable=("loss", "logits"))
    out, expected = both(**inputs), model(**inputs)
    (out.loss + out.logits.full_tensor().sum()).backward()
    (expected.loss + expected.logits.sum()).backward()
    for (name, p), q in zip(both.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)


def test_without_gradients_nothing_is_saved(mesh: DeviceMesh) -> None:
    model, inputs = models.mlp()
    pm = autoparallelize(model, inputs, mesh)
    with torch.no_grad():
        out = pm(*inputs) if isinstance(inputs, tuple) else pm(inputs) if isinstance(inputs, torch.Tensor) else pm(**inputs)
    leaf = out if isinstance(out, torch.Tensor) else next(iter(out.values()))
    assert leaf.grad_fn is None


def test_inputs_may_be_dtensors(mesh: DeviceMesh) -> None:
    model, inputs = models.mlp()
    pm = autoparallelize(model, inputs, mesh)
    spread = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in inputs.items()}
    torch.testing.assert_close(pm(**spread), pm(**inputs))


def test_refusals_at_run_time(mesh: DeviceMesh) -> None:
    pm = autoparallelize(Net(), net_inputs(), mesh, strict_shapes=True)
    for wrong in ({"ids": IDS[:4], "labels": IDS[:4]}, {"ids": IDS.int(), "labels": IDS}, {"ids": IDS}):
        with pytest.raises(ShapeError):
            pm(**wrong)
    loss = pm(**net_inputs())["loss"]
    loss.backward()
    with pytest.raises((AutoparError, RuntimeError)):
        loss.backward()
    loss = pm(**net_inputs())["loss"]
    with torch.no_grad():
        pm.embed.weight.mul_(2)
    with pytest.raises(AutoparError, match="in place"):
        loss.backward()
    with pytest.raises(InputError, match="eval"):
        pm.eval()(**net_inputs())


def test_a_plan_runs_only_where_it_belongs(mesh: DeviceMesh) -> None:
    model, inputs = models.mlp()
    good = plan(model, inputs, "dp=1")
    assert autoparallelize(model, inputs, mesh, plan=good).plan == good
    with pytest.raises(PlanError, match="mesh"):
        autoparallelize(model, inputs, mesh, plan=plan(model, inputs, "dp=2"))
    with pytest.raises(PlanError, match="mesh"):
        autoparallelize(model, inputs, mesh, plan=plan(model, inputs, "x=1"))
    with pytest.raises(PlanError, match="another model"):
        autoparallelize(Net(), net_inputs(), mesh, plan=good)


def test_refusals_of_models_and_inputs(mesh: DeviceMesh) -> None:
    class Branch(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    for bad in ("text", 3, (), {"x": 1}, None):
        with pytest.raises(InputError):
            plan(nn.Linear(3, 3), bad, "dp=2")
    with pytest.raises(InputError, match="device"):
        plan(nn.Bilinear(3, 3, 3), (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")), "dp=2")
    with pytest.raises(CaptureError, match=r"test_api\.py") as e:
        plan(Branch(3, 3), torch.zeros(2, 3), "dp=2")
    assert "try" in str(e.value)
    with pytest.raises(InputError):
        plan(lambda x: x, torch.zeros(2), "dp=2")  # type: ignore[arg-type]

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.empty(3, device="meta"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w

    with pytest.raises(InputError, match="meta device"):
        autoparallelize(nn.Sequential(Bare()), torch.zeros(2, 3), mesh)


def test_refusals_of_meshes_and_options(tmp_path, mesh: DeviceMesh) -> None:
    model, x = nn.Linear(4, 4), torch.zeros(4, 4)
    for bad in ("dp", "dp=0", "dp=2,dp=2", "", "dp=2 tp=2"):
        with pytest.raises(MeshError):
            plan(model, x, bad)
    with pytest.raises(MeshError, match="torchrun"):
        autoparallelize(model, x, "dp=4")
    with pytest.raises(InputError):
        plan(model, x, "dp=2", memory="lots")
    with pytest.raises(InputError, match="no such parameter"):
        plan(model, x, "dp=2", pins={"nothing": "R"})
    with pytest.raises(InputError, match="axis"):
        plan(model, x, "dp=2", pins={"weight": {"tp": "R"}})
    with pytest.raises(MeshError):
        plan(model, x, "dp=2", cluster="nowhere")
    profile = tmp_path / "bad.json"
    profile.write_text('{"device": {"memory_bytes": NaN}}')
    with pytest.raises(ProfileError):
        plan(model, x, "dp=2", cluster=str(profile))


@torch.library.custom_op("api_test::ranks", mutates_args=())
def _ranks(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().argsort().argsort().view(x.shape).to(x.dtype)


_ranks.register_fake(torch.empty_like)
_ranks.register_autograd(lambda ctx, grad: grad)


def test_an_op_without_a_rule(mesh: DeviceMesh) -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.api_test.ranks(super().forward(x))

    with pytest.warns(UserWarning, match=r"api_test.ranks.default: .* ms, .*%  .*test_api\.py(.|\n)*register_rule"):
        found = plan(Odd(4, 4), torch.zeros(2, 4), "dp=2", cluster="h100-sxm", differentiable=())
    (row,) = found.replicated
    assert row.op == "api_test.ranks.default" and "test_api.py" in row.where and "no split" in row.why
    with pytest.raises(UnknownOpError, match=r"test_api\.py"):
        plan(Odd(4, 4), torch.zeros(2, 4), "dp=2", strict=True)


def test_two_meshes_in_one_process() -> None:
    model, inputs = models.gpt2()
    first = plan(model, inputs, "dp=2,tp=4", cluster="h100-sxm")
    plan(model, inputs, "tp=8", cluster="h100-sxm")
    again = plan(model, inputs, "dp=2,tp=4", cluster="h100-sxm")
    assert first.dumps() == again.dumps()
    assert Plan.loads(first.dumps()) == first


def test_memory_sizes() -> None:
    assert parse_memory("70GiB") == 70 * 2**30
    assert parse_memory("1.5 MB") == 1_500_000
    assert parse_memory(10) == 10 and parse_memory(None) is None
    for bad in ("-1GiB", "GiB", 0, True, "0"):
        with pytest.raises(InputError):
            parse_memory(bad)
