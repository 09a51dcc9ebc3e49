"""Random calls of layers and losses, as users write them. Every function is `(draw, value) -> expression or None` (see random_draw.py)."""

from __future__ import annotations

from random_draw import Draw, Value

# linear layers


def linear(g: Draw, x: Value) -> str:
    return f"{g.layer(f'nn.Linear({x.shape[-1]}, {g.size()}, bias={g.chance(0.7)})')}({x})"


def residual(g: Draw, x: Value) -> str:
    """One layer used twice, around it a residual connection."""
    f = g.layer(f"nn.Linear({x.shape[-1]}, {x.shape[-1]})")
    return g.choice(f"{x} + {f}(torch.tanh({f}({x})))", f"{f}({x}) * torch.sigmoid({f}({x}.flip(-1))) + {x}")


def gated(g: Draw, x: Value) -> str:
    """A diamond: two branches of one value meet again."""
    n = g.size()
    a, b = g.layer(f"nn.Linear({x.shape[-1]}, {n})", share=False), g.layer(f"nn.Linear({x.shape[-1]}, {n}, bias=False)")
    down = g.layer(f"nn.Linear({n}, {x.shape[-1]})")
    return f"{x} + {down}(F.silu({a}({x})) * {b}({x}))"


def transposed_twice(g: Draw, x: Value) -> str:
    """One weight, used as it is and transposed."""
    w = g.parameter([g.size(), x.shape[-1]])
    return g.choice(f"F.linear(torch.tanh(F.linear({x}, {w})), {w}.t())", f"torch.tanh({x} @ {w}.t()) @ {w}")


def bilinear(g: Draw, x: Value) -> str:
    n = x.shape[-1]
    return f"{g.layer(f'nn.Bilinear({n}, {n}, {g.size()})')}({x}, {x}.sin())"


def low_rank(g: Draw, x: Value) -> str:
    """A frozen layer and a trained adapter beside it."""
    n = g.size()
    base = g.layer(f"nn.Linear({x.shape[-1]}, {n}).requires_grad_(False)", share=False)
    a, b = g.parameter([x.shape[-1], 2]), g.parameter([2, n])
    return f"{base}({x}) + ({x} @ {a}) @ {b} * 0.5"


# norms


def layer_norm(g: Draw, x: Value) -> str | None:
    count = 1 if x.dim() < 2 or g.chance(0.7) else 2
    shape = list(x.shape[-count:])
    if x.shape[-1] == 1:
        return None
    if g.chance(0.25):
        return f"F.layer_norm({x}, {shape}, weight={g.parameter(shape)})"
    return f"{g.layer(f'nn.LayerNorm({shape}, elementwise_affine={g.chance(0.8)}, bias={g.chance(0.8)})')}({x})"


def rms_norm(g: Draw, x: Value) -> str:
    if g.chance(0.5):
        return f"{g.layer(f'nn.RMSNorm({x.shape[-1]}, eps=1e-3)')}({x})"
    return f"{g.parameter([x.shape[-1]])} * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-3))"


def batch_norm(g: Draw, x: Value) -> str | None:
    if x.dim() not in (2, 3, 4) or x.numel() // x.shape[1] < 3:
        return None
    make = "BatchNorm2d" if x.dim() == 4 else "BatchNorm1d"
    how = f"affine={g.chance(0.8)}, track_running_stats={g.chance(0.8)}, momentum={g.choice(0.1, 0.5)}"
    return f"{g.layer(f'nn.{make}({x.shape[1]}, {how})')}({x})"


def frozen_batch_norm(g: Draw, x: Value) -> str | None:
    if x.dim() < 2:
        return None
    c = x.shape[1]
    mean, var = g.buffer(f"torch.randn({c})"), g.buffer(f"torch.rand({c}) + 0.5")
    return f"F.batch_norm({x}, {mean}, {var}, {g.parameter([c])}, None, False)"


def group_norm(g: Draw, x: Value) -> str | None:
    if x.dim() < 3:
        return None
    groups = g.divisor(x.shape[1])
    if x.numel() // x.shape[0] // groups < 3:
        return None
    return f"{g.layer(f'nn.GroupNorm({groups}, {x.shape[1]}, affine={g.chance(0.8)})')}({x})"


def instance_norm(g: Draw, x: Value) -> str | None:
    if x.dim() not in (3, 4) or x.numel() // x.shape[0] // x.shape[1] < 3:
        return None
    make = f"nn.InstanceNorm{x.dim() - 2}d({x.shape[1]}, affine={g.chance(0.5)}, track_running_stats={g.chance(0.4)})"
    return f"{g.layer(make)}({x})"


