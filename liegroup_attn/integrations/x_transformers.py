"""x-transformers: its ``Attention``, whose ``attend`` mixes values along exp(tQ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial, reduce
from operator import or_
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention, AttentionLayers, AttentionPool

from liegroup_attn.errors import CacheError, GeneratorError, ShapeError
from liegroup_attn.generators import SoftmaxGenerator
from liegroup_attn.masks import read_mask
from liegroup_attn.nn.lie_flow import LieFlow
from liegroup_attn.scores import Score, SoftCap, TensorBias
from liegroup_attn.visible import Allowed, Everything, Visible

__all__ = ["LieXAttention"]

# Settings of an Attend with which the mixing matrix is not the softmax of scores between the tokens themselves.
_OTHER_THAN_SOFTMAX = {
    "inverted_attention": "inverted_attention: the softmax runs over queries",
    "pre_softmax_talking_heads": "pre_talking_heads: scores of a head depend on other heads'",
    "post_softmax_talking_heads": "post_talking_heads: rows need not sum to 1",
    "pre_scale_post_talking_heads": "pre_scale_post_talking_heads: rows need not sum to 1",
    "selective": "selective: what a token hides depends on the tokens between",
    "cog_signed": "cog_signed: negative weights are no rates",
    "l2_distance": "l2_distance: scores are not products of queries and keys",
    "add_zero_kv": "add_zero_kv: S is not square, only time 0 exists",
    "head_learned_sink": "head_learned_sink: rows do not sum to 1",
    "cope": "use_cope: scores depend on a query and all of its scores",
    "flash_pack_seq": "flash_pack_seq: sequences lie packed in one",
}


class LieXAttention(Attention):
    """``x_transformers.Attention`` after a conversion: it tells its ``attend`` whose tokens the keys are.

    Self-attention of any encoder or decoder: masks, biases of the scores (ALiBi, relative positions …), rotary positions,
    grouped heads, normed queries and keys, clamped scores, residual attention, dropout, flash or not. Settings that make
    something else than a softmax over the tokens themselves, and cross-attention, keep x-transformers' attention; the
    report says why.

    A row whose targets are all hidden keeps its own value, where x-transformers gives 0 or, without flash below a causal
    mask, a mean over all tokens; its ``Attention`` sets rows that ``mask`` pads to 0 in either case. Keys and values of
    earlier tokens alone (``generate(cache_kv=True)``, memories of Transformer-XL) do not determine exp(tQ) for the new
    ones: that is refused unless time is 0.

    Args: those of ``Attention``; the flow's after a conversion.

    Example:
        >>> from x_transformers import Decoder
        >>> from liegroup_attn.nn import convert_attention
        >>> print(convert_attention(Decoder(dim=16, depth=1, heads=2)))
        module      class      outcome    why
        ─────────────────────────────────────
        layers.0.1  Attention  converted
    """

    plain: ClassVar[type[nn.Module]] = Attention

    @property
    def lie(self) -> LieFlow:
        """The flow, where it lives: in ``attend``."""
        flow: LieFlow = self.attend.lie
        return flow

    @staticmethod
    def why_not(module: Any, parents: Sequence[nn.Module]) -> str | None:
        """Why a module stays as it is, None if it need not."""
        if _across(module, parents):
            return "cross-attention: only time 0 exists"
        if module.num_mem_kv > 0:
            return "num_mem_kv: S is not square, only time 0 exists"
        attend = module.attend
        if type(attend) is not Attend:
            return f"attend is a {type(attend).__name__}, whose forward may be another"
        for setting, reason in _OTHER_THAN_SOFTMAX.items():
            found = getattr(attend, setting, None)
            if found is not None and found is not False:
                return reason
        function = attend.attn_fn.func if isinstance(attend.attn_fn, partial) else attend.attn_fn
        if function is not F.softmax:
            return f"attn_fn: {getattr(function, '__name__', type(function).__name__)}, not a softmax"
        return None

    @staticmethod
    def flow_of(module: Any, **options: Any) -> LieFlow:
        """A flow of the module's sizes, dtype and device."""
        weight = module.to_v.weight
        width = module.to_v.out_features // module.kv_heads
        return LieFlow(module.heads, width, device=weight.device, dtype=weight.dtype, **options)

    def carry(self, flow: LieFlow) -> None:
        """Take the flow."""
        self.attend.__class__ = LieXAttend
        self.attend.lie = flow
        self.attend.across = False

    def drop(self) -> None:
        """Become x-transformers' module again."""
        del self.attend.lie, self.attend.across
        self.attend.__class__ = Attend

    def forward(self, x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self.attend.across = context is not None and context is not x
        return super().forward(x, context, *args, **kwargs)


class LieXAttend(Attend):
    """``x_transformers.attend.Attend`` with a flow behind its softmax; ``LieXAttention`` makes it."""

    lie: LieFlow
    across: bool

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        prev_attn: Tensor | None = None,
        attn_delta: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Intermediates]:
        """Mix values.

        Args:
            q: (B, H, N, E).
            k: (B, H_kv, N, E); head h reads key head h mod H_kv, as x-transformers has it.
            v: (B, H_kv, N, D).
            mask: (B, N), or broadcastable to (B, H, N, N), bool (True = takes part).
            attn_bias: broadcastable to (B, H, N, N), added to the scores.
            prev_attn: scores of an earlier layer, added before the bias.
            attn_delta: refused unless time is 0.
            **others: ``causal`` as there; the rest is of no effect on a softmax over keys.

        Returns:
            (B, H, N, D), and what x-transformers looks at afterwards: made when it does, so that scores and the true
            mixing matrix (``post_softmax_attn``, without dropout) cost nothing before; empty with flash, as there.
        """
        if self.across or attn_delta is not None or q.size(-2) != k.size(-2):
            self._only_softmax(q, k, attn_delta)
            return super().forward(q, k, v, mask, attn_bias, prev_attn, attn_delta, **others)
        causal = self.causal if self.flash or others.get("causal") is None else others["causal"]
        k, v = (x.repeat(1, q.size(1) // x.size(1), 1, 1) for x in (k, v))
        mask = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
        clamp = self.logit_softclamp_value if self.softclamp_logits else None
        visible: Visible = Everything() if mask is None else Allowed(mask)
        bias = attn_bias
        if bias is not None and _hides(bias):
            if clamp is None:
                hidden, bias = read_mask(bias, bias.dtype)
                visible = visible & hidden
            else:  # what is clamped is not hidden
                bias = bias.clamp_min(torch.finfo(bias.dtype).min / 4)
        steps: list[Score] = [TensorBias(x.to(q.dtype)) for x in (prev_attn, bias) if x is not None]
        steps += [] if clamp is None else [SoftCap(clamp)]
        score, dropout = (reduce(or_, steps) if steps else None), self.dropout if self.training else 0.0
        generator = self.lie.generator(
            q, k, v, score=score, visible=visible, is_causal=causal, scale=self.scale, dropout_p=dropout
        )
        asked = (
            Intermediates() if self.flash else _WhenAsked(generator, prev_attn, partial(self.lie.mixing, generator, v))
        )
        return self.lie(generator, v), asked

    def _only_softmax(self, q: Tensor, k: Tensor, attn_delta: Tensor | None) -> None:
        """Raise unless softmax attention is what the flow is: first hop, time 0."""
        time = self.lie.time
        wanted = torch.is_grad_enabled() and time.requires_grad  # a derivative by time, which only a square S has
        if self.lie.is_softmax(by_value=True) and (self.across or not wanted):
            return
        if self.across:
            raise ShapeError(
                "context: expected None, got another sequence than the queries'; across different tokens there is no "
                "generator, only softmax attention (time 0): exclude this module from the conversion"
            )
        if attn_delta is not None:
            raise GeneratorError(
                "attn_delta: expected None, got a tensor; what is added to the mixing matrix leaves no generator: exclude "
                "this module from the conversion"
            )
        raise CacheError(
            f"key: expected the queries' {q.size(-2)} tokens, got {k.size(-2)}; what exp(tQ) does to new tokens needs more of "
            "earlier ones than keys and values: generate with cache_kv=False, and give no cache, mems or "
            "additional_key_values, or exclude this module from the conversion"
        )


class _WhenAsked(Intermediates):
    """Intermediates that are computed when they are looked at."""

    def __init__(self, generator: SoftmaxGenerator, previous: Tensor | None, weights: Callable[[], Tensor]) -> None:
        self._generator, self._previous, self._weights = generator, previous, weights

    @cached_property
    def qk_similarities(self) -> Tensor:
        found = self._generator.query @ self._generator.key.mT * self._generator.scale
        return found if self._previous is None else found + self._previous

    @cached_property
    def pre_softmax_attn(self) -> Tensor:
        scores, allowed = self._generator.scores().to(self._generator.query.dtype), self._generator.allowed()
        return scores if allowed is None else scores.masked_fill(~allowed, -torch.finfo(scores.dtype).max)

    @cached_property
    def post_softmax_attn(self) -> Tensor:
        return self._weights()


def _across(module: Any, parents: Sequence[nn.Module]) -> bool:
    """Whether a module is known to be a cross-attention by where it stands; others tell by their ``context``."""
    if any(isinstance(parent, AttentionPool) for parent in parents[:1]):
        return True
    if not (module.use_latent_q or module.use_latent_kv) and module.to_k.in_features != module.to_q.in_features:
        return True
    for owner in parents:
        if isinstance(owner, AttentionLayers):
            return any(
                kind == "c" and any(part is module for part in layer.modules())
                for (_, layer, _), kind in zip(owner.layers, owner.layer_types, strict=False)
            )
    return False


def _hides(bias: Tensor) -> bool:
    """Whether a bias is a mask, too."""
    return bool((bias.detach() <= torch.finfo(bias.dtype).min / 2).any())


DROP_INS = (LieXAttention,)
WHOLE_MODELS: tuple[type[nn.Module], ...] = ()
