"""exp(tQ) of small dense matrices by scaling and squaring with nonnegative terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm.base import HopMethod, hop_matrix, longest, mean_hops, mix_by, per_row
from liegroup_attn.expm.polynomial import matrix_polynomial, products
from liegroup_attn.generators import Generator
from liegroup_attn.tensors import without_autocast

__all__ = ["ScalingSquaring", "squaring_plan"]


class ScalingSquaring(HopMethod):
    """exp(tQ) = (Σ_k Pois(k; θ/2ˢ) Pᵏ)^(2ˢ) with P = I + Q/Λ: every factor is a stochastic matrix.

    No term is negative, so nothing cancels and rows sum to 1 at every degree; costs about log₂θ + 4 products of N×N
    where hops cost θ + 4√θ of N×D.

    Args:
        tol: largest error of a row, in total variation; default the rounding unit of the input.
        max_theta: largest θ that the number of squarings shall allow for. Given, the time is not looked at: no wait
            for a GPU, no graph break.

    Raises:
        GeneratorError: tol outside (0, 1), or another than the fixed clock.
        ShapeError: one time per query row.

    Example:
        >>> from liegroup_attn import DenseGenerator, expm_multiply
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), method=ScalingSquaring())
        tensor([[0.5677],
                [0.4323]])

    Source: [Moler2003]_, methods 3 and 19; [Jensen1953]_.
    """

    def __init__(self, tol: float | None = None, *, max_theta: float | None = None) -> None:
        super().__init__(tol)
        self.max_theta = max_theta

    def _act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool) -> Tensor:
        return mix_by(self.matrix(generator, time, clock), generator, value, first_hop)

    def matrix(self, generator: Generator, time: Tensor, clock: Clock) -> Tensor:
        """exp(tQ), (..., N, N), float32 or float64; arguments and errors as in ``act``."""
        if not isinstance(clock, FixedClock):  # only exp(tQ) is the square of exp(tQ/2)
            raise GeneratorError(
                f"clock: expected FixedClock() for ScalingSquaring, got {clock!r}; use Uniformization()"
            )
        if per_row(time):
            raise ShapeError(
                f"time: expected one time per head, (..., 1), for ScalingSquaring, got {tuple(time.shape)}; use Uniformization()"
            )
        theta = mean_hops(time, generator)
        chain = hop_matrix(*generator.uniformized())
        with without_autocast(chain):
            tol = torch.finfo(chain.dtype).eps if self.tol is None else self.tol
            degree, squarings = squaring_plan(longest(theta) if self.max_theta is None else self.max_theta, tol)
            weights = clock.hop_weights(scaled(theta, squarings), degree).to(chain.device)
            return squared(matrix_polynomial(weights, chain), squarings)


def scaled(theta: Tensor, squarings: int) -> Tensor:
    """θ/2ˢ; in two factors, of which no number of squarings makes a 0."""
    return theta * 2.0 ** -(squarings // 2) * 2.0 ** -(squarings - squarings // 2)


def squared(mixing: Tensor, times: int) -> Tensor:
    """A stochastic matrix to the power 2ˢ."""
    for _ in range(times):
        mixing = mixing @ mixing
        # Squaring doubles the error of a row sum, the only one that would grow; it is known, so put back.
        mixing = mixing / mixing.sum(-1, keepdim=True)
    return mixing


def squaring_plan(theta: float, tol: float) -> tuple[int, int]:
    """Degree and number of squarings of least cost, counted in products of N×N.

    Args:
        theta: largest mean number of hops.
        tol: largest error; 2ˢ tails of the Poisson law must stay under it.

    Returns:
        ``(degree, squarings)``.

    Raises:
        GeneratorError: θ is not finite.

    Example:
        >>> squaring_plan(16.0, 1e-7)
        (11, 4)
    """
    if not math.isfinite(theta):
        raise GeneratorError(
            f"time: expected a finite mean number of hops, got {theta:g}; check the time and the rates"
        )
    best = (math.inf, 0, 0)
    squarings = max(0, math.ceil(math.log2(max(theta, 1e-300))) - 2)
    while squarings < best[0]:  # each further one costs a product, and any number is reached in the end
        log_part = math.log(max(theta, 1e-300)) - squarings * math.log(2)
        part = math.exp(log_part)
        for degree in (2, 3, 5, 8, 11):  # the highest for their number of products
            # The tail of Pois(θ/2ˢ) past the degree is under its first term for θ/2ˢ ≤ 4 … but for a factor below.
            log_term = (degree + 1) * log_part - part - math.lgamma(degree + 2)
            log_tail = log_term - math.log1p(-min(part / (degree + 2), 0.9))
            if log_tail + squarings * math.log(2) <= math.log(tol):
                best = min(best, (products(degree) + squarings, degree, squarings))
                break
        squarings += 1
    return best[1], best[2]
