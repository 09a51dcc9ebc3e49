"""What plans look like on screen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from netmind_autopar import report
from netmind_autopar.ir.plan import Collective, Cost, Memory, Plan, PlanAxis, Replicated
from netmind_autopar.ir.spec import Replicate, Shard, Spec, parse_spec
from netmind_autopar.solver.explain import ClassRow, ConversionRow
from netmind_autopar.verification import Report, Row
from netmind_autopar.verification.show import verify_report


def example() -> Plan:
    gib = 2**30
    return Plan(
        graph_hash="0123456789abcdef",
        mesh=(PlanAxis(name="dp", size=2), PlanAxis(name="tp", size=4)),
        cluster="h100-sxm",
        memory_limit_bytes=70 * gib,
        choices={
            "transformer.wte.weight": "d0 d0",
            "transformer.h.*.attn.c_attn.weight": "- d1",
            "transformer.h.*.mlp.c_proj.weight": "d1 d0",
            "transformer.h.*.attn.c_attn.mm": "m n",
        },
        cost=Cost(
            step_s=0.0123,
            compute_s=0.009,
            communication_s=0.0033,
            peak_bytes=3 * gib,
            memory=Memory(parameters=gib, gradients=gib, optimizer=gib // 2, activations=gib // 2),
        ),
        collectives=(
            Collective(kind="all_reduce", axis="tp", phase="forward", count=4, bytes=2**20, seconds=1e-3),
            Collective(kind="reduce_scatter", axis="dp", phase="backward", count=14, bytes=2**27, seconds=2.3e-3),
        ),
        replicated=(Replicated(op="aten.cumsum.default", where="model.py:41  probs.cumsum(-1)", count=2, seconds=3e-4),),
        bound_s=0.01229,
        gap=8e-4,
        status="optimal",
        solver="HiGHS",
    ).timed(1.234)


def parameters() -> list[tuple[str, torch.Tensor]]:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    out = [("transformer.wte.weight", meta(50257, 1600)), ("transformer.wpe.weight", meta(1024, 1600))]
    for i in range(48):
        out += [(f"transformer.h.{i}.attn.c_attn.weight", meta(1600, 4800)), (f"transformer.h.{i}.attn.c_attn.bias", meta(4800))]
        out += [(f"transformer.h.{i}.mlp.c_proj.weight", meta(6400, 1600))]
    return out


def work() -> tuple[list[ClassRow], list[ConversionRow]]:
    def spec(text: str) -> Spec:
        return parse_spec(text)

    fc, loss = "transformer.h.*.attn.c_attn.addmm", "nll_loss"
    rows = [
        ClassRow("transformer.wte.embedding", "op", 1, "d0 -", (), (spec("f32[32,1024,1600] S(0) R"),), 0),
        ClassRow("transformer.h.*.attn.c_attn.view", "op", 48, "a -", (), (spec("f32[(32 1024),1600] S(0.0) R"),), 0),
        ClassRow(fc, "op", 48, "m n", (), (spec("f32[(32 1024),4800] S(0.0) S(1)"),), 0),
        ClassRow(loss, "op", 1, "n -", (), (spec("f32[] P(sum) R"), spec("f32[] P(sum) R")), 0),
    ]
    before, after = spec("f32[] P(sum) R"), spec("f32[] R R")
    sent = [
        ConversionRow(
            fc + "@backward~1", ("gradient",), "backward", before, after, ("reduce_scatter dp", "all_gather dp"), 48, 2**28, 2e-3
        ),
        ConversionRow(loss, ("div", "output.loss"), "forward", before, after, ("all_reduce dp",), 1, 8, 1e-5),
    ]
    return rows, sent


@pytest.mark.parametrize("width", [80, 120])
def test_plan_report(width: int, golden: Callable[[str, str], None]) -> None:
    plan = example()
    rows = report.parameter_rows(plan, parameters())
    text = report.render(report.plan_report(plan, "GPT2LMHeadModel", rows, *work(), show_all=True), width)
    assert max(map(len, text.splitlines())) <= width
    for number in ("38.3 MiB", "352 MiB", "2.00 ms", "10.0 µs", "48", "6283×1600"):
        assert number in text, "a column was cut off"
    golden(f"plan_{width}.txt", text)


def test_diff_report(golden: Callable[[str, str], None]) -> None:
    plan = example()
    assert report.diff_report(plan, plan) is None
    other = plan.model_copy(update={"choices": {**plan.choices, "transformer.wte.weight": "- d0"}, "collectives": plan.collectives[:1]})
    shown = report.diff_report(plan, other, ("a.json", "b.json"))
    assert shown is not None
    golden("diff.txt", report.render(shown, 80))


def test_parameter_rows_count_bytes() -> None:
    wte, wpe, attn, bias, proj = report.parameter_rows(example(), parameters())
    assert (wte.count, attn.count) == (1, 48)
    assert wte.device_bytes == math.ceil(math.ceil(50257 / 2) / 4) * 1600 * 4
    assert wpe.device_bytes == 1024 * 1600 * 4
    assert attn.device_bytes == 48 * 1600 * 1200 * 4
    assert bias.placements == (Replicate(), Replicate())
    assert proj.placements == (Shard(1), Shard(0))


def test_only_the_main_operations_are_shown_by_default() -> None:
    rows, _ = work()
    text = report.render(report.plan_report(example(), work=rows))
    assert "attn.c_attn.addmm" in text
    assert "attn.c_attn.view" not in text
    assert "attn.c_attn.view" in report.render(report.plan_report(example(), work=rows, show_all=True))


def test_a_plain_list_of_layers_is_no_repeated_block() -> None:
    plan = example().model_copy(update={"choices": {"layers.0.weight": "- d0", "layers.1.weight": "- d1"}})
    shapes = {"layers.0.weight": (16, 4), "layers.1.weight": (16, 16)}
    rows = report.parameter_rows(plan, [(name, torch.empty(*shape, device="meta")) for name, shape in shapes.items()])
    assert [r.placements[1] for r in rows] == [Shard(0), Shard(1)]


def test_blocks_that_differ_get_rows_of_their_own() -> None:
    plan = example().model_copy(update={"choices": {"h.0.w": "- d0", "h.*.w": "- -"}})
    rows = report.parameter_rows(plan, [(f"h.{i}.w", torch.empty(8, 8, device="meta")) for i in range(4)])
    assert [(r.name, r.count) for r in rows] == [("h.0.w", 1), ("h.*.w", 3)]


@pytest.mark.parametrize(
    ("placements", "rank", "expected"),
    [
        ((Replicate(), Replicate()), 2, "whole"),
        ((Replicate(), Shard(0)), 2, "rows over tp"),
        ((Shard(1), Shard(0)), 2, "rows over tp, columns over dp"),
        ((Shard(0), Shard(0)), 2, "rows over dp × tp"),
        ((Shard(0), Replicate()), 1, "split over dp"),
        ((Replicate(), Shard(2)), 4, "dim 2 over tp"),
    ],
)
def test_words(placements: tuple, rank: int, expected: str) -> None:
    assert report.words(placements, rank, ("dp", "tp")) == expected


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (1.5, "1.50 s"), (0.0123, "12.3 ms"), (3e-4, "300 µs"), (2e-9, "2.00 ns"), (123.4, "123 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert report.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (70 * 2**30, "70.0 GiB"), (2**41, "2.00 TiB")]
)
def test_size(value: float, text: str) -> None:
    assert report.size(value) == text


def test_verify_report_says_which_operation_differs() -> None:
    rows = tuple(Row(0, "gradient", f"fc{i}.weight", error, 1e-9) for i, error in enumerate((0.0, 3e-9, 0.25)))
    bad = Report(rows, "mm_3  model.py:12  self.fc(x)", ("a note",))
    shown = report.render(verify_report(bad))
    assert "does NOT compute" in shown
    assert "2.5e-01" in shown
    assert "model.py:12" in shown
    assert "2 of 3 comparisons failed" in shown
    assert shown.index("fc2.weight") < shown.index("fc1.weight")
    assert "fc0.weight" not in shown
    assert "note: a note" in shown
