"""Rate matrices, the interior of their cone, with the metric in which log-rates are straight coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.manifolds.checks import Finding, beyond, finding, not_finite, not_positive
from liegroup_attn.manifolds.flat import FlatManifold
from liegroup_attn.manifolds.support import check_support, is_closed

__all__ = ["RateMatrices"]


class RateMatrices(FlatManifold):
    """Rate matrices with positive rates on a support: Q_ij > 0 there, Q_ij = 0 elsewhere, Q_ii = −Σ_j Q_ij.

    The metric ⟨U, V⟩ = Σ U_ij V_ij / Q_ij² over the transitions makes the log-rates a chart: geodesics multiply
    rates, Q_ij exp(s U_ij / Q_ij), and no step of any size leaves the cone. The manifold is a product of half-lines,
    so adaptive optimizers see every rate by itself: Riemannian Adam here is Adam on the log-rates.
    Rates are kept within [√tiny, 1/√tiny] of the dtype (about 1e∓19 in float32), where the metric is finite.

    Args:
        n: number of states, ≥ 1.
        support: (n, n) bool, True where a transition is allowed; the diagonal allows a token to stay. Default all.

    Attributes:
        n: number of states.
        transitions: (n, n) bool, the support without its diagonal.
        closed: whether the support is transitively closed; through one that is not, exp(tQ) leaks.

    Raises:
        GeneratorError: n < 1.
        DtypeError: support not bool.
        MaskError: support not (n, n), with an empty row, or without any transition.

    Example:
        >>> m = RateMatrices(2)
        >>> Q = torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
        >>> m.expmap(Q, torch.tensor([[0.0, 0.0], [-2e9, 2e9]])).sign()
        tensor([[-1.,  1.],
                [ 1., -1.]])
        >>> m.logmap(Q, 2 * Q) / Q
        tensor([[0.6931, 0.6931],
                [0.6931, 0.6931]])

    Source: [Norris1997]_, section 2.1 (rate matrices); [Amari2016]_ (metric from a chart).
    """

    ndim = 2
    by_entry = True
    name = "RateMatrices"

    def __init__(self, n: int, support: Tensor | None = None) -> None:
        super().__init__()
        # Plain tensors: a buffer would lend the manifold its dtype, and .to() does not reach a parameter's manifold.
        self.transitions = check_support(n, support)
        self._moved = self.transitions
        self.n = n
        self.closed = is_closed(self.transitions)
        self._full = n > 1 and int(self.transitions.sum()) == n * (n - 1)

    def extra_repr(self) -> str:  # noqa: D102
        return f"n={self.n}" if self._full else f"n={self.n}, transitions={int(self.transitions.sum())}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": self.transitions}

    def _allowed(self, x: Tensor) -> Tensor:
        """The transitions, where x is."""
        if self._moved.device != x.device:
            self._moved = self.transitions.to(x.device)
        return self._moved

    def _kept(self, x: Tensor) -> Tensor:
        """Rates in range, 0 where there is no transition, and the diagonal that makes rows sum to 0; x may be used up."""
        least = torch.finfo(x.dtype).tiny ** 0.5
        most = self._allowed(x).to(x.dtype) / least
        # One pass: where no transition is allowed, the least is above the most, which is 0 and has no derivative.
        clamp = torch.clamp if torch.is_grad_enabled() else torch.clamp_  # torch.func.vmap is slow in place
        return _closed_rows(clamp(x, torch.full_like(most, least), most), torch.float64)

    def projx(self, x: Tensor) -> Tensor:
        """Rates by their size, none off the support, and the diagonal that belongs to them.

        An open set has no nearest point. A rate of the wrong sign keeps its size: at the least rate it would be nearest,
        but infinitely far down the logarithm, and no gradient would ever move it again.
        """
        return self._kept(x.abs())

    def proju(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        u = u.expand(torch.broadcast_shapes(x.shape, u.shape))
        return _closed_rows(u.masked_fill(~self._allowed(x), 0))

    def chart(self, x: Tensor) -> Tensor:
        """Log-rates; 0 where there is no transition."""
        return x.masked_fill(~self._allowed(x), 1).log()

    def from_chart(self, phi: Tensor) -> Tensor:
        """The rate matrix of log-rates; entries where there is no transition are ignored."""
        return self.projx(phi.exp())

    def _divide(self, u: Tensor, x: Tensor) -> Tensor:
        """u / x, 0 where x is 0: off the support, and on the diagonal of states that cannot be left."""
        if self._full:
            return u / x
        nowhere = ~(self._allowed(x) | self._allowed(x).any(-1).diag())
        return u / (x + torch.zeros_like(nowhere, dtype=x.dtype).masked_fill_(nowhere, torch.inf))

    def push(self, x: Tensor, u: Tensor) -> Tensor:
        """Relative change of the rates, u / x; 0 where there is no transition."""
        c = self._divide(u, x)
        c.diagonal(dim1=-2, dim2=-1).zero_()
        return c

    def lift(self, x: Tensor, c: Tensor) -> Tensor:
        """x ∘ c and the diagonal that belongs to it, for c that is 0 where there is no transition."""
        return _closed_rows(c * x)

    def chart_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Q_ij (G_ij − G_ii): the diagonal moves against every rate of its row."""
        return _times(gradient - gradient.diagonal(dim1=-2, dim2=-1)[..., None], x)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm of the quotients of rates."""
        allowed = self._allowed(x)
        return (y.masked_fill(~allowed, 1) / x.masked_fill(~allowed, 1)).log()

    def move(self, x: Tensor, c: Tensor) -> Tensor:
        """Rates times exp(c); without grad mode c is used up."""
        return self._kept(_times(c.exp() if torch.is_grad_enabled() else c.exp_(), x))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Q_ij exp(U_ij / Q_ij); the diagonal of u is not looked at."""
        return self.move(x, self._divide(u, x))  # the diagonal is written anew anyway

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Entry by entry, U_ij V_ij / Q_ij²; on the diagonal too, where no step looks."""
        a = self._divide(u, x)
        return _times(a, a if v is None else self._divide(v, x))

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        ok = len(shape) >= 2 and tuple(shape[-2:]) == (self.n, self.n)
        return ok, None if ok else f"'{name}' must have shape (..., {self.n}, {self.n}), got {tuple(shape)}"

    def _not_linear(self, u: Tensor, atol: float, rtol: float) -> str | None:
        """A reason unless u is finite, 0 off the support and has zero row sums."""
        off = ~self._allowed(u) & ~torch.eye(self.n, dtype=torch.bool, device=u.device)
        return (
            not_finite(u)
            or beyond("entries off the support must be 0", u[..., off], atol)
            or beyond("rows must sum to 0", u.sum(-1), atol + rtol * u.diagonal(dim1=-2, dim2=-1).abs())
        )

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        wide = x.detach().to(torch.float64)
        remedy = "start from a positive rate, leave the transition out of the support, or use FlatRateMatrices"
        return finding(
            not_finite(wide),
            not_positive("rates on the support", wide[..., self._allowed(x)], remedy),
            self._not_linear(wide, atol, rtol),
        )

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Finding:
        return finding(self._not_linear(u.detach().to(torch.float64), atol, rtol))


def _closed_rows(u: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix with the diagonal that makes rows sum to 0, summed in ``dtype``, from a zero diagonal; in place."""
    u.diagonal(dim1=-2, dim2=-1).copy_(u.sum(-1, dtype=dtype).neg_())
    return u


def _times(c: Tensor, x: Tensor) -> Tensor:
    """c ∘ x, in the memory of c where it fits and no derivative may need c: new memory costs more than the product."""
    fits = c.shape == torch.broadcast_shapes(c.shape, x.shape)
    # Inside torch.func's transforms requires_grad does not say whether a derivative is taken.
    return c * x if torch.is_grad_enabled() or not fits else c.mul_(x)
