"""exp(tQ)V in closed form when the jump chain has low rank: an r×r job between two thin products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm.base import Method, longest, per_row, working_dtype
from liegroup_attn.expm.dense import resolvent
from liegroup_attn.generators import Generator, LowRankGenerator
from liegroup_attn.tensors import without_autocast

__all__ = ["LowRank"]

_TERMS = 20  # Poisson(1) leaves less than 1e-18 beyond


class LowRank(Method):
    """E[exp(τQ)]V for Q = λ(UWᵀ − I) that is not causal: exact at every time, O(N r D + r³ log tλ) work, no N×N.

    A token jumps by way of a feature, so all hops after the first are hops of the r×r chain M = WᵀU from feature to
    feature: (UWᵀ)ᵏ⁺¹ = U Mᵏ Wᵀ. A fixed clock needs e^{−θ}φ₁(θM), θ = tλ, here by doubling the time of nonnegative
    matrices, so that nothing overflows or cancels; resolvents are Woodbury's identity. The r×r job runs in
    float64; a time on the GPU is waited for.

    Raises:
        GeneratorError: a generator that is not a ``LowRankGenerator``, is causal, or has one rate per token; a clock
            that is neither fixed nor made of resolvents.
        ShapeError: one time per query row.

    Example:
        >>> from liegroup_attn import LowRankGenerator, expm_multiply
        >>> Q = LowRankGenerator(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), method=LowRank())
        tensor([[0.5677],
                [0.4323]])

    Source: docs/mathematics, "Low rank, linear time"; [Moler2003]_ (scaling and squaring).
    """

    @staticmethod
    def takes(generator: Generator) -> bool:
        """Whether there is a closed form: of a low rank that is not causal, with one rate a matrix."""
        low = isinstance(generator, LowRankGenerator) and not generator.has_rate_per_token
        return low and not generator.is_causal

    def act(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> Tensor:
        generator, theta = _check(generator, time)
        dtype = torch.promote_types(generator.sources.dtype, working_dtype(value))
        with without_autocast(value):
            sources, targets, wide = (x.to(dtype) for x in (generator.sources, generator.targets, value))
            still = generator.still  # such rows keep their value; what jumps there is absorbed

            # In units of each feature's mass (0: no token has it) the rows of M sum to 1, but for what is absorbed.
            mass = targets.sum(-2).unsqueeze(-1).to(torch.float64)  # (..., r, 1)
            unit = mass.detach().where(mass > 0, 1)
            share = (mass > 0).to(torch.float64)
            absorbed = (targets.mT @ still.to(dtype)).to(torch.float64) / unit
            chain = (targets.mT @ sources).to(torch.float64) * (unit.mT / unit)  # (..., r, r)
            chain = chain * _correction(share - absorbed, chain @ share)
            # One more state for what is absorbed. Rows then have sums that are known, over features that have mass: rounding
            # cannot leave them, after however many hops.
            chain = F.pad(torch.cat([chain, absorbed], -1), (0, 0, 0, 1))
            chain = chain + F.pad(chain.new_ones(1, 1), (chain.size(-1) - 1, 0, chain.size(-1) - 1, 0))
            kept, *found = _mixing(chain, F.pad(share, (0, 0, 0, 1), value=1.0), theta, clock)
            moving, resting = (x[..., :-1, :-1] for x in found)
            # A feature without mass has a row of rounding, which must not be brought to 1.
            correction = _correction((1 - kept) * share, moving @ (share - absorbed) + resting @ absorbed)

            for _ in range(clock.resolvents or 1):
                from_moving = targets.mT @ wide.masked_fill(still, 0)  # (..., r, D)
                from_still = targets.mT @ wide.masked_fill(~still, 0)
                features = unit * correction * (moving @ (from_moving / unit) + resting @ (from_still / unit))
                wide = torch.where(still, wide, kept.to(dtype) * wide + sources @ features.to(dtype))
        mixed = wide.to(value.dtype)
        return generator.jump(mixed) if first_hop else mixed


def _check(generator: Generator, time: Tensor) -> tuple[LowRankGenerator, Tensor]:
    """The generator, and θ = tλ as (..., 1, 1) in float64; raise where there is no closed form."""
    if not isinstance(generator, LowRankGenerator):
        raise GeneratorError(
            f"generator: expected a LowRankGenerator for LowRank, got {type(generator).__name__}; use Uniformization()"
        )
    if generator.is_causal:
        raise GeneratorError(
            "generator: expected is_causal=False for LowRank, got True; a causal S is not of low rank, use Uniformization()"
        )
    rate = torch.as_tensor(generator.jump_rate, dtype=torch.float64, device=generator.sources.device)
    if per_row(rate):
        raise GeneratorError(
            f"jump_rate: expected one rate per matrix, (..., 1), for LowRank, got {tuple(rate.shape)}; use Uniformization()"
        )
    if per_row(time):
        raise ShapeError(
            f"time: expected one time per matrix, (..., 1), for LowRank, got {tuple(time.shape)}; use Uniformization()"
        )
    theta = torch.atleast_1d(time.to(rate) * rate).clamp_max(1e300)  # beyond, nothing changes but what overflows
    return generator, theta.unsqueeze(-1)


def _correction(wanted: Tensor, got: Tensor) -> Tensor:
    """What brings rows to their known sums: 1 up to rounding, hence without a gradient."""
    return (wanted / got.where(got > 0, 1)).where((got > 0) & (wanted > 0), 1).detach()


def _mixing(chain: Tensor, sums: Tensor, theta: Tensor, clock: Clock) -> tuple[Tensor, Tensor, Tensor]:
    """p₀, A, B of one resolvent, or of the fixed clock, with Y = p₀V + U(A WᵀV_moving + B WᵀV_still) for rows that move; A, B are (..., r, r), ≥ 0."""
    if isinstance(clock, FixedClock):
        return _fixed(chain, sums, theta)
    if clock.resolvents is not None:
        theta = theta / clock.resolvents
        mixing = resolvent(chain, theta, sums=sums)
        return 1 / (1 + theta), theta / (1 + theta) * mixing, theta * mixing
    raise GeneratorError(
        f"clock: expected FixedClock, ExponentialClock or ErlangClock for LowRank, got {clock!r}; use method=Uniformization()"
    )


def _fixed(chain: Tensor, sums: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A = ∫₀^θ e^{−(θ−s)} e^{s(M−I)} ds = e^{−θ} θ φ₁(θM) and B = ∫₀^θ e^{s(M−I)} ds: a Poisson sum, then doublings."""
    most = longest(theta)
    doublings = max(0, math.ceil(math.log2(most))) if most > 0 else 0
    weights = FixedClock().hop_weights(theta * 2.0**-doublings, _TERMS)  # (K + 1, ..., 1, 1)
    beyond = weights.flip(0).cumsum(0).flip(0)  # P(hops ≥ k)
    powers = [torch.eye(chain.size(-1), dtype=chain.dtype, device=chain.device).expand_as(chain)]
    for _ in range(_TERMS - 1):
        powers.append(powers[-1] @ chain)
    flow, moving, resting = (
        sum((w * power for w, power in zip(law, powers, strict=False)), torch.zeros_like(chain))
        for law in (weights, weights[1:], beyond[1:])
    )  # flow = e^{h(M−I)} with h = θ / 2^doublings
    kept = weights[0]
    for _ in range(doublings):
        moving = kept * moving + moving @ flow
        resting = resting + resting @ flow
        flow = flow @ flow
        flow = flow * _correction(sums, flow @ sums)
        kept = kept * kept
    return kept, moving, resting
