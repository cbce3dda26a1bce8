"""How fast a chain forgets where it started."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square
from liegroup_attn.algebra.chains import one_closed_class, rate_matrix, stationary
from liegroup_attn.algebra.exponential import expm
from liegroup_attn.errors import ConvergenceError, GeneratorError

__all__ = ["mixing_time", "spectral_gap"]

_MOST_DOUBLINGS = 64
_BISECTIONS = 36


def spectral_gap(generator: Tensor) -> Tensor:
    """Rate at which the slowest mode dies out: −Re λ of the eigenvalue of Q next to 0.

    0 with several closed classes, inf for a single state. Differentiable where that eigenvalue is simple.

    Args:
        generator: (..., N, N), the dense Q.

    Returns:
        (...,), ≥ 0, per unit of time.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, where values are visible.

    Example:
        >>> spectral_gap(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        tensor(4.)

    Source: [Levin2017]_, chapters 12 and 20.
    """
    Q = rate_matrix(generator)
    dtype = square("generator", generator).dtype
    if Q.size(-1) == 1:
        return torch.full(Q.shape[:-2], math.inf, dtype=dtype, device=Q.device)
    decay = -torch.linalg.eigvals(Q).real
    return decay.sort(-1).values[..., 1].clamp_min(0).to(dtype)


@torch.no_grad()
def mixing_time(generator: Tensor, tol: float = 0.25) -> Tensor:
    """Smallest t from which on every row of P(t) is within ``tol`` of π in total variation.

    The time is doubled until P(t) is mixed, then bisected by products of transition matrices. Not differentiable.

    Args:
        generator: (..., N, N), the dense Q.
        tol: total variation (half the sum of the absolute differences), in (0, 1).

    Returns:
        (...,): a mixed time, too large by less than 1e-10 of itself or of the shortest mean holding time, whichever
        is larger; inf with several closed classes.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, or tol outside (0, 1).
        ConvergenceError: the rates differ so much that rounding hides how the chain mixes.

    Example:
        >>> Q = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # ½e^{−2t} = ¼
        >>> mixing_time(Q)
        tensor(0.3466, dtype=torch.float64)

    Source: [Levin2017]_, chapters 4 and 20.
    """
    if not 0 < tol < 1:
        raise GeneratorError(f"tol: expected 0 < tol < 1, got {tol}; 0.25 is usual")
    dense = rate_matrix(generator)
    Q, mixes = dense.reshape(-1, *dense.shape[-2:]), one_closed_class(dense).flatten()
    found = torch.full_like(Q[:, 0, 0], math.inf)
    found[mixes] = _mixing_time(Q[mixes], tol)
    return found.reshape(dense.shape[:-2]).to(square("generator", generator).dtype)


def _mixing_time(Q: Tensor, tol: float) -> Tensor:
    """The same for (b, N, N) with one closed class each."""
    if Q.size(0) == 0:
        return Q.new_zeros(0)
    rest = stationary(Q)[:, None]  # (b, 1, N)

    def far(P: Tensor) -> Tensor:
        return (P - rest).abs().sum(-1).amax(-1) / 2 > tol

    fastest = (-Q.diagonal(dim1=-2, dim2=-1)).amax(-1)
    unmixed, mixed = torch.zeros_like(fastest), 1 / fastest.where(fastest > 0, 1)
    before, P = eye_like(Q).expand_as(Q), _transition(Q, mixed)  # of the unmixed time, of the one that may be mixed
    at_once = ~far(before)
    for _ in range(_MOST_DOUBLINGS):
        late = far(P)
        if not bool(late.any()):
            break
        unmixed, mixed = torch.where(late, mixed, unmixed), torch.where(late, 2 * mixed, mixed)
        before, P = _pick(late, P, before), _pick(late, _normalized(P @ P), P)
    else:
        raise ConvergenceError(
            f"generator, tol: expected rows of P(t) to come within {tol} of π, got none up to t = {float(mixed.max()):.1e}; "
            "the rates differ so much that rounding hides how the chain mixes, raise tol"
        )
    gap = mixed - unmixed
    for _ in range(_BISECTIONS):
        gap = gap / 2
        P = _normalized(before @ _transition(Q, gap))
        late = far(P)
        unmixed, before = torch.where(late, unmixed + gap, unmixed), _pick(late, P, before)
    return (unmixed + gap).masked_fill(at_once, 0)


def _pick(where: Tensor, these: Tensor, those: Tensor) -> Tensor:
    return torch.where(where[:, None, None], these, those)


def _transition(Q: Tensor, time: Tensor) -> Tensor:
    return _normalized(expm(time[:, None, None] * Q))


def _normalized(P: Tensor) -> Tensor:
    """Rounding put back: entries ≥ 0, rows sum to 1, so that errors of products add and never grow."""
    P = P.clamp_min(0)
    return P / P.sum(-1, keepdim=True)
