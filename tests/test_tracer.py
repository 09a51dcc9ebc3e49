"""Capture: what the graph computes, how its ends and nodes are named, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import models
import pytest
import torch
from torch import fx, nn

from netmind_autopar.ir.errors import CaptureError, InputError, ShapeError
from netmind_autopar.ir.program import Program, values
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash

TINY = 1e-12
SMALL = {"resnet50": {"blocks": (1, 1)}, "gpt2": {"layers": 1}, "llama": {"layers": 1}, "bert": {"layers": 1}}


def run(
    program: Program,
    model: nn.Module,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    tangents: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Interpret the joint graph on real tensors: (what the model returns, gradients by name, new buffers by name)."""
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = iter(program.signature.pack(args, kwargs or {}))
    feed = []
    for item, node in zip(program.inputs, (n for n in program.graph.nodes if n.op == "placeholder"), strict=True):
        assert item.node == node.name
        val = node.meta["val"]
        tangent = (tangents or {}).get(item.name, torch.ones(val.shape, dtype=val.dtype))
        feed.append(
            {"param": parameters.get(item.name), "buffer": parameters.get(item.name), "tangent": tangent, "seed": torch.tensor(seed)}.get(
                item.role
            )
            if item.role != "input"
            else next(given)
        )
        assert feed[-1].shape == val.shape and feed[-1].dtype == val.dtype, item
    root = nn.Module()
    for name, tensor in program.constants.items():
        setattr(root, name, tensor)
    with program.edit() as draft:  # a view is run as a reshape, as lowering does: real strides may differ from traced ones
        for node in draft.graph.nodes:
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default
    with torch.no_grad():
        results = fx.Interpreter(fx.GraphModule(root, draft.graph)).run(*feed)
    roles: dict[str, dict[str, torch.Tensor]] = {"output": {}, "grad": {}, "mutation": {}}
    for item, value in zip(program.outputs, results, strict=True):
        roles[item.role][item.name] = value
    returned = program.signature.unpack(list(roles["output"].values()))
    return returned, roles["grad"], roles["mutation"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TINY) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
    error = float((a - b).detach().abs().max()) / scale if b.numel() else 0.0
    assert error <= tolerance, error


