"""Random modules with their source: drawn from a seed or by hypothesis, run, printed, and made smaller by taking steps out.

    recipe = recipe_of(17)         the same for the same seed
    model, inputs = recipe.build() float64, real values
    print(recipe.source())         a file that runs by itself

Sizes are small and often 1, odd or prime, so that few of them divide a mesh. A module is only kept when eager PyTorch runs it, forward
and backward, with finite results that rounding does not decide; otherwise it is drawn again.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import random
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from random_draw import MOVED, Draw, Value
from random_layers import LAYERS
from random_math import ARITHMETIC
from random_shapes import SHAPES
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

OPS = (*SHAPES, *ARITHMETIC)
LARGEST = 1500  # elements of a value
HEADS = ("loss", "loss", "loss", "dict", "tuple", "tensor", "two", "inputs")
NUDGE = 1e-12  # relative; results that answer with more than LOUDEST times as much are decided by rounding
LOUDEST, LOUDEST_FLOAT32 = 1e4, 1e2


@dataclass(frozen=True)
class Step:
    """Lines that make one value out of others."""

    op: str
    name: str
    lines: tuple[str, ...]

    def uses(self, word: str) -> bool:
        return any(_occurs(word, line) for line in self.lines)


@dataclass(frozen=True)
class Recipe:
    """A module. `inputs`: name and expression; `setup`: attribute and the line that makes it; `attempts`: how often it was drawn."""

    inputs: tuple[tuple[str, str], ...]
    setup: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]
    head: str
    extra: str  # a value that is returned beside the last one
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    wants_grad: bool = False
    attempts: int = 1

    def without(self, k: int) -> Recipe:
        """Without step k. What used it takes a value of the same shape that k itself used, or goes too."""
        gone, shapes = self.steps[k], dict(self.shapes)
        stand_in = next((n for n, s in self.shapes if s == shapes[gone.name] and gone.uses(n) and n != gone.name), None)
        steps: list[Step] = list(self.steps[:k])
        dropped = {gone.name}
        for step in self.steps[k + 1 :]:
            if stand_in:
                step = replace(step, lines=tuple(re.sub(rf"\b{gone.name}\b", stand_in, line) for line in step.lines))
            if any(step.uses(name) for name in dropped):
                dropped.add(step.name)
            else:
                steps.append(step)
        extra = self.extra if self.extra in {"x", "y", *(s.name for s in steps)} else "x"
        return replace(self, steps=tuple(steps), extra=extra)

    def simple(self) -> Recipe:
        """Returning the loss alone."""
        return replace(self, head="loss")

    def without_gradients(self) -> Recipe:
        """Inputs ask for no gradient, where parameters do."""
        return replace(self, wants_grad=False)

    def forward_lines(self) -> list[str]:
        lines = [line for step in self.steps for line in step.lines]
        made = [step.name for step in self.steps]
        ends = [n for n in made if not any(s.uses(n) for s in self.steps if s.name != n)]
        last = made[-1] if made else "x"
        loss = [f"({last}.sin() ** 2).mean()"]
        for name in [n for n in ends if n != last] + [n for n in made if n not in ends and zlib.crc32(n.encode()) % 7 == 0]:
            loss.append(self._term(name))
        lines.append("loss = " + " + ".join(loss))
        lines.append(
            {
                "loss": "return loss",
                "dict": f'return {{"loss": loss, "last": {last}, "other": {self.extra}, "again": {last}}}',
                "tuple": f"return {last}, loss, [{self.extra}]",
                "tensor": f"return {last} * (1 + 0 * loss) + loss",
                "two": f'return {{"a": loss, "b": ({self.extra} ** 2).mean(), "c": {last}.detach()}}',
                "inputs": f'return {{"loss": loss, "x": x, "y": y, "same": {last}}}',
            }[self.head]
        )
        return lines

    def _term(self, name: str) -> str:
        """What a value adds to the loss: an average, or a sum that tells the places of its elements apart."""
        shape = list(dict(self.shapes)[name])
        count = torch.Size(shape).numel()
        weights = f"torch.linspace(-1, 1, {count}, dtype={name}.dtype).view({shape})"
        return (f"{name}.sin().mean() * 0.1", f"({name}.sin() * {weights}).sum() * 0.1")[zlib.crc32(name.encode()) % 2]

    def source(self) -> str:
        """The module and its inputs as a file that runs by itself."""
        forward = self.forward_lines()
        setup = [line for name, line in self.setup if name == "self.unused" or any(_occurs(name, f) for f in forward)]
        grad = ".requires_grad_()" if self.wants_grad or not any("self.layer" in s or "requires_grad=True" in s for s in setup[1:]) else ""
        return "\n".join(
            [
                "import torch, torch.nn.functional as F",
                "from torch import nn",
                "",
                "torch.set_default_dtype(torch.float64)",
                "",
                *MOVED,
                "",
                "class Module(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in setup),
                "",
                "    def forward(self, x, y, ids):",
                *(f"        {line}" for line in forward),
                "",
                "model = Module()",
                "torch.manual_seed(0)",
                *(f"{name} = {text}{grad if name != 'ids' else ''}" for name, text in self.inputs),
                "inputs = (x, y, ids)",
                "torch.set_default_dtype(torch.float32)",
                "",
            ]
        )

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """(model, inputs) in float64."""
        text = self.source()
        file = f"<random module {zlib.crc32(text.encode()):08x}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        env: dict[str, Any] = {"__name__": "random_module"}
        with _quiet():
            exec(compile(text, file, "exec"), env)
        return env["model"], env["inputs"]


def _occurs(word: str, line: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}\b", line) is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about odd calls, and with the default dtype restored after."""
    before = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def draw_recipe(source: random.Random, ops: int = 10) -> Recipe:
    """One draw, not tried out yet."""
    g = Draw(source)
    batch, rank = g.choice(1, 2, 3, 4, 5), g.choice(1, 2, 2, 3, 3)
    sizes = {"x": [batch, *(g.size() for _ in range(rank))], "y": [g.size() for _ in range(g.choice(1, 2))]}
    inputs = [(name, f"torch.randn({shape})") for name, shape in sizes.items()]
    ids = [g.size()] if g.chance(0.5) else [batch, g.size()]
    inputs.append(("ids", f"torch.randint(0, 100, {ids})"))
    g.ids_rank = len(ids)
    g.setup["self.unused"] = "self.unused = nn.Parameter(torch.randn(3))"
    steps: list[Step] = []
    with _quiet(), torch.no_grad():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        for name, text in inputs:
            g.env[name] = eval(text, g.env)
        torch.set_default_dtype(torch.float32)
        g.pool = [Value(n, g.env[n]) for n in ("x", "y")]
        for _ in range(20 * ops):
            if len(steps) < ops and (step := _step(g, f"t{len(steps)}")):
                steps.append(step)
    shapes = tuple((v.name, tuple(v.shape)) for v in g.pool)
    extra = g.choice(*g.pool).name
    return Recipe(tuple(inputs), tuple(g.setup.items()), tuple(steps), g.choice(*HEADS), extra, shapes, g.chance(0.4))


