"""A plain problem of choices: every node takes one strategy, pairs of nodes cost together, and memory is limited at every moment.

    minimise   Σ_i cost_i(x_i) + Σ_ij table_ij(x_i, x_j)
    subject to Σ_{i alive at t} usage_i(x_i) ≤ limit   for every moment t

The form of the public contest on intra-operator parallelism (https://github.com/google/iopddl): a node is alive at the moments
start ≤ t < end of its interval, and a price of `FORBIDDEN` or more rules a choice out.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.errors import InputError

FORBIDDEN = 1e17


@dataclass(frozen=True, eq=False)
class Instance:
    """costs[i]: [strategies]; usages[i]: bytes, the same shape; intervals: [nodes, 2]; edges[e]: (i, j), tables[e]: [of i, of j].

    Forbidden choices cost inf. `limit` None: memory is not limited.
    """

    name: str
    costs: tuple[np.ndarray, ...]
    usages: tuple[np.ndarray, ...]
    intervals: np.ndarray
    edges: tuple[tuple[int, int], ...]
    tables: tuple[np.ndarray, ...]
    limit: float | None

    @property
    def moments(self) -> int:
        """Moments are 0 … moments - 1."""
        return max(1, int(self.intervals[:, 1].max(initial=0)))


def _prices(row: Sequence[float]) -> np.ndarray:
    found = np.array(row, np.float64)
    found[found >= FORBIDDEN] = np.inf
    return found


def read(path: str | Path) -> Instance:
    """An instance from a contest file, JSON or gzipped JSON. Raises InputError for files of another form."""
    path = Path(path)
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            data: dict[str, Any] = json.load(file)["problem"]
        nodes, edges = data["nodes"], data.get("edges", {"nodes": [], "costs": []})
        costs = tuple(_prices(row) for row in nodes["costs"])
        pairs = tuple((int(i), int(j)) for i, j in edges["nodes"])
        tables = tuple(_prices(row).reshape(len(costs[i]), len(costs[j])) for (i, j), row in zip(pairs, edges["costs"], strict=True))
        usages = tuple(np.array(row, np.float64) for row in nodes["usages"])
        if [len(u) for u in usages] != [len(c) for c in costs] or len(nodes["intervals"]) != len(costs):
            raise ValueError("costs, usages and intervals of the nodes do not fit together")
        intervals = np.array(nodes["intervals"], np.int64).reshape(len(costs), 2)
        return Instance(str(data.get("name", path.stem)), costs, usages, intervals, pairs, tables, data.get("usage_limit"))
    except OSError as e:
        raise InputError(f"cannot read {path}", where=str(path), why=str(e), try_="a path to an instance file") from None
    except (KeyError, TypeError, ValueError, IndexError, EOFError, RecursionError) as e:
        raise InputError(
            f"{path} is no instance of the contest",
            where=str(path),
            why=f"{type(e).__name__}: {e}",
            try_='JSON with "problem": {"nodes": {"intervals", "costs", "usages"}, "edges": {"nodes", "costs"}, "usage_limit"}',
        ) from None


def evaluate(instance: Instance, choice: Sequence[int]) -> tuple[float, float]:
    """(cost, peak usage) of one choice, counted out without anything that the solver uses. Raises ValueError for a bad choice."""
    if len(choice) != len(instance.costs) or any(not 0 <= k < len(c) for k, c in zip(choice, instance.costs, strict=True)):
        raise ValueError("a choice holds one strategy index per node, each within the node's strategies")
    total = sum(float(c[k]) for c, k in zip(instance.costs, choice, strict=True))
    total += sum(float(t[choice[i], choice[j]]) for (i, j), t in zip(instance.edges, instance.tables, strict=True))
    change = np.zeros(instance.moments + 1)
    for (start, end), usage, k in zip(instance.intervals, instance.usages, choice, strict=True):
        if start < end:
            change[start] += usage[k]
            change[end] -= usage[k]
    return total, float(change.cumsum().max(initial=0.0))
