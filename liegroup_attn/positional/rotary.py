"""RoPE: position m acts on each feature pair by a rotation through mθ_i."""

from __future__ import annotations

import torch
from torch import Tensor

from liegroup_attn.positional.pairs import PairRotation

__all__ = ["RotaryEncoding"]


class RotaryEncoding(PairRotation):
    """Rotary position encoding; scores of rotated queries and keys depend on positions through m − n only.

    Angles mθ_i, θ_i = base^(−2i/D), are made anew from positions in at least float32 on every call: nothing
    is cached or cast by ``.to(torch.bfloat16)``, which would merge 4096 positions into 769.

    Args:
        head_width: D, even.
        layout: which features form a pair: "half_split" pairs i with i + D/2, "interleaved" 2i with 2i + 1. Both are
            in use; checkpoints do not say which.
        base: of the frequencies.

    Raises:
        ShapeError: odd width.
        ValueError: unknown layout.

    Example:
        >>> rotary = RotaryEncoding(4, layout="half_split")
        >>> rotary(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([1]))
        tensor([[0.5403, 0.9999, 0.8415, 0.0100]])

    Source: [Su2021]_.
    """

    def __init__(self, head_width: int, *, layout: str, base: float = 10_000.0) -> None:
        super().__init__(head_width, layout=layout)
        self.base = base

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.head_width}, layout={self.layout!r}, base={self.base:g}"

    def angles(self, coordinates: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        pair = torch.arange(0, self.head_width, 2, device=x.device, dtype=coordinates.dtype)
        return coordinates * self.base ** (-pair / self.head_width)  # (..., N, D/2)
