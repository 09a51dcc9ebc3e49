"""Rules computed from a call, for products and decompositions of vectors and matrices, distances, diagonals and transforms."""

from __future__ import annotations

import torch

from .algebra import Rule, bind
from .call import Call
from .sketch import Dim, Sketch, aligned


def diagonal(call: Call, how: str) -> Rule:
    """Both dims of a diagonal are whole, all others split. Linear.

    how: "read" (diagonal), "grad" (its backward), "embed" (diag_embed), "write" (diagonal_scatter).
    """
    sketch = Sketch(call)
    shapes, result = call.shapes, call.results[0] or ()
    whole = shapes[0] if how in ("read", "write") else result
    dims = {call["dim1"] % len(whole), call["dim2"] % len(whole)}
    full = sketch.dims(whole, dims)
    short = result if how == "read" else shapes[-1]
    line = [*(dim for d, dim in enumerate(full) if d not in dims), sketch.letter(short[-1], fixed=True)]
    if how == "grad":
        sketch.follow("input_sizes", "shape")
    inputs = {"read": [full], "grad": [line], "embed": [line], "write": [full, line]}[how]
    return sketch.rule(inputs, [line if how == "read" else full], "+")


def moved_along(call: Call, argument: str, *marks: str) -> Rule:
    """An op along the dims that an argument names (none: along all); they may change their size or places and are never split."""
    sketch = Sketch(call)
    x, result, named = call.shapes[0], call.results[0] or (), call[argument]
    dims = {d % len(x) for d in ([named] if isinstance(named, int) else named)} if x else set()
    full = sketch.dims(x, dims or range(len(x)))
    out = [full[d] if n == x[d] and d not in dims else sketch.letter(n, fixed=True) for d, n in enumerate(result)]
    return sketch.rule([full], [out], list(marks))


def one_dim_each(call: Call) -> Rule:
    """renorm: every slice along `dim` by itself, so only that dim splits."""
    sketch = Sketch(call)
    x = call.shapes[0]
    full = sketch.dims(x, [d for d in range(len(x)) if d != call["dim"] % len(x)])
    return sketch.rule([full], [full])


def distances(call: Call, direction: str) -> Rule:
    """cdist: x1 [..., p, m], x2 [..., r, m] -> [..., p, r]. A point's gradient is a sum over the points of the other side."""
    sketch = Sketch(call)
    x1, x2 = call["x1"].shape, call["x2"].shape
    batch = torch.broadcast_shapes(x1[:-2], x2[:-2])
    lead = sketch.dims(batch)
    p, r, m = sketch.letter(x1[-2], name="p"), sketch.letter(x2[-2], name="r"), sketch.letter(x1[-1], fixed=True, name="m")
    first, second = [*aligned(x1[:-2], lead, batch), p, m], [*aligned(x2[:-2], lead, batch), r, m]
    table = [*lead, p, r]
    if direction == "forward":
        return sketch.rule([first, second], [table])
    if tuple(x1[:-2]) != tuple(batch):
        raise ValueError("the gradient of a broadcast operand")
    return sketch.rule([table, first, second, table], [first], ["*", "_", "_", "_"])


def trilinear(call: Call) -> Rule:
    """The product of three operands, each lacking its `expand` dims, summed over `sumdim`: linear in each."""
    sketch = Sketch(call)
    missing = [set(call[f"expand{i}"]) for i in (1, 2, 3)]
    rank = len(call.shapes[0]) + len(missing[0])
    sizes = [1] * rank
    places = [[d for d in range(rank) if d not in gone] for gone in missing]
    for shape, dims in zip(call.shapes, places, strict=True):
        for n, d in zip(shape, dims, strict=True):
            sizes[d] = max(sizes[d], n)
    full = sketch.dims(sizes)
    terms: list[list[Dim]] = [
        [full[d] if n > 1 else () for n, d in zip(shape, dims, strict=True)] for shape, dims in zip(call.shapes, places, strict=True)
    ]
    gone = {d % rank for d in call["sumdim"]}
    return sketch.rule(terms, [[dim for d, dim in enumerate(full) if d not in gone]], ["*", "*", "*"])


def triangular(call: Call) -> Rule:
    """Systems of one matrix: right-hand sides are independent. Linear in them."""
    pattern = "... n! n!, *... n! k -> ... n! k" if call["left"] else "... n! n!, *... k n! -> ... k n!"
    return bind(pattern, call.shapes, call.results)


def solve(call: Call) -> Rule:
    """A general system; the factors are the same for all right-hand sides, which therefore do not split."""
    vector = len(call.shapes[1]) == len(call.shapes[0]) - 1
    side = "... n!" if vector else "... h! w!"
    return bind(f"... n! n!, {side} -> {side}, ... n! n!, ... n!, ...", call.shapes, call.results)


def svd(call: Call) -> Rule:
    """Without vectors their outputs are empty."""
    if not call["compute_uv"]:
        return bind("... n! m! -> _, ... k!, _", call.shapes, call.results)
    return bind("... n! m! -> ... n! p!, ... k!, ... q! m!", call.shapes, call.results)


def outer_added(call: Call) -> Rule:
    """addr: self, broadcast, and the product of two vectors."""
    sketch = Sketch(call)
    x, a, b = call.shapes
    full, shape = [sketch.letter(a[0], name="m"), sketch.letter(b[0], name="n")], (a[0], b[0])
    return sketch.rule([aligned(x, full, shape), [full[0]], [full[1]]], [full])


def vector_added(call: Call) -> Rule:
    """addmv: self, broadcast, and a matrix by a vector."""
    sketch = Sketch(call)
    x, a, _ = call.shapes
    m, k = sketch.letter(a[0], name="m"), sketch.letter(a[1], name="k")
    return sketch.rule([aligned(x, [m], a[:1]), [m, k], [k]], [[m]], ["+", "_", "_"])


def summed_matmul(call: Call) -> Rule:
    """addbmm: self, broadcast, and a sum of matrix products."""
    sketch = Sketch(call)
    x, a, b = call.shapes
    n, i, k, j = (sketch.letter(size) for size in (a[0], a[1], a[2], b[2]))
    return sketch.rule([aligned(x, [i, j], (a[1], b[2])), [n, i, k], [n, k, j]], [[i, j]], ["+", "_", "_"])
