"""The attention function of the implementation "lie"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from liegroup_attn.errors import CacheError, GeneratorError
from liegroup_attn.generators import SoftmaxGenerator
from liegroup_attn.integrations.transformers.cache import cache_layer, forget, take_call
from liegroup_attn.integrations.transformers.masks import closed_mask, is_causal_mask
from liegroup_attn.integrations.transformers.scores import eager, score_of, weights_wanted
from liegroup_attn.nn.lie_flow import LieFlow
from liegroup_attn.scores import Score
from liegroup_attn.tensors import of_heads

__all__ = ["Call", "lie_attention_forward", "recorded_calls"]

# Arguments that change S in ways that are no generator on the tokens alone.
_REFUSED = ("s_aux", "sinks", "head_mask", "layer_head_mask", "alibi", "indices", "block_indices")


class Call(NamedTuple):
    """One call of the attention function."""

    module: nn.Module
    num_heads: int
    head_width: int
    across: bool  # key tokens are not the query tokens
    refused: str | None  # an argument that no generator knows


_listeners: list[list[Call]] = []  # plain, since torch.compile cannot read a ContextVar


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """All calls of the attention function inside."""
    calls: list[Call] = []
    _listeners.append(calls)
    try:
        yield calls
    finally:
        _listeners.pop()


def lie_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a Transformers attention calls under the implementation "lie".

    A module without a flow (excluded, or cross-attention), and one whose time is 0 where no derivative by it is wanted,
    is softmax attention as ``sdpa`` (with a soft cap, or where weights are wanted, ``eager``) computes it.

    Args:
        module: the attention; ``module.lie`` is its flow.
        query: (B, H, N, E).
        key: (B, H_kv, P + N, E), P tokens of a cache first.
        value: (B, H_kv, P + N, D).
        attention_mask: (B, 1, N, P + N) or None.
        dropout: of entries of S.
        scaling: of the scores; default 1/√E.
        is_causal: whether None as a mask means causal; default what the module says.
        softcap: scores become cap · tanh(score / cap).
        position_bias: added to the scores.
        **kwargs: what a model hands over besides.

    Returns:
        (B, N, H, D), and the mixing matrix (B, H, N, N) if ``output_attentions``, else None.

    Raises:
        MaskError: a mask through which exp(tQ) would leak.
        CacheError: a cache without iterates, or one that cannot keep them.
        GeneratorError: an argument such as attention sinks, of which there is no generator.
    """
    refused = next((name for name in _REFUSED if kwargs.get(name) is not None), None)
    if _listeners:
        _listeners[-1].append(Call(module, query.size(1), value.size(-1), query.size(2) != key.size(2), refused))
    cache, need_weights = take_call(module)
    need_weights = need_weights or weights_wanted(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    flow: LieFlow | None = getattr(module, "lie", None)
    if flow is None or flow.is_softmax():
        if flow is not None:
            forget(cache, module)
        kwargs |= {} if softcap is None else {"softcap": softcap}
        kwargs |= {} if position_bias is None else {"position_bias": position_bias}
        exact = need_weights or softcap is not None or refused is not None
        plain = eager if exact else sdpa_attention_forward
        kwargs.pop("output_attentions", None)
        found: tuple[Tensor, Tensor | None] = plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
        )
        return found
    if refused is not None:
        raise GeneratorError(
            f"{refused}: expected None while time may pass, got a value in {type(module).__name__}; there is no generator on the tokens "
            "alone: exclude this layer from the conversion"
        )
    causal = causal and attention_mask is None and query.size(2) > 1
    if not flow.allow_open_mask:
        closed_mask(attention_mask, module)
    ordered = is_causal_mask(attention_mask, query.size(2), causal, look=cache is not None)
    score = score_of(softcap, position_bias, key.size(2) - query.size(2))
    call = _Attend(flow, query, key, value, attention_mask, score, scaling, ordered)
    if cache is not None:
        mixed, weights = _decode(module, call, cache, dropout, need_weights)
    else:
        if query.size(2) != key.size(2):
            raise CacheError(
                f"key: expected the {query.size(2)} tokens of the query, got {key.size(2)} and no DynamicCache that keeps their iterates; "
                "pass use_cache=False, or exclude this layer from the conversion if it attends across"
            )
        mixed, weights = call.mixed(dropout, need_weights)
    return mixed.transpose(1, 2).contiguous(), weights


class _Attend(NamedTuple):
    """A call under which time passes."""

    flow: LieFlow
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    score: Score | None
    scaling: float | None
    ordered: bool  # no query sees a later token

    def generator(self, dropout: float = 0.0, past: int = 0) -> SoftmaxGenerator:
        value = self.value[:, :, past:]
        more: dict[str, Any] = {"visible": self.mask, "score": self.score, "scale": self.scaling, "dropout_p": dropout}
        ordered = self.ordered or past > 0
        return self.flow.generator(self.query, self.key, value, is_causal=ordered, closed=True, past=past, **more)

    def mixed(self, dropout: float, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """All tokens at once."""
        if not need_weights:
            return self.flow(self.generator(dropout), self.value), None
        weights = F.dropout(self.flow.mixing(self.generator(), self.value), dropout)
        return weights @ of_heads(self.value, self.flow.num_heads), weights


def _decode(
    module: nn.Module, call: _Attend, cache: Cache, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Mix new tokens given what a cache keeps of the earlier ones."""
    flow, query, key, value = call[:4]
    past = key.size(2) - query.size(2)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *flow.parameters()))
    unkept = (
        "a gradient" if learns else "dropout" if dropout else None if call.ordered else "a mask that looks ahead"
    )  # of which no iterates can be kept
    if past and (unkept or need_weights):
        raise CacheError(
            f"cache: expected plain decoding from a cache with {past} tokens, got {unkept or 'output_attentions'}; pass use_cache=False, "
            "which computes all tokens"
        )
    weights = None
    if unkept or need_weights:
        mixed, weights = call.mixed(dropout, need_weights)
    if unkept:  # and the cache has keys of which it has no iterates: nothing goes on from there
        return mixed, weights
    layer = cache_layer(cache, module)
    before = layer.iterates(flow, len(query), past, value)
    mixed, kept = flow.extend(call.generator(past=past), value[:, :, past:], before)
    layer.keep(flow, before, kept)
    return mixed, weights
