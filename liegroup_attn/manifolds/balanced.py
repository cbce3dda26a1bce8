"""Doubly balanced rate matrices: columns sum to 0 too, so exp(tQ) is doubly stochastic."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.errors import ConvergenceError, MaskError
from liegroup_attn.manifolds.checks import Finding, beyond, finding
from liegroup_attn.manifolds.rate_matrices import _closed_rows
from liegroup_attn.manifolds.subspace import LogLinearRateMatrices

__all__ = ["DoublyBalancedRateMatrices"]

_MOST_STEPS = 200


class DoublyBalancedRateMatrices(LogLinearRateMatrices):
    """Rate matrices whose columns sum to 0 too: exp(tQ) is exactly doubly stochastic, without Sinkhorn iterations.

    Rescaling states, Q_ij e^{x_i − x_j}, balances every matrix of positive rates in exactly one way. So the log-rates
    modulo gradients x_i − x_j are a chart: φ(Q) = Π log Q, Π the projection on the c with Σ_j c_ij = Σ_j c_ji, and
    φ⁻¹ finds the x that minimises Σ e^{c_ij + x_i − x_j} by damped Newton steps in float64. The manifold is flat and
    complete; its coordinates are kept within ±12, beside a factor common to all rates, which is kept within e^{±20}.

    Args:
        n: number of states, ≥ 1.
        support: (n, n) bool, True where a transition is allowed; each must lie on a cycle. Default all.

    Raises:
        GeneratorError: n < 1.
        DtypeError: support not bool.
        MaskError: support not (n, n), with an empty row, without any transition, or with one that has no way back.

    Example:
        >>> m = DoublyBalancedRateMatrices(3)
        >>> Q = m.projx(torch.tensor([[-2.0, 1.0, 1.0], [4.0, -5.0, 1.0], [1.0, 1.0, -2.0]]))
        >>> (Q.sum(0).abs() < 1e-6).all(), (Q.sum(1).abs() < 1e-6).all()
        (tensor(True), tensor(True))

    Source: [Eaves1985]_ (the scaling is unique and exists on cycles).
    """

    name = "DoublyBalancedRateMatrices"
    reach = 12.0

    def __init__(self, n: int, support: Tensor | None = None) -> None:
        super().__init__(n, support)
        reach = self.transitions | torch.eye(n, dtype=torch.bool, device="cpu")
        for _ in range((n - 1).bit_length()):
            reach = (reach.to(torch.float32) @ reach.to(torch.float32)) > 0
        lost = (self.transitions & ~reach.mT).nonzero()
        if len(lost):
            i, j = lost[0].tolist()
            raise MaskError(
                f"support: expected every transition on a cycle, got {i} → {j} without a way back; what flows along "
                "it cannot be balanced, so allow a way back (a causal mask has none)"
            )
        self._together = reach.to(torch.float64)  # states of one component
        self._inverse = torch.linalg.pinv(_laplacian(self.transitions.to(torch.float64)), hermitian=True)
        self._even = self.flatten(torch.ones(n, n, dtype=torch.float64, device="cpu"))  # where a common factor moves

    def flatten(self, c: Tensor) -> Tensor:
        """c − B L⁺ D c: what is left when the nearest gradient x_i − x_j is taken away."""
        c = c.masked_fill(~self._allowed(c), 0)
        return (c - _gradient(_outflow(c) @ self._inverse.to(c))).masked_fill(~self._allowed(c), 0)

    def _within_reach(self, c: Tensor) -> Tensor:
        c = self.flatten(c.clamp(-1e30, 1e30))
        c = c * (1e3 / c.abs().amax((-2, -1), keepdim=True).clamp(min=1e3))  # lest rounding of a huge factor be a step
        even = self._even.to(c)
        factor = (c * even).sum((-2, -1), keepdim=True) / even.square().sum().clamp(min=1)
        return super()._within_reach(c - factor * even) + factor.clamp(-20, 20) * even

    def lift(self, x: Tensor, c: Tensor) -> Tensor:
        """q ∘ (c + α_i − α_j), balanced."""
        rates = self._wide_rates(x)
        flow = rates * c.to(torch.float64)
        alpha = self._solve(rates, -_outflow(flow))
        return _closed_rows((flow + rates * _gradient(alpha)).to(c.dtype))

    def chart_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """q ∘ (g − β_i + β_j), in the chart's space; g_ij = G_ij − G_ii."""
        rates = self._wide_rates(x)
        g = (gradient - gradient.diagonal(dim1=-2, dim2=-1)[..., None]).to(torch.float64)
        beta = self._solve(rates, _outflow(rates * g))
        return self.flatten((rates * (g - _gradient(beta))).to(x.dtype))

    def _rates(self, c: Tensor) -> Tensor:
        """e^{c_ij + x_i − x_j} with the x that balances it."""
        c = c.to(torch.float64).masked_fill(~self._allowed(c), -torch.inf)
        with torch.no_grad():
            x = self._balancing(c)
        # One more step, differentiable: at the solution it is the derivative of the solution.
        rates = (c + _gradient(x)).exp()
        step = self._solve(rates.detach(), -_outflow(rates))
        return (c + _gradient(x + step)).exp()

    def _balancing(self, c: Tensor) -> Tensor:
        """x by Newton steps, each the minimiser of a bound from above: shortened to log(1 + M)/M, M its size."""
        x = torch.zeros(c.shape[:-1], dtype=c.dtype, device=c.device)
        if c.is_meta:
            return x  # without values there is nothing to find
        rounding = 8 * self.n * torch.finfo(c.dtype).eps
        for _ in range(_MOST_STEPS):
            rates = (c + _gradient(x)).exp()
            flow = _outflow(rates)
            if not bool((flow.abs() > rounding * (rates.sum(-1) + rates.sum(-2))).any()):
                return x
            step = self._solve(rates, -flow)
            size = _gradient(step).masked_fill(~self._allowed(c), 0).abs().amax((-2, -1), keepdim=True)[..., 0]
            x = x + step * torch.where(size > 0, size.log1p() / size, 1)
            if not bool((size > 1e-7).any()):  # quadratic: the error is now below rounding
                return x
        raise ConvergenceError(
            f"x: expected balanced rates within {_MOST_STEPS} Newton steps, got steps of {float(size.max()):.1e}; "
            "the rates are too far apart for float64, start from rates nearer to one another"
        )

    def _wide_rates(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).masked_fill(~self._allowed(x), 0)

    def _solve(self, rates: Tensor, flow: Tensor) -> Tensor:
        """x with D(rates ∘ (x_i − x_j)) = flow, for a flow that sums to 0 in each component: (..., n).

        The Laplacian is scaled to a unit diagonal, and its kernel, one vector per component, is filled in.
        """
        weights = rates + rates.mT
        degree = weights.sum(-1)
        degree = torch.where(degree > 0, degree, 1)
        scale = degree.rsqrt()
        root, together = degree.sqrt(), self._together.to(rates)
        kernel = root[..., :, None] * together * root[..., None, :] / (degree @ together)[..., None]
        eye = torch.eye(self.n, dtype=rates.dtype, device=rates.device)
        matrix = eye - scale[..., :, None] * weights * scale[..., None, :] + kernel
        return scale * torch.linalg.solve_ex(matrix, (scale * flow)[..., None]).result[..., 0]

    def _unbalanced(self, u: Tensor, atol: float, rtol: float) -> str | None:
        """A reason unless columns sum to 0."""
        return beyond("columns must sum to 0", u.sum(-2), atol + rtol * u.diagonal(dim1=-2, dim2=-1).abs())

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        _, reason = super()._check_point_on_manifold(x, atol=atol, rtol=rtol)
        return finding(reason or self._unbalanced(x.detach().to(torch.float64), atol, rtol))

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        _, reason = super()._check_vector_on_tangent(x, u, atol=atol, rtol=rtol)
        return finding(reason or self._unbalanced(u.detach().to(torch.float64), atol, rtol))


def _outflow(m: Tensor) -> Tensor:
    """D: Σ_j m_ij − Σ_j m_ji."""
    return m.sum(-1) - m.sum(-2)


def _gradient(x: Tensor) -> Tensor:
    """B: x_i − x_j."""
    return x[..., :, None] - x[..., None, :]


def _laplacian(weights: Tensor) -> Tensor:
    """D ∘ diag(weights) ∘ B as a matrix."""
    both = weights + weights.mT
    return both.sum(-1).diag_embed() - both
