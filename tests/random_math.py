"""Random arithmetic: element by element, reductions, scans, products, in place. Every function is `(draw, value) -> expression or None`."""

from __future__ import annotations

from random_draw import Draw, Value


def pointwise(g: Draw, x: Value) -> str:
    f = g.choice(
        *("torch.sin", "torch.tanh", "torch.sigmoid", "F.gelu", "F.silu", "F.softplus", "torch.neg", "torch.square", "F.elu", "torch.atan"),
        *("F.mish", "F.logsigmoid", "torch.erf", "torch.expm1", "F.selu", "F.softsign", "torch.asinh"),
    )
    return f"{f}({x})"


def jump(g: Draw, x: Value) -> str | None:
    """Functions with a kink, only where rounding cannot decide on which side a number is."""
    if not x.apart():
        return None
    return g.choice(
        *(f"F.relu({x})", f"torch.abs({x})", f"F.leaky_relu({x}, 0.2)", f"{x}.clamp(min=0)", f"{x}.clamp_max(0.0)", f"F.hardtanh({x})"),
        *(f"F.relu6({x})", f"F.hardswish({x})", f"torch.maximum({x}, {x} * 0.3)", f"{x} * ({x} > 0)", f"F.prelu({x}, {g.parameter([1])})"),
        f"F.glu({x}, -1)",
    )


def scalars(g: Draw, x: Value) -> str:
    a, b = g.choice(0.5, 2, -1.5), g.choice(0.1, 1)
    return g.choice(
        f"{x} * {a} + {b}",
        f"{b} - {x} / {a}",
        f"torch.lerp({x}, {x}.sin(), 0.3)",
        f"torch.addcmul({x}, {x}, {x}.cos(), value=0.5)",
        f"{x}.clone()",
        f"{x}.contiguous() + 0",
        f"({x} ** 3) * 0.1",
        f"torch.rsub({x}, 1)",
        f"{x} + torch.zeros_like({x}) + torch.ones(()) * 2",
    )


def free(g: Draw, x: Value) -> str:
    """A parameter of any shape that broadcasts."""
    p = g.parameter(g.broadcast(x))
    return g.choice(
        f"{x} + {p}",
        f"{x} * {p}",
        f"{p} - {x}",
        f"{x} / ({p} * {p} + 1)",
        f"{x} + {p} * {p}.sum()",
        f"torch.addcdiv({x}, {p}, {x} * {x} + 2)",
        f"torch.lerp({x}, {p}.expand_as({x}), 0.2)",
    )


def softmax(g: Draw, x: Value) -> str:
    d = g.dim(x)
    return g.choice(
        f"torch.softmax({x}, {d})",
        f"torch.log_softmax({x}, {d})",
        f"torch.logsumexp({x}, {d})",
        f"F.normalize({x} + 2.0, dim={d})",
        f"torch.logsumexp({x}, {d}, keepdim=True) - {x}",
        f"F.softmin({x}, {d})",
        f"({x} - {x}.mean({d}, keepdim=True)).exp()",
    )


def where(g: Draw, x: Value) -> str:
    shape = g.broadcast(x)
    n = 1
    for k in shape:
        n *= k
    mask = f"torch.tensor({[g.chance(0.5) for _ in range(n)]}).view({shape})"
    kinds = [f"torch.where({mask}, {x}.sin(), {x})", f"{x}.masked_fill({mask}, {g.choice(0.0, -1.0)})", f"{x} * {mask}"]
    kinds += [f"torch.where({mask}, {x}, {g.choice(0.0, -1.0)})", f"torch.where({x}.detach() > 60, {x}, {x}.cos())"]
    if x.dim() >= 2:
        kinds += [f"{x}.tril({g.choice(-1, 0, 1)})", f"{x}.triu()", f"{x} * torch.eye({x.shape[-2]}, {x.shape[-1]})"]
    return g.choice(*kinds)


def cast(g: Draw, x: Value) -> str:
    """Other dtypes on the way: booleans, integers, and a float32 island."""
    if g.chance(0.25):
        return g.choice(f"F.silu({x}.float()).to({x}.dtype)", f"{x} * {x}.float().pow(2).mean(-1, keepdim=True).add(1e-2).rsqrt().double()")
    return g.choice(
        f"{x} * ({x}.detach() > -100).to({x}.dtype)",
        f"{x} + {x}.shape[0] / 100",
        f"{x}.double()",
        f"{x} + (ids % 3).sum()",
        f"{x} * (ids[0] % 2 == 0)",
    )


def in_place(g: Draw, x: Value) -> str:
    """In-place arithmetic on an intermediate, through a view too."""
    y = g.name
    g.line(f"{y} = {g.choice(f'{x} * 1.0', f'{x}.sin()', f'{x} + {g.parameter(g.broadcast(x))}')}")
    g.line(
        g.choice(
            f"{y}.add_({x})",
            f"{y}.mul_(0.5)",
            f"{y} -= {x}.mean()",
            f"{y}.view(-1)[0].mul_(3)",
            f"{y}.select({g.dim(x)}, 0).add_(1)",
            f"{y}.transpose(0, -1).mul_(2).add_(0.1)",
            f"{y}.copy_({x}.cos())",
            f"{y}.neg_()",
            f"{y}[..., :1] *= {x}[..., :1]",
            f"{y}.div_({x}.square() + 1)",
        )
    )
    return y


# reductions, scans, products


