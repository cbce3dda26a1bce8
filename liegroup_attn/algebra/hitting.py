"""Where a chain ends and how long that takes: first-step equations, solved on the states where they are regular."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square
from liegroup_attn.algebra.chains import rate_matrix, reachable
from liegroup_attn.errors import MaskError
from liegroup_attn.tensors import fits

__all__ = ["absorption_probabilities", "hitting_probabilities", "hitting_times"]


def hitting_probabilities(generator: Tensor, target: Tensor) -> Tensor:
    """Probability that the chain ever enters a set of states, for every starting token.

    1 on the set, 0 where it cannot be reached, and between them the chance of the jump chain: h_i = Σ_j S_ij h_j.
    Differentiable by the positive rates.

    Args:
        generator: (..., N, N), the dense Q.
        target: bool, broadcasts to (..., N); True in the set.

    Returns:
        (..., N), in [0, 1].

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, where values are visible.
        MaskError: the target is not bool or does not broadcast.

    Example:
        >>> Q = torch.tensor([[0.0, 0.0, 0.0], [1.0, -4.0, 3.0], [0.0, 0.0, 0.0]])
        >>> hitting_probabilities(Q, torch.tensor([True, False, False]))
        tensor([1.0000, 0.2500, 0.0000])

    Source: [Norris1997]_, section 3.3.
    """
    Q, target = rate_matrix(generator), _target(target, generator)
    inner = _may_enter(Q, target) & ~target
    value = _first_step(Q, inner, target.to(Q)[..., None])[..., 0]
    return value.clamp(0, 1).to(square("generator", generator).dtype)


def hitting_times(generator: Tensor, target: Tensor) -> Tensor:
    """Expected time until the chain enters a set of states, for every starting token.

    0 on the set, inf where it may never be entered, and between them k_i = 1/q_i + Σ_j S_ij k_j with exit rates q.
    Differentiable by the positive rates, where finite.

    Args:
        generator: (..., N, N), the dense Q.
        target: bool, broadcasts to (..., N); True in the set.

    Returns:
        (..., N), ≥ 0.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, where values are visible.
        MaskError: the target is not bool or does not broadcast.

    Example:
        >>> Q = torch.tensor([[-0.5, 0.5, 0.0], [0.0, -2.0, 2.0], [0.0, 1.0, -1.0]])
        >>> hitting_times(Q, torch.tensor([False, False, True]))
        tensor([2.5000, 0.5000, 0.0000])

    Source: [Norris1997]_, section 3.3.
    """
    Q, target = rate_matrix(generator), _target(target, generator)
    stopped = Q.masked_fill(target[..., None], 0)
    lost = ~_may_enter(Q, target)
    sure = ~_may_enter(stopped, lost)  # cannot come to a state from where the set is out of reach
    inner = sure & ~target
    holding = (1 / -Q.diagonal(dim1=-2, dim2=-1).where(inner, -1)).where(inner, 0)
    value = _first_step(Q, inner, holding[..., None])[..., 0].clamp_min(0)
    return value.masked_fill(~sure, math.inf).to(square("generator", generator).dtype)


def absorption_probabilities(generator: Tensor) -> Tensor:
    """Probability that the chain ends in each absorbing state, B_ij = P(from i it is absorbed in j).

    The limit of P(t) for t → ∞ in those columns. In a causal generator token 0 is absorbing: its column is 1
    unless other tokens are absorbing too.

    Args:
        generator: (..., N, N), the dense Q; a state without rates is absorbing.

    Returns:
        (..., N, N): column j is zero unless j is absorbing; rows sum to the probability of ever being absorbed.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, where values are visible.

    Example:
        >>> absorption_probabilities(torch.tensor([[0.0, 0.0, 0.0], [1.0, -4.0, 3.0], [0.0, 0.0, 0.0]]))
        tensor([[1.0000, 0.0000, 0.0000],
                [0.2500, 0.0000, 0.7500],
                [0.0000, 0.0000, 1.0000]])

    Source: [Norris1997]_, section 3.3.
    """
    Q = rate_matrix(generator)
    absorbing = ~(Q > 0).any(-1)
    inner = _may_enter(Q, absorbing) & ~absorbing
    return _first_step(Q, inner, torch.diag_embed(absorbing.to(Q))).clamp(0, 1).to(square("generator", generator).dtype)


def _target(target: Tensor, generator: Tensor) -> Tensor:
    """The set as a mask in the shape of the generator's rows."""
    rows = generator.shape[:-1]
    if not isinstance(target, Tensor) or target.dtype != torch.bool or not fits(target.shape, rows):
        got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise MaskError(
            f"target: expected a bool tensor that broadcasts to {tuple(rows)}, got {got}; "
            "make one with torch.arange(N) == state"
        )
    return target.expand(rows)


def _may_enter(Q: Tensor, states: Tensor) -> Tensor:
    """From where a set can be reached, (..., N)."""
    return (reachable(Q) & states[..., None, :]).any(-1)


def _first_step(Q: Tensor, inner: Tensor, given: Tensor) -> Tensor:
    """X = given + SX on the inner rows, X = given on the others; S the jump chain without stays."""
    exits = -Q.diagonal(dim1=-2, dim2=-1).where(inner, -1)[..., None]
    rows = -Q / exits  # I − S
    return torch.linalg.solve_ex(torch.where(inner[..., None], rows, eye_like(Q)), given).result
