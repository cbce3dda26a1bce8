"""Rotations of feature pairs: what RoPE and its relatives do once the angles are known."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import RotationEncoding

__all__ = ["LAYOUTS", "PairRotation", "convert_layout", "turn_pairs"]

LAYOUTS = ("half_split", "interleaved")


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn every pair of features by its angle.

    Args:
        x: (..., N, D).
        cos: broadcastable to (..., N, D/2).
        sin: as ``cos``.
        layout: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1.

    Returns:
        (..., N, D).
    """
    if layout == "half_split":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def convert_layout(
    features: Tensor, *, head_width: int, source: str, target: str, rotary_width: int | None = None
) -> Tensor:
    """Reorder what makes queries or keys, so that a checkpoint of one layout gives the same scores under the other.

    Args:
        features: a projection's weight (H·D, C) or bias (H·D,).
        head_width: D.
        source: layout it was trained with.
        target: layout it will be used with.
        rotary_width: how many of a head's features turn; default all.

    Returns:
        The shape of ``features``, rows permuted within each head.

    Raises:
        ShapeError: rows that are not whole heads, or an odd or too large ``rotary_width``.
        ValueError: unknown layout.

    Example:
        >>> convert_layout(torch.arange(4), head_width=4, source="interleaved", target="half_split").tolist()
        [0, 2, 1, 3]
    """
    for name, layout in (("source", source), ("target", target)):
        if layout not in LAYOUTS:
            raise ValueError(f"{name}: expected one of {LAYOUTS}, got {layout!r}; it must match the checkpoint's")
    width = check_rotary_width(rotary_width, head_width)
    if features.dim() < 1 or features.size(0) % head_width:
        raise ShapeError(
            f"features: expected a multiple of {head_width} rows, got shape {tuple(features.shape)}; match head_width"
        )
    if source == target:
        return features.clone()
    order = torch.arange(width, device=features.device)
    shape = (2, width // 2) if source == "half_split" else (width // 2, 2)
    order = torch.cat([order.view(shape).mT.flatten(), torch.arange(width, head_width, device=features.device)])
    return features.unflatten(0, (-1, head_width))[:, order].flatten(0, 1)


def check_rotary_width(rotary_width: int | None, head_width: int) -> int:
    """How many features turn; ShapeError unless even and from 2 to ``head_width``."""
    width = head_width if rotary_width is None else rotary_width
    if width < 2 or width % 2 or width > head_width:
        raise ShapeError(
            f"rotary_width: expected an even number ≤ head_width = {head_width}, got {width}; rotations act on pairs"
        )
    return width


class PairRotation(RotationEncoding):
    """Rotations in D/2 fixed planes, one for each feature pair; a subclass says by which angles.

    Args:
        head_width: D, even.
        layout: which features form a pair: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1. Both are
            in use; checkpoints do not say which.
        num_heads: number of heads with angles of their own; None where heads share them.
        axes: P, numbers a position has.

    Raises:
        ShapeError: odd width.
        ValueError: unknown layout.
    """

    def __init__(self, head_width: int, *, layout: str, num_heads: int | None = None, axes: int = 1) -> None:
        if head_width < 2 or head_width % 2:
            raise ShapeError(
                f"head_width: expected an even number, got {head_width}; rotations act on pairs, choose another number of heads"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}; it must match the checkpoint's")
        super().__init__(head_width, num_heads, axes)
        self.layout = layout

    @abstractmethod
    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:
        """Angles at coordinates (..., N, P): (..., N, D/2), or (..., H, N, D/2) for the heads of x."""

    def act(self, x: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        return self.turn(x, *self.cos_sin(coordinates, x))

    def cos_sin(self, coordinates: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles; overridden where an amplitude multiplies both."""
        angles = self.angles(coordinates, x)
        return angles.cos(), angles.sin()

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the pairs of x; overridden where some features pass."""
        return turn_pairs(x, cos, sin, self.layout)

    def act_both(self, query: Tensor, key: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if self.num_heads is not None:  # other angles for query heads than for fewer key heads
            return super().act_both(query, key, coordinates)
        cos, sin = self.cos_sin(coordinates, query)
        first, second = (self.turn(x.to(cos.dtype), cos, sin).to(x.dtype) for x in (query, key))
        return first, second
