"""Jumps J_m = S X_m along the iterates of a chain, with a reverse sweep for a backward.

Two recursions share everything but one line. *Explicit* (hops of uniformization): X_{m+1} = X_m + a(J_m − X_m).
*Implicit* (resolvents): (1 + a) X_m = X_{m−1} + a J_m. Either way all gradients of S come from one wide product,
Σ_m h_m X_mᵀ, instead of one product a jump.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "causal_jumps", "formed_jumps", "iterates"]


class Plan(NamedTuple):
    """How many jumps, of which recursion, and in blocks of how many rows."""

    jumps: int  # M
    implicit: bool
    block_size: int = 128


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
    return _pick(_CausalJumps, _CausalJumpsForwardAD).apply(query, key, onward, value, plan)


def formed_jumps(chain: Tensor, onward: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
    """Jumps of a formed S, explicit recursion.

    Args:
        chain: S, (B, N, N).
        onward: a, (B, N), in [0, 1]; None means 1.
        value: X_0, (B, N, D).
        plan: M.

    Returns:
        J_0 … J_{M−1}, (B, N, M·D).
    """
    return _pick(_FormedJumps, _FormedJumpsForwardAD).apply(chain, onward, value, plan)


def iterates(value: Tensor, jumps: Tensor, onward: Tensor | None, plan: Plan) -> list[Tensor]:
    """X_0 … X_M from the jumps, M + 1 of (B, N, D); differentiable."""
    found = [value]
    for jump in jumps.split(value.size(-1), -1)[: plan.jumps]:
        found.append(_next(found[-1], jump, onward, plan.implicit))
    return found


def _next(x: Tensor, jump: Tensor, onward: Tensor | None, implicit: bool) -> Tensor:
    if onward is None:
        return jump
    a = onward.unsqueeze(-1)
    return (x + a * jump) / (1 + a) if implicit else x + a * (jump - x)


def _jumped_from(value: Tensor, jumps: Tensor, onward: Tensor | None, plan: Plan) -> Tensor:
    """The iterates that the jumps were taken from, side by side: (B, N, M·D)."""
    found = iterates(value, jumps, onward, plan)
    return torch.cat(found[1:] if plan.implicit else found[:-1], -1)


def _pick(reverse: Any, forward: Any) -> Any:
    # torch.compile refuses a Function that has a forward-mode rule of its own.
    return reverse if torch.compiler.is_compiling() else forward


# --- one block of rows ----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows start … stop of S: what they see of earlier rows and of their own block."""

    chain: Tensor  # (B, b, stop)
    before: Tensor  # (B, b, start)
    here: Tensor  # (B, b, b), lower triangular


