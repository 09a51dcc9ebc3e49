"""Optimizers whose steps depend on norms of whole parameters, and loss scaling, exact also where parameters are split over devices.

torch.optim has neither LARS nor LAMB. Both take plain tensors and DTensors, as a `ParallelModule` has them: with split parameters every
device works on its piece, and one all-reduce per mesh brings the squares of all norms together.

    LARS    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, algorithm 1
    LAMB    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv:1904.00962, algorithm 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from .ir.errors import InputError
from .runtime.norms import MAX, local_of, reduced, sums_over_meshes, written

__all__ = ["LAMB", "LARS", "GradScaler"]


class LARS(Optimizer):
    """Momentum SGD whose step of each parameter w with gradient g is lr · trust · |w| / (|g| + weight_decay · |w| + eps) as long.

    v ← momentum · v + lr · ratio · (g + weight_decay · w);   w ← w - v. The ratio is 1 where |w| or |g| is 0, and for parameters with at
    most `skip_dims` dims (biases, norms), which then are not decayed either; skip_dims=-1 leaves out none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust: float = 1e-3,
        eps: float = 1e-9,
        skip_dims: int = 1,
    ) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, eps=eps)
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps, "skip_dims": skip_dims}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure` as of any torch optimizer."""
        loss = _run(closure)
        found = _with_gradients(self)
        sums = sums_over_meshes([(p, t) for p, _ in found for t in (p, p.grad)])
        for i, (p, group) in enumerate(found):
            w, g = local_of(p), local_of(p.grad)
            decay, ratio = group["weight_decay"], 1.0
            if p.dim() > group["skip_dims"]:
                of_w, of_g = sums[2 * i].sqrt(), sums[2 * i + 1].sqrt()
                ratio = torch.where((of_w > 0) & (of_g > 0), group["trust"] * of_w / (of_g + decay * of_w + group["eps"]), 1.0).to(w.dtype)
            else:
                decay = 0.0
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            v = local_of(state["momentum_buffer"])
            v.mul_(group["momentum"]).add_((g.to(w.dtype) + decay * w).mul_(ratio * group["lr"]))
            w.sub_(v)
        written(p for p, _ in found)
        return loss


class LAMB(Optimizer):
    """Adam whose step of each parameter is made as long as lr times the parameter.

    m, v as in Adam with bias correction; u = m / (sqrt(v) + eps) + weight_decay · w;   w ← w - lr · |w| / |u| · u. The ratio |w| / |u| is
    1 where either norm is 0, and for parameters with at most `skip_dims` dims; skip_dims=-1, the default, leaves out none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        skip_dims: int = -1,
    ) -> None:
        _check(lr=lr, weight_decay=weight_decay, eps=eps)
        if not all(0 <= b < 1 for b in betas):
            raise InputError(f"betas={betas!r} are no decay rates", where="LAMB", try_="two numbers from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "skip_dims": skip_dims})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure` as of any torch optimizer."""
        loss = _run(closure)
        found = _with_gradients(self)
        updates = [self._update(p, group) for p, group in found]
        sums = sums_over_meshes([(p, t) for (p, _), u in zip(found, updates, strict=True) for t in (p, u)])
        for i, ((p, group), update) in enumerate(zip(found, updates, strict=True)):
            w, ratio = local_of(p), 1.0
            if p.dim() > group["skip_dims"]:
                of_w, of_u = sums[2 * i].sqrt(), sums[2 * i + 1].sqrt()
                ratio = torch.where((of_w > 0) & (of_u > 0), of_w / of_u, 1.0).to(w.dtype)
            w.sub_(update.mul_(ratio * group["lr"]))
        written(p for p, _ in found)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The direction of the step, local; the state moves on."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        w, g = local_of(p), local_of(p.grad).to(p.dtype)
        m, v, (b1, b2) = local_of(state["exp_avg"]), local_of(state["exp_avg_sq"]), group["betas"]
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (v / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        return (m / (1 - b1 ** state["step"])).div_(root).add_(w, alpha=group["weight_decay"])


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for split gradients: an overflow on one device is one on all, so that all leave out the same step.

    With torch's own each device decides by its piece alone (PyTorch 2.13), and parameters drift apart.
    """

    def _unscale_grads_(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> dict[torch.device, Tensor]:
        gradients = [p.grad for p, _ in _with_gradients(optimizer)]
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        found: dict[torch.device, Tensor] = {}
        for g in gradients:
            if g.dtype == torch.float16 and not allow_fp16:
                raise InputError(
                    "gradients in float16 cannot be unscaled",
                    why="they would underflow",
                    try_="parameters in float32, with autocast in the model",
                )
            by_kind.setdefault((local_of(g).device, g.dtype), []).append(local_of(g))
        for (device, _), locals_ in by_kind.items():
            found.setdefault(device, found_inf.to(device, copy=True))
            torch._amp_foreach_non_finite_check_and_unscale_(locals_, found[device], inv_scale.to(device))
        for mesh, device in {g.device_mesh: local_of(g).device for g in gradients if isinstance(g, DTensor)}.items():
            reduced(found[device], mesh, MAX)
        written(gradients)
        return found


def _with_gradients(optimizer: Optimizer) -> list[tuple[Any, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _run(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise InputError(f"{name}={value!r} is negative or no number", try_=f"{name} of 0 or more")
