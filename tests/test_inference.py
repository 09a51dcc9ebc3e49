"""Inference: forward alone is captured, planned, verified and run; caches of keys and values are written into and stay split."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from random_plans import random_plan
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from zoo import ZOO

from netmind_autopar import Plan, autoparallelize, plan, verify
from netmind_autopar.cli import main
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import CaptureError, InputError, PlanError
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.program import Program
from netmind_autopar.ir.spec import Shard, shard, unshard
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime import simulate
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.tracer.signature import flatten
from netmind_autopar.verification import compare
from netmind_autopar.verification.sides import promoted

MESHES = ("a=4", "a=3", "a=2,b=2")
RANDOM_OPS = {"dropout", "uniform", "normal", "exponential", "randint"}


def op_names(program: Program) -> set[str]:
    return {str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function" and "." in str(n.target)}


# --- what is captured and planned ------------------------------------------------------------------------------------


def call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs) if isinstance(inputs, tuple) else module(inputs)


@pytest.mark.parametrize("family", ["gpt2", "mlp"])
def test_forward_alone(family: str) -> None:
    """No tangents, no gradients, no random ops, no batch statistics; the plan's memory holds no gradient and no optimizer."""
    model, inputs = getattr(models, family)(dropout=0.2)
    model.eval()
    program = capture(model, inputs, mode="inference")
    assert program.mode == "inference"
    assert {i.role for i in program.inputs} <= {"param", "buffer", "input"} and {o.role for o in program.outputs} == {"output"}
    assert {n.meta["phase"] for n in program.graph.nodes if n.op == "call_function"} == {"forward"}
    assert not RANDOM_OPS & op_names(program)
    given = flatten(call(model, inputs))[1]
    assert [o.name for o in program.outputs] == [name or "output" for name, _ in given]
    found = plan(model, inputs, "a=1", cluster="h100-sxm", mode="inference")
    memory = found.cost.memory
    assert found.mode == "inference" and (memory.gradients, memory.optimizer) == (0, 0)
    assert memory.parameters == sum(
        t.numel() * t.dtype.itemsize for t in (*model.parameters(), *model.buffers()) if used(program, model, t)
    )
    if family == "mlp":
        assert memory.parameters < plan(model, inputs, "a=1", cluster="h100-sxm").cost.peak_bytes / 3


