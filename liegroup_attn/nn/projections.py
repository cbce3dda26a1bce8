"""Queries, keys, values and positions: what every self-attention makes of its input, however values are mixed then."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import CacheError, MaskError, ShapeError
from liegroup_attn.nn.cache import AttentionCache
from liegroup_attn.nn.scores import BilinearScores, with_bias
from liegroup_attn.positional import BiasEncoding, RotationEncoding
from liegroup_attn.resettable import Resettable
from liegroup_attn.scores import Score, TensorBias
from liegroup_attn.tensors import without_autocast

__all__ = ["Inputs", "Projections"]


class Inputs(NamedTuple):
    """What a layer makes of its input."""

    x: Tensor  # (B, N, C)
    query: Tensor  # (B, H, N, E)
    key: Tensor  # (B, H_kv, N, E)
    value: Tensor  # (B, H_kv, N, D)
    attn_mask: Tensor | None
    score: Score | None  # of the positions


class Projections(Resettable):
    """Queries, keys and values of H heads, with positions; arguments and errors are those of ``SelfAttention``."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        encoding: RotationEncoding | BiasEncoding | None = None,
        scores: BilinearScores | None = None,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self._declare()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ShapeError(
                f"num_heads: expected a divisor of embed_dim={embed_dim} and a multiple of num_kv_heads={num_kv_heads}, "
                f"got {num_heads}; change one of the three"
            )
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_width = embed_dim // num_heads
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected 0 ≤ dropout < 1, got {dropout}; choose a probability")
        self.is_causal = is_causal
        self.dropout = dropout
        self.encoding = encoding
        self._check_encoding()
        self._make_scores(scores, bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_width, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def _declare(self) -> None:
        """Parts that come before the projections in the order of parameters."""

    def _check_encoding(self) -> None:
        encoding = self.encoding
        if encoding is None:
            return
        if not isinstance(encoding, RotationEncoding | BiasEncoding):
            raise TypeError(
                f"encoding: expected a RotationEncoding or BiasEncoding, got {type(encoding).__name__}; build_encoding makes one "
                "of a recipe, absolute encodings are added to the tokens before the first layer"
            )
        if isinstance(encoding, RotationEncoding):
            if encoding.head_width != self.head_width:
                raise ShapeError(
                    f"encoding: expected head_width={self.head_width}, got {encoding.head_width}; it is embed_dim // num_heads"
                )
            if encoding.num_heads not in (None, self.num_kv_heads):
                raise ShapeError(
                    f"encoding: expected num_heads={self.num_kv_heads}, got {encoding.num_heads}; one R per key head"
                )
        elif encoding.num_heads != self.num_heads:
            raise ShapeError(
                f"encoding: expected num_heads={self.num_heads}, got {encoding.num_heads}; one bias per query head"
            )
        if encoding.causal_only and not self.is_causal:
            raise MaskError(
                f"encoding: expected is_causal=True beside {type(encoding).__name__}, got False; it means something for "
                "earlier tokens alone"
            )
        if (looks_back := getattr(encoding, "is_causal", self.is_causal)) != self.is_causal:
            raise MaskError(
                f"encoding: expected is_causal={self.is_causal} as the layer's, got {type(encoding).__name__} with "
                f"{looks_back}; build it for this layer"
            )

    def _make_scores(self, scores: BilinearScores | None, bias: bool) -> None:
        """Two projections, or the module that stands for them."""
        self.scores = scores
        if scores is None:
            self.q_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=bias)
            self.k_proj = nn.Linear(self.embed_dim, self.num_kv_heads * self.head_width, bias=bias)
            return
        sizes = self.embed_dim, self.num_heads, self.num_kv_heads
        if sizes != (scores.embed_dim, scores.num_heads, scores.num_heads):
            raise ShapeError(
                f"scores: expected embed_dim, num_heads and num_kv_heads {sizes} with as many key heads, got "
                f"{scores.embed_dim}, {scores.num_heads}; make them for this layer and leave num_kv_heads out"
            )
        if scores.symmetric and (self.is_causal or self.encoding is not None):
            raise MaskError(
                f"scores: expected is_causal=False and encoding=None with {type(scores).__name__}, got one of them; they "
                "break the symmetry, embed positions in the tokens instead"
            )

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.embed_dim}, num_heads={self.num_heads}, is_causal={self.is_causal}, dropout={self.dropout}"

    def _inputs(
        self, x: Tensor, positions: Tensor | None, attn_mask: Tensor | None, cache: AttentionCache | None = None
    ) -> Inputs:
        score: Score | None = None if cache is None else self._score_of_new(cache, x, positions)
        self._check_positions(x, positions)
        if cache is not None and positions is None:
            positions = torch.arange(cache.length, cache.length + x.size(-2), device=x.device)
        query, key, value = self._project(x, positions)
        if cache is None and isinstance(self.encoding, BiasEncoding):
            score = self.encoding.score(x, query, key, positions)
        return Inputs(x, query, key, value, attn_mask, score)

    def _check_positions(self, x: Tensor, positions: Tensor | None) -> None:
        """Two dimensions could be items or heads."""
        if positions is None or self.encoding is None:
            return
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: expected a tensor, got {type(positions).__name__}; use torch.as_tensor")
        shape = positions.shape[:-1] if self.encoding.axes > 1 else positions.shape
        items = len(shape) == 3 and shape[0] in (1, x.size(0)) and shape[1] == 1
        if not ((len(shape) == 1 or items) and shape[-1] in (1, x.size(-2))):
            several = f", {self.encoding.axes}" if self.encoding.axes > 1 else ""
            raise ShapeError(
                f"positions: expected ({x.size(-2)}{several}) or ({x.size(0)}, 1, {x.size(-2)}{several}), got "
                f"{tuple(positions.shape)}; index them as (batch, 1, token{', axis' if several else ''})"
            )

    def _score_of_new(self, cache: AttentionCache, x: Tensor, positions: Tensor | None) -> TensorBias | None:
        """The bias between new tokens and all so far."""
        if not isinstance(self.encoding, BiasEncoding):
            return None
        if positions is not None:
            raise CacheError(
                f"positions: expected None beside a cache with {type(self.encoding).__name__}, got some; the cache knows no "
                "positions of earlier tokens, they count from 0"
            )
        seen = torch.arange(cache.length + x.size(-2), device=x.device).unsqueeze(-1)
        seen = seen.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        with without_autocast(x):
            return TensorBias(self.encoding.between(seen[cache.length :], seen.mT), cache.length)  # (H, new, all)

    def _values(self, x: Tensor) -> Tensor:
        check_shape("x", x, least_rank=3, remedy="give (batch, tokens, width)")
        if x.dim() != 3 or x.size(-1) != self.embed_dim:
            raise ShapeError(f"x: expected (batch, tokens, {self.embed_dim}), got {tuple(x.shape)}; match embed_dim")
        return self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)  # (B, H_kv, N, D)

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        value = self._values(x)
        if self.scores is not None:
            query, key = self.scores(x)
        else:
            query = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
            key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)  # (B, H_kv, N, D)
        if isinstance(self.encoding, RotationEncoding):
            query, key = self.encoding.rotate(query, key, positions)
        bias = None if self.scores is None else self.scores.key_bias(x)
        return (query, key, value) if bias is None else (*with_bias(query, key, bias), value)
