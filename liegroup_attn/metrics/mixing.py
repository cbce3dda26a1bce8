"""What a mixing matrix does to tokens: how many directions it keeps, where its mass lands, how far it is from softmax.

Pure functions of dense tensors, any batch, torch only; half-precision inputs are computed, and returned, in float32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.metrics.functional import at_least_float32, entropy

__all__ = ["distance_to_softmax", "effective_rank", "sink_mass"]

_REMEDY = "pass whole rows, (..., N, N)"


def effective_rank(transition: Tensor) -> Tensor:
    """How many directions of value space survive the mixing: exp of the entropy of the normalized singular values.

    1 where all rows are multiples of one (a chain that has forgotten its start), N for a permutation. Computed in
    float64; differentiable where the rank is full.

    Args:
        transition: (..., N, M).

    Returns:
        (...,), between 1 and min(N, M); NaN for a matrix that holds NaN or inf, that is 0 or has no entry.

    Raises:
        DtypeError: not floating point.
        ShapeError: fewer than two dimensions.

    Example:
        >>> effective_rank(torch.stack([torch.eye(4), torch.full((4, 4), 0.25)]))
        tensor([4., 1.])

    Source: [Roy2007]_, section 2.
    """
    check_shape("transition", transition, least_rank=2, remedy=_REMEDY)
    wide = transition.double()
    finite = wide.isfinite().flatten(-2).all(-1)  # (...,): one item's NaN would stop the decomposition of all
    singular = torch.linalg.svdvals(wide.masked_fill(~finite[..., None, None], 0.0))  # (..., min(N, M))
    total = singular.sum(-1)  # (...,)
    there = total > 0
    share = singular / total.where(there, 1.0)[..., None]
    rank = entropy(share).exp()
    return rank.masked_fill(~there, math.nan).to(at_least_float32(transition).dtype)


def sink_mass(transition: Tensor, sink: int | Iterable[int] | None = None) -> Tensor:
    """Share of all mass that lands on the heaviest column, or on given tokens: mean over rows of P[:, sink].

    1/M at least for the heaviest column, 1 if every token reads that one alone. Early columns of causal matrices are
    heavy by themselves: rows that are uniform over the past give token 0 a share of (1 + 1/2 + … + 1/N)/N.

    Args:
        transition: (..., N, M), rows of probabilities.
        sink: index, or indices, of columns, negative ones from the end; their shares add, each counts once. Default: the
            heaviest column of each matrix.

    Returns:
        (...,), between 0 and 1; NaN without rows, and for a matrix without columns that looks for its heaviest.

    Raises:
        DtypeError: ``transition`` is not floating point, or ``sink`` not made of integers.
        ShapeError: fewer than two dimensions, or a column that is not there.

    Example:
        >>> P = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.75, 0.0, 0.25]])
        >>> sink_mass(P), sink_mass(P, sink=[0, -1])
        (tensor(0.7500), tensor(0.8333))

    Source: [Xiao2024]_, section 3.1.
    """
    check_shape("transition", transition, least_rank=2, remedy=_REMEDY)
    return mass_on(at_least_float32(transition).mean(-2), sink)


def distance_to_softmax(transition: Tensor, jump_chain: Tensor) -> Tensor:
    """How far a mixing matrix has gone from softmax attention: mean over rows of the total variation, half of Σ_j abs(P_ij − S_ij).

    The share of its mass that a token would have to move, on average. 0 at first hop and t = 0, where P is S.

    Args:
        transition: (..., N, M), P, rows of probabilities.
        jump_chain: (..., N, M), S, the softmax of the same scores; batches broadcast.

    Returns:
        (...,), between 0 and 1; NaN without rows.

    Raises:
        DtypeError: not floating point.
        ShapeError: fewer than two dimensions, or shapes that do not go together.

    Example:
        >>> S = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
        >>> distance_to_softmax(torch.eye(2), S)
        tensor(0.3750)

    Source: [Levin2017]_, section 4.1.
    """
    check_shape("transition", transition, least_rank=2, remedy=_REMEDY)
    check_shape("jump_chain", jump_chain, least_rank=2, remedy=_REMEDY)
    try:
        torch.broadcast_shapes(transition.shape[:-2], jump_chain.shape[:-2])
        fits = transition.shape[-2:] == jump_chain.shape[-2:]
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"jump_chain: expected the rows and columns of the transition {tuple(transition.shape)} and a batch that "
            f"broadcasts with its own, got {tuple(jump_chain.shape)}; give S of the same tokens and heads"
        )
    apart = at_least_float32(transition) - at_least_float32(jump_chain)  # (..., N, M)
    return apart.abs().sum(-1).mean(-1) / 2


def mass_on(mass: Tensor, sink: int | Iterable[int] | None) -> Tensor:
    """The largest entry of each (..., M), or the sum of those at the indices, (...,)."""
    if sink is None:
        return mass.amax(-1) if mass.size(-1) else mass.new_full(mass.shape[:-1], math.nan)
    chosen, size = indices(sink), mass.size(-1)
    if not all(-size <= i < size for i in chosen):
        raise ShapeError(
            f"sink: expected indices from {-size} to {size - 1}, got {list(chosen)}; count from the sequence's first token"
        )
    return mass[..., sorted({i % size for i in chosen})].sum(-1)


def indices(sink: int | Iterable[int]) -> tuple[int, ...]:
    """Plain integers, one or several; DtypeError for anything else."""
    try:
        if isinstance(sink, int) or (isinstance(sink, Tensor) and sink.dim() == 0):
            return (operator.index(sink),)
        return tuple(operator.index(i) for i in sink)
    except TypeError:
        raise DtypeError(
            f"sink: expected an index or indices, got {sink!r}; give integers, such as 0 for the first token"
        ) from None
