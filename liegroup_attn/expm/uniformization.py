"""exp(tQ)V as a Poisson (or geometric) mixture of hops, each one attention."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.expm.base import Method, working_dtype
from liegroup_attn.generators import Generator

__all__ = ["Uniformization"]


class Uniformization(Method):
    """E[exp(τQ)]V = Σ_k p_k PᵏV with P = I + Q/Λ; all terms are nonnegative, so nothing cancels.

    The weight beyond K is lumped on the last hop: rows sum to 1 at every K, and the error is at most
    P(hops > K) · osc(PᴷV), where osc is max − min per column. Never forms N×N for a ``SoftmaxGenerator``.

    Args:
        tol: largest P(hops > K); default the rounding unit of the input (1e-3 for half precision, whose attention is
            no more exact than that).
        max_terms: K. Alone, it is taken as it is: no look at the time, hence no wait for a GPU and no graph break.
            With ``tol``, the time must allow it.

    Raises:
        GeneratorError: tol outside (0, 1), max_terms < 1.
        ConvergenceError: both given and K hops do not reach ``tol``.

    Example:
        >>> from liegroup_attn import DenseGenerator, expm_multiply
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), method=Uniformization())
        tensor([[0.5677],
                [0.4323]])

    Source: [Jensen1953]_, [Moler2003]_.
    """

    def __init__(self, tol: float | None = None, max_terms: int | None = None) -> None:
        if tol is not None and not 0 < tol < 1:
            raise GeneratorError(f"tol: expected a probability in (0, 1), got {tol}; choose 1e-3 or smaller")
        if max_terms is not None and max_terms < 1:
            raise GeneratorError(f"max_terms: expected at least 1, got {max_terms}; pass None to let tol choose")
        self.tol = tol
        self.max_terms = max_terms

    def act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock) -> Tensor:  # noqa: D102
        bound = generator.rate_bound()
        theta = time * bound  # mean number of hops
        terms = self._terms(theta, value.dtype, clock)
        weights = clock.hop_weights(theta, terms)  # (K + 1, ...)
        dtype = working_dtype(value)
        hop = value.to(dtype)
        total = _row(weights[0], dtype) * hop
        for weight in weights[1:]:
            hop = hop + generator.apply(hop) / (bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound)
            total = total + _row(weight, dtype) * hop
        return total.to(value.dtype)

    def _terms(self, theta: Tensor, dtype: torch.dtype, clock: Clock) -> int:
        if self.tol is None and self.max_terms is not None:
            return self.max_terms
        tol = self.tol if self.tol is not None else _default_tol(dtype)
        terms = clock.terms(float(theta.detach().max()) if theta.numel() else 0.0, tol)
        if theta.requires_grad:  # at θ = 0 the value needs no hop, the gradient needs one
            terms = max(terms, 1)
        if self.max_terms is not None and terms > self.max_terms:
            raise ConvergenceError(
                f"max_terms: expected at least {terms} hops for tol={tol:g}, got {self.max_terms}; raise it, or leave tol=None"
            )
        return terms


def _default_tol(dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).eps, 1e-3)


def _row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 1 or N) → (..., 1 or N, 1); a number stays a number, on whatever device."""
    return weight.to(dtype).unsqueeze(-1) if weight.dim() else weight.to(dtype)
