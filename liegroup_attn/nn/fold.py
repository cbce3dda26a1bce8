"""Learned rotations folded into a layer's weights for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liegroup_attn.nn.attention import SelfAttention
from liegroup_attn.positional import HeadRotation

__all__ = ["fold_encoding"]


@torch.no_grad()
def fold_encoding(attention: SelfAttention) -> None:
    """Put the basis P of a learned rotation into the weights of queries and keys, in place; pair rotations are left.

    R(x) = P RoPE(x·f) Pᵀ, and ⟨R(x)q, R(y)k⟩ = ⟨RoPE(x·f)Pᵀq, RoPE(y·f)Pᵀk⟩: scores stay what they were, at RoPE's
    price. The parameters of P are gone afterwards: keep a checkpoint. Caches made before hold keys in another basis.

    Args:
        attention: a layer whose ``encoding`` is a ``HeadRotation``; q_proj, k_proj and ``encoding`` are changed.

    Raises:
        TypeError: no such layer, or an encoding of another kind.
        ValueError: generators that do not commute, or queries and keys made by ``scores``.

    Example:
        >>> from liegroup_attn.nn import SoftmaxAttention
        >>> from liegroup_attn.positional import CayleyString
        >>> layer = SoftmaxAttention(16, 2, encoding=CayleyString(8, 2))
        >>> fold_encoding(layer)
        >>> layer.encoding
        FoldedRotary(8, 2, axes=1)

    Source: [Schenck2025]_.
    """
    if not isinstance(attention, SelfAttention):
        raise TypeError(
            f"attention: expected a SelfAttention layer, got {type(attention).__name__}; give the layers of a model one by one"
        )
    encoding = attention.encoding
    if not isinstance(encoding, HeadRotation):
        raise TypeError(
            f"attention: expected an encoding with a learned rotation for each head, got {type(encoding).__name__}; there is "
            "nothing to fold"
        )
    if attention.scores is not None:
        raise ValueError(
            f"attention: expected q_proj and k_proj, got scores={type(attention.scores).__name__}; its weights are on a "
            "manifold, leave the encoding as it is"
        )
    basis, cheap = encoding.fold()  # (H_kv, D, D)
    _turn_rows(attention.q_proj, basis.repeat_interleave(attention.num_heads // attention.num_kv_heads, 0))
    _turn_rows(attention.k_proj, basis)
    attention.encoding = cheap.train(encoding.training)


def _turn_rows(proj: nn.Linear, basis: Tensor) -> None:
    """Pᵀ on the features of every head, in float64."""
    for parameter in (proj.weight, proj.bias):
        if parameter is not None:
            heads = parameter.double().reshape(len(basis), basis.size(-1), -1)  # (H, D, C), of the bias (H, D, 1)
            parameter.copy_((basis.mT @ heads).reshape(parameter.shape))
