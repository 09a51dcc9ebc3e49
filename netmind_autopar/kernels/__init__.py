"""Ops of our own, in the namespace `autopar`. Importing this package registers them.

`DIRECT` maps each op to the plain function that computes it, for callers that need no dispatcher.
"""

from . import attention, bags, dropout, embedding, fused, grouped, indexing, loss, nll, random, recurrent, turns

_PARTS = (attention, bags, dropout, embedding, fused, grouped, indexing, loss, nll, random, recurrent, turns)
DIRECT = {op: call for part in _PARTS for op, call in part.DIRECT.items()}

__all__ = ["DIRECT"]
