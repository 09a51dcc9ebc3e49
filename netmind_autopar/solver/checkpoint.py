"""Activation checkpointing of whole blocks (Chen et al., arXiv:1604.06174): only what leaves a repeated block is kept for backward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..ir.errors import InputError
from ..ir.program import Program, source
from .replay import is_late, refusal, takers


def checkpointed(program: Program, names: Mapping[str, str]) -> tuple[str, ...]:
    """`Plan.recompute` for every op of forward inside a repeated block, but for those whose results are used outside of it.

    names: the class of every node (`fold.classes`). A block is what the first number in a module path counts. Raises InputError when
    the model has none.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    results = {source(nodes[item.node])[0].name for item in program.outputs}
    inside: dict[str, bool] = {}  # by class, in program order: whether all of its members stay inside
    for node in program.graph.nodes:
        name = names.get(node.name, "")
        if "*" not in name or node.op != "call_function" or is_late(node) or refusal(node):
            continue
        block = _block(node, name)
        stays = node.name not in results and all(is_late(u) or _block(u, names.get(u.name, "")) == block for u in takers(node))
        inside[name] = inside.get(name, True) and stays
    found = tuple(name for name, stays in inside.items() if stays)
    if not found:
        raise InputError(
            "the model has no repeated blocks to checkpoint",
            where="checkpoint=True",
            why="a block is a module of modules in a list, as the layers of a transformer are",
            try_="drop checkpoint, or leave it to the plan: without a baseline it recomputes what memory asks for",
        )
    return found


def _block(node: fx.Node, name: str) -> str:
    """The path of the block that a node stands in, "" outside of all."""
    depth = name.partition("*")[0].count(".")
    return ".".join((node.meta.get("module") or "").split(".")[: depth + 1]) if "*" in name else ""
