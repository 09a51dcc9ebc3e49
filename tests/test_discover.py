"""Rules found by running: all letters of honest ops, none of ops that only look splittable; caches, rules by hand, whole models."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import discover_ops as ops
import pytest
import torch
from discover_ops import F
from random_plans import random_plan

from netmind_autopar import register_rule
from netmind_autopar.costs.compute import node_seconds
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.ir.errors import InputError, RuleError, UnknownOpError
from netmind_autopar.ir.program import op_name
from netmind_autopar.passes.emit import emit
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules import cache, learnt
from netmind_autopar.rules.algebra import Rule
from netmind_autopar.rules.bind import bind_program, learnt_rules, unlisted
from netmind_autopar.rules.call import Call, call_of
from netmind_autopar.rules.discover import Found, discover
from netmind_autopar.rules.prove import prove
from netmind_autopar.rules.table import rule_for, rule_of
from netmind_autopar.solver.solve import solve
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.verification import compare

EXAMPLES = Path(__file__).parent.parent / "examples"


def shown(rule: Rule | str) -> str:
    """The rule with letters named in order, and "!" for what never splits."""
    text = re.sub(r"\b[a-z]\w*!", "!", str(rule))
    names: dict[str, str] = {}
    head, semicolon, reduce = text.partition(" ;")
    return re.sub(r"\b[a-z]\w*\b", lambda m: names.setdefault(m[0], "abcdefghijklmnop"[len(names)]), head) + semicolon + reduce


@functools.cache
def found_for(target: Any, number: int) -> tuple[Call, Found]:
    args = next(args for op, _, args in [*ops.HONEST, *ops.FALSE] if op is target)
    call = ops.call_of_op(target, args)
    return call, discover(call)


def names(table: list[tuple[Any, str, tuple[Any, ...]]]) -> list[Any]:
    return [pytest.param(op, rule, id=op.name().partition("::")[2]) for op, rule, _ in table]


@pytest.mark.parametrize(("target", "rule"), names(ops.HONEST))
def test_honest_ops_get_all_their_letters(target: Any, rule: str) -> None:
    call, found = found_for(target, 0)
    assert found.pattern, found.why
    assert shown(found.rule(call)) == shown(rule)


@pytest.mark.parametrize(("target", "most"), names(ops.FALSE))
def test_what_only_looks_splittable_is_refused(target: Any, most: str) -> None:
    call, found = found_for(target, 0)
    if found.pattern:
        assert shown(found.rule(call)) == shown(most)
    else:
        assert not re.search(r"[a-z+*]", most.partition(";")[0].replace("->", "")), found.why
        assert found.why


@pytest.mark.parametrize(("target", "rule"), names(ops.HONEST))
def test_found_rules_are_exact_on_other_numbers(target: Any, rule: str) -> None:
    """As rows of the table are proven: at sizes and with numbers that the search did not see."""
    found = found_for(target, 0)[1]
    shrunk = {1: 1, 2: 2, 3: 3, 4: 4, 8: 4, 16: 8, 32: 16, 48: 20, 50: 9, 64: 12, 128: 28, 256: 18, 512: 24}
    shrunk |= {1000: 22, 1024: 36, 4096: 44, 5000: 31}

    def small(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return F(*(shrunk[n] for n in value.shape), dtype=value.dtype)
        return [small(v) for v in value] if isinstance(value, list) else shrunk.get(value, value)

    other = ops.call_of_op(target, tuple(map(small, next(args for op, _, args in ops.HONEST if op is target))))
    sizes = tuple((name, shrunk[n]) for name, n in found.sizes)
    bound = Found(found.pattern, sizes, found.adjust).rule(other)
    for mesh in ((2,), (4,), (3, 2)):
        assert prove(bound, other, mesh, seed=3) == []


def test_the_search_is_deterministic_and_leaves_the_random_state() -> None:
    target, _, args = ops.HONEST[1]
    call = ops.call_of_op(target, args)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = discover(call)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    assert discover(call) == first


def test_an_op_that_draws_random_numbers_is_an_error() -> None:
    target, _, args = next(x for x in ops.FALSE if "dropout_seldom" in str(x[0]))
    with pytest.raises(UnknownOpError, match="draws random numbers"):
        rule_of(ops.call_of_op(target, args))


def test_ops_that_do_not_run_here() -> None:
    @torch.library.custom_op("probe::only_cuda", mutates_args=(), device_types="cuda")
    def only_cuda(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    only_cuda.register_fake(torch.empty_like)

    def fails(x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "meta":
            raise KeyError("no")
        return torch.empty_like(x)

    def sleeps(x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "meta":
            end = time.thread_time() + 0.6
            while time.thread_time() < end:
                pass
        return x.clone()

    for target, why in (
        (torch.ops.probe.only_cuda.default, "does not run on small CPU tensors"),
        (ops.op(fails), "KeyError"),
        (ops.op(sleeps), "takes long"),
    ):
        start = time.thread_time()
        rule = rule_of(Call(target, (F(8, 16),), {}, (F(8, 16),)))
        assert not rule.known and why in rule.why and rule.symbols == ("-",)
        assert time.thread_time() - start < 8


# --- rules by hand ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learnt, "_GIVEN", {})


def _attend(name: str) -> Call:
    target, _, args = next(x for x in ops.HONEST if name in str(x[0]))
    return ops.call_of_op(target, args)


@pytest.mark.usefixtures("given")
def test_a_rule_by_hand_is_used_once_proven() -> None:
    register_rule("probe::rms_norm", "b s d!, d! -> b s d!")
    assert str(rule_of(_attend("rms_norm.default"))) == "b s d!, d! -> b s d!"
    register_rule("probe::fused_heads", "b s (h d!), b t! (h d!), b t! (h e) -> b s (h e) | heads=size:h")
    assert rule_of(_attend("fused_heads")).adjust == ((3, "size:h"),)


@pytest.mark.usefixtures("given")
def test_a_wrong_rule_by_hand_is_refused_with_a_counterexample() -> None:
    register_rule("probe::rms_norm", "b s d, d -> b s d")
    with pytest.raises(RuleError) as caught:
        rule_of(_attend("rms_norm.default"))
    text = str(caught.value)
    assert "register_rule('probe::rms_norm', 'b s d, d -> b s d')" in text
    assert re.search(r"on \(\d\,\) split d: .*for shapes", text)
    register_rule("probe::rms_norm", "b s, d -> b s")
    with pytest.raises(RuleError, match="does not fit"):
        rule_of(_attend("rms_norm.default"))


@pytest.mark.usefixtures("given")
def test_a_rule_that_cannot_be_proven_must_be_trusted() -> None:
    @torch.library.custom_op("probe::cuda_twice", mutates_args=(), device_types="cuda")
    def cuda_twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    call = Call(torch.ops.probe.cuda_twice.default, (F(8, 16),), {}, (F(8, 16),))
    register_rule("probe::cuda_twice", "+a b -> a b")
    with pytest.raises(RuleError, match="trusted=True"):
        rule_of(call)
    register_rule("probe::cuda_twice", "+a b -> a b", trusted=True)
    assert rule_of(call).symbols == ("-", "a", "b", "+")


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("op", "rule"),
    [
        ("rms_norm", "a -> a"),
        ("aten::mm", "m k, k n -> m n"),
        ("probe::x", "a, b"),
        ("probe::x", "a -> a | n=size:q"),
        ("probe::x", "a@ -> a"),
    ],
)
def test_rules_that_make_no_sense(op: str, rule: str) -> None:
    with pytest.raises(InputError, match="register_rule"):
        register_rule(op, rule)


# --- the cache ----------------------------------------------------------------------------------------------------------------


KERNEL = """
import torch
{helper}
@torch.library.custom_op("cached::kernel", mutates_args=())
def kernel(x: torch.Tensor) -> torch.Tensor:
    return {body}
