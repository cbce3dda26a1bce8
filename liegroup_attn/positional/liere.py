"""LieRE: a position rotates by the exponential of learned skew-symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.positional.blocks import BlockExponential, skew_blocks, start_entries
from liegroup_attn.positional.heads import start_frequencies

__all__ = ["LieRotary"]


class LieRotary(BlockExponential):
    """LieRE: R(x) = exp(Σ_p x_p A_p) with a free skew-symmetric A_p for every axis, in blocks of size b; b = D is dense.

    R(x)ᵀR(y) = R(y − x) holds on one axis and for b = 2 alone: larger A_p do not commute, ``relative`` is then False and
    scores know where tokens are, not only how far apart.

    At the start every A_p turns random planes at RoPE's frequencies.

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        axes: P.
        block: b, divides D; cost and memory grow with it.
        base: of the frequencies at the start.

    Raises:
        ShapeError: odd width, sizes < 1, a block that does not divide the width.
        ValueError: base ≤ 0.

    Example:
        >>> LieRotary(8, 2, block=4).relative, LieRotary(8, 2, axes=2, block=4).relative
        (True, False)

    Source: [Ostmeier2025]_.
    """

    def __init__(
        self, head_width: int, num_heads: int, *, axes: int = 1, block: int = 8, base: float = 10_000.0
    ) -> None:
        super().__init__(head_width, num_heads, axes, block)
        self.relative = axes == 1 or block == 2
        pairs = self.num_blocks * (block // 2)
        frequencies = start_frequencies(num_heads, pairs, axes, base)  # (H, D/2, P)
        by_axis = frequencies.mT.unflatten(-1, (self.num_blocks, -1))  # (H, P, D/b, b // 2)
        self.entries = nn.Parameter(start_entries(by_axis, block))

    def multiples(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: D102
        entries = self.entries.to(dtype)  # (H, P, D/b, b(b − 1)/2)
        if self.block == 2:
            return entries.squeeze(-1), skew_blocks(torch.ones_like(entries[:, 0]), 2)
        return torch.ones_like(entries[..., 0]), skew_blocks(entries[:, 0], self.block)

    def generators(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return skew_blocks(self.entries.to(dtype), self.block)