def check(model: nn.Module, inputs: dict[str, Any], loss: str = "loss", tolerance: float = TINY, **options: Any) -> tuple[Program, Any]:
    """Capture, run and compare loss, gradients and buffers with eager."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model, inputs, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "capture changed the model"
    assert all(p.grad is None for p in model.parameters())
    returned, grads, buffers = run(program, model, (), inputs)
    expected = model(**inputs)
    eager = expected[loss] if isinstance(expected, dict) else getattr(expected, loss, expected)
    eager.backward()
    got = returned[loss] if isinstance(returned, dict) else getattr(returned, loss, returned)
    close(got, eager.detach(), tolerance)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    for name, grad in wanted.items():
        close(grads[name], grad, tolerance)
    after = dict(model.named_buffers())
    changed = {n for n, b in after.items() if not torch.equal(b, before.get(n, b))}
    assert changed <= set(buffers)
    for name, value in buffers.items():
        close(value, after[name], tolerance)
    model.zero_grad()
    return program, returned


@pytest.mark.parametrize("name", models.FACTORIES)
def test_numbers(name: str) -> None:
    model, inputs = models.FACTORIES[name](torch.float64)
    program, _ = check(model, inputs, tolerance=1e-10 if name == "resnet50" else TINY)  # 50 layers of rounding
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert {"val", "where", "module", "phase"} <= set(node.meta)
            assert node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
            assert not getattr(node.target, "_schema", None) or not node.target._schema.is_mutable
            assert "device" not in node.kwargs
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert sum(bool(n.meta["where"]) for n in calls) >= 0.94 * len(calls)
    assert not any("test_tracer" in n.meta["where"] or "capture.py" in n.meta["where"] for n in calls)


@pytest.mark.parametrize("name", models.FACTORIES)
def test_dropout_draws_from_the_seed(name: str) -> None:
    model, inputs = models.FACTORIES[name](torch.float64, 0.2, **SMALL.get(name, {}))
    program = capture(model, inputs)
    if name == "llama":
        assert any(item.role == "seed" for item in program.inputs)
    first, grads, _ = run(program, model, (), inputs, seed=3)
    again, _, _ = run(program, model, (), inputs, seed=3)
    other, _, _ = run(program, model, (), inputs, seed=4)

    def loss(x: Any) -> torch.Tensor:
        return x if isinstance(x, torch.Tensor) else x["loss"]

    assert torch.equal(loss(first), loss(again)) and not torch.equal(loss(first), loss(other))
    # the gradients are those of the same masks: a finite difference along the gradient of one parameter
    # (not of a tied table whose padding row has, by definition, no gradient from one of its two uses)
    tables = set(program.tied.values())
    parameter_name, grad = max((kv for kv in grads.items() if kv[0] not in tables), key=lambda kv: float(kv[1].norm()))
    parameter = dict(model.named_parameters())[parameter_name]
    step = {"llama": 1e-3, "resnet50": 1e-8}.get(name, 1e-5) / float(grad.norm())  # llama's norms are float32, a resnet has kinks
    with torch.no_grad():
        parameter += step * grad
        up, _, _ = run(program, model, (), inputs, seed=3)
        parameter -= 2 * step * grad
        down, _, _ = run(program, model, (), inputs, seed=3)
    assert float(loss(up) - loss(down)) == pytest.approx(2 * step * float(grad.norm()) ** 2, rel=1e-3)


def test_outputs_are_rebuilt() -> None:
    model, inputs = models.gpt2()
    program, returned = check(model, inputs)
    assert type(returned) is type(model(**inputs))
    assert [o.name for o in program.outputs if o.role == "output"][:3] == ["loss", "logits", "past_key_values.layers.0.keys"]
    cache = model(**inputs).past_key_values
    assert type(returned.past_key_values) is type(cache)
    close(returned.past_key_values.layers[1].values, cache.layers[1].values.detach())


def test_chosen_outputs() -> None:
    model, inputs = models.gpt2()
    program, returned = check(model, inputs, outputs=("loss",))
    assert [o.name for o in program.outputs if o.role == "output"] == ["loss"]
    assert returned.logits is None and returned.past_key_values is not None
    assert [i.name for i in program.inputs if i.role == "tangent"] == ["loss"]
    both = capture(model, {**inputs, "use_cache": False}, differentiable=("loss", "logits"))
    assert [i.name for i in both.inputs if i.role == "tangent"] == ["loss", "logits"]
    with pytest.raises(InputError, match="no output 'hidden'"):
        capture(model, inputs, outputs=("hidden",))


def test_the_same_tensor_twice() -> None:
    model, inputs = models.gpt2()
    ids = inputs["input_ids"]
    program = capture(model, {"input_ids": ids, "labels": ids})
    assert [i.name for i in program.inputs if i.role == "input"] == ["input_ids", "labels"]
    returned, _, _ = run(program, model, (), inputs)  # then called with two different ones
    close(returned.loss, model(**inputs).loss.detach())


def test_tied_weights_once() -> None:
    model, inputs = models.gpt2()
    program = capture(model, inputs)
    assert program.tied == {"lm_head.weight": "transformer.wte.weight"}
    names = [i.name for i in program.inputs if i.role == "param"]
    assert names == [n for n, _ in model.named_parameters()]
    assert [i.name for i in program.inputs if i.role == "buffer"] == [n for n, _ in model.named_buffers()]


def test_constants_in_the_call() -> None:
    model, inputs = models.gpt2()
    call = {**inputs, "use_cache": False, "attention_mask": None}
    program, returned = check(model, call)
    assert returned.past_key_values is None
    with pytest.raises(ShapeError, match="use_cache"):
        program.signature.pack((), {**inputs, "use_cache": True})
    with pytest.raises(ShapeError, match="labels"):
        program.signature.pack((), {"input_ids": inputs["input_ids"], "use_cache": False})
    assert len(program.signature.pack((inputs["input_ids"],), {"labels": inputs["labels"], "use_cache": False})) == 2


@dataclasses.dataclass
class Result:
    total: torch.Tensor
    parts: list[torch.Tensor]
    note: str = "kept"


class Many(nn.Module):
    """Returns a dataclass that no pytree knows, takes nested arguments and sums that broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(5, dtype=torch.float64))

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], *rest: torch.Tensor, scale: float = 1.0, **more: torch.Tensor) -> Result:
        x = self.fc(pair[0]) * scale + pair[1]
        for other in (*rest, *more.values()):
            x = x + other
        with torch.no_grad():
            self.steps += 1
            self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return Result(x.var(0).sum() + x.mean() + x.std(), [x, x[0]])


