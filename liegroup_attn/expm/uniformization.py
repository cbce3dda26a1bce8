"""exp(tQ)V as a mixture of hops: over a formed S, or each one attention."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.expm.base import (
    MANY,
    HopMethod,
    flatten_batch,
    hop_matrix,
    mean_hops,
    mixture,
    per_row,
    working_dtype,
)
from liegroup_attn.expm.formed import formed_jumps
from liegroup_attn.expm.jumps import Plan, columns, iterates_of
from liegroup_attn.expm.polynomial import matrix_polynomial, products
from liegroup_attn.generators import Generator
from liegroup_attn.tensors import fits, without_autocast

__all__ = ["Uniformization"]

HOP_OVER_PRODUCT = 1.5  # seconds of a multiply-add in a hop over one in a product of matrices


class Uniformization(HopMethod):
    """E[exp(τQ)]V = Σ_k p_k PᵏV with P = I + Q/Λ; all terms are nonnegative, so nothing cancels.

    The weight beyond K is lumped on the last hop: rows sum to 1 at every K, and the error is at most
    P(hops > K) · osc(PᴷV), where osc is max − min per column.

    Args:
        tol: as in ``HopMethod``.
        max_terms: as in ``HopMethod``.
        formed: form P once and hop on it, with a reverse sweep that forms one N×N product for all hops (or, where that
            is cheaper, Σ p_k Pᵏ first: the same result); else never form N×N, each hop is one ``generator.apply``, for
            a ``SoftmaxGenerator`` one fused attention kernel.
        recompute: as in ``HopMethod``.

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

    drops_hops = True

    def __init__(
        self, tol: float | None = None, max_terms: int | None = None, *, formed: bool = False, recompute: bool = False
    ) -> None:
        super().__init__(tol, max_terms, recompute=recompute)
        self.formed = formed

    def _act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool) -> Tensor:
        theta = mean_hops(time, generator)
        hops = self.count_hops(theta, value.dtype, clock)
        weights = clock.hop_weights(theta, hops)  # (K + 1, ...)
        if self.formed and not generator.dropout_p:
            wide = value.to(working_dtype(value, hops))
            return _hop_on_formed(generator, wide, weights, first_hop).to(value.dtype)
        # The fused kernels stay with their dtype: beside the values goes a 1, which tells what many hops made of rows of 1.
        many = hops > MANY and not generator.dropout_p
        wide = value.to(working_dtype(value))
        terms = [torch.cat([wide, torch.ones_like(wide[..., :1])], -1) if many else wide]
        for _ in range(hops):
            terms.append(generator.hop(terms[-1]))
        mixed = mixture(weights, terms)
        mixed = mixed[..., :-1] / mixed[..., -1:].detach() if many else mixed
        return (generator.jump(mixed) if first_hop else mixed).to(value.dtype)


def _hop_on_formed(generator: Generator, value: Tensor, weights: Tensor, first_hop: bool) -> Tensor:
    chain, a = generator.uniformized()
    at_hand = generator.jumps_on_uniformized  # S itself is formed
    with without_autocast(value):
        batch = torch.broadcast_shapes(chain.shape[:-2], value.shape[:-2])
        if value.dtype != chain.dtype:  # rows of 1 to a rounding unit of the wider dtype
            chain = chain.to(torch.promote_types(chain.dtype, value.dtype))
            chain = chain / chain.sum(-1, keepdim=True).detach()
        wide = value.to(chain.dtype)
        one_a_matrix = fits(weights.shape[1:-1], chain.shape[:-2]) and not per_row(weights[0])
        # S Σ p_k X_k = Σ p_k J_k: the first hop is one jump more from each iterate, if one p serves all rows.
        joint = first_hop and at_hand and not per_row(weights[0])
        if one_a_matrix and matrix_first(len(weights) - 1, *value.shape[-2:]):
            joint = False
            mixed = matrix_polynomial(weights.to(chain.device), hop_matrix(chain, a)) @ wide
        else:
            mixed = mixture(weights, _terms(chain, a, wide, len(weights) - 1, joint, batch))
        if first_hop and at_hand and not joint:
            mixed = chain @ mixed
    return generator.jump(mixed) if first_hop and not at_hand else mixed


def _terms(chain: Tensor, a: Tensor | None, value: Tensor, hops: int, joint: bool, batch: torch.Size) -> list[Tensor]:
    """Iterates X_0 … X_K, or with ``joint`` the jumps J_0 … J_K from them; (..., N, D) each."""
    shape, plan = (*batch, *value.shape[-2:]), Plan(hops + joint, implicit=False)
    flat = flatten_batch(batch, value)
    if not plan.jumps:
        return [flat.view(shape)]
    if a is not None:
        a = flatten_batch(batch, a.to(chain.dtype).expand(*a.shape[:-1], chain.size(-1)), 1)
    jumps = formed_jumps(flatten_batch(batch, chain), a, flat, plan)
    terms = columns(jumps, plan.jumps) if joint else iterates_of(flat, jumps, a, plan)
    return [term.reshape(shape) for term in terms]


def matrix_first(hops: int, num_tokens: int, width: int) -> bool:
    """Whether Σ p_k Pᵏ is cheaper as a matrix (products of N×N) than applied hop by hop (products of N×D).

    The result is the same but for rounding. The factor is fitted to experiments/benchmarks/results.
    """
    return hops > 1 and (products(hops) + 1) * num_tokens < HOP_OVER_PRODUCT * hops * width
