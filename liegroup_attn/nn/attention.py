"""Self-attention modules with the same projections; only ``mix`` differs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.checks import check_shape
from liegroup_attn.errors import CacheError, MaskError, ShapeError
from liegroup_attn.generators import Generator
from liegroup_attn.masks import biased_mask
from liegroup_attn.nn.cache import AttentionCache
from liegroup_attn.nn.scores import BilinearScores
from liegroup_attn.positional import BiasEncoding, RotationEncoding
from liegroup_attn.resettable import Resettable
from liegroup_attn.tensors import without_autocast

__all__ = ["SelfAttention", "SoftmaxAttention"]


class SelfAttention(Resettable, ABC):
    """Multi-head self-attention but for how values are mixed.

    Args:
        embed_dim: C, model width.
        num_heads: H, divides C.
        num_kv_heads: heads of keys and values, divides H; default H.
        is_causal: lower-triangular mask.
        encoding: of positions, on queries and keys (``RotationEncoding``) or on the scores (``BiasEncoding``); None for none.
        scores: makes queries and keys instead of two linear projections, see ``BilinearScores``.
        dropout: probability of dropping an entry of S, in training.
        bias: of the projections.

    Raises:
        ShapeError: widths or heads that do not divide.
        ValueError: dropout outside [0, 1).
        MaskError: symmetric scores with a causal mask or an encoding, which break the symmetry; an encoding that needs a
            causal mask without one.
    """

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

    @abstractmethod
    def mix(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Mix values over tokens.

        Args:
            x: (B, N, C), the layer's input.
            query: (B, H, N, D).
            key: (B, H_kv, N, D).
            value: (B, H_kv or H, N, any width).
            attn_mask: broadcastable to (B, H, N, N), bool (True = takes part) or float.
            bias: of the positions, broadcastable to (B, H, N, N).

        Returns:
            (B, H, N, width of value).
        """

    @abstractmethod
    def extend(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Mix values of new tokens with all before them, and keep what later ones need.

        Args:
            x: (B, N, C), the new tokens.
            query: (B, H, N, D).
            key: (B, H_kv, N, D).
            value: (B, H_kv, N, D).
            cache: of the earlier tokens, checked; the new ones are appended.
            bias: of the positions, broadcastable to (B, H, N, earlier and new tokens).

        Returns:
            (B, H, N, D).
        """

    @abstractmethod
    def cached_values(self, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:
        """What a cache keeps of a token beside its key of some dtype: heads, width and dtype."""

    def cache_settings(self) -> tuple[object, ...]:
        """What cached values depend on besides the tokens."""
        return ()

    @property
    def can_cache(self) -> bool:
        """Whether ``new_cache`` gives one."""
        contextual = isinstance(self.encoding, BiasEncoding) and self.encoding.contextual
        return self.is_causal and not contextual

    def flows(self, x: Tensor, positions: Tensor | None = None) -> dict[str, tuple[Generator, Tensor]]:
        """The generators along which values flow, and for how long; the last one first. None for softmax attention.

        Args:
            x: (B, N, C), the layer's input.
            positions: as in ``forward``.

        Returns:
            Name → generator on (B, H, N, N) or (H, N, N), and times (H, 1).
        """
        return {}

    def new_cache(
        self,
        batch_size: int,
        max_tokens: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionCache:
        """An empty cache for decoding.

        Args:
            batch_size: B.
            max_tokens: T, for how many tokens there shall be room.
            dtype: of the keys; default that of the weights.
            device: default that of the weights.

        Returns:
            The cache, to be given to ``forward``.

        Raises:
            CacheError: the layer is not causal, or sizes < 1.
        """
        if not self.is_causal:
            raise CacheError(
                "cache: expected a layer with is_causal=True, got False; later tokens would change earlier ones"
            )
        if isinstance(self.encoding, BiasEncoding) and self.encoding.contextual:
            raise CacheError(
                f"cache: expected positions that tokens do not change, got {type(self.encoding).__name__}; generate with "
                "use_cache=False"
            )
        if batch_size < 1 or max_tokens < 1:
            raise CacheError(f"cache: expected batch_size, max_tokens ≥ 1, got {batch_size}, {max_tokens}; make room")
        weight = self.v_proj.weight
        dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
        heads, width, kept = self.cached_values(dtype)
        keys = torch.zeros(batch_size, self.num_kv_heads, max_tokens, self.head_width, dtype=dtype, device=device)
        values = torch.zeros(batch_size, heads, max_tokens, width, dtype=kept, device=device)
        return AttentionCache(self, keys, values, self.cache_settings())

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C).
            attn_mask: broadcastable to (B, H, N, N), bool (True = takes part) or float (added to the scores); beside the
                causal mask, if the layer has one.
            positions: broadcastable to (B, 1, N), or (B, 1, N, P) on P axes; default 0 … N − 1, or on from the cache's length.
            cache: of the tokens before these; they are then taken into account, and these appended.

        Returns:
            (B, N, C).

        Raises:
            ShapeError: ``x`` is not (B, N, C).
            CacheError: a cache of another layer, batch, dtype or time, or one that is full; positions beside a cache of a
                layer whose encoding biases scores.
            MaskError: a mask beside a cache.
        """
        if cache is None:
            mixed = self.mix(x, *self._inputs(x, positions, attn_mask))  # (B, H, N, D)
        else:
            if attn_mask is not None:
                raise MaskError("attn_mask: expected None beside a cache, got a mask; decode sequences of equal length")
            if self.training and self.dropout:
                raise CacheError("cache: expected a layer in eval mode, got one that drops entries; call .eval()")
            bias = self._bias_of_new(cache, x, positions)
            self._check_positions(x, positions)
            if positions is None:
                positions = torch.arange(cache.length, cache.length + x.size(-2), device=x.device)
            query, key, value = self._project(x, positions)
            cache.check(self, key, self.cache_settings())
            mixed = self.extend(x, query, key, value, cache, bias)  # (B, H, N, D)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def mixing_matrix(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What multiplies the values: softmax weights, exp(tQ), or what the switches make of it.

        Args:
            x: (B, N, C), the layer's input.
            attn_mask: as in ``forward``.
            positions: as in ``forward``.

        Returns:
            (B, H, N, N); rows sum to 1 (without dropout).
        """
        query, key, value, mask, bias = self._inputs(x, positions, attn_mask)
        eye = torch.eye(x.size(1), dtype=value.dtype, device=x.device)
        return self.mix(x, query, key, eye.expand(*value.shape[:2], -1, -1), mask, bias)

    def _inputs(
        self, x: Tensor, positions: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What ``mix`` takes beside x."""
        self._check_positions(x, positions)
        query, key, value = self._project(x, positions)
        bias = self.encoding(x, query, key, positions) if isinstance(self.encoding, BiasEncoding) else None
        return query, key, value, attn_mask, bias

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

    def _bias_of_new(self, cache: AttentionCache, x: Tensor, positions: Tensor | None) -> Tensor | None:
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
            return self.encoding.between(seen[cache.length :], seen.mT)  # (H, new, all)

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
        return (query, key, value) if bias is None else (*_with_bias(query, key, bias), value)


def _with_bias(query: Tensor, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One more feature, so that q·k/√(D + 1) is what q·k/√D + bias was: (B, H, N, D + 1)."""
    width = query.size(-1)
    one = torch.full_like(query[..., :1], math.sqrt(width + 1))
    return (
        torch.cat([query * math.sqrt((width + 1) / width), one], -1),
        torch.cat([key, bias.unsqueeze(-1).to(key.dtype)], -1),
    )


class SoftmaxAttention(SelfAttention):
    """Standard attention: values are mixed by S = softmax(scores).

    Args: those of ``SelfAttention``.

    Example:
        >>> layer = SoftmaxAttention(16, 2, is_causal=True)
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: [Vaswani2017]_.
    """

    def mix(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        mask = biased_mask(bias, attn_mask, self.is_causal, query, key)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            self.dropout if self.training else 0.0,
            self.is_causal and mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def cached_values(self, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:  # noqa: D102
        return self.num_kv_heads, self.head_width, dtype

    def extend(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache,
        bias: Tensor | None = None,
    ) -> Tensor:
        past, new = cache.length, query.size(-2)
        cache.append(key, value)
        # A single token sees all; several see the past and one another causally.
        mask = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past) if new > 1 else None
        mask = biased_mask(bias, mask, False, query, key)
        return F.scaled_dot_product_attention(
            query,
            cache.keys[:, :, : cache.length],
            cache.values[:, :, : cache.length],
            mask,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
