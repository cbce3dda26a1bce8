"""Measures of transition matrices; pure functions of dense tensors, any batch, torch only.

Half-precision inputs are computed, and returned, in float32.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape

__all__ = ["attention_entropy", "bits_per_byte", "row_stochasticity_error"]


def attention_entropy(transition: Tensor) -> Tensor:
    """Shannon entropy of each row, −Σ_j P_ij ln P_ij with 0·ln 0 = 0.

    Args:
        transition: (..., N, M), rows of probabilities; a negative entry gives −inf. The gradient by an entry that is 0
            is 0: what is masked stays masked.

    Returns:
        (..., N), nats, between 0 (one target) and ln M (all targets alike).

    Raises:
        DtypeError: not floating point.
        ShapeError: fewer than two dimensions.

    Example:
        >>> attention_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    check_shape("transition", transition, least_rank=2, remedy="pass whole rows, (..., N, N)")
    return entropy(at_least_float32(transition))


def row_stochasticity_error(transition: Tensor) -> Tensor:
    """How far a matrix is from being row-stochastic: ``max(|row sum − 1|, −least entry)``, 0 if it is.

    Args:
        transition: (..., N, M).

    Returns:
        (...,), the worst violation in each matrix; NaN if it holds NaN.

    Raises:
        DtypeError: not floating point.
        ShapeError: fewer than two dimensions.

    Example:
        >>> row_stochasticity_error(torch.tensor([[1.25, -0.25], [0.5, 0.5]]))
        tensor(0.2500)
    """
    check_shape("transition", transition, least_rank=2, remedy="pass whole rows, (..., N, N)")
    transition = at_least_float32(transition)
    sums = (transition.sum(-1) - 1).abs()  # (..., N)
    negative = (-transition).clamp_min(0).flatten(-2)  # (..., N·M)
    zero = transition.new_zeros(*transition.shape[:-2], 1)  # keeps amax defined when N = 0
    return torch.cat([sums, negative, zero], -1).amax(-1)


@overload
def bits_per_byte(nats: Tensor) -> Tensor: ...
@overload
def bits_per_byte(nats: float) -> float: ...
def bits_per_byte(nats: float | Tensor) -> float | Tensor:
    """Bits per byte from a mean cross-entropy per byte in nats: nats / ln 2.

    Args:
        nats: float or tensor of any shape, nats per byte.

    Returns:
        The same shape, bits per byte.

    Example:
        >>> round(bits_per_byte(1.589), 3)
        2.292
    """
    if isinstance(nats, Tensor):
        return (at_least_float32(nats) if nats.is_floating_point() else nats) / math.log(2)
    return nats / math.log(2)


def entropy(probabilities: Tensor) -> Tensor:
    """−Σ p ln p over the last dimension, (..., M) → (...); its slope at 0 is infinite, and is taken as 0."""
    return torch.special.entr(probabilities.masked_fill(probabilities == 0, 1)).sum(-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32, all else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
