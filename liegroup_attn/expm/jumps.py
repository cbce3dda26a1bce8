"""Jumps J_m = S X_m along the iterates of a chain, with a reverse sweep for a backward.

Two recursions share everything but one line. *Explicit* (hops of uniformization): X_{m+1} = X_m + a(J_m − X_m).
*Implicit* (resolvents): (1 + a) X_m = X_{m−1} + a J_m. Either way all gradients of S come from one wide product,
Σ_m h_m X_mᵀ, instead of one product a jump.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "Rows", "columns", "iterates_of", "jumped_from", "pushes", "reverse_block", "run_block", "step"]


class Plan(NamedTuple):
    """How many jumps, of which recursion, and in blocks of how many rows."""

    jumps: int  # M
    implicit: bool
    block_size: int = 128


def iterates_of(value: Tensor, jumps: Tensor, a: Tensor | None, plan: Plan) -> list[Tensor]:
    """X_0 … X_M from the jumps, M + 1 of (B, N, D); differentiable."""
    found = [value]
    for jump in columns(jumps, plan.jumps):
        found.append(step(found[-1], jump, a, plan.implicit))
    return found


def columns(joined: Tensor, count: int) -> list[Tensor]:
    """(B, N, M·D) → M of (B, N, D); a split, since each of M slices would have a gradient of the whole width."""
    width = joined.size(-1) // max(count, 1)
    return list(joined.split(width, -1)) if count and width else [joined] * count


def step(x: Tensor, jump: Tensor, a: Tensor | None, implicit: bool) -> Tensor:
    """The next iterate: x the one before, jump from it (explicit) or from the next itself (implicit)."""
    if a is None:
        return jump
    if not implicit:
        return x + a.unsqueeze(-1) * (jump - x)
    stay, go = shares(a)
    return stay.unsqueeze(-1) * x + go.unsqueeze(-1) * jump


def shares(a: Tensor) -> tuple[Tensor, Tensor]:
    """1/(1 + a) and a/(1 + a), (B, N): (1 + a)X = X₀ + aJ in numbers of which none is large."""
    stay = 1 / (1 + a)
    return stay, a * stay


def jumped_from(value: Tensor, jumps: Tensor, a: Tensor | None, plan: Plan) -> Tensor:
    """The iterates that the jumps were taken from, side by side: (B, N, M·D)."""
    found = iterates_of(value, jumps, a, plan)
    return torch.cat(found[1:] if plan.implicit else found[:-1], -1)


class Rows(NamedTuple):
    """Rows start … stop of S: what they see of earlier rows and of their own block."""

    chain: Tensor  # (B, b, stop)
    before: Tensor  # (B, b, start)
    here: Tensor  # (B, b, b), lower triangular


def system_of(rows: Rows, a: Tensor) -> Tensor:
    """The block's triangle of (I + diag(a)(I − S)) / (1 + a).

    The diagonal (1 + a_i Σ_{j<i} S_ij) / (1 + a_i) is summed, not 1 + a_i(1 − S_ii): nothing cancels, and each solution is
    a convex combination however large a is.
    """
    stay, go = shares(a)
    below = rows.here.tril(-1)
    leave = rows.before.sum(-1) + below.sum(-1)
    return torch.diag_embed(stay + go * leave) - go.unsqueeze(-1) * below


def run_block(
    rows: Rows,
    seen: Tensor,
    a: Tensor | None,
    x: Tensor,
    plan: Plan,
    push: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recursion inside one block.

    Args:
        rows: of S.
        seen: (B, b, M·D), what earlier rows contribute to each jump.
        a: (B, b) or None.
        x: X_0 of the block, (B, b, D).
        plan: M and recursion.
        push: M of (B, b, D) added to each step; only tangents need it.

    Returns:
        Jumps, and the iterates they were taken from: (B, b, M·D) each.
    """
    jumps, kept = [], []
    if plan.implicit and a is not None:  # an implicit plan has an a
        system = system_of(rows, a)
        stay, go = (part.unsqueeze(-1) for part in shares(a))
    for m, far in enumerate(columns(seen, plan.jumps)):
        if plan.implicit:
            right = stay * x + go * far
            right = right if push is None else right + stay * push[m]
            x = torch.linalg.solve_triangular(system, right, upper=False)
            jump = _added(far, rows.here, x)
            kept.append(x)
        else:
            jump = _added(far, rows.here, x)
            kept.append(x)
            x = step(x, jump, a, implicit=False)
            x = x if push is None else x + push[m]
        jumps.append(jump)
    return torch.cat(jumps, -1), torch.cat(kept, -1)


def reverse_block(
    rows: Rows,
    later: Any,
    a: Tensor | None,
    iterates: Tensor,
    jumps: Tensor,
    grad: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The recursion backwards inside one block: h (B, b, M·D), gradient of X_0 (B, b, D) and of a (B, b)."""
    later = later if isinstance(later, Tensor) else torch.zeros_like(grad)
    transposed = rows.here.mT
    if plan.implicit and a is not None:  # an implicit plan has an a
        system = system_of(rows, a).mT
        stay, go = (part.unsqueeze(-1) for part in shares(a))
    parts = zip(*(columns(t, plan.jumps) for t in (later, iterates, jumps, grad)), strict=True)
    column = None if a is None else a.unsqueeze(-1)
    w: Any = None  # gradient of the iterate
    d_a: Any = 0.0
    found = []
    for far, x, jump, g in reversed(list(parts)):
        if plan.implicit:
            arriving = _added(far, transposed, g)
            w = torch.linalg.solve_triangular(system, arriving if w is None else arriving + w, upper=True)
            h = g + go * w
            w = stay * w
            d_a = d_a + (w * (jump - x)).sum(-1)
        else:
            h = g if w is None else g + w if column is None else g + column * w
            if w is not None and column is not None:
                d_a = d_a + (w * (jump - x)).sum(-1)
                w = w - column * w + _added(far, transposed, h)
            else:
                w = _added(far, transposed, h)
        found.append(h)
    if a is not None and not isinstance(d_a, Tensor):
        d_a = torch.zeros_like(a)
    return torch.cat(found[::-1], -1), w, None if a is None else d_a


def _added(x: Tensor, matrix: Tensor, y: Tensor) -> Tensor:
    """x + matrix · y, in one pass where torch has one."""
    return torch.baddbmm(x, matrix, y) if x.dim() == 3 else x + matrix @ y


def pushes(iterates: Tensor, jumps: Tensor, d_a: Tensor | None, count: int) -> list[Tensor] | None:
    """How a change of a moves each iterate: da(J_m − X_m)."""
    if d_a is None:
        return None
    return columns(d_a.unsqueeze(-1) * (jumps - iterates), count)
