"""Rules computed from a call, for ops that read and write at positions given as data.

In ATen's own ops the indexed dim is whole. The ops `autopar.index`, `index_put`, `gather` and `scatter` (kernels/indexing.py) know
where their block of it begins, so it splits: a read from another block gives zero, a write to another block is left out.
"""

from __future__ import annotations

import torch

from .algebra import Rule
from .call import Call
from .compute import fixed
from .sketch import Dim, Sketch, aligned


def index(call: Call) -> Rule:
    """x[i, j, :]: the indices' own dims split; so do indexed dims of x where the op knows their blocks. Linear in x."""
    sketch = Sketch(call)
    x, places = call.shapes[0], _indexed(call)
    indices = call.shapes[1:]
    shape = torch.broadcast_shapes(*indices)
    full = sketch.dims(x, places if _whole(call) else ())
    _follow_starts(sketch, [full[d] for d in places], places)
    wide = sketch.dims(shape)
    return sketch.rule([full, *(aligned(s, wide, shape) for s in indices)], [_placed(full, wide, places)], ["*", *["_"] * len(indices)])


def index_put(call: Call) -> Rule:
    """x with values at indices. When accumulated the indices' dims split: each device adds its own values to a term of x."""
    sketch = Sketch(call)
    places = _indexed(call)
    x, *indices, values = call.shapes
    shape = torch.broadcast_shapes(*indices)
    full = sketch.dims(x, places if _whole(call) else ())
    _follow_starts(sketch, [full[d] for d in places], places)
    wide = sketch.dims(shape, () if call["accumulate"] else range(len(shape)))
    target = _placed(full, wide, places)
    sizes = [sketch.sizes[dim[0]] if dim else 1 for dim in target]
    terms = [full, *(aligned(s, wide, shape) for s in indices), aligned(values, target, sizes)]
    return sketch.rule(terms, [full], ["+", *["_"] * (len(indices) + 1)] if call["accumulate"] else "")


def _whole(call: Call) -> bool:
    """ATen's own ops know no blocks; and truth values do not add up."""
    return not call.op.startswith("autopar.") or call.tensors[0].dtype == torch.bool


def _follow_starts(sketch: Sketch, dims: list[Dim], places: list[int]) -> None:
    """`starts` has one number for every dim up to the last indexed one."""
    if _whole(sketch.call):
        return
    at = {d: f"start:{dim[0]}" for d, dim in zip(places, dims, strict=True) if dim}
    if at:
        sketch.follow("starts", "list:" + ";".join(at.get(d, "size:0") for d in range(len(sketch.call["starts"]))))


def _indexed(call: Call) -> list[int]:
    """Positions of the indexed dims. Raises ValueError for masks, whose result has no static shape."""
    given = call["indices"]
    if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in given):
        raise ValueError("a mask as index")
    return [d for d, i in enumerate(given) if i is not None]


def _placed(full: list[Dim], wide: list[Dim], places: list[int]) -> list[Dim]:
    """Dims of the result: the indices' dims stand where adjacent indexed dims were, in front when they are not adjacent."""
    rest = [dim for d, dim in enumerate(full) if d not in places]
    at = places[0] if places == list(range(places[0], places[0] + len(places))) else 0
    return [*rest[:at], *wide, *rest[at:]]


def along_index(call: Call, how: str) -> Rule:
    """gather, scatter, scatter_add, index_select, index_add: the indexed dim of the table splits where the op knows its block.

    how: "read" (an index splits freely), "add" (an index splits: the table is a sum of terms), "write" (the index is whole).
    """
    sketch = Sketch(call)
    table, idx = call.tensors[0].shape, call["index"].shape
    result = call.results[0] or ()
    dim = call["dim"] % len(table) if len(table) else 0
    flat = len(idx) == 1 and call.op.startswith("aten.index_")
    other = [idx[0] if d == dim else n for d, n in enumerate(table)] if flat else list(idx)
    clash = [d for d in range(len(table)) if d != dim and table[d] != other[d]]
    full = sketch.dims(table, [dim, *clash] if _whole(call) else clash)
    if len(table) and full[dim] and not _whole(call):
        sketch.follow("start", f"start:{full[dim][0]}")
    reach = [
        sketch.letter(other[d], fixed=how == "write" or d in clash, name="k" if d == dim else "") if d == dim or d in clash else full[d]
        for d in range(len(table))
    ]
    index_term = [reach[dim]] if flat else reach
    sources = [reach] * (len(call.shapes) - 2)
    if any(s != tuple(other) for s in call.shapes[2:]):
        return fixed(call)
    inputs = [full, index_term, *sources]
    marks = {"read": ["*", "_"], "add": ["+", "_", *["_"] * len(sources)], "write": [""] * len(inputs)}[how]
    if how == "read":
        return sketch.rule(inputs, [reach], marks)
    assert tuple(result) == tuple(table)
    return sketch.rule(inputs, [full], marks)


def sorted_search(call: Call) -> Rule:
    """Sequences are whole, one for all values or one for each row of them; values are independent."""
    sketch = Sketch(call)
    sequence, values = call["sorted_sequence"].shape, call["self"].shape
    rows = sketch.dims(values[:-1]) if len(sequence) > 1 else []
    found = [*rows, *sketch.dims(values[len(rows) :])]
    ordered = [*rows, sketch.letter(sequence[-1], fixed=True)]
    return sketch.rule([ordered, found, *[ordered] * (len(call.shapes) - 2)], [found])


def members(call: Call) -> Rule:
    """isin: elements are independent, the set is whole."""
    sketch = Sketch(call)
    full = sketch.dims(call.shapes[0])
    return sketch.rule([full, sketch.dims(call.shapes[1], range(len(call.shapes[1])))], [full])


def taken(call: Call) -> Rule:
    """take: the flattened table is whole, indices are independent. Linear in the table."""
    sketch = Sketch(call)
    table = sketch.dims(call.shapes[0], range(len(call.shapes[0])))
    full = sketch.dims(call.shapes[1])
    return sketch.rule([table, full], [full], ["*", "_"])


def index_fill(call: Call) -> Rule:
    """One number at positions of one dim, which is whole."""
    sketch = Sketch(call)
    table = call["self"].shape
    full = sketch.dims(table, [call["dim"] % len(table)] if table else ())
    return sketch.rule([full, *([sketch.letter(n, fixed=True) for n in s] for s in call.shapes[1:])], [full])


def bags(call: Call, direction: str) -> Rule:
    """embedding_bag: rows of the table v, elements n, bags b and features d all split; rows and elements are summed over."""
    sketch = Sketch(call)
    forward = direction == "forward"
    rows = call["weight"].shape[0] if forward else call["rows"]
    number = call["count"] if forward else call["grad"].shape[0]
    width = call.shapes[0][1]
    elements = call["indices"].shape[0]
    v, d, n, b = (sketch.letter(size, name=name) for size, name in ((rows, "v"), (width, "d"), (elements, "n"), (number, "b")))
    for name, letters in (("start", v), ("bag_start", b)):
        if letters:
            sketch.follow(name, f"start:{letters[0]}")
    followed = b if forward else v
    if followed:
        sketch.follow("count" if forward else "rows", f"size:{followed[0]}")
    each = [[n]] * (len(call.shapes) - 1)
    return sketch.rule([[v, d] if forward else [b, d], *each], [[b, d] if forward else [v, d]], ["*", *["_"] * len(each)])