def weight_norm(g: Draw, x: Value) -> str:
    """A weight standardised, or divided by its own norm, before it is used."""
    w = g.parameter([g.size(), x.shape[-1]])
    return g.choice(f"F.linear({x}, {w} / ({w}.norm(dim=1, keepdim=True) + 0.1))", f"F.linear({x}, ({w} - {w}.mean()) / ({w}.var() + 0.5))")


# convolutions and pictures


def conv(g: Draw, x: Value) -> str | None:
    if x.dim() not in (3, 4):
        return None
    groups, kernel = g.divisor(x.shape[1]), g.choice(1, 2, 3)
    out, stride, dilation = groups * g.choice(1, 2, 3), g.choice(1, 1, 2), g.choice(1, 1, 1, 2)
    form = f"stride={stride}, padding={g.choice(0, kernel // 2, kernel // 2)}, groups={groups}, bias={g.chance(0.6)}, dilation={dilation}"
    if g.chance(0.3):
        extra = 1 if stride == 2 and g.chance(0.5) else 0
        return f"{g.layer(f'nn.ConvTranspose{x.dim() - 2}d({x.shape[1]}, {out}, {kernel}, {form}, output_padding={extra})')}({x})"
    mode = g.choice("zeros", "zeros", "zeros", "circular", "reflect", "replicate")
    return f"{g.layer(f'nn.Conv{x.dim() - 2}d({x.shape[1]}, {out}, {kernel}, {form}, padding_mode={mode!r})')}({x})"


def conv_functional(g: Draw, x: Value) -> str | None:
    """Convolution with a weight that is computed: scaled, or a slice of a longer one."""
    if x.dim() not in (3, 4):
        return None
    out, kernel = g.size(), (3,) * (x.dim() - 2)
    w = g.parameter([out + 1, x.shape[1], *kernel])
    return f"F.conv{x.dim() - 2}d({x}, {w}[1:] * 0.5, padding={g.choice(1, repr('same'))})"


def pool(g: Draw, x: Value) -> str | None:
    if x.dim() not in (3, 4) or min(x.shape[2:]) < 2:
        return None
    n = x.dim() - 2
    kinds = [f"F.avg_pool{n}d({x}, 2, stride={g.choice(1, 2)})", f"F.adaptive_avg_pool{n}d({x}, {g.choice(1, 2)})"]
    if n == 2 and x.apart():
        kinds += [f"F.max_pool2d({x}, 2, stride={g.choice(1, 2)})", f"F.max_pool2d({x}, 3, stride=2, padding=1)"]
    if n == 1 and x.apart():
        kinds += [f"F.max_pool1d({x}, 2)"]
    return g.choice(*kinds)


def upsample(g: Draw, x: Value) -> str | None:
    if x.dim() != 4:
        return None
    if x.shape[1] % 4 == 0 and g.chance(0.4):
        return f"F.pixel_shuffle({x}, 2)"
    return g.choice(
        f"F.interpolate({x}, scale_factor=2, mode='nearest')", f"F.interpolate({x}, size=(5, 3), mode='bilinear', align_corners=False)"
    )


# attention


def _tokens(g: Draw, x: Value) -> Value | None:
    """x as (batch, sequence, features): pictures are flattened, matrices get a batch of one."""
    if x.dim() not in (2, 3, 4) or x.shape[-1] < 2:
        return None
    if x.dim() == 3:
        return x
    name = g.temp("s")
    g.line(f"{name} = {x}[None]" if x.dim() == 2 else f"{name} = {g.choice(f'{x}.flatten(1, 2)', f'{x}.flatten(2).transpose(1, 2)')}")
    return Value(name, g.env[name])


def attention(g: Draw, given: Value) -> str | None:
    """Heads from a reshape, grouped or not; causal, masked by data, by a constant or a learned bias; or keys of another value."""
    x = _tokens(g, given)
    if x is None:
        return None
    y = g.other(lambda v: v.dim() == 3 and v.shape[0] == x.shape[0]) if g.chance(0.3) else x
    y = y or x
    kv, times, d = g.choice(1, 2, 3), g.choice(1, 1, 2), g.choice(2, 3, 4)
    sizes = (x.shape[-1], kv * times * d), (y.shape[-1], 2 * kv * d), (kv * times * d, x.shape[-1])
    q, k, out = (g.layer(f"nn.Linear({a}, {b})") for a, b in sizes)
    s, t, how = x.shape[1], y.shape[1], g.choice("none", "causal", "band", "bias", "lengths", "heads")
    if how == "causal" and s != t:
        how = "none"
    mask = {
        "none": "None",
        "causal": "None",
        "band": f"(torch.arange({s})[:, None] - torch.arange({t})[None]).abs() < {1 + s // 2 + max(0, s - t)}",
        "bias": g.parameter([s, t]) if how == "bias" else "",
        "lengths": f"(torch.arange({t})[None] <= ids.flatten()[:1, None] % {t})[:, None, None]",
        "heads": g.parameter([1, kv * times, 1, t]) if how == "heads" else "",
    }[how]
    a, b = g.temp("q"), g.temp("kv")
    g.line(f"{a} = {q}({x}).view({x.shape[0]}, {s}, {kv * times}, {d}).transpose(1, 2)")
    g.line(f"{b} = {k}({y}).view({x.shape[0]}, {t}, 2, {kv}, {d}).permute(2, 0, 3, 1, 4)")
    call = f"F.scaled_dot_product_attention({a}, {b}[0], {b}[1], attn_mask={mask}, is_causal={how == 'causal'}, enable_gqa={times > 1})"
    g.line(f"{a} = {call}")
    return f"{x} + {out}({a}.transpose(1, 2).flatten(2))"


