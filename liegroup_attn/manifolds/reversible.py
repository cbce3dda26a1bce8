"""Reversible rate matrices: detailed balance as a linear law of the log-rates."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.errors import MaskError
from liegroup_attn.manifolds.checks import Finding, beyond, finding
from liegroup_attn.manifolds.subspace import LogLinearRateMatrices

__all__ = ["ReversibleRateMatrices"]


class ReversibleRateMatrices(LogLinearRateMatrices):
    """Rate matrices with π_i Q_ij = π_j Q_ji for some law π, that is Q_ij = s_ij π_j with symmetric s.

    By Kolmogorov's criterion these are the matrices with log Q_ij = σ_ij + p_j, σ symmetric: a linear subspace of
    the log-rates, hence a flat and totally geodesic submanifold of ``RateMatrices``. In substitution models it is
    known as the general time-reversible model. Log-rates are kept within ±40.

    Args:
        n: number of states, ≥ 1.
        support: (n, n) bool, symmetric, True where a transition is allowed. Default all.

    Raises:
        GeneratorError: n < 1.
        DtypeError: support not bool.
        MaskError: support not (n, n) or not symmetric, with an empty row, or without any transition.

    Example:
        >>> m = ReversibleRateMatrices(3)
        >>> pi = torch.tensor([0.5, 0.3, 0.2])
        >>> Q = pi - torch.eye(3)  # Q_ij = π_j
        >>> m.check_point_on_manifold(Q)
        True
        >>> m.stationary(Q)
        tensor([0.5000, 0.3000, 0.2000])

    Source: [Kelly1979]_, chapter 1 (Kolmogorov's criterion); [Tavare1986]_ (the model).
    """

    name = "ReversibleRateMatrices"

    def __init__(self, n: int, support: Tensor | None = None) -> None:
        super().__init__(n, support)
        lone = (self.transitions & ~self.transitions.mT).nonzero()
        if len(lone):
            i, j = lone[0].tolist()
            raise MaskError(
                f"support: expected a symmetric mask, got the transition {i} → {j} without its return; a reversible "
                "chain returns every way it goes, so allow both or neither"
            )
        edges = self.transitions.to(torch.float64)
        self._inverse = torch.linalg.pinv(edges.sum(-1).diag() - edges, hermitian=True)

    def _potential(self, c: Tensor) -> Tensor:
        """g with g_j − g_i nearest to the antisymmetric part of c, of mean 0 in each component: (..., n)."""
        return -((c - c.mT) / 2).sum(-1) @ self._inverse.to(c)

    def flatten(self, c: Tensor) -> Tensor:
        """Symmetric part and gradient part of the antisymmetric part."""
        c = c.masked_fill(~self._allowed(c), 0)
        g = self._potential(c)
        return ((c + c.mT) / 2 + g[..., None, :] - g[..., :, None]).masked_fill(~self._allowed(c), 0)

    def stationary(self, x: Tensor) -> Tensor:
        """The law π in detailed balance with Q; where states do not communicate, one of several.

        Args:
            x: (..., n, n), a point.

        Returns:
            (..., n), positive, sums to 1.
        """
        return (2 * self._potential(self.chart(x))).softmax(-1)

    def exchangeabilities(self, x: Tensor) -> Tensor:
        """The symmetric s of Q_ij = s_ij π_j.

        Args:
            x: (..., n, n), a point.

        Returns:
            (..., n, n), symmetric, 0 on the diagonal and off the support.
        """
        return x.masked_fill(~self._allowed(x), 0) / self.stationary(x)[..., None, :]

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        ok, reason = super()._check_point_on_manifold(x, atol=atol, rtol=rtol)
        if not ok:
            return ok, reason
        logs = super(LogLinearRateMatrices, self).chart(x.detach().to(torch.float64))
        law = "log-rates must be symmetric plus p_j (Kolmogorov's criterion)"
        # Without its sign: rounding decides which of a pair of opposite ones is the larger.
        return finding(beyond(law, (logs - self.flatten(logs)).abs(), atol + rtol * logs.abs()))

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        ok, reason = super()._check_vector_on_tangent(x, u, atol=atol, rtol=rtol)
        if not ok:
            return ok, reason
        relative = super(LogLinearRateMatrices, self).push(x.detach().to(torch.float64), u.detach().to(torch.float64))
        law = "relative changes of rates must be symmetric plus p_j (Kolmogorov's criterion)"
        size = relative.abs().amax((-2, -1), keepdim=True)
        return finding(beyond(law, relative - self.flatten(relative), atol + rtol * size))
