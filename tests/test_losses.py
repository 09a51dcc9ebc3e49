"""Cross-entropy whose classes and rows are split: every option, uneven splits, several axes, against eager torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_plans import random_plan
from torch import Tensor, nn

from netmind_autopar.ir.plan import Plan, PlanAxis
from netmind_autopar.ir.spec import parse_spec
from netmind_autopar.kernels import DIRECT
from netmind_autopar.passes.pipeline import lower
from netmind_autopar.rules.bind import bind_program
from netmind_autopar.runtime.collectives import MOVES
from netmind_autopar.solver.kinds import collect
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.tracer.losses import logsumexp
from netmind_autopar.verification import compare

ops = torch.ops.autopar


class Classifier(nn.Module):
    """A projection to classes and their loss; `options` are those of `F.cross_entropy`."""

    def __init__(
        self, classes: int, dtype: torch.dtype = torch.float64, weighted: bool = False, apart: bool = False, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, classes, dtype=dtype)
        self.register_buffer("share", torch.rand(classes, dtype=dtype) + 0.5 if weighted else None)
        self.apart, self.options = apart, options

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(x)
        logits = logits.movedim(-1, 1) if logits.dim() > 2 else logits
        if self.apart:
            return F.nll_loss(F.log_softmax(logits, 1), labels, self.share, **self.options)
        return F.cross_entropy(logits, labels, self.share, **self.options)


def batch(classes: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, ignored: int = -100) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels.view(-1)[1] = ignored
    return {"x": 3 * torch.randn(*shape, 6, generator=generator, dtype=torch.float64).to(dtype), "labels": labels}


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.2},
    "smoothed none": {"label_smoothing": 0.2, "reduction": "none", "ignore_index": 3},
    "weighted": {"weighted": True},
    "weighted sum": {"weighted": True, "reduction": "sum"},
    "weighted smoothed": {"weighted": True, "label_smoothing": 0.2},
    "ignore 3": {"ignore_index": 3},
    "apart": {"apart": True},
    "apart weighted": {"apart": True, "weighted": True, "ignore_index": 3},
}


@pytest.mark.parametrize("mesh", ["a=3", "a=2,b=2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_under_random_plans(name: str, mesh: str) -> None:
    options = OPTIONS[name]
    model, inputs = Classifier(97, **options), batch(97, (7,), ignored=options.get("ignore_index", -100))
    program = capture(model, inputs)
    rules = bind_program(program)
    for seed in range(6):
        plan = random_plan(program, rules, mesh, seed, idle=0.05)
        report = compare(model, inputs, program, lower(program, rules, plan), plan)
        assert report.ok and report.max_rel_error <= 1e-12, f"{seed}: {report.max_rel_error:.2g} {report.first_difference}"


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3)], ids=str)
def test_classes_in_the_middle(shape: tuple[int, ...]) -> None:
    """[n, c, ...] logits, as segmentation has them."""
    model, inputs = Classifier(7), batch(7, shape)
    program = capture(model, inputs)
    rules = bind_program(program)
    for mesh, seed in (("a=2,b=2", 0), ("a=2,b=2", 1), ("a=3", 0), ("a=3", 1)):
        plan = random_plan(program, rules, mesh, seed, idle=0.05)
        report = compare(model, inputs, program, lower(program, rules, plan), plan)
        assert report.ok and report.max_rel_error <= 1e-12, f"{seed}: {report.max_rel_error:.2g} {report.first_difference}"


# What the letters n (rows) and c (classes) are called in the classes of a `Classifier`; the others split nothing.
SPLIT = {
    "head.addmm": "m n",
    "amax": "a b",
    "sum_exp": "n c",
    "pick": "n c",
    "sum": "a b",
    "cross_entropy_backward@backward": "n c",
    "head.t@backward": "a b",
    "head.mm@backward": "k m",
    "head.sum@backward": "a b",
}


@pytest.mark.parametrize(
    ("mesh", "split"), [("a=3", "c"), ("a=4", "c"), ("a=2,b=2", "c c"), ("a=2,b=2", "n c"), ("a=2,b=2", "c n"), ("a=2,b=3", "n c")]
)
def test_split_classes_need_no_logits_elsewhere(mesh: str, split: str) -> None:
    """Rows and classes on axes of their own, classes over two axes, 97 classes over 3 and 4: only numbers per row travel."""
    model, inputs = Classifier(97, label_smoothing=0.1), batch(97, (8,))
    program = capture(model, inputs)
    rules = bind_program(program)
    axes = tuple(PlanAxis(name=part[0], size=int(part[2:])) for part in mesh.split(","))
    kinds = collect(program, rules, tuple(a.size for a in axes), "global")
    idle = " ".join("-" * len(axes))
    choices = {name: idle for name, kind in kinds.items() if len(kind.strategies) > 1}
    assert choices.keys() >= SPLIT.keys()
    choices |= {name: " ".join(words.split()["nc".index(letter)] for letter in split.split()) for name, words in SPLIT.items()}
    plan = Plan(graph_hash=graph_hash(program), mesh=axes, choices=choices)
    lowered = lower(program, rules, plan)
    moves = [node for node in lowered.graph.nodes if node.target in MOVES]
    logits = [node for node in moves if parse_spec(node.args[3]).shape == (8, 97)]
    assert moves and not logits, logits
    report = compare(model, inputs, program, lowered, plan)
    assert report.ok and report.max_rel_error <= 1e-12, f"{report.max_rel_error:.2g} {report.first_difference}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_closer_to_the_truth_than_eager(dtype: torch.dtype) -> None:
    model, inputs = Classifier(97, dtype), batch(97, (64,), dtype)
    program = capture(model, inputs)
    losses = [o for o in program.outputs if o.role == "output"]
    assert program.node(losses[0].node).meta["val"].dtype == dtype
    pieces = {str(n.target): n for n in program.graph.nodes}
    assert pieces["autopar.sum_exp.default"].meta["val"].dtype == torch.float32
    logits = model.head(inputs["x"]).detach()
    truth = F.cross_entropy(logits.double(), inputs["labels"])
    largest = logits.amax(1)
    lse = DIRECT[ops.sum_exp.default](logits, largest).log() + largest
    rows = lse - DIRECT[ops.pick.default](logits, inputs["labels"], 0, 97, -100)
    mine = (rows * (inputs["labels"] != -100)).sum() / (inputs["labels"] != -100).sum()
    assert float((mine - truth).abs()) <= 1e-6 * float(truth)


def test_infinite_logits_of_masked_classes() -> None:
    """A class masked out with -inf, and a block of classes that is masked out whole."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64)
    x[:, 4:] = -float("inf")
    target = torch.tensor([0, 1, 2, 3, 0])
    largest = torch.stack([x[:, :4].amax(1), x[:, 4:].amax(1)]).amax(0)
    total = sum(ops.sum_exp(part, largest) for part in (x[:, :4], x[:, 4:]))
    picked = ops.pick(x[:, :4], target, 0, 8, -100) + ops.pick(x[:, 4:], target, 4, 8, -100)
    assert torch.allclose(total.log() + largest - picked, F.cross_entropy(x, target, reduction="none"), rtol=1e-14)