def multihead(g: Draw, given: Value) -> str | None:
    x = _tokens(g, given)
    if x is None or x.shape[-1] % 2:
        return None
    f = g.layer(f"nn.MultiheadAttention({x.shape[-1]}, 2, batch_first={g.chance(0.5)})")
    return f"{f}({x}, {x}, {x}, need_weights={g.chance(0.3)})[0]"


def written_attention(g: Draw, x: Value) -> str | None:
    if x.dim() < 2:
        return None
    n = x.shape[-2]
    mask = g.choice("", f".masked_fill(torch.ones({n}, {n}, dtype=torch.bool).triu(1), float('-inf'))")
    return f"torch.softmax(({x} @ {x}.transpose(-1, -2) / {x.shape[-1]}){mask}, -1) @ {x}"


def rotary(g: Draw, x: Value) -> str | None:
    """Rotary positions on the last two dims."""
    s, d = (x.shape[-2], x.shape[-1]) if x.dim() >= 2 else (1, 1)
    if d % 2:
        return None
    angle, half = g.temp("angle"), g.temp("half")
    g.line(f"{angle} = torch.outer(torch.arange({s}, dtype={x}.dtype), torch.arange({d // 2}, dtype={x}.dtype) + 1).repeat(1, 2)")
    g.line(f"{half} = torch.cat([-{x}[..., {d // 2}:], {x}[..., : {d // 2}]], -1)")
    return f"{x} * {angle}.cos() + {half} * {angle}.sin()"


def cell(g: Draw, x: Value) -> str | None:
    """A recurrent cell over two steps."""
    if x.dim() != 2:
        return None
    n = g.choice(2, 3, 4)
    f, h = g.layer(f"nn.GRUCell({x.shape[-1]}, {n})"), g.temp("h")
    g.line(f"{h} = {f}({x}, {x}.new_zeros({x.shape[0]}, {n}))")
    return f"{f}({x}.roll(1, 0), {h})"


# lookups


def embedding(g: Draw, x: Value) -> str:
    rows = g.choice(5, 7, 8)
    form = f"padding_idx={g.choice(None, 0)}, scale_grad_by_freq={g.chance(0.1)}"
    return f"{g.layer(f'nn.Embedding({rows}, {g.size()}, {form})')}(ids % {rows}) + {x}.mean()"


def tied_head(g: Draw, x: Value) -> str:
    """Embedding and head share a weight."""
    rows, n = g.choice(5, 7, 12), x.shape[-1]
    f = g.layer(f"nn.Embedding({rows}, {n})", share=False)
    return g.choice(f"F.linear({x} + {f}(ids % {rows}).mean(0), {f}.weight).mean({x.dim() - 1})", f"({x} + {f}.weight[0]) @ {f}.weight.t()")


def embedding_bag(g: Draw, x: Value) -> str | None:
    if g.ids_rank != 2:
        return None
    rows = g.choice(5, 7, 8)
    f = g.layer(f"nn.EmbeddingBag({rows}, {g.size()}, mode={g.choice('sum', 'mean')!r})")
    return f"{f}(ids % {rows}) * {x}.mean()"


def mixture(g: Draw, x: Value) -> str | None:
    """Experts behind a gate: every token takes its best two, dense in the arithmetic as small models are written."""
    if x.dim() < 2 or not x.apart():
        return None
    e, d = g.choice(3, 4), x.shape[-1]
    gate, w, p = g.layer(f"nn.Linear({d}, {e})"), g.parameter([e, d, d]), g.temp("p")
    g.line(f"{p} = torch.softmax({gate}({x}), -1)")
    top, kept = g.temp("top"), g.temp("kept")
    g.line(f"{top} = {p}.topk({g.choice(1, 2)}, -1)")
    g.line(f"{kept} = torch.zeros_like({p}).scatter({x.dim() - 1}, {top}.indices, {top}.values)")
    return f"torch.einsum('...d,edf,...e->...f', {x}, {w}, {kept})"


