"""Options and fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# The same examples in every run: a red test is a red test for everybody.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("project")

GOLDEN = Path(__file__).parent / "golden"
SLOW = Path(__file__).parent / "slow.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    os.environ["AUTOPAR_CACHE"] = "off"  # tests of the cache name a folder of their own


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(config, items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def mark_slow(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases of slow.txt are slow. Raises UsageError for one that is not there any more."""
    names = {line.split(maxsplit=1)[1] for line in SLOW.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"}
    here = {item.nodeid.removeprefix("tests/"): item for item in items}
    for name in names & here.keys():
        here[name].add_marker(pytest.mark.slow)
    files = {name.partition("::")[0] for name in here}
    if not any("::" in arg for arg in config.args) and (gone := [n for n in sorted(names - here.keys()) if n.partition("::")[0] in files]):
        raise pytest.UsageError(f"tests/slow.txt names cases that are no more: {', '.join(gone)}")


def pytest_collection_finish() -> None:
    """What was imported stays, and graphs are many small objects: collect garbage less often, which saves a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20000, 10, 10)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One process, one device."""
    if dist.is_initialized():  # by a test before this one that named its mesh by a string
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    dist.destroy_process_group()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares text with tests/golden/<name>; `pytest --update-golden` writes it."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {path.name}: run pytest --update-golden and look at it"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; if the new text is right: pytest --update-golden"

    return compare
