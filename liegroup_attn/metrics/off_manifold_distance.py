"""OffManifoldDistance: how far points have drifted off their manifolds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from liegroup_attn.errors import GeneratorError
from liegroup_attn.metrics.averages import Worst

if TYPE_CHECKING:
    import geoopt

__all__ = ["OffManifoldDistance"]


class OffManifoldDistance(Worst):
    """Largest :func:`liegroup_attn.manifolds.off_manifold` of all points.

    ``update(x)`` takes points of the manifold, (..., as it wants them); ``compute()`` returns a scalar ≥ 0: NaN if a point
    held NaN or inf, or if there was none.

    Args:
        manifold: any geoopt manifold; default that of each ``x``, which then is a ManifoldParameter or ManifoldTensor.
        kwargs: torchmetrics' own, such as ``dist_sync_on_step``.

    Raises:
        ShapeError: from ``update``, if x does not have the manifold's shape.
        GeneratorError: from ``update``, if neither was a manifold given nor does x bring one.

    Example:
        >>> import torch
        >>> from liegroup_attn.manifolds import RateMatrices
        >>> metric = OffManifoldDistance(RateMatrices(2))
        >>> metric.update(torch.tensor([[-1.0, 1.0], [2.0, -2.5]]))
        >>> metric.compute()
        tensor(0.2000)
    """

    is_differentiable = False

    def __init__(self, manifold: geoopt.Manifold | None = None, **kwargs: Any) -> None:
        super().__init__(settings=() if manifold is None else (manifold,), **kwargs)
        self.manifold = manifold

    def update(self, x: Tensor) -> None:
        """Add points x of the manifold."""
        from liegroup_attn.manifolds import off_manifold  # geoopt takes half a second, and only this metric needs it

        manifold = getattr(x, "manifold", None) if self.manifold is None else self.manifold
        if manifold is None:
            raise GeneratorError(
                "manifold: expected one, got none and a plain tensor; give the metric a manifold, or a ManifoldParameter"
            )
        distance = off_manifold(x, manifold)
        self._add(distance if x.numel() else distance.new_zeros(0))
