"""`autopar::lstm`, `autopar::gru`, `autopar::rnn`: one layer over all its steps, in one direction, as one op.

What a step shares with no other, the product of the input and its weight, stays outside as one large matmul; so does the gradient
of the recurrent weight. A graph of a recurrent model then has a size that does not depend on the length of its sequences, and the batch
splits. Formulas and the order of gates are those of torch.nn.LSTM and torch.nn.GRU (Hochreiter and Schmidhuber 1997; Cho et al.,
arXiv:1406.1078). Time comes first: t steps, a batch of b, h units.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lstm(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gates [t, b, 4h] from the inputs (in, forget, cell, out), states [b, h], weight [4h, h] -> outputs and cells [t, b, h], and the
    gates after their activations [t, b, 4h], which backward needs."""
    outs, cells, acts = [], [], []
    for now in gates.unbind(0):
        i, f, g, o = torch.addmm(now, hidden, weight.t()).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * cell + i * g
        hidden = o * cell.tanh()
        outs.append(hidden)
        cells.append(cell)
        acts.append(torch.cat([i, f, g, o], 1))
    return torch.stack(outs), torch.stack(cells), torch.stack(acts)


def lstm_backward(
    grad: Tensor, grad_cells: Tensor, acts: Tensor, cells: Tensor, cell: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of outputs and cells [t, b, h] -> those of gates [t, b, 4h] and of both first states [b, h]."""
    out = torch.empty_like(acts)
    dh, dc = torch.zeros_like(cell), torch.zeros_like(cell)
    for t in range(len(acts) - 1, -1, -1):
        i, f, g, o = acts[t].chunk(4, 1)
        wide = cells[t].tanh()
        dh = dh + grad[t]
        dc = dc + grad_cells[t] + dh * o * (1 - wide * wide)
        before = cells[t - 1] if t else cell
        parts = (dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * wide * o * (1 - o))
        torch.cat(parts, 1, out=out[t])
        dh, dc = out[t] @ weight, dc * f
    return out, dh, dc


def gru(gates: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """gates [t, b, 3h] from the inputs (reset, update, new), state [b, h], weight [3h, h], bias [3h] -> outputs [t, b, h], and reset,
    update and new gates after their activations with the recurrent part of the last, [t, b, 4h]."""
    outs, acts = [], []
    for now in gates.unbind(0):
        xr, xz, xn = now.chunk(3, 1)
        hr, hz, hn = torch.addmm(bias, hidden, weight.t()).chunk(3, 1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        hidden = n + z * (hidden - n)
        outs.append(hidden)
        acts.append(torch.cat([r, z, n, hn], 1))
    return torch.stack(outs), torch.stack(acts)


def gru_backward(grad: Tensor, acts: Tensor, out: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of outputs [t, b, h] -> those of gates [t, b, 3h], of the recurrent product [t, b, 3h] and of the first state [b, h]."""
    dx = grad.new_empty(*grad.shape[:2], 3 * grad.shape[2])
    dy = torch.empty_like(dx)
    dh = torch.zeros_like(hidden)
    for t in range(len(acts) - 1, -1, -1):
        r, z, n, hn = acts[t].chunk(4, 1)
        before = out[t - 1] if t else hidden
        dh = dh + grad[t]
        dn = dh * (1 - z) * (1 - n * n)
        dr, dz = dn * hn * r * (1 - r), dh * (before - n) * z * (1 - z)
        torch.cat((dr, dz, dn), 1, out=dx[t])
        torch.cat((dr, dz, dn * r), 1, out=dy[t])
        dh = dy[t] @ weight + dh * z
    return dx, dy, dh


def rnn(gates: Tensor, hidden: Tensor, weight: Tensor, relu: bool) -> Tensor:
    """gates [t, b, h] from the inputs, state [b, h], weight [h, h] -> outputs [t, b, h]."""
    outs = []
    for now in gates.unbind(0):
        hidden = torch.addmm(now, hidden, weight.t())
        hidden = hidden.relu() if relu else hidden.tanh()
        outs.append(hidden)
    return torch.stack(outs)


def rnn_backward(grad: Tensor, out: Tensor, weight: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Gradient of outputs [t, b, h] -> those of gates [t, b, h] and of the first state [b, h]."""
    dx, dh = torch.empty_like(grad), torch.zeros_like(grad[0])
    for t in range(len(out) - 1, -1, -1):
        dh = dh + grad[t]
        dx[t] = dh * (out[t] > 0) if relu else dh * (1 - out[t] * out[t])
        dh = dx[t] @ weight
    return dx, dh


_lstm = torch.library.custom_op("autopar::lstm", lstm, mutates_args=())
_lstm_backward = torch.library.custom_op("autopar::lstm_backward", lstm_backward, mutates_args=())
_gru = torch.library.custom_op("autopar::gru", gru, mutates_args=())
_gru_backward = torch.library.custom_op("autopar::gru_backward", gru_backward, mutates_args=())
_rnn = torch.library.custom_op("autopar::rnn", rnn, mutates_args=())
_rnn_backward = torch.library.custom_op("autopar::rnn_backward", rnn_backward, mutates_args=())


def _like(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:2], width)


_lstm.register_fake(lambda gates, hidden, cell, weight: (_like(gates, cell.shape[1]), _like(gates, cell.shape[1]), torch.empty_like(gates)))
_lstm_backward.register_fake(
    lambda grad, grad_cells, acts, cells, cell, weight: (torch.empty_like(acts), torch.empty_like(cell), torch.empty_like(cell))
)
_gru.register_fake(lambda gates, hidden, weight, bias: (_like(gates, hidden.shape[1]), _like(gates, 4 * hidden.shape[1])))
_gru_backward.register_fake(
    lambda grad, acts, out, hidden, weight: (_like(grad, weight.shape[0]), _like(grad, weight.shape[0]), torch.empty_like(hidden))
)
_rnn.register_fake(lambda gates, hidden, weight, relu: torch.empty_like(gates))
_rnn_backward.register_fake(lambda grad, out, weight, relu: (torch.empty_like(grad), torch.empty_like(grad[0])))


def _before(hidden: Tensor, out: Tensor) -> Tensor:
    """The states that each step started from, all steps and rows in one dim."""
    return torch.cat([hidden.unsqueeze(0), out[:-1]]).flatten(0, 1)


def _lstm_setup(ctx, inputs, output):
    _, hidden, cell, weight = inputs
    out, cells, acts = output
    ctx.save_for_backward(hidden, cell, weight, out, cells, acts)
    ctx.mark_non_differentiable(acts)


def _lstm_grad(ctx, grad, grad_cells, _):
    hidden, cell, weight, out, cells, acts = ctx.saved_tensors
    dx, dh, dc = torch.ops.autopar.lstm_backward.default(grad, grad_cells, acts, cells, cell, weight)
    return dx, dh, dc, dx.flatten(0, 1).t() @ _before(hidden, out)


def _gru_setup(ctx, inputs, output):
    _, hidden, weight, _ = inputs
    ctx.save_for_backward(hidden, weight, *output)
    ctx.mark_non_differentiable(output[1])


def _gru_grad(ctx, grad, _):
    hidden, weight, out, acts = ctx.saved_tensors
    dx, dy, dh = torch.ops.autopar.gru_backward.default(grad, acts, out, hidden, weight)
    return dx, dh, dy.flatten(0, 1).t() @ _before(hidden, out), dy.sum((0, 1))


def _rnn_setup(ctx, inputs, output):
    _, hidden, weight, ctx.relu = inputs
    ctx.save_for_backward(hidden, weight, output)


def _rnn_grad(ctx, grad):
    hidden, weight, out = ctx.saved_tensors
    dx, dh = torch.ops.autopar.rnn_backward.default(grad, out, weight, ctx.relu)
    return dx, dh, dx.flatten(0, 1).t() @ _before(hidden, out), None


_lstm.register_autograd(_lstm_grad, setup_context=_lstm_setup)
_gru.register_autograd(_gru_grad, setup_context=_gru_setup)
_rnn.register_autograd(_rnn_grad, setup_context=_rnn_setup)

DIRECT = {getattr(torch.ops.autopar, call.__name__).default: call for call in (lstm, lstm_backward, gru, gru_backward, rnn, rnn_backward)}