def test_batch_norm_reads_its_running_statistics() -> None:
    model, inputs = ZOO["resnet14"].make(torch.float64)
    program = capture(model.eval(), inputs, mode="inference")
    assert {o.role for o in program.outputs} == {"output"} and {i.role for i in program.inputs} == {"param", "buffer", "input"}
    with torch.no_grad():
        state = {i.node: value(model, i.name) for i in program.inputs if i.role != "input"}
        given = program.signature.pack(
            *((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        )
        state |= {i.node: given[i.index] for i in program.inputs if i.role == "input"}
        assert close(simulate.reference(program, state)[0], flatten(call(model, inputs))[1][0][1])


def used(program: Program, model: nn.Module, tensor: Tensor) -> bool:
    names = {i.name for i in program.inputs}
    return any(t is tensor and n in names for n, t in (*model.named_parameters(), *model.named_buffers()))


def test_a_deep_model_is_folded_alike() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.norm(x)).relu()

    model, x = nn.Sequential(nn.Linear(4, 6), nn.Sequential(*(Block() for _ in range(18))), nn.Linear(6, 2)), torch.randn(3, 4)
    full, folded = (capture(model, x, mode="inference", fold=fold) for fold in (False, True))
    assert graph_hash(full) == graph_hash(folded) and full.outputs == folded.outputs
    assert [n.name for n in full.graph.nodes] == [n.name for n in folded.graph.nodes] and folded.mode == "inference"


def test_training_mode_can_be_inferred_too() -> None:
    """A model left in training mode: dropout drops, batch norm's statistics come back; `verify` compares both."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    program = capture(model, x, mode="inference")
    assert sorted(o.role for o in program.outputs) == ["mutation", "mutation", "mutation", "output"]
    for mesh in MESHES:
        check(model, x, program, mesh, steps=2)
    dropping = capture(nn.Dropout(0.5), x, mode="inference")
    assert {i.role for i in dropping.inputs} == {"input", "seed"}


# --- exactness -------------------------------------------------------------------------------------------------------


def check(model: nn.Module, inputs: Any, program: Program, mesh: str, *, seed: int = 0, steps: int = 1, placed: str = "global") -> None:
    rules = bind_program(program)
    found = random_plan(program, rules, mesh, seed, inputs=placed)
    report = compare(model, inputs, program, lower(program, rules, found), found, steps=steps)
    wrong = [f"{row.kind} {row.name} {row.error:.2g}" for row in report.rows if not row.error <= row.tolerance]
    assert report.ok, f"{wrong[:4]} {report.first_difference}"
    assert {row.kind for row in report.rows} <= {"output", "buffer"} and report.rows


NAMES = sorted(ZOO)
CASES = [(name, mesh) for name in NAMES for mesh in (*MESHES, "a=2,b=2,c=2")]
QUICK_CASES = {(name, ("a=4", "a=3", "a=2,b=2")[i % 3]) for i, name in enumerate(NAMES[1::7])}


@pytest.mark.parametrize(
    ("name", "mesh"), [pytest.param(*c, marks=() if c in QUICK_CASES else pytest.mark.slow, id="-".join(c)) for c in CASES]
)
def test_the_zoo_infers_exactly(name: str, mesh: str) -> None:
    model, inputs = ZOO[name].make(torch.float64)
    options = {k: v for k, v in ZOO[name].options.items() if k != "differentiable"}
    program = capture(model.eval(), inputs, mode="inference", **options)
    assert not any(o.role == "grad" for o in program.outputs)
    check(model, inputs, program, mesh, seed=NAMES.index(name))


def test_verify_reads_the_mode_from_the_plan() -> None:
    model, inputs = models.gpt2(dtype=torch.float64)
    model.eval()
    found = plan(model, inputs, "a=2,b=2", cluster="h100-sxm", mode="inference", random_costs=3)
    report = verify(model, inputs, Plan.loads(found.dumps()))
    assert report.ok and {row.kind for row in report.rows} == {"output", "emitted output"}


# --- decoding with a cache -------------------------------------------------------------------------------------------

BATCH, PROMPT, LONGEST, STEPS = 3, 4, 12, 5


def language_model(family: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=65, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, initializer_range=0.3
        )
        return GPT2LMHeadModel(config).double().eval()
    config = LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def prefilled(model: Any, kind: str, longest: int = LONGEST) -> tuple[Tensor, Any]:
    """The first token to decode, [BATCH, 1], and the model's own cache after a prompt."""
    from transformers import DynamicCache, StaticCache

    cache = StaticCache(config=model.config, max_cache_len=longest) if kind == "static" else DynamicCache(config=model.config)
    prompt = torch.arange(BATCH * PROMPT).view(BATCH, PROMPT) * 7 % 65
    logits = model(input_ids=prompt, past_key_values=cache).logits
    return logits[:, -1].argmax(-1, keepdim=True), cache


@torch.no_grad()
def eager_decode(model: Any, kind: str, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """(token, logits) of every step."""
    token, cache = prefilled(model, kind)
    out = []
    for _ in range(steps):
        logits = model(input_ids=token, past_key_values=cache).logits
        out.append((token, logits))
        token = logits[:, -1].argmax(-1, keepdim=True)
    return out


class Lockstep:
    """A decode step planned on a mesh, all ranks in lockstep. `cache` holds every rank's own piece, fed back as it came out."""

    def __init__(self, program: Program, found: Plan, model: Any, cache: list[tuple[str, Tensor]]) -> None:
        self.program, self.plan = program, found
        self.lowered = lower(program, bind_program(program), found)
        self.state = {i.node: self.split(i.node, value(model, i.name)) for i in program.inputs if i.role in ("param", "buffer")}
        self.nodes = {i.name: i.node for i in program.inputs if i.role == "input"}
        self.state |= {self.nodes[path]: self.split(self.nodes[path], tensor) for path, tensor in cache}

    def split(self, node: str, tensor: Tensor) -> list[Tensor]:
        spec = self.lowered.specs[node]
        return [shard(tensor.detach(), spec, self.plan.sizes, c).clone() for c in coordinates(self.plan.sizes)]  # type: ignore[arg-type]

    def __call__(self, token: Tensor) -> Tensor:
        self.state[self.nodes["input_ids"]] = self.split(self.nodes["input_ids"], token)
        found = simulate.no_grad_run(self.lowered, self.plan.sizes, self.state)
        for out, pieces in zip(self.program.outputs, found, strict=True):
            if out.role == "mutation":
                self.state[self.nodes[out.name]] = [t.clone() for t in pieces]
        at = next(i for i, o in enumerate(self.program.outputs) if o.name == "logits")
        return unshard(found[at], self.lowered.expects["output"][at], self.plan.sizes)

    def widened(self) -> Lockstep:
        """The same with its float32 places in float64."""
        self.program, self.lowered = promoted(self.program), promoted(self.lowered)
        return self


def value(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


@torch.no_grad()
def captured_decode(program: Program, model: Any, token: Tensor, cache: list[tuple[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Greedy decoding by the captured graph on one device."""
    nodes = {i.name: i.node for i in program.inputs if i.role == "input"}
    state = {i.node: value(model, i.name).detach() for i in program.inputs if i.role in ("param", "buffer")}
    state |= {nodes[path]: tensor.clone() for path, tensor in cache}
    out = []
    for _ in range(STEPS):
        state[nodes["input_ids"]] = token
        results = simulate.reference(program, state)
        state |= {nodes[o.name]: v for o, v in zip(program.outputs, results, strict=True) if o.role == "mutation"}
        logits = next(v for o, v in zip(program.outputs, results, strict=True) if o.name == "logits")
        out.append((token, logits))
        token = logits[:, -1].argmax(-1, keepdim=True)
    return out


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


DECODED = [(family, mesh) for family in ("gpt2", "llama") for mesh in MESHES]
SLOW = {("llama", "a=4"), ("llama", "a=3")}


@pytest.mark.parametrize(("family", "mesh"), [pytest.param(*c, marks=pytest.mark.slow if c in SLOW else ()) for c in DECODED])
def test_greedy_decoding_with_a_static_cache(family: str, mesh: str) -> None:
    """The unmodified model with its own cache object, one plan for all steps; tokens and logits are the eager model's.

    Llama computes its norms in float32 even in a float64 model, so its eager logits agree within float32's rounding only; with
    those places in float64 the captured graph and the ranks agree within float64's.
    """
    model = language_model(family)
    token, cache = prefilled(model, "static")
    program = capture(model, {"input_ids": token, "past_key_values": cache}, mode="inference")
    written = {o.name for o in program.outputs if o.role == "mutation"}
    tensors = flatten(cache, "past_key_values")[1]
    assert written == {path for path, _ in tensors} and len(written) == 6
    rules = bind_program(program)
    eager = eager_decode(model, "static")
    assert len({int(t) for token, _ in eager for t in token}) > 3  # or any model would do
    plans = [random_plan(program, rules, mesh, seed, inputs=placed) for seed, placed in ((0, "local"), (1, "global"))]
    plans.append(solve(program, rules, make_mesh(mesh, "h100-sxm"), graph_hash=graph_hash(program), inputs="local"))
    for found in plans:
        ranks, exact = (Lockstep(program, found, model, tensors) for _ in range(2))
        exact.widened()
        wide = captured_decode(promoted(program), model, token, tensors)
        for (given, logits), (_, wide_logits) in zip(eager, wide, strict=True):
            have = ranks(given)
            assert torch.equal(have[:, -1].argmax(-1), logits[:, -1].argmax(-1))
            assert close(have, logits, 1e-9 if family == "gpt2" else 1e-5)
            assert close(exact(given), wide_logits)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [MESHES[2], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[:2])])
def test_decoding_with_a_growing_cache(family: str, mesh: str) -> None:
    """DynamicCache: a longer cache is another shape and so another plan; each step is exact against the eager model."""
    model = language_model(family)
    token, cache = prefilled(model, "dynamic")
    for step, (given, logits) in enumerate(eager_decode(model, "dynamic", 3)):
        assert torch.equal(given, token)
        inputs = {"input_ids": token, "past_key_values": copy.deepcopy(cache)}
        program = capture(model, inputs, mode="inference")
        grown = program.node(next(o.node for o in program.outputs if o.name == "past_key_values.layers.1.values")).meta["val"]
        assert {o.role for o in program.outputs} == {"output"} and grown.shape[2] == PROMPT + step + 1
        check(model, inputs, program, mesh, seed=step, placed=("local", "global")[step % 2])
        with torch.no_grad():
            assert torch.equal(model(input_ids=token, past_key_values=cache).logits, logits)
        token = logits[:, -1].argmax(-1, keepdim=True)


def test_the_first_call_fills_an_empty_cache() -> None:
    from transformers import DynamicCache, StaticCache

    model = language_model("gpt2")
    prompt = torch.arange(8).view(2, 4)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LONGEST)):
        inputs = {"input_ids": prompt, "past_key_values": cache}
        program = capture(model, inputs, mode="inference")
        assert not any(layer.is_initialized for layer in cache.layers), "capture changed the caller's cache"
        assert "past_key_values.layers.1.values" in {o.name for o in program.outputs}
        check(model, inputs, program, "a=2,b=2")


def test_a_split_cache_stays_split() -> None:
    """Where splitting pays, the cache lies the same before and after a step, so that one step's result is the next one's input."""
    model = language_model("gpt2")
    token, cache = prefilled(model, "static", longest=4096)
    inputs = {"input_ids": token, "past_key_values": cache}
    program = capture(model, inputs, mode="inference")
    rules = bind_program(program)
    least = None
    for limit in (None, "half"):
        bytes_ = None if limit is None else int(least * 0.6)
        found = solve(
            program, rules, make_mesh("a=4", "h100-sxm"), graph_hash=graph_hash(program), inputs="local", memory_limit=bytes_ or 1 << 40
        )
        least = found.cost.peak_bytes if least is None else least
    lowered = lower(program, rules, found)
    nodes = {i.name: i.node for i in program.inputs}
    split = 0
    for out, spec in zip(program.outputs, lowered.expects["output"], strict=True):
        if out.role == "mutation":
            assert spec == lowered.specs[nodes[out.name]]
            split += any(isinstance(p, Shard) for p in spec.placements)
    assert split >= 2


# --- the module that runs --------------------------------------------------------------------------------------------


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_the_module_returns_what_eager_does(mesh: DeviceMesh) -> None:
    model, inputs = models.gpt2(dtype=torch.float64, dropout=0.3)
    pm = autoparallelize(model.eval(), inputs, mesh, mode="inference")
    assert not pm.training and pm.plan.mode == "inference" and "backward" not in pm.code()
    with torch.no_grad():
        ours, theirs = pm(**inputs), model(**inputs)
    for (name, a), (_, b) in zip(flatten(ours)[1], flatten(theirs)[1], strict=True):
        assert close(full(a), b, 1e-12) and not a.requires_grad, name


def test_backward_is_refused(mesh: DeviceMesh) -> None:
    model, inputs = models.gpt2()
    pm = autoparallelize(model.eval(), inputs, mesh, mode="inference")
    with pytest.raises(InputError, match="inference") as error:
        pm(**inputs).loss.backward()
    assert 'mode="training"' in error.value.try_
    out = pm(**inputs)
    with pytest.raises(InputError, match="inference"):
        out.logits.sum().backward()


def test_the_other_mode_of_the_model_is_refused(mesh: DeviceMesh) -> None:
    model, inputs = models.mlp(dropout=0.5)
    pm = autoparallelize(model.eval(), inputs, mesh, mode="inference", strict_shapes=True)
    pm.train()
    with pytest.raises(InputError, match="eval mode"):
        call(pm, inputs)
    pm.eval()
    with torch.no_grad():
        assert torch.equal(full(call(pm, inputs)), call(model, inputs))


def test_plans_do_not_cross_modes(mesh: DeviceMesh) -> None:
    model, inputs = models.mlp()
    model.eval()
    for one, other in (("training", "inference"), ("inference", "training")):
        found = plan(model, inputs, "dp=1", cluster="h100-sxm", mode=one)  # type: ignore[arg-type]
        assert Plan.loads(found.dumps()) == found and f'"mode": "{one}"' in found.dumps()
        with pytest.raises(PlanError, match=one) as error:
            autoparallelize(model, inputs, mesh, plan=found, mode=other)  # type: ignore[arg-type]
        assert f'mode="{one}"' in error.value.try_


def test_bad_modes() -> None:
    model, inputs = models.mlp()
    with pytest.raises(InputError, match="mode 'test'"):
        capture(model, inputs, mode="test")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="differentiable"):
        capture(model, inputs, mode="inference", differentiable=("output",))


class Writer(nn.Module):
    """Writes into an input that it does not return, into one that it returns, and into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4).double()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, seen: Tensor, cache: dict[str, Tensor]) -> dict[str, Any]:
        y = self.fc(x)
        seen.add_(y)
        cache["k"].index_copy_(1, self.count.view(1), y.unsqueeze(1))
        self.count += 1
        return {"y": y * cache["k"].sum(1), "cache": cache, "old": x[:1]}


def writer_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    draw = torch.randn
    return {"x": draw(4, 4).double(), "seen": draw(4, 4).double(), "cache": {"k": draw(4, 5, 4).double()}}


def test_training_refuses_what_inference_allows() -> None:
    class Adds(nn.Linear):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            seen.add_(1)
            return super().forward(x).sum()

    with pytest.raises(CaptureError) as error:
        capture(Adds(4, 4), (torch.ones(2, 4), torch.ones(3)))
    assert "in place" in str(error.value) or "writes" in str(error.value)
    assert "inference" in error.value.try_
    program = capture(Writer(), writer_inputs(), mode="inference")
    written = {(o.name, o.index) for o in program.outputs if o.role == "mutation"}
    assert written == {("count", -1), ("seen", 1), ("cache.k", 2)}
    for name in MESHES:
        check(Writer(), writer_inputs(), program, name, steps=3, placed="local")


def test_inputs_are_written_into(mesh: DeviceMesh) -> None:
    """As in eager mode: plain tensors and DTensors of the caller hold the new values, and a DTensor comes back as itself."""
    model = Writer()
    original = copy.deepcopy(model)
    pm = autoparallelize(model, writer_inputs(), mesh, mode="inference", inputs="local")
    ours, theirs = writer_inputs(), writer_inputs()
    with torch.no_grad():
        for _ in range(3):
            a, b = pm(**ours), original(**theirs)
            assert torch.equal(full(a["y"]), b["y"]) and torch.equal(full(a["cache"]["k"]), b["cache"]["k"])
            assert torch.equal(ours["seen"], theirs["seen"]) and torch.equal(ours["cache"]["k"], theirs["cache"]["k"])
            assert torch.equal(pm.get_buffer("count"), original.count)
        _, placed = pm.shard_inputs(**ours)
        assert all(isinstance(t, DTensor) for _, t in flatten(placed)[1])
        a, b = pm(**placed), original(**theirs)
    assert a["cache"]["k"] is placed["cache"]["k"] and torch.equal(full(a["cache"]["k"]), theirs["cache"]["k"])
    assert torch.equal(full(placed["seen"]), theirs["seen"]) and torch.equal(full(a["y"]), b["y"])
    assert torch.equal(ours["seen"], placed["seen"].full_tensor()) is False  # the caller's plain tensor was copied, not shared


def test_decoding_through_the_module(mesh: DeviceMesh) -> None:
    """The usual loop: a cache object is handed in again and again, and is written into."""
    model = language_model("gpt2")
    token, cache = prefilled(model, "static")
    pm = autoparallelize(model, {"input_ids": token, "past_key_values": cache}, mesh, mode="inference")
    eager = eager_decode(model, "static")
    kept = copy.deepcopy(cache)
    with torch.no_grad():
        for given, logits in eager:  # the caller's own cache
            assert torch.equal(given, token)
            token = full(pm(input_ids=token, past_key_values=cache).logits)[:, -1].argmax(-1, keepdim=True)
            assert torch.equal(token, logits[:, -1].argmax(-1, keepdim=True))
        _, call = pm.shard_inputs(input_ids=eager[0][0], past_key_values=kept)
        for _, logits in eager:  # the cache that came back
            result = pm(**call)
            assert close(full(result.logits), logits)
            call["input_ids"], call["past_key_values"] = full(result.logits)[:, -1].argmax(-1, keepdim=True), result.past_key_values


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "net.py", tmp_path / "plan.json"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def model():\n    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).eval()\n\n"
        "def sample_inputs():\n    return torch.ones(8, 8)\n"
    )
    assert main(["plan", str(file), "--mesh", "a=2", "--cluster", "h100-sxm", "--mode", "inference", "--json", str(out)]) == 0
    assert Plan.load(out).mode == "inference"
    assert main(["verify", str(file), "--plan", str(out)]) == 0
    assert main(["verify", str(file), "--plan", str(out), "--dtype", "float64"]) == 0
    assert main(["explain", str(out), str(file)]) == 0
    assert "2" in capsys.readouterr().out
    assert main(["plan", str(file), "--mesh", "a=2", "--mode", "dreaming"]) == 2
