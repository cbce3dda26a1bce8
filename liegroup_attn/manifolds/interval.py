"""The open interval (0, upper) with the metric under which it is a complete line."""

from __future__ import annotations

import math

import geoopt
import torch
from torch import Tensor

from liegroup_attn.errors import GeneratorError

__all__ = ["OpenInterval"]


class OpenInterval(geoopt.Manifold):
    """Numbers in (0, upper), each entry a point of its own, with the metric pulled back from ℝ by the logit.

    The chart φ(x) = log x − log(upper − x) makes the interval isometric to ℝ: complete, so no step of any size
    leaves it, and near 0 steps are relative to x. ``upper = inf`` gives φ = log, the multiplicative half-line.

    Args:
        upper: right end, in (0, inf].

    Raises:
        GeneratorError: upper not positive.

    Example:
        >>> line = OpenInterval(4.0)
        >>> x = torch.tensor([2.0])
        >>> line.expmap(x, torch.tensor([1e9]))
        tensor([4.0000])
        >>> line.check_point_on_manifold(line.expmap(x, torch.tensor([1e9])))
        True

    Source: [Amari2016]_ (metric from a chart); docs/mathematics.
    """

    ndim = 0
    reversible = True
    name = "OpenInterval"
    __scaling__ = geoopt.Manifold.__scaling__.copy()

    def __init__(self, upper: float = math.inf) -> None:
        super().__init__()
        if not upper > 0:
            raise GeneratorError(f"upper: expected a positive number, got {upper}; times and rates are positive")
        self.upper = float(upper)

    def extra_repr(self) -> str:  # noqa: D102
        return f"upper={self.upper}"

    def chart(self, x: Tensor) -> Tensor:
        """φ: (0, upper) → ℝ."""
        return x.log() if math.isinf(self.upper) else (x / self.upper).logit()

    def from_chart(self, phi: Tensor) -> Tensor:
        """φ⁻¹: ℝ → (0, upper), kept inside in finite precision."""
        x = phi.exp() if math.isinf(self.upper) else self.upper * phi.sigmoid()
        return self.projx(x)

    def _slope(self, x: Tensor) -> Tensor:
        """φ'(x)."""
        return 1 / x if math.isinf(self.upper) else self.upper / (x * (self.upper - x))

    def projx(self, x: Tensor) -> Tensor:  # noqa: D102
        eps = torch.finfo(x.dtype).eps
        if math.isinf(self.upper):
            return x.clamp(torch.finfo(x.dtype).tiny ** 0.5, torch.finfo(x.dtype).tiny ** -0.5)
        # Inside by one rounding unit of the chart, so that the metric stays finite.
        return x.clamp(self.upper * eps**2, self.upper * (1 - 2 * eps))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return u / self._slope(x) / self._slope(x)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        # In this order: near the ends φ'² alone may overflow.
        return (self._slope(x) * u) * (self._slope(x) * (u if v is None else v))

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return self._slope(x) * u.abs()

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.from_chart(self.chart(x) + self._slope(x) * u)

    retr = expmap

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return (self.chart(y) - self.chart(x)) / self._slope(x)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:  # noqa: D102
        return (self.chart(x) - self.chart(y)).abs()

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return v * self._slope(x) / self._slope(y)

    @__scaling__(geoopt.manifolds.base.ScalingInfo(std=-1), "random")
    def random(  # noqa: D102
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        std: float = 1.0,
    ) -> geoopt.ManifoldTensor:
        shape = geoopt.utils.size2shape(*size)
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
        return geoopt.ManifoldTensor(self.from_chart(torch.zeros(*shape, dtype=dtype, device=device)), manifold=self)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        inside = bool(((x > 0) & (x < self.upper)).all())
        return inside, None if inside else f"entries must lie in (0, {self.upper:g})"

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return True, None
