"""Batches of a data set as a plan wants them: every rank reads its own rows, in an order that no mesh and no plan changes.

The order of a data set is that of global batches: the same on every rank, for every plan, mesh and number of processes. What a rank
reads of a batch is what its pieces of the inputs need; other dims than the first are cut afterwards. The position counts samples that
were handed out by `read`, not those that a loader fetched ahead, so a resumed run goes on with the very next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..ir.errors import InputError
from ..ir.spec import Replicate, Shard, Spec, plain, shard
from .dtensors import as_dtensor, torch_placements

if TYPE_CHECKING:
    from .graph import Graph

KIND = "netmind-autopar-batches"


class Batches(Sampler[list[int]]):
    """The batch sampler of one rank: `DataLoader(dataset, batch_sampler=batches)`; `batches.read(loader)` gives what the module takes.

    size: samples of the data set. batch_size: rows of a global batch, the planned one by default. With `shuffle` each epoch has an order
    of its own, from `seed`. drop_last: leave out what is less than a batch.
    """

    def __init__(
        self, graph: Graph, size: int, *, batch_size: int | None = None, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> None:
        rows = {s.shape[0] for s in graph.roles.user_specs if s.shape}
        if batch_size is None and len(rows) != 1:
            raise InputError(
                f"the inputs have {sorted(rows)} rows", why="the size of a batch does not follow from that", try_="batch_size=..."
            )
        self.graph, self.size, self.batch_size = graph, size, rows.pop() if batch_size is None else batch_size
        if size < 1 or self.batch_size < 1 or (drop_last and size < self.batch_size):
            raise InputError(f"{size} samples make no batch of {self.batch_size}", try_="drop_last=False, or a smaller batch")
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch, self.position = 0, 0  # samples of this epoch that were handed out

    def __len__(self) -> int:
        left = self.size - self.position
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)

    def totals(self) -> list[int]:
        """Rows of the global batches that are left of this epoch."""
        left = self.size - self.position
        return [min(self.batch_size, left - k * self.batch_size) for k in range(len(self))]

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        start = self.position
        for total in self.totals():
            first, end = hull(self.graph, total)
            yield order[start + first : start + end].tolist()
            start += total

    def read(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader over these samples, each as the module takes it: a dict, a tuple or a tensor.

        Ends with the epoch; the next call begins the next one. A loader's batch holds this rank's rows, whole in all other dims.
        """
        totals = self.totals()
        for total, batch in zip(totals, loader, strict=True):
            given = placed(self.graph, batch, total)
            self.position += total
            yield given
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the data set was read to, for any mesh."""
        return {"kind": KIND, "epoch": self.epoch, "position": self.position, **self._law()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises InputError when the state is of another data set or order."""
        mine = {"kind": KIND, **self._law()}
        wrong = [key for key, value in mine.items() if state.get(key) != value]
        if wrong:
            key = wrong[0]
            raise InputError(
                f"the position was saved with {key}={state.get(key)!r}, and it is {mine[key]!r} here",
                why="the order of the samples would be another one",
                try_="the same data set, seed and shuffle as before",
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _law(self) -> dict[str, Any]:
        return {"size": self.size, "shuffle": self.shuffle, "seed": self.seed}


def _rows(graph: Graph, spec: Spec, total: int) -> tuple[int, int]:
    """Which rows of a batch of `total` an input's piece has here."""
    placements = [p if isinstance(p, Shard) and p.dim == 0 else Replicate() for p in spec.placements]
    mine = shard(torch.arange(total), plain((total,), torch.int64, placements), graph.place.sizes, graph.place.coord)
    return (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)


def hull(graph: Graph, total: int) -> tuple[int, int]:
    """The rows of a batch of `total` that this rank needs for any of its inputs; one at least, since loaders cannot make none."""
    found = [r for r in (_rows(graph, s, total) for s in graph.roles.user_specs if s.shape) if r[1] > r[0]]
    return (min(a for a, _ in found), max(b for _, b in found)) if found else (0, 1)


def placed(graph: Graph, batch: Any, total: int, have: tuple[int, int] | None = None) -> Any:
    """A batch whose tensors hold the rows `have` (those of `hull`) of `total`, as DTensors that lie as the plan has them.

    With inputs="global" the tensors themselves. Raises InputError for tensors with another number of rows.
    """
    if graph.plan.inputs == "global":
        return batch
    first, end = hull(graph, total) if have is None else have
    args, kwargs = (
        ((), dict(batch)) if isinstance(batch, dict) else (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})
    )
    signature, out = graph.executable.signature, []
    for item, spec, x in zip(graph.roles.users, graph.roles.user_specs, signature.pack(args, kwargs), strict=True):
        if spec.shape and x.shape[0] != end - first:
            raise InputError(
                f"the input {item.name!r} has {x.shape[0]} rows, and rows {first} to {end} of {total} belong here",
                why="a batch holds the rows that its sampler asked for",
                try_="DataLoader(dataset, batch_sampler=batches)",
            )
        out.append(_piece(graph, spec, x, total, first) if spec.shape else x.to(graph.place.device))
    args, kwargs = signature.rebuild(out)
    return kwargs if isinstance(batch, dict) else args if isinstance(batch, (tuple, list)) else args[0]


def _piece(graph: Graph, spec: Spec, x: Tensor, total: int, first: int) -> Tensor:
    start, end = _rows(graph, spec, total)
    rows = x.narrow(0, max(start - first, 0), end - start)
    others: Sequence[Any] = [p if isinstance(p, Shard) and p.dim > 0 else Replicate() for p in spec.placements]
    local = shard(rows, plain(rows.shape, x.dtype, others), graph.place.sizes, graph.place.coord)
    local = local.to(graph.place.device).contiguous().clone() if local is x else local.to(graph.place.device).contiguous()
    return as_dtensor(local, graph.mesh, torch_placements(spec), (total, *x.shape[1:]))
