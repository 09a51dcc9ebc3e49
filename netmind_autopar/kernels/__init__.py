"""Ops of our own, in the namespace `autopar`. Importing this package registers them.

`DIRECT` maps each op to the plain function that computes it, for callers that need no dispatcher.
"""

from . import attention, dropout, embedding, grouped, loss, nll

DIRECT = {**attention.DIRECT, **dropout.DIRECT, **embedding.DIRECT, **grouped.DIRECT, **loss.DIRECT, **nll.DIRECT}

__all__ = ["DIRECT"]
