"""Devices and links, profiles, the peak of memory."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netmind_autopar.costs import device as device_module
from netmind_autopar.costs.device import cluster_profile, default_cluster, load_profile, make_mesh
from netmind_autopar.costs.memory import CATEGORIES, OPTIMIZER_STATES, optimizer_states, peak, three_largest, usage
from netmind_autopar.costs.presets import CLUSTERS, DEVICES, LINK_EFFICIENCY, match_name
from netmind_autopar.ir.errors import InputError, MeshError, ProfileError

EXAMPLE = Path(__file__).parent.parent / "examples" / "cluster.toml"

# --- devices and meshes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLUSTERS)
def test_presets_are_usable(name: str) -> None:
    mesh = make_mesh("dp=2,tp=8", name)
    assert mesh.cluster == name
    assert mesh.device.flops("float32") == mesh.device.flops("int64") > 0
    assert mesh.device.flops("bfloat16") >= mesh.device.flops("float32") >= mesh.device.flops("float64")
    assert mesh.device.memory_bytes > 2**20
    assert mesh.axes[0].bandwidth_bytes_s <= mesh.axes[1].bandwidth_bytes_s
    assert mesh.axes[0].latency_s >= mesh.axes[1].latency_s
    row = CLUSTERS[name]
    assert row.intra.source and row.inter.source and DEVICES[row.device]["source"]


def test_the_fast_link_is_inside_the_node() -> None:
    inner, outer = make_mesh("tp=8", "h100-sxm").axes[0], make_mesh("dp=2,tp=8", "h100-sxm").axes[0]
    assert inner.bandwidth_bytes_s == pytest.approx(LINK_EFFICIENCY * 450e9)
    assert outer.bandwidth_bytes_s == pytest.approx(LINK_EFFICIENCY * 50e9)

    def inside(text: str) -> list[bool]:
        return [a.bandwidth_bytes_s == inner.bandwidth_bytes_s for a in make_mesh(text, "h100-sxm").axes]

    assert inside("dp=2,tp=4") == [True, True]
    assert inside("dp=4,tp=4") == [False, True]
    assert inside("pp=2,dp=2,tp=4") == [False, True, True]
    assert inside("dp=1,tp=16") == [True, False]
    assert inside("dp=8,tp=3") == [False, False]  # ranks 6, 7 and 8 are one group and lie in two nodes


def test_forms_of_a_mesh() -> None:
    mesh = make_mesh("dp=2,tp=4", "h100-sxm")
    assert make_mesh(mesh, "cpu") is mesh
    assert str(make_mesh(4, "cpu")) == "axis0=4"
    with torch.no_grad():
        from torch.distributed.device_mesh import DeviceMesh

        named = DeviceMesh("cpu", torch.arange(8).reshape(2, 4), mesh_dim_names=("dp", "tp"), _init_backend=False, _rank=0)
        unnamed = DeviceMesh("cpu", torch.arange(8).reshape(4, 2), _init_backend=False, _rank=0)
    assert make_mesh(named, "h100-sxm") == mesh
    assert str(make_mesh(unnamed, "cpu")) == "axis0=4,axis1=2"


@pytest.mark.parametrize("mesh", ["dp=0", "dp", "dp=2,dp=2", 0, -1, 2.5, None, True, "dp=99999999999"])
def test_bad_meshes(mesh: object) -> None:
    with pytest.raises(MeshError):
        make_mesh(mesh, "cpu")


def test_unknown_clusters_and_devices(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="h100-sxm"):
        make_mesh("dp=2", "h1000")
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"name": "x", "node_size": 8, "device": "h1000", "links": {}}))
    with pytest.raises(MeshError, match=r"unknown device 'h1000'(.|\n)*h100-sxm"):
        make_mesh("dp=2", str(file))


def test_the_present_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_cluster() == "cpu"
    one, two = make_mesh(1), make_mesh(2)
    assert one.device.memory_bytes // 2 == two.device.memory_bytes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"total_memory": 123456789})())
    assert make_mesh(2).cluster == "h100-sxm"
    assert make_mesh(2).device.memory_bytes == 123456789
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 3000")
    with pytest.raises(MeshError, match="Abacus 3000"):
        default_cluster()


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GB200", "b200"),
    ],
)
def test_names_of_devices(name: str, cluster: str | None) -> None:
    assert match_name(name) == cluster


# --- profiles ----------------------------------------------------------------------------------------------------------------


def test_the_example_profile() -> None:
    mesh = make_mesh("dp=2,tp=4", str(EXAMPLE))
    assert mesh.cluster == str(EXAMPLE)
    assert [a.bandwidth_bytes_s for a in mesh.axes] == [20e9, 360e9]
    assert mesh.device.flops("bfloat16") == 989e12


def profile() -> dict:
    return json.loads(json.dumps(load_profile(EXAMPLE).model_dump(exclude_defaults=True)))


def fields(data: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    out = []
    for key, value in data.items():
        out += fields(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return out


NUMBERS = [f for f in fields(profile()) if f[-1] != "name" and f[-1] not in ("float16", "bfloat16")]


@pytest.mark.parametrize("bad", [-1, 0, float("nan"), float("inf"), 1e30, "fast", None, True, [], "missing"], ids=str)
@pytest.mark.parametrize("field", NUMBERS, ids=".".join)
def test_bad_numbers_are_refused_by_name(field: tuple[str, ...], bad: object, tmp_path: Path) -> None:
    data = profile()
    at = data
    for key in field[:-1]:
        at = at[key]
    if bad == "missing":
        del at[field[-1]]
    else:
        at[field[-1]] = bad
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ProfileError) as caught:
        make_mesh("dp=2", str(file))
    named = ".".join(field[:2] if bad == "missing" and field[1:2] == ("peak_flops",) else field)
    assert named in caught.value.where


BAD_FILES = ["", "{", "[1]", "null", '{"name": 1, "name": 2}', '{"device": {"peak_flops": {"float33": 1e12, "float32": 1e12}}}']


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files(text: str, tmp_path: Path) -> None:
    for suffix in (".json", ".toml"):
        file = tmp_path / f"bad{suffix}"
        file.write_text(text)
        with pytest.raises(ProfileError):
            make_mesh("dp=2", str(file))
    with pytest.raises(ProfileError, match="cannot read"):
        make_mesh("dp=2", str(tmp_path / "none.toml"))


def test_toml_nan_and_unknown_fields(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    for changed, named in [
        (text.replace("latency_s = 2e-6", "latency_s = nan"), "links.intra.latency_s"),
        (text.replace("node_size", "nodesize"), "node"),
        (text + "\nmore = 1\n", "links.inter.more"),
    ]:
        assert changed != text
        file = tmp_path / "c.toml"
        file.write_text(changed)
        with pytest.raises(ProfileError, match=re.escape(named)):
            load_profile(file)


def test_a_profile_may_name_a_preset_device(tmp_path: Path) -> None:
    data = profile() | {"device": "h200"}
    file = tmp_path / "c.json"
    file.write_text(json.dumps(data))
    assert make_mesh("dp=2", str(file)).device == make_mesh("dp=2", "h200").device
    assert cluster_profile(str(file)).device.name == "h200"


# --- memory ---------------------------------------------------------------------------------------------------------------

INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**40), st.sampled_from(CATEGORIES)), max_size=30)


@settings(max_examples=100, deadline=None)
@given(INTERVALS, st.integers(0, 22))
def test_peak_is_what_counting_finds(intervals: list[tuple[int, int, int, str]], moments: int) -> None:
    alive = [sum(size for start, end, size, _ in intervals if start <= m <= end) for m in range(moments)]
    total, moment, parts = peak(intervals, moments)
    assert total == max(alive, default=0)
    assert moment == (alive.index(total) if moments else 0)
    assert sum(parts.values()) == total
    assert tuple(parts) == CATEGORIES
    assert (usage(intervals, moments).sum(axis=0) == alive).all()


def test_three_largest() -> None:
    intervals = [
        (0, 9, 5, "parameters"),
        (2, 3, 7, "activations"),
        (3, 3, 7, "activations"),
        (4, 5, 100, "transients"),
        (0, 9, 1, "inputs"),
    ]
    names = ["w", "h", "h", "later", "x"]
    assert three_largest(intervals, names, 3) == [("h", 14), ("w", 5), ("x", 1)]


def test_optimizers_keep_as_much_as_is_said() -> None:
    made = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adamax": torch.optim.Adamax,
        "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "adadelta": torch.optim.Adadelta,
        "rprop": torch.optim.Rprop,
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam-amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    }
    for name, make in made.items():
        weight = torch.nn.Parameter(torch.ones(8, 8))
        optimizer = make([weight])
        weight.grad = torch.ones(8, 8)
        optimizer.step()
        kept = sum(isinstance(v, torch.Tensor) and v.numel() == 64 for v in optimizer.state[weight].values())
        assert kept == OPTIMIZER_STATES[name] == optimizer_states(name), name
    with pytest.raises(InputError, match="adamw"):
        optimizer_states("adamant")


def test_no_preset_is_without_bounds() -> None:
    """The bounds that profiles are held to hold for our own numbers."""
    for name in DEVICES:
        data = device_module._device_preset(name, "")
        assert math.isfinite(data["memory_bytes"])
        device_module.DeviceProfile.model_validate(data)
