"""The Lie algebra 𝔤ₙ = {X : X1 = 0}, the cone 𝔴ₙ of rate matrices in it, and the nearest points of both."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square
from liegroup_attn.checks import check_finite
from liegroup_attn.errors import MaskError
from liegroup_attn.tensors import fits

__all__ = ["in_algebra", "is_rate_matrix", "is_stochastic", "project_algebra", "project_cone"]


def in_algebra(X: Tensor, atol: float | None = None) -> tuple[bool, str | None]:
    """Say whether a matrix lies in the Lie algebra: finite, zero row sums.

    Args:
        X: (..., N, N), every matrix of the batch must pass.
        atol: absolute tolerance; default 8 · N · eps · max|X|, at least 8 · eps.

    Returns:
        ``(True, None)`` or ``(False, reason)``.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.

    Example:
        >>> in_algebra(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        (True, None)
        >>> in_algebra(torch.eye(2))
        (False, 'rows must sum to 0 within 1.9e-06, got 1')

    Source: [Johnson1985]_.
    """
    return _check(X, atol, least=None, total=0)


def is_rate_matrix(matrix: Tensor, atol: float | None = None) -> tuple[bool, str | None]:
    """Say whether a matrix is a generator: finite, off-diagonals ≥ 0, zero row sums.

    The set of such matrices is a convex cone in the Lie algebra of zero row sums: closed under sums and
    nonnegative scaling, not under commutators.

    Args:
        matrix: (..., N, N), every matrix of the batch must pass.
        atol: absolute tolerance; default 8 · N · eps · max|matrix|, at least 8 · eps.

    Returns:
        ``(True, None)`` or ``(False, reason)``.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.

    Example:
        >>> is_rate_matrix(torch.tensor([[-1.0, 1.0], [2.0, -2.0]]))
        (True, None)
        >>> is_rate_matrix(torch.tensor([[1.0, -1.0], [2.0, -2.0]]))
        (False, 'off-diagonal entries must be at least 0, got -1')

    Source: [Norris1997]_, section 2.1.
    """
    return _check(matrix, atol, least="off-diagonal entries", total=0)


def is_stochastic(P: Tensor, atol: float | None = None) -> tuple[bool, str | None]:
    """Say whether a matrix is row-stochastic: finite, entries ≥ 0, rows sum to 1.

    Args:
        P: (..., N, N), every matrix of the batch must pass.
        atol: absolute tolerance; default 8 · N · eps · max|P|, at least 8 · eps.

    Returns:
        ``(True, None)`` or ``(False, reason)``.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.

    Example:
        >>> is_stochastic(torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
        (True, None)
        >>> is_stochastic(torch.tensor([[1.5, -0.5], [0.0, 1.0]]))
        (False, 'entries must be at least 0, got -0.5')

    Source: [Norris1997]_, section 1.1.
    """
    return _check(P, atol, least="entries", total=1)


def _check(matrix: Tensor, atol: float | None, least: str | None, total: int) -> tuple[bool, str | None]:
    """Finite; the entries that ``least`` names ≥ 0; rows sum to ``total``."""
    square("matrix", matrix)
    n = matrix.size(-1)
    if matrix.numel() == 0:
        return True, None
    if not bool(torch.isfinite(matrix).all()):
        return False, "entries must be finite, got NaN or inf"
    wide = matrix.detach().to(torch.float64)
    if atol is None:
        atol = 8 * torch.finfo(matrix.dtype).eps * max(1.0, n * float(wide.abs().max()))
    if least is not None:
        signed = wide if total else wide.masked_fill(_diagonal(wide), torch.inf)
        lowest = float(signed.min())
        if lowest < -atol:
            return False, f"{least} must be at least 0, got {lowest:g}"
    sums = wide.sum(-1)
    worst = float((sums - total).abs().max())
    if worst > atol:
        got = float(sums.flatten()[(sums - total).abs().argmax()]) if total else worst
        return False, f"rows must sum to {total} within {atol:.1e}, got {got:g}"
    return True, None


def project_algebra(X: Tensor, support: Tensor | None = None) -> Tensor:
    """Nearest matrix with zero row sums, in the Frobenius norm: each row is centred over its support.

    Linear, hence differentiable everywhere. It is what the softmax does to gradients: those live in the algebra.

    Args:
        X: (..., N, N).
        support: bool, broadcasts to X; False where the result must be 0. The diagonal always takes part.

    Returns:
        (..., N, N), rows sum to 0 up to rounding, in float32 for half-precision X.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.
        GeneratorError: NaN or inf, where values are visible.
        MaskError: the support is not bool or does not broadcast.

    Example:
        >>> project_algebra(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    Source: docs/mathematics.
    """
    wide, off = _prepare(X, support)
    on = off | _diagonal(wide)
    mean = wide.masked_fill(~on, 0).sum(-1, keepdim=True) / on.sum(-1, keepdim=True)
    return _with_diagonal((wide - mean).masked_fill(~off, 0).to(square("X", X).dtype))


def project_cone(X: Tensor, support: Tensor | None = None) -> Tensor:
    """Nearest rate matrix, in the Frobenius norm.

    In row i the rates are max(0, X_ij − τ) with one threshold τ = (X_ii + Σ X_ij over the k rates that stay)/(1 + k),
    found by a sort as for the simplex. Differentiable where no X_ij is exactly τ (a subgradient there).

    Args:
        X: (..., N, N).
        support: bool, broadcasts to X; False where the rate must be 0. The diagonal always takes part.

    Returns:
        (..., N, N), off-diagonals ≥ 0, rows sum to 0 up to rounding, in float32 for half-precision X.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square.
        GeneratorError: NaN or inf, where values are visible.
        MaskError: the support is not bool or does not broadcast.

    Example:
        >>> project_cone(torch.tensor([[-2.0, 2.0], [3.0, -1.0]]))
        tensor([[-2.,  2.],
                [ 2., -2.]])
        >>> project_cone(torch.tensor([[1.0, -1.0], [2.0, -2.0]]))  # the nearest rate is 0
        tensor([[ 0.,  0.],
                [ 2., -2.]])

    Source: [Held1974]_ (the threshold, for the simplex).
    """
    wide, off = _prepare(X, support)
    rates = wide.masked_fill(~off, -torch.inf)
    falling = rates.sort(-1, descending=True).values
    start = wide.diagonal(dim1=-2, dim2=-1)[..., None]
    count = torch.arange(1, wide.size(-1) + 2, device=wide.device)
    thresholds = torch.cat([start, start + falling.cumsum(-1)], -1) / count  # (..., N, N + 1), one for each k
    kept = (falling > thresholds[..., 1:]).sum(-1, keepdim=True)
    rates = (rates - thresholds.gather(-1, kept)).clamp_min(0)
    return _with_diagonal(rates.to(square("X", X).dtype))


def _prepare(X: Tensor, support: Tensor | None) -> tuple[Tensor, Tensor]:
    """X in float64 and, in its shape, where off-diagonals may differ from 0."""
    wide = square("X", X).double()
    check_finite("X", wide)
    off = ~_diagonal(wide)
    if support is None:
        return wide, off.expand_as(wide)
    if not isinstance(support, Tensor) or support.dtype != torch.bool or not fits(support.shape, wide.shape):
        got = f"{support.dtype} {tuple(support.shape)}" if isinstance(support, Tensor) else type(support).__name__
        raise MaskError(
            f"support: expected a bool tensor that broadcasts to {tuple(wide.shape)}, got {got}; "
            "compare with > 0, True where a rate may be positive"
        )
    return wide, (off & support).expand_as(wide)


def _diagonal(matrix: Tensor) -> Tensor:
    return eye_like(matrix).bool()


def _with_diagonal(off: Tensor) -> Tensor:
    """Minus the row sums on the diagonal, summed in float64 as the entries are after rounding."""
    return off - torch.diag_embed(off.double().sum(-1)).to(off.dtype)
