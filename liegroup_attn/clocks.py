"""The law of the time τ for which the chain runs, and the law of the number of hops it makes."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from liegroup_attn.errors import ConvergenceError, GeneratorError
from liegroup_attn.tensors import pick

__all__ = ["Clock", "ErlangClock", "ExponentialClock", "FixedClock", "clock_from"]

_MOST_TERMS = 100_000


class Clock(ABC):
    """The law of τ, given its mean t. Tokens are mixed by E[exp(τQ)], a stochastic matrix for every clock.

    Uniformization writes that as Σ_k p_k Pᵏ with P = I + Q/Λ; a clock knows p_k, the law of the number of hops
    when hops come at rate Λ, as a function of θ = Λt.

    Attributes:
        resolvents: s if the mixing matrix is a product of s resolvents, (I − tQ/s)^{−s}; None if it is not.
    """

    resolvents: int | None = None

    @abstractmethod
    def terms(self, theta: float, tol: float) -> int:
        """Smallest K with P(hops > K) ≤ tol.

        Args:
            theta: θ = Λt ≥ 0, the mean number of hops.
            tol: in (0, 1).

        Returns:
            K ≥ 0; 0 only for θ = 0.

        Raises:
            ConvergenceError: more than 100,000 hops would be needed.
        """

    @abstractmethod
    def hop_weights(self, theta: Tensor, terms: int) -> Tensor:
        """Weights p_0 … p_K with everything past K lumped on p_K, so that they sum to 1 at every K.

        Args:
            theta: (...), θ ≥ 0.
            terms: K ≥ 0.

        Returns:
            (K + 1, ...) in float64, ≥ 0, differentiable in θ (also at θ = 0).
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class FixedClock(Clock):
    """τ = t: the mixing matrix is exp(tQ) and the number of hops is Poisson(θ).

    Example:
        >>> FixedClock().terms(1.0, 1e-3)
        5
        >>> FixedClock().hop_weights(torch.tensor(1.0), 2)
        tensor([0.3679, 0.3679, 0.2642], dtype=torch.float64)

    Source: [Jensen1953]_, [Moler2003]_ (uniformization).
    """

    def terms(self, theta: float, tol: float) -> int:  # noqa: D102
        if theta == 0:
            return 0
        if theta > _MOST_TERMS:
            _raise(theta, _MOST_TERMS)
        log_theta = math.log(theta)

        def log_p(k: int) -> float:
            return -theta + k * log_theta - math.lgamma(k + 1)

        return _smallest(log_p, lambda k: theta / (k + 1), math.ceil(theta + 6 * math.sqrt(theta)), tol) or _raise(
            theta, _MOST_TERMS
        )

    def hop_weights(self, theta: Tensor, terms: int) -> Tensor:  # noqa: D102
        return _weights(theta, 0, terms)


class ErlangClock(Clock):
    """τ is a sum of s independent exponential times: the mixing matrix is (I − tQ/s)^{−s}, hops are negative binomial.

    Between the two others: s = 1 is the exponential clock, s → ∞ the fixed one. Solves cost s times those of the
    exponential clock: keep s small.

    Args:
        shape: s ≥ 1, an integer.

    Raises:
        GeneratorError: not an integer, or < 1.

    Example:
        >>> ErlangClock(2).hop_weights(torch.tensor(1.0), 2)
        tensor([0.4444, 0.2963, 0.2593], dtype=torch.float64)

    Source: [Norris1997]_, section 4.2 (resolvent).
    """

    resolvents: int

    def __init__(self, shape: int) -> None:
        if not isinstance(shape, int) or isinstance(shape, bool) or shape < 1:
            raise GeneratorError(f"shape: expected an integer of at least 1, got {shape!r}; 1 is the exponential clock")
        self.resolvents = shape

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.resolvents})"

    def terms(self, theta: float, tol: float) -> int:  # noqa: D102
        if theta == 0:
            return 0
        s, log_onward = self.resolvents, -math.log1p(self.resolvents / theta)
        start = s * -math.log1p(theta / s)

        def log_p(k: int) -> float:
            return math.lgamma(k + s) - math.lgamma(s) - math.lgamma(k + 1) + start + k * log_onward

        # The ratio of terms falls with k: the tail is under a geometric one.
        return _smallest(log_p, lambda k: math.exp(log_onward) * (k + s) / (k + 1), s, tol) or _raise(theta, 1000)

    def hop_weights(self, theta: Tensor, terms: int) -> Tensor:  # noqa: D102
        return _weights(theta, self.resolvents, terms)


