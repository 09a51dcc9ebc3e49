"""Small models, one for every family of ops of the wider library: name → (model, inputs). Each ends in a 0-dim loss.

`MODELS` maps a name to a function without arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

L = torch.linalg
Built = tuple[nn.Module, tuple[Any, ...]]
MODELS: dict[str, Callable[[], Built]] = {}


class Formula(nn.Module):
    """`f(*parameters, *inputs)` of parameters with these shapes; the loss is the sum of squares."""

    def __init__(self, f: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.f = f
        self.p = nn.ParameterList([nn.Parameter(torch.randn(*shape)) for shape in shapes])

    def forward(self, scale: Tensor, *inputs: Tensor) -> Tensor:
        first, *rest = self.p
        out = self.f(first * scale, *rest, *inputs)
        return (torch.view_as_real(out) if out.is_complex() else out).pow(2).sum()


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).pow(2).sum()


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.linear = nn.EmbeddingBag(12, 6, **options), nn.Linear(6, 5)

    def forward(self, indices: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.linear(self.table(indices, offsets, weights)).pow(2).sum()


class Warp(nn.Module):
    """A spatial transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.theta(x.mean((2, 3))).view(-1, 2, 3) * 0.1, [x.shape[0], 6, 5, 4], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False).pow(2).sum()


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)).pow(2).sum()


def formula(name: str, f: Callable[..., Tensor], *shapes: tuple[int, ...], inputs: Callable[[], tuple[Tensor, ...]] = tuple) -> None:
    MODELS[name] = lambda: (Formula(f, *shapes), (torch.tensor(1.0, dtype=torch.float64), *inputs()))


def stack(name: str, layers: Callable[[], list[nn.Module]], *shape: int) -> None:
    MODELS[name] = lambda: (Stack(*layers()), (torch.randn(*shape, dtype=torch.float64).requires_grad_(),))


def I(high: int, *shape: int) -> Tensor:  # noqa: E743
    return torch.randint(0, high, shape)


def _spd(w: Tensor) -> Tensor:
    return w @ w.mT + 4 * torch.eye(w.shape[-1], dtype=w.dtype)


# ---- positions ----------------------------------------------------------------------------------------------------------------


def _ragged() -> tuple[Tensor, Tensor]:
    return I(12, 17), torch.tensor([0, 2, 5, 5, 9, 11, 15, 16])


for _mode in ("sum", "mean", "max"):
    for _padding in (None, 3):
        MODELS[f"bags, ragged, {_mode}, padding {_padding}"] = lambda m=_mode, p=_padding: (Bags(mode=m, padding_idx=p), _ragged())
        MODELS[f"bags, equal, {_mode}, padding {_padding}"] = lambda m=_mode, p=_padding: (Bags(mode=m, padding_idx=p), (I(12, 8, 5),))
MODELS["bags with a last offset"] = lambda: (
    Bags(mode="sum", include_last_offset=True),
    (_ragged()[0], torch.tensor([0, 2, 5, 5, 9, 11, 15, 17])),
)
MODELS["bags with weights, ragged"] = lambda: (Bags(mode="sum"), (*_ragged(), torch.randn(17, dtype=torch.float64).requires_grad_()))
MODELS["bags with weights, equal"] = lambda: (
    Bags(mode="sum"),
    (I(12, 8, 5), None, torch.randn(8, 5, dtype=torch.float64).requires_grad_()),
)

