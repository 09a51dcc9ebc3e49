"""Random ops on shapes, and reading and writing at places. Every function is `(draw, value) -> expression or None` (see random_draw.py)."""

from __future__ import annotations

from random_draw import Draw, Value

# shapes


def reshape(g: Draw, x: Value) -> str:
    shape = g.factors(x.numel())
    if g.chance(0.3):
        shape[g.below(len(shape))] = -1
    return f"{x}.reshape({shape})"


def flatten(g: Draw, x: Value) -> str | None:
    if x.dim() < 2:
        return None
    a = g.below(x.dim() - 1)
    return f"{x}.flatten({a}, {a + 1 + g.below(x.dim() - 1 - a)})"


def unflatten(g: Draw, x: Value) -> str:
    d = g.dim(x)
    return f"{x}.unflatten({d}, {g.factors(x.shape[d])})"


def permute(g: Draw, x: Value) -> str:
    if x.dim() > 1 and g.chance(0.4):
        return g.choice(f"{x}.transpose({g.dim(x)}, {g.dim(x)})", f"{x}.movedim({g.dim(x)}, {g.dim(x)})", f"{x}.mT")
    return f"{x}.permute({g.order(x.dim())})"


def regroup(g: Draw, x: Value) -> str:
    """Open a dim up, permute, close it again: a channel shuffle."""
    d = g.dim(x) % x.dim()
    parts = g.factors(x.shape[d])
    inner = [d + i for i in g.order(len(parts))]
    order = [*range(d), *inner, *range(d + len(parts), x.dim() + len(parts) - 1)]
    return f"{x}.unflatten({d}, {parts}).permute({order}).reshape({list(x.shape)})"


def patches(g: Draw, x: Value) -> str | None:
    """Merge parts of two dims: what patch embeddings and window attention do."""
    if x.dim() < 2 or x.shape[-1] < 2 or x.shape[-2] < 2:
        return None
    p, q = g.divisor(x.shape[-2]), g.divisor(x.shape[-1])
    opened = f"{x}.unflatten(-2, [-1, {p}]).unflatten(-1, [-1, {q}]).transpose(-3, -2)"
    return g.choice(f"{opened}.flatten(-2)", f"{opened}.flatten(-4, -3).flatten(-2)")


def unsqueeze(g: Draw, x: Value) -> str:
    return g.choice(f"{x}.unsqueeze({g.below(2 * x.dim() + 2) - x.dim() - 1})", f"{x}[None]", f"{x}[..., None]")


def squeeze(g: Draw, x: Value) -> str:
    return g.choice(f"{x}.squeeze({g.dim(x)})", f"{x}.squeeze()")


def expand(g: Draw, x: Value) -> str:
    n = g.choice(2, 3, 4)
    lead = [g.choice(2, 5)] if g.chance(0.3) else []
    return f"{x}.expand({lead + [n if k == 1 else g.choice(k, -1) for k in x.shape]})"


def repeat(g: Draw, x: Value) -> str:
    times = [g.choice(1, 1, 2, 3) for _ in x.shape]
    return g.choice(f"{x}.repeat({times})", f"{x}.repeat_interleave({g.choice(2, 3)}, {g.dim(x)})", f"{x}.tile({g.choice(2, 3)})")


def take_slice(g: Draw, x: Value) -> str:
    d = g.dim(x) % x.dim()
    n = x.shape[d]
    start = g.below(n)
    end = start + 1 + g.below(n - start)
    text = g.choice(
        f"{start}:{end}", f"{start - n}:{end}", f"{start}::{g.choice(1, 2, 3)}", f":{end}:{g.choice(1, 2)}", f"-{1 + g.below(n)}:"
    )
    return f"{x}[{':, ' * d}{text}]"


def select(g: Draw, x: Value) -> str:
    d = g.dim(x)
    n = x.shape[d]
    return g.choice(f"{x}.select({d}, {g.below(n)})", f"{x}.select({d}, {-1 - g.below(n)})", f"{x}.narrow({d}, {g.below(n)}, 1)")


def _index(g: Draw, n: int, count: int) -> str:
    """Positions within n, constant or from the input `ids`, duplicates included."""
    if g.chance(0.3):
        return f"ids.flatten()[torch.arange({count}) % ids.numel()] % {n}"
    return f"torch.tensor({[g.below(n) for _ in range(count)]})"


def _wide(x: Value, d: int, index: str, count: int) -> str:
    """The index as gather and scatter want it: as wide as x but `count` in dim d."""
    ones = [count if k == d else 1 for k in range(x.dim())]
    return f"({index}).view({ones}).expand({[count if k == d else n for k, n in enumerate(x.shape)]})"


