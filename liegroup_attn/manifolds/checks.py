"""How far a point is off its manifold, and reasons that say so."""

from __future__ import annotations

import geoopt
import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError
from liegroup_attn.tensors import without_autocast

__all__ = ["off_manifold"]

Finding = tuple[bool, str | None]


def off_manifold(x: Tensor, manifold: geoopt.Manifold) -> Tensor:
    """How far a point is off a manifold: the largest ``|x − projx(x)| / max(1, |x|)`` over its entries.

    Args:
        x: (..., as the manifold wants it); half precision is measured in float32.
        manifold: any geoopt manifold.

    Returns:
        A number in at least float32, 0-dimensional; NaN where x has NaN or inf, 0 without entries.

    Raises:
        ShapeError: x does not have the manifold's shape.

    Example:
        >>> from liegroup_attn.manifolds import RateMatrices
        >>> float(off_manifold(torch.tensor([[-1.0, 1.0], [2.0, -2.5]]), RateMatrices(2)))
        0.20000000298023224
    """
    ok, reason = manifold.check_point(x, explain=True)
    if not ok:
        raise ShapeError(f"x: expected a point on {manifold}, got shape {tuple(x.shape)}; {reason}")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # decompositions do not run in half precision
    if not_finite(x):
        return x.new_full((), torch.nan)  # a projection may fail on it
    with torch.no_grad(), without_autocast(x):
        apart = (x - manifold.projx(x)).abs() / x.abs().clamp(min=1)
    return apart.max() if apart.numel() else apart.sum()


def finding(*reasons: str | None) -> Finding:
    """geoopt's answer to a check: the first reason, if there is any."""
    reason = next((r for r in reasons if r is not None), None)
    return reason is None, reason


def not_finite(x: Tensor) -> str | None:
    """A reason unless all entries are finite."""
    return None if bool(torch.isfinite(x).all()) else "entries must be finite, got NaN or inf"


def not_positive(what: str, values: Tensor, remedy: str) -> str | None:
    """A reason unless all values are positive."""
    return None if bool((values > 0).all()) else f"{what} must be positive, got {float(values.min()):g}; {remedy}"


def beyond(law: str, error: Tensor, tolerance: Tensor | float) -> str | None:
    """A reason unless every error is within its tolerance; it names the law and the worst error."""
    excess = (error.abs() - tolerance).flatten()
    if excess.numel() == 0 or bool((excess <= 0).all()):
        return None
    return f"{law}, off by {float(error.expand_as(error.abs() - tolerance).flatten()[excess.argmax()]):.3g}"
