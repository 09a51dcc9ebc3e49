"""Models without values: initialised or read from files shard by shard, and written back as files for everybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from netmind_autopar import AutoparError, autoparallelize
from netmind_autopar.ir.errors import CheckpointError, DamagedError, InputError
from netmind_autopar.runtime import materialise
from netmind_autopar.runtime.tensorfile import DTYPES, TensorFile, TensorWriter

warnings.filterwarnings("ignore", module="transformers")


class Plain(nn.Module):
    """Modules of torch alone, one of which initialises its child, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return self.out(self.norm(h.transpose(1, 2)).transpose(1, 2)).square().mean()


X = torch.arange(24).reshape(4, 6) % 12


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def state(m: nn.Module) -> dict[str, Tensor]:
    return {n: whole(t) for n, t in [*m.named_parameters(), *m.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def bare(build: Any) -> Any:
    with torch.device("meta"):
        return build()


def test_initialised_as_on_one_device(mesh: object) -> None:
    torch.manual_seed(3)
    original = Plain()
    after = torch.rand(2)
    model = bare(Plain)
    torch.manual_seed(3)
    pm = autoparallelize(model, X, mesh)
    assert torch.equal(torch.rand(2), after), "as many numbers were drawn"
    assert same(state(pm), state(original))
    assert torch.equal(pm(X), original(X))
    assert all(p.is_meta for p in model.parameters()), "the model is not touched"


def test_one_module_is_whole_at_a_time(mesh: object, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    most, real = [0], materialise._empty

    def empty(t: Tensor) -> Tensor:
        out = real(t)
        made.append(weakref.ref(out))
        most[0] = max(most[0], sum(x.nbytes for r in made if (x := r()) is not None))
        return out

    monkeypatch.setattr(materialise, "_empty", empty)
    model = bare(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))))
    autoparallelize(model, torch.ones(2, 16), mesh, outputs="global")
    assert len(made) == 16 and 0 < most[0] <= 2 * (16 * 16 + 16) * 4, "no more than a module, and the one before it"


def test_what_a_module_writes_into_its_children(mesh: object) -> None:
    """GPT-2 initialises some projections once more, narrower, from the block that has them."""
    model, inputs = models.gpt2(torch.float32, hidden=64, layers=8)
    torch.manual_seed(1)
    pm = autoparallelize(bare(lambda: type(model)(model.config)).train(), inputs, mesh)
    found, theirs = state(pm), state(model)
    assert found.keys() == theirs.keys()
    for name, t in found.items():
        assert abs(t.float().std() - theirs[name].float().std()) < 0.1 * theirs[name].float().std() + 1e-6, name
    assert (
        0.004
        < float(found["transformer.h.3.mlp.c_proj.weight"].std())
        < 0.006
        < 0.018
        < float(found["transformer.h.3.mlp.c_fc.weight"].std())
    )
    buffers = dict(model.named_buffers())
    assert all(torch.equal(found[n], b) for n, b in buffers.items())


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.scale).sum()


