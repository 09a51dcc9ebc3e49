"""Rules computed from a call, for ops that move elements: views, permutations, cuts, joins, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .algebra import Rule
from .call import Call
from .sketch import Dim, Sketch, aligned


def view(call: Call, argument: str = "size") -> Rule:
    """Letters are the common factors of both shapes, found from the right in groups of dims with equal products."""
    sketch = Sketch(call)
    shape, result = call.shapes[0], call.results[0] or ()
    ins: list[Dim] = [()] * len(shape)
    outs: list[Dim] = [()] * len(result)
    for left, right in _groups(shape, result):
        _factor(sketch, shape, left, result, right, ins, outs)
    sketch.follow(argument, "shape")
    return sketch.rule([ins], [outs], "+")


def _groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims of a and b with equal products, dims of size 1 left out."""
    left, right = [i for i, n in enumerate(a) if n != 1], [i for i, n in enumerate(b) if n != 1]
    out: list[tuple[list[int], list[int]]] = []
    while left or right:
        some, others = [left.pop(0)], [right.pop(0)]
        while (x := math.prod(a[i] for i in some)) != (y := math.prod(b[i] for i in others)):
            if x < y:
                some.append(left.pop(0))
            else:
                others.append(right.pop(0))
        out.append((some, others))
    return out


