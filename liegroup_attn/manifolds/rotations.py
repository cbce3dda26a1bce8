"""Rotations: the group SO(n) with its skew-symmetric algebra."""

from __future__ import annotations

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from liegroup_attn.algebra import expm, logm
from liegroup_attn.manifolds.checks import Finding, beyond, finding, not_finite
from liegroup_attn.manifolds.support import check_states

__all__ = ["SpecialOrthogonal", "skew"]


def skew(x: Tensor) -> Tensor:
    """Skew-symmetric part (X − Xᵀ)/2, the nearest element of the algebra so(n).

    Args:
        x: (..., n, n).

    Returns:
        (..., n, n).

    Example:
        >>> skew(torch.tensor([[1.0, 4.0], [0.0, 1.0]]))
        tensor([[ 0.,  2.],
                [-2.,  0.]])
    """
    return (x - x.mT) / 2


class SpecialOrthogonal(geoopt.Manifold):
    """Rotations R, RᵀR = I and det R = 1, with tangent vectors RA, A skew-symmetric, and the metric tr(uᵀv).

    The metric is the same from both sides, so geodesics are R exp(sA); the retraction follows them. Transport is parallel,
    R H (Rᵀv) H with H the half of the rotation: exp(A/2) along a step, of any length, and the root of Rᵀy from point to
    point. ``logmap`` and ``dist`` end where Rᵀy turns a plane by π and raise there. ``projx`` and ``transp`` go by
    singular values, which repeat: they cannot be differentiated by the points.

    Args:
        n: size of the rotations, ≥ 1.

    Raises:
        GeneratorError: n < 1; from ``logmap`` and ``dist``, a turn by π.

    Example:
        >>> m = SpecialOrthogonal(2)
        >>> R = m.expmap(torch.eye(2), torch.tensor([[0.0, -torch.pi / 2], [torch.pi / 2, 0.0]]))
        >>> R.round().int()
        tensor([[ 0, -1],
                [ 1,  0]], dtype=torch.int32)

    Source: [Absil2008]_, chapters 4 and 5.
    """

    ndim = 2
    reversible = True
    name = "SpecialOrthogonal"
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = check_states(n)

    def extra_repr(self) -> str:  # noqa: D102
        return f"n={self.n}"

    def projx(self, x: Tensor) -> Tensor:
        """The nearest rotation: UVᵀ of the singular value decomposition, the last direction turned if det < 0."""
        U, _, Vh = torch.linalg.svd(x)
        sign = torch.where(torch.linalg.det(U @ Vh) < 0, -1.0, 1.0).to(x)
        last = torch.arange(self.n, device=x.device) == self.n - 1
        return (U * torch.where(last, sign[..., None], 1)[..., None, :]) @ Vh

    def proju(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return x @ skew(x.mT @ u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.proju(x, u)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        product = (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)
        return product.expand(torch.broadcast_shapes(product.shape, x.shape[:-2] + (1, 1) * keepdim))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return x @ _turn(skew(x.mT @ u)).to(x)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.expmap(x, u)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The geodesic's end, and v carried along all of it, also beyond a turn by π."""
        half = _turn(skew(x.mT @ u) / 2)
        there = x @ (half @ half).to(x)
        half = half.to(x)
        return there, x @ half @ skew(x.mT @ v) @ half

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.expmap_transp(x, u, v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return self.expmap_transp(x, u, v)[1]

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return self.expmap_transp(x, u, v)[1]

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return x @ skew(logm(x.mT @ y))

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return torch.linalg.vector_norm(skew(logm(x.mT @ y)), dim=(-2, -1), keepdim=keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return skew(logm(x.mT @ y)).square().sum((-2, -1), keepdim=keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel along the shortest geodesic; isometric."""
        eye = torch.eye(self.n, dtype=x.dtype, device=x.device)
        U, _, Vh = torch.linalg.svd(eye + x.mT @ y)  # its orthogonal part is the root of Rᵀy
        half = U @ Vh
        return x @ half @ skew(x.mT @ v) @ half

    @__scaling__(ScalingInfo(), "random")
    def random(  # noqa: D102
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> geoopt.ManifoldTensor:
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "size")
        normal = torch.randn(*shape, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(self.projx(normal), manifold=self)  # Haar: the normal law has no direction

    def origin(  # noqa: D102
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        shape = geoopt.utils.size2shape(*size)
        self._assert_check_shape(shape, "size")
        eye = torch.eye(self.n, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(eye.expand(shape).clone(), manifold=self)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        ok = len(shape) >= 2 and tuple(shape[-2:]) == (self.n, self.n)
        return ok, None if ok else f"'{name}' must have shape (..., {self.n}, {self.n}), got {tuple(shape)}"

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        wide = x.detach().to(torch.float64)
        eye = torch.eye(self.n, dtype=torch.float64, device=x.device)
        return finding(
            not_finite(wide)
            or beyond("RᵀR must be I", wide.mT @ wide - eye, atol + rtol * eye)
            or beyond("the determinant must be 1", torch.linalg.det(wide) - 1, 0.5)
        )

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        A = x.detach().to(torch.float64).mT @ u.detach().to(torch.float64)
        size = A.abs().amax((-2, -1), keepdim=True)
        return finding(not_finite(A) or beyond("Rᵀu must be skew-symmetric", A + A.mT, atol + rtol * size))


def _turn(A: Tensor) -> Tensor:
    """exp(A) in float64: in float32 its own rounding would be most of what points drift by."""
    return expm(A.to(torch.float64))
