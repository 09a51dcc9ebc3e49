"""The simulated step: equal to an event-by-event simulation, bounded, and made of the planner's prices."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import random_plan
from test_exact import captured, planned

from netmind_autopar import cli
from netmind_autopar.costs.device import make_mesh
from netmind_autopar.costs.timeline import COMPUTE, Event, Timeline, place, save_trace, simulate, trace, uncovered
from netmind_autopar.ir.errors import GraphError, InputError
from netmind_autopar.ir.plan import Plan
from netmind_autopar.passes.timing import mesh_of, plan_timeline, with_timeline
from netmind_autopar.solver.baselines import solve_baseline

F32 = torch.float32
MLP = str(Path(__file__).parent.parent / "examples" / "mlp.py")


def of(plan: Plan, family: str, *, overlap: bool = True) -> Timeline:
    _, _, program, rules, _ = captured(family, F32)
    mesh = make_mesh(",".join(f"{a.name}={a.size}" for a in plan.mesh), "h100-sxm")
    return plan_timeline(program, rules, plan.model_copy(update={"overlap": overlap}), mesh)


def brute_force(events: Sequence[Event]) -> list[tuple[float, float]]:
    """Time runs from one change to the next, in fractions: whatever is first on its stream and has nothing to wait for begins, waits for
    its latency, and then gets an equal part of its link with all others that do."""
    waiting = {name: [i for i, e in enumerate(events) if e.stream == name] for name in {e.stream for e in events}}
    latency: dict[int, Fraction] = {}  # what is left of it
    rest: dict[int, Fraction] = {}  # and then
    begun: dict[int, Fraction] = {}
    over: dict[int, Fraction] = {}
    now = Fraction(0)
    while len(over) < len(events):
        for queue in waiting.values():
            if queue and queue[0] not in begun and all(j in over for j in events[queue[0]].after):
                event = events[queue[0]]
                begun[queue[0]], rest[queue[0]] = now, Fraction(event.transfer_s if event.link else event.seconds)
                latency[queue[0]] = Fraction(event.seconds) - rest[queue[0]]
        done = [i for i in begun if i not in over and not latency[i] and not rest[i]]
        for i in done:
            over[i] = now
            waiting[events[i].stream].remove(i)
        if done:
            continue
        alive = [i for i in begun if i not in over]
        flying = [events[i].link for i in alive if not latency[i]]
        parts = {i: 1 if not events[i].link else flying.count(events[i].link) for i in alive}
        ahead = min(latency[i] or rest[i] * parts[i] for i in alive)
        now += ahead
        for i in alive:
            if latency[i]:
                latency[i] -= ahead
            else:
                rest[i] -= ahead / parts[i]
    return [(float(begun[i]), float(over[i])) for i in range(len(events))]


STREAMS = {COMPUTE: "", "from the host": "", "dp": "intra", "tp": "intra", "cp": "intra", "pp": "inter"}
APART = (COMPUTE, "dp", "pp", "from the host")  # nothing is shared
PAIR = (COMPUTE, "dp", "tp", "pp")  # shares are halves, which are exact
MANY = tuple(STREAMS)


@st.composite
def graphs(draw: st.DrawFn, streams: Sequence[str]) -> list[Event]:
    """Up to 14 events on up to six streams, whole seconds, so that ends coincide often."""
    out: list[Event] = []
    for i in range(draw(st.integers(0, 14))):
        stream = draw(st.sampled_from(streams))
        after = tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else ()
        seconds = draw(st.integers(0, 4))
        sent = float(draw(st.integers(0, seconds))) if STREAMS[stream] else 0.0
        out.append(Event(f"e{i}", stream, float(seconds), after, link=STREAMS[stream], transfer_s=sent))
    return out


@pytest.mark.parametrize("streams", [APART, PAIR, MANY], ids=["apart", "pair", "many"])
def test_places_are_those_of_brute_force(streams: Sequence[str]) -> None:
    exact = streams != MANY  # thirds are not

    @settings(max_examples=300, deadline=None)
    @given(graphs(streams))
    def holds(events: list[Event]) -> None:
        found, wanted = simulate(events), brute_force(events)
        places = [(s.start_s, s.end_s) for s in found.spans]
        assert places == wanted if exact else np.allclose(places, wanted, rtol=1e-12, atol=1e-12)
        assert found.step_s == pytest.approx(max((end for _, end in wanted), default=0.0), rel=1e-12)
        assert simulate(events) == found, "the same, twice"

    holds()


@settings(max_examples=400, deadline=None)
@given(graphs(APART))
def test_what_is_measured_is_bounded(events: list[Event]) -> None:
    """Whole seconds, so second by second: exposed is what other streams do while compute does nothing."""
    found = simulate(events)
    compute = found.busy.get(COMPUTE, 0.0)
    seconds = range(math.ceil(found.step_s))

    def works(stream: str, t: int) -> bool:
        return any(s.event.stream == stream and s.start_s <= t < s.end_s for s in found.spans)

    assert found.work == found.busy
    for name, exposed in found.exposed.items():
        assert exposed == sum(works(name, t) and not works(COMPUTE, t) for t in seconds)
        assert 0.0 <= max(0.0, found.busy[name] - compute) <= exposed <= found.busy[name]
    assert found.exposed_s == sum(not works(COMPUTE, t) and any(works(n, t) for n in found.exposed) for t in seconds)
    assert found.exposed_s >= max([found.busy[n] - compute for n in found.exposed], default=0.0)
    assert sum(found.exposed.values()) >= found.exposed_s
    assert found.idle_s == found.step_s - compute == found.exposed_s, "compute is idle only while something else works"
    assert max(found.busy.values(), default=0.0) <= found.step_s <= found.sequential_s


@settings(max_examples=400, deadline=None)
@given(graphs(MANY))
def test_what_shares_a_link_is_bounded(events: list[Event]) -> None:
    """No link carries more than its bandwidth, and what is exposed is never less than what compute could not hide."""
    found, near = simulate(events), 1e-9
    compute = found.busy.get(COMPUTE, 0.0)
    for name, exposed in found.exposed.items():
        assert 0.0 <= found.work[name] <= found.busy[name] + near
        assert max(0.0, found.busy[name] - compute) - near <= exposed <= found.busy[name] + near
    for link in ("intra", "inter"):
        sent = sum(e.transfer_s for e in events if e.link == link)
        alone = uncovered(sorted((s.start_s, s.end_s) for s in found.spans if s.event.link == link), [])
        assert sent <= alone + near, "the link is never faster than it is"
        assert found.exposed_s >= sent - compute - near
        assert sum(found.exposed.get(n, 0.0) for n, of in STREAMS.items() if of == link) >= sent - compute - near
    assert max(found.busy.values(), default=0.0) - near <= found.step_s <= found.sequential_s + near
    assert found.idle_s == pytest.approx(found.exposed_s, abs=near)
    apart = simulate([replace(e, link="") for e in events])
    assert all(s.end_s >= t.end_s - near for s, t in zip(found.spans, apart.spans, strict=True)), "sharing makes nothing faster"


@settings(max_examples=200, deadline=None)
@given(graphs(PAIR))
def test_the_critical_path_fills_the_step(events: list[Event]) -> None:
    found = simulate(events)
    path = [found.spans[i] for i in found.critical]
    assert sum(s.seconds for s in path) == found.step_s
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(path))


def test_two_axes_over_one_link_share_its_bandwidth_and_not_their_latency() -> None:
    """4 s of transfer beside 2 s of transfer, each behind 1 s of latency: halves until 5, then the longer one alone until 7."""
    first = Event("long", "dp", 5.0, link="intra", transfer_s=4.0)
    second = Event("short", "tp", 3.0, link="intra", transfer_s=2.0)
    assert [(s.start_s, s.end_s) for s in place([first, second])] == [(0.0, 7.0), (0.0, 5.0)]
    assert [s.end_s for s in place([first, replace(second, link="inter")])] == [5.0, 3.0]
    assert [s.end_s for s in place([replace(first, transfer_s=0.0), second])] == [5.0, 3.0], "latency uses no bandwidth"
    assert [s.end_s for s in place([first, replace(second, stream="dp")])] == [5.0, 8.0], "one axis queues"
    found = simulate([first, second])
    assert found.work == {"dp": 5.0, "tp": 3.0} and found.busy == {"dp": 7.0, "tp": 5.0} and found.exposed_s == 7.0
    rows = [r for r in json.loads(trace(found))["traceEvents"] if r["ph"] == "X"]
    assert [(r["dur"], r["args"]["alone"]) for r in rows] == [(7e6, 5e6), (5e6, 3e6)]


@pytest.mark.parametrize(
    "event",
    [Event("e", COMPUTE, 1.0, (0,)), Event("e", COMPUTE, -1.0), Event("e", COMPUTE, math.nan), Event("e", "dp", 1.0, transfer_s=-1.0)],
)
def test_an_event_without_a_place_is_refused(event: Event) -> None:
    with pytest.raises(GraphError, match="cannot be placed"):
        place([event])


@pytest.mark.parametrize(
    ("family", "mesh", "random_costs"), [("gpt2", "a=4", None), ("gpt2", "a=2,b=2", 0), ("mlp", "a=2,b=2", None), ("mlp", "a=2,b=2", 1)]
)
def test_without_overlap_it_is_the_sum(family: str, mesh: str, random_costs: int | None) -> None:
    plan = planned(family, F32, mesh, random_costs=random_costs, time_limit=20.0, gap=0.05)
    alone, beside = of(plan, family, overlap=False), of(plan, family)
    assert alone.step_s == pytest.approx(plan.cost.step_s, rel=1e-12)
    assert alone.busy[COMPUTE] + sum(alone.busy[n] for n in alone.exposed) == pytest.approx(plan.cost.step_s, rel=1e-12)
    assert beside.sequential_s == pytest.approx(plan.cost.step_s, rel=1e-12)
    assert beside.step_s <= alone.step_s * (1 + 1e-12)
    assert sum(s.event.seconds for s in alone.spans if s.event.stream in plan.axis_names) <= plan.cost.communication_s * (1 + 1e-12)


def by_recipe(layers: int, checkpoint: bool) -> tuple[Plan, Timeline, Timeline]:
    """FSDP on two devices, its timeline, and that of the same plan with nothing beside compute."""
    _, _, program, rules, hash_ = captured("gpt2", F32, layers=layers, hidden=128, vocab=128, seq=64)
    mesh = make_mesh("a=2", "dgx-h100")
    fixed = {"graph_hash": hash_, "cluster": "dgx-h100", "checkpoint": checkpoint}
    plan, found = with_timeline(program, rules, solve_baseline(program, rules, mesh, "fsdp", **fixed), mesh)  # type: ignore[arg-type]
    return plan, found, plan_timeline(program, rules, plan.model_copy(update={"overlap": False}), mesh)


def test_gathering_again_and_recomputing_are_in_the_sum() -> None:
    plan, found, alone = by_recipe(2, checkpoint=True)
    assert plan.recompute and plan.regather and plan.cost.recompute_s > 0
    assert alone.step_s == pytest.approx(plan.cost.step_s, rel=1e-12) == pytest.approx(found.sequential_s, rel=1e-12)


def test_fsdp_hides_what_it_can() -> None:
    """A block's parameters travel while the block before it computes; their gradients while backward goes on."""
    plan, found, alone = by_recipe(4, checkpoint=False)
    hidden, most = alone.step_s - found.step_s, min(found.busy[COMPUTE], found.busy["a"])
    assert hidden > 0.6 * most, f"{hidden / most:.0%} of what could be hidden"
    assert plan.cost.timeline_s == found.step_s and plan.cost.exposed_s == pytest.approx(found.exposed_s)
    assert plan.cost.overlapped_s == pytest.approx(hidden)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_plans_keep_the_bounds(seed: int) -> None:
    _, _, program, rules, _ = captured("gpt2", F32)
    plan = random_plan(program, rules, "a=2,b=2", seed)
    found, alone = of(plan, "gpt2"), of(plan, "gpt2", overlap=False)
    compute = found.busy[COMPUTE]
    assert found.busy.keys() == alone.busy.keys() and found.busy[COMPUTE] == pytest.approx(alone.busy[COMPUTE])
    assert max(found.busy.values()) <= found.step_s <= alone.step_s * (1 + 1e-12)
    assert all(exposed >= max(0.0, found.busy[n] - compute) for n, exposed in found.exposed.items())
    assert of(plan, "gpt2") == found, "the same, twice"


