"""RoPE-Mixed: learned frequencies on every axis, per head and pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.positional.pairs import PairRotation

__all__ = ["MixedRotary"]


class MixedRotary(PairRotation):
    """Pair i of a head turns by Σ_p x_p θ_pi, θ learned; all planes turn at once, so the law holds on all axes.

    Starts as axial RoPE along the axes of a random rotation of space per head (of one axis: as RoPE).

    Args:
        head_width: D, even.
        num_heads: key heads.
        axes: P, numbers a position has.
        layout: "half_split" or "interleaved".
        base: of the frequencies at the start.

    Raises:
        ShapeError: odd width, or sizes < 1.
        ValueError: unknown layout.

    Example:
        >>> MixedRotary(8, 2, layout="half_split").theta.shape
        torch.Size([2, 2, 4])

    Source: [Heo2024]_.
    """

    def __init__(self, head_width: int, num_heads: int, *, layout: str, axes: int = 2, base: float = 10_000.0) -> None:
        super().__init__(head_width, layout=layout, num_heads=num_heads, axes=axes)
        self.base = base
        pairs = head_width // 2
        share = -(-pairs // axes)  # pairs along one direction
        index = torch.arange(pairs)
        frames = torch.linalg.qr(torch.randn(num_heads, axes, axes))[0]
        frames = torch.cat([frames[..., :1] * torch.linalg.det(frames).sign()[:, None, None], frames[..., 1:]], -1)
        self.theta = nn.Parameter(frames[..., index // share] * base ** -(index % share / share))  # (H, P, D/2)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.head_width}, {self.num_heads}, axes={self.axes}, layout={self.layout!r}, base={self.base:g}"

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        theta = self.per_head(self.theta, x)
        # A sum of products, not a matmul: TF32 would merge far positions.
        return sum(coordinates[..., p : p + 1] * theta[:, p : p + 1] for p in range(self.axes))  # type: ignore[return-value]
