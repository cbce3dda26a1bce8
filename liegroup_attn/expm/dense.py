"""The dense reference: form Q, form the mixing matrix, multiply."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.algebra import expm
from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError
from liegroup_attn.expm.base import Method, hop_matrix, mean_hops, mix_by, seen
from liegroup_attn.expm.squaring import squared
from liegroup_attn.generators import Generator
from liegroup_attn.tensors import without_autocast

__all__ = ["MatrixExp"]

_LARGE = 256.0  # mean hops, up to which the exponential is left to ``torch.matrix_exp`` whole


class MatrixExp(Method):
    """Dense mixing: ``torch.matrix_exp`` for a fixed clock, ``torch.linalg.solve`` for resolvents.

    Beyond 256 mean hops the time is halved and the exponential squared as often; resolvents of a time at which I − tQ has
    lost its 1 are summed by doubling. Under vmap and torch.compile, where a time cannot be looked at, it should stay under 1e4.
    Costs N³ and N² memory (one time per query row: N times that), in float32 or float64 whatever the input. Both
    work on the transpose: there a sink column costs ``matrix_exp`` no accuracy, and the solve never needs to
    pivot (the transpose is column diagonally dominant), so causal stays exactly triangular.

    Example:
        >>> from liegroup_attn import DenseGenerator, expm_multiply
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), method=MatrixExp())
        tensor([[0.5677],
                [0.4323]])

    Source: [Moler2003]_, [AlMohy2009]_.
    """

    def act(  # noqa: D102
        self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> Tensor:
        return mix_by(self.matrix(generator, time, clock), generator, value, first_hop)

    def matrix(self, generator: Generator, time: Tensor, clock: Clock) -> Tensor:
        """E[exp(τQ)] as a matrix: entries ≥ 0, rows sum to 1.

        Args:
            generator: Q on N tokens.
            time: 0-dimensional, (..., 1) or (..., N).
            clock: law of τ.

        Returns:
            (..., N, N), float32 or float64.

        Raises:
            GeneratorError: a clock without a dense form.
        """
        theta = mean_hops(time, generator)
        theta = (theta if theta.dim() else theta.unsqueeze(0))[..., None, None]  # (..., M, 1, 1)
        unit = generator.unit().unsqueeze(-3)  # in units of Λ no product of a time and a rate leaves the dtype
        with without_autocast(unit):
            # (..., M, N, N), M = 1 or N: one matrix per query row that has a time of its own.
            if clock.resolvents is not None:
                chain = hop_matrix(*generator.uniformized()).unsqueeze(-3)
                mixing = torch.linalg.matrix_power(resolvent(chain, theta / clock.resolvents, unit), clock.resolvents)
            elif isinstance(clock, FixedClock):
                mixing = _semigroup(unit, theta)
            else:
                raise GeneratorError(
                    f"clock: expected FixedClock, ExponentialClock or ErlangClock, got {clock!r}; use method=Uniformization()"
                )
            many = mixing.size(-3) > 1
            mixing = mixing.diagonal(dim1=-3, dim2=-2).mT if many else mixing.squeeze(-3)  # row i of matrix i
            return _stochastic(mixing)


def _stochastic(mixing: Tensor) -> Tensor:
    """Rounding can leave −1e-9, and squarings double the error of a row sum; both are known, so put back."""
    mixing = mixing.clamp_min(0)
    return mixing / mixing.sum(-1, keepdim=True)


def _put_back(mixing: Tensor, sums: Tensor | None) -> Tensor:
    """With the row sums that are known, of which rounding had taken or given a little."""
    sums = mixing.new_ones(mixing.size(-1), 1) if sums is None else sums
    found = mixing @ sums
    known = (sums > 0) & (found > 0)
    return mixing * (sums / found.where(known, 1)).where(known, 1)


def _semigroup(unit: Tensor, theta: Tensor) -> Tensor:
    """exp(θQ/Λ), halved until ``torch.matrix_exp`` is exact on it and squared as often."""
    most = seen(theta)
    if most <= _LARGE:
        return expm(theta.to(unit) * unit)
    times = (theta.detach() / _LARGE).log2().ceil().clamp_min(0)  # of each matrix: small ones need every digit
    mixing = _stochastic(expm((theta * 2.0 ** (-times / 2) * 2.0 ** (-times / 2)).to(unit) * unit))
    for done in range(int(times.max())):
        mixing = torch.where(done < times, squared(mixing, 1), mixing)
    return mixing


def resolvent(chain: Tensor, theta: Tensor, unit: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """(I − θ(P − I))⁻¹.

    Args:
        chain: P ≥ 0, (..., N, N).
        theta: θ ≥ 0, (..., 1, 1).
        unit: P − I, where it is known to more digits.
        sums: s ≥ 0 with Ps = s, (..., N, 1); None is 1.

    Returns:
        (..., N, N), ≥ 0, with the same sums.
    """
    if seen(theta) * torch.finfo(chain.dtype).eps > 2**-14:
        return _doubled(chain, theta, sums)
    eye = torch.eye(chain.size(-1), dtype=chain.dtype, device=chain.device)
    flow = theta.to(chain) * (chain - eye if unit is None else unit)
    # The transpose is column diagonally dominant: no pivot.
    return torch.linalg.solve(eye - flow.mT, eye.expand_as(flow)).mT


def _doubled(chain: Tensor, theta: Tensor, sums: Tensor | None) -> Tensor:
    """(I − θ(P − I))⁻¹ = Σ_k (1 − γ)γᵏPᵏ, γ = θ/(1 + θ), the number of terms doubled until γᵏ is nothing.

    For times at which I − tQ has lost its 1: all terms are nonnegative, and every partial sum is brought back to its row sums.
    """
    theta = theta.clamp_max(1e300)  # beyond, nothing changes but numbers that overflow
    near, far = theta.clamp_max(1.0), theta.clamp_min(1.0)  # γ², γ⁴, … from either, where its digits are
    power, log_far = near / (1 + near), -torch.log1p(1 / far)
    total = torch.eye(chain.size(-1), dtype=chain.dtype, device=chain.device)
    for doubling in range(math.ceil(math.log2(40 * (1 + seen(theta))))):
        rest = torch.where(theta < 1, power, torch.exp(2.0**doubling * log_far)).to(chain)
        total = _put_back((total + rest * (chain @ total)) / (1 + rest), sums)
        chain, power = _put_back(chain @ chain, sums), power * power
    return total
