"""The basis L_ij of the algebra: one jump each, the edges of the cone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra._square import square
from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError

__all__ = ["basis", "coordinates", "elementary", "from_coordinates"]


def elementary(i: int, j: int, n: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Elementary generator L_ij = e_i(e_j − e_i)ᵀ: jumps from i to j at rate 1.

    Args:
        i: source, 0 ≤ i < n.
        j: target, 0 ≤ j < n, j ≠ i.
        n: number of states.
        dtype: default torch's.

    Returns:
        (n, n).

    Raises:
        GeneratorError: i = j, or out of range.

    Example:
        >>> elementary(0, 1, 2)
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    Source: [Johnson1985]_.
    """
    if not (0 <= i < n and 0 <= j < n and i != j):
        raise GeneratorError(
            f"i, j: expected two different states among 0 … {n - 1}, got {i} and {j}; a jump leads to another state"
        )
    L = torch.zeros(n, n, dtype=dtype)
    L[i, i], L[i, j] = -1, 1
    return L


def basis(n: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """All L_ij: a basis of the algebra, and the edges of the cone. Row by row: L_01, L_02, …, L_10, L_12, ….

    Args:
        n: number of states, at least 1.
        dtype: default torch's.

    Returns:
        (n(n − 1), n, n).

    Raises:
        ShapeError: n < 1.

    Example:
        >>> basis(3).shape
        torch.Size([6, 3, 3])

    Source: [Johnson1985]_.
    """
    if n < 1:
        raise ShapeError(f"n: expected at least 1 state, got {n}; give the number of tokens")
    return from_coordinates(torch.eye(n * (n - 1), dtype=dtype))


def coordinates(X: Tensor) -> Tensor:
    """Coordinates in ``basis``: the off-diagonals, row by row. The diagonal is not looked at.

    Args:
        X: (..., N, N), of the algebra.

    Returns:
        (..., N(N − 1)).

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.

    Example:
        >>> coordinates(torch.tensor([[-1.0, 1.0], [2.0, -2.0]]))
        tensor([1., 2.])

    Source: [Johnson1985]_.
    """
    X = square("X", X)
    n = X.size(-1)
    if n < 2:
        return X.flatten(-2)[..., :0]
    # Without its first entry a matrix in a row is n − 1 times: n off-diagonals and an entry of the diagonal.
    return X.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., :-1].flatten(-2)


def from_coordinates(rates: Tensor) -> Tensor:
    """The element Σ r_ij L_ij of the algebra; a rate matrix iff all r_ij ≥ 0.

    Args:
        rates: (..., N(N − 1)), in the order of ``basis``; an empty last axis is N = 1.

    Returns:
        (..., N, N).

    Raises:
        DtypeError: not floating point.
        ShapeError: the last size is no N(N − 1).

    Example:
        >>> from_coordinates(torch.tensor([1.0, 2.0]))
        tensor([[-1.,  1.],
                [ 2., -2.]])

    Source: [Johnson1985]_.
    """
    check_shape("rates", rates, least_rank=1, remedy="give the rates along the last axis")
    rates = rates.float() if rates.dtype in (torch.float16, torch.bfloat16) else rates
    n = (1 + math.isqrt(1 + 4 * rates.size(-1))) // 2
    if n * (n - 1) != rates.size(-1):
        raise ShapeError(
            f"rates: expected N(N − 1) of them (0, 2, 6, 12, …), got {rates.size(-1)}; give one for each ordered pair"
        )
    if n == 1:
        return rates.new_zeros(*rates.shape[:-1], 1, 1)
    off = F.pad(rates.unflatten(-1, (n - 1, n)), (1, 0)).flatten(-2)  # (..., n² − 1): the inverse of ``coordinates``
    off = F.pad(off, (0, 1)).unflatten(-1, (n, n))
    return off - torch.diag_embed(off.sum(-1))
