"""Rows of a softmax chain, block by block, and their derivatives: what sweeps ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from liegroup_attn.scores import Score
from liegroup_attn.visible import Causal, Visible

__all__ = ["Blockwise", "SoftmaxRows"]


class SoftmaxRows:
    """Rows of S = softmax(score(q kᵀ)) over what is visible.

    It holds no tensor that it computes with: query (B, N − first, E), scaled, key (B, N, E), the leaves of the score and the
    tensors of what is visible come by argument, in this order. Queries times keys and the softmax have their closed
    derivatives; ``score`` gives its own.

    Args:
        batch: that of the score and of what is visible, of B = ``batch.numel()`` items.
        score: what acts on the scores; None for nothing.
        visible: who sees whom.
        first: tokens before the first query; their rows cannot be asked for.
    """

    def __init__(self, batch: torch.Size, score: Score | None, visible: Visible, first: int = 0) -> None:
        self.batch, self.score, self.visible, self.first = batch, score, visible, first
        self.num_leaves = 0 if score is None else len(score.leaves)
        # Causality alone needs no more than the triangle of a block to be hidden.
        self.triangle = all(isinstance(part, Causal) for part in visible.parts) and visible.is_causal

    def leaves(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the score may be differentiated by."""
        return tensors[2 : 2 + self.num_leaves]

    def chain(self, tensors: Sequence[Tensor], start: int, stop: int, columns: int) -> Tensor:
        """Rows start … stop of S and their first columns, beyond which they are 0: (B, stop − start, columns)."""
        raw = self._raw(tensors, start, stop, columns)
        scores = raw if self.score is None else self._acted(raw, tensors, start)
        if self.triangle:
            if self.score is not None and torch.is_grad_enabled():  # autograd may have saved what the score gave
                scores = scores.clone()
            scores[..., start:] += scores.new_full((stop - start, columns - start), -torch.inf).triu(1)
            return scores.softmax(-1)
        seen = tensors[2 + self.num_leaves :]
        allowed = self.visible.rows(start, stop, columns, seen, scores.device)
        if allowed is None:
            return scores.softmax(-1)
        if not self.visible.own:  # a row without a target jumps to itself
            own = torch.ones(stop - start, columns, dtype=torch.bool, device=scores.device).tril(start).triu(start)
            allowed = allowed | (own & ~allowed.any(-1, keepdim=True))
        return self._in_batch(scores).masked_fill(~allowed, -torch.inf).view(scores.shape).softmax(-1)

    def pull(
        self, tensors: Sequence[Tensor], start: int, stop: int, d_scores: Tensor, by_leaves: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients by the block's queries, by keys up to its last column, and by what it needs of the leaves.

        Args:
            tensors: as above.
            start: the first row.
            stop: the row after the last.
            d_scores: gradient by the scores as the softmax takes them, (B, stop − start, columns).
            by_leaves: whether gradients by leaves are wanted.
        """
        query, key = tensors[:2]
        d_leaves: list[Tensor] = []
        if self.score is not None and (by_leaves or not self.score.adds):
            leaves = self.score.at(self.leaves(tensors), start, stop)
            # What only adds looks at shapes.
            raw = d_scores if self.score.adds else self._raw(tensors, start, stop, d_scores.size(-1))
            d_raw, *d_leaves = self.score.pull(self._in_batch(raw), start, leaves, self._in_batch(d_scores))
            d_scores = d_raw.reshape(d_scores.shape)
        here = query[:, start - self.first : stop - self.first]
        return d_scores @ key[:, : d_scores.size(-1)], d_scores.mT @ here, d_leaves

    def push(
        self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None], chain: Tensor, start: int, stop: int
    ) -> Tensor:
        """The tangent of rows that are ``chain``."""
        columns = chain.size(-1)
        query, key = tensors[:2]
        d_query, d_key, *d_leaves = (
            torch.zeros_like(x) if t is None else t
            for t, x in zip(tangents[: 2 + self.num_leaves], tensors, strict=False)
        )
        d_scores = d_query[:, start:stop] @ key[:, :columns].mT + query[:, start:stop] @ d_key[:, :columns].mT
        if self.score is not None:
            leaves, d_own = (self.score.at(x, start, stop) for x in (self.leaves(tensors), d_leaves))
            raw = self._in_batch(self._raw(tensors, start, stop, columns))
            d_scores = self.score.push(raw, start, leaves, self._in_batch(d_scores), d_own).view(chain.shape)
        weighted = chain * d_scores
        return weighted - chain * weighted.sum(-1, keepdim=True)

    def _raw(self, tensors: Sequence[Tensor], start: int, stop: int, columns: int) -> Tensor:
        query, key = tensors[:2]
        return query[:, start - self.first : stop - self.first] @ key[:, :columns].mT

    def _acted(self, raw: Tensor, tensors: Sequence[Tensor], start: int) -> Tensor:
        assert self.score is not None
        leaves = self.score.at(self.leaves(tensors), start, start + raw.size(-2))
        return self.score.acted(self._in_batch(raw), start, leaves).reshape(raw.shape)

    def _in_batch(self, block: Tensor) -> Tensor:
        return block.view(*self.batch, *block.shape[-2:])


class Blockwise(NamedTuple):
    """A jump chain that gives its rows block by block."""

    rows: SoftmaxRows
    tensors: tuple[Tensor, ...]  # that rows are made from
    jump_rates: Tensor | None  # ρ, broadcastable to (..., N); None means 1