def test_dataclass_and_nested_arguments() -> None:
    torch.manual_seed(0)
    model = Many().double()
    x, y, z, w = torch.randn(4, 6).double(), torch.randn(4, 5).double(), torch.randn(5).double(), torch.randn(4, 1).double()
    program = capture(model, {"pair": (x, y), "scale": 2.0, "extra": w})
    assert [i.name for i in program.inputs if i.role == "input"] == ["pair.0", "pair.1", "extra"]
    program = capture(model, ((x, y), z))
    assert [o.name for o in program.outputs if o.role == "output"] == ["total", "parts.0", "parts.1"]
    returned, grads, buffers = run(program, model, ((x, y), z))
    expected = model((x, y), z)
    expected.total.backward()
    assert type(returned) is Result and returned.note == "kept" and set(buffers) == {"steps", "average"}
    close(returned.total, expected.total.detach())
    close(returned.parts[1], expected.parts[1].detach())
    close(grads["fc.weight"], model.fc.weight.grad)
    close(buffers["average"], model.average)
    assert buffers["steps"] == 1


def test_every_float_output_without_a_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double().requires_grad_()
    program = capture(model, x)
    tangent = torch.randn(5, 2).double()
    returned, grads, _ = run(program, model, (x,), tangents={"output": tangent})
    expected = model(x)
    expected.backward(tangent)
    close(returned, expected.detach())
    close(grads["input"], x.grad)
    close(grads["2.weight"], model[2].weight.grad)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"weight": True},
        {"weight": True, "label_smoothing": 0.2},
        {"reduction": "none"},
        {"soft": True},
        {"images": True},
    ],
    ids=str,
)
def test_losses(options: dict[str, Any]) -> None:
    torch.manual_seed(0)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5).double()
            self.register_buffer("weight", torch.rand(5).double())

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            keywords = {k: v for k, v in options.items() if k in ("reduction", "label_smoothing")}
            logits = self.fc(x)
            logits = logits.permute(0, 2, 1) if options.get("images") else logits
            return nn.functional.cross_entropy(logits, target, self.weight if options.get("weight") else None, **keywords).sum()

    shape = (6, 3) if options.get("images") else (6,)
    x = torch.randn(*shape, 4).double()
    target = torch.rand(6, 5).double() if options.get("soft") else torch.randint(0, 5, shape)
    if not options.get("soft"):
        target.view(-1)[1] = -100
    check(Loss(), {"x": x, "target": target})


def test_batch_norm_in_evaluation() -> None:
    model, inputs = models.resnet50(blocks=(1, 1))
    model(**inputs)
    check(model.eval(), inputs)


def test_masks_that_are_data() -> None:
    for make in (models.gpt2, models.llama, models.bert):
        model, inputs = make()
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, 5:] = 0
        mask[1, :2] = 0
        check(model, {**inputs, "attention_mask": mask})
    packed = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2]).expand(4, 8)
    check(models.llama()[0], {**inputs, "position_ids": packed})


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "bert"])
def test_no_tensor_of_all_pairs_of_positions(name: str) -> None:
    length = 4096
    model, inputs = getattr(models, name)(torch.float32, layers=1, batch=8, seq=length, device="meta")
    program = capture(model, inputs)
    for node in program.graph.nodes:
        if node.op != "output":
            assert all(v is None or list(v.shape).count(length) < 2 for v in values(node)), node.format_node()
    attention = [n for n in program.graph.nodes if str(n.target) == "autopar.attention.default"]
    assert len(attention) == 1 and attention[0].args[5] is (name != "bert") and attention[0].args[3] is None


