"""`aten.lstm`, `aten.gru`, `aten.rnn_tanh` and `aten.rnn_relu` layer by layer: a matmul over all steps and one op for the recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import draws

_aten, _own = torch.ops.aten, torch.ops.autopar

# One direction of one layer: (gates, its first states, its weights after the input's) -> (outputs, last states)
Layer = Callable[[Tensor, Sequence[Tensor], Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def _lstm_layer(gates: Tensor, states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
    out, cells, _ = _own.lstm.default(gates + bias, *states, weight)
    return out, [out[-1], cells[-1]]


def _gru_layer(gates: Tensor, states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
    out, _ = _own.gru.default(gates, *states, weight, bias)
    return out, [out[-1]]


def _rnn_layer(relu: bool) -> Layer:
    def run(gates: Tensor, states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = _own.rnn.default(gates + bias, *states, weight, relu)
        return out, [out[-1]]

    return run


def _recurrent(op: Any, layer: Layer, many: bool) -> Callable[..., Any]:
    """The op with torch's own arguments; `many`: its states come as a list, as an LSTM's two do.

    An LSTM with projections (it has one weight more) is left to torch, which writes out every step.
    """

    def run(
        x: Tensor,
        states: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        *,
        random: Any,
        salt: int,
    ) -> tuple[Tensor, ...]:
        states = list(states) if many else [states]
        ways, each = 1 + bidirectional, 2 + 2 * has_biases
        if len(params) != num_layers * ways * each:
            return draws.TABLE[op](
                x, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, random=random, salt=salt
            )
        x = x.transpose(0, 1) if batch_first else x
        last: list[list[Tensor]] = []
        for number in range(num_layers):
            outs = []
            for way in range(ways):
                at = number * ways + way
                into, weight, *biases = params[at * each : (at + 1) * each]
                zero = weight.new_zeros(weight.shape[0])
                steps = x.flip(0) if way else x
                gates = torch.nn.functional.linear(steps, into, biases[0] if biases else None)
                begin = [s[at] for s in states]
                kind = begin[0].dtype  # under autocast, what the layer returns is of the states' dtype
                out, ends = layer(gates.to(kind), begin, weight.to(kind), (biases[1] if biases else zero).to(kind))
                outs.append(out.flip(0) if way else out)
                last.append(ends)
            x = torch.cat(outs, -1) if bidirectional else outs[0]
            if dropout and train and number + 1 < num_layers:
                x = draws.dropped(x, dropout, random, salt + number)
        ends = [torch.stack(column) for column in zip(*last, strict=True)]
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return run


_LAYERS: dict[Any, tuple[Layer, bool]] = {
    _aten.lstm.input: (_lstm_layer, True),
    _aten.gru.input: (_gru_layer, False),
    _aten.rnn_tanh.input: (_rnn_layer(False), False),
    _aten.rnn_relu.input: (_rnn_layer(True), False),
}
TABLE: dict[Any, Callable[..., Any]] = {op: _recurrent(op, layer, many) for op, (layer, many) in _LAYERS.items()}
