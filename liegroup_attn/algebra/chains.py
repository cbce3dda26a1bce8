"""The chain that a rate matrix drives: which states it reaches, and how often it moves."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.algebra._square import eye_like, square
from liegroup_attn.algebra.exponential import expm
from liegroup_attn.algebra.membership import is_rate_matrix
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.tensors import values_visible

__all__ = ["exit_rates", "expected_hops"]


def exit_rates(generator: Tensor) -> Tensor:
    """Rate at which the chain leaves each token, −Q_ii = λ_i(1 − S_ii).

    Args:
        generator: (..., N, N), the dense Q.

    Returns:
        (..., N), moves per unit of time; NaN and inf are passed on.

    Raises:
        DtypeError: not floating point.
        ShapeError: ``generator`` is not square.
        GeneratorError: a finite matrix of the batch is no rate matrix, by more than 1 % of the largest entry (checked on
            the CPU).

    Example:
        >>> exit_rates(torch.tensor([[-2.0, 2.0], [0.0, 0.0]]))
        tensor([2., 0.])

    Source: [Norris1997]_, section 2.6.
    """
    diagonal = square("generator", generator).diagonal(dim1=-2, dim2=-1)  # (..., N)
    _refuse_others(generator)
    return 0 - diagonal  # never −0


def expected_hops(generator: Tensor, time: float | Tensor = 1.0, *, exponential: bool = False) -> Tensor:
    """Expected number of moves of the chain until its clock stops, for every starting token.

    A move is a jump to *another* token: hops of the jump chain that stay (S_ii) are not counted. With exit
    rates q it is ∫₀ᵗ e^{sQ} q ds on the fixed clock, (I − tQ)⁻¹ t q on the exponential one; computed in float64.

    Args:
        generator: (..., N, N), the dense Q.
        time: float, or a tensor broadcastable to (...,); finite, ≥ 0; the clock's (mean) time.
        exponential: take the exponential clock instead of the fixed one.

    Returns:
        (..., N), number of moves; NaN for a generator of the batch that holds NaN or inf.

    Raises:
        DtypeError: not floating point.
        ShapeError: ``generator`` is not square, or ``time`` does not broadcast to its batch.
        GeneratorError: ``time`` is negative or not finite (checked for Python numbers and CPU tensors); a finite matrix
            of the batch is no rate matrix, by more than 1 % of the largest entry (checked on the CPU).

    Example:
        >>> Q = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # leaves at rate 1 from everywhere
        >>> expected_hops(Q, 3.0)
        tensor([3., 3.])

    Source: [Higham2008]_, chapter 10 (integrals from the exponential of a block matrix).
    """
    dtype = square("generator", generator).dtype
    _refuse_others(generator)
    batch, n = generator.shape[:-2], generator.shape[-1]
    tq = generator.double() * _check_time(time, batch, generator.device)[..., None, None]  # (..., N, N)
    finite = tq.isfinite().flatten(-2).all(-1)[..., None]  # (..., 1): one item's NaN stays its own
    tq = tq.masked_fill(~finite[..., None], 0.0)
    exits = -tq.diagonal(dim1=-2, dim2=-1)[..., None]  # (..., N, 1)
    if exponential:
        hops = torch.linalg.solve(eye_like(tq) - tq, exits)[..., 0]
    else:
        # exp([[tQ, tq], [0, 0]]) holds the integral in its last column.
        augmented = F.pad(torch.cat([tq, exits], -1), (0, 0, 0, 1))  # (..., N + 1, N + 1)
        hops = expm(augmented)[..., :n, n]
    return hops.masked_fill(~finite, math.nan).to(dtype)


def rate_matrix(generator: Tensor) -> Tensor:
    """Q in float64, made from its rates alone, so that rows sum to 0 as exactly as can be.

    Raises:
        DtypeError: not floating point.
        ShapeError: not square, or without states.
        GeneratorError: not a rate matrix, where values are visible.
    """
    wide = square("generator", generator).double()
    if wide.size(-1) == 0:
        raise ShapeError(f"generator: expected N ≥ 1 states, got shape {tuple(generator.shape)}; give it a state")
    if values_visible(wide):
        ok, reason = is_rate_matrix(generator)
        if not ok:
            raise GeneratorError(f"generator: expected a rate matrix, got one that fails: {reason}; use project_cone")
    rates = wide.masked_fill(eye_like(wide).bool(), 0).clamp_min(0)
    return rates - torch.diag_embed(rates.sum(-1))


def _refuse_others(generator: Tensor) -> None:
    """GeneratorError for what is clearly no generator; NaN of an item stays its own, rounding is left alone."""
    if not values_visible(generator):
        return
    finite = generator.detach()[generator.isfinite().flatten(-2).all(-1)]  # (b, N, N)
    ok, reason = is_rate_matrix(finite, 0.01 * float(finite.abs().max()) if finite.numel() else None)
    if not ok:
        raise GeneratorError(f"generator: expected a rate matrix, got one that fails: {reason}; use project_cone")


def reachable(Q: Tensor) -> Tensor:
    """Which states can be reached from which: the reflexive, transitive closure of the positive rates, (..., N, N)."""
    paths = (Q.detach() > 0).float() + eye_like(Q).float()
    for _ in range(max(1, (Q.size(-1) - 1).bit_length())):
        paths = (paths @ paths > 0).float()
    return paths.bool()


def one_closed_class(Q: Tensor) -> Tensor:
    """Whether some state can be reached from every state, (...,)."""
    return reachable(Q).all(-2).any(-1)


def _check_time(time: float | Tensor, batch: torch.Size, device: torch.device) -> Tensor:
    """The time in float64 on ``device``, in a shape that broadcasts to ``batch``."""
    times = torch.as_tensor(time, dtype=torch.float64)
    if times.device.type == "cpu" and not ((times >= 0) & times.isfinite()).all():
        raise GeneratorError(f"time: expected finite numbers ≥ 0, got {time}; a chain does not run backwards")
    sizes = zip(reversed(times.shape), reversed(batch), strict=False)
    if times.dim() > len(batch) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ShapeError(
            f"time: expected a shape that broadcasts to the generator's batch {tuple(batch)}, "
            f"got {tuple(times.shape)}; expand the generator for several times at once"
        )
    return times.to(device)
