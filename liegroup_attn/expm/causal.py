"""Jumps of a causal softmax chain, block of rows by block of rows: scores formed once, memory linear in N."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liegroup_attn.expm.jumps import Plan, Rows, jumped_from, pushes, reverse_block, run_block
from liegroup_attn.tensors import pick

__all__ = ["causal_jumps", "extend_jumps"]


def causal_jumps(query: Tensor, key: Tensor, onward: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
    """Jumps of the causal chain S = softmax(q kᵀ), rows block by block; scores are formed once for all jumps.

    Inside a block the recursion needs only the block's own triangle, since earlier rows are known for every m. Memory
    is linear in N: a block of rows of S at a time, in forward and backward.

    Args:
        query: (B, N, E), scaled.
        key: (B, N, E).
        onward: a, (B, N), ≥ 0; None means 1 (explicit only).
        value: X_0, (B, N, D).
        plan: M, recursion, block size.

    Returns:
        J_0 … J_{M−1} (explicit) or J_1 … J_M (implicit), side by side: (B, N, M·D).
    """
    return pick(_CausalJumps, _CausalJumpsForwardAD).apply(query, key, onward, value, plan)


def extend_jumps(
    query: Tensor,
    key: Tensor,
    onward: Tensor | None,
    value: Tensor,
    plan: Plan,
    past: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Jumps of new rows, given the iterates of all rows before them; the plain formula, differentiable.

    Args:
        query: (B, N, E), scaled, of the new rows.
        key: (B, P + N, E), of all rows.
        onward: a of the new rows, (B, N), or None.
        value: X_0 of the new rows, (B, N, D).
        plan: M, recursion, block size.
        past: iterates that earlier rows jumped from, (B, P, M·D); None if there are none.
        bias: added to the scores, (B, N, P + N); each row has a target that it does not hide.

    Returns:
        Jumps of the new rows, (B, N, M·D), and the iterates they were taken from, the same in pieces of rows.
    """
    known = _Known(past)
    offset, jumps = known.offset, []
    for start, stop in _spans(value.size(-2), plan.block_size):
        added = None if bias is None else bias[:, start:stop, : offset + stop]
        rows = _rows(query[:, start:stop], key[:, : offset + stop], added)
        x = value[:, start:stop]
        seen = known.seen_by(rows.before, x.new_zeros(*x.shape[:-1], plan.jumps * x.size(-1)))
        found = run_block(rows, seen, _at(onward, start, stop), x, plan)
        known.append(found[1])
        jumps.append(found[0])
    return torch.cat(jumps, -2), known.pieces


class _Known:
    """Iterates of earlier rows in pieces, of which four become one: blocks come one by one, and no tensor is written in
    place (vmap) nor copied more than log₄ times."""

    def __init__(self, past: Tensor | None) -> None:
        self.past = [] if past is None or not past.size(-2) else [past]
        self.pieces: list[Tensor] = []
        self.offset = 0 if past is None else past.size(-2)

    def append(self, block: Tensor) -> None:
        self.pieces.append(block)
        while len(self.pieces) > 3 and self.pieces[-4].size(-2) == self.pieces[-1].size(-2):
            self.pieces[-4:] = [torch.cat(self.pieces[-4:], -2)]

    def seen_by(self, before: Tensor, nothing: Tensor) -> Tensor:
        """before (B, b, rows known) times all that is known, (B, b, M·D)."""
        pieces = [*self.past, *self.pieces]
        parts = before.split([piece.size(-2) for piece in pieces], -1)
        return sum((part @ piece for part, piece in zip(parts, pieces, strict=True)), nothing)


