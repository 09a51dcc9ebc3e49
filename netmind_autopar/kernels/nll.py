"""`autopar::nll_loss`: the sum and the count of a negative log-likelihood loss; dividing them is left to the graph, so that a
mean over a split batch is the mean over the whole batch."""

from __future__ import annotations

import torch


def nll_loss(logp: torch.Tensor, target: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logp [n, c], integer target [n] -> (minus the sum of logp[i, target[i]], how many), both 0-dim of logp's dtype.

    Rows whose target is `ignore_index` do not count. bfloat16 and float16 are summed in float32.
    """
    used = target != ignore_index
    picked = logp.gather(1, target.masked_fill(~used, 0).unsqueeze(1)).squeeze(1).masked_fill(~used, 0)
    wide = torch.float32 if logp.dtype.itemsize < 4 else logp.dtype
    return picked.sum(dtype=wide).neg().to(logp.dtype), used.sum().to(logp.dtype)


def nll_loss_backward(grad_sum: torch.Tensor, target: torch.Tensor, classes: int, ignore_index: int) -> torch.Tensor:
    """grad_sum 0-dim -> [n, classes] of its dtype: -grad_sum at every counted target, 0 elsewhere."""
    used = target != ignore_index
    out = torch.zeros((target.shape[0], classes), dtype=grad_sum.dtype, device=target.device)
    return out.scatter_(1, target.masked_fill(~used, 0).unsqueeze(1), (-grad_sum * used).unsqueeze(1))


@torch.library.custom_op("autopar::nll_loss", mutates_args=())
def _nll_loss(logp: torch.Tensor, target: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return nll_loss(logp, target, ignore_index)


@_nll_loss.register_fake
def _fake(logp, target, ignore_index):
    return logp.new_empty(()), logp.new_empty(())


@torch.library.custom_op("autopar::nll_loss_backward", mutates_args=())
def _nll_loss_backward(grad_sum: torch.Tensor, target: torch.Tensor, classes: int, ignore_index: int) -> torch.Tensor:
    return nll_loss_backward(grad_sum, target, classes, ignore_index)


@_nll_loss_backward.register_fake
def _fake_backward(grad_sum, target, classes, ignore_index):
    return grad_sum.new_empty((target.shape[0], classes))


def _setup(ctx, inputs, output):
    logp, target, ctx.ignore_index = inputs
    ctx.classes = logp.shape[1]
    ctx.save_for_backward(target)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_sum, _grad_count):
    if grad_sum is None:
        return None, None, None
    (target,) = ctx.saved_tensors
    return torch.ops.autopar.nll_loss_backward.default(grad_sum, target, ctx.classes, ctx.ignore_index), None, None


_nll_loss.register_autograd(_backward, setup_context=_setup)

DIRECT = {torch.ops.autopar.nll_loss.default: nll_loss, torch.ops.autopar.nll_loss_backward.default: nll_loss_backward}