@pytest.mark.parametrize(("axes", "same"), [("a=4", True), ("a=2,b=2", False)])
def test_one_axis_on_a_link_is_as_if_nothing_were_shared(axes: str, same: bool) -> None:
    """Bitwise; two axes inside a node are slower than if each had a link of its own, for the same work."""
    _, _, program, rules, _ = captured("gpt2", F32)
    plan, mesh = random_plan(program, rules, axes, 0), make_mesh(axes, "h100-sxm")
    found = plan_timeline(program, rules, plan, mesh)
    apart = plan_timeline(program, rules, plan, replace(mesh, axes=tuple(replace(a, link="") for a in mesh.axes)))
    assert found.work == apart.work and found.step_s >= apart.step_s
    assert ([(s.start_s, s.end_s) for s in found.spans] == [(s.start_s, s.end_s) for s in apart.spans]) == same


def test_a_plan_keeps_its_timeline() -> None:
    plan = planned("mlp", F32, "a=2,b=2", random_costs=0)
    assert plan.cost.timeline_s == 0.0 == plan.cost.overlapped_s
    _, _, program, rules, _ = captured("mlp", F32)
    timed, found = with_timeline(program, rules, plan, mesh_of(plan))
    assert Plan.loads(timed.dumps()) == timed
    assert timed.cost.timeline_s == found.step_s <= timed.cost.step_s == plan.cost.step_s
    assert [s.name for s in timed.cost.streams] == sorted(found.exposed)