def rows_of(query: Tensor, key: Tensor) -> _Rows:
    """S for the last rows: query (B, b, E), key (B, stop, E) up to and with these rows."""
    scores = query @ key.mT
    b, start = query.size(-2), key.size(-2) - query.size(-2)
    scores[..., start:] += torch.full((b, b), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    chain = scores.softmax(-1)
    return _Rows(chain, chain[..., :start], chain[..., start:])


def _system(rows: _Rows, onward: Tensor) -> Tensor:
    """The block's triangle of I + diag(a)(I − S).

    The diagonal 1 + a_i Σ_{j<i} S_ij is summed, not 1 + a_i(1 − S_ii): nothing cancels, and each solution is a convex
    combination however large a is.
    """
    below = rows.here.tril(-1)
    leave = rows.before.sum(-1) + below.sum(-1)
    return torch.diag_embed(1 + onward * leave) - onward.unsqueeze(-1) * below


def run_block(
    rows: _Rows,
    seen: Tensor,
    onward: Tensor | None,
    x: Tensor,
    plan: Plan,
    push: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recursion inside one block.

    Args:
        rows: of S.
        seen: (B, b, M·D), what earlier rows contribute to each jump.
        onward: (B, b) or None.
        x: X_0 of the block, (B, b, D).
        plan: M and recursion.
        push: M of (B, b, D) added to each step; only tangents need it.

    Returns:
        Jumps, and the iterates they were taken from: (B, b, M·D) each.
    """
    jumps, kept = [], []
    system = _system(rows, onward) if plan.implicit and onward is not None else None
    for m, far in enumerate(seen.split(x.size(-1), -1)):
        if system is not None and onward is not None:
            right = x + onward.unsqueeze(-1) * far
            right = right if push is None else right + push[m]
            x = torch.linalg.solve_triangular(system, right, upper=False)
            jump = far + rows.here @ x
            kept.append(x)
        else:
            jump = far + rows.here @ x
            kept.append(x)
            x = _next(x, jump, onward, implicit=False)
            x = x if push is None else x + push[m]
        jumps.append(jump)
    return torch.cat(jumps, -1), torch.cat(kept, -1)


def _spans(n: int, block_size: int) -> list[tuple[int, int]]:
    return [(start, min(start + block_size, n)) for start in range(0, n, block_size)]


def _at(onward: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if onward is None else onward[..., start:stop]


# --- causal, block by block -----------------------------------------------------------------------------------


def extend_jumps(
    query: Tensor, key: Tensor, onward: Tensor | None, value: Tensor, plan: Plan, past: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Jumps of new rows, given the iterates of all rows before them; the plain formula, differentiable.

    Args:
        query: (B, N, E), scaled, of the new rows.
        key: (B, P + N, E), of all rows.
        onward: a of the new rows, (B, N), or None.
        value: X_0 of the new rows, (B, N, D).
        plan: M, recursion, block size.
        past: iterates that earlier rows jumped from, (B, P, M·D); None if there are none.

    Returns:
        Jumps of the new rows, (B, N, M·D), and the iterates they were taken from, the same in pieces of rows.
    """
    known = _Known(past)
    offset, jumps = known.length, []
    for start, stop in _spans(value.size(-2), plan.block_size):
        rows = rows_of(query[:, start:stop], key[:, : offset + stop])
        x = value[:, start:stop]
        seen = known.seen_by(rows.before, x.new_zeros(*x.shape[:-1], plan.jumps * x.size(-1)))
        found = run_block(rows, seen, _at(onward, start, stop), x, plan)
        known.append(found[1])
        jumps.append(found[0])
    return torch.cat(jumps, -2), known.pieces


class _Known:
    """Iterates of earlier rows in pieces that double in size: blocks come one by one, and no tensor is written in place
    (vmap) nor copied more than log₂ times."""

    def __init__(self, past: Tensor | None) -> None:
        self.past = [] if past is None or not past.size(-2) else [past]
        self.pieces: list[Tensor] = []
        self.length = 0 if past is None else past.size(-2)

    def append(self, block: Tensor) -> None:
        while self.pieces and self.pieces[-1].size(-2) == block.size(-2):
            block = torch.cat([self.pieces.pop(), block], -2)
        self.pieces.append(block)

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
        wide = _jumped_from(value, jumps, onward, plan)
        wide_one = torch.cat([wide, torch.ones_like(wide[..., :1])], -1)
        # One accumulator a block: slices of one tensor could not be written in place under vmap.
        later: list[Any] = [0.0] * len(spans)  # Σ over later rows of Sᵀh
        d_key: list[Any] = [0.0] * len(spans)
        d_query: list[Tensor] = []
        d_onward: list[Any] = []
        d_value: list[Tensor] = []
        for i, (start, stop) in reversed(list(enumerate(spans))):
            rows = rows_of(query[:, start:stop], key[:, :stop])
            a = _at(onward, start, stop)
            h, w, da = _reverse_block(
                rows, later[i], a, wide[:, start:stop], jumps[:, start:stop], grad[:, start:stop], plan, value.size(-1)
            )
            weight = (h * jumps[:, start:stop]).sum(-1, keepdim=True)  # Σ_j of S ∘ dS
            d_scores = torch.cat([h, -weight], -1) @ wide_one[:, :stop].mT
            d_scores *= rows.chain  # softmax backward: S ∘ (dS − Σ S ∘ dS)
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


def _reverse_block(
    rows: _Rows,
    later: Any,
    onward: Tensor | None,
    wide: Tensor,
    jumps: Tensor,
    grad: Tensor,
    plan: Plan,
    width: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The recursion backwards inside one block: h (B, b, M·D), gradient of X_0 (B, b, D) and of a (B, b)."""
    later = later if isinstance(later, Tensor) else torch.zeros_like(grad)
    transposed = rows.here.mT
    system = _system(rows, onward).mT if plan.implicit and onward is not None else None
    parts = zip(*(t.split(width, -1) for t in (later, wide, jumps, grad)), strict=True)
    a = None if onward is None else onward.unsqueeze(-1)
    w: Any = None  # gradient of the iterate
    d_onward: Any = 0.0
    found = []
    for far, x, jump, g in reversed(list(parts)):
        if system is not None and a is not None:
            arriving = far + transposed @ g
            w = torch.linalg.solve_triangular(system, arriving if w is None else arriving + w, upper=True)
            h = g + a * w
            d_onward = d_onward + (w * (jump - x)).sum(-1)
        else:
            h = g if w is None else g + w if a is None else g + a * w
            if w is not None and a is not None:
                d_onward = d_onward + (w * (jump - x)).sum(-1)
                w = w - a * w + far + transposed @ h
            else:
                w = far + transposed @ h
        found.append(h)
    if onward is not None and not isinstance(d_onward, Tensor):
        d_onward = torch.zeros_like(onward)
    return torch.cat(found[::-1], -1), w, None if onward is None else d_onward


class _CausalJumpsForwardAD(_CausalJumps):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        query, key, onward, value, jumps = ctx.saved_tensors
        plan, width = ctx.plan, value.size(-1)
        d_query, d_key, d_onward, d_value, _ = tangents
        d_query = torch.zeros_like(query) if d_query is None else d_query
        d_key = torch.zeros_like(key) if d_key is None else d_key
        d_value = torch.zeros_like(value) if d_value is None else d_value
        wide = _jumped_from(value, jumps, onward, plan)
        push = _pushes(wide, jumps, d_onward, width, plan.jumps)
        moved, found = _Known(None), []
        for start, stop in _spans(value.size(-2), plan.block_size):
            rows = rows_of(query[:, start:stop], key[:, :stop])
            d_scores = d_query[:, start:stop] @ key[:, :stop].mT + query[:, start:stop] @ d_key[:, :stop].mT
            weighted = rows.chain * d_scores
            d_chain = weighted - rows.chain * weighted.sum(-1, keepdim=True)
            seen = moved.seen_by(rows.before, d_chain @ wide[:, :stop])
            block_push = None if push is None else [p[:, start:stop] for p in push]
            tangent, kept = run_block(rows, seen, _at(onward, start, stop), d_value[:, start:stop], plan, block_push)
            moved.append(kept)
            found.append(tangent)
        return torch.cat(found, -2)


def _pushes(wide: Tensor, jumps: Tensor, d_onward: Tensor | None, width: int, count: int) -> list[Tensor] | None:
    """How a change of a moves each iterate: da(J_m − X_m)."""
    if d_onward is None:
        return None
    return list((d_onward.unsqueeze(-1) * (jumps - wide)).split(width, -1))


# --- formed S -------------------------------------------------------------------------------------------------


class _FormedJumps(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(chain: Tensor, onward: Tensor | None, value: Tensor, plan: Plan) -> Tensor:
        x, found = value, []
        for _ in range(plan.jumps):
            found.append(chain @ x)
            x = _next(x, found[-1], onward, implicit=False)
        return torch.cat(found, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        chain, onward, value, ctx.plan = inputs
        ctx.save_for_backward(chain, onward, value, output)
        ctx.save_for_forward(chain, onward, value, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chain, onward, value, jumps = ctx.saved_tensors
        wide = _jumped_from(value, jumps, onward, ctx.plan)
        whole = _Rows(chain, chain[..., :0], chain)
        h, w, da = _reverse_block(whole, None, onward, wide, jumps, grad, ctx.plan, value.size(-1))
        return (h @ wide.mT if ctx.needs_input_grad[0] else None), da, w, None


class _FormedJumpsForwardAD(_FormedJumps):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        chain, onward, value, jumps = ctx.saved_tensors
        d_chain, d_onward, d_value, _ = tangents
        plan = ctx.plan
        wide = _jumped_from(value, jumps, onward, plan)
        push = _pushes(wide, jumps, d_onward, value.size(-1), plan.jumps)
        seen = torch.zeros_like(jumps) if d_chain is None else d_chain @ wide
        start = torch.zeros_like(value) if d_value is None else d_value
        return run_block(_Rows(chain, chain[..., :0], chain), seen, onward, start, plan, push)[0]
