"""Who owns which memory: gradients, results and saved values of a ParallelModule never share what somebody may write into.

One process, a mesh of one device: what is tested is the module around the emitted code, which verification does not run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from netmind_autopar import autoparallelize
from netmind_autopar.ir.errors import AutoparError
from netmind_autopar.runtime.dtensors import owned


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    started = not dist.is_initialized()
    yield
    if started and dist.is_initialized():
        dist.destroy_process_group()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(4, 6, generator=make, dtype=torch.float64)) for _ in range(2))
        self.c = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("kept", torch.randn(4, 6, generator=make, dtype=torch.float64))
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))


class OneGradientForTwo(Base):
    def forward(self, x: Tensor) -> Tensor:
        return ((self.a + self.b) * x).sin().sum() + self.c


class OverlappingGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a, self.b]) + torch.cat([self.b[2:], self.a, self.b[:2]])
        return (y[:4] * x + y[4:]).sin().sum()


class GradientOfASum(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a.sum() + self.b.t()[0].sum() + self.c + x.sum()


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x / 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


class GradientIsTheParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        return _Own.apply(self.a).sum() + (self.b * x).sum()


class OldBufferIsUsed(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        old = self.kept.clone()
        loss = (self.a * old * x).sin().sum() + (self.b * old.t().reshape(4, 6)).sum()
        self.kept.mul_(0.5)
        return {"loss": loss, "old": old, "corner": old[:2, 1:]}


class LossIsKept(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = (self.a * x).sin().sum()
        self.last.copy_(loss.detach())
        return {"loss": loss}


class LossTwice(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = (self.a * x).sin().sum()
        return {"loss": loss, "again": loss}


class InputLikeAParameter(Base):
    def forward(self, a: Tensor) -> Tensor:
        return (self.a * a * self.b).sin().sum()


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.BatchNorm1d(6, dtype=torch.float64)
        self.second, self.linear = self.first, nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.linear(self.first(x))).sin().sum()


MODELS = (
    OneGradientForTwo,
    OverlappingGradients,
    GradientOfASum,
    GradientIsTheParameter,
    OldBufferIsUsed,
    LossIsKept,
    LossTwice,
    InputLikeAParameter,
    SharedNorm,
)


def plain(value: object) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[return-value]


def pair(make: type[nn.Module]) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = make()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    return autoparallelize(model, ours, "a=1", cluster="h100-sxm"), copy.deepcopy(model), ours, theirs


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.allclose(plain(a), b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "written into"])
@pytest.mark.parametrize("make", MODELS)
def test_training_is_that_of_the_model(make: type[nn.Module], scaled: bool) -> None:
    """`scaled`: gradients are multiplied in place, as clipping does, and accumulate over two calls."""
    pm, model, ours, theirs = pair(make)
    sides = [(m, x, torch.optim.SGD(m.parameters(), lr=0.1)) for m, x in ((pm, ours), (model, theirs))]
    for _ in range(2):
        results = []
        for m, x, optimizer in sides:
            optimizer.zero_grad()
            for _ in range(1 + scaled):
                result = m(x)
                (result if isinstance(result, Tensor) else result["loss"]).backward()
            if scaled:
                for p in m.parameters():
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            results.append(result)
        if isinstance(results[1], dict):
            assert all(same(results[0][k], results[1][k]) for k in results[1])
        else:
            assert same(*results)
        assert same(ours.grad, theirs.grad)
        found = dict(pm.named_parameters())
        for name, p in model.named_parameters():
            assert same(found[name].grad, p.grad), name
        buffers = dict(pm.named_buffers(remove_duplicate=False))
        for name, buffer in model.named_buffers(remove_duplicate=False):
            assert same(buffers[name], buffer), name
        for _, _, optimizer in sides:
            optimizer.step()


def test_writing_into_what_backward_needs_is_an_error() -> None:
    class Root(Base):
        def forward(self, x: Tensor) -> Tensor:
            return (self.a * x).square().sum().sqrt()

    pm, _, x, _ = pair(Root)
    loss = pm(x)
    with torch.no_grad():
        loss.div_(4)
    with pytest.raises(AutoparError, match="in place"):
        loss.backward()


def test_owned_copies_only_what_is_shared() -> None:
    base, other = torch.zeros(8), torch.zeros(3)
    kept = [base[:4], base[4:], other]
    assert [a is b for a, b in zip(owned(kept, []), kept, strict=True)] == [True, True, True]
    shared = [base[:5], base[4:], base[:5], torch.zeros(1).expand(4), other]
    assert [a is b for a, b in zip(owned(shared, [other]), shared, strict=True)] == [True, False, False, False, False]