def _edges(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """Right strides at the dims' boundaries, from the product of all down to 1."""
    out = [math.prod(shape[i] for i in dims)]
    for i in dims:
        out.append(out[-1] // shape[i])
    return out


def _factor(sketch: Sketch, a: Sequence[int], left: list[int], b: Sequence[int], right: list[int], ins: list[Dim], outs: list[Dim]) -> None:
    """Letters of one group. Where boundaries do not nest, only the common factor of the major dims is shared, the rest fixed."""
    edges = sorted({*_edges(a, left), *_edges(b, right)}, reverse=True)
    if all(x % y == 0 for x, y in itertools.pairwise(edges)):
        letters = {x: sketch.letter(x // y) for x, y in itertools.pairwise(edges)}
        for shape, dims, terms in ((a, left, ins), (b, right, outs)):
            bounds = _edges(shape, dims)
            for i, high, low in zip(dims, bounds, bounds[1:], strict=False):
                terms[i] = tuple(name for edge in edges if low < edge <= high for name in letters[edge])
        return
    shared = math.gcd(a[left[0]], b[right[0]])
    major = sketch.letter(shared)
    for shape, dims, terms in ((a, left, ins), (b, right, outs)):
        for i in dims:
            first = i == dims[0]
            rest = sketch.letter(shape[i] // shared if first else shape[i], fixed=True)
            terms[i] = (*major, *rest) if first else rest


def permute(call: Call, how: str = "dims") -> Rule:
    """how: "dims" (a list), "swap" (dim0, dim1), "last" (t)."""
    sketch = Sketch(call)
    full = sketch.dims(call.shapes[0])
    rank = len(full)
    order = list(range(rank))
    if how == "dims":
        order = [d % rank for d in call["dims"]]
    elif rank:
        i, j = (call["dim0"] % rank, call["dim1"] % rank) if how == "swap" else (0, rank - 1)
        order[i], order[j] = order[j], order[i]
    return sketch.rule([full], [[full[d] for d in order]], "+")


def expand(call: Call, argument: str = "size") -> Rule:
    """New and broadcast dims are letters that only the output has."""
    sketch = Sketch(call)
    result = call.results[0] or ()
    full = sketch.dims(result)
    sketch.follow(argument, "shape")
    return sketch.rule([aligned(call.shapes[0], full, result)], [full], "+")


def repeat(call: Call) -> Rule:
    """Repeated dims are (copies, elements); the copies are never split."""
    sketch = Sketch(call)
    shape, times = call.shapes[0], call["repeats"]
    full = sketch.dims(shape)
    padded = [()] * (len(times) - len(shape)) + full
    outs = [(*sketch.letter(n, fixed=True), *dim) for n, dim in zip(times, padded, strict=True)]
    return sketch.rule([full], [outs], "+")


def squeeze(call: Call) -> Rule:
    """Dims of size 1 go. A named dim that is larger stays, and is never split: a piece of size 1 would be squeezed."""
    sketch = Sketch(call)
    shape = call.shapes[0]
    try:
        dims = {d % len(shape) for d in ([call["dim"]] if isinstance(call["dim"], int) else call["dim"])} if shape else set()
    except KeyError:
        dims = set(range(len(shape)))
    full = sketch.dims(shape, dims)
    return sketch.rule([full], [[dim for d, dim in enumerate(full) if d not in dims or shape[d] != 1]], "+")


def unsqueeze(call: Call) -> Rule:
    sketch = Sketch(call)
    full = sketch.dims(call.shapes[0])
    out = list(full)
    out.insert(call["dim"] % (len(full) + 1), ())
    return sketch.rule([full], [out], "+")


def cat(call: Call) -> Rule:
    """Equal pieces: the dim is (piece!, element), as of `split`, and elements still split. Else the dim is whole.

    Two pieces with a dim for heads are the halves of a rotary embedding; there more letters would only make the search larger.
    """
    sketch = Sketch(call)
    shapes, result = call.shapes, call.results[0] or ()
    if any(len(s) != len(result) for s in shapes):
        raise ValueError("cat of tensors with different ranks")
    dim = call["dim"] % len(result)
    rotary = len(shapes) == 2 and len(result) > 3
    if not rotary and len({s[dim] for s in shapes}) == 1 and shapes[0][dim]:
        full = sketch.dims(shapes[0])
        joined = [(*sketch.letter(len(shapes), fixed=True), *full[dim]) if d == dim else full[d] for d in range(len(result))]
        return sketch.rule([full] * len(shapes), [joined], "+")
    full = sketch.dims(result, [dim])
    inputs = [[sketch.letter(s[dim], fixed=True) if d == dim else full[d] for d in range(len(s))] for s in shapes]
    return sketch.rule(inputs, [full], "+")


def stack(call: Call) -> Rule:
    sketch = Sketch(call)
    full = sketch.dims(call.shapes[0])
    out = list(full)
    out.insert(call["dim"] % (len(full) + 1), sketch.letter(len(call.shapes), fixed=True))
    return sketch.rule([full] * len(call.shapes), [out], "+")


def split(call: Call, argument: str) -> Rule:
    """Equal pieces: the dim is (piece!, element) and elements still split. Unequal: the dim is whole."""
    sketch = Sketch(call)
    shape, results = call.shapes[0], [r or () for r in call.results]
    dim = call["dim"] % len(shape)
    full = sketch.dims(shape, [dim])
    lengths = {r[dim] for r in results}
    if len(lengths) > 1 or 0 in lengths:
        return sketch.rule(
            [full], [[sketch.letter(r[dim], fixed=True) if d == dim else full[d] for d in range(len(r))] for r in results], "+"
        )
    for letter in full[dim]:
        del sketch.sizes[letter]
    piece, element = sketch.letter(len(results), fixed=True, name="c"), sketch.letter(lengths.pop(), name="n")
    sketch.fixed &= set(sketch.sizes)
    outs = [element if d == dim else full[d] for d in range(len(shape))]
    full[dim] = (*piece, *element)
    if argument != "chunks":
        sketch.follow(argument, "size:" + (element[0] if element else "1"))
    return sketch.rule([full], [outs] * len(results), "+")


def unbind(call: Call) -> Rule:
    sketch = Sketch(call)
    shape = call.shapes[0]
    dim = call["dim"] % len(shape)
    full = sketch.dims(shape, [dim])
    return sketch.rule([full], [full[:dim] + full[dim + 1 :]] * len(call.results), "+")


def cut(call: Call, *follows: str) -> Rule:
    """slice, select and their backward and scatter forms: the dim is whole unless all of it is taken. Linear.

    `follows` names the argument that holds the shape of output 0.
    """
    sketch = Sketch(call)
    result = call.results[0] or ()
    shapes = call.shapes
    whole = max([*shapes, result], key=lambda s: (len(s), math.prod(s)))
    dim = call["dim"] % len(whole)
    same = all(s == result for s in shapes)
    full = sketch.dims(whole, () if same else [dim])

    def term(shape: Sequence[int]) -> list[Dim]:
        if len(shape) < len(whole):
            return full[:dim] + full[dim + 1 :]
        return [sketch.letter(n, fixed=True) if d == dim and n != whole[d] else full[d] for d, n in enumerate(shape)]

    if same:
        _follow_whole(sketch, full[dim])
    for argument in follows:
        sketch.follow(argument, "shape")
    return sketch.rule([term(s) for s in shapes], [term(result)], "+")


def _follow_whole(sketch: Sketch, dim: Dim) -> None:
    """All of the dim is taken: the end, if given, is its local size."""
    end = sketch.call["end"] if "end" in {a.name for a in sketch.call.target._schema.arguments} else None
    if end is not None and dim:
        sketch.follow("end", f"size:{dim[0]}")
    start = sketch.call["start"] if end is not None or dim else None
    if start:  # a start at or before -size: counted from a local end it would cut
        sketch.follow("start", "size:0")


def pad(call: Call) -> Rule:
    """Padded dims are whole; linear only when padded with zero."""
    sketch = Sketch(call)
    shape, result = call.shapes[0], call.results[0] or ()
    pads = list(call["pad"])
    padded = {len(shape) - 1 - i // 2 for i, n in enumerate(pads) if n}
    full = sketch.dims(shape, padded)
    out = [sketch.letter(n, fixed=True) if d in padded and n != shape[d] else full[d] for d, n in enumerate(result)]
    return sketch.rule([full], [out], "+" if call["value"] == 0 else "")


def retyped(call: Call) -> Rule:
    """Bits read as another dtype: element by element when the size stays, else with the last dim whole."""
    sketch = Sketch(call)
    shape, result = call.shapes[0], call.results[0] or ()
    full = sketch.dims(shape, () if shape == result else [len(shape) - 1])
    return sketch.rule([full], [full if shape == result else [*full[:-1], sketch.letter(result[-1], fixed=True)]])
