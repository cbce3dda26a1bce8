"""Vectors of positive numbers: rates or times."""

from __future__ import annotations

from torch import Tensor

from liegroup_attn.manifolds.interval import OpenInterval

__all__ = ["PositiveVectors"]


class PositiveVectors(OpenInterval):
    """Vectors (..., n) of positive rates or times with the metric Σ u_i v_i / x_i²: logarithms are the chart.

    ``OpenInterval()`` is the same geometry for single numbers; here a vector is one point, with one distance.
    Adaptive optimizers see every entry by itself.

    Example:
        >>> import torch
        >>> m = PositiveVectors()
        >>> m.dist(torch.ones(2), torch.tensor([3.0, 4.0]).exp())
        tensor(5.)

    Source: [Amari2016]_ (metric from a chart).
    """

    ndim = 1
    by_entry = True
    name = "PositiveVectors"

    def __init__(self) -> None:
        super().__init__()

    def extra_repr(self) -> str:  # noqa: D102
        return ""

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Entry by entry."""
        a = self.push(x, u)
        return a * (a if v is None else self.push(x, v))