def reduction(g: Draw, x: Value) -> str | None:
    dims, keep = g.some(x), g.chance(0.5)
    dims = [d - x.dim() if g.chance(0.3) else d for d in dims]
    how = g.choice("sum", "mean", "var", "std", "amax", "amin", "max", "norm", "norms", "prod", "sum", "mean", "all", "nansum", "median")
    count = 1
    for d in dims:
        count *= x.shape[d]
    if (how in ("var", "std") and count < 2) or (how in ("amax", "amin", "max", "median") and not x.apart()):
        return None
    tail = f"({dims}, keepdim={keep})"
    return {
        "sum": f"{x}.sum{tail}",
        "mean": f"{x}.mean{tail}",
        "var": f"{x}.var({dims}, keepdim={keep}, correction={g.choice(0, 1)})",
        "std": f"({x} + 0.3).std({dims}, keepdim={keep})",
        "amax": f"{x}.amax{tail}",
        "amin": f"{x}.amin{tail}",
        "max": g.choice(f"{x}.max({dims[0]}, keepdim={keep}).values", f"{x}.max()", f"{x}.min({dims[0]}).values"),
        "norm": f"(torch.linalg.vector_norm({x}, dim={dims}, keepdim={keep}) + 1.0).log()",
        "norms": f"{x}.norm(p={g.choice(1, 2, 3)}, dim={dims[0]})",
        "prod": f"({x}.cos() + 0.1).prod({dims[0]}, keepdim={keep})",
        "all": g.choice(f"{x}.sum()", f"{x}.mean()", f"{x}.std() * {x}", f"{x} - {x}.mean()", f"{x} / {x}.norm()"),
        "nansum": f"{x}.nansum{tail}",
        "median": f"{x}.median({dims[0]}).values",
    }[how]


def scan(g: Draw, x: Value) -> str | None:
    d = g.dim(x)
    if g.chance(0.4):
        return g.choice(f"{x}.cumsum({d})", f"torch.logcumsumexp({x}, {d})", f"({x}.cos() + 0.1).cumprod({d})", f"{x}.diff(dim={d})")
    if not x.apart():
        return None
    k = 1 + g.below(x.shape[d])
    return g.choice(
        f"{x}.sort({d}, descending={g.chance(0.5)}).values",
        f"{x}.topk({k}, {d}).values",
        f"torch.gather({x}.cos(), {d}, {x}.argsort({d}))",
        f"{x}.cummax({d}).values",
        f"torch.gather({x}, {d}, {x}.topk({k}, {d}, largest=False).indices)",
        f"{x}.sin() * {x}.argsort({d})",
        f"F.one_hot({x}.argmax({d}), {x.shape[d]}).to({x}.dtype) * 0.5 + {x}.mean()",
    )


def matmul(g: Draw, x: Value) -> str:
    if x.dim() == 1:
        return g.choice(f"torch.outer({x}, {x}) + torch.dot({x}, {x})", f"{x} @ {g.parameter([x.shape[0], g.size()])}", f"{x} @ {x}")
    n = g.size()
    w = g.parameter([x.shape[-1], n])
    kinds = [f"{x} @ {w}", f"torch.einsum('...k,kn->n...', {x}, {w})", f"{x}.transpose(-1, -2) @ {x}", f"{w}.t() @ {x}.transpose(-1, -2)"]
    if x.dim() == 3:
        v = g.parameter([x.shape[0], x.shape[-1], n])
        kinds += [
            f"{x} @ {v}",
            f"torch.bmm({x}, {v})",
            f"torch.einsum('bsk,bkn->sn', {x}, {v})",
            f"torch.einsum('bsk,tk->bst', {x}, {x}[0])",
        ]
        kinds += [f"torch.einsum('bik,bjk->bijk', {x}, {x}).sum(-1)", f"torch.einsum('bik,bjk->ijb', {x}, {x})"]
    if x.dim() == 2:
        kinds += [
            f"torch.addmm({g.parameter(g.choice([n], [1, n], [x.shape[0], n]))}, {x}, {w}, beta=0.5)",
            f"{x} @ {g.parameter([x.shape[-1]])}",
        ]
        kinds += [f"torch.cdist({x}, {w}.t())", f"torch.kron({x}, {g.parameter([2, 2])})"]
    return g.choice(*kinds)


def joined(g: Draw, x: Value) -> str:
    """Two values into one, as their shapes allow."""
    y = g.other(lambda v: True) or x
    a, b = x.shape, y.shape
    if all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False)):
        return g.choice(
            f"{x} + {y}",
            f"{x} * {y}",
            f"{x} - {y}",
            f"{x} + {y}.sigmoid() * 2",
            f"torch.where({y}.detach() > 9, {x}, {y})",
            f"{x} / ({y}.cos() + 2)",
        )
    differ = [i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n]
    if len(a) == len(b) and len(differ) == 1:
        return f"torch.cat([{x}, {y}, {x}], {differ[0]})"
    if len(a) == len(b) == 2 and a[1] == b[1]:
        return f"{x} @ {y}.t()"
    if len(a) == len(b) == 2 and a[0] == b[0]:
        return f"torch.einsum('ki,kj->ij', {x}, {y})"
    return g.choice(f"{x} + {y}.mean()", f"torch.outer({x}.flatten()[:5], {y}.flatten()[:7])", f"torch.cat([{x}.flatten(), {y}.flatten()])")


ARITHMETIC = (
    *(pointwise, pointwise, jump, jump, scalars, free, free, softmax, softmax, where, cast, in_place, in_place),
    *(reduction, reduction, reduction, scan, scan, matmul, matmul, matmul, joined, joined, joined, joined, joined),
)
