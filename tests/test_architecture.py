"""The shape of the package: imports go one way, private APIs stay behind their adapters, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "netmind_autopar"
PACKAGE = "netmind_autopar"
FILES = sorted(ROOT.rglob("*.py"))

# ir ← health ← {rules, kernels, runtime} ← {tracer, costs, checkpoint} ← solver ← passes ← arguments ← api ← {verification, calibrate} ←
# {report, modelfile} ← cli ← __main__
LAYERS = (
    ("ir",),
    ("health",),
    ("rules", "kernels", "runtime"),
    ("tracer", "costs", "checkpoint", "optim"),
    ("solver",),
    ("passes",),
    ("arguments", "sight"),
    ("api",),
    ("verification", "calibrate"),
    ("__init__",),
    ("wording",),
    ("doctor",),
    ("report", "modelfile"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_NAMES = 10


def unit(path: Path) -> str:
    """The part of the package a file belongs to: a folder, or a module at the top."""
    inside = path.relative_to(ROOT)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute module or module.name, line) of every import in a file; with top_level_only those that run at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = [PACKAGE, *path.relative_to(ROOT).parts[:-1]]
    nodes = _module_level(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def _module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: not inside functions, not under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _module_level(child)


def imports_upward(path: Path) -> list[str]:
    """The imports of a file that go against the arrows."""
    here = unit(path)
    wrong = []
    for name, line in imported(path):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        there = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
        if there == here or LEVEL[there] < LEVEL[here]:
            continue
        wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {here} may not import {there}")
    return wrong


def users_of(prefix: str) -> set[str]:
    """The files that import a module whose name begins with `prefix`."""
    return {str(p.relative_to(ROOT)) for p in FILES for name, _ in imported(p) if name == prefix or name.startswith(prefix + ".")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert unit(path) in LEVEL, f"{unit(path)} has no place in the order of imports; give it one in LAYERS"
    assert not imports_upward(path)


def test_a_wrong_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for folder, text in (
        ("rules", "from ..solver import problem"),
        ("costs", "from .. import tracer"),
        ("ir", "import netmind_autopar.api"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text(f"def f():\n    {text}\n")
        assert len(imports_upward(tmp_path / folder / "x.py")) == 1, text


def test_private_torch_has_one_importer() -> None:
    private = {
        str(p.relative_to(ROOT))
        for p in FILES
        for name, _ in imported(p)
        if name.startswith("torch.") and any(x[0] == "_" for x in name.split("."))
    }
    assert {str(Path(p).parent) for p in private} <= {"tracer/torch_private"}


def test_pulp_has_one_importer() -> None:
    assert users_of("pulp") <= {"solver/milp.py"}
    assert users_of("highspy") <= {"solver/milp.py"}


@pytest.mark.parametrize("name", ["transformers", "networkx", "pulp", "triton"])
def test_heavy_modules_are_imported_late(name: str) -> None:
    early = [f"{p.relative_to(ROOT)}:{line}" for p in FILES for m, line in imported(p, top_level_only=True) if m.split(".")[0] == name]
    if name in ("pulp", "triton"):
        early = [e for e in early if not e.startswith(("solver/milp.py", "kernels/"))]
    assert not early, f"{name} is imported when the package is: import it where it is used"


def test_public_names_are_few() -> None:
    import netmind_autopar

    names = netmind_autopar.__all__
    assert len(names) <= MAX_PUBLIC_NAMES
    assert {"autoparallelize", "plan", "verify", "Plan", "Mesh", "AutoparError"} <= set(names)
    assert all(getattr(netmind_autopar, n).__doc__ for n in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in functions if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long


def test_environment_is_read_in_one_place() -> None:
    readers = {
        str(p.relative_to(ROOT))
        for p in FILES
        if "os.environ" in p.read_text(encoding="utf-8") and "AUTOPAR_" in p.read_text(encoding="utf-8")
    }
    assert readers <= {"ir/flags.py"}


def test_runtime_needs_no_planner() -> None:
    """A worker loads an emitted module without tracer, solver or PuLP: nothing below the runtime brings them in."""
    code = (
        "import sys, pkgutil, importlib\n"
        f"from {PACKAGE} import ParallelModule, Plan\n"
        f"for part in ('runtime', 'kernels', 'checkpoint'):\n"
        f"    package = importlib.import_module('{PACKAGE}.' + part)\n"
        f"    [importlib.import_module(package.__name__ + '.' + m.name) for m in pkgutil.iter_modules(package.__path__)]\n"
        f"bad = [m for m in sys.modules if m.startswith(('{PACKAGE}.tracer', '{PACKAGE}.solver', '{PACKAGE}.costs', 'pulp', 'highspy'))]\n"
        "sys.exit(' '.join(bad) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
