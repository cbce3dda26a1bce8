"""ComRoPE: learned skew-symmetric blocks that commute by construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.blocks import BlockExponential, skew_blocks, start_entries
from liegroup_attn.positional.heads import start_frequencies

__all__ = ["AxialBlocks", "DependentBlocks"]


class AxialBlocks(BlockExponential):
    """ComRoPE-AP: R(x) = exp(Σ_p x_p A_p), each block of which belongs to one axis: block k to axis k mod P, all others are 0 there.

    R(x)ᵀR(y) = R(y − x) holds: blocks of different axes commute. At the start the blocks of every axis turn random planes
    at RoPE's frequencies.

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        axes: P, at most D/b.
        block: b, divides D.
        base: of the frequencies at the start.

    Raises:
        ShapeError: odd width, sizes < 1, a block that does not divide the width, fewer blocks than axes.
        ValueError: base ≤ 0.

    Example:
        >>> AxialBlocks(8, 2, axes=2, block=4).generators(torch.float32).shape
        torch.Size([2, 2, 2, 4, 4])

    Source: [Yu2025]_.
    """

    def __init__(
        self, head_width: int, num_heads: int, *, axes: int = 1, block: int = 8, base: float = 10_000.0
    ) -> None:
        super().__init__(head_width, num_heads, axes, block)
        if self.num_blocks < axes:
            raise ShapeError(
                f"block: expected at most head_width // axes = {head_width // axes}, got {block}; every axis needs a block"
            )
        rounds = -(-self.num_blocks // axes)  # blocks of the axis that has most
        frequencies = start_frequencies(num_heads, rounds * (block // 2), 1, base)
        each = frequencies.squeeze(-1).unflatten(-1, (rounds, -1)).repeat_interleave(axes, 1)[:, : self.num_blocks]
        self.entries = nn.Parameter(start_entries(each, block))  # (H, D/b, b(b − 1)/2)

    def multiples(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: D102
        common = skew_blocks(self.entries.to(dtype), self.block)
        place = torch.arange(self.num_blocks, device=common.device) % self.axes
        belongs = place == torch.arange(self.axes, device=common.device).unsqueeze(-1)  # (P, D/b)
        return belongs.to(dtype).expand(self.num_heads, -1, -1), common


class DependentBlocks(BlockExponential):
    """ComRoPE-LD: R(x) = exp(Σ_p x_p A_p), A_p = θ_p A in each block: linearly dependent, one skew-symmetric A and a factor for each axis.

    R(x)ᵀR(y) = R(y − x) holds: multiples of one matrix commute. At the start A turns random planes at RoPE's frequencies,
    and θ is a random direction.

    Args:
        head_width: D, even.
        num_heads: H, number of key heads.
        axes: P.
        block: b, divides D.
        base: of the frequencies at the start.

    Raises:
        ShapeError: odd width, sizes < 1, a block that does not divide the width.
        ValueError: base ≤ 0.

    Example:
        >>> DependentBlocks(8, 2, axes=2, block=4).generators(torch.float32).shape
        torch.Size([2, 2, 2, 4, 4])

    Source: [Yu2025]_.
    """

    def __init__(
        self, head_width: int, num_heads: int, *, axes: int = 1, block: int = 8, base: float = 10_000.0
    ) -> None:
        super().__init__(head_width, num_heads, axes, block)
        frequencies = start_frequencies(num_heads, self.num_blocks * (block // 2), 1, base).squeeze(-1)
        self.entries = nn.Parameter(start_entries(frequencies.unflatten(-1, (self.num_blocks, -1)), block))
        self.factors = nn.Parameter(
            start_frequencies(num_heads, self.num_blocks, axes, 1.0).mT.contiguous()
        )  # (H, P, D/b)

    def multiples(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.factors.to(dtype), skew_blocks(self.entries.to(dtype), self.block)
