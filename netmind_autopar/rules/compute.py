"""Rules computed from a call, for ops that compute: element-wise ops, contractions, reductions, norms, convolutions, attention.

Each function takes the call and the words of its table row. What must hold for a letter is said in `algebra.py`: an output
that lacks a split letter must be the sum of what the devices computed. A letter for which that is false is fixed.
"""

from __future__ import annotations

import torch

from .algebra import Rule
from .call import Call
from .sketch import Dim, Sketch, aligned


def pointwise(call: Call, *marks: str) -> Rule:
    """Operands broadcast right-aligned. One mark per tensor operand of the schema; a sum with a number is not linear."""
    sketch = Sketch(call)
    shape = next(r for r in call.results if r is not None)
    full = sketch.dims(shape)
    inputs = [aligned(s, full, shape) for s in call.shapes]
    schema = [a.name for a in call.target._schema.arguments if "Tensor" in str(a.type)]
    given = [(name, mark) for name, mark in zip(schema, marks, strict=False)]
    numbers = [name for name, mark in given if mark == "+" and not isinstance(call[name], torch.Tensor)]
    kept = [mark for name, mark in given if isinstance(call[name], torch.Tensor)]
    used = kept + ["_"] * (len(inputs) - len(kept)) if not numbers and len(kept) <= len(inputs) else ["_"] * len(inputs)
    return sketch.rule(inputs, [full if r == shape else None for r in call.results], used)


def masked_fill(call: Call) -> Rule:
    """Linear in the filled tensor only when it is filled with zero."""
    return pointwise(call, "*" if call["value"] == 0 else "_", "_")


def where_scalar(call: Call, kept: str, number: str) -> Rule:
    """`where` with a number on one side: linear in the other side only when the number is zero."""
    return pointwise(call, "_", "*" if call[number] == 0 else "_")


def added_matmul(call: Call, batch: str = "") -> Rule:
    """addmm, baddbmm: bias + a @ b, the bias broadcast to the result."""
    sketch = Sketch(call)
    bias, a, b = call.shapes
    head = [sketch.letter(a[0], name="b")] if batch else []
    m, k, n = (sketch.letter(size, name=name) for size, name in ((a[-2], "m"), (a[-1], "k"), (b[-1], "n")))
    full, shape = [*head, m, n], [*a[:-1], b[-1]]
    return sketch.rule([aligned(bias, full, shape), [*head, m, k], [*head, k, n]], [full], ["+", "_", "_"])


def linear(call: Call) -> Rule:
    """x @ weight^T + bias for an x of any rank."""
    sketch = Sketch(call)
    x, weight = call.shapes[:2]
    rows = sketch.dims(x[:-1])
    k, n = sketch.letter(x[-1], name="k"), sketch.letter(weight[0], name="n")
    return sketch.rule([[*rows, k], [n, k], [n]][: len(call.shapes)], [[*rows, n]], ["_", "_", "+"][: len(call.shapes)])


def _reduced_dims(call: Call, rank: int) -> set[int]:
    try:
        dim = call["dim"]
    except KeyError:
        dim = None
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return {d % rank for d in dims} if rank else set()


def reduce(call: Call, how: str, *marks: str) -> Rule:
    """A reduction over `dim`. how: "sum", "max", "min" combine across devices; "whole": reduced dims are never split."""
    sketch = Sketch(call)
    shape = call.shapes[0]
    gone = _reduced_dims(call, len(shape))
    full = sketch.dims(shape, gone if how == "whole" or not _combines(call) else ())
    result = call.results[0] or ()
    left = [() if d in gone else dim for d, dim in enumerate(full) if d not in gone or len(result) == len(shape)]
    return sketch.rule([full], [left] * len(call.results), list(marks) or "", "sum" if how == "whole" else how)


def _combines(call: Call) -> bool:
    """Collectives reduce numbers, not truth values."""
    return all(t is None or t.dtype != torch.bool for t in call.outputs)


def along(call: Call, *marks: str) -> Rule:
    """An op along `dim`: that dim is never split, it may have another size in the outputs; all other dims are independent."""
    sketch = Sketch(call)
    shape = call.shapes[0] if len(call.shapes) == 1 else tuple(torch.broadcast_shapes(*call.shapes))
    dims = {call["dim"] % len(shape)} if shape else set()
    full = sketch.dims(shape, dims)
    inputs = [aligned(s, full, shape) for s in call.shapes]
    outputs = []
    for result in call.results:
        outputs.append([sketch.letter(n, fixed=True) if d in dims and n != shape[d] else full[d] for d, n in enumerate(result or ())])
    return sketch.rule(inputs, outputs, [*marks, *["_"] * (len(inputs) - len(marks))] if marks else "")


