"""Seconds of a collective by the algorithms that a library chooses from. With n devices, b local bytes, latency α and bandwidth B:

    ring           all kinds      messages · (n − 1) α + bytes / B, `bytes` those that one device sends: 2 (n − 1) / n · b in an all-reduce
    tree           all_reduce     2 ⌈log2 n⌉ α + 2 b / B, between nodes: two binary trees, each with half of the bytes, in pieces
                   all_gather     ⌈log2 n⌉ α + bytes / B, between nodes of one device of the group each: pieces travel along parallel trees;
                                  reduce_scatter the other way round
    hierarchical   all kinds      of g devices on each of m nodes, αi and Bi between them:
                   all_reduce     reduce-scatter within the node, all-reduce of b / g between the nodes (ring or tree), all-gather within
                   all_gather     between the nodes, then within; reduce_scatter the other way round
                   all_to_all     what stays on the node goes over its link, the rest between the nodes

Within a node the trees of NCCL are chains, no faster than a ring; the tables of A100s in presets.py are those of a ring.
A ring through nodes of several devices is as many rings as devices are on a node, each over a network card of its own: it carries
min(Bi, g B).

Sources: Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005 (ring); Sanders, Speck,
Träff: Two-Tree Algorithms for Full Bandwidth Broadcast, Reduction and Scan, 2009, and NVIDIA's description of NCCL 2.4 (double binary
tree, all-reduce alone); Jeaugey: PAT: a new algorithm for all-gather and reduce-scatter operations at scale, 2025 (NCCL 2.23, one device
per node; recursive doubling and halving of Thakur et al. cost the same); Cho et al.: BlueConnect, MLSys 2019 (hierarchical).
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from ..ir.mesh import Axis

MESSAGES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}  # of a ring, times (n − 1)
Amount = TypeVar("Amount", float, np.ndarray)


def fastest(kind: str, axis: Axis, sent: Amount, latency_share: Amount | float = 1.0) -> Amount | float:
    """Seconds of the fastest algorithm. sent: bytes that every device sends in a ring; latency_share: the part of the latency paid."""
    several = 1 < axis.within < axis.size
    rate = min(axis.inner_bandwidth_bytes_s, axis.within * axis.bandwidth_bytes_s) if several else axis.bandwidth_bytes_s
    found = latency_share * MESSAGES[kind] * (axis.size - 1) * axis.latency_s + sent / rate
    if kind == "all_reduce" and axis.within:
        found = _less(found, latency_share * tree_latency(axis.size, axis.latency_s) + sent * (axis.size / (axis.size - 1)) / rate)
    if kind in ("all_gather", "reduce_scatter") and axis.within == 1:
        found = _less(found, latency_share * tree_latency(axis.size, axis.latency_s) / 2 + sent / rate)
    return _less(found, _hierarchical(kind, axis, sent, latency_share)) if several else found


def tree_latency(n: int, latency_s: float) -> float:
    """Seconds until the first byte of an all-reduce by trees has gone up and down."""
    return 2 * math.ceil(math.log2(n)) * latency_s


def _hierarchical(kind: str, axis: Axis, sent: Amount, latency_share: Amount | float) -> Amount | float:
    n, g = axis.size, axis.within
    m = n // g
    inside = latency_share * (g - 1) * axis.inner_latency_s
    if kind == "all_to_all":  # sent: (n − 1) / n of the bytes, an equal piece to each
        between = latency_share * (m - 1) * axis.latency_s + sent * ((n - g) / (n - 1)) / axis.bandwidth_bytes_s
        return between + inside + sent * ((g - 1) / (n - 1)) / axis.inner_bandwidth_bytes_s
    if kind != "all_reduce":  # sent: n − 1 pieces
        piece = sent / (n - 1)
        between = latency_share * (m - 1) * axis.latency_s + (m - 1) * piece / axis.bandwidth_bytes_s
        return between + inside + (g - 1) * m * piece / axis.inner_bandwidth_bytes_s
    whole = sent * (n / (2 * (n - 1)))
    ring = latency_share * 2 * (m - 1) * axis.latency_s + 2 * (m - 1) / m * (whole / g) / axis.bandwidth_bytes_s
    tree = latency_share * tree_latency(m, axis.latency_s) + 2 * (whole / g) / axis.bandwidth_bytes_s
    return _less(ring, tree) + 2 * (inside + (g - 1) / g * whole / axis.inner_bandwidth_bytes_s)


def _less(a: Amount | float, b: Amount | float) -> Amount | float:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)  # type: ignore[return-value]
    return min(a, b)
