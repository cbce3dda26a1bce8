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
from liegroup_attn.expm.jumps import Plan, columns, iterates_of
from liegroup_attn.generators import Generator
from liegroup_attn.generators.rows import Blockwise
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

    Raises:
        GeneratorError: a generator that is not causal, or not ``blockwise``; a block size < 1.
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
    ) -> None:
        super().__init__(tol, max_terms, recompute=recompute)
        if block_size < 1:
            raise GeneratorError(f"block_size: expected at least 1 row, got {block_size}; 128 suits most")
        self.block_size = block_size

    @staticmethod
    def takes(generator: Generator) -> bool:
        """Whether this sweeps along it: a causal chain that gives its rows block by block."""
        return generator.is_causal and generator.blockwise

    def _jumps(self, time: Tensor, first_hop: bool) -> bool:
        return first_hop and per_row(time)

    def _act(self, generator: Generator, value: Tensor, time: Tensor, clock: Clock, first_hop: bool) -> Tensor:
        if not self.takes(generator):
            raise GeneratorError(
                "generator: expected a SoftmaxGenerator with is_causal=True for CausalSweep, got "
                f"{type(generator).__name__} with is_causal={generator.is_causal}; use method=None"
            )
        if clock.resolvents is not None and per_row(time):
            raise ShapeError(
                f"time: expected one time per head, (..., 1), for a {clock!r} in CausalSweep, got {tuple(time.shape)}; "
                "put what varies by token into jump_rates, or use Uniformization()"
            )
        with without_autocast(value):
            hops = 0 if clock.resolvents else self.count_hops(time, value.dtype, clock)
            batch = torch.broadcast_shapes(generator.batch_shape, value.shape[:-2])
            if clock.resolvents:
                batch = torch.broadcast_shapes(batch, time.shape[:-1])
            chain = generator.softmax_rows(batch, working_dtype(value, hops))
            run = self._prepare(chain, value, time, clock, hops, first_hop)
            if not run.plan.jumps:  # time 0, and no derivative by it
                jumps = run.value[..., :0]
            else:
                jumps = causal_jumps(chain.rows, chain.tensors, run.a, run.value, run.plan)
            mixed = run.mix(jumps)
            mixed = generator.jump(mixed) if run.jump_after else mixed
        return mixed.to(value.dtype)

    def extend(
        self, generator: Generator, value: Tensor, past: Tensor, time: Tensor, clock: Clock, first_hop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mix values of new tokens with all before them, given the iterates that earlier calls returned: exact decoding.

        The number of hops is that of the iterates that are kept, whatever ``tol`` and ``max_terms``.

        Args:
            generator: ``SoftmaxGenerator`` with the P tokens before as its ``past``; closed or not.
            value: of the N new tokens, (..., N, D).
            past: iterates of the earlier tokens, (..., P, M·D).
            time: (..., 1).
            clock: law of τ.
            first_hop: first jump, then run.

        Returns:
            The mixed values (..., N, D), and the iterates of the new tokens (..., N, M·D) in the dtype of ``past``.
        """
        with without_autocast(value):
            # Once and for all by the width of what is kept, whatever the time has become.
            hops = 0 if clock.resolvents else max(1, past.size(-1) // value.size(-1) - first_hop)
            chain = generator.softmax_rows(value.shape[:-2], past.dtype)
            run = self._prepare(chain, value, time, clock, hops, first_hop)
            before = flatten_batch(run.batch, past)
            jumps, pieces = extend_jumps(chain.rows, chain.tensors, run.a, run.value, run.plan, before)
            kept = torch.cat(pieces, -2)
            return run.mix(jumps).to(value.dtype), kept.view(*run.batch, *kept.shape[-2:])

    def _prepare(self, chain: Blockwise, value: Tensor, time: Tensor, clock: Clock, hops: int, first_hop: bool) -> _Run:
        batch, dtype = chain.rows.batch, chain.tensors[0].dtype
        a, weights = chain.jump_rates, None
        joint = first_hop and not per_row(time)
        if clock.resolvents is None:
            plan = Plan(hops + joint, False, self.block_size)
            weights = clock.hop_weights(time, hops)
        else:
            plan = Plan(clock.resolvents, True, self.block_size)
            mean = time.to(value.device, torch.float64) / clock.resolvents
            a = within(mean if a is None else mean * a.to(torch.float64), dtype)
            a = a if a.dim() else a.unsqueeze(0)
        if a is not None:
            a = flatten_batch(batch, a.to(dtype).expand(*a.shape[:-1], value.size(-2)), 1)
        return _Run(plan, batch, flatten_batch(batch, value.to(dtype)), a, weights, joint, first_hop and not joint)


class _Run(NamedTuple):
    """One call, flattened: what goes into the recursion, and how its jumps become the result."""

    plan: Plan
    batch: torch.Size
    value: Tensor  # (B, N, D)
    a: Tensor | None  # (B, N)
    weights: Tensor | None  # of the hops; None for resolvents
    joint: bool  # the first hop is one of the jumps: S Σ p_k X_k = Σ p_k J_k if one p serves all rows
    jump_after: bool

    def mix(self, jumps: Tensor) -> Tensor:
        """(B, N, M·D) → (..., N, D)."""
        shape = (*self.batch, *self.value.shape[-2:])
        terms = columns(jumps, self.plan.jumps) if self.joint else iterates_of(self.value, jumps, self.a, self.plan)
        if self.weights is None:
            return terms[-1].reshape(shape)
        return mixture(self.weights, [term.reshape(shape) for term in terms])
