"""Stochastic matrices with positive entries, under the Fisher metric."""

from __future__ import annotations

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from liegroup_attn.manifolds.checks import Finding, beyond, finding, not_finite, not_positive

__all__ = ["StochasticMatrices"]


class StochasticMatrices(geoopt.Manifold):
    """Matrices (..., N, M) with positive entries whose rows sum to 1, in the Fisher metric Σ u_ij v_ij / p_ij.

    z = √p maps every row to the part of the sphere with positive coordinates; the metric is 4 times the sphere's.
    Geodesics, logarithm, distance and parallel transport are the sphere's great circles, exactly. A great circle
    leaves the positive part: ``expmap`` folds it back by p = z², as light at a mirror, and is undone by ``logmap``
    only before. The retraction p ∘ e^{u/p}, normalized, never leaves; it is a straight line in the log-probabilities, and
    what is carried along it keeps v/p up to a constant of the row.

    Example:
        >>> m = StochasticMatrices()
        >>> p = torch.tensor([[0.5, 0.5]])
        >>> m.retr(p, torch.tensor([[1e9, -1e9]])).round()
        tensor([[1., 0.]])
        >>> m.dist(p, torch.tensor([[1.0, 0.0]]))  # 2 arccos √½ = π/2
        tensor(1.5708)

    Source: [Amari2016]_ (Fisher metric).
    """

    ndim = 2
    reversible = True
    name = "StochasticMatrices"
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def projx(self, x: Tensor) -> Tensor:
        """Entries by their size, at least √tiny of the dtype, rows divided by their sums."""
        least = torch.finfo(x.dtype).tiny ** 0.5
        x = x.abs().clamp(least, 1 / least)
        return x / x.sum(-1, keepdim=True)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The nearest tangent vector in the metric: u − p Σ_j u_j."""
        return u - x * u.sum(-1, keepdim=True)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """p ∘ (g − Σ_j p_j g_j), the derivative of a softmax."""
        return x * (u - (x * u).sum(-1, keepdim=True))

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return (u * (u if v is None else v) / x).sum((-2, -1), keepdim=keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """One number per row: (..., N, 1)."""
        return (u * (u if v is None else v) / x).sum(-1, keepdim=True)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        z = x.sqrt()
        w = u / (2 * z)
        angle = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        return self.projx((z * angle.cos() + w * torch.sinc(angle / torch.pi)).square())

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """p ∘ e^{u/p}, normalized."""
        return self.projx((x.log() + u / x).softmax(-1))

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of the retraction by u, applied to v."""
        y = self.retr(x, u)
        return y, self.egrad2rgrad(y, v / x)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return self.retr_transp(x, u, v)[1]

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        z, end = x.sqrt(), y.sqrt()
        angle = _angle(z, end)
        # The part of the end that is orthogonal to z has length sin(angle).
        w = (end - z * (z * end).sum(-1, keepdim=True)) / torch.sinc(angle / torch.pi)
        return self.proju(x, 2 * z * w)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return (2 * _angle(x.sqrt(), y.sqrt())).square().sum((-2, -1), keepdim=keepdim)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return torch.linalg.vector_norm(2 * _angle(x.sqrt(), y.sqrt()), dim=(-2, -1), keepdim=keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel along the great circle from x to y; isometric."""
        z, end = x.sqrt(), y.sqrt()
        w = v / z
        turn = (end * w).sum(-1, keepdim=True) / (1 + (z * end).sum(-1, keepdim=True))
        return self.proju(y, end * (w - turn * (z + end)))

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
        scores = torch.randn(*shape, dtype=dtype, device=device) * std
        return geoopt.ManifoldTensor(self.projx(scores.softmax(-1)), manifold=self)

    def origin(  # noqa: D102
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "size")
        return geoopt.ManifoldTensor(self.projx(torch.ones(*shape, dtype=dtype, device=device)), manifold=self)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        ok = len(shape) >= 2 and shape[-1] >= 1
        return ok, None if ok else f"'{name}' must have shape (..., N, M) with M ≥ 1, got {tuple(shape)}"

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        wide = x.detach().to(torch.float64)
        return finding(
            not_finite(wide),
            not_positive("entries", wide, "start from positive entries"),
            beyond("rows must sum to 1", wide.sum(-1) - 1, atol + rtol),
        )

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        wide = u.detach().to(torch.float64)
        return finding(not_finite(wide), beyond("rows must sum to 0", wide.sum(-1), atol + rtol * wide.abs().amax(-1)))


def _angle(z: Tensor, end: Tensor) -> Tensor:
    """Angle between unit vectors, exact for small ones too: (..., 1)."""
    return 2 * (torch.linalg.vector_norm(z - end, dim=-1, keepdim=True) / 2).clamp(max=1).asin()
