"""Capture of deep models from four blocks: the same program as a trace of all of them, or that trace itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import test_tracer
import torch
from torch import nn

from netmind_autopar.ir.program import Program
from netmind_autopar.tracer import blocks, repeat, torch_private
from netmind_autopar.tracer.capture import capture
from netmind_autopar.tracer.hash import graph_hash
from netmind_autopar.tracer.signature import Selection, sample_call

LAYERS = 6  # two more than the proofs look at


@pytest.fixture
def how(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of each attempt: "" when it was expanded, else why not."""
    attempts: list[str] = []
    inner = repeat.expanded

    def noted(*args: Any) -> Program:
        try:
            program = inner(*args)
        except Exception as error:
            attempts.append(f"{type(error).__name__}: {error}")
            raise
        attempts.append("")
        return program

    monkeypatch.setattr(blocks, "FEWEST", 6)
    monkeypatch.setattr(repeat, "expanded", noted)
    return attempts


def both(model: nn.Module, inputs: Any, **options: Any) -> tuple[Program, Program]:
    """The program as capture makes it and that of a full trace, which must be equal in everything."""
    before = {k: (v, v._version) for k, v in model.state_dict(keep_vars=True).items()}
    folded, full = capture(model, inputs, **options), capture(model, inputs, fold=False, **options)
    assert {k: (v, v._version) for k, v in model.state_dict(keep_vars=True).items()} == before
    assert repeat.difference(folded, full) == "" and graph_hash(folded) == graph_hash(full)
    for a, b in zip(folded.graph.nodes, full.graph.nodes, strict=True):
        assert a.format_node() == b.format_node() and a.meta.keys() == b.meta.keys() and list(map(str, a.users)) == list(map(str, b.users))
    folded.graph.lint()
    templates = [p.signature.unpack.__self__.template for p in (folded, full)]
    assert templates[0] is not None and repeat.same_template(*templates)
    return folded, full


@pytest.mark.parametrize(
    ("name", "dropout", "call", "options"),
    [
        ("gpt2", 0.1, {"output_hidden_states": True}, {"differentiable": ("loss", "logits")}),
        ("llama", 0.0, {"use_cache": False}, {"outputs": ("loss",)}),
        ("bert", 0.1, {}, {}),
        ("qwen2", 0.1, {}, {}),
    ],
)
def test_the_same_program(name: str, dropout: float, call: dict[str, Any], options: dict[str, Any], how: list[str]) -> None:
    model, inputs = getattr(models, name)(torch.float32, dropout, layers=LAYERS)
    inputs = {**inputs, **call}
    folded, full = both(model, inputs, **options)
    assert how == [""]
    one, two = (test_tracer.run(p, model, (), inputs, seed=5) for p in (folded, full))
    assert torch.equal(one[0].loss, two[0].loss) and type(one[0]) is type(two[0])
    assert one[1].keys() == two[1].keys() and all(torch.equal(one[1][k], two[1][k]) for k in one[1])
    assert ("hidden_states.6" in [o.name for o in folded.outputs]) == (name == "gpt2")
    cache, other = (getattr(x[0], "past_key_values", None) for x in (one, two))
    assert (cache is not None) == (name in ("gpt2", "qwen2"))
    if cache is not None:
        assert len(cache.layers) == LAYERS
        assert all(torch.equal(a.keys, b.keys) and a.is_initialized for a, b in zip(cache.layers, other.layers, strict=True))


class Block(nn.Module):
    """Dropout, batch norm with its buffers, a counter, and a number that nothing but the block knows."""

    def __init__(self, number: int, width: int = 8, wide: int = 12) -> None:
        super().__init__()
        self.number, self.rate = number, 0.25
        self.up, self.down, self.norm = nn.Linear(width, wide), nn.Linear(wide, width), nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.rate * self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """Blocks in a loop, which subclasses and tests change."""

    def __init__(self, count: int = LAYERS) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(i) for i in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = self.step(i, block, x)
        return self.last(nn.functional.dropout(x, 0.2)).square().mean()

    def step(self, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)


def sequence() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5)) for _ in range(LAYERS)])


class Residual(Stack):
    """Something between the blocks, and one tensor with a gradient that goes into all of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = start = self.first(x)
        for block in self.blocks:
            x = torch.sin(block(x)) + 0.5 * start
        return self.last(x).square().mean()


class Shortcut(Stack):
    """Each block takes what the last two made, as a momentum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, before = self.first(x), self.first(x) * 0.5
        for block in self.blocks:
            x, before = block(x + before), x
        return self.last(x + before).square().mean()


class Functions(Stack):
    """A gradient written by hand in every block: backward is run."""

    def step(self, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return Halved.apply(block(x), [0.5])


class Hooked(Stack):
    def step(self, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = block(x)
        x.register_hook(torch.sin)
        return x


@pytest.mark.parametrize("make", [Stack, sequence, Residual, Shortcut, Functions, Hooked], ids=lambda f: f.__name__)
def test_models_by_hand(make: Callable[[], nn.Module], how: list[str]) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(5, 4).double()
    folded, full = both(model, x)
    assert how == [""]
    tangents = {i.name: torch.randn(5, 4).double() for i in folded.inputs if i.name == "output" and make is sequence}
    one, two = (test_tracer.run(p, model, (x,), seed=2, tangents=tangents) for p in (folded, full))
    assert torch.equal(one[0], two[0]) and one[1].keys() == two[1].keys() and one[2].keys() == two[2].keys()
    assert len(one[2]) == (0 if make is sequence else 3 * LAYERS) and len(one[1]) == len(list(model.parameters()))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one[1:], two[1:], strict=True) for k in a)


