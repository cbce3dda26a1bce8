"""A pre-norm Transformer whose attention is a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from liegroup_attn.errors import ShapeError
from liegroup_attn.nn.recipe import AttentionRecipe, build_attention, build_rotary

__all__ = ["Block", "Transformer"]


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, attention: nn.Module, width: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), attn_mask, positions))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """A stack of pre-norm blocks and a last norm; token embedding and head belong to the caller.

    Args:
        width: C, model width.
        depth: number of blocks.
        num_heads: H.
        attention: recipe, e.g. ``{"module": "LieAttention", "first_hop": True}``; default softmax.
        is_causal: lower-triangular mask.
        mlp_ratio: hidden width of the feed-forward layer over C.
        dropout: on attention entries and on each residual branch, in training.
        rotary_layout: "half_split" or "interleaved" RoPE on queries and keys; None for no positions.
        rotary_base: of the RoPE frequencies.

    Raises:
        ShapeError: widths and heads that do not divide.
        ValueError: an unknown key or name in the recipe.

    Example:
        >>> import torch
        >>> model = Transformer(16, 2, 2, {"module": "LieAttention", "time": 2.0}, is_causal=True)
        >>> model(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: [Vaswani2017]_, [Xiong2020]_ (pre-norm).
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        attention: AttentionRecipe | Mapping[str, Any] | None = None,
        *,
        is_causal: bool = False,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        rotary_layout: str | None = "half_split",
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ShapeError(f"num_heads: expected a divisor of width={width}, got {num_heads}; change one of the two")
        recipe = {"module": "SoftmaxAttention"} if attention is None else attention
        blocks = []
        for _ in range(depth):
            rotary = build_rotary(width // num_heads, rotary_layout, rotary_base)
            layer = build_attention(recipe, width, num_heads, is_causal=is_causal, rotary=rotary, dropout=dropout)
            blocks.append(Block(layer, width, mlp_ratio, dropout))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Run the stack.

        Args:
            x: (B, N, C).
            attn_mask: broadcastable to (B, H, N, N), bool (True = takes part) or float.
            positions: integers, broadcastable to (B, 1, N); default 0 … N − 1.

        Returns:
            (B, N, C).
        """
        for block in self.blocks:
            x = block(x, attn_mask, positions)
        return self.norm(x)
