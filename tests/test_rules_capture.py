"""The rules on captured models: nothing is unknown, letters are as fine as the model allows, every distinct op is exact."""

from __future__ import annotations

import pytest
import torch
from models import bert, gpt2, llama, mlp, qwen2, resnet50

from netmind_autopar.ir.program import Program, is_getitem, op_name, tensor_args
from netmind_autopar.rules.algebra import strategies
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.rules.prove import prove
from netmind_autopar.tracer.capture import capture

MODELS = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "bert": bert, "resnet50": resnet50, "mlp": mlp}


@pytest.fixture(scope="module", params=sorted(MODELS))
def bound(request):
    torch.manual_seed(0)
    model, inputs = MODELS[request.param](dropout=0.1) if request.param in ("gpt2", "bert") else MODELS[request.param]()
    program = capture(model, inputs)
    return request.param, program, bind_program(program)


def calls(program: Program):
    return [n for n in program.graph.nodes if n.op == "call_function" and not is_getitem(n)]


def test_every_op_is_known_and_fits(bound):
    _, program, rules = bound
    nodes = calls(program)
    assert list(rules) == [n.name for n in nodes]
    assert {op_name(n) for n in nodes if not rules[n.name].known} == set()
    for node in nodes:
        rule = rules[node.name]
        assert len(rule.inputs) == len(tensor_args(node))
        shapes = [[torch.Size(rule.sizes[x] for x in dim).numel() for dim in term.dims] for term in rule.inputs]
        assert shapes == [list(_value(n).shape) for n in tensor_args(node)], node.name


def _value(node):
    return node.meta["val"]


def test_every_distinct_op_is_exact(bound):
    """As captured and refined, so it includes letters that the table's own cases do not have."""
    _, program, rules = bound
    seen = set()
    for node in calls(program):
        rule = rules[node.name]
        key = (op_name(node), str(rule), tuple(rule.sizes.values()), rule.adjust)
        if key in seen:
            continue
        seen.add(key)
        assert prove(rule, node, (2,)) == []
        several = [s for s in strategies(rule, (2, 2)) if "-" not in s]
        assert prove(rule, node, (2, 2), several[:: max(1, len(several) // 6)]) == []


def test_letters_are_those_of_the_model(bound):
    name, program, rules = bound
    by_op: dict[str, list] = {}
    for node in calls(program):
        by_op.setdefault(op_name(node), []).append(rules[node.name])
    if name == "gpt2":
        joined = by_op["aten.addmm.default"][0]
        assert str(joined) == "+(n.0 n.1 n.2), (m.0 m.1) k, k (n.0 n.1 n.2) -> (m.0 m.1) (n.0 n.1 n.2)"
        assert joined.sizes == {"m.0": 4, "m.1": 8, "k": 32, "n.0": 3, "n.1": 4, "n.2": 8}
        assert any(str(r) == "+n, (m.0 m.1) (k.0 k.1), (k.0 k.1) n -> (m.0 m.1) n" for r in by_op["aten.addmm.default"])
    if name in ("llama", "qwen2"):
        assert str(by_op["autopar.attention.default"][0]).startswith("b (g r) s d!, b g t! d!")
        assert any("(n.0 n.1 n.2)" in str(r) for r in by_op["aten.mm.default"] + by_op.get("aten.addmm.default", []))
    if name == "resnet50":
        assert all({"n", "i", "o"} & set(r.letters) for r in by_op["aten.convolution.default"])
    if name != "mlp" and name != "resnet50":
        assert all(set("bg") <= set(r.letters) for r in by_op["autopar.attention.default"])


def test_binding_twice_gives_the_same(bound):
    _, program, rules = bound
    assert [(k, str(r), r.sizes, r.adjust) for k, r in bind_program(program).items()] == [
        (k, str(r), r.sizes, r.adjust) for k, r in rules.items()
    ]
