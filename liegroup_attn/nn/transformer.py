"""A pre-norm Transformer whose attention is a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.errors import CacheError, ShapeError
from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.nn.cache import AttentionCache, TransformerCache
from liegroup_attn.nn.generation import continue_tokens
from liegroup_attn.nn.recipe import ROPE, build_attention, build_encoding
from liegroup_attn.nn.streams import Residual, ResidualStreams
from liegroup_attn.positional import AbsoluteEncoding
from liegroup_attn.resettable import Resettable
from liegroup_attn.tensors import autocast_dtype

__all__ = ["Block", "Transformer"]


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x); or the same on several residual streams."""

    def __init__(
        self,
        attention: SelfAttention,
        width: int,
        mlp_ratio: float,
        dropout: float,
        attention_residual: Residual | None = None,
        mlp_residual: Residual | None = None,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)
        self.attention_residual = attention_residual or Residual()
        self.mlp_residual = mlp_residual or Residual()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """(B, N, C) → (B, N, C), or (B, N, S, C) → (B, N, S, C) on S streams."""
        y = self.attention(self.attention_norm(self.attention_residual.read(x)), attn_mask, positions, cache)
        x = self.attention_residual.write(x, self.dropout(y))
        y = self.mlp(self.mlp_norm(self.mlp_residual.read(x)))
        return self.mlp_residual.write(x, self.dropout(y))


