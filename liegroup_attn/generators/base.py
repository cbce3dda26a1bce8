"""The contract of a generator: Q as a linear operator, its rows, its matrix, a bound on its rates; sums and multiples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import reduce
from itertools import chain
from numbers import Real
from operator import add

import torch
from torch import Tensor

from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.checks import check_shape
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators.rows import Blockwise
from liegroup_attn.tensors import at_least_float32, values_visible

__all__ = ["Generator", "ScaledGenerator", "SumGenerator"]


class Generator(ABC):
    """A rate matrix Q on N tokens, known by what it does: Q_ij ≥ 0 for i ≠ j, rows sum to 0.

    Rows are sources and columns are targets; Q acts on the token axis of values (..., N, D).
    """

    num_states: int
    batch_shape: torch.Size
    past: int = 0  # tokens of which there are no rows; only decoding asks such a generator
    is_causal: bool = False
    parts: tuple[Generator, ...] = ()  # those that it is made of
    leaves: tuple[Tensor, ...] = ()  # what rows may be differentiated by, beside queries and keys
    dropout_p: float = 0.0  # of an entry of S in each ``jump``
    drops_in_hops: bool = False  # whether ``hop`` drops them, too
    formed: bool = False  # whether its matrix is at hand
    factored: bool = False  # whether S is a product of features, with a closed form
    blockwise: bool = False  # whether S is a softmax of scores, whose rows ``softmax_rows`` gives block by block
    jumps_on_uniformized: bool = False  # whether ``uniformized`` gives S itself

    @abstractmethod
    def apply(self, value: Tensor) -> Tensor:
        """Q · value.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """

    def jump(self, value: Tensor) -> Tensor:
        """S · value, one jump of the jump chain. Either this or ``inflow`` is to be written; the other follows.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """
        total = self.jump_intensities().unsqueeze(-1)  # (..., N or 1, 1)
        still = total == 0  # a token that nothing moves keeps its value
        return torch.where(still, value, self.inflow(value) / total.masked_fill(still, 1)).to(value.dtype)

    def prepare(self) -> None:
        """Form what all jumps share, which else the first one forms."""
        for part in self.parts:
            part.prepare()

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix Q.

        Returns:
            (..., N, N), float32 or float64.
        """

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop of S.

        Args:
            start: the first row.
            stop: the row after the last.

        Returns:
            (..., stop − start, N), where causal the first ``stop`` columns alone; float32 or float64.

        Raises:
            ShapeError: rows that are none.
        """
        if not 0 <= start < stop <= self.num_states:
            raise ShapeError(
                f"start, stop: expected 0 ≤ start < stop ≤ {self.num_states}, got {start}, {stop}; name rows that there are"
            )
        like = self.jump_intensities()
        eye = torch.eye(self.num_states, dtype=like.dtype, device=like.device)
        chain = self.jump(eye.expand(*self.batch_shape, -1, -1))[..., start:stop, :]
        return chain[..., :stop] if self.is_causal else chain

    def softmax_rows(self, batch: torch.Size, dtype: torch.dtype) -> Blockwise:
        """Rows block by block, and the tensors that they are made from; of generators that are ``blockwise``.

        Args:
            batch: of a call, to which that of the generator broadcasts.
            dtype: to compute in, or the scores' own if it is wider.
        """
        raise NotImplementedError

    def unit(self) -> Tensor:
        """Q/Λ, Λ the ``rate_bound``: entries of which none is large.

        Returns:
            (..., N, N), float32 or float64.
        """
        bound = self.rate_bound()
        return self.dense() / (bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound)

    def uniformized(self) -> tuple[Tensor, Tensor | None]:
        """P = I + Q/Λ as a stochastic matrix and rates a, P = I + diag(a)(matrix − I); forms N×N.

        Returns:
            (..., N, N), float32 or float64, and (..., 1 or N), or None for 1.
        """
        unit = self.unit()
        eye = torch.eye(self.num_states, dtype=unit.dtype, device=unit.device)
        # The diagonal of Q may be off by a rounding unit of its own size, which many hops would make more of.
        chain = eye + unit - torch.diag_embed(unit.sum(-1).detach())
        return chain - chain.clamp_max(0).detach(), None  # Λ may be a rounding unit less than the rates add up to

    def hop(self, value: Tensor) -> Tensor:
        """P · value, P = I + Q/Λ.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """
        bound = self.rate_bound()
        return value + self.apply(value) / (bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound)

    @abstractmethod
    def jump_intensities(self) -> Tensor:
        """λ with Q = Λ(S − I), S what ``jump`` applies. Not the exit rates, which are λ_i(1 − S_ii).

        Returns:
            (..., N or 1), ≥ 0, float32 or float64.
        """

    def inflow(self, value: Tensor) -> Tensor:
        """ΛS · value: what jumps bring per unit of time, and what sums of generators add up.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), at least float32.
        """
        jumped = at_least_float32(self.jump(value))
        return self.jump_intensities().unsqueeze(-1).to(jumped.dtype) * jumped

    @abstractmethod
    def rate_bound(self) -> float | Tensor:
        """Λ with Λ ≥ every exit rate.

        Returns:
            A number, or (..., 1) for one bound per matrix.
        """

    def check(self, atol: float | None = None) -> tuple[bool, str | None]:
        """Say whether Q is a rate matrix, ``(True, None)`` or ``(False, reason)``; forms it, and on a GPU waits for it.

        Args:
            atol: absolute tolerance; default by dtype and size.
        """
        return is_rate_matrix(self.dense(), atol)

    def __add__(self, other: Generator) -> Generator:
        """Q₁ + Q₂, again a rate matrix: the chain that runs along both at once."""
        return SumGenerator(self, other) if isinstance(other, Generator) else NotImplemented

    def __radd__(self, other: object) -> Generator:
        """0 + Q, so that ``sum`` works."""
        return self if other == 0 else NotImplemented

    def __mul__(self, factor: Tensor | float) -> Generator:
        """diag(f)Q for f ≥ 0: the same chain at another speed, in all or token by token.

        Args:
            factor: a number, or (..., N or 1).
        """
        return ScaledGenerator(self, factor) if isinstance(factor, Tensor | Real) else NotImplemented

    __rmul__ = __mul__


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
        flat = (part.parts if isinstance(part, SumGenerator) else (part,) for part in parts)
        self.parts = tuple(chain.from_iterable(flat))
        sizes = {part.num_states for part in self.parts}
        if len(sizes) > 1:
            raise ShapeError(f"parts: expected generators on the same tokens, got {sorted(sizes)}; sum what fits")
        self.num_states = sizes.pop()
        self.batch_shape = _joint_batch(*(part.batch_shape for part in self.parts))
        self.is_causal = all(part.is_causal for part in self.parts)
        self.dropout_p = max(part.dropout_p for part in self.parts)
        self.drops_in_hops = any(part.drops_in_hops for part in self.parts)

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        return reduce(add, (part.apply(value) for part in self.parts))

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
        self.part, self.parts, self.factor = part, (part,), factor
        self.num_states, self.is_causal = part.num_states, part.is_causal
        self.dropout_p, self.drops_in_hops = part.dropout_p, part.drops_in_hops
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


def _joint_batch(*shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ShapeError(
            f"generators: expected batches that broadcast, got {[tuple(s) for s in shapes]}; give every head its own or one "
            "for all"
        ) from None
