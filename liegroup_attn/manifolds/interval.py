"""The open interval (0, upper) with the metric under which it is a complete line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.errors import GeneratorError
from liegroup_attn.manifolds.flat import FlatManifold

__all__ = ["OpenInterval"]


class OpenInterval(FlatManifold):
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
    name = "OpenInterval"

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
        x = x.abs()  # a number of the wrong sign keeps its size, see RateMatrices.projx
        if math.isinf(self.upper):
            return x.clamp(torch.finfo(x.dtype).tiny ** 0.5, torch.finfo(x.dtype).tiny ** -0.5)
        # Inside by one rounding unit of the chart, so that the metric stays finite.
        return x.clamp(self.upper * eps**2, self.upper * (1 - 2 * eps))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def push(self, x: Tensor, u: Tensor) -> Tensor:
        """φ'(x) u."""
        return self._slope(x) * u

    def lift(self, x: Tensor, c: Tensor) -> Tensor:
        """c / φ'(x)."""
        return c / self._slope(x)

    def chart_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """gradient / φ'(x)."""
        return gradient / self._slope(x)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        inside = bool(((x > 0) & (x < self.upper)).all())
        return inside, None if inside else f"entries must lie in (0, {self.upper:g}); start from a number inside"

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return True, None
