"""torch's recurrent layers through one op per layer and direction: values, gradients, and a graph that does not grow with the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tracer import check
from torch import Tensor, nn

from netmind_autopar.costs.compute import flops
from netmind_autopar.tracer.capture import capture

ops = torch.ops.autopar


class Net(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell, self.state = cell(5, 7, **options), options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)

    def forward(self, x: Tensor, begin: Tensor | None = None) -> Tensor:
        state = None if begin is None else (begin, begin * 2) if isinstance(self.cell, nn.LSTM) else begin
        out, last = self.cell(x, state)
        last = last if isinstance(last, tuple) else (last,)
        return out.square().mean() + sum((i + 2) * s.sin().sum() for i, s in enumerate(last))


OPTIONS: list[dict[str, Any]] = [{}, {"num_layers": 2, "batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda c: c.__name__)
def test_layers(cell: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net(cell, **options).double()
    inputs = {"x": torch.randn(4, 3, 5).double()}
    if options.get("bidirectional"):
        inputs["begin"] = torch.randn(model.state, 3, 7).double()
    program, _ = check(model, inputs)
    steps = [n for n in program.graph.nodes if str(n.target) == f"autopar.{cell.__name__.lower()}.default"]
    assert len(steps) == model.state and flops(steps[0]) == 2 * 4 * 3 * model.cell.weight_hh_l0.numel()


def test_projections_and_relu() -> None:
    torch.manual_seed(0)
    check(Net(nn.LSTM, proj_size=2, num_layers=2).double(), {"x": torch.randn(4, 3, 5).double()})
    check(Net(nn.RNN, nonlinearity="relu").double(), {"x": torch.randn(4, 3, 5).double()})


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda c: c.__name__)
def test_long_sequences_make_no_long_graphs(cell: type[nn.RNNBase]) -> None:
    short, long = (capture(Net(cell), torch.randn(t, 3, 5)) for t in (3, 300))
    assert len(short.graph.nodes) == len(long.graph.nodes) < 70


def test_ops() -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    h, c = draw(2, 4), draw(2, 4)
    torch.library.opcheck(ops.lstm.default, (draw(3, 2, 16), h, c, draw(16, 4)))
    torch.library.opcheck(ops.gru.default, (draw(3, 2, 12), h, draw(12, 4), draw(12)))
    torch.library.opcheck(ops.rnn.default, (draw(3, 2, 4), h, draw(4, 4), False))
    assert torch.autograd.gradcheck(lambda *a: ops.lstm(*a)[:2], (draw(3, 2, 16), h, c, draw(16, 4)))
    assert torch.autograd.gradcheck(lambda *a: ops.gru(*a)[0], (draw(3, 2, 12), h, draw(12, 4), draw(12)))
    assert torch.autograd.gradcheck(lambda *a: ops.rnn(*a, True), (draw(3, 2, 4), h, draw(4, 4)))


def test_autocast() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(nn.LSTM)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x).float()

    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 3, 5)
    try:
        model(x)
    except RuntimeError as e:
        pytest.skip(f"PyTorch itself cannot run a bfloat16 LSTM on this processor: {str(e)[:60]}")
    check(model, {"x": x}, tolerance=0.05)
