"""How long a step takes whose layers lie on several stages, each of which works on one micro-batch after the other.

    1F1B          (m + p − 1) · (f + b)                  m micro-batches, p stages, f and b seconds of one stage
    interleaved   (m + (p − 1) / v) · (f + b)            v chunks of layers per device instead of one
    zero bubble   m · (f + b)                            the bound that no schedule passes

(Narayanan et al.: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021, section 2.2.) The
slowest stage sets the pace; the others add only what the first and the last micro-batch spend in them.
"""

from __future__ import annotations

from collections.abc import Sequence


def pipeline_seconds(stages: Sequence[float], micro_batches: int, *, chunks: int = 1, send_s: float = 0.0) -> float:
    """Seconds of a step. stages: forward and backward of one micro-batch on each stage. chunks: of layers per device, 1 for 1F1B.
    send_s: of an activation, or its gradient, from one stage to the next.

    Raises ValueError without stages or micro-batches.
    """
    if not stages or micro_batches < 1 or chunks < 1:
        raise ValueError(f"{len(stages)} stages, {micro_batches} micro-batches, {chunks} chunks")
    slowest = max(stages)
    fill = (sum(stages) - slowest) / chunks + 2 * send_s * (len(stages) - 1)
    more = 2 * send_s * (chunks - 1) * micro_batches if len(stages) > 1 else 0.0  # every chunk's border is passed by every micro-batch
    return micro_batches * slowest + fill + more


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """The share of the step in which an equally loaded stage waits."""
    idle = (stages - 1) / chunks
    return idle / (micro_batches + idle)
