"""Jumps of a causal chain, block of rows by block of rows: scores formed once, memory linear in N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liegroup_attn.expm.jumps import Plan, Rows, jumped_from, pushes, reverse_block, run_block
from liegroup_attn.generators.rows import SoftmaxRows
from liegroup_attn.tensors import pick

__all__ = ["causal_jumps", "extend_jumps"]


def causal_jumps(rows: SoftmaxRows, tensors: Sequence[Tensor], a: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
    """Jumps of a causal chain S, rows block by block; scores are formed once for all jumps.

    Inside a block the recursion needs only the block's own triangle, since earlier rows are known for every m. Memory
    is linear in N: a block of rows of S at a time, in forward and backward.

    Args:
        rows: of S.
        tensors: that they are made from.
        a: (B, N), ≥ 0; None means 1 (explicit only).
        value: X_0, (B, N, D).
        plan: M, recursion, block size.

    Returns:
        J_0 … J_{M−1} (explicit) or J_1 … J_M (implicit), side by side: (B, N, M·D).
    """
    if torch.compiler.is_compiling():
        learned = [x for x in (a, value, *tensors) if x is not None and x.requires_grad]
        if not (learned and torch.is_grad_enabled()):  # Dynamo hands a context to an inlined forward of variable length
            return extend_jumps(rows, tensors, a, value, plan)[0]
    return pick(_CausalJumps, _CausalJumpsForwardAD).apply(rows, a, value, plan, *tensors)


def extend_jumps(
    rows: SoftmaxRows,
    tensors: Sequence[Tensor],
    a: Tensor | None,
    value: Tensor,
    plan: Plan,
    past: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Jumps of new rows, given the iterates of all rows before them; the plain formula, differentiable.

    Args:
        rows: of S, from the first of the N new tokens on.
        tensors: that they are made from.
        a: (B, N), or None.
        value: (B, N, D).
        plan: M, recursion, block size.
        past: iterates of the earlier tokens, (B, P, M·D), as this returned them for those; None for none.

    Returns:
        Jumps (B, N, M·D), and iterates of the new tokens in pieces of (B, ·, M·D): X_0 … X_{M−1} (explicit) or
        X_1 … X_M (implicit).
    """
    known, jumps, first = _Known(past), [], rows.first
    for start, stop in _spans(value.size(-2), plan.block_size):
        block = _block(rows, tensors, first + start, first + stop)
        x = value[:, start:stop]
        seen = known.seen_by(block.before, x.new_zeros(*x.shape[:-1], plan.jumps * x.size(-1)))
        found = run_block(block, seen, _at(a, start, stop), x, plan)
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
    def forward(rows: SoftmaxRows, a: Tensor | None, value: Tensor, plan: Plan, *tensors: Tensor) -> Tensor:
        return extend_jumps(rows, tensors, a, value, plan)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows, a, value, ctx.plan, *tensors = inputs
        # Inputs and output only: what is recomputed from them is differentiable again.
        ctx.save_for_backward(a, value, output, *tensors)
        ctx.save_for_forward(a, value, output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, value, jumps, *tensors = ctx.saved_tensors
        rows, plan = ctx.rows, ctx.plan
        by_leaves = any(ctx.needs_input_grad[6 : 6 + rows.num_leaves])
        spans = _spans(value.size(-2), plan.block_size)
        iterates = jumped_from(value, jumps, a, plan)
        # One accumulator a block: slices of one tensor could not be written in place under vmap.
        later: list[Any] = [0.0] * len(spans)  # Σ over later rows of Sᵀh
        d_key: list[Any] = [0.0] * len(spans)
        d_query: list[Tensor] = []
        d_a: list[Any] = []
        d_value: list[Tensor] = []
        d_leaves: list[list[Tensor]] = []
        for i, (start, stop) in reversed(list(enumerate(spans))):
            block = _block(rows, tensors, start, stop)
            of_block = _at(a, start, stop)
            h, w, da = reverse_block(
                block, later[i], of_block, iterates[:, start:stop], jumps[:, start:stop], grad[:, start:stop], plan
            )
            weight = (h * jumps[:, start:stop]).sum(-1, keepdim=True)  # Σ_j of S ∘ dS
            d_scores = torch.baddbmm(-weight, h, iterates[:, :stop].mT)
            d_scores *= block.chain  # softmax backward: S ∘ (dS − Σ S ∘ dS)
            own = d_scores.diagonal(start, -2, -1)  # a difference of large numbers after a long time; rows sum to 0
            own.zero_()
            rest = d_scores.sum(-1)
            own.sub_(rest if rows.visible.own else rest * (block.here.diagonal(0, -2, -1) > 0))
            of_query, of_keys, of_leaves = rows.pull(tensors, start, stop, d_scores, by_leaves)
            d_query.append(of_query)
            d_leaves.append(of_leaves)
            for j, part in enumerate(of_keys.split(plan.block_size, -2)):
                d_key[j] = d_key[j] + part
            if start:
                for j, part in enumerate((block.before.mT @ h).split(plan.block_size, -2)):
                    later[j] = later[j] + part
            d_value.append(w)
            d_a.append(da)
        return (
            None,
            None if a is None else torch.cat(d_a[::-1], -1),
            torch.cat(d_value[::-1], -2),
            None,
            torch.cat(d_query[::-1], -2),
            torch.cat(d_key, -2),
            *(rows.score.gather(rows.leaves(tensors), d_leaves[::-1]) if by_leaves else [None] * rows.num_leaves),
            *[None] * (len(tensors) - 2 - rows.num_leaves),
        )


class _CausalJumpsForwardAD(_CausalJumps):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        a, value, jumps, *tensors = ctx.saved_tensors
        rows, plan = ctx.rows, ctx.plan
        _, d_a, d_value, _, *d_tensors = tangents
        d_value = torch.zeros_like(value) if d_value is None else d_value
        iterates = jumped_from(value, jumps, a, plan)
        push = pushes(iterates, jumps, d_a, plan.jumps)
        moved, found = _Known(None), []
        for start, stop in _spans(value.size(-2), plan.block_size):
            block = _block(rows, tensors, start, stop)
            d_chain = rows.push(tensors, d_tensors, block.chain, start, stop)
            seen = moved.seen_by(block.before, d_chain @ iterates[:, :stop])
            block_push = None if push is None else [p[:, start:stop] for p in push]
            tangent, kept = run_block(block, seen, _at(a, start, stop), d_value[:, start:stop], plan, block_push)
            moved.append(kept)
            found.append(tangent)
        return torch.cat(found, -2)


def _block(rows: SoftmaxRows, tensors: Sequence[Tensor], start: int, stop: int) -> Rows:
    chain = rows.chain(tensors, start, stop, stop)
    return Rows(chain, chain[..., :start], chain[..., start:])


def _spans(n: int, block_size: int) -> list[tuple[int, int]]:
    return [(start, min(start + block_size, n)) for start in range(0, n, block_size)]


def _at(a: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if a is None else a[..., start:stop]
