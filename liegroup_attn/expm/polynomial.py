"""Σ_k p_k Pᵏ as a matrix, with about 2√K products instead of K."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["matrix_polynomial", "products"]


def products(degree: int) -> int:
    """How many products of N×N ``matrix_polynomial`` takes for a degree."""
    block = _block(degree)
    return block - 1 + math.ceil((degree + 1) / block) - 1 if degree > 1 else 0


def _block(degree: int) -> int:
    return max(1, round(math.sqrt(degree + 1)))


def matrix_polynomial(weights: Tensor, chain: Tensor) -> Tensor:
    """Σ_k p_k Pᵏ by baby steps P, P², …, P^q and giant steps of P^q. Nothing cancels if p ≥ 0 and P ≥ 0.

    Args:
        weights: p, (K + 1,) or (K + 1, ..., 1), one row of weights a matrix, as ``Clock.hop_weights`` gives them.
        chain: P, (..., N, N).

    Returns:
        (..., N, N).

    Example:
        >>> matrix_polynomial(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0]]))
        tensor([[17.]])

    Source: [Paterson1973]_.
    """
    n, degree = chain.size(-1), len(weights) - 1
    rows = weights.to(chain.dtype).movedim(0, -1)  # (..., 1, K + 1)
    rows = rows.squeeze(-2) if rows.dim() > 1 else rows
    batch = torch.broadcast_shapes(rows.shape[:-1], chain.shape[:-2])
    chain = chain.expand(*batch, n, n).reshape(batch.numel(), n, n)
    rows = rows.expand(*batch, degree + 1).reshape(batch.numel(), degree + 1)
    block = _block(degree)
    giants = math.ceil((degree + 1) / block)
    powers = [torch.eye(n, dtype=chain.dtype, device=chain.device).expand_as(chain), chain]
    while len(powers) <= block:
        powers.append(powers[-1] @ chain)
    rows = F.pad(rows, (0, giants * block - degree - 1)).unflatten(-1, (giants, block))
    # All inner sums Σ_j p_{iq+j} Pʲ at once: one small product (giants × q)(q × N²) a matrix.
    inner = (rows @ torch.stack(powers[:block], 1).flatten(2)).unflatten(-1, (n, n))
    total = inner[:, -1]
    for i in range(giants - 2, -1, -1):
        total = torch.baddbmm(inner[:, i], total, powers[block])
    return total.view(*batch, n, n)
