"""The contract of encodings that act on the scores."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import ShapeError
from liegroup_attn.positional.base import PositionalEncoding
from liegroup_attn.scores import PairBias, Score, TensorBias
from liegroup_attn.tensors import of_heads, without_autocast

__all__ = ["BiasEncoding"]


class BiasEncoding(PositionalEncoding):
    """A number per head and pair of tokens is added to the scores: a unipotent action, or log-rates before the jump chain.

    Args:
        num_heads: H.
    """

    contextual = False  # whether it depends on the tokens, too; decoding with a cache needs those that do not

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ShapeError(f"num_heads: expected at least 1, got {num_heads}; one bias per head")
        self.num_heads = num_heads

    def leaves(self) -> tuple[Tensor, ...]:
        """What ``between`` takes behind the positions, and may be differentiated by: parameters and buffers.

        With none, and parameters of its own, an encoding is formed, (H, N, N), where others are computed by blocks.
        """
        return ()

    @abstractmethod
    def between(self, here: Tensor, there: Tensor, *leaves: Tensor) -> Tensor:
        """The bias between positions, for encodings that are not ``contextual``.

        Args:
            here: of queries, (..., N, 1), float32 or float64.
            there: of keys, (..., 1, M).
            *leaves: in the place of those of ``leaves``; none for these.

        Returns:
            (..., H, N, M), its dtype.
        """

    def score(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor | None = None) -> Score:
        """What acts on the scores, block of rows by block of rows; arguments and errors as in ``forward``."""
        if self.contextual or (not self.leaves() and any(True for _ in self.parameters())):
            return TensorBias(self(x, query, key, positions))
        return PairBias(self.between, self._coordinates(query, positions), self.leaves())

    def _coordinates(self, query: Tensor, positions: Tensor | None) -> Tensor:
        check_shape("query", query, least_rank=3, remedy="give (batch, heads, tokens, width)")
        if query.size(-3) != self.num_heads:
            raise ShapeError(f"query: expected {self.num_heads} heads, got shape {tuple(query.shape)}; match num_heads")
        return self.coordinates(positions, torch.Size([*query.shape[:-3], 1, query.size(-2)]), query)

    def of_tokens(self, x: Tensor, query: Tensor, key: Tensor, coordinates: Tensor) -> Tensor:
        """The bias between tokens, (..., H, N, N); overridden by encodings that are ``contextual``.

        Args:
            x: (B, N, C), the layer's input.
            query: (B, H, N, D), float32 or float64.
            key: (B, H, N, D).
            coordinates: (..., N, 1).
        """
        return self.between(coordinates, coordinates.mT)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor | None = None) -> Tensor:
        """The bias.

        Args:
            x: (B, N, C), the layer's input.
            query: (B, H, N, D).
            key: (B, H_kv, N, D).
            positions: broadcastable to (B, 1, N) or (N,); default 0 … N − 1.

        Returns:
            Broadcastable to (B, H, N, N), float32 or float64; finite, also where a causal mask hides.

        Raises:
            ShapeError, DtypeError, ValueError: see ``coordinates``; or another number of heads.
        """
        with without_autocast(query):
            coordinates = self._coordinates(query, positions)
            wide = coordinates.dtype
            key = of_heads(key, self.num_heads)
            return self.of_tokens(x.to(wide), query.to(wide), key.to(wide), coordinates)
