"""Additive biases as group actions: shears exp(mE) of two more coordinates, E nilpotent."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra import expm
from liegroup_attn.errors import ShapeError

__all__ = ["unipotent_generator", "unipotent_scores"]


def unipotent_generator(slope: float, head_width: int) -> Tensor:
    """E with E² = 0, on the D features of a head and two more: exp(mE) = I + mE is a shear of the last two.

    Args:
        slope: what a step of the position takes from a score.
        head_width: D.

    Returns:
        (D + 2, D + 2), float64.

    Example:
        >>> unipotent_generator(0.5, 1)
        tensor([[ 0.0000,  0.0000,  0.0000],
                [ 0.0000,  0.0000, -0.5000],
                [ 0.0000,  0.0000,  0.0000]], dtype=torch.float64)

    Source: [Zhang2026]_.
    """
    generator = torch.zeros(head_width + 2, head_width + 2, dtype=torch.float64)
    generator[head_width, head_width + 1] = -slope
    return generator


def unipotent_scores(
    query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor, slope: float
) -> Tensor:
    """⟨exp(mE) (q, 0, 1), exp(−nE)ᵀ (k, 1, 0)⟩ = q·k − slope (m − n), by matrices, as a teacher writes it down.

    Queries are moved by the action, keys by its inverse transpose: that keeps the product when both move alike, as rotations
    do, which are their own inverse transpose. With Σ −log f_l for positions and slope 1 this is the forgetting gate.

    Args:
        query: (N, D).
        key: (M, D).
        query_positions: m, (N,), any real.
        key_positions: n, (M,).
        slope: of the bias.

    Returns:
        (N, M), float64.

    Raises:
        ShapeError: positions that are not one per token.

    Example:
        >>> q = torch.zeros(2, 4)
        >>> unipotent_scores(q, q, torch.arange(2), torch.arange(2), 0.5)
        tensor([[ 0.0000,  0.5000],
                [-0.5000,  0.0000]], dtype=torch.float64)

    Source: [Zhang2026]_; ALiBi is [Press2022]_.
    """
    for name, x, at in (("query_positions", query, query_positions), ("key_positions", key, key_positions)):
        if x.dim() != 2 or at.shape != x.shape[:1]:
            raise ShapeError(f"{name}: expected shape {tuple(x.shape[:1])}, got {tuple(at.shape)}; one per token")
    generator = unipotent_generator(slope, query.size(-1))
    moved = _act(expm(query_positions.double().view(-1, 1, 1) * generator), _with(query, (0.0, 1.0)))
    back = _act(expm(-key_positions.double().view(-1, 1, 1) * generator).mT, _with(key, (1.0, 0.0)))
    return moved @ back.mT


def _with(x: Tensor, more: tuple[float, float]) -> Tensor:
    return torch.cat([x.double(), torch.tensor(more, dtype=torch.float64).expand(len(x), -1)], -1)


def _act(matrices: Tensor, x: Tensor) -> Tensor:
    return (matrices @ x.unsqueeze(-1)).squeeze(-1)