class Transformer(Resettable):
    """A stack of pre-norm blocks and a last norm; token embedding and head belong to the caller.

    Args:
        width: C, model width.
        depth: number of blocks.
        num_heads: H.
        attention: recipe, e.g. ``{"module": "LieAttention", "time": 2.0}``, see ``build_attention``; default softmax.
        is_causal: lower-triangular mask.
        mlp_ratio: hidden width of the feed-forward layer over C.
        dropout: on attention entries and on each residual branch, in training.
        encoding: recipe of the positions, e.g. ``{"module": "ALiBi"}``, see ``build_encoding``; default RoPE, None for no
            positions. What acts on tokens acts once, before the first block; all else has parameters of its own in every block.
        streams: number of residual streams; more than one start as the input times a learned vector each, mix by ``ResidualStreams``, and a learned
            combination comes out.

    Raises:
        ShapeError: widths and heads that do not divide, streams < 1.
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
        attention: Mapping[str, Any] | None = None,
        *,
        is_causal: bool = False,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        encoding: Mapping[str, Any] | None = ROPE,
        streams: int = 1,
    ) -> None:
        super().__init__()
        if streams < 1:
            raise ShapeError(f"streams: expected at least 1, got {streams}; 1 is the ordinary residual connection")
        if num_heads < 1 or width % num_heads:
            raise ShapeError(f"num_heads: expected a divisor of width={width}, got {num_heads}; change one of the two")
        recipe: Mapping[str, Any] = {"module": "SoftmaxAttention"} if attention is None else attention
        heads = recipe.get("num_kv_heads")
        positions = partial(build_encoding, encoding, width, num_heads, num_kv_heads=heads, is_causal=is_causal)
        first = positions()
        self.absolute = first if isinstance(first, AbsoluteEncoding) else None
        blocks = []
        for i in range(depth):
            acting = None
            if self.absolute is None:
                acting = first if i == 0 else positions()
            layer = build_attention(recipe, width, num_heads, is_causal=is_causal, encoding=acting, dropout=dropout)
            residuals = [ResidualStreams(streams, reads=2 * i + k) if streams > 1 else Residual() for k in range(2)]
            blocks.append(Block(layer, width, mlp_ratio, dropout, *residuals))
        self.streams = streams
        if streams > 1:
            # Were streams equal at first, the first mixing would do nothing, were their mean taken at last, the last; and
            # norms do not see the scale of one, so that they differ in direction.
            phase = torch.arange(streams)[:, None] * (torch.arange(width) + 0.5) * (math.pi / width)
            self.entering = nn.Parameter(1 + 0.5 * phase.cos())  # (S, C)
            self.leaving = nn.Parameter(torch.linspace(0.5, 1.5, streams) / streams)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def new_cache(
        self,
        batch_size: int,
        max_tokens: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> TransformerCache:
        """Empty caches of all layers; arguments and errors as in ``SelfAttention.new_cache``."""
        return TransformerCache(
            [block.attention.new_cache(batch_size, max_tokens, dtype=dtype, device=device) for block in self._blocks()]
        )

    @property
    def can_cache(self) -> bool:
        """Whether every layer can keep a cache."""
        return all(block.attention.can_cache for block in self._blocks())

    @property
    def axes(self) -> int:
        """P, numbers a position has."""
        encoding = self.absolute or self._blocks()[0].attention.encoding if len(self.blocks) else None
        return 1 if encoding is None else encoding.axes

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: TransformerCache | None = None,
    ) -> Tensor:
        """Run the stack.

        Args:
            x: (B, N, C).
            attn_mask: broadcastable to (B, H, N, N), bool (True = takes part) or float.
            positions: broadcastable to (B, 1, N), or (B, 1, N, P) on P axes; default 0 … N − 1, or on from the cache's length.
            cache: of the tokens before these, from ``new_cache``; these are appended.

        Returns:
            (B, N, C).

        Raises:
            CacheError: caches of another model, batch, dtype or time, or full ones.
        """
        if cache is not None and len(cache) != len(self.blocks):
            raise CacheError(f"cache: expected {len(self.blocks)} layers, got {len(cache)}; make it by new_cache")
        start = 0 if cache is None else cache.length
        if self.absolute is not None:
            x = self._at(x, positions, start)
        if self.streams > 1:
            x = self.entering.to(x.dtype) * x.unsqueeze(-2)  # (B, N, S, C)
        try:
            for block, kept in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
                x = block(x, attn_mask, positions, kept)
        except BaseException:
            for kept in cache or []:  # a call that ends half-way keeps nothing
                kept.crop(start)
            raise
        return self.norm(x if self.streams == 1 else torch.einsum("s,...sc->...c", self.leaving.to(x.dtype), x))

    def _at(self, x: Tensor, positions: Tensor | None, start: int) -> Tensor:
        """Tokens with their absolute positions, which have no heads."""
        assert self.absolute is not None
        if positions is None:
            positions = torch.arange(start, start + x.size(1), device=x.device)
        several = self.absolute.axes > 1
        if positions.dim() == 3 + several:  # (B, 1, N)
            positions = positions.squeeze(1)
        return self.absolute(x, positions)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        embedding: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue prompts of equal length, token by token, in eval mode.

        Args:
            tokens: (B, N ≥ 1), integer.
            max_new_tokens: ≥ 0.
            embedding: tokens (B, N) → (B, N, C).
            head: (B, N, C) → scores (B, N, V).
            temperature: ≥ 0, divides the scores; 0 takes the most probable token.
            top_k: draw among the k most probable only.
            top_p: draw among the fewest tokens whose probabilities sum to at least p only.
            seed: of the sampling; None uses torch's global generator.
            use_cache: keep what each layer needs of earlier tokens; else compute all anew for each token.

        Returns:
            (B, N + max_new_tokens).

        Raises:
            ShapeError: no prompt.
            GeneratorError: negative temperature or count, top_k < 1, top_p outside (0, 1].
            CacheError: attention that is not causal or has a rate_fn; pass ``use_cache=False``.

        Example:
            >>> model = Transformer(16, 1, 2, {"module": "LieAttention"}, is_causal=True)
            >>> embedding, head = nn.Embedding(8, 16), nn.Linear(16, 8)
            >>> prompt = torch.zeros(1, 3, dtype=torch.long)
            >>> model.generate(prompt, 4, embedding=embedding, head=head, top_k=2).shape
            torch.Size([1, 7])
        """
        was_training = self.training
        self.eval()
        try:
            cache: TransformerCache | None = None

            def step(unseen: Tensor) -> Tensor:
                nonlocal cache
                x = embedding(unseen)
                if use_cache and cache is None:
                    cache = self.new_cache(len(tokens), tokens.size(1) + max_new_tokens, dtype=autocast_dtype(x))
                return head(self(x, cache=cache)[:, -1:])[:, 0]

            return continue_tokens(
                step,
                tokens,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                incremental=use_cache,
            )
        finally:
            self.train(was_training)
