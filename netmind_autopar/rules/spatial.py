"""Rules computed from a call, for ops on images and on windows of a sequence. Pooling and resampling are patterns (library.py)."""

from __future__ import annotations

import math

from .algebra import Rule
from .call import Call
from .compute import fixed
from .sketch import Dim, Sketch


def pixel_shuffle(call: Call, direction: str) -> Rule:
    """(c r s) h w <-> c (h r) (w s) for the factor r = s: only the factors are never split. direction: "out" (larger image) or "in"."""
    sketch = Sketch(call)
    small = call.shapes[0] if direction == "out" else call.results[0] or ()
    r = call["upscale_factor" if direction == "out" else "downscale_factor"]
    lead = sketch.dims(small[:-3])
    c, h, w = (sketch.letter(n) for n in (small[-3] // (r * r), small[-2], small[-1]))
    i, j = sketch.letter(r, fixed=True), sketch.letter(r, fixed=True)
    packed, image = [*lead, (*c, *i, *j), h, w], [*lead, c, (*h, *i), (*w, *j)]
    return sketch.rule([packed], [image], "+") if direction == "out" else sketch.rule([image], [packed], "+")


def channel_shuffle(call: Call) -> Rule:
    """n (g k) ... -> n (k g) ...: groups and channels of a group both split."""
    sketch = Sketch(call)
    x, groups = call.shapes[0], call["groups"]
    n, g, k = sketch.letter(x[0]), sketch.letter(groups), sketch.letter(x[1] // groups)
    rest = sketch.dims(x[2:])
    if g:
        sketch.follow("groups", f"size:{g[0]}")
    return sketch.rule([[n, (*g, *k), *rest]], [[n, (*k, *g), *rest]], "+")


def unfold(call: Call) -> Rule:
    """Windows of one dim, in a new last dim. Windows that tile the dim are (window, element) and windows split; others do not."""
    sketch = Sketch(call)
    x, result, size, step = call.shapes[0], call.results[0] or (), call["size"], call["step"]
    dim = _dim(call["dimension"], len(x))
    full = sketch.dims([1 if d == dim else n for d, n in enumerate(x)])
    tiles = step == size and x[dim] == result[dim] * size
    window, element = sketch.letter(result[dim], fixed=not tiles), sketch.letter(size, fixed=True)
    whole: Dim = (*window, *element) if tiles else sketch.letter(x[dim], fixed=True)
    return sketch.rule([[*full[:dim], whole, *full[dim + 1 :]]], [[*full[:dim], window, *full[dim + 1 :], element]], "+")


def unfold_backward(call: Call) -> Rule:
    """The gradient of `unfold`, windows added up where they overlap."""
    sketch = Sketch(call)
    grad, result, size, step = call.shapes[0], call.results[0] or (), call["size"], call["step"]
    dim = _dim(call["dim"], len(result))
    full = sketch.dims([1 if d == dim else n for d, n in enumerate(result)])
    tiles = step == size and result[dim] == grad[dim] * size
    window, element = sketch.letter(grad[dim], fixed=not tiles), sketch.letter(size, fixed=True)
    whole: Dim = (*window, *element) if tiles else sketch.letter(result[dim], fixed=True)
    sketch.follow("input_sizes", "shape")
    return sketch.rule([[*full[:dim], window, *full[dim + 1 :], element]], [[*full[:dim], whole, *full[dim + 1 :]]], "+")


def _dim(dim: int, rank: int) -> int:
    if not rank:
        raise ValueError("a tensor without dims")
    return dim % rank


def columns(call: Call, direction: str) -> Rule:
    """im2col and col2im: c h w <-> (c kernel) places; batch and channels split."""
    sketch = Sketch(call)
    image, matrix = (call.shapes[0], call.results[0]) if direction == "out" else (call.results[0], call.shapes[0])
    assert image is not None and matrix is not None
    lead, c = sketch.dims(image[:-3]), sketch.letter(image[-3])
    pixels = [sketch.letter(n, fixed=True) for n in image[-2:]]
    kernel = sketch.letter(math.prod(call["kernel_size"]), fixed=True)
    packed = [*lead, (*c, *kernel), sketch.letter(matrix[-1], fixed=True)]
    terms = ([*lead, c, *pixels], packed)
    return sketch.rule([terms[0]], [terms[1]], "+") if direction == "out" else sketch.rule([terms[1]], [terms[0]], "+")


def affine_grid(call: Call) -> Rule:
    """theta n r c -> n ... r: the coordinates of a whole image, one image per theta."""
    sketch = Sketch(call)
    theta, grid = call.shapes[0], call.results[0] or ()
    n = sketch.letter(theta[0])
    rows, cols = sketch.letter(theta[1], fixed=True), sketch.letter(theta[2], fixed=True)
    if n:
        sketch.follow("size", ";".join(["list:size:" + n[0], *(f"size:{k}" for k in call["size"][1:])]))
    return sketch.rule([[n, rows, cols]], [[n, *(sketch.letter(k, fixed=True) for k in grid[1:-1]), rows]], "+")


def fractional_pool(call: Call, direction: str) -> Rule:
    """Fractional max pooling: an image's channels have random numbers of their own."""
    sketch = Sketch(call)
    x = call["self"].shape
    rank = len(call["kernel_size"])
    lead = sketch.dims(x[:-rank])
    pixels = [*lead, *(sketch.letter(n, fixed=True) for n in x[-rank:])]
    places = [*lead, *(sketch.letter(n, fixed=True) for n in call["output_size"])]
    if direction == "backward":
        return sketch.rule([places, pixels, places], [pixels], ["*", "_", "_"])
    if len(lead) != 2:
        return fixed(call)
    return sketch.rule([pixels, [*lead, sketch.letter(rank, fixed=True)]], [places, places])


def weight_norm(call: Call, direction: str) -> Rule:
    """w = g v / |v|, one norm per element of `dim`, which splits; the others do not. Linear in the gradient."""
    sketch = Sketch(call)
    v = call["v" if direction == "forward" else "saved_v"].shape
    dim = _dim(call["dim"], len(v))
    full = sketch.dims(v, [d for d in range(len(v)) if d != dim])
    gain = [full[d] if d == dim else () for d in range(len(v))]
    if any(len(s) != len(v) for s in call.shapes):
        raise ValueError("norms of another rank than the weight")
    inputs = [full, gain] if direction == "forward" else [full, full, gain, gain]
    return sketch.rule(inputs, [full, gain], ["_", "_"] if direction == "forward" else ["*", "_", "_", "_"])
