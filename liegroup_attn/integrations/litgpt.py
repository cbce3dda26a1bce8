"""LitGPT: its ``CausalSelfAttention``, mixing values along exp(tQ), also while it decodes with a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from litgpt.model import CausalSelfAttention, MultiheadLatentAttention
from torch import Tensor, nn

from liegroup_attn.errors import CacheError, MaskError
from liegroup_attn.nn.lie_flow import LieFlow
from liegroup_attn.scores import SoftCap
from liegroup_attn.visible import Causal, Everything, Visible, Window

__all__ = ["LieCausalSelfAttention"]


class LieCausalSelfAttention(CausalSelfAttention):
    """``litgpt.model.CausalSelfAttention`` after a conversion: grouped heads, capped scores, windows, exact decoding.

    A sliding window is an open mask as soon as there are more tokens than it is wide: an error, unless the conversion
    allowed it. With a cache (``input_pos``) it keeps ``lie.kept_width`` numbers a token and head beside ``kv_cache``, which
    grow with the tokens, and new tokens get what a forward without a cache would give them. While time is 0 and has no
    gradient, decoding is LitGPT's own.

    Args: those of ``CausalSelfAttention``; the flow's after a conversion.

    Example:
        >>> from litgpt.config import Config
        >>> from litgpt.model import GPT
        >>> from liegroup_attn.nn import convert_attention
        >>> print(convert_attention(GPT(Config(n_layer=1, n_head=2, n_embd=32, padded_vocab_size=64))))
        module                class                outcome    why
        ─────────────────────────────────────────────────────────
        transformer.h.0.attn  CausalSelfAttention  converted
    """

    plain: ClassVar[type[nn.Module]] = CausalSelfAttention
    lie: LieFlow

    @staticmethod
    def why_not(module: Any, parents: Sequence[nn.Module]) -> str | None:
        """None: any can be converted."""
        return None

    @staticmethod
    def flow_of(module: Any, **options: Any) -> LieFlow:
        """A flow of the module's sizes, dtype and device."""
        weight, config = module.proj.weight, module.config
        return LieFlow(config.n_head, config.head_size, device=weight.device, dtype=weight.dtype, **options)

    def carry(self, flow: LieFlow) -> None:
        """Take the flow."""
        self.lie = flow
        self._input_pos: Tensor | None = None

    def drop(self) -> None:
        """Become LitGPT's module again."""
        del self.lie, self._input_pos
        self._forget()

    def forward(  # noqa: D102
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        self._input_pos = input_pos
        try:
            out: Tensor = super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
        finally:
            self._input_pos = None
        return out

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix values.

        Args:
            q: (B, H, T, E).
            k: (B, H, T, E), or with a cache (B, H or 1, ≥ P + T, E), all that it has room for.
            v: (B, H, T, D), or as ``k``.
            mask: broadcastable to (B, H, T, T), or with a cache to all keys; None is causal.

        Returns:
            (B, T, H, D).
        """
        scale = self.mscale * self.mscale / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)
        if self._input_pos is not None:
            return self._decode(q, k, v, mask, scale)
        visible: Visible | Tensor = Causal() if mask is None else mask
        if self.apply_sliding_window_attention:
            visible = Causal() & self._window(q.size(-2))
        generator = self.lie.generator(q, k, v, score=self._cap(), visible=visible, scale=scale)
        out: Tensor = self.lie(generator, v)
        return out.transpose(1, 2)

    def _window(self, n: int) -> Visible:
        """What a window shows; all, while it sees all before."""
        width = self.config.sliding_window_size
        if n <= width:
            return Everything()
        if not (self.lie.allow_open_mask or self.lie.is_still()):
            raise MaskError(
                f"mask: expected a transitively closed one, got a sliding window of {width} over {n} tokens, through which "
                "several hops lead further back; convert with allow_open_mask=True to let exp(tQ) fill it, or exclude "
                "this module"
            )
        return Window(width)

    def _cap(self) -> SoftCap | None:
        cap = self.config.attention_logit_softcapping
        return None if cap is None else SoftCap(cap)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """New tokens after those whose keys and hops are kept."""
        if self.lie.is_softmax():
            self._forget()  # hops of the tokens that these keys replace
            out: Tensor = super().scaled_dot_product_attention(q, k, v, mask)
            return out
        start, stop = self._span(q.size(-2))
        past = self._past(q, start)
        k, v = k[..., :stop, :], v[..., start:stop, :]
        shown = None if mask is None else mask[..., :stop]
        score = self._cap()
        generator = self.lie.generator(q, k, v, score=score, visible=shown, is_causal=True, scale=scale, past=start)
        out, kept = self.lie.extend(generator, v, past)
        self.kv_cache.register_buffer("hops", torch.cat([past, kept], -2), persistent=False)
        self.kv_cache.lie_settings = self.lie.settings
        return out.transpose(1, 2)

    def _forget(self) -> None:
        """Nothing is kept, so that no later call goes on from it."""
        for name in ("hops", "lie_settings"):
            if hasattr(self.kv_cache, name):
                delattr(self.kv_cache, name)

    def _span(self, new: int) -> tuple[int, int]:
        """Where the new tokens start and stop."""
        assert self._input_pos is not None
        positions = self._input_pos.reshape(-1, new).tolist()
        start = positions[0][0]
        stop = start + new
        if any(row != list(range(start, stop)) for row in positions):
            raise CacheError(
                f"input_pos: expected the same successive positions for all items, got {positions}; decode items that stand "
                "at different positions one by one, or without input_pos"
            )
        if self.apply_sliding_window_attention and stop > self.config.sliding_window_size:
            raise CacheError(
                f"input_pos: expected positions below the sliding window's {self.config.sliding_window_size}, got up to "
                f"{stop - 1}; the cache forgets what exp(tQ) needs: decode without input_pos, or exclude this module"
            )
        return start, stop

    def _past(self, q: Tensor, start: int) -> Tensor:
        """(B, H, P, kept_width): what was kept of the tokens before; what was kept of later ones is forgotten."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32  # half precision would round each hop
        shape = (q.size(0), q.size(1), start, self.lie.kept_width)
        hops: Tensor | None = getattr(self.kv_cache, "hops", None)
        if start == 0:
            return torch.zeros(shape, dtype=dtype, device=q.device)
        if hops is None or hops.size(0) != shape[0] or hops.size(2) < start or hops.size(3) != shape[3]:
            raise CacheError(
                f"input_pos: expected position 0, or one whose earlier tokens went through this cache with this flow, got "
                f"{start}; give the prompt again, from position 0"
            )
        if self.kv_cache.lie_settings != self.lie.settings:
            raise CacheError(
                f"input_pos: expected the settings that the cache was filled with {self.kv_cache.lie_settings}, got {self.lie.settings}; give "
                "the prompt again, from position 0"
            )
        return hops[:, :, :start]


class _Latent:
    """Names the attention that is kept."""

    plain: ClassVar[type[nn.Module]] = MultiheadLatentAttention

    @staticmethod
    def why_not(module: Any, parents: Sequence[nn.Module]) -> str | None:
        return "multi-head latent attention is not converted"


DROP_INS = (LieCausalSelfAttention, _Latent)
WHOLE_MODELS: tuple[type[nn.Module], ...] = ()
