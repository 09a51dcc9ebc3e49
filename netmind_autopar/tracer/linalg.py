"""Rewrites of linear algebra and complex numbers. `TABLE` and `DECOMPOSITIONS`: see normalize.py.

ATen checks a factorisation in a node of its own, which has an effect and no result, and conjugates by a mark on the tensor, which
a copy between devices would lose. Here the op checks by itself, and a conjugate is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def inverse(x: Tensor) -> Tensor:
    return _aten.linalg_inv_ex.default(x, check_errors=True)[0]


def cholesky(x: Tensor, *, upper: bool = False) -> Tensor:
    return _aten.linalg_cholesky_ex.default(x, upper=upper, check_errors=True)[0]


def solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    return _aten._linalg_solve_ex.default(a, b, left=left, check_errors=True)[0]


def lu_factor(x: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor]:
    return _aten.linalg_lu_factor_ex.default(x, pivot=pivot, check_errors=True)[:2]


def ldl_factor(x: Tensor, *, hermitian: bool = False) -> tuple[Tensor, Tensor]:
    return _aten.linalg_ldl_factor_ex.default(x, hermitian=hermitian, check_errors=True)[:2]


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.linalg_inv.default: inverse,
    _aten.inverse.default: inverse,
    _aten.linalg_cholesky.default: cholesky,
    _aten.linalg_solve.default: solve,
    _aten.linalg_lu_factor.default: lu_factor,
    _aten.linalg_ldl_factor.default: ldl_factor,
}
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten._conj.default: _aten.conj_physical.default,
    _aten._neg_view.default: _aten.neg.default,
}
