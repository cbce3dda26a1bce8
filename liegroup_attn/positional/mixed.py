"""RoPE-Mixed: learned frequencies on every axis, per head and pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.positional.base import along_axes, check_sizes
from liegroup_attn.positional.pairs import PairRotation, check_base, check_pairs

__all__ = ["HeadFrequencies", "MixedRotary"]


class HeadFrequencies(PairRotation):
    """Pair i of head h turns by ⟨x, f_hi⟩; all planes turn at once, so the law holds on all axes.

    Args:
        frequencies: f, (H, D/2, P), float32 or wider; becomes a parameter.
        layout: "half_split" or "interleaved".
    """

    def __init__(self, frequencies: Tensor, *, layout: str) -> None:
        heads, pairs, axes = frequencies.shape
        super().__init__(2 * pairs, layout=layout, num_heads=heads, axes=axes)
        self.frequencies = nn.Parameter(frequencies.detach().clone())

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.head_width}, {self.num_heads}, axes={self.axes}"

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return along_axes(coordinates, self.per_head(self.frequencies, x).mT)  # (H, P, D/2)


class MixedRotary(HeadFrequencies):
    """RoPE-Mixed: pair i of a head turns by Σ_p x_p f_ip, f learned; all planes turn at once, so the law holds on all axes.

    Starts as axial RoPE along the axes of a random rotation of space per head, pairs taking axes in turn (of one axis: as
    RoPE).

    Args:
        head_width: D, even.
        num_heads: key heads.
        axes: P, numbers a position has.
        layout: "half_split" or "interleaved".
        base: of the frequencies at the start. The default is RoPE's, for axes as long as texts; the authors' code has 10,
            for images of 14 × 14 patches.

    Raises:
        ShapeError: odd width, or sizes < 1.
        ValueError: unknown layout, or a base not above 0.

    Example:
        >>> MixedRotary(8, 2, layout="half_split", base=10.0).frequencies.shape
        torch.Size([2, 4, 2])

    Source: [Heo2024]_.
    """

    def __init__(self, head_width: int, num_heads: int, *, layout: str, axes: int = 2, base: float = 10_000.0) -> None:
        check_sizes(num_heads=num_heads, axes=axes)
        check_pairs(head_width)
        check_base(base)
        pairs = head_width // 2
        index = torch.arange(pairs)
        frames = torch.linalg.qr(torch.randn(num_heads, axes, axes))[0]
        frames[..., 0] *= torch.linalg.det(frames).sign()[:, None]  # a rotation: along one axis, forwards
        along = frames[..., index % axes] * base ** -(index // axes * axes / pairs)  # (H, P, D/2)
        super().__init__(along.mT, layout=layout)
        self.base = base

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, layout={self.layout!r}, base={self.base:g}"
