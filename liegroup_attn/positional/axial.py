"""Axial RoPE: each axis of a grid turns its own share of the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.pairs import PairRotation, check_base

__all__ = ["AxialRotary"]


class AxialRotary(PairRotation):
    """The D/2 pairs in P groups; group p turns by the coordinate of axis p, as in RoPE of width D/P.

    Args:
        head_width: D, with D/2 a multiple of P.
        axes: P, numbers a position has.
        layout: "half_split" or "interleaved", of the whole head.
        base: of the frequencies; the paper has 100 for images of 14 × 14 patches.

    Raises:
        ShapeError: odd width, or axes that do not divide D/2.
        ValueError: unknown layout, or a base not above 0.

    Example:
        >>> axial = AxialRotary(4, layout="interleaved")
        >>> axial(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[1, 0]]))
        tensor([[0.5403, 0.8415, 1.0000, 0.0000]])

    Source: [Heo2024]_.
    """

    def __init__(self, head_width: int, *, layout: str, axes: int = 2, base: float = 10_000.0) -> None:
        super().__init__(head_width, layout=layout, axes=axes)
        if head_width // 2 % axes:
            raise ShapeError(
                f"axes: expected a divisor of head_width/2 = {head_width // 2}, got {axes}; widen the heads"
            )
        check_base(base)
        self.base = base

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.head_width}, axes={self.axes}, layout={self.layout!r}, base={self.base:g}"

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        width = self.head_width // self.axes
        pair = torch.arange(0, width, 2, device=x.device, dtype=coordinates.dtype)
        return (coordinates.unsqueeze(-1) * self.base ** (-pair / width)).flatten(-2)
