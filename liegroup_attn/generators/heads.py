"""A mixture over heads: every head flows along a sum of all heads' generators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.tensors import at_least_float32, values_visible, without_autocast

__all__ = ["HeadMixture"]


class HeadMixture(Generator):
    """Q_g = Σ_h w_gh Q_h: every head flows along a sum of all heads' generators, each head a relation.

    Args:
        part: generators on (..., H, N, N).
        weights: w ≥ 0, (G, H); G heads of values come out.

    Raises:
        ShapeError: the part has no head dimension, or the weights have another number of heads.
        GeneratorError: negative or non-finite weights (CPU).

    Example:
        >>> from liegroup_attn import DenseGenerator
        >>> heads = DenseGenerator(torch.tensor([[[-1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, -1.0]]]))
        >>> HeadMixture(heads, torch.tensor([[1.0, 2.0]])).dense()
        tensor([[[-1.,  1.],
                 [ 2., -2.]]])

    Source: docs/mathematics, "Sums of generators".
    """

    def __init__(self, part: Generator, weights: Tensor) -> None:
        check_shape("weights", weights, least_rank=2, remedy="give (heads out, heads in)")
        heads = part.batch_shape[-1] if part.batch_shape else 0
        if weights.dim() != 2 or weights.size(-1) != heads:
            raise ShapeError(
                f"weights: expected (heads out, {heads} heads of the generator), got {tuple(weights.shape)}; one column a head"
            )
        if (
            values_visible(weights)
            and not 0 <= float(weights.detach().min()) <= float(weights.detach().max()) < math.inf
        ):
            raise GeneratorError(
                f"weights: expected finite numbers ≥ 0, got {float(weights.detach().min()):g} to "
                f"{float(weights.detach().max()):g}; keep them positive, e.g. on manifolds.PositiveVectors"
            )
        self.part, self.parts, self.weights = part, (part,), at_least_float32(weights)
        self.num_states, self.is_causal = part.num_states, part.is_causal
        self.dropout_p, self.drops_in_hops = part.dropout_p, part.drops_in_hops
        self.batch_shape = torch.Size([*part.batch_shape[:-1], len(weights)])

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._summed(self.part.apply(self._side_by_side(value)), value).to(value.dtype)

    def inflow(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._summed(self.part.inflow(self._side_by_side(value)), value)

    def jump_intensities(self) -> Tensor:  # noqa: D102
        rates = self.part.jump_intensities()
        rates = rates.expand(*self.part.batch_shape, rates.size(-1))
        return _contract("gh,...hn->...gn", self.weights, rates)

    def dense(self) -> Tensor:  # noqa: D102
        return _contract("gh,...hnm->...gnm", self.weights, self.part.dense())

    def rate_bound(self) -> Tensor:  # noqa: D102
        bound = self.part.rate_bound()
        weights = self.weights.detach()
        if not isinstance(bound, Tensor):
            found = bound * weights.sum(-1, keepdim=True)  # (G, 1)
        else:
            bound = bound.expand(*self.part.batch_shape, 1)
            found = _contract("gh,...hn->...gn", weights, bound)
        return found.where(found > 0, 1)

    def _side_by_side(self, value: Tensor) -> Tensor:
        """(..., G, N, D) → (..., H, N, G·D): every head carries the values of all."""
        value = value.expand(*value.shape[:-3], len(self.weights), *value.shape[-2:]) if value.dim() > 2 else value
        if value.dim() < 3:
            value = value.expand(len(self.weights), *value.shape)
        wide = value.transpose(-3, -2).flatten(-2).unsqueeze(-3)  # (..., 1, N, G·D)
        return wide.expand(*wide.shape[:-3], self.weights.size(-1), *wide.shape[-2:])

    def _summed(self, moved: Tensor, value: Tensor) -> Tensor:
        """(..., H, N, G·D) → (..., G, N, D)."""
        apart = at_least_float32(moved).unflatten(-1, (len(self.weights), value.size(-1)))  # (..., H, N, G, D)
        return _contract("gh,...hngd->...gnd", self.weights, apart)


def _contract(equation: str, weights: Tensor, x: Tensor) -> Tensor:
    with without_autocast(x):  # it would contract in half precision
        return torch.einsum(equation, weights.to(x.dtype), x)
