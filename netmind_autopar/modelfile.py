"""Model files: Python files that define `model()` and `sample_inputs()`, and Hugging Face configs.

`file.py:name` picks the factory `name`; its inputs come from `name_inputs()` if the file has it, else from `sample_inputs()`.
For planning everything is built on the meta device, so that no memory is needed, whatever the size.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .ir.errors import InputError
from .ir.jsontext import read_json
from .ir.plan import Plan

SEED = 0


@dataclass(frozen=True)
class Loaded:
    """A model and the inputs it is planned for; `title` is what reports call it, `device` where it was built."""

    model: torch.nn.Module
    inputs: Any
    title: str
    device: str


def load_file(target: str, *, meta: bool) -> Loaded:
    """Build what `file.py` or `file.py:name` describes, on the meta device if `meta` and if it can be built there.

    Seeded, so that two calls give the same weights. Raises InputError for everything that is wrong with the file.
    """
    path, name = _split(target)
    module = _run(path)
    factory = _factory(module, path, name)
    inputs_name = f"{name}_inputs" if hasattr(module, f"{name}_inputs") else "sample_inputs"
    inputs = _factory(module, path, inputs_name)
    model, device = _build(factory, path, meta)
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"{name}() returned a {type(model).__name__}, not a module",
            where=f"{path}: {name}",
            why="the factory must return the torch.nn.Module to be planned",
            try_="return the module itself",
        )
    built, _ = _build(inputs, path, meta and device == "meta")
    return Loaded(model, built, type(model).__name__, device)


def load_hf(config: str, batch: int, seq: int, *, meta: bool) -> Loaded:
    """A Hugging Face causal language model from its config.json alone; inputs `[batch, seq]` of token ids, with labels.

    On the meta device if `meta`, else on the CPU with seeded random weights and tokens. Raises InputError.
    """
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        import transformers
    except ImportError:
        raise InputError("--hf needs the package transformers", try_="pip install 'netmind-autopar[hf]'") from None
    try:
        fields = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            "cannot read the config", where=str(path), why=str(e), try_="give the path of a Hugging Face config.json"
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise InputError(
            "the config names no model type",
            where=str(path),
            why='there is no field "model_type"',
            try_="give the config.json of a Hugging Face causal language model",
        )
    device = "meta" if meta else "cpu"
    torch.manual_seed(SEED)
    try:
        built = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(built)
            tokens = torch.randint(built.get_text_config().vocab_size, (batch, seq))
    except Exception as e:
        raise InputError(
            "no causal language model can be built from the config",
            where=str(path),
            why=_last_line(e),
            try_="check the fields; other kinds of model are planned from a model file",
        ) from e
    return Loaded(model.train(), {"input_ids": tokens, "labels": tokens}, type(model).__name__, device)


def cast(loaded: Loaded, dtype: str) -> Loaded:
    """The same model and inputs with every floating-point tensor in another dtype, such as "float64"."""
    to = getattr(torch, dtype)

    def convert(x: Any) -> Any:
        return x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return Loaded(loaded.model.to(to), _map(convert, loaded.inputs), loaded.title, loaded.device)


def _map(f: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, dict):
        return type(x)({k: _map(f, v) for k, v in x.items()})
    if isinstance(x, list | tuple):
        return type(x)(_map(f, v) for v in x)
    return f(x)


def _split(target: str) -> tuple[Path, str]:
    """`file.py:name` → (file.py, name); the name is "model" when there is none."""
    stem, colon, name = target.rpartition(":")
    if colon and name.isidentifier() and not Path(target).exists():
        return Path(stem), name
    return Path(target), "model"


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}", try_="give a Python file that defines model() and sample_inputs()")
    if path.suffix != ".py":
        raise InputError(
            f"{path} is not a Python file", why="its name does not end in .py", try_="give a .py file, or --hf for a config.json"
        )
    spec = importlib.util.spec_from_file_location(f"_model_file_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise InputError(
            "the model file is not valid Python", where=f"{e.filename}:{e.lineno}  {(e.text or '').strip()}", why=str(e.msg)
        ) from e
    except (Exception, SystemExit) as e:
        raise InputError(
            "the model file cannot be run", where=_where(e, path), why=_last_line(e), try_="make `python FILE` work first"
        ) from e
    finally:
        sys.path.remove(folder)
    return module


def _factory(module: ModuleType, path: Path, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if not callable(found):
        there = sorted(
            k for k, v in vars(module).items() if callable(v) and not k.startswith("_") and getattr(v, "__module__", "") == module.__name__
        )
        raise InputError(
            f"{path} defines no function {name}()",
            where=str(path),
            why=f"it defines {', '.join(there)}" if there else "it defines no functions",
            try_=f"define {name}()" + (f", or pick a factory: {path}:{there[0]}" if there and name == "model" else ""),
        )
    return found


def _build(factory: Callable[[], Any], path: Path, meta: bool) -> tuple[Any, str]:
    """What the factory returns, and the device; the CPU when it cannot be built on meta."""
    if meta:
        try:
            with torch.device("meta"):
                return factory(), "meta"
        except Exception:  # some models compute with real values while they are built: the CPU decides whether it is an error
            pass
    torch.manual_seed(SEED)
    try:
        return factory(), "cpu"
    except (Exception, SystemExit) as e:
        name = getattr(factory, "__name__", "the factory")
        raise InputError(f"{name}() raised an error", where=_where(e, path), why=_last_line(e), try_="call it in Python by itself") from e


def _where(e: BaseException, path: Path) -> str:
    """The innermost line of the traceback that lies in the user's file."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    return f"{path}:{frames[-1].lineno}  {frames[-1].line}" if frames else str(path)


def _last_line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0]}" if text else type(e).__name__


def in_dtype(loaded: Loaded, plan: Plan, dtype: str) -> tuple[Loaded, Plan]:
    """Model and plan in another dtype. The plan must fit the model as it is; its choices are then those of the other graph too."""
    from .rules.bind import bind_program
    from .solver.solve import choices_to_strategies
    from .tracer.capture import capture
    from .tracer.hash import graph_hash

    program = capture(loaded.model, loaded.inputs, mode=plan.mode, fuse=plan.fuse, precision=plan.precision)
    choices_to_strategies(program, bind_program(program), plan)
    other = cast(loaded, dtype)
    program = capture(other.model, other.inputs, mode=plan.mode, fuse=plan.fuse, precision=plan.precision)
    return other, plan.model_copy(update={"graph_hash": graph_hash(program)})