formula("rows of a table", lambda w, i: w[i] * w[:1], (6, 5, 4), inputs=lambda: (I(6, 7),))
formula("negative indices", lambda w, i: w[:, i - 3], (6, 5, 4), inputs=lambda: (I(5, 7, 2),))
formula("two indices", lambda w, i, j: w[i, :, j], (6, 5, 4), inputs=lambda: (I(6, 7), I(4, 7)))
formula("experts' weights by index", lambda w, x, i: torch.bmm(w[i], x.unsqueeze(-1)), (6, 5, 4), (7, 4), inputs=lambda: (I(6, 7),))
formula("gather", lambda w, i: w.gather(1, i) * 2, (6, 5, 4), inputs=lambda: (I(5, 6, 3, 4),))
formula("scatter_add", lambda w, x, i: w.scatter_add(1, i, x), (6, 5, 4), (6, 7, 4), inputs=lambda: (I(5, 6, 7, 4),))
formula("index_add", lambda w, x, i: w.index_add(0, i, x, alpha=2), (6, 5), (7, 5), inputs=lambda: (I(6, 7),))
formula("index_copy", lambda w, x, i: w.index_copy(1, i, x) * w, (6, 5), (6, 3), inputs=lambda: (torch.tensor([4, 0, 2]),))
formula("one_hot", lambda w, i: F.one_hot(i, 6).double() @ w, (6, 5), inputs=lambda: (I(6, 7),))
formula("scatter of a number", lambda w: w.scatter(1, w.topk(2, 1).indices, 0.0) * w, (6, 5))
formula(
    "a cache written at positions",
    lambda w, x, i: torch.index_put(w, (torch.arange(6)[:, None], i), x) * w,
    (6, 5, 3),
    (6, 2, 3),
    inputs=lambda: (torch.stack([torch.randperm(5)[:2] for _ in range(6)]),),
)
formula("take_along_dim", lambda w: torch.take_along_dim(w, w.argsort(1), 1).cumsum(1), (6, 5))
formula("memory as a view", lambda w: (w * 2).as_strided((4, 6), (1, 4)), (6, 4))
formula("memory in windows", lambda w: (w * 2).as_strided((6, 3, 4), (4, 4, 1)), (8, 4))
formula("memory of a transpose", lambda w: (w.t() * 2).as_strided((3, 4), (4, 1), 4), (6, 4))
formula("memory repeated", lambda w: (w * 2).as_strided((3, 6, 4), (0, 4, 1)), (6, 4))
# torch's own gradient of the tensor written into fails gradcheck, so that one is left out
formula("memory written", lambda w, x: torch.as_strided_scatter(w.detach() * 2, x, (3, 2), (8, 1)) * w, (6, 4), (3, 2))
_AT = torch.tensor([[0, 1, 1, 2]] * 4)
formula("scatter_reduce", lambda a, b: a.scatter_reduce(1, _AT, b, "amax") + a.scatter_reduce(1, _AT, b, "mean"), (4, 6), (4, 4))
formula("index_fill, index_reduce", lambda a: a.index_fill(1, _AT[0, ::3], 0.0) * a.index_reduce(0, _AT[0, :2], a[:2] * 2, "amax"), (4, 6))
formula("masked_scatter, take", lambda a, b: a.masked_scatter(a > 0, b) + torch.take(a, _AT * 2)[:, :1], (4, 6), (4, 6))
formula("search", lambda a: torch.searchsorted(a.sort(-1)[0].detach(), a.detach()).double() * a, (4, 6))

# ---- images -------------------------------------------------------------------------------------------------------------------