def test_a_label_that_is_no_class() -> None:
    """Never a loss that looks well: refused as eager does. The label to ignore may be any number."""
    x = torch.randn(3, 5)
    for bad in (5, -1):
        with pytest.raises(IndexError):
            F.cross_entropy(x, torch.tensor([0, bad, 2]))
        with pytest.raises(IndexError):
            ops.pick(x, torch.tensor([0, bad, 2]), 0, 5, -100)
    assert ops.pick(x, torch.tensor([0, 255, 2]), 0, 5, 255)[1] == 0
    assert ops.pick(x, torch.tensor([0, 3, 2]), 0, 5, 3)[1] == 0


def test_pieces_pass_opcheck() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(5, 8), torch.tensor([0, 7, -100, 3, 2])
    torch.library.opcheck(ops.sum_exp.default, (x, x.amax(1)))
    torch.library.opcheck(ops.pick.default, (x[:, 2:], target, 2, 8, -100))
    torch.library.opcheck(ops.cross_entropy_backward.default, (torch.randn(5), x, target, torch.logsumexp(x, 1), 2, 0.9, 0.1))
    half = x.bfloat16()
    torch.library.opcheck(ops.cross_entropy_backward.default, (torch.randn(5), half, target, torch.logsumexp(x, 1), 0, 1.0, 0.0))


