"""Scores that no fused kernel forms: soft caps, position biases, weights to be shown."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from liegroup_attn.errors import ConversionError
from liegroup_attn.scores import Score, SoftCap, TensorBias

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # another release
    _active_collector = None

__all__ = ["eager", "score_of", "weights_wanted"]


def score_of(softcap: float | None, position_bias: Tensor | None, past: int) -> Score | None:
    """What acts on scale · q·k: first the cap, then the bias, which has no rows of the past."""
    cap = None if softcap is None else SoftCap(softcap)
    bias = None if position_bias is None else TensorBias(position_bias, past)
    return cap | bias if cap is not None and bias is not None else cap or bias


def weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the model was called with ``output_attentions``; not every model tells its attention."""
    collected = _active_collector.get() if _active_collector is not None else None
    return bool(kwargs.get("output_attentions")) or any(k.endswith("attentions") for k in collected or ())


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention by the formula in the model's own file."""
    for cls in type(module).__mro__:
        if (function := getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)) is not None:
            break
    else:
        raise ConversionError(
            f"{type(module).__name__}: expected eager_attention_forward beside it, got none; leave out output_attentions"
        )
    if mask is None and is_causal and query.size(2) > 1:
        shape = (query.size(2), key.size(2))
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    found: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return found