def changed(change: Callable[[Stack], Any]) -> Callable[[], Stack]:
    def make() -> Stack:
        model = Stack()
        change(model)
        return model

    make.__name__ = change.__name__
    return make


@changed
def width(model: Stack) -> None:
    model.blocks[5] = Block(5, wide=16)


@changed
def attribute(model: Stack) -> None:
    model.blocks[5].rate = 0.5


@changed
def more(model: Stack) -> None:
    model.blocks[5].extra = 1


@changed
def evaluated(model: Stack) -> None:
    model.blocks[5].dropout.eval()


@changed
def frozen(model: Stack) -> None:
    model.blocks[5].requires_grad_(False)


@changed
def shared(model: Stack) -> None:
    model.blocks[5].up.weight = model.blocks[4].up.weight


@changed
def outside(model: Stack) -> None:
    model.extra = model.blocks[5].norm


@changed
def hook(model: Stack) -> None:
    model.blocks[5].register_forward_hook(lambda module, args, out: out * 2)


@changed
def renamed(model: Stack) -> None:
    model.blocks[5].forward = model.blocks[4].forward


def loop(step: Callable[[Stack, int, nn.Module, torch.Tensor], torch.Tensor]) -> Callable[[], Stack]:
    """A model whose blocks are alike, and whose loop treats one of them differently: seen by running all of it alone."""
    return type(step.__name__, (Stack,), {"step": step})


@loop
def skipped(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x if i == 5 else block(x)


@loop
def scaled(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x) * (2.0 if i == 5 else 1.0)


@loop
def depth(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x) * (1 / len(self.blocks))


@loop
def twice(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(block(x)) if i == 5 else block(x)


@loop
def constant(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x) * torch.tensor(2.0 if i == 5 else 1.0, dtype=x.dtype)


@loop
def backwards(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = block(x)
    if i == 5:
        x.register_hook(lambda grad: grad * 2)
    return x


@loop
def idle(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(nn.functional.dropout(x, 0.0) if i == 5 else x)  # drops nothing, but the later ones get other numbers


@loop
def far(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    self.seen = [x] if i == 0 else [*self.seen, x]
    return block(x + self.seen[max(0, i - 3)])


@loop
def numbered(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x) * (1.0 + block.number)


class Halved(torch.autograd.Function):
    """The same ops in forward, another gradient for some."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: list[float]) -> torch.Tensor:
        ctx.factor = factor
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor[0], None


@loop
def function(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return Halved.apply(block(x), [0.5 if i == 5 else 2.0])


@loop
def once(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return Halved.apply(block(x), [2.0]) if i == 5 else block(x) * 2.0


@loop
def node_hook(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = block(x)
    if i == 5:
        x.grad_fn.register_hook(lambda grads, _: (grads[0] * 2, *grads[1:]))
    return x


@loop
def saved(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if i != 5:
        return block(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
        return block(x)


@loop
def cut_off(self: Stack, i: int, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x.data if i == 5 else x)


DIFFERENT = [width, attribute, more, evaluated, frozen, shared, outside, hook, renamed]
TREATED = [skipped, scaled, depth, twice, constant, backwards, idle, far, numbered, function, once, node_hook, saved, cut_off]


@pytest.mark.parametrize("make", DIFFERENT, ids=lambda f: f.__name__)
def test_blocks_that_differ(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "FEWEST", 6)
    assert blocks.find(Stack()) == ("blocks", LAYERS)
    with pytest.raises(repeat.NoPeriod):
        blocks.find(make())


@pytest.mark.parametrize("make", TREATED, ids=lambda f: f.__name__)
def test_loops_that_differ(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is traced."""

    def trace(fake: nn.Module, mode: Any, selection: Selection) -> Program:
        raise AssertionError("the rehearsal saw nothing")

    monkeypatch.setattr(blocks, "FEWEST", 6)
    model = make().double()
    call = sample_call(model.forward, torch.randn(5, 4).double())
    with pytest.raises(repeat.NoPeriod), torch.enable_grad():
        repeat.expanded(model, call, lambda: Selection(None, None), trace, torch_private.fake_mode)


@pytest.mark.parametrize("make", [hook, scaled], ids=lambda f: f.__name__)
def test_what_differs_is_traced(make: Callable[[], nn.Module], how: list[str]) -> None:
    both(make().double(), torch.randn(5, 4).double())
    assert len(how) == 1 and how[0].startswith("NoPeriod")


def test_two_lists_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "FEWEST", 6)
    with pytest.raises(repeat.NoPeriod, match="2 lists"):
        blocks.find(nn.ModuleList([Stack(), Stack()]))


def test_transformers_with_different_layers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    scaled = GPT2Config(n_layer=16, n_embd=8, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0, scale_attn_by_inverse_layer_idx=True)
    sliding = Qwen2Config(num_hidden_layers=16, use_sliding_window=True, sliding_window=3, max_window_layers=12, **small)
    for model in (GPT2LMHeadModel(scaled), Qwen2ForCausalLM(sliding)):
        with pytest.raises(repeat.NoPeriod, match="0 lists"):
            blocks.find(model)


def test_shallow_models_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_Expander", None)
    capture(*models.gpt2(layers=2))
    with pytest.raises(repeat.NoPeriod, match="0 lists"):
        blocks.find(models.gpt2(layers=blocks.FEWEST - 1)[0])
    assert blocks.find(models.gpt2(layers=blocks.FEWEST)[0]) == ("transformer.h", blocks.FEWEST)