def test_what_has_no_values_is_named(mesh: object) -> None:
    x = torch.ones(2, 6)
    with pytest.raises(InputError, match="'scale' lies on the meta device") as e:
        autoparallelize(bare(Own), x, mesh)
    assert "init=" in str(e.value)

    def init(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            nn.init.constant_(p, 0.5)

    assert all(bool((p == 0.5).all()) for p in state(autoparallelize(bare(Own), x, mesh, init=init)).values())

    def half(module: nn.Module) -> None:
        init(module)
        if isinstance(module, Own):
            with torch.no_grad():
                module.scale.fill_(float("nan"))
                module.scale[:3].zero_()

    with pytest.raises(InputError, match="leaves a part of 'scale'"):
        autoparallelize(bare(Own), x, mesh, init=half)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_hugging_face_there_and_back(name: str, mesh: object, tmp_path: Path) -> None:
    """Written by the library, read in slices into a model without values, written by us, read by the library."""
    model, inputs = getattr(models, name)(torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    empty = bare(lambda: type(model)(model.config))
    empty.train()
    pm = autoparallelize(empty, inputs, mesh, weights=tmp_path / "theirs")
    assert same(state(pm), state(model))
    pm.save_pretrained(tmp_path / "ours", max_shard_bytes=20_000)
    again = type(model).from_pretrained(tmp_path / "ours")
    assert same(state(again), state(model))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {n for n, _ in model.named_parameters()} | (set(index) & {n for n, _ in model.named_buffers()}), "tied ones once"
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(model).__name__]
    pm.save_pretrained(tmp_path / "ours")  # the same folder, another number of files: none of the old ones is left
    assert sorted(p.name for p in (tmp_path / "ours").glob("*.safetensors*")) == ["model.safetensors"]
    assert same(state(autoparallelize(empty, inputs, mesh, weights=tmp_path / "ours" / "model.safetensors")), state(model))


def test_weights_of_the_base_model(mesh: object, tmp_path: Path) -> None:
    """A folder of GPT2Model, without the prefix that GPT2LMHeadModel puts before its names."""
    model, inputs = models.gpt2(torch.float32)
    model.transformer.save_pretrained(tmp_path)
    pm = autoparallelize(bare(lambda: type(model)(model.config)).train(), inputs, mesh, weights=tmp_path)
    assert same(state(pm), state(model))


def test_weights_that_do_not_fit(mesh: object, tmp_path: Path) -> None:
    x = torch.ones(2, 6)
    safetensors = pytest.importorskip("safetensors.torch")
    good = {n: t.clone() for n, t in nn.Linear(6, 6).state_dict().items()}

    def refused(kind: type[AutoparError], match: str) -> None:
        with pytest.raises(kind, match=match):
            autoparallelize(bare(lambda: nn.Linear(6, 6)), x, mesh, weights=tmp_path)

    refused(CheckpointError, "there are no weights")
    safetensors.save_file({"weight": good["weight"]}, tmp_path / "model.safetensors")
    refused(InputError, "do not have 'bias'")
    safetensors.save_file({**good, "bias": torch.ones(7)}, tmp_path / "model.safetensors")
    refused(InputError, r"'bias' has the shape \(6,\)")
    safetensors.save_file(good, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:-5])
    refused(DamagedError, r"model\.safetensors is damaged: it should have")
    for wrong in ("../model.safetensors", "/etc/passwd", ".model.safetensors", "a/b.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": wrong}}))
        refused(DamagedError, "names the file")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}, "weight_map": {}}')
    refused(DamagedError, "cannot be read")


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    """Every dtype both ways, slices, strided and empty tensors; headers that lie are refused."""
    library = pytest.importorskip("safetensors.torch")
    kinds = {n: d for n, d in DTYPES.items() if n != "C128"}
    tensors = {n: (torch.arange(24) % 2).reshape(4, 6).to(torch.float32).to(d) for n, d in kinds.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 3), "strided": torch.arange(12.0).reshape(3, 4).T}
    with TensorWriter(tmp_path / "ours", {n: (t.dtype, t.shape) for n, t in tensors.items()}, {"format": "pt"}) as file:
        for name in file.order:
            file.write(name, tensors[name])
        size, _ = file.close()
    assert size == (tmp_path / "ours").stat().st_size
    read = library.load_file(tmp_path / "ours")
    assert all(
        torch.equal(read[n].contiguous().view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8))
        for n, t in tensors.items()
        if t.dim()
    )
    library.save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    theirs = TensorFile(tmp_path / "theirs")
    assert theirs.entries.keys() == tensors.keys()
    for name, t in tensors.items():
        mine = theirs.read(name)
        assert mine.dtype == t.dtype and mine.shape == t.shape
        assert not t.dim() or not t.numel() or torch.equal(mine.view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8))
    assert torch.equal(theirs.read("strided", (1, 1), (2, 2)), tensors["strided"][1:3, 1:3])
    for offsets, sizes in (((3, 0), (2, 3)), ((-1, 0), (1, 1)), ((0,), (1,))):
        with pytest.raises(DamagedError):
            theirs.read("strided", offsets, sizes)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        b'{"__metadata__": {"x": 1}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"[" * 5000,
        b"[]",
        b"\xff\xfe",
    ],
)
def test_headers_that_lie(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DamagedError, match="damaged"):
        TensorFile(tmp_path / "x")
    (tmp_path / "y").write_bytes((1 << 62).to_bytes(8, "little") + header)
    with pytest.raises(DamagedError, match="header"):
        TensorFile(tmp_path / "y")


