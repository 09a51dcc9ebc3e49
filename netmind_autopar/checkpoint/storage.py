"""Where torch.distributed.checkpoint keeps what it plans: files of tensors, and a table of them in JSON.

DCP decides who writes which piece of which tensor, and at loading who reads which part of which piece. Its own storage writes both the
table and whatever is no tensor as pickles; here nothing is pickled, so nothing that is read can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..runtime.mapped import drop
from ..runtime.parked import Parked
from ..runtime.tensorfile import DTYPE_NAMES, DTYPES, TensorFile, TensorWriter
from .manifest import Chunk, Index, TensorRecord, damaged


@dataclass(frozen=True)
class Piece:
    """What this rank writes of a tensor."""

    key: str
    tensor: Tensor | Parked

    @property
    def about(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.tensor.dtype, tuple(self.tensor.shape)


class Taking(StorageWriter):
    """Takes this rank's pieces when DCP says `write`; `write` puts them into a file later.

    copy: take copies in host memory, so that training may go on; else the tensors themselves. `index` is rank 0's, of all ranks.
    """

    def __init__(self, *, copy: bool) -> None:
        self._copy = copy
        self.pieces: list[Piece] = []
        self.file = ""
        self.index: Index | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        self.pieces, self.index = [], None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, self.file = [], str(plan.storage_data)
        for item in plan.items:
            key = _key(item)
            tensor = planner.resolve_data(item)
            self.pieces.append(Piece(key, _host_copy(tensor) if self._copy else tensor))
            results.append(WriteResult(item.index, 0, (self.file, key)))
        if self._copy and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was copied from the device without waiting has arrived
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {r.index: r.storage_data for of_rank in results for r in of_rank}
        self.index = Index(tensors={name: _record(name, about, places) for name, about in metadata.state_dict_metadata.items()})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def storage_meta(self) -> StorageMeta | None:
        return None

    def write(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Write the pieces into this rank's file: name -> bytes, SHA-256. A rank without pieces writes none."""
        if not self.pieces:
            return {}
        pieces = {p.key: p for p in self.pieces}
        with TensorWriter(folder / self.file, {p.key: p.about for p in self.pieces}) as file:
            for key in file.order:
                tensor = pieces[key].tensor
                file.write(key, host_memory(tensor) if isinstance(tensor, Parked) else tensor)
                drop(tensor.memory if isinstance(tensor, Parked) else tensor)
            return {self.file: file.close()}


class Reading(StorageReader):
    """Reads the parts of pieces that DCP asks for."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._files: dict[str, TensorFile] = {}
        self._places = {MetadataIndex(name, c.offsets): (c.file, c.key) for name, record in index.tensors.items() for c in record.chunks}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return Metadata({name: _metadata(record) for name, record in self._index.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            file, key = self._places[item.storage_index]
            if file not in self._files:
                self._files[file] = TensorFile(self._folder / file)
            stored, record = self._files[file].entries.get(key), self._index.tensors[item.storage_index.fqn]
            if stored is None or stored.dtype != DTYPES[record.dtype]:
                raise damaged(self._folder / file, f"it does not hold {key!r} as {record.dtype}")
            part = self._files[file].read(key, tuple(item.storage_offsets), tuple(item.lengths))
            target = planner.resolve_tensor(item)
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class SavePlanning(DefaultSavePlanner):
    """DCP's planner for a flat table of tensors. `parked` are those that are not on the device: planned as they would lie there."""

    def __init__(self, parked: Mapping[str, Parked]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parked = parked

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor itself, or what waits elsewhere."""
        return self._parked[index.fqn] if index.fqn in self._parked else super().lookup_object(index)


def load_planning() -> DefaultLoadPlanner:
    """DCP's planner for a flat table of tensors."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def planned(stored: Mapping[str, Tensor | Parked]) -> tuple[dict[str, Tensor], SavePlanning]:
    """The table of tensors for DCP, and its planner."""
    table = {name: _stand_in(t) if isinstance(t, Parked) else t.detach() for name, t in stored.items()}
    return table, SavePlanning({name: t for name, t in stored.items() if isinstance(t, Parked)})


def _stand_in(home: Parked) -> Tensor:
    """A tensor without memory that lies as what waits does."""
    local = torch.empty_strided(home.shape, home.strides, dtype=home.dtype, device="meta")
    if home.layout is None:
        return local
    mesh, placements, stride = home.layout
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=home.whole, stride=stride)


def host_memory(home: Parked) -> Tensor:
    """Where a parked tensor waits, once it has arrived there."""
    if home.event is not None:
        home.event.synchronize()
    return home.memory


def _host_copy(x: Tensor | Parked) -> Tensor:
    if isinstance(x, Parked):
        out = host_memory(x).clone()
        drop(x.memory)
        return out
    x = x.detach()
    if x.is_cuda:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    out = x.to("cpu", copy=True).contiguous()
    drop(x)
    return out


def _key(item: WriteItem) -> str:
    """A tensor's name when the piece is all of it, else with the box: `name[0:4,8:16]`."""
    about = item.tensor_data
    assert about is not None
    box = about.chunk
    if tuple(box.sizes) == tuple(about.size):
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(f'{o}:{o + n}' for o, n in zip(box.offsets, box.sizes, strict=True))}]"


def _record(name: str, about: Any, places: Mapping[MetadataIndex, tuple[str, str]]) -> TensorRecord:
    chunks = []
    for box in about.chunks:
        file, key = places[MetadataIndex(name, box.offsets)]
        chunks.append(Chunk(offsets=tuple(box.offsets), sizes=tuple(box.sizes), file=file, key=key))
    return TensorRecord(dtype=DTYPE_NAMES[about.properties.dtype], shape=tuple(about.size), chunks=tuple(chunks))


def _metadata(record: TensorRecord) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in record.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[record.dtype]), torch.Size(record.shape), chunks)


def _done(value: Any) -> Any:
    out: Future[Any] = Future()
    out.set_result(value)
    return out