class ExponentialClock(ErlangClock):
    """τ exponential with mean t: the mixing matrix is the resolvent (I − tQ)⁻¹ and hops are geometric.

    Example:
        >>> ExponentialClock().hop_weights(torch.tensor(1.0), 2)
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)

    Source: [Norris1997]_, section 4.2 (resolvent).
    """

    def __init__(self) -> None:
        super().__init__(1)

    def terms(self, theta: float, tol: float) -> int:  # noqa: D102
        if theta == 0:
            return 0
        wanted = -math.log(tol) / math.log1p(1 / theta) - 1
        return max(math.ceil(wanted), 1) if wanted <= _MOST_TERMS else _raise(theta, 1000)

    def __repr__(self) -> str:
        return "ExponentialClock()"


def _smallest(log_p: Callable[[int], float], ratio: Callable[[int], float], start: int, tol: float) -> int:
    """Smallest K ≥ 1 with Σ_{k>K} p_k ≤ tol, 0 if it's more than the most; p_{k+1}/p_k falls with k."""
    k, least = max(start, 1), math.log(tol)
    # Sum the tail from far out, where all that follows is known to be nothing: 1 − Σ would lose every digit below 1e-16.
    # In units of tol, which may be below the least number that the sum could hold.
    while not (ratio(k) < 1 and log_p(k) - math.log1p(-ratio(k)) < least - 46):
        k *= 2
        if k > 4 * _MOST_TERMS:
            return 0
    tail = 0.0
    while k > 1 and (tail := tail + math.exp(min(log_p(k) - least, 1.0))) <= 1:
        k -= 1
    return k if k <= _MOST_TERMS else 0


def _raise(theta: float, most: int) -> int:
    raise ConvergenceError(
        f"time: expected a mean number of hops under about {most}, got {theta:g}; use method=MatrixExp()"
    )


def _weights(theta: Tensor, shape: int, terms: int) -> Tensor:
    """The law of the number of hops as in ``Clock.hop_weights``; shape s of an Erlang clock, 0 for the fixed one."""
    theta = theta.to(torch.float64)
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(theta).tangent is not None:
        return _in_powers(theta, shape, terms)  # forward mode in forward mode, too, of which a Function knows nothing
    found: Tensor = pick(_Weights, _WeightsForwardAD).apply(theta, shape, terms)
    return found


