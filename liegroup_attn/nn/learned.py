"""Learned generators: rates by relative position, or a whole matrix on its manifold; added to Q or flowed along alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from liegroup_attn import manifolds
from liegroup_attn.errors import GeneratorError, MaskError, ShapeError
from liegroup_attn.generators import DenseGenerator, Generator, SumGenerator
from liegroup_attn.resettable import Resettable

__all__ = ["LearnedGenerator", "LearnedSum", "RateMatrix", "RelativeRates"]


class LearnedGenerator(Resettable, ABC):
    """A generator that is a parameter: it knows the number of tokens and nothing of what they say.

    Args:
        num_heads: H.
        is_causal: no rate leads ahead.
    """

    def __init__(self, num_heads: int, *, is_causal: bool = False) -> None:
        super().__init__()
        if num_heads < 1:
            raise ShapeError(f"num_heads: expected at least 1, got {num_heads}; give one generator per head")
        self.num_heads, self.is_causal = num_heads, is_causal

    def __add__(self, other: LearnedGenerator) -> LearnedGenerator:
        """Both at once, as one learned generator."""
        return LearnedSum(self, other) if isinstance(other, LearnedGenerator) else NotImplemented

    @abstractmethod
    def forward(self, num_tokens: int) -> Generator:
        """The generator on N tokens.

        Args:
            num_tokens: N ≥ 1.

        Returns:
            A generator on (H, N, N).
        """


class LearnedSum(LearnedGenerator):
    """The sum of learned generators: one flow along several relations. Written ``a + b``.

    Args:
        *parts: with equal numbers of heads; causal if all are.

    Raises:
        ShapeError: other numbers of heads.
        GeneratorError: no part, or something that is no learned generator.

    Example:
        >>> both = RelativeRates(2, 4) + RateMatrix(2, 6)
        >>> both(6).check()
        (True, None)
    """

    def __init__(self, *parts: LearnedGenerator) -> None:
        if not parts:
            raise GeneratorError("parts: expected at least one LearnedGenerator, got none; a sum needs a part")
        super().__init__(parts[0].num_heads, is_causal=all(part.is_causal for part in parts))
        for part in parts:
            check_heads(part, self.num_heads)
        self.parts = nn.ModuleList(parts)

    def forward(self, num_tokens: int) -> Generator:  # noqa: D102
        return SumGenerator(*(part(num_tokens) for part in self.parts))


class RelativeRates(LearnedGenerator):
    """Q_ij = r(i − j): positive rates by distance, a table near by and a power law beyond, so that any length will do.

    Distance d ≤ D has its own rate per head; beyond, r(d) = r(D)(D/d)^(1 + a) with a learned a > 0, so that exit rates
    stay bounded however long the sequence grows.

    Args:
        num_heads: H.
        max_distance: D, size of the table.
        is_causal: rates to earlier tokens only; else a table for either direction.
        rate: exit rate at the start, of a token far from both ends.

    Raises:
        ShapeError: sizes < 1.
        GeneratorError: rate not positive.

    Example:
        >>> rates = RelativeRates(2, 4, is_causal=True)
        >>> rates(6).dense().shape
        torch.Size([2, 6, 6])

    Source: docs/mathematics, "Families".
    """

    past: Tensor
    future: Tensor
    tail: Tensor

    def __init__(self, num_heads: int, max_distance: int, *, is_causal: bool = False, rate: float = 0.5) -> None:
        super().__init__(num_heads, is_causal=is_causal)
        if max_distance < 1 or int(max_distance) != max_distance:
            raise ShapeError(
                f"max_distance: expected a whole number from 1, got {max_distance}; give the table an entry"
            )
        if not 0 < rate < float("inf"):
            raise GeneratorError(f"rate: expected a positive number, got {rate}; a rate of 0 has no gradient here")
        self.max_distance = max_distance
        start = torch.arange(1, max_distance + 1, dtype=torch.float32) ** -2.0
        start = start / start.sum() * (rate if is_causal else rate / 2)
        manifolds.hold(self, "past", start.repeat(num_heads, 1), manifolds.PositiveVectors())
        if not is_causal:
            manifolds.hold(self, "future", start.repeat(num_heads, 1), manifolds.PositiveVectors())
        manifolds.hold(self, "tail", torch.ones(num_heads, 1), manifolds.PositiveVectors())

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}, max_distance={self.max_distance}, is_causal={self.is_causal}"

    def forward(self, num_tokens: int) -> DenseGenerator:  # noqa: D102
        if num_tokens < 1:
            raise ShapeError(f"num_tokens: expected at least 1, got {num_tokens}; a generator needs a token")
        future = None if self.is_causal else self._by_distance(self.future, num_tokens)
        return DenseGenerator.from_offsets(self._by_distance(self.past, num_tokens), future)

    def _by_distance(self, table: Tensor, num_tokens: int) -> Tensor:
        """r(1) … r(N − 1), (H, N − 1)."""
        # One distance of the tail at least: a parameter without any gradient would stop distributed training.
        last = max(num_tokens, self.max_distance + 2)
        far = torch.arange(self.max_distance + 1, last, dtype=table.dtype, device=table.device)  # (beyond,)
        beyond = table[:, -1:] * (self.max_distance / far) ** (1 + self.tail)
        return torch.cat([table, beyond], -1)[:, : num_tokens - 1]


class RateMatrix(LearnedGenerator):
    """One generator per head for a fixed number of tokens, a point of a manifold of rate matrices.

    Args:
        num_heads: H.
        num_tokens: N.
        manifold: where Q lives, on N states; default ``RateMatrices(N)``, on the causal support where ``is_causal``.
            ``ReversibleRateMatrices`` and ``DoublyBalancedRateMatrices`` are others.
        is_causal: no rate leads ahead; fewer than N tokens then take the upper left of Q.
        rate: exit rate at the start, of a row with all transitions; rates are equal but for a spread between heads.
        allow_open_support: accept a support that is not transitively closed and let exp(tQ) fill it.

    Raises:
        ShapeError: sizes < 1.
        GeneratorError: rate not positive.
        MaskError: a support that is not transitively closed, or not causal beside ``is_causal``.

    Example:
        >>> matrix = RateMatrix(2, 4)
        >>> matrix(4).check()
        (True, None)

    Source: [Norris1997]_, section 2.1; docs/mathematics.
    """

    matrix: Tensor

    def __init__(
        self,
        num_heads: int,
        num_tokens: int,
        *,
        manifold: manifolds.RateMatrices | None = None,
        is_causal: bool = False,
        rate: float = 1.0,
        allow_open_support: bool = False,
    ) -> None:
        super().__init__(num_heads, is_causal=is_causal)
        if num_tokens < 1:
            raise ShapeError(f"num_tokens: expected at least 1, got {num_tokens}; the matrix has one row per token")
        if not 0 < rate < float("inf"):
            raise GeneratorError(f"rate: expected a positive number, got {rate}; a rate of 0 has no gradient here")
        if manifold is None:
            manifold = manifolds.RateMatrices(num_tokens, manifolds.causal_support(num_tokens) if is_causal else None)
        _check_support(manifold, num_tokens, is_causal, allow_open_support)
        self.num_tokens = num_tokens
        # Draws no random numbers, so softmax attention under the same seed starts identical.
        start = rate / max(1, num_tokens - 1) * torch.linspace(-0.2, 0.2, num_heads).exp().view(-1, 1, 1)
        manifolds.hold(self, "matrix", manifold.projx(start.expand(-1, num_tokens, num_tokens)), manifold)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}, num_tokens={self.num_tokens}, is_causal={self.is_causal}"

    def forward(self, num_tokens: int) -> DenseGenerator:  # noqa: D102
        if num_tokens != self.num_tokens and not (self.is_causal and num_tokens < self.num_tokens):
            most = "at most " if self.is_causal else ""
            raise ShapeError(
                f"num_tokens: expected {most}{self.num_tokens}, got {num_tokens}; a learned matrix has a fixed size, "
                "RelativeRates fit any"
            )
        generator = generator_of(self.matrix[:, :num_tokens, :num_tokens])
        generator.is_causal = self.is_causal
        return generator


def generator_of(matrix: Tensor) -> DenseGenerator:
    """The generator with the rates of a parameter, whose diagonal is made anew: a cast leaves it off by rounding."""
    eye = torch.eye(matrix.size(-1), dtype=torch.bool, device=matrix.device)
    return DenseGenerator.from_rates(matrix.masked_fill(eye, 0))


def _check_support(
    manifold: manifolds.RateMatrices, num_tokens: int, is_causal: bool, allow_open_support: bool
) -> None:
    if not isinstance(manifold, manifolds.RateMatrices) or manifold.n != num_tokens:
        raise ShapeError(
            f"manifold: expected one of rate matrices on {num_tokens} states, got {manifold}; give e.g. RateMatrices({num_tokens})"
        )
    if is_causal and bool(manifold.transitions.triu(1).any()):
        raise MaskError("manifold: expected a lower-triangular support beside is_causal=True, got one that leads ahead")
    if not allow_open_support and not manifold.closed:
        raise MaskError(
            "manifold: expected a transitively closed support, got one that exp(tQ) fills; close it, or pass "
            "allow_open_support=True"
        )


def check_heads(generator: LearnedGenerator, num_heads: int) -> None:
    """Raise unless there is one learned generator per head."""
    if not isinstance(generator, LearnedGenerator):
        raise GeneratorError(
            f"generator: expected a LearnedGenerator, got {type(generator).__name__}; give RelativeRates or RateMatrix, and "
            "a Generator to lie_attention"
        )
    if generator.num_heads != num_heads:
        raise ShapeError(
            f"num_heads: expected the generator's {generator.num_heads}, got {num_heads}; give one generator per head"
        )
