"""Where a chain rests, and whether its film runs backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.algebra._square import square
from liegroup_attn.algebra.chains import one_closed_class, rate_matrix, reachable
from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.tensors import fits, values_visible

__all__ = ["detailed_balance_residual", "is_reversible", "stationary_distribution"]


def stationary_distribution(generator: Tensor) -> Tensor:
    """The distribution π at rest, πQ = 0: each row of P(t) tends to it.

    States are eliminated one by one, without subtractions and in float64: every entry is exact to its last digits,
    however far apart the rates are. Differentiable, by rates that are 0 too (one-sided).

    Args:
        generator: (..., N, N), the dense Q, with one closed class: some state can be reached from every state.

    Returns:
        (..., N), entries ≥ 0 with sum 1; 0 for states that are left for ever.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, or several closed classes (where values are visible).

    Example:
        >>> stationary_distribution(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        tensor([0.7500, 0.2500])

    Source: [Grassmann1985]_; [Norris1997]_, sections 3.5 and 3.6.
    """
    return stationary(rate_matrix(generator)).to(square("generator", generator).dtype)


def detailed_balance_residual(generator: Tensor, distribution: Tensor | None = None) -> Tensor:
    """Largest net flow between two states at rest, ``max |π_i Q_ij − π_j Q_ji|``: 0 iff the chain is reversible.

    Args:
        generator: (..., N, N), the dense Q.
        distribution: (..., N), π; default ``stationary_distribution(generator)``.

    Returns:
        (...,), moves per unit of time. Differentiable almost everywhere.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or π of another shape.
        GeneratorError: not a rate matrix, or several closed classes and no π (where values are visible).

    Example:
        >>> turn = torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]])
        >>> detailed_balance_residual(turn)
        tensor(0.3333)

    Source: [Norris1997]_, section 3.7.
    """
    Q = rate_matrix(generator)
    pi = stationary(Q) if distribution is None else distribution
    check_shape("distribution", pi, least_rank=1, remedy="give one probability per state")
    if not fits(pi.shape, Q.shape[:-1]):
        raise ShapeError(
            f"distribution: expected a shape that broadcasts to {tuple(Q.shape[:-1])}, got {tuple(pi.shape)}; "
            "give one probability per state"
        )
    flow = pi.double()[..., None] * Q
    return (flow - flow.mT).abs().amax((-2, -1)).to(square("generator", generator).dtype)


def is_reversible(generator: Tensor, atol: float | None = None) -> tuple[bool, str | None]:
    """Say whether the chain at rest looks the same forwards and backwards: π_i Q_ij = π_j Q_ji.

    Args:
        generator: (..., N, N), every chain of the batch must pass; states that are left for ever have no say.
        atol: absolute tolerance on the flows; default 8 · N · eps · max|Q|.

    Returns:
        ``(True, None)`` or ``(False, reason)``.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, or several closed classes.

    Example:
        >>> is_reversible(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        (True, None)

    Source: [Norris1997]_, section 3.7.
    """
    Q = rate_matrix(generator).detach()
    if Q.numel() == 0:
        return True, None
    if atol is None:
        atol = 8 * Q.size(-1) * torch.finfo(generator.dtype).eps * float(Q.abs().max())
    flow = stationary(Q)[..., None] * Q
    net = (flow - flow.mT).abs().reshape(-1, *Q.shape[-2:])
    worst = float(net.max())
    if worst <= atol:
        return True, None
    i, j = divmod(int(net.amax(0).argmax()), Q.size(-1))
    return False, f"flows must balance within {atol:.1e}, got π_i Q_ij − π_j Q_ji = {worst:g} between {i} and {j}"


def stationary(Q: Tensor) -> Tensor:
    """π of a Q from ``rate_matrix``; GeneratorError on several closed classes, where values are visible."""
    if values_visible(Q) and not bool(one_closed_class(Q).all()):
        raise GeneratorError(
            "generator: expected one closed class, got several (no state can be reached from every state), so π is not "
            "unique; take them apart, or ask absorption_probabilities where the chain ends"
        )
    return eliminate(Q)


def eliminate(Q: Tensor) -> Tensor:
    """π by Gaussian elimination without subtractions: the last state is left out, its jumps go on to where they lead.

    A state that all others reach comes first, so that from each state left out there is a way to one kept.
    Meaningless with several closed classes.
    """
    n = Q.size(-1)
    first = reachable(Q).all(-2).int().argmax(-1, keepdim=True)  # (..., 1)
    states = torch.arange(n, device=Q.device)
    order = states.where(states > 0, first).where(states != first, 0)  # (..., N), swaps 0 and first
    chain = torch.take_along_dim(torch.take_along_dim(Q, order[..., None], -2), order[..., None, :], -1)
    visits = []  # to the state left out, for each visit to one kept
    for k in range(n - 1, 0, -1):
        onward = chain[..., k, :k]  # (..., k)
        visits.append(chain[..., :k, k] / onward.sum(-1, keepdim=True))
        chain = chain[..., :k, :k] + visits[-1][..., None] * onward[..., None, :]
    pi = torch.ones_like(Q[..., 0, :1])
    for share in reversed(visits):
        pi = torch.cat([pi, (pi * share).sum(-1, keepdim=True)], -1)
        pi = pi / pi.sum(-1, keepdim=True)
    return torch.take_along_dim(pi, order, -1)
