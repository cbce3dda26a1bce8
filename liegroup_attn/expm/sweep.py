"""Causal softmax chains block by block: every clock at about the cost of its value products, memory linear in N."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.expm.base import (
    HopMethod,
    flatten_batch,
    mixture,
    per_row,
    within,
    working_dtype,
)
from liegroup_attn.expm.causal import causal_jumps, extend_jumps
from liegroup_attn.expm.jumps import Plan, columns, iterates
from liegroup_attn.expm.kernels import kernels_available
from liegroup_attn.generators import Generator, SoftmaxGenerator
from liegroup_attn.tensors import without_autocast

__all__ = ["CausalSweep"]


class CausalSweep(HopMethod):
    """One sweep over blocks of query rows; in a block's turn all it needs of earlier rows is known.

    Scores are formed once, a block of rows at a time, in forward and again in backward. Exponential and Erlang clock:
    a triangular solve inside each block, exact; with the exponential clock the cost of one attention. Fixed clock: K
    hops as in ``Uniformization``, applied to K·D-wide values.

    Args:
        tol: as in ``HopMethod``; of no effect on clocks that are resolvents.
        max_terms: as in ``HopMethod``; of no effect on clocks that are resolvents.
        block_size: rows in a block; any number ≥ 1, it need not divide N.
        recompute: as in ``HopMethod``.
        kernels: experimental: sweep by the Triton kernels, which take head widths 16, 32, 64 and 128 on a GPU and are
            differentiable once; they have not yet run on one.

    Raises:
        GeneratorError: not a causal ``SoftmaxGenerator``, or one with a bias or a mask; a block size < 1.
        ShapeError: one time per query row with a clock that is a resolvent.
        ConvergenceError: ``tol`` and ``max_terms`` given and K hops do not reach ``tol``.

    Example:
        >>> from liegroup_attn import ExponentialClock, SoftmaxGenerator, expm_multiply
        >>> q = torch.zeros(2, 4)
        >>> Q = SoftmaxGenerator(q, q, is_causal=True)
        >>> expm_multiply(Q, torch.tensor([[1.0], [0.0]]), clock=ExponentialClock(), method=CausalSweep())
        tensor([[1.0000],
                [0.3333]])

    Source: docs/mathematics; [Fagnou2024]_ for one scalar rate.
    """

    def __init__(
        self,
        tol: float | None = None,
        max_terms: int | None = None,
        *,
        block_size: int = 128,
        recompute: bool = False,
        kernels: bool = False,
    ) -> None:
        super().__init__(tol, max_terms, recompute=recompute)
        if block_size < 1:
            raise GeneratorError(f"block_size: expected at least 1 row, got {block_size}; 128 suits most")
        if kernels:
            available, reason = kernels_available()
            if not available:
                raise GeneratorError(f"kernels: expected Triton, got none; {reason}")
        self.block_size = block_size
        self.kernels = kernels

    @staticmethod
    def takes(generator: Generator) -> bool:
        """Whether this sweeps along it: a causal softmax chain whose scores are q·k alone."""
        plain = isinstance(generator, SoftmaxGenerator) and generator.score_bias is None and not generator.has_mask
        return plain and generator.is_causal

    def _act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool) -> Tensor:
        if not (isinstance(generator, SoftmaxGenerator) and self.takes(generator)):
            bias = " and a score_bias" if getattr(generator, "score_bias", None) is not None else ""
            mask = " and an attn_mask" if getattr(generator, "has_mask", False) else ""
            raise GeneratorError(
                "generator: expected a SoftmaxGenerator with is_causal=True and no bias or mask for CausalSweep, got "
                f"{type(generator).__name__} with is_causal={generator.is_causal}{bias}{mask}; use method=None"
            )
        if clock.resolvents is not None and per_row(time):
            raise ShapeError(
                f"time: expected one time per head, (..., 1), for a {clock!r} in CausalSweep, got {tuple(time.shape)}; "
                "put what varies by token into jump_rates, or use Uniformization()"
            )
        with without_autocast(value):
            hops = 0 if clock.resolvents else self.count_hops(time, value.dtype, clock)
            dtype = torch.promote_types(working_dtype(value, hops), working_dtype(generator.query))
            batch = torch.broadcast_shapes(generator.batch_shape, value.shape[:-2])
            run = self._prepare(generator.jump_rates, value, time, clock, hops, first_hop, batch, dtype)
            query, key = (flatten_batch(run.batch, x) for x in (generator.query, generator.key))
            if not run.plan.jumps:  # time 0, and no derivative by it
                jumps = run.value[..., :0]
            elif self.kernels:
                from liegroup_attn.expm.kernels.jumps import causal_jumps_triton

                jumps = causal_jumps_triton(
                    query,
                    key,
                    run.onward,
                    run.value,
                    stages=run.plan.jumps,
                    implicit=run.plan.implicit,
                    scale=generator.scale,
                )
            else:
                scaled = generator.scale * query.to(dtype)
                jumps = causal_jumps(scaled, key.to(dtype), run.onward, run.value, run.plan)
            mixed = run.mix(jumps)
            mixed = generator.jump(mixed) if run.jump_after else mixed
        return mixed.to(value.dtype)

    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: Tensor,
        *,
        jump_rates: Tensor | None,
        time: Tensor,
        clock: Clock,
        first_hop: bool,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix new tokens with all before them, given what earlier calls kept: exact, one row of scores a token.

        Args:
            query: (..., N, E), of the new tokens.
            key: (..., P + N, E), of all tokens.
            value: (..., N, D), of the new tokens.
            past: iterates of the earlier tokens, (..., P, M·D).
            jump_rates: ρ of the new tokens, (..., N), or None.
            time: (..., 1).
            clock: law of τ.
            first_hop: first jump, then run.
            attn_mask: broadcastable to (..., N, P + N), bool (True = takes part) or float, on top of causality; taken
                as it is, closed or not. A row without an allowed target keeps its own value.
            scale: of the scores; default 1/√E.

        Returns:
            The mixed values (..., N, D), and the iterates of the new tokens (..., N, M·D) in the dtype of ``past``.
        """
        with without_autocast(value):
            dtype = past.dtype
            hops = 0 if clock.resolvents else self.count_hops(time, value.dtype, clock)
            run = self._prepare(jump_rates, value, time, clock, hops, first_hop, value.shape[:-2], dtype)
            query, key, past = (flatten_batch(run.batch, x.to(dtype)) for x in (query, key, past))
            query = (query.size(-1) ** -0.5 if scale is None else scale) * query
            bias = None if attn_mask is None else _causal_bias(attn_mask, query.size(-2), key.size(-2), dtype)
            bias = None if bias is None else flatten_batch(run.batch, bias)
            jumps, pieces = extend_jumps(query, key, run.onward, run.value, run.plan, past, bias)
            kept = torch.cat(pieces, -2)
            return run.mix(jumps).to(value.dtype), kept.view(*run.batch, *kept.shape[-2:])

    def _prepare(
        self,
        jump_rates: Tensor | None,
        value: Tensor,
        time: Tensor,
        clock: Clock,
        hops: int,
        first_hop: bool,
        batch: torch.Size,
        dtype: torch.dtype,
    ) -> _Run:
        onward, weights = jump_rates, None
        joint = first_hop and not per_row(time)
        if clock.resolvents is None:
            plan = Plan(hops + joint, False, self.block_size)
            weights = clock.hop_weights(time, hops)
        else:
            plan = Plan(clock.resolvents, True, self.block_size)
            batch = torch.broadcast_shapes(batch, time.shape[:-1])
            onward = time.to(value.device, torch.float64) / clock.resolvents
            onward = within(onward if jump_rates is None else onward * jump_rates.to(torch.float64), dtype)
            onward = onward if onward.dim() else onward.unsqueeze(0)
        if onward is not None:
            onward = flatten_batch(batch, onward.to(dtype).expand(*onward.shape[:-1], value.size(-2)), 1)
        return _Run(plan, batch, flatten_batch(batch, value.to(dtype)), onward, weights, joint, first_hop and not joint)