class _CausalJumps(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, onward: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
        return extend_jumps(query, key, onward, value, plan)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, onward, value, ctx.plan = inputs
        # Inputs and output only: what is recomputed from them is differentiable again.
        ctx.save_for_backward(query, key, onward, value, output)
        ctx.save_for_forward(query, key, onward, value, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, onward, value, jumps = ctx.saved_tensors
        plan = ctx.plan
        spans = _spans(value.size(-2), plan.block_size)
        wide = jumped_from(value, jumps, onward, plan)
        # One accumulator a block: slices of one tensor could not be written in place under vmap.
        later: list[Any] = [0.0] * len(spans)  # Σ over later rows of Sᵀh
        d_key: list[Any] = [0.0] * len(spans)
        d_query: list[Tensor] = []
        d_onward: list[Any] = []
        d_value: list[Tensor] = []
        for i, (start, stop) in reversed(list(enumerate(spans))):
            rows = _rows(query[:, start:stop], key[:, :stop])
            a = _at(onward, start, stop)
            h, w, da = reverse_block(
                rows, later[i], a, wide[:, start:stop], jumps[:, start:stop], grad[:, start:stop], plan
            )
            weight = (h * jumps[:, start:stop]).sum(-1, keepdim=True)  # Σ_j of S ∘ dS
            d_scores = torch.baddbmm(-weight, h, wide[:, :stop].mT)
            d_scores *= rows.chain  # softmax backward: S ∘ (dS − Σ S ∘ dS)
            own = d_scores.diagonal(start, -2, -1)  # a difference of large numbers after a long time; rows sum to 0
            own.zero_()
            own.sub_(d_scores.sum(-1))
            d_query.append(d_scores @ key[:, :stop])
            for j, part in enumerate((d_scores.mT @ query[:, start:stop]).split(plan.block_size, -2)):
                d_key[j] = d_key[j] + part
            if start:
                for j, part in enumerate((rows.before.mT @ h).split(plan.block_size, -2)):
                    later[j] = later[j] + part
            d_value.append(w)
            d_onward.append(da)
        return (
            torch.cat(d_query[::-1], -2),
            torch.cat(d_key, -2),
            None if onward is None else torch.cat(d_onward[::-1], -1),
            torch.cat(d_value[::-1], -2),
            None,
        )


class _CausalJumpsForwardAD(_CausalJumps):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        query, key, onward, value, jumps = ctx.saved_tensors
        plan = ctx.plan
        d_query, d_key, d_onward, d_value, _ = tangents
        d_query = torch.zeros_like(query) if d_query is None else d_query
        d_key = torch.zeros_like(key) if d_key is None else d_key
        d_value = torch.zeros_like(value) if d_value is None else d_value
        wide = jumped_from(value, jumps, onward, plan)
        push = pushes(wide, jumps, d_onward, plan.jumps)
        moved, found = _Known(None), []
        for start, stop in _spans(value.size(-2), plan.block_size):
            rows = _rows(query[:, start:stop], key[:, :stop])
            d_scores = d_query[:, start:stop] @ key[:, :stop].mT + query[:, start:stop] @ d_key[:, :stop].mT
            weighted = rows.chain * d_scores
            d_chain = weighted - rows.chain * weighted.sum(-1, keepdim=True)
            seen = moved.seen_by(rows.before, d_chain @ wide[:, :stop])
            block_push = None if push is None else [p[:, start:stop] for p in push]
            tangent, kept = run_block(rows, seen, _at(onward, start, stop), d_value[:, start:stop], plan, block_push)
            moved.append(kept)
            found.append(tangent)
        return torch.cat(found, -2)


def _rows(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Rows:
    """S for the last rows: query (B, b, E), key (B, stop, E) up to and with these rows."""
    scores = query @ key.mT
    scores = scores if bias is None else scores + bias
    b, start = query.size(-2), key.size(-2) - query.size(-2)
    scores[..., start:] += torch.full((b, b), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    chain = scores.softmax(-1)
    return Rows(chain, chain[..., :start], chain[..., start:])


def _spans(n: int, block_size: int) -> list[tuple[int, int]]:
    return [(start, min(start + block_size, n)) for start in range(0, n, block_size)]


def _at(onward: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if onward is None else onward[..., start:stop]