class _Weights(torch.autograd.Function):
    """Weights of hops whose derivatives of every order are laws of hops again, hence finite wherever they are.

    d/dθ E f(N) = E[f(N' + 1) − f(N')]: N' is Poisson(θ) as N; for Erlang times it belongs to τ weighted by its own size,
    which has shape s + 1 and mean θ(s + 1)/s. (Powers θᵏ would have NaN for a second derivative at θ = 0.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, shape: int, terms: int) -> Tensor:
        return _lumped(theta, shape, terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        theta, ctx.shape, ctx.terms = inputs
        ctx.save_for_backward(theta)
        ctx.save_for_forward(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (theta,) = ctx.saved_tensors
        return (_by_size(theta, ctx.shape, ctx.terms) * (grad[1:] - grad[:-1])).sum(0), None, None


class _WeightsForwardAD(_Weights):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (theta,) = ctx.saved_tensors
        moved = _by_size(theta, ctx.shape, ctx.terms) * tangent  # (K, ...)
        return F.pad(moved, [0, 0] * theta.dim() + [1, 0]) - F.pad(moved, [0, 0] * theta.dim() + [0, 1])


def _by_size(theta: Tensor, shape: int, terms: int) -> Tensor:
    """P(N' = k) for k < K: (K, ...)."""
    return _weights(theta * ((shape + 1) / shape) if shape else theta, shape + 1 if shape else 0, terms)[:-1]


def _lumped(theta: Tensor, shape: int, terms: int) -> Tensor:
    """p_0 … p_{K−1} and the rest on p_K, (K + 1, ...)."""
    if terms == 0:
        return torch.ones_like(theta).unsqueeze(0)
    k = torch.arange(terms, dtype=torch.float64, device=theta.device).view(-1, *[1] * theta.dim())
    if shape:
        log_stay, log_onward = -torch.log1p(theta / shape), -torch.log1p(shape / theta)
        counted = ((k + shape - 1) / k).log().where(k > 0, 0).cumsum(0)  # no difference of large logarithms
        first = shape * log_stay
    else:
        log_onward, counted, first = theta.log(), -torch.lgamma(k + 1), -theta
    log_onward = log_onward.clamp_min(-1e300)  # −∞ at θ = 0, and 0 · ∞ is no number
    weights = (first + counted + k * log_onward).exp()
    rest = (1 - weights.sum(0, keepdim=True)).clamp_min(0)
    lumped = torch.cat([weights, rest])
    return lumped / lumped.sum(0, keepdim=True)  # thousands of weights do not sum to 1 exactly


def _in_powers(theta: Tensor, shape: int, terms: int) -> Tensor:
    """``_lumped`` in products of θ up to 1, which have all derivatives at 0, and in logarithms beyond."""
    if terms == 0:
        return torch.ones_like(theta).unsqueeze(0)
    near, far = theta.clamp_max(1.0), theta.clamp_min(1.0)
    k = torch.arange(terms, dtype=torch.float64, device=theta.device).view(-1, *[1] * theta.dim())
    powers = [torch.ones_like(near)]
    while len(powers) < min(terms, 170):  # of a mean of 1, more hops are less likely than any number shows
        powers.append(powers[-1] * near)
    power = F.pad(torch.stack(powers), [0, 0] * near.dim() + [0, terms - len(powers)])
    if shape:
        counted = ((k + shape - 1) / k).log().where(k > 0, 0).cumsum(0)
        small = power * (counted - shape * torch.log1p(near / shape) - k * (shape + near).log()).exp()
        large = (counted - shape * torch.log1p(far / shape) - k * torch.log1p(shape / far)).exp()
    else:
        small = power * (-near - torch.lgamma(k + 1)).exp()
        large = (k * far.log() - far - torch.lgamma(k + 1)).exp()
    weights = torch.where(theta < 1, small, large)
    return torch.cat([weights, 1 - weights.sum(0, keepdim=True)])


def clock_from(name: str) -> Clock:
    """The clock of a name, so that configurations and checkpoints can hold it as text; ``str(clock)`` is its name.

    Args:
        name: "FixedClock", "ExponentialClock" or "ErlangClock(s)", with or without "()".

    Returns:
        The clock.

    Raises:
        GeneratorError: the name of no clock.

    Example:
        >>> clock_from("ErlangClock(3)")
        ErlangClock(3)
    """
    found = re.fullmatch(r"(FixedClock|ExponentialClock|ErlangClock)(?:\((\d*)\))?", name.strip())
    if found is None or bool(found[2]) != (found[1] == "ErlangClock"):
        raise GeneratorError(
            f"clock: expected FixedClock, ExponentialClock or ErlangClock(s), got {name!r}; name one of them"
        )
    kind = {"FixedClock": FixedClock, "ExponentialClock": ExponentialClock}.get(found[1])
    return ErlangClock(int(found[2])) if kind is None else kind()
