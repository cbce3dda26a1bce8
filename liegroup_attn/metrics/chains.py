"""Measures of generators that answer NaN where a monitor must not raise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from liegroup_attn.algebra import exit_rates, stationary_distribution
from liegroup_attn.algebra.chains import one_closed_class
from liegroup_attn.metrics.mixing import mass_on

__all__ = ["stationary_mass"]


def stationary_mass(generator: Tensor, sink: int | Iterable[int] | None = None) -> Tensor:
    """Largest entry of the stationary distribution π, or what π gives to the given tokens: where mixing for ever ends.

    1 for an absorbing state that all others reach, such as the first token of a causal generator; 1/N at least.

    Args:
        generator: (..., N, N), the dense Q.
        sink: index, or indices, of tokens, negative ones from the end; their masses add, each counts once. Default: the
            heaviest token of each chain.

    Returns:
        (...,), between 0 and 1; NaN for a generator of the batch with several closed classes (π is not unique, and
        :func:`liegroup_attn.algebra.stationary_distribution` would raise), or that holds NaN or inf.

    Raises:
        DtypeError: ``generator`` is not floating point, or ``sink`` not made of integers.
        ShapeError: not square, without states, or a token that is not there.
        GeneratorError: a finite matrix of the batch is no rate matrix, by more than 1 % of the largest entry (checked on
            the CPU).

    Example:
        >>> Q = torch.tensor([[[-1.0, 1.0], [3.0, -3.0]], [[0.0, 0.0], [0.0, 0.0]]])  # the second never moves
        >>> stationary_mass(Q)
        tensor([0.7500,    nan])
        >>> stationary_mass(Q, sink=1)
        tensor([0.2500,    nan])

    Source: [Norris1997]_, section 3.5.
    """
    pi = where_defined(stationary_distribution, generator, one_class=True)  # (..., N)
    return mass_on(pi, sink)


def where_defined(function: Callable[[Tensor], Tensor], generator: Tensor, *, one_class: bool = False) -> Tensor:
    """A function of generators, NaN for those of the batch that hold NaN or inf; for no others does it see them.

    Rows sum to 0 anew, in float64, so that a generator may come from half precision.

    Args:
        function: (..., N, N) in float64 → (...,) or (..., N).
        generator: (..., N, N), the dense Q.
        one_class: NaN, too, where there are several closed classes.

    Returns:
        As the function, in the generator's dtype, in float32 at least.
    """
    exit_rates(generator)  # refuses what is clearly no generator
    n = generator.size(-1)
    states = torch.eye(n, dtype=torch.float64, device=generator.device)
    defined = generator.isfinite().flatten(-2).all(-1)  # (...,)
    rates = generator.double().masked_fill(states.bool(), 0).clamp_min(0)
    if one_class:
        defined = defined & one_closed_class(rates.masked_fill(~defined[..., None, None], 0))
    Q = torch.where(defined[..., None, None], rates - torch.diag_embed(rates.sum(-1)), 1 / max(n, 1) - states)
    found = function(Q)
    undefined = ~defined if found.dim() == defined.dim() else ~defined[..., None]
    return found.masked_fill(undefined, math.nan).to(torch.promote_types(generator.dtype, torch.float32))
