"""Rate matrices whose log-rates lie in a linear space, up to what rescaling states does."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from liegroup_attn.manifolds.checks import Finding, beyond, finding
from liegroup_attn.manifolds.rate_matrices import RateMatrices

__all__ = ["LogLinearRateMatrices"]


class LogLinearRateMatrices(RateMatrices):
    """Base of families of rate matrices whose chart is the projection Π of the log-rates on a linear space.

    What runs towards infinity is brought back on the line to the chart's origin, which stays in the space:
    entries of the chart are at most ``reach`` in size. What is beyond is no point.
    """

    by_entry = False  # a linear space is no product of its coordinates
    reach = 40.0

    @abstractmethod
    def flatten(self, c: Tensor) -> Tensor:
        """Π c: the nearest matrix in the chart's space, 0 where there is no transition."""

    def _within_reach(self, c: Tensor) -> Tensor:
        c = self.flatten(c.clamp(-1e30, 1e30))
        return c * (self.reach / c.abs().amax((-2, -1), keepdim=True).clamp(min=self.reach))

    def _beyond_reach(self, x: Tensor, atol: float, rtol: float) -> str | None:
        """A reason unless a projection would leave the coordinates of positive rates where they are."""
        c = self.chart(x)
        law = f"coordinates, logarithms of rates, must be within reach, ±{self.reach:g}"
        return beyond(law, c - self._within_reach(c), atol + rtol * c.abs())

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        _, reason = super()._check_point_on_manifold(x, atol=atol, rtol=rtol)
        return finding(reason or self._beyond_reach(x.detach().to(torch.float64), atol, rtol))

    def projx(self, x: Tensor) -> Tensor:
        """The matrix of the family with the nearest log-rates."""
        return self.from_chart(super().chart(super().projx(x)))

    def chart(self, x: Tensor) -> Tensor:
        """Log-rates, in the chart's space."""
        return self.flatten(super().chart(x))

    def from_chart(self, phi: Tensor) -> Tensor:
        """The rate matrix with these coordinates."""
        return super().projx(self._rates(self._within_reach(phi)).to(phi.dtype))

    def _rates(self, c: Tensor) -> Tensor:
        """Rates with coordinates c, wanted on the support only."""
        return c.exp()

    def push(self, x: Tensor, u: Tensor) -> Tensor:
        """Relative change of the rates, in the chart's space."""
        return self.flatten(super().push(x, u))

    def chart_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient by the log-rates, in the chart's space."""
        return self.flatten(super().chart_gradient(x, gradient))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The tangent vector with the nearest relative changes of the rates."""
        return self.lift(x, self.push(x, u))

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm of the quotients of rates, in the chart's space."""
        return self.flatten(super().difference(x, y))

    def move(self, x: Tensor, c: Tensor) -> Tensor:
        """φ⁻¹(φ(x) + c), on the family to rounding."""
        return self.from_chart(self.chart(x) + c)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic's point at time 1."""
        return self.move(x, self.push(x, u))

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """One number per matrix: a linear space is no product of its coordinates."""
        return self.inner(x, u, v, keepdim=True)
