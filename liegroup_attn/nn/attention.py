"""Self-attention layers: projections, positions, caches; a flow mixes values, or a softmax alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liegroup_attn.errors import CacheError, MaskError
from liegroup_attn.expm import Method
from liegroup_attn.generators import Generator, SoftmaxGenerator
from liegroup_attn.masks import biased_mask
from liegroup_attn.nn.cache import AttentionCache
from liegroup_attn.nn.flow import Flow
from liegroup_attn.nn.lie_flow import LieFlow
from liegroup_attn.nn.projections import Inputs, Projections
from liegroup_attn.options import takes_options_of
from liegroup_attn.positional import BiasEncoding
from liegroup_attn.tensors import of_heads

__all__ = ["SelfAttention", "SoftmaxAttention"]


class SelfAttention(Projections):
    """Multi-head self-attention: along a flow, or by a softmax where there is none.

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

    flow: Flow | None

    @property
    def can_cache(self) -> bool:
        """Whether ``new_cache`` gives one."""
        return self._why_no_cache() is None

    def _why_no_cache(self) -> str | None:
        if not self.is_causal:
            return "expected a layer with is_causal=True, got False; later tokens would change earlier ones"
        if isinstance(self.encoding, BiasEncoding) and self.encoding.contextual:
            name = type(self.encoding).__name__
            return f"expected positions that tokens do not change, got {name}; generate with use_cache=False"
        return None

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
        if reason := self._why_no_cache():
            raise CacheError(f"cache: {reason}")
        if batch_size < 1 or max_tokens < 1:
            raise CacheError(f"cache: expected batch_size, max_tokens ≥ 1, got {batch_size}, {max_tokens}; make room")
        weight = self.v_proj.weight
        dtype, device = weight.dtype if dtype is None else dtype, weight.device if device is None else device
        heads, width, kept = self.num_kv_heads, self.head_width, dtype
        if self.flow is not None:  # half precision would round each hop
            kept = torch.promote_types(dtype, torch.float32)
            heads, width = self.num_heads, self.flow.num_kept(dtype) * width
        keys = torch.zeros(batch_size, self.num_kv_heads, max_tokens, self.head_width, dtype=dtype, device=device)
        values = torch.zeros(batch_size, heads, max_tokens, width, dtype=kept, device=device)
        return AttentionCache(self, keys, values, self._settings())

    def _settings(self) -> tuple[object, ...]:
        """What cached values depend on besides the tokens."""
        return () if self.flow is None else self.flow.settings

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
            inputs = self._inputs(x, positions, attn_mask)
            mixed = self._mix(inputs, inputs.value)  # (B, H, N, D)
        else:
            if attn_mask is not None:
                raise MaskError("attn_mask: expected None beside a cache, got a mask; decode sequences of equal length")
            if self.training and self.dropout:
                raise CacheError("cache: expected a layer in eval mode, got one that drops entries; call .eval()")
            inputs = self._inputs(x, positions, None, cache)
            cache.check(self, inputs.key, self._settings())
            mixed = self._extend(inputs, cache)  # (B, H, N, D)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def generator(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Generator:
        """Q of the layer's input, all that is added included.

        Args:
            x: (B, N, C); it and all else as in ``forward``.

        Returns:
            The generator on (B, H, N, N).
        """
        return self._generator(self._inputs(x, positions, attn_mask))

    def flows(self, x: Tensor, positions: Tensor | None = None) -> dict[str, tuple[Generator, Tensor]]:
        """The generators along which values flow, and for how long; the last one first. None for softmax attention.

        Args:
            x: (B, N, C); it and all else as in ``forward``.

        Returns:
            Name → generator on (B, H, N, N) or (H, N, N), and times (H, 1).
        """
        return {} if self.flow is None else {"Q": (self.generator(x, positions=positions), self.flow.flow_time())}

    def mixing_matrix(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What multiplies the values: softmax weights, exp(tQ), or what the switches make of it.

        Args:
            x: (B, N, C); it and all else as in ``forward``.

        Returns:
            (B, H, N, N); rows sum to 1 (without dropout).
        """
        inputs = self._inputs(x, positions, attn_mask)
        eye = torch.eye(x.size(1), dtype=inputs.value.dtype, device=x.device)
        return self._mix(inputs, eye.expand(len(x), inputs.value.size(1), -1, -1))

    def _mix(self, inputs: Inputs, value: Tensor) -> Tensor:
        """Values (B, H_kv, N, any width), mixed over tokens."""
        dropout = self.dropout if self.training else 0.0
        if self.flow is not None:
            mixed: Tensor = self.flow(self._generator(inputs, dropout), value, self._method())
            return mixed
        query, key = inputs.query, inputs.key
        n = query.size(-2)
        bias = None if inputs.score is None else inputs.score.formed(n, n)
        mask = biased_mask(bias, inputs.attn_mask, self.is_causal, query, key)
        causal = self.is_causal and mask is None
        grouped = self.num_kv_heads != self.num_heads
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, enable_gqa=grouped)

    def _generator(self, inputs: Inputs, dropout_p: float = 0.0) -> Generator:
        flow = self.flow
        like: dict[str, Any] = {"score": inputs.score, "is_causal": self.is_causal, "dropout_p": dropout_p}
        if flow is None:
            return SoftmaxGenerator(
                inputs.query, of_heads(inputs.key, self.num_heads), visible=inputs.attn_mask, **like
            )
        return flow.generator(inputs.query, inputs.key, self._features(inputs), visible=inputs.attn_mask, **like)

    def _features(self, inputs: Inputs) -> Tensor:
        """What jump rates are made from."""
        return inputs.value

    def _method(self) -> Method | None:
        """In the place of the flow's own."""
        return None

    def _extend(self, inputs: Inputs, cache: AttentionCache) -> Tensor:
        """Mix values of new tokens with all before them, and keep what later ones need."""
        query, key, value = inputs.query, inputs.key, inputs.value
        past, new = cache.length, query.size(-2)
        stop, flow = past + new, self.flow
        cache.keys[:, :, past:stop] = key
        keys = cache.keys[:, :, :stop]
        if flow is not None:
            features = self._features(inputs)
            generator = flow.generator(query, keys, features, score=inputs.score, is_causal=True, past=past)
            mixed, kept = flow.extend(generator, value, cache.values[:, :, :past])
            cache.append(key, kept)
            return mixed
        cache.append(key, value)
        # A single token sees all; several see the past and one another causally.
        mask = torch.ones(new, stop, dtype=torch.bool, device=query.device).tril(past) if new > 1 else None
        mask = biased_mask(None if inputs.score is None else inputs.score.formed(new, stop), mask, False, query, key)
        grouped = self.num_kv_heads != self.num_heads
        return F.scaled_dot_product_attention(query, keys, cache.values[:, :, :stop], mask, enable_gqa=grouped)


class SoftmaxAttention(SelfAttention):
    """Standard attention: values are mixed by S = softmax(scores). With a ``flow``, which ``convert_attention`` gives it, a drop-in.

    Args: those of ``SelfAttention``.

    Example:
        >>> layer = SoftmaxAttention(16, 2, is_causal=True)
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: [Vaswani2017]_.
    """

    plain: ClassVar[type[nn.Module]]  # itself: a flow is all that a conversion adds

    @takes_options_of(Projections)
    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.lie: LieFlow | None = None

    @property
    def flow(self) -> Flow | None:  # type: ignore[override]
        """What ``convert_attention`` has given it: here, as in other people's modules, ``lie``."""
        return self.lie

    @staticmethod
    def why_not(module: Any, parents: Sequence[nn.Module]) -> str | None:
        """None: any can be converted."""
        return None

    @staticmethod
    def flow_of(module: Any, **options: Any) -> LieFlow:
        """A flow of the module's sizes, dtype and device."""
        weight = module.v_proj.weight
        return LieFlow(module.num_heads, module.head_width, device=weight.device, dtype=weight.dtype, **options)

    def carry(self, flow: LieFlow) -> None:
        """Take the flow."""
        self.lie = flow

    def drop(self) -> None:
        """Become softmax attention again."""
        self.lie = None


SoftmaxAttention.plain = SoftmaxAttention
