"""Rate matrices, the closed cone, with the Frobenius metric."""

from __future__ import annotations

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from liegroup_attn.algebra import project_algebra, project_cone
from liegroup_attn.manifolds.checks import Finding, beyond, finding
from liegroup_attn.manifolds.flat import FlatManifold
from liegroup_attn.manifolds.rate_matrices import RateMatrices, _closed_rows

__all__ = ["FlatRateMatrices"]


class FlatRateMatrices(RateMatrices):
    """Rate matrices with rates ≥ 0 on a support, in the metric tr(UᵀV) of the space around them.

    Rates may reach 0 and leave it again, where ``RateMatrices`` only approaches it. Geodesics are straight lines as
    long as they stay inside; a step that would leave ends at the nearest rate matrix, so ``expmap`` is a retraction
    and is undone by ``logmap`` only inside. Transport does nothing. Adaptive optimizers see one number per matrix.

    Args:
        n: number of states, ≥ 1.
        support: (n, n) bool, True where a transition is allowed; the diagonal allows a token to stay. Default all.

    Raises:
        GeneratorError: n < 1.
        DtypeError: support not bool.
        MaskError: support not (n, n), with an empty row, or without any transition.

    Example:
        >>> m = FlatRateMatrices(2)
        >>> Q = torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
        >>> m.expmap(Q, torch.tensor([[3.0, -3.0], [1.0, -1.0]]))
        tensor([[ 0.,  0.],
                [ 3., -3.]])

    Source: [Absil2008]_ (retractions).
    """

    reversible = False
    by_entry = False
    name = "FlatRateMatrices"
    __scaling__ = FlatManifold.__scaling__.copy()

    def projx(self, x: Tensor) -> Tensor:
        """The nearest rate matrix in the Frobenius norm."""
        return project_cone(x, self._allowed(x)).to(x.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The nearest matrix on the support with zero row sums."""
        return project_algebra(u.expand(torch.broadcast_shapes(x.shape, u.shape)), self._allowed(x)).to(u.dtype)

    def chart(self, x: Tensor) -> Tensor:
        """The matrix itself."""
        return x

    def from_chart(self, phi: Tensor) -> Tensor:
        """The nearest rate matrix."""
        return self.projx(phi)

    def push(self, x: Tensor, u: Tensor) -> Tensor:
        """The tangent vector itself."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def lift(self, x: Tensor, c: Tensor) -> Tensor:
        """The tangent vector itself."""
        return self.push(x, c)

    def chart_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient's part in the tangent space."""
        return self.proju(x, gradient)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """y − x."""
        return y - x

    def move(self, x: Tensor, c: Tensor) -> Tensor:
        """The rate matrix nearest to x + c."""
        return self.projx(x + c)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The rate matrix nearest to x + u."""
        return self.move(x, u)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """One number per matrix."""
        return self.inner(x, u, v, keepdim=True)

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
        rates = torch.randn(*shape, dtype=dtype, device=device).abs() * std
        rates = rates.masked_fill(~self._allowed(rates), 0)
        return geoopt.ManifoldTensor(_closed_rows(rates, torch.float64), manifold=self)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        wide = x.detach().to(torch.float64)
        below = wide[..., self._allowed(x)].clamp(max=0)
        return finding(
            self._not_linear(wide, atol, rtol), beyond("rates on the support must be at least 0", below, atol)
        )
