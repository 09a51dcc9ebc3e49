"""Fused ops: Triton kernels where they can run, the same in plain PyTorch elsewhere. docs/kernels.md says what each one is."""

from . import adamw, cross_entropy_ops, dropout_add, gated, group_norm, lamb, linear_loss, norm_ops, permute, rope, softmax

_PARTS = (adamw, cross_entropy_ops, dropout_add, gated, group_norm, lamb, linear_loss, norm_ops, permute, rope, softmax)
DIRECT = {op: call for part in _PARTS for op, call in part.DIRECT.items()}

__all__ = ["DIRECT"]
