"""CoPE: positions are counted in tokens that the query deems worth counting."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import check_sizes
from liegroup_attn.positional.bias import BiasEncoding

__all__ = ["CoPE"]


class CoPE(BiasEncoding):
    """q_i·e[p_ij]/√D is added to the scores, p_ij = Σ g_il over j ≤ l ≤ i, with gates g_il = σ(q_i·k_l/√D).

    Positions are no integers: e[p] interpolates between rows of a learned table and stops at its end. Gates and bias are of
    scaled scores, so that q·(k + e[p])/√D is what goes into the softmax. Takes (B, H, N, N + ``max_positions``) numbers.

    Means something under a causal mask alone; ``positions`` do not enter, so packed documents need a mask.

    Args:
        num_heads: H.
        head_width: D.
        max_positions: rows of the table.
        std: of its entries at the start; at 0 gates would have no gradient.

    Raises:
        ShapeError: sizes < 1, or fewer than 2 rows.
        ValueError: std not positive.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> CoPE(2, 4)(torch.zeros(1, 3, 8), q, q).shape
        torch.Size([1, 2, 3, 3])

    Source: [Golovneva2024]_.
    """

    contextual = True
    causal_only = True

    def __init__(self, num_heads: int, head_width: int, *, max_positions: int = 64, std: float = 0.02) -> None:
        super().__init__(num_heads)
        check_sizes(head_width=head_width, max_positions=max_positions)
        if max_positions < 2:
            raise ShapeError(f"max_positions: expected at least 2, got {max_positions}; e[p] lies between two rows")
        if not std > 0:
            raise ValueError(f"std: expected a positive number, got {std}; at 0 gates have no gradient")
        self.head_width = head_width
        self.table = nn.Parameter(std * torch.randn(max_positions, head_width))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.num_heads}, {self.head_width}, max_positions={len(self.table)}"

    def between(self, here: Tensor, there: Tensor, *leaves: Tensor) -> Tensor:  # noqa: D102
        raise NotImplementedError("between: expected tokens beside positions; call the encoding with queries and keys")

    def of_tokens(self, x: Tensor, query: Tensor, key: Tensor, coordinates: Tensor) -> Tensor:  # noqa: D102
        if query.size(-1) != self.head_width:
            raise ShapeError(
                f"query: expected width {self.head_width}, got shape {tuple(query.shape)}; match head_width"
            )
        scaled = query / math.sqrt(self.head_width)
        gates = (scaled @ key.mT).sigmoid().tril()  # (B, H, N, N)
        position = gates.flip(-1).cumsum(-1).flip(-1).clamp_max(len(self.table) - 1)
        below = position.detach().floor().clamp_max(len(self.table) - 2).long()
        at_rows = scaled @ self.table.to(scaled.dtype).mT  # (B, H, N, rows)
        lower, upper = at_rows.gather(-1, below), at_rows.gather(-1, below + 1)
        return (lower + (position - below) * (upper - lower)).tril()
