"""Metrics of mixing matrices: the functions of ``functional`` and ``mixing``, accumulated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from liegroup_attn.metrics.averages import Mean, Worst
from liegroup_attn.metrics.functional import attention_entropy, row_stochasticity_error
from liegroup_attn.metrics.mixing import distance_to_softmax, effective_rank, indices, sink_mass

__all__ = ["AttentionEntropy", "DistanceToSoftmax", "EffectiveRank", "RowStochasticityError", "SinkMass"]


class AttentionEntropy(Mean):
    """Mean of :func:`liegroup_attn.metrics.attention_entropy` over all rows, in nats.

    ``update(transition)`` takes (..., N, M); ``compute()`` returns a scalar, NaN without rows. A negative entry makes the
    mean −inf.

    Args:
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``, as the function.
        ShapeError: from ``update``, as the function.

    Example:
        >>> import torch
        >>> metric = AttentionEntropy()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        >>> metric.compute()
        tensor(0.3466)
    """

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, transition: Tensor) -> None:
        """Add the rows of (..., N, M)."""
        self._add(attention_entropy(transition))


class RowStochasticityError(Worst):
    """Largest :func:`liegroup_attn.metrics.row_stochasticity_error` of all matrices.

    ``update(transition)`` takes (..., N, M); ``compute()`` returns a scalar ≥ 0: NaN if a matrix held NaN, or if there was
    none.

    Args:
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``, as the function.
        ShapeError: from ``update``, as the function.

    Example:
        >>> import torch
        >>> metric = RowStochasticityError()
        >>> metric.update(torch.eye(3))
        >>> metric.update(torch.tensor([[1.25, -0.25], [0.5, 0.5]]))
        >>> metric.compute()
        tensor(0.2500)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, transition: Tensor) -> None:
        """Add the matrices of (..., N, M)."""
        self._add(row_stochasticity_error(transition))


class EffectiveRank(Mean):
    """Mean :func:`liegroup_attn.metrics.effective_rank` of all matrices.

    ``update(transition)`` takes (..., N, M); ``compute()`` returns a scalar ≥ 1: NaN if a matrix held NaN or inf or was 0,
    or if there was none.

    Args:
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``, as the function.
        ShapeError: from ``update``, as the function.

    Example:
        >>> import torch
        >>> metric = EffectiveRank()
        >>> metric.update(torch.stack([torch.eye(4), torch.full((4, 4), 0.25)]))  # 4 and 1
        >>> metric.compute()
        tensor(2.5000)
    """

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, transition: Tensor) -> None:
        """Add the matrices of (..., N, M)."""
        self._add(effective_rank(transition))


class SinkMass(Mean):
    """Mean :func:`liegroup_attn.metrics.sink_mass` of all matrices.

    ``update(transition)`` takes (..., N, M); ``compute()`` returns a scalar from 0 to 1, NaN if a matrix held NaN, or if
    there was none.

    Args:
        sink: index, or indices, of columns; default the heaviest of each matrix.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: ``sink`` is not made of integers; from ``update``, as the function.
        ShapeError: from ``update``, as the function.

    Example:
        >>> import torch
        >>> metric = SinkMass(sink=0)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, sink: int | Iterable[int] | None = None, **kwargs: Any) -> None:
        tokens = None if sink is None else indices(sink)
        super().__init__(tokens, **kwargs)
        self.sink = tokens

    def update(self, transition: Tensor) -> None:
        """Add the matrices of (..., N, M)."""
        self._add(sink_mass(transition, self.sink))


class DistanceToSoftmax(Mean):
    """Mean :func:`liegroup_attn.metrics.distance_to_softmax` of all matrices.

    ``update(transition, jump_chain)`` takes P and S, both (..., N, M); ``compute()`` returns a scalar from 0 to 1, NaN if a
    matrix held NaN, or if there was none.

    Args:
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        DtypeError: from ``update``, as the function.
        ShapeError: from ``update``, as the function.

    Example:
        >>> import torch
        >>> metric = DistanceToSoftmax()
        >>> metric.update(torch.eye(2), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
        >>> metric.compute()
        tensor(0.3750)
    """

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, transition: Tensor, jump_chain: Tensor) -> None:
        """Add pairs of matrices, (..., N, M) each."""
        self._add(distance_to_softmax(transition, jump_chain))
