"""The generator of an attention call: what the scores make, over heads, and what is added to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.generators.dense import DenseGenerator
from liegroup_attn.generators.softmax import SoftmaxGenerator
from liegroup_attn.generators.sums import HeadMixture
from liegroup_attn.tensors import fits

__all__ = ["joined_generator", "masked_as"]


def joined_generator(
    chain: SoftmaxGenerator,
    rate_fn: Callable[[Tensor], Tensor] | None = None,
    head_weights: Tensor | None = None,
    plus: Generator | None = None,
) -> Generator:
    """The generator along which ``lie_attention`` flows; arguments and errors as there."""
    generator: Generator = chain if rate_fn is None else _with_rates(chain, rate_fn)
    if head_weights is not None:
        generator = _over_heads(generator, head_weights)
    return generator if plus is None else generator + masked_as(chain, plus)


def _over_heads(generator: Generator, weights: Tensor) -> HeadMixture:
    heads = generator.batch_shape[-1] if generator.batch_shape else 0
    if weights.shape != (heads, heads):
        raise ShapeError(
            f"head_weights: expected ({heads}, {heads}), got {tuple(weights.shape)}; one row per head that flows, one "
            "column per head that is summed"
        )
    return HeadMixture(generator, weights)


def masked_as(chain: SoftmaxGenerator, plus: Generator) -> Generator:
    """The generator without the rates that the chain's mask hides: what it adds must not leak."""
    if not isinstance(plus, Generator):
        raise GeneratorError(
            f"plus: expected a Generator, got {type(plus).__name__}; wrap a matrix in DenseGenerator(Q)"
        )
    if plus.num_states != chain.num_states or not fits(plus.batch_shape, chain.batch_shape):
        raise ShapeError(
            f"plus: expected a generator on {chain.num_states} tokens with a batch that broadcasts to "
            f"{tuple(chain.batch_shape)}, got {plus.num_states} tokens and {tuple(plus.batch_shape)}; give one per head"
        )
    if chain.is_causal and plus.is_causal and not chain.has_mask:
        return plus
    hidden = chain.masked()
    if hidden is None:
        return plus
    eye = torch.eye(plus.num_states, dtype=plus.dense().dtype, device=hidden.device)
    rates = plus.inflow(eye.expand(*plus.batch_shape, -1, -1))  # with those of jumps back to their own token
    kept = DenseGenerator.from_rates(rates.masked_fill(hidden, 0))
    kept.is_causal = chain.is_causal
    return kept


def _with_rates(chain: SoftmaxGenerator, rate_fn: Callable[[Tensor], Tensor]) -> DenseGenerator:
    """Q = diag(ρ)(R − diag(R1)), R = rate_fn(scores), 0 where masked; scores, mask and ρ are those of the jump chain."""
    scores, masked = chain.scores(), chain.masked()  # (..., N, N)
    if masked is not None:  # a rate function may have no gradient at −inf
        scores = scores.masked_fill(masked, 0)
    rates = rate_fn(scores)
    if not isinstance(rates, Tensor) or rates.shape != scores.shape:
        got = tuple(rates.shape) if isinstance(rates, Tensor) else type(rates).__name__
        raise ShapeError(
            f"rate_fn: expected rates of the scores' shape {tuple(scores.shape)}, got {got}; map entry by entry"
        )
    if masked is not None:
        rates = rates.masked_fill(masked, 0)
    generator = DenseGenerator.from_rates(rates, jump_rates=chain.jump_rates)
    generator.is_causal, generator.dropout_p = chain.is_causal, chain.dropout_p
    return generator