def halves(call: Call, *marks: str) -> Rule:
    """glu and its backward: the dim is (half!, element), and elements split."""
    sketch = Sketch(call)
    whole = call["self"].shape
    dim = call["dim"] % len(whole)
    full = sketch.dims([1 if d == dim else n for d, n in enumerate(whole)])
    half, element = sketch.letter(2, fixed=True), sketch.letter(whole[dim] // 2)
    both, one = list(full), list(full)
    both[dim], one[dim] = (*half, *element), element
    return sketch.rule([one, both], [both], ["*", "_"]) if marks else sketch.rule([both], [one])


def along_dims(call: Call, *marks: str) -> Rule:
    """An op that keeps its shape and moves elements along `dims`, which are never split."""
    sketch = Sketch(call)
    full = sketch.dims(call.shapes[0], call["dims"])
    return sketch.rule([full], [full], list(marks))


def loss(call: Call, *marks: str) -> Rule:
    """Element-wise losses and their backward (the mark is grad's): a mean divides by the local count, so it is never split."""
    sketch = Sketch(call)
    shape = torch.broadcast_shapes(*call.shapes)
    full = sketch.dims(shape, range(len(shape)) if call["reduction"] == 1 else ())
    inputs = [aligned(s, full, shape) for s in call.shapes]
    used = [*marks, *["_"] * (len(inputs) - len(marks))]
    return sketch.rule(inputs, [aligned(call.results[0] or (), full, shape)], used)


def norm(call: Call, direction: str) -> Rule:
    """Layer and RMS norm over `normalized_shape`; statistics keep the leading dims. Linear in grad; weights' gradients are summed."""
    sketch = Sketch(call)
    x, inner = call["input"], len(call["normalized_shape"])
    lead = sketch.dims(x.shape[: x.dim() - inner])
    tail = [sketch.letter(n, fixed=True) for n in x.shape[x.dim() - inner :]]
    rows, stats = [*lead, *tail], [*lead, *[()] * inner]
    kinds: dict[str, list[Dim]] = {"grad_out": rows, "input": rows, "mean": stats, "rstd": stats, "weight": tail, "bias": tail}
    names = [a.name for a in call.target._schema.arguments if a.name in kinds and isinstance(call[a.name], torch.Tensor)]
    if direction == "forward":
        outputs: list[list[Dim] | None] = [rows, *[stats] * (len(call.results) - 1)]
    else:
        outputs = [rows, *[tail] * (len(call.results) - 1)]
    outputs = [None if r is None else o for o, r in zip(outputs, call.results, strict=True)]
    return sketch.rule([kinds[name] for name in names], outputs, ["*" if name == "grad_out" else "_" for name in names])


def group_norm(call: Call, direction: str) -> Rule:
    """Statistics are per sample and group: both split; channels of a group and positions do not."""
    sketch = Sketch(call)
    x = call["input"]
    groups = call["group"]
    n, g = sketch.letter(x.shape[0], name="n"), sketch.letter(groups, name="g")
    c = sketch.letter(x.shape[1] // groups, fixed=True, name="c")
    rows = [n, (*g, *c), *(sketch.letter(size, fixed=True) for size in x.shape[2:])]
    kinds: dict[str, list[Dim]] = {
        "grad_out": rows,
        "input": rows,
        "mean": [n, g],
        "rstd": [n, g],
        "weight": [(*g, *c)],
        "bias": [(*g, *c)],
    }
    names = [a.name for a in call.target._schema.arguments if a.name in kinds and isinstance(call[a.name], torch.Tensor)]
    for argument, letters in (("N", n), ("C", (*g, *c)), ("group", g)):
        sketch.follow(argument, "size:" + "*".join(letters or ("1",)))
    rest: list[list[Dim]] = [[n, g], [n, g]] if direction == "forward" else [[(*g, *c)], [(*g, *c)]]
    outputs = [None if r is None else o for o, r in zip([rows, *rest], call.results, strict=True)]
    return sketch.rule([kinds[name] for name in names], outputs, ["*" if name == "grad_out" else "_" for name in names])


def batch_norm(call: Call, direction: str) -> Rule:
    """Per channel. In training the statistics are those of the whole batch, so only channels split; in evaluation all dims do."""
    sketch = Sketch(call)
    x = call["input"]
    training = call["train"] if direction == "backward" else call["training"] if "no_training" not in call.op else False
    full = sketch.dims(x.shape, [d for d in range(x.dim()) if d != 1] if training else ())
    names = [a.name for a in call.target._schema.arguments if isinstance(call[a.name], torch.Tensor)]
    inputs = [full if name in ("grad_out", "input") else [full[1]] if call[name].numel() else [("z",)] for name in names]
    if any(("z",) in dims for dims in inputs):
        sketch.sizes["z"] = 0
        sketch.fixed.add("z")
    outputs = [None if r is None or 0 in r else full if len(r) == x.dim() else [full[1]] for r in call.results]
    return sketch.rule(inputs, outputs, ["*" if name == "grad_out" else "_" for name in names])


def convolution(call: Call, direction: str) -> Rule:
    """Batch, groups, in- and out-channels split; positions do not.

    A bias gradient lacks the in-channel letter and is not a sum over it (every device computes the same), so with it that
    letter is fixed.
    """
    sketch = Sketch(call)
    x, weight, groups = call["input"], call["weight"], call["groups"]
    transposed = call["transposed"]
    image = call.results[0] if direction == "forward" else tuple(call["grad_output"].shape)
    assert image is not None
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    n, g = sketch.letter(x.shape[0], name="n"), sketch.letter(groups, name="g")
    with_bias = direction == "backward" and call.results[2] is not None
    i = sketch.letter(x.shape[1] // groups, fixed=with_bias, name="i")
    o = sketch.letter(channels // groups, name="o")
    ins, outs = (*g, *i), (*g, *o)
    kernel = [sketch.letter(size, fixed=True) for size in weight.shape[2:]]
    pixels = [sketch.letter(size, fixed=True) for size in x.shape[2:]]
    places = [sketch.letter(size, fixed=True) for size in image[2:]]
    xs, ys = [n, ins, *pixels], [n, outs, *places]
    ws = [ins, o, *kernel] if transposed else [outs, i, *kernel]
    if g:
        sketch.follow("groups", f"size:{g[0]}")
    if direction == "forward":
        terms = [xs, ws, [outs]][: len(call.shapes)]
        return sketch.rule(terms, [ys], ["_", "_", "+"][: len(terms)])
    if call["bias_sizes"]:
        sketch.follow("bias_sizes", "size:" + "*".join(outs or ("1",)))
    outputs = [None if r is None else dims for r, dims in zip(call.results, (xs, ws, [outs]), strict=True)]
    if call.results[0] is None and call.results[1] is None:
        sketch.fixed |= {*i}
    return sketch.rule([ys, xs, ws], outputs)


def embedding_backward(call: Call) -> Rule:
    """Rows of the gradient added up at their indices. Scaled by how often an index occurs, all indices must be seen."""
    sketch = Sketch(call)
    grad, indices = call.shapes
    full = sketch.dims(grad, range(len(indices)) if call["scale_grad_by_freq"] else ())
    rows = sketch.letter(call["num_weights"], fixed=True, name="v")
    return sketch.rule([full, full[:-1]], [[rows, full[-1]]], ["*", "_"])


def attention(call: Call, direction: str) -> Rule:
    """Batch, key-value heads g, query heads per key-value head r, and query rows s, for which keys and values are whole.

    A causal row sees what comes before it, so a block of rows must know where it starts. With dropout the op counts elements from
    (b_start, h_start, s_start), so only letters whose pieces are one run of heads split.
    """
    sketch = Sketch(call)
    q, k, v, p = call["q"], call["k"], call["v"], call["p"]
    drops, kv = p > 0, k.shape[1]
    b, g = sketch.letter(q.shape[0], name="b"), sketch.letter(kv, name="g")
    r = sketch.letter(q.shape[1] // kv, fixed=drops and kv > 1, name="r")
    s = sketch.letter(q.shape[2], name="s")
    t, d, e = (sketch.letter(n, fixed=True, name=name) for n, name in ((k.shape[2], "t"), (q.shape[3], "d"), (v.shape[3], "e")))
    heads = (*g, *r)
    qs, ks, vs, out, lse = [b, heads, s, d], [b, g, t, d], [b, g, t, e], [b, heads, s, e], [b, heads, s]
    kinds: dict[str, list[Dim]] = {"grad": out, "q": qs, "k": ks, "v": vs, "out": out, "lse": lse, "seed": []}
    if isinstance(call["mask"], torch.Tensor):
        kinds["mask"] = aligned(call["mask"].shape, [b, heads, s, t], [*q.shape[:3], k.shape[2]])
    names = [a.name for a in call.target._schema.arguments if a.name in kinds and isinstance(call[a.name], torch.Tensor)]
    if drops:
        times = f"*{q.shape[1] // kv}" if r else ""
        sketch.follow("b_start", "start:" + b[0] if b else "size:0")
        sketch.follow("h_start", f"start:{g[0]}{times}" if g else f"start:{r[0]}" if r else "size:0")
    if (drops or call["causal"]) and s:
        sketch.follow("s_start", f"start:{s[0]}")
    return sketch.rule([kinds[name] for name in names], [out, lse] if direction == "forward" else [qs, ks, vs])


def creation(call: Call, *arguments: str) -> Rule:
    """A tensor whose elements are all the same number: every device makes its own piece. The size argument is named."""
    sketch = Sketch(call)
    shape = call.results[0] or ()
    full = sketch.dims(shape)
    for argument in arguments:
        sketch.follow(argument, "shape")
    return sketch.rule([[sketch.letter(n, fixed=True) for n in s] for s in call.shapes], [full])


def fixed(call: Call, *marks: str) -> Rule:
    """Nothing splits. For ops that are known to be so, and for unlisted ones."""
    sketch = Sketch(call)
    inputs = [[sketch.letter(n, fixed=True) for n in s] for s in call.shapes]
    outputs = [None if r is None else [sketch.letter(n, fixed=True) for n in r] for r in call.results]
    return sketch.rule(inputs, outputs, list(marks) or "")
