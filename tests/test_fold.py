"""Classes of nodes: repeated blocks fold, other things do not."""

from __future__ import annotations

import torch
from torch import nn

from netmind_autopar.rules.bind import bind_program
from netmind_autopar.solver.fold import classes, signature
from netmind_autopar.tracer.capture import capture


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, layers: int, d: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(d) for _ in range(layers))
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).sum()


def folded(model: nn.Module, *inputs: torch.Tensor):
    program = capture(model, inputs)
    rules = bind_program(program)
    return program, rules, classes(program, rules)


def test_layers_fold_and_their_number_does_not_matter():
    found = [set(folded(Deep(n), torch.randn(4, 8))[2].values()) for n in (3, 5)]
    assert found[0] == found[1]
    assert "layers.*.up.weight" in found[0] and "head.weight" in found[0]
    assert "layers.*.up.addmm" in found[0]


def test_members_share_their_signature():
    program, rules, names = folded(Deep(3), torch.randn(4, 8))
    seen: dict[str, object] = {}
    for name, cls in names.items():
        sign = signature(program.node(name), rules.get(name))
        assert seen.setdefault(cls, sign) == sign


def test_a_plain_sequential_does_not_fold():
    names = folded(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8))[2]
    assert {"0.weight", "2.weight"} <= set(names.values())


def test_layers_of_different_shapes_stay_apart():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(8), Block(8)])
            self.blocks[1].up = nn.Linear(8, 32)
            self.blocks[1].down = nn.Linear(32, 8)

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x)).sum()

    names = folded(Two(), torch.randn(4, 8))[2]
    assert {"blocks.*.up.weight", "blocks.*.up.weight~1"} <= set(names.values())
    assert sum(cls == "blocks.*.norm.weight" for cls in names.values()) == 2


def test_tangents_are_named_after_their_output():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return {"y": self.fc(x)}

    program, _, names = folded(Plain(), torch.randn(4, 8))
    tangents = [i for i in program.inputs if i.role == "tangent"]
    assert tangents and all(names[i.node] == f"output.{i.name}" for i in tangents)
