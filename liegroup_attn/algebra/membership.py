"""The rate-matrix Lie algebra 𝔤ₙ = {Q : Q1 = 0} and the cone 𝔴ₙ of rate matrices in it."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra._square import square

__all__ = ["is_rate_matrix"]


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
    square("matrix", matrix)
    n = matrix.size(-1)
    if matrix.numel() == 0:
        return True, None
    if not bool(torch.isfinite(matrix).all()):
        return False, "entries must be finite, got NaN or inf"
    wide = matrix.detach().to(torch.float64)
    if atol is None:
        atol = 8 * torch.finfo(matrix.dtype).eps * max(1.0, n * float(wide.abs().max()))
    lowest = float(wide.masked_fill(torch.eye(n, dtype=torch.bool, device=matrix.device), torch.inf).min())
    if lowest < -atol:
        return False, f"off-diagonal entries must be at least 0, got {lowest:g}"
    worst = float(wide.sum(-1).abs().max())
    if worst > atol:
        return False, f"rows must sum to 0 within {atol:.1e}, got {worst:g}"
    return True, None