kernel.register_fake(torch.empty_like)
"""


class Kernel:
    """A user's module with one op, written anew for every question, as if each were asked by a new process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.searches = folder, monkeypatch, 0
        monkeypatch.setenv("AUTOPAR_CACHE", str(folder / "cache"))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(learnt, "discover", self.search)

    def search(self, call: Call) -> Found:
        self.searches += 1
        return discover(call)

    def ask(self, body: str, helper: str = "") -> tuple[str, int]:
        """The rule that is found for the kernel, and how often it was searched."""
        (self.folder / "user_kernel.py").write_text(KERNEL.format(body=body, helper=helper))
        self.patch.setattr(learnt, "_FOUND", {})
        for name in ("user_kernel", "user_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        self.patch.setattr(sys, "dont_write_bytecode", True)
        importlib.import_module("user_kernel")
        self.searches, x = 0, F(64, 32)
        return str(rule_of(Call(torch.ops.cached.kernel.default, (x,), {}, (x,)))), self.searches


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_an_edited_kernel_is_searched_again(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.ask("torch.tanh(x)") == ("a b -> a b", 1)
    start = time.process_time()
    assert kernel.ask("torch.tanh(x)") == ("a b -> a b", 0)
    assert time.process_time() - start < 0.5  # with the import; the look-up takes some 20 ms
    assert kernel.ask("torch.tanh(x) - x.tanh().mean(0)") == ("a! b -> c! b", 1)
    helper = "def inner(x): return torch.tanh(x){}"
    assert kernel.ask("inner(x)", helper.format("")) == ("a b -> a b", 1)
    assert kernel.ask("inner(x)", helper.format(".cumsum(1)")) == ("a b! -> a c!", 1)  # the kernel's own lines are as before
    for tail, rule in (("", "a b -> a b"), (".cumsum(1)", "a b! -> a c!")):
        (tmp_path / "user_helper.py").write_text("import torch\n" + helper.format(tail))
        assert kernel.ask("user_helper.inner(x)", "import user_helper") == (rule, 1)
        assert kernel.ask("user_helper.inner(x)", "import user_helper") == (rule, 0)


def test_damaged_files_and_folders_without_rights(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.ask("torch.tanh(x)")[1] == 1
    (file,) = (tmp_path / "cache" / "rules").iterdir()
    good = file.read_text()
    wrong = json.loads(good)
    wrong["found"]["pattern"] = "+a b -> b a"  # well-formed, but not true: seen when it is tried
    foreign = json.loads(good)
    foreign["key"]["op"] = "another.op"
    texts = ["", good[:40], "[]", "[" * 5000, json.dumps(wrong), json.dumps(foreign), good.replace('"why": ""', '"why": 3')]
    for text in texts:
        file.write_text(text)
        assert kernel.ask("torch.tanh(x)") == ("a b -> a b", 1), text[:60]
        assert file.read_text() == good
    file.write_bytes(b"\xff\xfe\x00")
    assert kernel.ask("torch.tanh(x)")[1] == 1
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("AUTOPAR_CACHE", str(blocked))
    assert kernel.ask("torch.tanh(x)") == ("a b -> a b", 1)
    monkeypatch.setenv("AUTOPAR_CACHE", "off")
    assert kernel.ask("torch.tanh(x)") == ("a b -> a b", 1)
    monkeypatch.setenv("AUTOPAR_DISCOVER", "0")
    assert kernel.ask("torch.tanh(x)") == ("a! b! -> c! d!", 0)


def test_a_kernel_whose_code_cannot_be_had_is_not_remembered_on_disk(kernel: Kernel, tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec("def hidden(x: 'torch.Tensor') -> 'torch.Tensor':\n    return x.exp()", {**scope, "torch": torch}, scope)
    scope["hidden"].__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}
    target = ops.op(scope["hidden"])
    assert str(rule_of(Call(target, (F(8, 16),), {}, (F(8, 16),)))) == "a b -> a b"
    assert kernel.searches == 1 and not (tmp_path / "cache").exists()


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    key, found = {"op": "a/b::c", "n": [1]}, Found("(a b) -> a b", (("a", 3),), (("n", "size:a"),))
    cache.store(key, found)
    assert cache.load(key) == found and cache.load({**key, "n": [2]}) is None

    def torn(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", torn)
    cache.store(key, Found("a -> a"))
    assert cache.load(key) == found and len(list((tmp_path / "rules").iterdir())) == 1


# --- whole models -------------------------------------------------------------------------------------------------------------


@functools.cache
def example() -> tuple[torch.nn.Module, torch.Tensor, Any, dict[str, Rule]]:
    """examples/custom_op.py, small and in float64: captured, with its rules."""
    spec = importlib.util.spec_from_file_location("custom_op_example", EXAMPLES / "custom_op.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_op_example"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model, x = module.tiny().double(), module.tiny_inputs().double()
    program = capture(model, x)
    return model, x, program, bind_program(program)


def test_rules_of_the_example() -> None:
    program = example()[2]
    rules = {op.split(".")[1]: rule for op, rule in learnt_rules(program)}
    assert {op: shown(rule_for(next(n for n in unlisted(program) if f".{op}." in op_name(n)))) for op in rules} == {
        "gated_norm": "a b !, a b !, *! -> a b !",
        "gated_norm_backward": "*a b !, a b !, a b !, ! -> a b !, a b !, !",
        "energy": "a b c -> ",
        "energy_backward": "*, *a b c -> a b c",
    }


@pytest.mark.parametrize("mesh", ["a=4", "a=3", "a=2,b=2"])
@pytest.mark.parametrize("seed", range(4))
def test_random_plans_of_a_model_with_custom_ops(mesh: str, seed: int) -> None:
    model, x, program, rules = example()
    plan = random_plan(program, rules, mesh, seed)
    assert any("gated_norm" in name or "energy" in name for name in plan.choices)
    report = compare(model, (x,), program, lower(program, rules, plan), plan)
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"
    assert report.max_rel_error < 1e-9


def test_the_chosen_plan_splits_the_custom_ops() -> None:
    model, x, program, rules = example()
    plan = solve(program, rules, make_mesh("a=4", "h100-sxm"), graph_hash=graph_hash(program), random_costs=1)
    split = {name for name, choice in plan.choices.items() if ("gated_norm" in name or "energy" in name) and choice != "-"}
    assert split and not plan.replicated
    report = compare(model, (x,), program, lower(program, rules, plan), plan, steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    assert report.ok, f"{report.max_rel_error:.2g} {report.first_difference}"


def test_emitted_code_names_the_users_ops() -> None:
    program, rules = example()[2:]
    plan = random_plan(program, rules, "a=2", 0)
    source = emit(lower(program, rules, plan), plan)
    for op in ("gated_norm", "gated_norm_backward", "energy", "energy_backward"):
        assert len(re.findall(rf"= torch\.ops\.custom_op_example\.{op}\.default\(", source)) == (2 if "gated" in op else 1)


def test_what_replicated_ops_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds in the plan are those of the nodes themselves, run whole; with the others they make up the step."""
    monkeypatch.setenv("AUTOPAR_DISCOVER", "0")
    program = example()[2]
    rules, mesh = bind_program(program), make_mesh("a=4", "h100-sxm")
    plan = solve(program, rules, mesh, graph_hash=graph_hash(program))
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and "custom_op_example" in op_name(n)]
    assert sum(r.count for r in plan.replicated) == len(nodes) == 6
    expected = sum(node_seconds(n, rules[n.name], ("-",), mesh) for n in nodes)
    assert math.isclose(sum(r.seconds for r in plan.replicated), expected, rel_tol=1e-9)
    assert 0 < expected < plan.cost.compute_s
    assert all(r.why == "AUTOPAR_DISCOVER=0" and "custom_op.py:" in r.where for r in plan.replicated)


def test_all_ranks_use_what_rank_zero_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learnt, "_TOLD", {})
    nodes = unlisted(example()[2])
    calls, before = [call_of(n) for n in nodes], [str(rule_for(n)) for n in nodes]
    monkeypatch.setattr(learnt, "_FOUND", {})
    sent: list[str] = []
    learnt.share(calls, lambda make: sent.append(make()) or sent[0])
    monkeypatch.setattr(learnt, "_FOUND", {})
    monkeypatch.setattr(learnt, "discover", lambda call: pytest.fail("another rank searched"))
    learnt.share(calls, lambda make: sent[0])
    assert [str(rule_for(n)) for n in nodes] == before
    assert len(learnt._TOLD) == len(nodes)


WORKER = """
import copy, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
rank, world, store, example = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
sys.path.insert(0, example)
import custom_op
from netmind_autopar import autoparallelize
from netmind_autopar.rules import learnt
searched, search = [], learnt.discover
learnt.discover = lambda call: searched.append(call) or search(call)
torch.manual_seed(0)
model, x = custom_op.tiny().double(), custom_op.tiny_inputs().double()
original = copy.deepcopy(model)
pm = autoparallelize(model, x, init_device_mesh("cpu", (world,), mesh_dim_names=("a",)), random_costs=1)
loss, expected = pm(x), original(x)
loss.backward()
expected.backward()
torch.testing.assert_close(getattr(loss, "full_tensor", lambda: loss)(), expected, rtol=1e-9, atol=1e-12)
grads = dict(pm.named_parameters())
for name, p in original.named_parameters():
    torch.testing.assert_close(grads[name].grad.full_tensor(), p.grad, rtol=1e-9, atol=1e-12)
assert any(("gated_norm" in k or "energy" in k) and v != "-" for k, v in pm.plan.choices.items())
assert bool(searched) == (rank == 0)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.gloo
def test_real_processes_share_one_search(tmp_path: Path) -> None:
    env = {**os.environ, "AUTOPAR_CACHE": "off", "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "store"), str(EXAMPLES)]
    started = [subprocess.Popen([sys.executable, "-c", WORKER, str(r), "3", *arguments], env=env, stderr=subprocess.PIPE) for r in range(3)]
    errors = [p.communicate(timeout=400)[1].decode() for p in started]
    assert [p.returncode for p in started] == [0, 0, 0], "\n".join(errors)[-3000:]
