"""Metrics of generators: how often a chain moves, how fast it mixes, where it rests; accumulated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liegroup_attn.algebra import detailed_balance_residual, expected_hops, mixing_time, spectral_gap
from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.metrics.averages import Mean
from liegroup_attn.metrics.chains import stationary_mass, where_defined
from liegroup_attn.metrics.mixing import indices

__all__ = ["DetailedBalanceResidual", "ExpectedHops", "MixingTime", "SpectralGap", "StationaryMass"]


class _OfGenerators(Mean):
    """A mean over generators.

    A generator that holds NaN or inf makes the mean NaN and raises nothing; what is clearly no rate matrix, by more than
    1 % of the largest entry, raises GeneratorError (where it is checked: on the CPU).
    """

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 0.0


class ExpectedHops(_OfGenerators):
    """Mean of :func:`liegroup_attn.algebra.expected_hops` over all starting tokens.

    ``update(generator, time=1.0)`` takes Q (..., N, N) and a number or a tensor broadcastable to (...,); ``compute()``
    returns a scalar ≥ 0, number of moves; NaN if a generator held NaN or inf, or if there was none.

    Args:
        exponential: take the exponential clock instead of the fixed one.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``, as the function.
        ShapeError: from ``update``, as the function.
        GeneratorError: from ``update``, as the function.

    Example:
        >>> metric = ExpectedHops()
        >>> metric.update(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), time=3.0)
        >>> metric.compute()
        tensor(3.)
    """

    def __init__(self, exponential: bool = False, **kwargs: Any) -> None:
        super().__init__(exponential, **kwargs)
        self.exponential = exponential

    def update(self, generator: Tensor, time: float | Tensor = 1.0) -> None:
        """Add the tokens of generators (..., N, N) with their times (...,)."""
        self._add(expected_hops(generator, time, exponential=self.exponential))


class SpectralGap(_OfGenerators):
    """Mean :func:`liegroup_attn.algebra.spectral_gap` of all generators.

    ``update(generator)`` takes Q (..., N, N); ``compute()`` returns a scalar ≥ 0, per unit of time. A generator with
    several closed classes counts as 0, one with a single state as inf; NaN if one held NaN or inf, or if there was none.

    Args:
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``: not floating point.
        ShapeError: from ``update``: not square, or without states.
        GeneratorError: from ``update``: clearly no rate matrix (checked on the CPU).

    Example:
        >>> metric = SpectralGap()
        >>> metric.update(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        >>> metric.compute()
        tensor(4.)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, generator: Tensor) -> None:
        """Add generators (..., N, N)."""
        self._add(where_defined(spectral_gap, generator))


class MixingTime(_OfGenerators):
    """Mean :func:`liegroup_attn.algebra.mixing_time` of all generators.

    ``update(generator)`` takes Q (..., N, N); ``compute()`` returns a scalar ≥ 0: inf if one has several closed classes;
    NaN if one held NaN or inf or has rates so far apart that rounding hides how it mixes, or if there was none.

    Args:
        tol: total variation from rest that counts as mixed, in (0, 1).
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``: not floating point.
        ShapeError: from ``update``: not square, or without states.
        GeneratorError: tol outside (0, 1); from ``update``: clearly no rate matrix (checked on the CPU).

    Example:
        >>> metric = MixingTime()
        >>> metric.update(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> metric.compute()
        tensor(0.3466)
    """

    is_differentiable = False

    def __init__(self, tol: float = 0.25, **kwargs: Any) -> None:
        if not 0 < tol < 1:
            raise GeneratorError(f"tol: expected 0 < tol < 1, got {tol}; 0.25 is usual")
        super().__init__(tol, **kwargs)
        self.tol = tol

    def update(self, generator: Tensor) -> None:
        """Add generators (..., N, N)."""
        self._add(where_defined(partial(_mixing_time, tol=self.tol), generator))


class StationaryMass(_OfGenerators):
    """Mean :func:`liegroup_attn.metrics.stationary_mass` of all generators.

    ``update(generator)`` takes Q (..., N, N); ``compute()`` returns a scalar from 0 to 1; NaN if one has several closed
    classes or held NaN or inf, or if there was none.

    Args:
        sink: index, or indices, of tokens; default the heaviest of each chain.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: ``sink`` is not made of integers; from ``update``, as the function.
        ShapeError: from ``update``, as the function.
        GeneratorError: from ``update``, as the function.

    Example:
        >>> metric = StationaryMass()
        >>> metric.update(torch.tensor([[-1.0, 1.0], [3.0, -3.0]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    plot_upper_bound = 1.0

    def __init__(self, sink: int | Iterable[int] | None = None, **kwargs: Any) -> None:
        tokens = None if sink is None else indices(sink)
        super().__init__(tokens, **kwargs)
        self.sink = tokens

    def update(self, generator: Tensor) -> None:
        """Add generators (..., N, N)."""
        self._add(stationary_mass(generator, self.sink))


class DetailedBalanceResidual(_OfGenerators):
    """Mean :func:`liegroup_attn.algebra.detailed_balance_residual` of all generators.

    ``update(generator)`` takes Q (..., N, N); ``compute()`` returns a scalar ≥ 0, moves per unit of time; NaN if one has
    several closed classes or held NaN or inf, or if there was none.

    Args:
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``: not floating point.
        ShapeError: from ``update``: not square, or without states.
        GeneratorError: from ``update``: clearly no rate matrix (checked on the CPU).

    Example:
        >>> metric = DetailedBalanceResidual()
        >>> metric.update(torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]]))
        >>> metric.compute()
        tensor(0.3333)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, generator: Tensor) -> None:
        """Add generators (..., N, N)."""
        self._add(where_defined(detailed_balance_residual, generator, one_class=True))


def _mixing_time(generator: Tensor, tol: float) -> Tensor:
    """``mixing_time``, NaN for those of the batch that never come so near, as far as rounding shows."""
    try:
        return mixing_time(generator, tol)
    except ConvergenceError:
        if generator.dim() == 2:
            return generator.new_full((), math.nan)
        return torch.stack([_mixing_time(one, tol) for one in generator])
