"""Rotations with parameters per key head: made from positions once for queries and keys, and folded for inference."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import RotationEncoding, check_sizes
from liegroup_attn.positional.mixed import HeadFrequencies
from liegroup_attn.positional.pairs import check_base

__all__ = ["FoldedRotary", "HeadRotation", "nearest_orthonormal", "start_frequencies"]


class HeadRotation(RotationEncoding):
    """A rotation with parameters of its own in each key head; a subclass says what a position makes and how that turns.

    Features are grouped by key head, (..., H, G, N, D) with G query heads to a key head: what a position makes has no
    batch where positions have none, and serves queries and keys alike.

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        axes: P, numbers a position has.

    Raises:
        ShapeError: odd width, or sizes < 1.
    """

    num_heads: int

    def __init__(self, head_width: int, num_heads: int, axes: int = 1) -> None:
        check_sizes(head_width=head_width, num_heads=num_heads, axes=axes)
        if head_width % 2:
            raise ShapeError(
                f"head_width: expected an even number, got {head_width}; rotations act on planes, choose another number of heads"
            )
        super().__init__(head_width, num_heads, axes)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.head_width}, {self.num_heads}, axes={self.axes}"

    @abstractmethod
    def prepare(self, coordinates: Tensor) -> tuple[Tensor, ...]:
        """What positions make, for the key heads.

        Args:
            coordinates: broadcastable to (..., H, G, N, P), float32 or float64.

        Returns:
            Tensors whose leading dimensions broadcast to (..., H, G, N).
        """

    @abstractmethod
    def turn(self, x: Tensor, *prepared: Tensor) -> Tensor:
        """R x for x (..., H, G, N, D)."""

    @abstractmethod
    def planes(self) -> tuple[Tensor, Tensor]:
        """P, (H, D, D), orthogonal, and frequencies f, (H, D/2, P), with R(x) = P RoPE(x·f) Pᵀ; float64, no gradient.

        Columns i and i + D/2 of P span a plane, which turns from the first to the second.
        """

    def fold(self) -> tuple[Tensor, FoldedRotary]:
        """R(x) = P RoPE(x·f) Pᵀ taken apart for inference: Pᵀq, Pᵀk and pair rotations have the scores of q, k and R.

        Returns:
            P, (H, D, D), float64, orthogonal; and the pair rotations. ``nn.fold_encoding`` puts Pᵀ into a layer's weights.

        Raises:
            ValueError: generators that do not commute, so that no planes are common to all positions.
        """
        if not self.relative:
            raise ValueError(
                f"fold: expected generators that commute, got {type(self).__name__}({self.extra_repr()}); positions share no "
                "planes, keep it as it is or train AxialBlocks or DependentBlocks"
            )
        basis, frequencies = self.planes()
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        return basis, FoldedRotary(frequencies.to(wide))

    def act(self, x: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        return self._turned(x, self.prepare(self._grouped(coordinates, x.size(-3))))

    def act_both(self, query: Tensor, key: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if coordinates.dim() > 2 and coordinates.size(-3) > 1:  # query heads that differ in their positions
            return super().act_both(query, key, coordinates)
        prepared = self.prepare(self._grouped(coordinates, self.num_heads))
        turned = [self._turned(x.to(coordinates.dtype), prepared).to(x.dtype) for x in (query, key)]
        return turned[0], turned[1]

    def _grouped(self, coordinates: Tensor, heads: int) -> Tensor:
        """(..., heads or 1, N, P) → (..., H or 1, G or 1, N, P)."""
        if coordinates.dim() < 3:
            return coordinates
        if coordinates.size(-3) == heads > 1:
            return coordinates.unflatten(-3, (self.num_heads, -1))
        return coordinates.unsqueeze(-3)

    def _turned(self, x: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        return self.turn(x.unflatten(-3, (self.num_heads, -1)), *prepared).flatten(-4, -3)


class FoldedRotary(HeadFrequencies):
    """Pair rotations whose frequencies differ by head: what is left of a learned rotation once P is in the weights.

    R(x)ᵀR(y) = R(y − x). Pairs are "half_split".

    Args:
        frequencies: (H, D/2, P), float32 or wider; a parameter, so that training may go on.

    Raises:
        ShapeError: not of three dimensions.

    Example:
        >>> FoldedRotary(torch.ones(2, 4, 1))
        FoldedRotary(8, 2, axes=1)

    Source: [Schenck2025]_.
    """

    def __init__(self, frequencies: Tensor) -> None:
        if frequencies.dim() != 3:
            raise ShapeError(
                f"frequencies: expected (heads, D/2, axes), got shape {tuple(frequencies.shape)}; take those of fold()"
            )
        super().__init__(frequencies, layout="half_split")


def start_frequencies(num_heads: int, pairs: int, axes: int, base: float) -> Tensor:
    """RoPE's base^(−i/pairs), (H, pairs, P): along the axis, or along a random direction where there are several."""
    check_base(base)
    size = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    directions = torch.ones(num_heads, pairs, 1) if axes == 1 else torch.randn(num_heads, pairs, axes)
    directions = nn.functional.normalize(directions, dim=-1)
    return (size[:, None] * directions).to(torch.get_default_dtype())


def nearest_orthonormal(frame: Tensor, steps: int) -> Tensor:
    """The orthonormal columns next to (..., n, p) that are nearly so, by Newton and Schulz: a distance ε becomes 3ε²/2."""
    eye = torch.eye(frame.size(-1), dtype=frame.dtype, device=frame.device)
    for _ in range(steps):
        frame = frame @ (3 * eye - frame.mT @ frame) / 2
    return frame