def _causal_bias(attn_mask: Tensor, new: int, seen: int, dtype: torch.dtype) -> Tensor:
    """A mask of the last rows as what is added to scores, (..., N, P + N); a row without a target sees itself."""
    ahead = torch.ones(new, seen, dtype=torch.bool, device=attn_mask.device).triu(seen - new + 1)
    if attn_mask.dtype == torch.bool:
        hidden = ~attn_mask | ahead
        bias = torch.zeros(hidden.shape, dtype=dtype, device=attn_mask.device)
    else:
        hidden = (attn_mask <= torch.finfo(attn_mask.dtype).min / 2) | ahead
        bias = attn_mask.to(dtype).expand(hidden.shape)
    own = torch.eye(seen, dtype=torch.bool, device=ahead.device)[seen - new :]
    alone = hidden.all(-1, keepdim=True)
    return bias.masked_fill(hidden & ~(alone & own), -torch.inf).masked_fill(alone & own, 0)


class _Run(NamedTuple):
    """One call, flattened: what goes into the recursion, and how its jumps become the result."""

    plan: Plan
    batch: torch.Size
    value: Tensor  # (B, N, D)
    onward: Tensor | None  # (B, N)
    weights: Tensor | None  # of the hops; None for resolvents
    joint: bool  # the first hop is one of the jumps: S Σ p_k X_k = Σ p_k J_k if one p serves all rows
    jump_after: bool

    def mix(self, jumps: Tensor) -> Tensor:
        """(B, N, M·D) → (..., N, D)."""
        shape = (*self.batch, *self.value.shape[-2:])
        terms = columns(jumps, self.plan.jumps) if self.joint else iterates(self.value, jumps, self.onward, self.plan)
        if self.weights is None:
            return terms[-1].reshape(shape)
        return mixture(self.weights, [term.reshape(shape) for term in terms])
