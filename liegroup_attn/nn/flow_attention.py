"""This library's softmax attention after a conversion: the same layer and a flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from liegroup_attn.generators import Generator
from liegroup_attn.nn.attention import SoftmaxAttention
from liegroup_attn.nn.cache import AttentionCache
from liegroup_attn.nn.flow import LieFlow

__all__ = ["FlowAttention"]


class FlowAttention(SoftmaxAttention):
    """``SoftmaxAttention`` that ``convert_attention`` has given a ``LieFlow``: identical while time is 0.

    Not a ``LieAttention``, whose time is never 0 and lies on a manifold.

    Args: those of ``SelfAttention``; the flow's after a conversion.

    Example:
        >>> from liegroup_attn.nn import convert_attention
        >>> layer = SoftmaxAttention(16, 2, is_causal=True)
        >>> report = convert_attention(layer)
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    plain: ClassVar[type[nn.Module]] = SoftmaxAttention
    lie: LieFlow

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
        del self.lie

    def mix(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        drop = self.dropout if self.training else 0.0
        return self.lie(query, key, value, attn_mask, dropout_p=drop, is_causal=self.is_causal, score_bias=bias)[0]

    def mixing_matrix(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:  # noqa: D102
        query, key, value, attn_mask, bias = self._inputs(x, positions, attn_mask)
        return self.lie(query, key, value, attn_mask, is_causal=self.is_causal, score_bias=bias, need_weights=True)[1]

    def flows(self, x: Tensor, positions: Tensor | None = None) -> dict[str, tuple[Generator, Tensor]]:  # noqa: D102
        query, key, value, attn_mask, bias = self._inputs(x, positions, None)
        generator = self.lie.generator(query, key, value, attn_mask, is_causal=self.is_causal, score_bias=bias)
        return {"Q": (generator, self.lie.flow_time())}

    def cached_values(self, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:  # noqa: D102
        kept = torch.float64 if dtype == torch.float64 else torch.float32  # half precision would round each hop
        return self.num_heads, self.lie.kept_width, kept

    def cache_settings(self) -> tuple[object, ...]:  # noqa: D102
        return self.lie.time_scale, self.lie.max_time, self.lie.tol, str(self.lie.clock), self.lie.first_hop

    def extend(  # noqa: D102
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache,
        bias: Tensor | None = None,
    ) -> Tensor:
        past, stop = cache.length, cache.length + key.size(-2)
        cache.keys[:, :, past:stop] = key
        mixed, kept = self.lie.extend(query, cache.keys[:, :, :stop], value, cache.values[:, :, :past], bias)
        cache.append(key, kept)
        return mixed
