"""Learned positions: a table with a vector per position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.positional.base import AbsoluteEncoding, check_sizes
from liegroup_attn.tensors import values_visible

__all__ = ["LearnedEncoding"]


class LearnedEncoding(AbsoluteEncoding):
    """One learned vector per position; there is none beyond the table.

    Args:
        embed_dim: C.
        num_positions: rows of the table.
        std: of its entries at the start.

    Raises:
        ShapeError: sizes < 1.

    Example:
        >>> encoding = LearnedEncoding(4, num_positions=8)
        >>> encoding(torch.zeros(2, 9, 4))
        Traceback (most recent call last):
        ...
        ValueError: positions: expected numbers < 8 for a table of 8, got 8; train with num_positions=9

    Source: [Gehring2017]_; [Devlin2019]_.
    """

    fractional = False
    negative = False

    def __init__(self, embed_dim: int, num_positions: int, *, std: float = 0.02) -> None:
        super().__init__(embed_dim)
        check_sizes(num_positions=num_positions)
        self.weight = nn.Parameter(torch.randn(num_positions, embed_dim) * std)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.embed_dim}, num_positions={len(self.weight)}"

    def table(self, coordinates: Tensor) -> Tensor:  # noqa: D102
        index = coordinates.squeeze(-1).long()
        most = len(self.weight)
        if index.numel() and values_visible(index) and int(index.max()) >= most:
            last = int(index.max())
            raise ValueError(
                f"positions: expected numbers < {most} for a table of {most}, got {last}; train with num_positions={last + 1}"
            )
        return self.weight[index].to(coordinates.dtype)