stack("conv2d", lambda: [nn.Conv2d(6, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 5, 3, stride=2, dilation=2)], 4, 6, 9, 8)
stack("conv2d in groups", lambda: [nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(9, 9, 3, groups=9, bias=False), nn.Conv2d(9, 4, 1)], 5, 6, 9, 8)
stack("conv1d", lambda: [nn.Conv1d(6, 8, 3, padding=2, dilation=2), nn.GELU(), nn.Conv1d(8, 4, 4, stride=4, groups=2)], 3, 6, 12)
stack("conv3d", lambda: [nn.Conv3d(4, 6, 3, padding=1), nn.GELU(), nn.AvgPool3d(2), nn.Conv3d(6, 4, 2)], 3, 4, 4, 6, 5)
stack(
    "transposed conv2d",
    lambda: [nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1), nn.GELU(), nn.ConvTranspose2d(8, 6, 3, groups=2, dilation=2)],
    *(4, 6, 5, 4),
)
stack("transposed conv1d", lambda: [nn.ConvTranspose1d(6, 8, 3, stride=2), nn.GELU(), nn.ConvTranspose1d(8, 6, 3, groups=2)], 4, 6, 5)
stack("one image", lambda: [nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2)], 6, 8, 8)
stack(
    "pools and resampling, 2d",
    lambda: [
        *(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 2)), nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelShuffle(2)),
        *(nn.ReflectionPad2d(1), nn.ReplicationPad2d(2), nn.AdaptiveMaxPool2d(4)),
    ],
    *(4, 12, 9, 8),
)
stack(
    "pools and resampling, 1d",
    lambda: [nn.MaxPool1d(2), nn.AvgPool1d(2), nn.Upsample(scale_factor=2, mode="linear"), nn.ReflectionPad1d(1), nn.LPPool1d(2, 2)],
    *(4, 12, 16),
)
stack(
    "pools and resampling, 3d",
    lambda: [nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(2), nn.Upsample(scale_factor=2, mode="trilinear"), nn.ReplicationPad3d(1)],
    *(3, 4, 4, 6, 4),
)
stack("bicubic", lambda: [nn.Upsample(size=(8, 6), mode="bicubic"), nn.PixelUnshuffle(2), nn.ChannelShuffle(3)], 3, 12, 4, 6)
stack("columns", lambda: [nn.Unfold(3, padding=1), nn.ReLU(), nn.Fold((6, 5), 3, padding=1)], 4, 6, 6, 5)
MODELS["warp"] = lambda: (Warp(), (torch.randn(4, 6, 5, 4, dtype=torch.float64).requires_grad_(),))
MODELS["patches"] = lambda: (Patches(), (torch.randn(4, 3, 8, 6, dtype=torch.float64).requires_grad_(),))
stack("weight norm", lambda: [nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), nn.Flatten(), nn.Linear(36, 5)], 4, 4, 8)
formula(
    "padding",
    lambda a: F.pad(a, (2, 1), mode="reflect") + F.pad(a, (1, 2), mode="replicate") + F.pad(a, (3, 0), mode="circular"),
    (4, 5, 6),
)

# ---- linear algebra -----------------------------------------------------------------------------------------------------------

formula("inverse", lambda w: L.inv(_spd(w)) + torch.inverse(_spd(w)), (6, 3, 3))
formula("determinants", lambda w: L.det(_spd(w)) + L.slogdet(_spd(w))[1], (6, 3, 3))
formula("solve", lambda w, b: L.solve(_spd(w), b) + L.solve_triangular(_spd(w), b, upper=False), (6, 3, 3), (6, 3, 4))
formula("cholesky", lambda w, b: torch.cholesky_solve(b, L.cholesky(_spd(w))), (6, 3, 3), (6, 3, 2))
formula("qr", lambda w: L.qr(w)[1].abs(), (6, 4, 3))
formula("svd", lambda w: L.svd(w, full_matrices=False)[1] + L.svdvals(w), (6, 4, 3))
formula("eigh, matrix_exp, lu", lambda w: L.eigh(_spd(w))[0].unsqueeze(1) + torch.matrix_exp(w * 0.1) + L.lu_factor(_spd(w))[0], (6, 3, 3))
formula("pinv", lambda w: L.pinv(w), (6, 4, 3))
formula("norms", lambda w: L.norm(w, dim=1) + w.norm(1, dim=1) + L.vector_norm(w, 3, dim=1) + L.matrix_norm(w)[:, None], (6, 4, 3))
formula("distances", lambda a, b: torch.cdist(a, b) + torch.cdist(a, b, p=1.0) + torch.cdist(a[0], b[0]), (4, 5, 3), (4, 6, 3))
formula("cross", lambda a, b: L.cross(a, b), (4, 5, 3), (1, 5, 3))
formula("bilinear", lambda a, b, w, c: F.bilinear(a, b, w, c), (6, 5), (6, 4), (3, 5, 4), (3,))
formula(
    "diagonals",
    lambda a: torch.trace(a) + torch.diagonal(a).sum() + torch.diag(a[0]).sum() + torch.diag_embed(a).diagonal(1, 1, 2).sum(),
    (5, 5),
)
formula("triangles and turns", lambda a: torch.tril(a) + torch.triu(a, 1) * a.roll(2, 1) + a.flip(0) * a.rot90(2, [1, 2]), (5, 6, 6))
formula(
    "renorm, addr, addmv", lambda a, b, c: torch.renorm(torch.addr(a, b, c), 2, 0, 0.5) + torch.addmv(b, a, c)[:, None], (6, 5), (6,), (5,)
)
formula(
    "einsum",
    lambda a, b, c: torch.einsum("bij,bjk,kl->bil", a, b, c) + torch.tensordot(a, c, dims=([2], [0])),
    (4, 5, 6),
    (4, 6, 6),
    (6, 6),
)
formula("kron", lambda a, b: torch.kron(a, b), (4, 3), (2, 5))