# Two processes.


def worker(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    found: dict[str, Any] = {}
    torch.manual_seed(3)
    original = Plain()
    torch.manual_seed(3 + rank)  # rank 0's generator counts
    options = {"random_costs": 4}
    pm = autoparallelize(bare(Plain), X, mesh, **options)
    found["initialised"] = same(state(pm), state(original))
    found["split"] = any(p.numel() > p.to_local().numel() for p in pm.parameters())
    found["own generator"] = bool(rank) == (not torch.equal(torch.get_rng_state(), _state_after(3)))
    mixed = autoparallelize(original if rank == 0 else bare(Plain), X, mesh, **options)
    found["values on rank 0 alone"] = same(state(mixed), state(original))
    model, inputs = models.gpt2(torch.float32)
    read: list[tuple[int, int]] = []
    real = TensorFile.read

    def counted(self: TensorFile, name: str, offsets: Any = None, sizes: Any = None) -> Tensor:
        out = real(self, name, offsets, sizes)
        read.append((out.numel(), torch.Size(self.entries[name].shape).numel()))
        return out

    TensorFile.read = counted  # type: ignore[method-assign]
    if rank == 0:
        model.save_pretrained(folder / "theirs")
    dist.barrier()
    pm = autoparallelize(bare(lambda: type(model)(model.config)).train(), inputs, mesh, weights=folder / "theirs", random_costs=1)
    found["read"] = same(state(pm), state(model))
    mine = sum(p.to_local().numel() for p in pm.parameters())
    found["slices"] = sum(n for n, _ in read) == mine < sum(n for _, n in read)
    empty = bare(lambda: type(model)(model.config)).train()
    torch.manual_seed(5)
    alone = materialise.materialise(empty, materialise.Cut({}, (1,), (0,)), materialise.Bare.of(empty))
    torch.manual_seed(5)
    parts = state(autoparallelize(empty, inputs, mesh, random_costs=1))
    found["bits on every mesh"] = all(torch.equal(alone[id(p)], parts[n]) for n, p in empty.named_parameters())
    pm.save_pretrained(folder / "ours", max_shard_bytes=30_000)
    found["written"] = same(state(type(model).from_pretrained(folder / "ours")), state(model))
    (folder / "file").write_text("") if rank == 0 else None
    dist.barrier()
    for kind, act in {
        "no folder": lambda: pm.save_pretrained(folder / "file" / "x"),
        "no weights on one rank": lambda: autoparallelize(bare(Plain), X, mesh, weights=folder / ("theirs" if rank else "nowhere")),
    }.items():
        try:
            act()
        except AutoparError as e:
            found[kind] = type(e).__name__
    (folder / f"found.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def _state_after(seed: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Plain()
        return torch.get_rng_state()


@pytest.mark.gloo
def test_two_processes_have_parts(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    started = [subprocess.Popen([*command, str(r)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in (0, 1)]
    try:
        logs = [p.communicate(timeout=300)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    for rank, log in enumerate(logs):
        assert (tmp_path / f"found.{rank}").exists(), log[-3000:]
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        assert found.pop("no folder") == "CheckpointError" and found.pop("no weights on one rank") in ("CheckpointError", "InputError")
        assert all(found.values()), found


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