def _step(g: Draw, name: str) -> Step | None:
    """One op on the first value that it takes: most often the newest."""
    op = g.choice(*(LAYERS if g.chance(0.45) else OPS))
    others = [g.pool[i] for i in g.order(len(g.pool))][:3]
    for x in [g.pool[-1], *others] if g.chance(0.7) else others:
        if x.dim() and (lines := _lines(g, op, x, name)):
            return Step(op.__name__, name, lines)
    return None


def _lines(g: Draw, op: Callable[[Draw, Value], str | None], x: Value, name: str) -> tuple[str, ...]:
    """The lines of `name = op(x)`, run; none when the op refuses x or makes something too large, too loud or of another dtype."""
    g.name, g.lines, before = name, [], dict(g.setup)
    try:
        text = op(g, x)
        if text is not None and text != name:
            g.line(f"{name} = {text}")
        made = g.env[name] if text is not None else None
    except (RuntimeError, ValueError, IndexError, TypeError):  # the op refuses this shape or dtype
        made = None
    fits = made is not None and 0 < made.numel() <= LARGEST and made.dim() <= 5 and made.dtype == torch.float64
    if not fits or not bool(made.isfinite().all()) or float(made.abs().max()) >= 50:
        g.setup = before
        g.env.pop(name, None)
        return ()
    g.pool.append(Value(name, made.clone()))
    return tuple(g.lines)


class DenseNorms(TorchDispatchMode):
    """Backwards of norms get dense operands: on the CPU they read wrong memory where input and gradient are strided differently.

    torch 2.13: `batch_norm` of a dense [1, c, 1, w] whose gradient comes through a transpose gives its weight a wrong gradient.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "norm_backward" in str(func):
            args = pytree.tree_map_only(Tensor, Tensor.contiguous, args)
        return func(*args, **(kwargs or {}))


def refusal(recipe: Recipe) -> str:
    """Why eager PyTorch is no judge of this module; "" when it is fine.

    It raises, is not finite, rounding decides its result, or its own gradients are wrong.
    """
    try:
        with _quiet():
            plain, nudged = _results(*recipe.build(), 0.0), _results(*recipe.build(), NUDGE)
            with DenseNorms():
                dense = _results(*recipe.build(), 0.0)
    except (RuntimeError, ValueError, IndexError, TypeError) as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    if not all(bool(t.isfinite().all()) for t in plain):
        return "not finite"
    loudest = LOUDEST_FLOAT32 if ".float()" in recipe.source() else LOUDEST
    for a, b in zip(plain, nudged, strict=True):
        if a.is_floating_point() and float((a - b).abs().max()) > loudest * NUDGE * max(float(a.abs().max()), 1e-3):
            return "rounding decides"
    if any(not torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(plain, dense, strict=True)):
        return "eager reads wrong memory"
    return ""


def _results(model: nn.Module, inputs: tuple[Tensor, ...], nudge: float) -> list[Tensor]:
    """Outputs, gradients and buffers after two training steps, parameters and inputs moved by `nudge` before."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in [*model.parameters(), *inputs]:
            if t.is_floating_point():
                t.mul_(1 + nudge * torch.randn(t.shape, generator=noise, dtype=t.dtype))
    found: list[Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        torch.manual_seed(step)
        leaves = [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
        ends = [t for t in leaves if t.requires_grad and t.dim() == 0] or [t for t in leaves if t.requires_grad]
        torch.autograd.backward([t.sum() for t in ends])
        found += [t.detach().clone() for t in [*leaves, *model.buffers()]]
        found += [t.grad.clone() for t in [*model.parameters(), *inputs] if t.grad is not None]
        optimizer.step()
    return found


@functools.lru_cache(maxsize=256)
def recipe_of(seed: int, ops: int = 10) -> Recipe:
    """The module with this number: drawn until eager PyTorch can judge it."""
    for attempt in range(100):
        source = random.Random(f"{seed} {attempt}")
        recipe = draw_recipe(source, 3 + source.randrange(2 * ops - 5))
        if recipe.steps and not refusal(recipe):
            return replace(recipe, attempts=attempt + 1)
    raise AssertionError(f"no module was drawn from seed {seed}")


def random_module(seed: int, ops: int = 10) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """(model, inputs) of module number `seed`, in float64."""
    return recipe_of(seed, ops).build()
