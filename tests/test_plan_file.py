"""A plan file is checked on load: whatever is in it, the answer is a valid Plan or a PlanError with its slots filled."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from netmind_autopar.ir.errors import PlanError
from netmind_autopar.ir.plan import Collective, Cost, Memory, Plan, PlanAxis, Replicated


def example() -> Plan:
    return Plan(
        graph_hash="0123456789abcdef",
        mesh=(PlanAxis(name="dp", size=2, bandwidth_bytes_s=4.5e11, latency_s=1e-5), PlanAxis(name="tp", size=4)),
        cluster="h100-sxm",
        memory_limit_bytes=70 * 2**30,
        choices={"h.*.attn.c_attn.addmm": "m n", "h.*.mlp.c_proj.addmm": "m k", "wte.weight": "- a"},
        cost=Cost(step_s=0.012, compute_s=0.009, communication_s=0.003, peak_bytes=3 * 2**30, memory=Memory(parameters=2**30)),
        collectives=(Collective(kind="all_reduce", axis="tp", phase="forward", count=4, bytes=2**20, seconds=1e-3),),
        replicated=(Replicated(op="aten.cumsum.default", where="model.py:41  x.cumsum(-1)", count=1, seconds=3e-4),),
        bound_s=0.0119,
        gap=1e-4,
        status="optimal",
        solver="HiGHS",
    )


def loads_or_plan_error(text: str) -> Plan | None:
    try:
        plan = Plan.loads(text, where="plan.json")
    except PlanError as e:
        assert e.what
        assert e.why
        assert e.try_
        assert "Traceback" not in e.render()
        return None
    assert Plan.loads(plan.dumps()) == plan
    return plan


def test_round_trip_is_byte_identical(tmp_path: Path) -> None:
    plan, path = example(), tmp_path / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    assert again.hash() == plan.hash()
    assert path.read_bytes() == again.dumps().encode() == plan.dumps().encode()
    assert os.listdir(tmp_path) == ["plan.json"]


def test_solve_time_is_not_in_the_file() -> None:
    assert example().timed(1.5).dumps() == example().dumps()
    assert example().timed(1.5).solve_s == 1.5


def test_a_file_from_before_the_last_categories_of_memory_loads() -> None:
    data = json.loads(example().dumps())
    for name in ("communication_buffers", "fragmentation"):
        assert data["cost"]["memory"].pop(name) == 0
    assert Plan.loads(json.dumps(data)) == example()
    data["cost"]["memory"]["pinned"] = 1
    with pytest.raises(PlanError, match="not valid") as caught:
        Plan.loads(json.dumps(data))
    assert "cost.memory.pinned" in caught.value.where


def test_every_truncation_is_refused() -> None:
    text = example().dumps().rstrip()
    for end in range(0, len(text), 7):
        assert loads_or_plan_error(text[:end]) is None


def edited(path: str, value: object) -> str:
    """The example's text with one field, named by a dotted path, replaced."""
    data = json.loads(example().dumps())
    *parents, last = path.split(".")
    at = data
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(last) if isinstance(at, list) else last] = value
    return json.dumps(data)


BAD_FIELDS = [
    ("graph_hash", "xyz"),
    ("graph_hash", 12),
    ("mesh", []),
    ("mesh.0.size", 0),
    ("mesh.0.size", -2),
    ("mesh.0.size", 2.5),
    ("mesh.0.size", "2"),
    ("mesh.0.size", True),
    ("mesh.0.name", "d p"),
    ("mesh.0.latency_s", -1.0),
    ("mesh.0.bandwidth_bytes_s", 0.0),
    ("mesh.0.bandwidth_bytes_s", float("nan")),
    ("mesh.0.bandwidth_bytes_s", float("inf")),
    ("choices", ["a"]),
    ("choices", {"x": 1}),
    ("choices", {"x": None}),
    ("cost.step_s", float("nan")),
    ("cost.step_s", -1.0),
    ("cost.step_s", "fast"),
    ("cost.peak_bytes", 1.5),
    ("collectives.0.phase", "sideways"),
    ("replicated.0.count", 0),
    ("status", "perfect"),
    ("version", 2),
    ("format", "something else"),
    ("surprise", 1),
    ("cost.surprise", 1),
    ("memory_limit_bytes", "70GiB"),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: str(v)[:30])
def test_bad_field_is_refused(field: str, value: object) -> None:
    text = edited(field, value)
    with pytest.raises(PlanError) as e:
        Plan.loads(text, where="plan.json")
    assert e.value.where.startswith("plan.json") or "NaN" in e.value.why or "Infinity" in e.value.why


def test_error_names_the_field() -> None:
    with pytest.raises(PlanError) as e:
        Plan.loads(edited("mesh.1.size", 0), where="plan.json")
    assert e.value.where == "plan.json: mesh.1.size"
    assert e.value.render().startswith("PlanError: the plan file is not valid\n  where  plan.json: mesh.1.size\n  why    ")


def test_duplicate_keys_are_refused() -> None:
    text = example().dumps().replace('"choices": {', '"choices": {"wte.weight": "a -", ')
    with pytest.raises(PlanError, match="appears twice"):
        Plan.loads(text)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"plan"', "{}", "{" * 100_000, "[" * 100_000, "\x00", "NaN", "1e999", '{"a":1e999}']
)
def test_other_json_is_refused(text: str) -> None:
    assert loads_or_plan_error(text) is None


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc"])
def test_binary_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")


def test_unreadable_path_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(PlanError):
            Plan.load(path)


def test_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        example().save(tmp_path / "no" / "plan.json")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PlanError):
        example().save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["plan.json"]


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    1e308,
    -1e308,
    10**30,
    "",
    "a",
    "-",
    "NaN",
    [],
    {},
    [[]],
    {"a": 1},
    "\ud800",
    "0123456789abcdef",
]


def mutate(data: object, rng: random.Random) -> object:
    """One random change somewhere inside: another value, a missing or an extra entry."""
    if isinstance(data, dict) and data and rng.random() < 0.85:
        key = rng.choice(sorted(data))
        out = dict(data)
        action = rng.random()
        if action < 0.15:
            del out[key]
        elif action < 0.25:
            out[rng.choice(["x", key + "s", ""])] = rng.choice(VALUES)
        else:
            out[key] = mutate(data[key], rng)
        return out
    if isinstance(data, list) and data and rng.random() < 0.85:
        i = rng.randrange(len(data))
        return data[:i] + ([mutate(data[i], rng)] if rng.random() < 0.8 else []) + data[i + 1 :]
    return rng.choice(VALUES)


@pytest.mark.parametrize("seed", range(3))
def test_mutations_give_a_plan_or_a_plan_error(seed: int) -> None:
    rng = random.Random(seed)
    text = example().dumps()
    valid = 0
    for _ in range(100):
        if rng.random() < 0.6:
            changed = json.dumps(mutate(json.loads(text), rng))
        else:
            at, n = rng.randrange(len(text)), rng.randrange(4)
            changed = text[:at] + "".join(rng.choice('{}[]",:0e9.-naN\\u') for _ in range(n)) + text[at + rng.randrange(3) :]
        valid += loads_or_plan_error(changed) is not None
    assert valid < 60