def test_hash_is_of_the_computation() -> None:
    for name, make in models.FACTORIES.items():
        make = functools.partial(make, torch.float32, **SMALL.get(name, {}))
        model, inputs = make()
        meta, _ = make(device="meta")
        first = graph_hash(capture(model, inputs))
        assert len(first) == 16 and int(first, 16) >= 0
        assert first == graph_hash(capture(meta, {k: v.to("meta") for k, v in inputs.items()})), name
    model, inputs = models.gpt2(batch=2)
    assert graph_hash(capture(model, inputs)) != graph_hash(capture(*models.gpt2()))
    assert graph_hash(capture(models.gpt2(dropout=0.1)[0], models.gpt2()[1])) != graph_hash(capture(*models.gpt2()))


def test_capture_is_deterministic_and_copies() -> None:
    model, inputs = models.gpt2()
    one, two = capture(model, inputs), capture(model, inputs)
    assert [n.format_node() for n in one.graph.nodes] == [n.format_node() for n in two.graph.nodes]
    with one.edit() as draft:
        pass
    assert [n.name for n in draft.program.graph.nodes] == [n.name for n in one.graph.nodes]
    assert "transformer_h_0_attn_c_attn_addmm" in [n.name for n in one.graph.nodes]
    node = one.node("transformer_h_0_attn_c_attn_addmm")
    assert node.meta["module"] == "transformer.h.0.attn.c_attn" and node.meta["where"].startswith("pytorch_utils.py:")


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Item(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.max().item()


class Select(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0].sum()


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.poisson(x)


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x


@pytest.mark.parametrize(
    ("model", "line", "what"),
    [
        (Branch(), "if x.sum() > 0:", "depends on the values"),
        (Item(), "return x * x.max().item()", "depends on the values"),
        (Select(), "return x[x > 0].sum()", "depends on the values"),
        (Noise(), "return x + torch.poisson(x)", "random numbers"),
        (Writes(), "x", "writes into"),
        (Fails(), "return x @ x", "failed while"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_what_is_refused(model: nn.Module, line: str, what: str) -> None:
    with pytest.raises(CaptureError, match=what) as caught:
        capture(model, torch.ones(3, 4))
    assert line in caught.value.where and caught.value.why and caught.value.try_
    if line != "x":
        assert caught.value.where.startswith("test_tracer.py:")


@pytest.mark.parametrize("inputs", [None, {}, {"x": 3}, 7, "abc"], ids=repr)
def test_inputs_without_tensors(inputs: Any) -> None:
    with pytest.raises(InputError):
        capture(Branch(), inputs)


def test_inputs_on_two_devices() -> None:
    with pytest.raises(InputError, match="several devices"):
        capture(models.MLP(4, 4, 0.0), {"x": torch.ones(2, 4), "target": torch.ones(2, 4, device="meta")})
    with pytest.raises(InputError, match="do not fit"):
        capture(models.MLP(4, 4, 0.0), {"y": torch.ones(2, 4)})
    with pytest.raises(InputError, match="is no torch"):
        capture(lambda x: x, torch.ones(2))


class Regions(nn.Module):
    """Parts under autocast and without gradients become graphs inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.dropout = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.dropout(self.fc(self.table(x)))
        with torch.no_grad():
            z = self.dropout(self.table(x))
        return y.float().sum() + self.dropout(z).sum()


def test_regions_are_rewritten_too() -> None:
    torch.manual_seed(0)
    model, x = Regions(), torch.randint(0, 5, (2, 3))
    program = capture(model, x)
    salts = [n.args[3] for n in program.graph.nodes if str(n.target) == "autopar.dropout.default" and n.meta["phase"] == "forward"]
    assert sorted(salts) == [0, 1, 2] and not any("native_dropout" in str(n.target) for n in program.graph.nodes)
    check(model.eval(), {"x": x}, tolerance=1e-6)


def test_a_constant_without_a_value() -> None:
    model = nn.Linear(2, 2)
    model.scale = torch.ones(2, device="meta")
    with pytest.raises(CaptureError, match="scale has no value"):
        capture(model, torch.ones(2, 2))


def test_masking_code_is_restored() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    before = (masking.is_tracing, masking.is_torchdynamo_exporting, masking.find_packed_sequence_indices)
    with pytest.raises(CaptureError):
        capture(Branch(), torch.ones(3))
    assert before == (masking.is_tracing, masking.is_torchdynamo_exporting, masking.find_packed_sequence_indices)
