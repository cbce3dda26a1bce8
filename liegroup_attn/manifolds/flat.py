"""Manifolds with one global chart that is an isometry: every verb is exact, and no step of any size leaves them."""

from __future__ import annotations

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

__all__ = ["FlatManifold"]


class FlatManifold(geoopt.Manifold):
    """A manifold isometric to a linear space by a chart φ, from which every verb follows.

    A subclass gives φ (``chart``), its inverse (``from_chart``), its derivative (``push``), the inverse of that
    (``lift``) and the gradient in the chart (``chart_gradient``). Geodesics are φ⁻¹ of straight lines, the logarithm
    and the distance are differences in the chart, parallel transport leaves chart vectors as they are. The manifold
    is complete: in finite precision ``from_chart`` must keep inside what has run towards infinity.

    Source: [Amari2016]_ (metric from a chart); [Absil2008]_ (the verbs).
    """

    reversible = True
    by_entry = False  # whether the axes of the chart mean something: adaptive optimizers then see each by itself
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def chart(self, x: Tensor) -> Tensor:
        """φ(x)."""
        raise NotImplementedError

    def from_chart(self, phi: Tensor) -> Tensor:
        """φ⁻¹(phi), kept inside in finite precision."""
        raise NotImplementedError

    def push(self, x: Tensor, u: Tensor) -> Tensor:
        """dφ_x(u): a tangent vector as a chart vector."""
        raise NotImplementedError

    def lift(self, x: Tensor, c: Tensor) -> Tensor:
        """dφ_x⁻¹(c): a chart vector as a tangent vector."""
        raise NotImplementedError

    def chart_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of f∘φ⁻¹ at φ(x) from the Euclidean gradient of f at x."""
        raise NotImplementedError

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """φ(y) − φ(x)."""
        return self.chart(y) - self.chart(x)

    def move(self, x: Tensor, c: Tensor) -> Tensor:
        """φ⁻¹(φ(x) + c); without grad mode, as in an optimizer, c may be used up."""
        return self.from_chart(self.chart(x) + c)

    def chart_squares(self, c: Tensor) -> Tensor:
        """What an adaptive optimizer scales a chart vector by: c², entry by entry or summed over a point."""
        return c.square() if self.by_entry else self._sum(c.square(), keepdim=True)

    def _sum(self, entries: Tensor, keepdim: bool) -> Tensor:
        return entries.sum(tuple(range(-self.ndim, 0)), keepdim=keepdim) if self.ndim else entries

    def _length(self, c: Tensor, keepdim: bool) -> Tensor:
        return torch.linalg.vector_norm(c, dim=tuple(range(-self.ndim, 0)), keepdim=keepdim) if self.ndim else c.abs()

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        a = self.push(x, u)
        return self._sum(a * (a if v is None else self.push(x, v)), keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return self._length(self.push(x, u), keepdim)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.lift(x, self.chart_gradient(x, u))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.move(x, self.push(x, u))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.expmap(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return self.lift(x, self.difference(x, y))

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return self._length(self.difference(x, y), keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return self._sum(self.difference(x, y).square(), keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return self.lift(y, self.push(x, v))

    @__scaling__(ScalingInfo(std=-1), "random")
    def random(  # noqa: D102
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        std: float = 1.0,
    ) -> geoopt.ManifoldTensor:
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "size")
        phi = torch.randn(*shape, dtype=dtype, device=device) * std
        return geoopt.ManifoldTensor(self.from_chart(phi), manifold=self)

    def origin(  # noqa: D102
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "size")
        phi = torch.zeros(*shape, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(self.from_chart(phi), manifold=self)
