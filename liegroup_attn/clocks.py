"""The law of the time τ for which the chain runs, and the law of the number of hops it makes."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from liegroup_attn.errors import ConvergenceError, GeneratorError

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


def _lump(weights: Tensor) -> Tensor:
    """(K, ...) weights before K → (K + 1, ...) with the rest on the last."""
    rest = (1 - weights.sum(0, keepdim=True)).clamp_min(0)
    lumped = torch.cat([weights, rest])
    return lumped / lumped.sum(0, keepdim=True)  # thousands of weights do not sum to 1 exactly


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
        # Sum the tail from far out, where terms are tiny: 1 − Σ would lose every digit below 1e-16.
        k = math.ceil(theta + 12 * math.sqrt(theta) + 40)
        if k > _MOST_TERMS:
            raise ConvergenceError(
                f"time: expected a mean number of hops under about {_MOST_TERMS}, got {theta:g}; use method=MatrixExp()"
            )
        tail = 0.0
        while k > 1:
            p_k = math.exp(-theta + k * math.log(theta) - math.lgamma(k + 1))
            if tail + p_k > tol:
                return k
            tail += p_k
            k -= 1
        return 1

    def hop_weights(self, theta: Tensor, terms: int) -> Tensor:  # noqa: D102
        theta = theta.to(torch.float64)
        if terms == 0:
            return torch.ones_like(theta).unsqueeze(0)
        k = torch.arange(terms, dtype=torch.float64, device=theta.device).view(-1, *[1] * theta.dim())
        # Two forms, each on the side where its value and its gradient are finite: the powers at θ = 0, the
        # logarithms where e^{−θ} would underflow.
        near = theta.clamp_max(1.0)
        small = torch.exp(-near) * near**k / torch.exp(torch.lgamma(k + 1))
        far = theta.clamp_min(1.0)
        large = torch.exp(-far + k * far.log() - torch.lgamma(k + 1))
        return _lump(torch.where(theta < 1, small, large))


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

        def p(k: int) -> float:
            return math.exp(math.lgamma(k + s) - math.lgamma(s) - math.lgamma(k + 1) + start + k * log_onward)

        # As for the fixed clock: from far out, where the sum of all that follows is known to be nothing.
        def is_far(k: int) -> bool:
            ratio = math.exp(log_onward) * (k + s) / (k + 1)  # falls with k: the tail is under a geometric one
            return ratio < 1 and p(k) / (1 - ratio) < 1e-20 * tol

        k = s
        while not is_far(k):
            k *= 2
            if k > 4 * _MOST_TERMS:
                raise ConvergenceError(
                    f"time: expected a mean number of hops under about 1000, got {theta:g}; use method=MatrixExp()"
                )
        tail = 0.0
        while k > 1:
            if tail + p(k) > tol:
                return k
            tail += p(k)
            k -= 1
        return 1

    def hop_weights(self, theta: Tensor, terms: int) -> Tensor:  # noqa: D102
        theta, s = theta.to(torch.float64), self.resolvents
        if terms == 0:
            return torch.ones_like(theta).unsqueeze(0)
        k = torch.arange(1, terms, dtype=torch.float64, device=theta.device).view(-1, *[1] * theta.dim())
        # As for the fixed clock: products at θ = 0, logarithms where factors would overflow or underflow. p_k over
        # p_{k−1} is γ(k + s − 1)/k.
        near, far = theta.clamp_max(1.0), theta.clamp_min(1.0)
        one = torch.ones_like(theta).unsqueeze(0)
        ratios = torch.cat([one, near / (s + near) * (k + s - 1) / k])
        small = (s / (s + near)) ** s * ratios.cumprod(0)
        steps = (far / (s + far)).log() + ((k + s - 1) / k).log()
        large = torch.exp(s * torch.log(s / (s + far)) + torch.cat([0 * one, steps]).cumsum(0))
        return _lump(torch.where(theta < 1, small, large))


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
        k = math.ceil(-math.log(tol) / math.log1p(1 / theta)) - 1
        if k > _MOST_TERMS:
            raise ConvergenceError(
                f"time: expected a mean number of hops under about 1000, got {theta:g}; use method=MatrixExp()"
            )
        return max(k, 1)

    def __repr__(self) -> str:
        return "ExponentialClock()"


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
