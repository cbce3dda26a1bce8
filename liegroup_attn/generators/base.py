"""The contract of a generator: Q as a linear operator, its matrix, and a bound on its rates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Real

import torch
from torch import Tensor

from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.tensors import at_least_float32, without_autocast

__all__ = ["Generator", "product"]


class Generator(ABC):
    """A rate matrix Q on N tokens, known by what it does: Q_ij ≥ 0 for i ≠ j, rows sum to 0.

    Rows are sources and columns are targets; Q acts on the token axis of values (..., N, D).
    """

    num_states: int
    batch_shape: torch.Size
    is_causal: bool = False
    dropout_p: float = 0.0
    jumps_on_uniformized: bool = False  # whether ``uniformized`` gives S itself

    @abstractmethod
    def apply(self, value: Tensor) -> Tensor:
        """Q · value.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """

    @abstractmethod
    def jump(self, value: Tensor) -> Tensor:
        """S · value, one jump of the jump chain.

        Args:
            value: (..., N, D).

        Returns:
            (..., N, D), dtype of ``value``.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix Q.

        Returns:
            (..., N, N), float32 or float64.
        """

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
        """Say whether Q is a rate matrix; forms it, and on a GPU waits for it.

        Args:
            atol: absolute tolerance; default by dtype and size.

        Returns:
            ``(True, None)`` or ``(False, reason)``.
        """
        return is_rate_matrix(self.dense(), atol)

    def __add__(self, other: Generator) -> Generator:
        """Q₁ + Q₂, again a rate matrix: the chain that runs along both at once."""
        from liegroup_attn.generators.sums import SumGenerator  # a sum is a generator itself

        return SumGenerator(self, other) if isinstance(other, Generator) else NotImplemented

    def __radd__(self, other: object) -> Generator:
        """0 + Q, so that ``sum`` works."""
        return self if other == 0 else NotImplemented

    def __mul__(self, factor: Tensor | float) -> Generator:
        """diag(f)Q for f ≥ 0: the same chain at another speed, in all or token by token.

        Args:
            factor: a number, or (..., N or 1).
        """
        from liegroup_attn.generators.sums import ScaledGenerator

        return ScaledGenerator(self, factor) if isinstance(factor, Tensor | Real) else NotImplemented

    __rmul__ = __mul__


def product(matrix: Tensor, value: Tensor) -> Tensor:
    """matrix · value in the wider of both dtypes, in the value's."""
    dtype = torch.promote_types(matrix.dtype, value.dtype)
    with without_autocast(value):
        return (matrix.to(dtype) @ value.to(dtype)).to(value.dtype)
