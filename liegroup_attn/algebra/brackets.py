"""Brackets: how generators fail to commute, the basis of the algebra, and products of exponentials."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square, squares
from liegroup_attn.errors import GeneratorError, ShapeError, check_shape, values_visible

__all__ = [
    "Ad",
    "ad",
    "basis",
    "bch",
    "bracket",
    "coordinates",
    "elementary",
    "from_coordinates",
    "structure_constants",
]


def bracket(X: Tensor, Y: Tensor) -> Tensor:
    """Commutator [X, Y] = XY − YX; of two matrices with zero row sums it has zero row sums.

    The cone is not closed under it: the bracket of two rate matrices is in general no rate matrix.

    Args:
        X: (..., N, N).
        Y: (..., N, N), broadcasts with X.

    Returns:
        (..., N, N).

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or the shapes do not go together.

    Example:
        >>> bracket(elementary(0, 1, 3), elementary(1, 2, 3))
        tensor([[ 0., -1.,  1.],
                [ 0.,  0.,  0.],
                [ 0.,  0.,  0.]])

    Source: [Hall2015]_, chapter 3.
    """
    X, Y = squares(("X", X), ("Y", Y))
    return X @ Y - Y @ X


def ad(X: Tensor) -> Tensor:
    """Adjoint action Y ↦ [X, Y] as a matrix, X ⊗ I − I ⊗ Xᵀ on ``Y.flatten(-2)`` (rows one after the other).

    Args:
        X: (..., N, N).

    Returns:
        (..., N², N²).

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.

    Example:
        >>> X, Y = elementary(0, 1, 3), elementary(1, 2, 3)
        >>> torch.equal(ad(X) @ Y.flatten(), bracket(X, Y).flatten())
        True

    Source: [Hall2015]_, chapter 3.
    """
    X = square("X", X)
    eye, n = eye_like(X), X.size(-1)
    left = torch.einsum("...ik,jl->...ijkl", X, eye)
    right = torch.einsum("ik,...lj->...ijkl", eye, X)
    return (left - right).reshape(*X.shape[:-2], n * n, n * n)


def Ad(g: Tensor, Y: Tensor) -> Tensor:
    """Adjoint action of the group, g Y g⁻¹; Ad_{exp X} = exp(ad_X).

    Args:
        g: (..., N, N), invertible.
        Y: (..., N, N), broadcasts with g.

    Returns:
        (..., N, N).

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or the shapes do not go together.
        GeneratorError: g is singular, where values are visible.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> Ad(swap, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))  # the states change names
        tensor([[ 0.,  0.],
                [ 1., -1.]])

    Source: [Hall2015]_, chapter 3.
    """
    g, Y = squares(("g", g), ("Y", Y))
    result, info = torch.linalg.solve_ex(g, g @ Y, left=False)
    if values_visible(g) and bool((info != 0).any()):
        raise GeneratorError("g: expected invertible matrices, got a singular one; exp(X) always is invertible")
    return result


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


def structure_constants(n: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The c with [L_a, L_b] = Σ_c c[a, b, c] L_c, over the pairs a = (i, j) in the order of ``basis``.

    In indices [L_ij, L_kl] = (δ_jk − δ_ik)(L_il − L_ik) − (δ_il − δ_ik)(L_kj − L_ki), where L_ii = 0.

    Args:
        n: number of states, at least 1.
        dtype: default torch's.

    Returns:
        (m, m, m), m = n(n − 1).

    Raises:
        ShapeError: n < 1.

    Example:
        >>> structure_constants(2)[0, 1]  # [L_01, L_10] = L_10 − L_01
        tensor([-1.,  1.])

    Source: [Hall2015]_, chapter 3.
    """
    L = basis(n, dtype=dtype)
    return coordinates(bracket(L[:, None], L))


def bch(X: Tensor, Y: Tensor, order: int = 4) -> Tensor:
    """Baker–Campbell–Hausdorff series of log(exp(X) exp(Y)), cut after the brackets of ``order`` letters.

    X + Y + ½[X, Y] + (1/12)([X, [X, Y]] + [Y, [Y, X]]) − (1/24)[Y, [X, [X, Y]]] + …; the error is of order
    ``order`` + 1 in the size of X and Y.

    Args:
        X: (..., N, N).
        Y: (..., N, N), broadcasts with X.
        order: 1 to 4.

    Returns:
        (..., N, N).

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or the shapes do not go together.
        GeneratorError: another order.

    Example:
        >>> X, Y = elementary(0, 1, 3), elementary(1, 2, 3)
        >>> torch.equal(bch(X, Y, order=2), X + Y + bracket(X, Y) / 2)
        True

    Source: [Hall2015]_, chapter 5.
    """
    if order not in (1, 2, 3, 4):
        raise GeneratorError(f"order: expected 1, 2, 3 or 4, got {order}; for more use logm(expm(X) @ expm(Y))")
    X, Y = squares(("X", X), ("Y", Y))
    xy = bracket(X, Y)
    xxy = bracket(X, xy)
    terms = (X + Y, xy / 2, (xxy - bracket(Y, xy)) / 12, -bracket(Y, xxy) / 24)
    return torch.stack(terms[:order]).sum(0)
