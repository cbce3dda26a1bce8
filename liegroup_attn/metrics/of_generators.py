"""Metrics of generators: how often a chain moves, how fast it mixes, where it rests; accumulated.

A generator that holds NaN or inf makes the mean NaN and raises nothing; what is clearly no rate matrix, by more than 1 % of
the largest entry, raises GeneratorError (where it is checked: on the CPU). Keyword arguments beyond those named are
torchmetrics' own, such as ``dist_sync_on_step``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liegroup_attn.algebra import detailed_balance_residual, expected_hops, mixing_time, spectral_gap
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.metrics.averages import Mean, MeanOfGenerators
from liegroup_attn.metrics.chains import stationary_mass, where_defined
from liegroup_attn.metrics.mixing import indices

__all__ = ["DetailedBalanceResidual", "ExpectedHops", "MixingTime", "SpectralGap", "StationaryMass"]


class ExpectedHops(Mean):
    """Mean of :func:`liegroup_attn.algebra.expected_hops` over all starting tokens.

    ``update(generator, time=1.0)`` takes Q (..., N, N) and a number or a tensor broadcastable to (...,), and raises as the
    function; ``compute()`` returns a scalar ≥ 0, number of moves; NaN if a generator held NaN or inf, or if there was none.

    Args:
        exponential: take the exponential clock instead of the fixed one.

    Example:
        >>> ExpectedHops()(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), time=3.0)
        tensor(3.)
    """

    def __init__(self, exponential: bool = False, **kwargs: Any) -> None:
        super().__init__(settings=(exponential,), **kwargs)
        self.exponential = exponential

    def update(self, generator: Tensor, time: float | Tensor = 1.0) -> None:
        """Add the tokens of generators (..., N, N) with their times (...,)."""
        self._add(expected_hops(generator, time, exponential=self.exponential))


class SpectralGap(MeanOfGenerators):
    """Mean :func:`liegroup_attn.algebra.spectral_gap` of all generators.

    ``update(generator)`` takes Q (..., N, N); DtypeError, ShapeError or GeneratorError for what is no rate matrix.
    ``compute()`` returns a scalar ≥ 0, per unit of time. A generator with several closed classes counts as 0, one with a
    single state as inf; NaN if one held NaN or inf, or if there was none.

    Example:
        >>> SpectralGap()(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        tensor(4.)
    """

    measure = staticmethod(partial(where_defined, spectral_gap))


class MixingTime(Mean):
    """Mean :func:`liegroup_attn.algebra.mixing_time` of all generators.

    ``update(generator)`` takes Q (..., N, N); DtypeError, ShapeError or GeneratorError for what is no rate matrix.
    ``compute()`` returns a scalar ≥ 0: inf if one has several closed classes; NaN if one held NaN or inf or has rates so far
    apart that rounding hides how it mixes, or if there was none.

    Args:
        tol: total variation from rest that counts as mixed, in (0, 1), or GeneratorError.

    Example:
        >>> MixingTime()(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        tensor(0.3466)
    """

    is_differentiable = False

    def __init__(self, tol: float = 0.25, **kwargs: Any) -> None:
        if not 0 < tol < 1:
            raise GeneratorError(f"tol: expected 0 < tol < 1, got {tol}; 0.25 is usual")
        super().__init__(settings=(tol,), **kwargs)
        self.tol = tol

    def update(self, generator: Tensor) -> None:
        """Add generators (..., N, N)."""
        self._add(where_defined(partial(_mixing_time, tol=self.tol), generator))


class StationaryMass(MeanOfGenerators):
    """Mean :func:`liegroup_attn.metrics.stationary_mass` of all generators.

    ``update(generator)`` takes Q (..., N, N) and raises as the function; ``compute()`` returns a scalar from 0 to 1; NaN if
    one has several closed classes or held NaN or inf, or if there was none.

    Args:
        sink: index, or indices, of tokens; default the heaviest of each chain. DtypeError for anything else.

    Example:
        >>> StationaryMass()(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        tensor(0.7500)
    """

    plot_upper_bound = 1.0
    measure = staticmethod(stationary_mass)

    def __init__(self, sink: int | Iterable[int] | None = None, **kwargs: Any) -> None:
        tokens = None if sink is None else indices(sink)
        super().__init__(settings=(tokens,), **kwargs)
        self.sink = tokens


class DetailedBalanceResidual(MeanOfGenerators):
    """Mean :func:`liegroup_attn.algebra.detailed_balance_residual` of all generators.

    ``update(generator)`` takes Q (..., N, N); DtypeError, ShapeError or GeneratorError for what is no rate matrix.
    ``compute()`` returns a scalar ≥ 0, moves per unit of time; NaN if one has several closed classes or held NaN or inf, or
    if there was none.

    Example:
        >>> DetailedBalanceResidual()(torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]]))
        tensor(0.3333)
    """

    measure = staticmethod(partial(where_defined, detailed_balance_residual, one_class=True))


def _mixing_time(generator: Tensor, tol: float) -> Tensor:
    """``mixing_time``, NaN for those of the batch that never come so near, as far as rounding shows."""
    try:
        return mixing_time(generator, tol)
    except ConvergenceError:
        if generator.dim() == 2:
            return generator.new_full((), math.nan)
        return torch.stack([_mixing_time(one, tol) for one in generator])
