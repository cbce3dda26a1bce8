"""Generators made of generators: sums, multiples, and mixtures over heads. All stay in the cone."""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.tensors import at_least_float32, values_visible, without_autocast

__all__ = ["HeadMixture", "ScaledGenerator", "SumGenerator"]


class SumGenerator(Generator):
    """Q = Q₁ + Q₂ + …: one chain that follows several relations, in any order, within one flow.

    exp(t(Q₁ + Q₂)) holds every word Q₁Q₂Q₁…, where the product exp(tQ₁)exp(tQ₂) holds only those in order. Written
    ``Q1 + Q2``. Its jump chain draws the relation in proportion to the jump rates: S = Σ_a Λ_a S_a / Σ_a Λ_a.

    Args:
        *parts: generators on the same tokens, with batches that broadcast.

    Raises:
        ShapeError: other tokens, or batches that do not broadcast.
        GeneratorError: no part, or something that is no generator.

    Example:
        >>> from liegroup_attn import DenseGenerator
        >>> forth = DenseGenerator(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
        >>> back = DenseGenerator(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        >>> (forth + 0.5 * back).dense()
        tensor([[-1.0000,  1.0000],
                [ 0.5000, -0.5000]])

    Source: docs/mathematics, "Sums of generators".
    """

    def __init__(self, *parts: Generator) -> None:
        if not parts or not all(isinstance(part, Generator) for part in parts):
            got = [type(part).__name__ for part in parts]
            raise GeneratorError(
                f"parts: expected at least one Generator, got {got}; wrap matrices in DenseGenerator(Q)"
            )
        self.parts: tuple[Generator, ...] = tuple(
            q for part in parts for q in (part.parts if isinstance(part, SumGenerator) else (part,))
        )
        sizes = {part.num_states for part in self.parts}
        if len(sizes) > 1:
            raise ShapeError(f"parts: expected generators on the same tokens, got {sorted(sizes)}; sum what fits")
        self.num_states = sizes.pop()
        self.batch_shape = _joint_batch(*(part.batch_shape for part in self.parts))
        self.is_causal = all(part.is_causal for part in self.parts)
        self.dropout_p = max(part.dropout_p for part in self.parts)

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return reduce(add, (part.apply(value) for part in self.parts))

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        return _normalized(self, value)

    def inflow(self, value: Tensor) -> Tensor:  # noqa: D102
        return reduce(add, (part.inflow(value) for part in self.parts))

    def jump_intensities(self) -> Tensor:  # noqa: D102
        return reduce(add, (part.jump_intensities() for part in self.parts))

    def dense(self) -> Tensor:  # noqa: D102
        return reduce(add, (part.dense() for part in self.parts))

    def rate_bound(self) -> float | Tensor:  # noqa: D102
        return reduce(add, (part.rate_bound() for part in self.parts))


class ScaledGenerator(Generator):
    """diag(f)Q: the same jump chain at another speed. Written ``f * Q``.

    Args:
        part: Q.
        factor: f ≥ 0, a number, or a tensor () or (..., N or 1): one for all, one per matrix, or one per token.

    Raises:
        ShapeError: the factor does not fit.
        GeneratorError: negative or not finite (numbers and CPU tensors).

    Example:
        >>> from liegroup_attn import DenseGenerator
        >>> Q = DenseGenerator(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        >>> (Q * torch.tensor([0.0, 2.0])).dense()
        tensor([[-0.,  0.],
                [ 2., -2.]])
    """

    def __init__(self, part: Generator, factor: Tensor | float) -> None:
        if isinstance(factor, Tensor):
            check_shape("factor", factor, least_rank=0, remedy="give (..., 1) per matrix or (..., N) per token")
            factor = factor if factor.dim() else factor.unsqueeze(0)
            if factor.size(-1) not in (1, part.num_states):
                raise ShapeError(
                    f"factor: expected last size 1 or {part.num_states}, got shape {tuple(factor.shape)}; give one per "
                    "matrix or one per token"
                )
            visible = values_visible(factor)
            low, high = (float(factor.detach().min()), float(factor.detach().max())) if visible else (0.0, 0.0)
            factor = at_least_float32(factor)
        else:
            factor = low = high = float(factor)
        if not (low >= 0 and math.isfinite(high)):
            got = low if not low >= 0 else high
            raise GeneratorError(f"factor: expected 0 ≤ factor < inf, got {got:g}; −Q is no generator")
        self.part, self.factor = part, factor
        self.num_states, self.is_causal, self.dropout_p = part.num_states, part.is_causal, part.dropout_p
        own = factor.shape[:-1] if isinstance(factor, Tensor) else torch.Size()
        self.batch_shape = _joint_batch(part.batch_shape, own)

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        moved = self.part.apply(value)
        return (self._rows(moved.dtype, self.factor) * moved).to(value.dtype)

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        return self.part.jump(value)

    def inflow(self, value: Tensor) -> Tensor:  # noqa: D102
        moved = self.part.inflow(value)
        return self._rows(moved.dtype, self.factor) * moved

    def jump_intensities(self) -> Tensor:  # noqa: D102
        return self.factor * self.part.jump_intensities()

    def dense(self) -> Tensor:  # noqa: D102
        dense = self.part.dense()
        return self._rows(dense.dtype, self.factor) * dense

    def unit(self) -> Tensor:  # noqa: D102
        unit = self.part.unit()
        return self._rows(unit.dtype, self._share()) * unit

    def hop(self, value: Tensor) -> Tensor:  # noqa: D102
        return value + self._rows(value.dtype, self._share()) * (self.part.hop(value) - value)

    def _share(self) -> Tensor | float:
        """The part of f·Λ that a token has of the bound of all, in [0, 1]."""
        if not isinstance(self.factor, Tensor):
            return float(self.factor > 0)
        return self.factor * (self.part.rate_bound() / self.rate_bound())

    def rate_bound(self) -> float | Tensor:
        """f·Λ, with 1 where that is 0: any bound will do there, but its gradient needs hops."""
        if not isinstance(self.factor, Tensor):
            return self.part.rate_bound() if self.factor == 0 else self.factor * self.part.rate_bound()
        bound = self.factor.detach().amax(-1, keepdim=True) * self.part.rate_bound()
        return bound.where(bound > 0, 1)

    @staticmethod
    def _rows(dtype: torch.dtype, factor: Tensor | float) -> Tensor | float:
        return (
            factor.unsqueeze(-1).to(torch.promote_types(dtype, factor.dtype)) if isinstance(factor, Tensor) else factor
        )


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
        self.part, self.weights = part, at_least_float32(weights)
        self.num_states, self.is_causal, self.dropout_p = part.num_states, part.is_causal, part.dropout_p
        self.batch_shape = torch.Size([*part.batch_shape[:-1], len(weights)])

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return self._summed(self.part.apply(self._side_by_side(value)), value).to(value.dtype)

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        return _normalized(self, value)

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


def _normalized(generator: Generator, value: Tensor) -> Tensor:
    """S · value from ΛS · value; a token that nothing moves keeps its value."""
    total = generator.jump_intensities().unsqueeze(-1)  # (..., N or 1, 1)
    still = total == 0
    return torch.where(still, value, generator.inflow(value) / total.masked_fill(still, 1)).to(value.dtype)


def _joint_batch(*shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ShapeError(
            f"generators: expected batches that broadcast, got {[tuple(s) for s in shapes]}; give every head its own or one "
            "for all"
        ) from None