# ---- complex numbers, transforms ----------------------------------------------------------------------------------------------

_TURN = torch.polar(torch.ones(5, 3, dtype=torch.float64), torch.arange(15.0, dtype=torch.float64).view(5, 3))
formula("complex rotary", lambda q: torch.view_as_real(torch.view_as_complex(q.reshape(4, 5, 3, 2)) * _TURN).flatten(2), (4, 5, 6))
formula(
    "complex functions",
    lambda a, b: (torch.complex(a, b).conj() * torch.complex(b, a)).abs() + torch.complex(a, b).angle() * b,
    (5, 6),
    (5, 6),
)
formula("complex matmul", lambda a, b: torch.complex(a, b) @ torch.complex(b, a).mT.conj(), (5, 6), (5, 6))
formula("fft", lambda a: torch.fft.rfft(a, dim=1).abs()[:, :3] + torch.fft.ifft2(torch.fft.fft2(a) * 2).real[:, :3], (4, 6, 5))
formula("inverse fft", lambda a: torch.fft.irfft(torch.fft.rfft(a, dim=1) * a[:, :4], dim=1, n=6), (4, 6, 5))
formula("stft", lambda a: torch.stft(a, 8, 4, window=torch.hann_window(8, dtype=torch.float64), return_complex=True).abs(), (4, 32))

# ---- element-wise, along a dim ------------------------------------------------------------------------------------------------

formula("glu, prelu", lambda a, w: F.glu(F.prelu(a, w), 1) + F.logsigmoid(a)[:, :3], (4, 6, 5), (6,))
formula(
    "activations",
    lambda a: (
        F.celu(a) + F.hardshrink(a) + F.softshrink(a) + F.tanhshrink(a) + F.softsign(a) + F.rrelu(a) + F.mish(a) + F.threshold(a, 0.1, 0.2)
    ),
    (4, 5),
)
formula(
    "special functions",
    lambda a: torch.erfinv(a.tanh()) + torch.sinc(a) + torch.special.i0(a) + torch.logaddexp(a, a * 2) + torch.special.entr(a.sigmoid())
    + torch.special.ndtr(a) + torch.lgamma(a.exp()) + torch.digamma(a.exp()) + torch.special.xlog1py(a, a.exp()) + torch.atan2(a, a + 2),
    (4, 5),
)  # fmt: skip
formula("scans", lambda a: a.cumsum(1) + a.cumprod(1) + a.logcumsumexp(1) + a.cummax(1)[0] + a.cummin(1)[0], (4, 6, 3))
formula(
    "order statistics",
    lambda a: a.sort(1)[0] + a.topk(2, 1)[0].sum(1, True) + a.kthvalue(2, 1, True)[0] + a.median(1, True)[0] + a.mode(1, True)[0],
    (4, 6, 3),
)
formula(
    "statistics",
    lambda a: (
        a.std(1) + a.var(1, unbiased=False) + torch.std_mean(a, 1)[0] + a.nansum(1) + torch.aminmax(a, dim=1)[1] + a.quantile(0.3, dim=1)
    ),
    (4, 6),
)
formula("repeats", lambda a: a.repeat_interleave(3, 1) * a.repeat(1, 3).tile(1, 1) + F.pad(a, (6, 6)) + F.pad(a, (6, 6), value=1.0), (4, 6))
formula(
    "differences",
    lambda a: a.diff(dim=1) + torch.trapezoid(a, dim=1)[:, None] + a.unflatten(1, (2, 3)).movedim(1, 2).flatten(1)[:, 1:],
    (4, 6),
)
