"""What cannot be captured is refused at once, with the user's own line and what to write instead."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from netmind_autopar.ir.errors import AutoparError, CaptureError, InputError
from netmind_autopar.tracer.capture import capture

Body = Callable[[Any, Tensor], Any]
CASES: dict[str, tuple[Body, str]] = {}


def refused(what: str) -> Callable[[Body], Body]:
    """The decorated function is a forward that must be refused with `what`; its line that ends in `# here` must be named."""

    def register(body: Body) -> Body:
        CASES[body.__name__] = (body, what)
        body.__code__ = body.__code__.replace(co_name="forward")  # torch notes lines of functions of this name alone
        return body

    return register


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table, self.lstm = nn.Linear(4, 4), nn.Embedding(5, 4, max_norm=1.0), nn.LSTM(1, 2, batch_first=True)
        self.calls, self.seen, self.last, self.mask = 0, [], None, None
        self.log: dict[str, int] = {}
        self.register_buffer("rows", torch.zeros(1, 4))


@refused("depends on the values")
def branches(self: Any, x: Tensor) -> Tensor:
    if self.fc(x).sum() > 0:  # here
        return x * 2
    return x


@refused("depends on the values")
def takes_an_item(self: Any, x: Tensor) -> Tensor:
    scale = x.max().item()  # here
    return self.fc(x) * scale


@refused("depends on the values")
def returns_an_item(self: Any, x: Tensor) -> dict[str, Any]:
    return {"loss": self.fc(x).sum(), "accuracy": x.mean().item()}  # here


@refused("depends on the values")
def loops(self: Any, x: Tensor) -> Tensor:
    while x.abs().max() > 1e-3:  # here
        x = x * 0.5
    return x


@refused("depends on the values")
def nonzero(self: Any, x: Tensor) -> Tensor:
    rows = x.nonzero()[:, 0]  # here
    return self.fc(x)[rows].sum()


@refused("depends on the values")
def selects(self: Any, x: Tensor) -> Tensor:
    return self.fc(x)[x > 0].sum()  # here


@refused("depends on the values")
def slices(self: Any, x: Tensor) -> Tensor:
    return self.fc(x)[: int(x.sum())]  # here


@refused("depends on the values")
def one_hot_of_unknown_width(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * nn.functional.one_hot(x.long()).sum()  # here


@refused("needs the value of a tensor")
def numpy_of_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * float(x.detach().numpy().sum())  # here


@refused("needs the value of a tensor")
def packs(self: Any, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x[:, :, None], torch.tensor([4, 3, 2]), batch_first=True)
    return self.lstm(packed)[0].data.sum()  # here


@refused("writes into what it was given")
def writes_an_input(self: Any, x: Tensor) -> Tensor:
    x.add_(1)  # here
    return self.fc(x)


@refused("writes into what it was given")
def writes_a_part_of_an_input(self: Any, x: Tensor) -> Tensor:
    x.view(-1)[2:4] = 0  # here
    return self.fc(x)


@refused("writes into what it was given")
def writes_a_parameter(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.fc.weight.mul_(0.9)  # here
    return self.fc(x)


@refused("max_norm")
def renormalises(self: Any, x: Tensor) -> Tensor:
    return self.table(x.long()).sum()  # here


@refused("calls changes from call to call")
def counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1  # here
    return self.fc(x) / self.calls


@refused("calls changes from call to call")
def alternates(self: Any, x: Tensor) -> Tensor:
    self.calls += 1  # here
    return self.fc(x) if self.calls % 2 else x


@refused("seen changes from call to call")
def collects(self: Any, x: Tensor) -> Tensor:
    self.seen.append(self.fc(x))  # here
    return torch.stack(self.seen).sum()


@refused("last changes from call to call")
def remembers(self: Any, x: Tensor) -> Tensor:
    x = self.fc(x) if self.last is None else self.fc(x) + self.last  # here
    self.last = x.detach()
    return x


@refused("replaces the buffer rows by one of another form")
def grows(self: Any, x: Tensor) -> Tensor:
    self.rows = torch.cat([self.rows, x.detach()])  # here
    return self.fc(x) + self.rows.sum()


@refused("random numbers from random")
def rolls_dice(self: Any, x: Tensor) -> Tensor:
    scale = 1 + random.random()  # here
    return self.fc(x) * scale


@refused("random numbers from numpy.random")
def rolls_dice_of_numpy(self: Any, x: Tensor) -> Tensor:
    import numpy as np

    y = self.fc(x)
    if np.random.rand() < 0.5:  # here
        y = y * 2
    return y


@refused("makes the parameter")
def makes_a_parameter(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.late = nn.Parameter(torch.ones(4))  # here
    return self.fc(x) * self.late


@refused("returns no tensor")
def returns_a_number(self: Any, x: Tensor) -> Any:
    return 3.0  # here


@refused("returns no tensor")
def returns_nothing(self: Any, x: Tensor) -> Any:  # here
    self.fc(x)


@refused("sparse tensors")
def is_sparse(self: Any, x: Tensor) -> Tensor:
    thin = x.t().to_sparse()  # here
    return torch.sparse.mm(thin, self.fc(x)).sum()


@refused("nested tensors")
def is_nested(self: Any, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([x, x[:2]])  # here
    return rows.to_padded_tensor(0.0).sum() + self.fc(x).sum()


@refused("computes gradients itself")
def goes_backward(self: Any, x: Tensor) -> Tensor:
    loss = self.fc(x).sum()
    loss.backward()  # here
    return loss


@refused("between devices")
def moves_to_another_device(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x).to("meta")  # here
    return y.sum()


@refused("neither argument, parameter nor buffer")
def assigns_data(self: Any, x: Tensor) -> Tensor:
    self.fc.weight.data = self.fc.weight.data * 0.5
    return self.fc(x)


@refused("failed while it was traced")
def is_wrong(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) @ self.fc(x)  # here


@pytest.mark.parametrize("name", CASES)
def test_forward_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    body, what = CASES[name]
    model = type("Model", (Model,), {"forward": body})()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CaptureError, match=what) as caught:
        capture(model, torch.ones(3, 4))
    error = caught.value
    assert error.why and error.try_
    marked = [line.strip() for line in _source(body) if line.endswith("# here")]
    assert len(marked) <= 1
    for line in marked:
        assert error.where.endswith(line) and "test_refusals.py:" in error.where, error
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.calls == 0 and not model.seen
    assert capfd.readouterr().err == "", "torch must not talk beside the error"


def _source(function: Callable[..., Any]) -> list[str]:
    import inspect

    return inspect.getsource(function).splitlines()


def keeps_a_log(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    self.log["rows"] = self.log.get("rows", 0) + len(x)
    self.last = self.fc(x)
    return self.last.sum()


def keeps_a_mask(self: Any, x: Tensor) -> Tensor:
    if self.mask is None or self.calls < len(x):
        self.mask, self.calls = torch.ones(len(x), 4).tril(), len(x)
    return (self.fc(x) * self.mask).sum()


@pytest.mark.parametrize("body", [keeps_a_log, keeps_a_mask], ids=lambda b: b.__name__)
def test_harmless_state_is_not_refused(body: Body) -> None:
    model = type("Model", (Model,), {"forward": body})()
    program = capture(model, torch.ones(3, 4))
    assert [i.name for i in program.inputs if i.role == "input"] == ["x"]
    assert model.calls == 0 and model.mask is None and model.last is None


class Plain(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.fc, self.value = nn.Linear(4, 4), value

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.fc(x) * self.value


X = torch.ones(3, 4)
CALLS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), X, "has no shape yet"),
    "scripted": (lambda: torch.jit.trace(nn.Linear(4, 4), X), X, "TorchScript"),
    "cumulative": (lambda: nn.Sequential(nn.BatchNorm1d(4, momentum=None)), X, "momentum=None"),
    "wrapped": (lambda: nn.DataParallel(nn.Linear(4, 4)), X, "wrapped already"),
    "plain attribute": (lambda: Plain(torch.ones(4, requires_grad=True)), X, "no parameter"),
    "too many": (lambda: nn.Linear(4, 4), (X, X), "do not fit"),
    "too few": (lambda: nn.Linear(4, 4), (), "do not fit"),
    "other name": (lambda: nn.Linear(4, 4), {"y": X}, "do not fit"),
    "sparse": (lambda: nn.Linear(4, 4), X.to_sparse(), "is a sparse tensor"),
    "two devices": (lambda: Plain(1.0), (X, X.to("meta")), "several devices"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_models_and_inputs_are_refused(name: str) -> None:
    make, inputs, what = CALLS[name]
    with pytest.raises(InputError, match=what) as caught:
        capture(make(), inputs)
    assert isinstance(caught.value, AutoparError) and caught.value.where and caught.value.try_


@pytest.mark.filterwarnings("ignore")
def test_nested_inputs() -> None:
    with pytest.raises(InputError, match="is a nested tensor"):
        capture(nn.Linear(4, 4), torch.nested.nested_tensor([X, X[:2]]))