def test_blocks_of_rows_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from netmind_autopar.kernels import loss

    torch.manual_seed(0)
    x, target, grad = torch.randn(11, 9), torch.randint(0, 9, (11,)), torch.randn(11)
    lse = torch.logsumexp(x, 1)
    whole = loss.sum_exp(x, x.amax(1)), loss.cross_entropy_backward(grad, x, target, lse, 0, 0.9, 0.01)
    monkeypatch.setitem(loss._BLOCK, "cpu", 18)
    parts = loss.sum_exp(x, x.amax(1)), loss.cross_entropy_backward(grad, x, target, lse, 0, 0.9, 0.01)
    assert all(map(torch.equal, whole, parts))
    assert torch.equal(loss.cross_entropy_backward(grad, x.t().contiguous().t(), target, lse, 0, 0.9, 0.01), parts[1])


class Scores(nn.Module):
    """A log-sum-exp over a dim of projected features."""

    def __init__(self, dim: int, keepdim: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.dim, self.keepdim = nn.Linear(6, 9, dtype=torch.float64), dim, keepdim

    def forward(self, x: Tensor) -> Tensor:
        scores = self.proj(x)
        out = torch.logsumexp(scores, self.dim, self.keepdim)
        return (scores - out).square().sum() if self.keepdim else out.square().sum()


@pytest.mark.parametrize(("dim", "keepdim"), [(-1, False), (1, True), (0, False)])
def test_logsumexp_of_a_split_dim(dim: int, keepdim: bool) -> None:
    model, inputs = Scores(dim, keepdim), {"x": torch.randn(5, 7, 6, dtype=torch.float64)}
    program = capture(model, inputs)
    rules = bind_program(program)
    total = next(n for n in program.graph.nodes if str(n.target) == "autopar.sum_exp.default")
    assert any(letter.startswith("c") for letter in rules[total.name].letters)
    for mesh, seed in (("a=2,b=2", 0), ("a=2,b=2", 1), ("a=3", 0), ("a=3", 1)):
        plan = random_plan(program, rules, mesh, seed, idle=0.05)
        report = compare(model, inputs, program, lower(program, rules, plan), plan)
        assert report.ok and report.max_rel_error <= 1e-12, f"{seed}: {report.max_rel_error:.2g} {report.first_difference}"


def test_logsumexp_of_infinities() -> None:
    inf = float("inf")
    x = torch.tensor([[1.0, -inf], [-inf, -inf], [inf, 1.0]], dtype=torch.float64)
    assert torch.equal(logsumexp(x, [1]), torch.logsumexp(x, 1))
    assert torch.equal(logsumexp(x, [0, 1]), torch.logsumexp(x, (0, 1)))


@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"reduction": "sum"}], ids=str)
def test_a_loss_written_apart_is_one(options: dict[str, Any]) -> None:
    """log_softmax and nll_loss as two calls become the pieces of cross-entropy; a log-softmax that is used again stays."""
    program = capture(Classifier(97, apart=True, **options), batch(97, (7,)))
    ops_used = {str(n.target) for n in program.graph.nodes}
    assert "autopar.sum_exp.default" in ops_used and "aten._log_softmax.default" not in ops_used


class Twice(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logp = F.log_softmax(x, 1)
        return F.nll_loss(logp, labels) + logp.exp().square().mean()


def test_a_log_softmax_that_is_used_again_stays() -> None:
    program = capture(Twice(), {"x": torch.randn(4, 5, requires_grad=True), "labels": torch.tensor([0, 1, 2, 3])})
    assert "aten._log_softmax.default" in {str(n.target) for n in program.graph.nodes}
