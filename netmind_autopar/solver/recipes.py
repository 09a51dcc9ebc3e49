"""Hand-made ways to run a model, as data: what each says about the ops along the mesh axes that it governs, and which axes these are.

    ddp              every op splits the batch; parameters are whole
    zero1            so too; parameters, gradients and optimizer state lie split, parameters are gathered once a step
                     (Rajbhandari et al., arXiv:1910.02054)
    fsdp             so too; parameters are gathered when they are used, in forward and again in backward (Zhao et al., arXiv:2304.11277)
    megatron-tp      matmuls in pairs, columns then rows; heads, hidden features and the vocabulary split (Shoeybi et al., arXiv:1909.08053)
    megatron-tp-sp   and what is whole between the pairs split over the sequence (Korthikanti et al., arXiv:2205.05198)
    ulysses          the sequence split everywhere but in attention, where heads are (Jacobs et al., arXiv:2309.14509)
    ulysses-fsdp     so too; parameters as in fsdp

A baseline names one recipe or several: "fsdp+megatron-tp". "fsdp@dp+megatron-tp@tp", or {"dp": "fsdp", "tp": "megatron-tp"}, says which
axis each governs ("fsdp@a*b": both). Without that, an axis goes to the recipe whose list of names has it; then recipes of the batch
take the outermost axes that are left, others the innermost; an axis that nothing claims joins the recipe of the batch, and where there is
none runs "ddp" if its name says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..ir.errors import InputError
from ..ir.mesh import Mesh

Work = Literal["batch", "tensor", "tensor-sequence", "sequence-heads"]
Store = Literal["whole", "kept", "gathered"]
Baseline = str | Mapping[str, str]

_DATA, _TENSOR = ("dp", "data", "data_parallel", "batch"), ("tp", "tensor", "mp", "model", "tensor_parallel")


@dataclass(frozen=True)
class Recipe:
    """work: what ops split. store: parameters are whole; split and gathered once; split and gathered in both phases. axes: usual names."""

    name: str
    work: Work
    store: Store
    axes: tuple[str, ...]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("ddp", "batch", "whole", ("ddp", "replicate", "replica", *_DATA)),
        Recipe("zero1", "batch", "kept", ("zero", "zero1", "shard", *_DATA)),
        Recipe("fsdp", "batch", "gathered", ("fsdp", "shard", "zero", *_DATA)),
        Recipe("megatron-tp", "tensor", "whole", _TENSOR),
        Recipe("megatron-tp-sp", "tensor-sequence", "whole", _TENSOR),
        Recipe("ulysses", "sequence-heads", "whole", ("sp", "ulysses", "cp", "seq", "sequence", "context")),
        Recipe("ulysses-fsdp", "sequence-heads", "gathered", ("sp", "ulysses", "cp", "seq", "sequence", "context")),
    )
}


def axis_recipes(baseline: Baseline, mesh: Mesh) -> tuple[Recipe, ...]:
    """The recipe that governs each axis of the mesh. Raises InputError for an unknown recipe or axis, and for axes claimed twice."""
    order, claimed = _read(baseline, mesh)
    for i, recipe in enumerate(order):
        if i not in claimed.values():
            _claim(claimed, i, [name for name in recipe.axes if name in mesh.names])
    for i, recipe in enumerate(order):
        if i not in claimed.values():
            free = [name for name in mesh.names if name not in claimed]
            if not free:
                raise InputError(
                    f"no axis is left for {recipe.name!r}",
                    where=f"baseline={baseline!r}",
                    why=f"the mesh {mesh} has {len(mesh.axes)}, and every recipe governs one or more",
                    try_=f"a mesh of {len(order)} axes",
                )
            _claim(claimed, i, free if recipe.work == "batch" else free[::-1])
    data = [i for i, recipe in enumerate(order) if recipe.work == "batch"]
    out = []
    for name in mesh.names:
        if name in claimed:
            out.append(order[claimed[name]])
        elif data:
            out.append(order[data[-1]])
        else:
            out.append(RECIPES["ddp"] if name in RECIPES["ddp"].axes else order[0])
    return tuple(out)


def _claim(claimed: dict[str, int], recipe: int, names: Sequence[str]) -> None:
    for name in names:
        if name not in claimed:
            claimed[name] = recipe
            return


def _read(baseline: Baseline, mesh: Mesh) -> tuple[list[Recipe], dict[str, int]]:
    """The recipes in order, and the axes that were given to them by name."""
    if isinstance(baseline, Mapping):
        words = [f"{recipe}@{axis}" for axis, recipe in baseline.items()]
    else:
        words = [word.strip() for word in str(baseline).split("+")]
    order: list[Recipe] = []
    claimed: dict[str, int] = {}
    for i, word in enumerate(words):
        name, at, axes = word.partition("@")
        if name not in RECIPES:
            raise InputError(
                f"unknown baseline {name!r}", where=f"baseline={baseline!r}", try_=f"one of {', '.join(RECIPES)}, joined by '+'"
            )
        order.append(RECIPES[name])
        for axis in axes.split("*") if at else ():
            if axis not in mesh.names or axis in claimed:
                raise InputError(
                    f"{name!r} cannot govern the axis {axis!r}",
                    where=f"baseline={baseline!r}",
                    why="it has a recipe already" if axis in claimed else f"the mesh is {mesh}",
                    try_=f"one of {', '.join(mesh.names)}, each once",
                )
            claimed[axis] = i
    return order, claimed
