"""The generator whose jump chain is softmax attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liegroup_attn.checks import check_dropout, check_jump_rates, check_scale, check_scores, check_shape
from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.generators.base import Generator
from liegroup_attn.masks import biased_mask, check_bias, prepare_mask
from liegroup_attn.tensors import at_least_float32, without_autocast

__all__ = ["SoftmaxGenerator"]


class SoftmaxGenerator(Generator):
    """Q = diag(ρ)(S − I) with the jump chain S = softmax(scale · q kᵀ + mask); never forms N×N to act.

    One application is one ``scaled_dot_product_attention``, so its kernels, masks and memory apply; a bias is N×N itself.

    Args:
        query: (..., N, E).
        key: (..., N, E), same tokens as the query.
        jump_rates: ρ, broadcastable to (..., N), in [0, 1]; None means 1.
        attn_mask: broadcastable to (..., N, N), bool (True = takes part) or float (added to the scores), transitively
            closed. A row without an allowed target keeps its value.
        is_causal: lower-triangular mask, beside ``attn_mask`` or alone.
        score_bias: finite numbers added to the scores, broadcastable to (..., N, N), e.g. of a positional encoding. It hides
            nothing.
        scale: of the scores; default 1/√E.
        dropout_p: probability of dropping an entry of S, drawn anew in each jump (``dense`` drops none).
        allow_open_mask: accept a mask that is not transitively closed; exp(tQ) then fills it.

    Raises:
        ShapeError: wrong rank, N = 0, or other tokens in the key than in the query.
        DtypeError: mixed dtypes.
        MaskError: see ``prepare_mask``.
        GeneratorError: NaN, inf or an overflow in scores or bias, ρ outside [0, 1] (CPU).

    Example:
        >>> q = torch.zeros(1, 2, 4)
        >>> SoftmaxGenerator(q, q).dense()
        tensor([[[-0.5000,  0.5000],
                 [ 0.5000, -0.5000]]])

    Source: docs/mathematics, "From scores to a generator".
    """

    jumps_on_uniformized = True

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        jump_rates: Tensor | float | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        score_bias: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        allow_open_mask: bool = False,
    ) -> None:
        check_shape("query", query, least_rank=2, remedy="give (..., tokens, width)")
        check_shape("key", key, least_rank=2, remedy="give (..., tokens, width)")
        n = query.size(-2)
        if key.size(-2) != n or n == 0 or key.size(-1) != query.size(-1):
            raise ShapeError(
                f"key: expected the query's N ≥ 1 tokens and width {tuple(query.shape)}, got {tuple(key.shape)}; a generator "
                "needs queries and keys to be the same tokens (cross-attention has only first_hop=True, time=0)"
            )
        if query.dtype != key.dtype:
            raise DtypeError(f"key: expected {query.dtype} as the query, got {key.dtype}; convert one of them")
        if query.size(-1) == 0:
            raise ShapeError(
                f"query: expected a width of at least 1, got shape {tuple(query.shape)}; scores need features"
            )
        check_dropout(dropout_p)
        check_scale(scale)
        try:
            batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        except RuntimeError:
            raise ShapeError(
                f"key: expected a batch that broadcasts with the query's {tuple(query.shape)}, got {tuple(key.shape)}; "
                "give every query head a key head"
            ) from None
        self.num_states, self.batch_shape = n, batch
        self.is_causal = is_causal
        self.query, self.key = query, key
        self.scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        check_scores(query, key, self.scale)
        self.dropout_p = dropout_p
        self.jump_rates = check_jump_rates(jump_rates, torch.Size([*batch, n]), query)
        scores_shape = torch.Size([*batch, n, n])
        self._mask = prepare_mask(attn_mask, is_causal, scores_shape, query.dtype, allow_open_mask)
        self.score_bias = None if score_bias is None else check_bias(score_bias, scores_shape)
        # What the kernels take: a bias or mask leaves no room for their own causal mask.
        own = is_causal and not self.has_mask  # else the mask holds it already
        self._kernel_mask = biased_mask(self.score_bias, self._mask.attn_mask, own, query, key)

    @property
    def has_mask(self) -> bool:
        """Whether there is an ``attn_mask``, be it beside a causal one."""
        return self._mask.attn_mask is not None

    def apply(self, value: Tensor) -> Tensor:  # noqa: D102
        moved = self.jump(value) - value
        return moved if self.jump_rates is None else self.jump_rates.unsqueeze(-1).to(value.dtype) * moved

    def jump(self, value: Tensor) -> Tensor:  # noqa: D102
        # Iterates may be wider than the scores' dtype; the kernels want one dtype, and S only averages, if not too often.
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-2])
        dtype, mask = torch.float64 if value.dtype == torch.float64 else self.query.dtype, self._kernel_mask
        query, key, values = (x.to(dtype).expand(*batch, *x.shape[-2:]) for x in (self.query, self.key, value))
        moved = F.scaled_dot_product_attention(
            query,
            key,
            values,
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
            dropout_p=self.dropout_p,
            is_causal=self.is_causal and mask is None,
            scale=self.scale,
        ).to(value.dtype)
        no_target = self._mask.no_target
        return moved if no_target is None else torch.where(no_target, value, moved)

    def scores(self) -> Tensor:
        """scale · q kᵀ plus bias and float mask, (..., N, N), float32 or float64; −inf or anything where masked."""
        with without_autocast(self.query):
            query, key = at_least_float32(self.query), at_least_float32(self.key)
            scores = (self.scale * query) @ key.mT
            if self.score_bias is not None:
                scores = scores + self.score_bias.to(scores.dtype)
            mask = self._mask.attn_mask
            return scores if mask is None or mask.dtype == torch.bool else scores + mask.to(scores.dtype)

    def masked(self) -> Tensor | None:
        """Which targets take no part, bool, broadcastable to (..., N, N); None means none."""
        if self.is_causal and not self.has_mask:
            return torch.ones(self.num_states, self.num_states, dtype=torch.bool, device=self.query.device).triu(1)
        return self._mask.masked()

    def jump_chain(self) -> Tensor:
        """S as a matrix (..., N, N), float32 or float64."""
        scores, masked, no_target = self.scores(), self.masked(), self._mask.no_target
        if masked is None:
            return scores.softmax(-1)
        eye = torch.eye(self.num_states, dtype=torch.bool, device=scores.device)
        if no_target is not None:  # such a row jumps to itself
            masked = torch.where(no_target, ~eye, masked)
        return scores.masked_fill(masked, -torch.inf).softmax(-1)

    def dense(self) -> Tensor:  # noqa: D102
        chain = self.jump_chain()
        moved = chain - torch.eye(self.num_states, dtype=chain.dtype, device=chain.device)
        return moved if self.jump_rates is None else self.jump_rates.unsqueeze(-1).to(chain.dtype) * moved

    def uniformized(self) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        return self.jump_chain(), self.jump_rates

    def jump_intensities(self) -> Tensor:  # noqa: D102
        if self.jump_rates is None:
            return torch.ones(1, dtype=at_least_float32(self.query).dtype, device=self.query.device)
        return at_least_float32(self.jump_rates)

    def rate_bound(self) -> float:
        """1, whatever ρ: the number of hops is known from the time alone, before data is seen."""
        return 1.0
