"""Brackets: how generators fail to commute, and what that does to products of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square, squares
from liegroup_attn.errors import GeneratorError
from liegroup_attn.tensors import values_visible

__all__ = [
    "Ad",
    "ad",
    "bch",
    "bracket",
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
        >>> from liegroup_attn.algebra import elementary
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
        >>> from liegroup_attn.algebra import elementary
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
        >>> from liegroup_attn.algebra import elementary
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
