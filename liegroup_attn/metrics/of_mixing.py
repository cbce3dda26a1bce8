"""Metrics of mixing matrices: the functions of ``functional`` and ``mixing``, accumulated.

Keyword arguments beyond those named are torchmetrics' own, such as ``dist_sync_on_step``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from liegroup_attn.metrics.averages import Mean, MeanOfTransitions, Worst
from liegroup_attn.metrics.functional import attention_entropy, row_stochasticity_error
from liegroup_attn.metrics.mixing import distance_to_softmax, effective_rank, indices, sink_mass

__all__ = ["AttentionEntropy", "DistanceToSoftmax", "EffectiveRank", "RowStochasticityError", "SinkMass"]


class AttentionEntropy(MeanOfTransitions):
    """Mean of :func:`liegroup_attn.metrics.attention_entropy` over all rows, in nats.

    ``update(transition)`` takes (..., N, M) and raises as the function; ``compute()`` returns a scalar, NaN without rows.
    A negative entry makes the mean −inf.

    Example:
        >>> import torch
        >>> AttentionEntropy()(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(0.3466)
    """

    measure = staticmethod(attention_entropy)


class RowStochasticityError(Worst):
    """Largest :func:`liegroup_attn.metrics.row_stochasticity_error` of all matrices.

    ``update(transition)`` takes (..., N, M) and raises as the function; ``compute()`` returns a scalar ≥ 0: NaN if a matrix
    held NaN, or if there was none.

    Example:
        >>> import torch
        >>> metric = RowStochasticityError()
        >>> metric.update(torch.eye(3))
        >>> metric.update(torch.tensor([[1.25, -0.25], [0.5, 0.5]]))
        >>> metric.compute()
        tensor(0.2500)
    """

    def update(self, transition: Tensor) -> None:
        """Add the matrices of (..., N, M)."""
        self._add(row_stochasticity_error(transition))


class EffectiveRank(MeanOfTransitions):
    """Mean :func:`liegroup_attn.metrics.effective_rank` of all matrices.

    ``update(transition)`` takes (..., N, M) and raises as the function; ``compute()`` returns a scalar ≥ 1: NaN if a matrix
    held NaN or inf or was 0, or if there was none.

    Example:
        >>> import torch
        >>> EffectiveRank()(torch.stack([torch.eye(4), torch.full((4, 4), 0.25)]))  # 4 and 1
        tensor(2.5000)
    """

    plot_lower_bound = 1.0
    measure = staticmethod(effective_rank)


class SinkMass(MeanOfTransitions):
    """Mean :func:`liegroup_attn.metrics.sink_mass` of all matrices.

    ``update(transition)`` takes (..., N, M) and raises as the function; ``compute()`` returns a scalar from 0 to 1, NaN if a
    matrix held NaN, or if there was none.

    Args:
        sink: index, or indices, of columns; default the heaviest of each matrix. DtypeError for anything else.

    Example:
        >>> import torch
        >>> SinkMass(sink=0)(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(0.7500)
    """

    plot_upper_bound = 1.0
    measure = staticmethod(sink_mass)

    def __init__(self, sink: int | Iterable[int] | None = None, **kwargs: Any) -> None:
        tokens = None if sink is None else indices(sink)
        super().__init__(settings=(tokens,), **kwargs)
        self.sink = tokens


class DistanceToSoftmax(Mean):
    """Mean :func:`liegroup_attn.metrics.distance_to_softmax` of all matrices.

    ``update(transition, jump_chain)`` takes P and S, both (..., N, M), and raises as the function; ``compute()`` returns a
    scalar from 0 to 1, NaN if a matrix held NaN, or if there was none.

    Example:
        >>> import torch
        >>> DistanceToSoftmax()(torch.eye(2), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
        tensor(0.3750)
    """

    plot_upper_bound = 1.0

    def update(self, transition: Tensor, jump_chain: Tensor) -> None:
        """Add pairs of matrices, (..., N, M) each."""
        self._add(distance_to_softmax(transition, jump_chain))