def dropout(g: Draw, x: Value) -> str | None:
    return f"F.dropout({x}, {g.choice(0.2, 0.5)}, True)" if g.chance(0.3) else None


def running_statistic(g: Draw, x: Value) -> str:
    """A buffer that follows a statistic of the batch, and is used before and after it is written."""
    b = g.buffer(f"torch.full(({x.shape[-1]},), 0.1)")
    y = g.name
    g.line(f"{y} = {x} + {b}.clone()")
    g.line(
        g.choice(
            f"{b}.mul_(0.9).add_({x}.detach().reshape(-1, {x.shape[-1]}).mean(0), alpha=0.1)",
            f"{b}.copy_({b} * 0.5 + {x}.detach().reshape(-1, {x.shape[-1]})[0])",
            f"{b}.lerp_({x}.detach().reshape(-1, {x.shape[-1]}).sum(0), 0.1)",
        )
    )
    return f"{y} * (1 + {b}.clone())"


# losses: 0-dim, or one number a sample


def _targets(g: Draw, n: int, classes: int) -> str:
    if g.chance(0.5):
        return f"ids.flatten()[torch.arange({n}) % ids.numel()] % {classes}"
    return f"torch.tensor({[g.below(classes) for _ in range(n)]})"


def cross_entropy(g: Draw, x: Value) -> str | None:
    if x.dim() < 2 or x.shape[-1] < 2:
        return None
    c = x.shape[-1]
    options = ("", "", ", reduction='sum'", ", reduction='none'", ", label_smoothing=0.1", ", ignore_index=0", "weight")
    how = g.choice(*options)
    if "weight" in how:
        how = f", weight={g.buffer(f'torch.rand({c}) + 0.1')}"
    if x.dim() == 3 and g.chance(0.3):  # classes in the middle
        c, n = x.shape[1], x.shape[0] * x.shape[2]
        how = "" if "weight" in how else how
        return f"F.cross_entropy({x}, ({_targets(g, n, c)}).view({x.shape[0]}, {x.shape[2]}){how})"
    if g.chance(0.15):
        return f"F.cross_entropy({x}.flatten(0, -2), torch.softmax({x}.flatten(0, -2).detach().cos(), -1))"
    flat = g.choice(f"{x}.flatten(0, -2)", f"{x}.reshape(-1, {c})")
    return f"F.cross_entropy({flat}, {_targets(g, x.numel() // c, c)}{how})"


def loss(g: Draw, x: Value) -> str:
    y = g.other(lambda v: v.shape == x.shape and v.name != x.name)
    target = str(y) if y and g.chance(0.6) else f"{x}.detach().cos()"
    how = g.choice("mean", "mean", "sum", "none")
    return g.choice(
        f"F.mse_loss({x}, {target}, reduction={how!r})",
        f"F.smooth_l1_loss({x}, {target} + 0.01, reduction={how!r})",
        f"F.huber_loss({x}, {target} + 0.01, reduction={how!r}, delta=0.5)",
        f"F.l1_loss({x}, {target} + 0.01, reduction={how!r})",
        f"F.binary_cross_entropy_with_logits({x}, torch.sigmoid({target}), reduction={how!r})",
        f"F.binary_cross_entropy(torch.sigmoid({x}), torch.sigmoid({target}), reduction={how!r})",
        f"F.kl_div(F.log_softmax({x}, -1), torch.softmax({target}, -1), reduction={g.choice('sum', 'batchmean', 'mean', 'none')!r})",
        f"F.kl_div(F.log_softmax({x}, -1), F.log_softmax({target}, -1), reduction='batchmean', log_target=True)",
        f"1 - F.cosine_similarity({x}, {target} + 0.5, dim=-1)",
        f"F.poisson_nll_loss({x}, torch.sigmoid({target}), reduction={g.choice('mean', 'sum')!r})",
        f"F.soft_margin_loss({x}, torch.tanh({target}))",
    )


LAYERS = (
    *(linear, linear, residual, gated, transposed_twice, bilinear, low_rank, layer_norm, layer_norm, rms_norm, batch_norm, batch_norm),
    *(frozen_batch_norm, group_norm, instance_norm, weight_norm, conv, conv, conv, conv_functional, pool, upsample),
    *(attention, attention, attention, multihead, multihead, written_attention, rotary, cell, embedding, tied_head, embedding_bag),
    *(mixture, dropout, running_statistic, cross_entropy, cross_entropy, loss, loss),
)