def pick(g: Draw, x: Value) -> str:
    d, count = g.dim(x) % x.dim(), g.choice(1, 2, 3, 5, 6)
    index = _index(g, x.shape[d], count)
    kinds = [f"{x}[{':, ' * d}{index}]", f"{x}.index_select({d}, {index})", f"torch.gather({x}, {d}, {_wide(x, d, index, count)})"]
    kinds += [f"torch.take_along_dim({x}, {_wide(x, d, index, count)}, {d})"]
    if x.dim() > 1:
        kinds += [f"{x}[{_index(g, x.shape[0], count)}, ..., {_index(g, x.shape[-1], count)}]"]
        kinds += [f"{x}[torch.arange({x.shape[0]})[:, None], {_index(g, x.shape[1], count)}]"]
    return g.choice(*kinds)


def put(g: Draw, x: Value) -> str:
    """Writing at places, duplicates included where that is defined."""
    d, y, at = g.dim(x) % x.dim(), g.name, ""
    n, colons = x.shape[d], ":, " * d
    count = 1 + g.below(n)
    once, many = f"torch.tensor({g.order(n)[:count]})", _index(g, n, count)
    g.line(f"{y} = {x}.clone()")
    at = f"{y}[{colons}{once}]"
    how = g.choice("assign", "add", "slice", "select", "index_add", "scatter_add", "scatter", "accumulate", "index_copy", "mask")
    if how in ("assign", "add", "slice", "select", "mask"):
        lines = {
            "assign": f"{at} = {x}[{colons}{once}].sin()",
            "add": f"{at} += 0.5",
            "slice": f"{y}.narrow({d}, {n - count}, {count}).mul_({g.choice('2.0', f'{x}.narrow({d}, 0, {count})')})",
            "select": f"{y}[{colons}{g.below(n)}] = {g.choice('0.25', f'{x}.select({d}, 0).cos()')}",
            "mask": f"{y}.masked_fill_({x}.detach() > 50, 1.0)",
        }
        g.line(lines[how])
        return y
    cells = f"({_index(g, x.shape[0], 3)},), {x}[:1] * 0.5"
    if x.dim() == 2 and g.chance(0.5):
        cells = f"(torch.arange({x.shape[0]})[:, None], {_index(g, x.shape[1], 2)}), {x}[:, :1] * 0.5"
    return {
        "index_add": f"{y}.index_add({d}, {many}, {x}.narrow({d}, 0, {count}).cos())",
        "scatter_add": f"{y}.scatter_add({d}, {_wide(x, d, many, count)}, {x}.narrow({d}, {n - count}, {count}))",
        "scatter": f"{y}.scatter({d}, {_wide(x, d, once, count)}, {x}.narrow({d}, 0, {count}).sin())",
        "accumulate": f"{y}.index_put({cells}, accumulate=True)",
        "index_copy": f"{y}.index_copy({d}, {once}, {x}.narrow({d}, 0, {count}).sin())",
    }[how]


def split(g: Draw, x: Value) -> str:
    d = g.dim(x)
    n = 1 + g.below(x.shape[d])
    sizes = [n, x.shape[d] - n] if n < x.shape[d] else [n]
    pieces = g.temp("pieces")
    g.line(f"{pieces} = {g.choice(f'{x}.chunk({n}, {d})', f'{x}.split({n}, {d})', f'{x}.split({sizes}, {d})', f'{x}.unbind({d})')}")
    end = g.choice(
        f"{pieces}[-1]", f"torch.stack([p.sin() for p in {pieces}], {d})", f"torch.cat([p.sin() for p in reversed({pieces})], {d})"
    )
    if g.chance(0.2):
        return f"{pieces}[0] * {pieces}[-1].mean()"
    return end


def pad(g: Draw, x: Value) -> str:
    d = 1 + g.below(min(2, x.dim()))
    sizes = [g.choice(0, 0, 1, 2) for _ in range(2 * d)]
    if x.dim() in (2, 3) and x.shape[-1] > 2 and g.chance(0.3):
        return f"F.pad({x}, {sizes[:2]}, mode={g.choice('reflect', 'replicate', 'circular')!r})"
    return f"F.pad({x}, {sizes}, value={g.choice(0.0, 0.7)})"


def roll(g: Draw, x: Value) -> str:
    d = g.dim(x)
    return g.choice(f"{x}.roll({g.choice(-2, -1, 1, 2)}, {d})", f"{x}.flip({d})", f"torch.cat([{x}, {x}.flip({d})], {d})")


def windows(g: Draw, x: Value) -> str | None:
    d = g.dim(x)
    return f"{x}.unfold({d}, 2, {g.choice(1, 2)})" if x.shape[d] >= 2 else None


SHAPES = (
    *(reshape, reshape, flatten, flatten, unflatten, unflatten, permute, permute, regroup, regroup, patches, unsqueeze, squeeze),
    *(expand, repeat, take_slice, take_slice, select, pick, pick, put, put, put, split, split, pad, roll, windows),
)
