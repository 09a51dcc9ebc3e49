"""What is priced is what is emitted: conversions, bytes and specs of lowered programs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_exact import captured, planned

from netmind_autopar.ir.errors import GraphError
from netmind_autopar.ir.mesh import coordinates
from netmind_autopar.ir.spec import local_bytes, local_shape, parse_spec
from netmind_autopar.passes.bucket import bucket_gradients
from netmind_autopar.passes.emit import emit
from netmind_autopar.passes.pipeline import check, lower
from netmind_autopar.runtime.collectives import BUCKETS, LOCAL_KINDS, MOVES, sent_bytes, stage


def emitted_bytes(lowered, sizes: tuple[int, ...]) -> Counter:
    """Bytes that rank 0 really packs for every wire, by (kind, axis, phase)."""
    found: Counter = Counter()
    coord = next(iter(coordinates(sizes)))
    for node in lowered.graph.nodes:
        if node.target in MOVES and node.args[1] not in LOCAL_KINDS:
            _, kind, axis, before, after = node.args
            step = stage(kind, axis, before, after, sizes, coord)
            spec = parse_spec(before)
            packed = step.pack(torch.empty(local_shape(spec, sizes, coord), dtype=spec.dtype))
            found[kind, axis, node.meta["phase"]] += sent_bytes(kind, packed, sizes[axis], step.send, 0)
        elif node.target in BUCKETS:
            total = sum(local_bytes(parse_spec(s), sizes) for s in node.meta["specs"])
            found["all_reduce", node.args[1], "backward"] += 2 * total * (sizes[node.args[1]] - 1) // sizes[node.args[1]]
    return found


@pytest.mark.parametrize("mesh", ["a=4", "a=2,b=2", "a=3"])
@pytest.mark.parametrize("random_costs", [None, 1], ids=["real", "random"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mlp"])
def test_bytes_moved_are_bytes_priced(family: str, random_costs: int | None, mesh: str) -> None:
    plan = planned(family, torch.float64, mesh, random_costs=random_costs, time_limit=20.0, gap=0.05)
    _, _, program, rules, _ = captured(family, torch.float64)
    lowered = lower(program, rules, plan)
    priced: Counter = Counter()
    for c in plan.collectives:
        priced[c.kind, plan.axis_names.index(c.axis), c.phase] += c.bytes
    moved = emitted_bytes(lowered, plan.sizes)
    assert priced.keys() == moved.keys()
    for key, n in priced.items():
        assert abs(n - moved[key]) <= 0.001 * n + 64, key
    assert random_costs is None or sum(priced.values()) > 0


def test_a_broken_spec_is_caught() -> None:
    plan = planned("gpt2", torch.float64, "a=2,b=2", random_costs=1, time_limit=20.0, gap=0.05)
    _, _, program, rules, _ = captured("gpt2", torch.float64)
    lowered = lower(program, rules, plan)
    check(lowered, plan.sizes)
    name = next(n.name for n in lowered.graph.nodes if n.target in MOVES)
    spec = lowered.specs[name]
    lowered.specs[name] = lowered.expects[name][0] if lowered.expects[name][0] != spec else spec.replicated  # type: ignore[index]
    with pytest.raises(GraphError, match="expects"):
        check(lowered, plan.sizes)


def test_a_pass_with_nothing_to_do_returns_its_input() -> None:
    plan = planned("mlp", torch.float64, "a=1")
    _, _, program, rules, _ = captured("mlp", torch.float64)
    lowered = lower(program, rules, plan)

    class Context:
        sizes = plan.sizes

    assert bucket_gradients(lowered, Context()) is lowered  # type: ignore[arg-type]
    assert not any(n.target in (*MOVES, *BUCKETS) for n in lowered.graph.nodes)


def test_the_program_given_is_not_changed() -> None:
    plan = planned("mlp", torch.float64, "a=2,b=2", random_costs=0)
    _, _, program, rules, _ = captured("mlp", torch.float64)
    before = str(program.graph)
    lower(program, rules, plan)
    assert str(program.graph) == before


def test_emitted_code_is_python_that_reads() -> None:
    plan = planned("gpt2", torch.float64, "a=2,b=2")
    _, _, program, rules, _ = captured("gpt2", torch.float64)
    source = emit(lower(program, rules, plan), plan)
    compile(source, "emitted", "exec")
    assert source == emit(lower(program, rules, plan), plan)
    assert "# transformer.h.0.attn" in source
    assert "modeling_gpt2.py:" in source
    assert "f64[" in source