def test_the_trace_is_chromes_format(tmp_path: Path) -> None:
    events = [
        Event("mm", COMPUTE, 2e-3),
        Event("g", "dp", 1e-3, (0,), "all_gather", "forward", "model.py:3  x"),
        Event("add", COMPUTE, 1e-3, (1,)),
    ]
    text = trace(simulate(events), "step")
    rows = json.loads(text)["traceEvents"]
    made = [r for r in rows if r["ph"] == "X"]
    assert [(r["name"], r["ts"], r["dur"], r["tid"]) for r in made] == [
        ("mm", 0.0, 2000.0, 0),
        ("g", 2000.0, 1000.0, 1),
        ("add", 3000.0, 1000.0, 0),
    ]
    assert {r["args"]["name"] for r in rows if r.get("name") == "thread_name"} == {COMPUTE, "dp"}
    assert made[1]["args"] == {"kind": "all_gather", "where": "model.py:3  x", "critical": True}
    save_trace(tmp_path / "t.json", simulate(events), "step")
    assert (tmp_path / "t.json").read_text() == text
    with pytest.raises(InputError, match="cannot write the trace"):
        save_trace(tmp_path / "no" / "t.json", simulate(events))


def test_the_command_line_shows_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "trace.json"
    odd = ["--mesh", "dp=2,tp=2", "--cluster", "h100-sxm", "--random-costs", "3"]
    assert cli.main(["plan", MLP, *odd, "--trace", str(where), "--json", str(tmp_path / "p.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Beside compute:" in shown and "exposed" in shown
    plan = Plan.load(tmp_path / "p.json")
    made = [r for r in json.loads(where.read_text())["traceEvents"] if r["ph"] == "X"]
    assert max(r["ts"] + r["dur"] for r in made) == pytest.approx(plan.cost.timeline_s * 1e6)
    assert cli.main(["plan", MLP, *odd]) == 0
    assert "Beside compute" not in capsys.readouterr().out
